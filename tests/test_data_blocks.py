"""Blocks of memory: used again, the known ones first, and given back at any moment."""

from __future__ import annotations

import gc
import threading

import numpy as np

from data_pipeline.executors.blocks import Blocks


def test_a_block_comes_back_when_its_last_array_is_gone_and_a_known_one_is_taken_first():
    blocks = Blocks()
    held = [blocks.empty((70_000,), np.uint8) for _ in range(3)]
    assert blocks.made == 3
    view = held[0][5:]
    del held
    gc.collect()
    assert [blocks.take(70_000, known={3}).number, blocks.take(70_000).number] == [3, 2]
    assert blocks.take(70_000).number == 4  # the first is still looked at
    del view
    gc.collect()
    assert blocks.take(70_000).number == 1


def test_an_array_may_be_collected_while_the_lock_is_held():
    """As when the collector runs in the midst of ``take``: nothing waits for a lock of its own thread."""
    blocks = Blocks()
    cycle: list = [blocks.empty((70_000,), np.uint8)]
    cycle.append(cycle)
    del cycle

    def collect() -> None:
        with blocks.lock:
            gc.collect()

    thread = threading.Thread(target=collect, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    assert blocks.take(70_000).number == 1
