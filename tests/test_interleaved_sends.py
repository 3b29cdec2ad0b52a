"""Interleaved stages send while they compute: what is being sent stays in memory until it has been sent."""

from __future__ import annotations

import pytest

from tests.matrix import Layout, Steps, matrix_config
from tests.samples import SPECIAL, random_batch

ROWS = 4


def checked(config, steps: Steps) -> tuple[int, int]:
    """On a rank: train a step; how many tensors were sent while it computed, and how many of them were gone
    from where they were when their sending was waited for."""
    from unittest import mock

    from megatron.core.pipeline_parallel import p2p_communication

    from tests.matrix import run

    sent, gone = [], []
    original = p2p_communication._p2p_ops

    class Watched:
        def __init__(self, request, tensor):
            self.request, self.tensor, self.place = request, tensor, tensor.data_ptr()
            sent.append(tensor)

        def wait(self):
            self.request.wait()
            if self.tensor.data_ptr() != self.place:
                gone.append(self.place)

    def ops(**arguments):
        requests = original(**arguments)
        for name in {"send_next", "send_prev"} & requests.keys():
            requests[name] = Watched(requests[name], arguments[f"tensor_{name}"])
        return requests

    with mock.patch.object(p2p_communication, "_p2p_ops", ops):
        run(config, steps)
    return len(sent), len(gone)


@pytest.mark.parametrize("virtual", [1, 2])
def test_what_is_being_sent_stays_where_it_is(ranks, virtual):
    layout = Layout("PP2", pipeline=2, virtual=virtual)
    steps = Steps(SPECIAL, [[random_batch(row, 1, length=96) for row in range(ROWS)]])
    for sent, gone in ranks.run(2, checked, layout.apply(matrix_config(False, 61)), steps):
        assert sent >= ROWS and gone == 0
