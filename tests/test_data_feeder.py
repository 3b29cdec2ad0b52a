"""The feeder of a node of trainers, without Ray: threads stand in for its actors."""

from __future__ import annotations

import pickle
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from data_pipeline import ray_service
from data_pipeline.errors import DataError, ResumeError
from data_pipeline.executors import Setup, Threads
from data_pipeline.feed import Division, Share
from data_pipeline.ray_cluster import store_bytes
from data_pipeline.ray_service import Feeder
from data_pipeline.settings import DataSettings
from data_pipeline.stream import Stream
from tests.data_soak import ROWS, feeds, mixed_settings

ONE, BOTH = Division(0, 1, 1, ROWS), [Division(rank, 2, 1, ROWS // 2) for rank in range(2)]


class Actors(Threads):
    """What ``RayActors`` has beside ``Executor``."""

    made: list[Actors]

    def __init__(self, setup: Setup):
        super().__init__(setup)
        self.failure: BaseException | None = None
        self.closed = False
        self.made.append(self)

    def close(self) -> None:
        super().close()
        self.closed = True


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    return replace(mixed_settings(tmp_path_factory.mktemp("feeder")), workers=1)


@pytest.fixture
def feeder(mixed, monkeypatch):
    monkeypatch.setattr(Actors, "made", [], raising=False)
    monkeypatch.setattr(ray_service, "RayActors", Actors)
    monkeypatch.setattr(Feeder, "_end_when_idle", lambda self: None)
    yield Feeder(mixed)
    for executor in Actors.made:
        executor.close()


@pytest.fixture(scope="module")
def expected(mixed):
    (feed,) = feeds(mixed, "inline")
    return [feed.next() for _ in range(5)]


def asked(feeder: Feeder, name: str, number: int) -> Share:
    """The share that a rank is given."""
    return pickle.loads(feeder.next(name, number)[0])


def test_the_last_rank_that_leaves_gives_the_actors_back(feeder, mixed, expected):
    for division in BOTH:
        feeder.open(str(division.rank), division, ROWS, None)
    shares = [asked(feeder, str(rank), 0) for rank in range(2)]
    assert (sum(share.spread() for share in shares) == expected[0].spread()).all()
    (executor,) = Actors.made
    feeder.leave("0")
    feeder.leave("0")  # a rank may leave twice
    assert not executor.closed
    assert asked(feeder, "1", 1).number == 1
    feeder.leave("1")
    assert executor.closed and feeder.executor is None and not feeder.clients
    with pytest.raises(DataError, match="1 is not open"):
        asked(feeder, "1", 2)
    feeder.open("1", BOTH[1], ROWS, None)
    assert len(Actors.made) == 2


def test_a_step_is_handed_over_again_and_another_one_is_refused_without_loss(feeder, expected):
    feeder.open("a", ONE, ROWS, None)
    assert asked(feeder, "a", 0).checksums.tolist() == expected[0].checksums.tolist()
    assert asked(feeder, "a", 0).number == 0  # the answer was lost
    with pytest.raises(DataError, match="asks for step 7, the next is 1"):
        asked(feeder, "a", 7)
    assert asked(feeder, "a", 1).checksums.tolist() == expected[1].checksums.tolist()


def test_pixels_are_made_again_by_a_feeder_that_has_made_nothing_yet(feeder, expected):
    """The feeder was lost after it had answered, and the pixels with it: they were its own."""
    feeder.open("a", ONE, ROWS, expected[2].state)
    again = feeder.again("a", 3, 5)
    assert np.array_equal(again.batch.images, expected[3].batches[5].images)
    assert asked(feeder, "a", 3).checksums.tolist() == expected[3].checksums.tolist()
    assert asked(feeder, "a", 4).number == 4


def test_a_request_that_a_restarted_trainer_overtakes_leaves_nothing_to_it(feeder, expected):
    feeder.open("a", ONE, ROWS, None)
    feed = feeder.clients["a"].feed
    make, seen = feed.next, []

    def overtaken():
        share = make()
        seen.append(feeder.requests)  # while there are some it does not end as idle
        feeder.open("a", ONE, ROWS, None)
        return share

    feed.next = overtaken
    assert asked(feeder, "a", 0).number == 0
    assert seen == [1] and feeder.requests == 0
    for number in range(2):
        assert asked(feeder, "a", number).checksums.tolist() == expected[number].checksums.tolist()


def test_a_trainer_with_another_number_of_ranks_takes_over(feeder, expected):
    for division in BOTH:
        feeder.open(str(division.rank), division, ROWS, None)
    asked(feeder, "0", 0)
    feeder.open("a", ONE, ROWS, expected[0].state)
    assert asked(feeder, "a", 1).checksums.tolist() == expected[1].checksums.tolist()
    with pytest.raises(DataError, match="0 is not open"):
        asked(feeder, "0", 1)


def test_a_position_that_is_refused_leaves_no_actors_behind(feeder, mixed):
    state = Stream(replace(mixed, seed=9), global_rows=ROWS).state()
    with pytest.raises(ResumeError, match="seed"):
        feeder.open("a", ONE, ROWS, state)
    assert not Actors.made and not feeder.clients


def test_actors_that_have_failed_are_replaced_for_the_next_trainer(feeder, expected):
    feeder.open("a", ONE, ROWS, None)
    Actors.made[0].failure = DataError("no room")
    feeder.open("a", ONE, ROWS, None)
    assert Actors.made[0].closed and not Actors.made[1].closed
    assert asked(feeder, "a", 0).checksums.tolist() == expected[0].checksums.tolist()


def test_a_runs_own_object_store_is_as_large_as_what_is_made_ahead(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=10 << 30))
    monkeypatch.setattr(psutil, "disk_usage", lambda path: SimpleNamespace(free=100 << 30))
    sizes = {ahead: store_bytes(DataSettings(prefetch_bytes=ahead)) for ahead in (1, 1 << 30, 2 << 30)}
    assert sizes == {1: 256 << 20, 1 << 30: 2 << 30, 2 << 30: 3 << 30}
