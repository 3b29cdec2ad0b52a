"""Common to all tests: one thread a process, for tests run beside each other; pools of ranks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

import mmi_megatron  # noqa: F401  (torchvision can be imported from here on)

if TYPE_CHECKING:
    from tests.ranks import Ranks


def _pool() -> Iterator[Ranks]:
    """Processes that play the ranks of any layout, the same for all tests of a file."""
    from tests.ranks import Ranks  # not above: tests of the data pipeline go without it

    with Ranks() as pool:
        yield pool


ranks = pytest.fixture(scope="module", name="ranks")(_pool)
other_ranks = pytest.fixture(scope="module", name="other_ranks")(_pool)
"""Others, that have not seen what ``ranks`` did."""
