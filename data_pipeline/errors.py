"""The errors of the data pipeline: each says what is wrong, where, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class DataError(Exception):
    """Something the user can mend; the message is one line that names the file, key or setting."""


class SettingsError(DataError):
    """A setting that makes no sense, named in the message."""


class ResumeError(DataError):
    """A saved position that does not belong to this data, tokenizer or settings."""


class TooManyFailures(DataError):
    """More bad samples of a source than ``failure_limit`` allows.

    Attributes:
        failures: those that were not reported before (``quarantine.Failure``).
    """

    failures: Sequence[Any] = ()


class BadSample(Exception):
    """One sample that cannot be used; caught, counted and written to the ledger.

    Attributes:
        reason: short and fixed, what is counted.
        detail: what exactly was found.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail
