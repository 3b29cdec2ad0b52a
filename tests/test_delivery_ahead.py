"""Copying the next step's pixels ahead of time moves neither the batches nor the position."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from mmi_megatron.parallel import groups
from mmi_megatron.train import delivery
from mmi_megatron.train.delivery import Delivery
from tests.small_run import story_config


@pytest.fixture
def config(tmp_path):
    config = story_config(tmp_path / "data")
    config.train.rows, config.train.micro_rows = 4, 2
    config.data = replace(config.data, executor="threads", workers=1)
    groups.initialize(config)
    yield config
    groups.destroy()


def test_what_is_copied_ahead_is_delivered_in_order_and_is_no_position(config, monkeypatch):
    plain = Delivery(config, 0, 1)
    expected = [plain.next() for _ in range(4)]
    plain.ahead()
    assert plain._early is None  # nothing to copy to
    plain.close()
    monkeypatch.setattr(delivery, "has_gpu", lambda: True)  # as far as the delivery knows
    early = Delivery(config, 0, 1)
    for wanted in expected:
        delivered = early.next()
        assert delivered.note == wanted.note
        for own, other in zip(delivered.pixels, wanted.pixels, strict=True):
            assert all(torch.equal(*both) for both in zip(own, other, strict=True))
        until = time.monotonic() + 30
        while not early.feed.ready() and time.monotonic() < until:
            time.sleep(0.01)
        early.ahead()
        assert early._early is not None
        assert early.state() == wanted.note["state"]
    early.load_state(expected[1].note["state"])
    assert early.next().note == expected[2].note
    early.close()
