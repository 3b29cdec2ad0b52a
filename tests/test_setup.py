"""Set-up of several ranks, here threads that meet through the store that rank 0 holds, as under SLURM."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from mmi_megatron.errors import ConfigError
from mmi_megatron.train import pulse, setup
from mmi_megatron.train.pulse import Pulse
from mmi_megatron.train.setup import Absent, SetUp
from tests.ranks import free_port

kept: list[SetUp] = []
"""Rank 0's holds the store for all."""


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Let some of so many ranks go through phases, each the first few and those of a negative number then
    fail; what each raised."""
    monkeypatch.setattr(setup, "LOOK", 0.05)
    monkeypatch.setattr(pulse, "COURTESY", 0.2)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)

    def run(world: int, phases: dict[int, int], limit: float) -> dict[int, str]:
        monkeypatch.setenv("WORLD_SIZE", str(world))
        said: dict[int, str] = {}
        ranks = [
            threading.Thread(target=rank_of, args=(tmp_path, rank, count, limit, said))
            for rank, count in phases.items()
        ]
        kept.clear()
        for thread in ranks:
            thread.start()
        for thread in ranks:
            thread.join(60)
            assert not thread.is_alive()
        return said

    return run


def rank_of(folder: Path, rank: int, phases: int, limit: float, said: dict[int, str]) -> None:
    signs = Pulse(folder, rank)
    signs.beat(part="importing")
    steps = SetUp(signs, limit)
    kept.append(steps)
    try:
        for number in range(abs(phases)):
            time.sleep(0.05 * rank)
            steps.phase(f"phase {number}")
        if phases < 0:
            raise ValueError("no such file\nand more")
        said[rank] = "came through"
    except ValueError as error:
        steps.give_up(error)
        said[rank] = "no such file"
    except Absent as error:
        said[rank] = str(error)


def test_ranks_go_through_set_up_together(job, tmp_path):
    assert job(3, {0: 4, 1: 4, 2: 4}, 20) == dict.fromkeys(range(3), "came through")
    for rank in range(3):
        sign = pulse.read(tmp_path, rank)
        assert sign is not None and str(sign) == "set-up, phase 3" and 0 <= sign.age < 60


def test_those_that_are_behind_are_named_by_those_that_came(job):
    said = job(5, {0: 1, 1: 2, 2: 2, 3: 1, 4: 2}, 1.5)
    assert said[0] == said[3] == "came through"
    for rank in (1, 2, 4):
        words = said[rank]
        assert "ranks 0 and 3 of 5 did not finish phase 0 within 1.5 s (train.setup_timeout)" in words
        assert "rank 0 was last at set-up, phase 0, " in words and "rank 3 was last at" in words


def test_those_that_never_started_are_named(job):
    said = job(4, {0: 1, 2: 1}, 1.0)
    for words in said.values():
        assert "ranks 1 and 3 of 4 did not finish importing within 1 s" in words
        assert "rank 3 has given no sign of life in this run's folder" in words


def test_those_that_wait_for_one_that_failed_need_not_wait_for_long(job):
    began = time.monotonic()
    said = job(3, {0: 3, 1: 3, 2: -1}, 60)
    assert said[2] == "no such file" and time.monotonic() - began < 20
    for rank in (0, 1):
        assert said[rank] == "set-up: rank 2 ended: ValueError: no such file"


def test_a_first_rank_that_never_started_is_named(job):
    (words,) = job(2, {1: 1}, 1.0).values()
    assert "rank 0 cannot be reached at 127.0.0.1:" in words and "within 1 s (train.setup_timeout)" in words


def test_ranks_that_are_not_told_where_to_meet_are_told_what_to_set(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "here")
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(ConfigError, match="^MASTER_PORT must name .* a free port"):
        SetUp(Pulse(tmp_path, 0), 1.0).phase("first")


def test_errors_while_waiting_for_others_are_told_from_own_ones(job):
    def raised(call) -> BaseException:
        with pytest.raises(Exception) as error:
            call()
        return error.value

    import torch.distributed as dist

    def around():
        try:
            dist.barrier()
        except ValueError as error:
            raise RuntimeError("in the checkpoint") from error

    assert pulse.waited(raised(dist.barrier)) and pulse.waited(raised(around))
    assert not pulse.waited(raised(lambda: 1 / 0))
    assert pulse.ranks_in_words([3]) == "rank 3" and pulse.ranks_in_words([1, 3, 5]) == "ranks 1, 3 and 5"
