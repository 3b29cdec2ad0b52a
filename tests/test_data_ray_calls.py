"""Calls of Ray's actors, without Ray: which tasks go together, and what comes back of each."""

from __future__ import annotations

import heapq
import pickle
from collections import deque
from dataclasses import dataclass, replace
from itertools import count
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.executors import ATTEMPTS, Job, ray_actors
from data_pipeline.executors.ray_actors import BUNDLE, DEPTH, MOST, Actor, Maker, RayActors, Stored, fetch
from data_pipeline.feed import setup_of
from data_pipeline.stream import Stream
from data_pipeline.task import Produced
from tests.data_soak import ROWS, mixed_settings


class TaskError(Exception):
    """Ray's, of a call that raised."""

    cause: Exception | None = None


class Lost(Exception):
    """Ray's, of an actor that is gone."""


@dataclass(eq=False)
class Reference:
    """Ray's: stands for what will be there."""

    value: Any = None


class Handle:
    """An actor's: ``calls`` are the tasks it was given and the reference to what becomes of them."""

    def __init__(self) -> None:
        self.calls: deque[tuple[list, Reference]] = deque()
        self.make = SimpleNamespace(options=lambda num_returns: SimpleNamespace(remote=self._asked))

    def _asked(self, tasks: bytes) -> tuple[Reference, Reference]:
        self.calls.append((pickle.loads(tasks), Reference()))
        return self.calls[-1][1], Reference()


def got(reference: Reference, timeout: float | None = None) -> Any:
    if isinstance(reference.value, Exception):
        raise reference.value
    return reference.value


@pytest.fixture
def start(monkeypatch):
    """Starts an executor of so many actors that are up; nothing runs but what the test does."""
    errors = SimpleNamespace(RayTaskError=TaskError, RayError=Lost, GetTimeoutError=Lost)
    monkeypatch.setattr(
        ray_actors, "ray", SimpleNamespace(get=got, kill=lambda handle: None, exceptions=errors)
    )

    def start(workers: int) -> RayActors:
        executor = RayActors.__new__(RayActors)
        executor.lock, executor.waiting = ray_actors.threading.Condition(), deque()
        executor.failure, executor.lost, executor.stillborn, executor.node = None, 0, 0, "here"
        executor._start = lambda: Actor(Handle(), None, ("here", 0))
        executor.actors = [executor._start() for _ in range(workers)]
        return executor

    return start


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    return Stream(mixed_settings(tmp_path_factory.mktemp("calls")), global_rows=ROWS)


@pytest.fixture(scope="module")
def tasks(stream):
    step = stream.next()
    return [step.task([row]) for row in range(6)]


def answer(executor: RayActors, actor: Actor, *outcomes: Any) -> None:
    """An actor's first call ends."""
    _, reference = actor.handle.calls.popleft()
    reference.value = pickle.dumps(list(outcomes))
    executor._done(actor, reference)
    executor._dispatch()


def simulated(executor: RayActors, tasks: int, prefetch: int, steps: int = 60) -> tuple[float, float]:
    """A trainer that takes steps of so many equal tasks as soon as they are made, in their order: the share
    of the time that actors work, and tasks a call."""
    time, events, number = 0.0, [], count()
    ahead, working, calls, made = deque(), set(), 0, 0
    while made < steps:
        while ahead and all(future.done() for future in ahead[0]):
            ahead.popleft()
            made += 1
        while len(ahead) < min(prefetch, steps - made):
            ahead.append(executor.submit(*(SimpleNamespace(nbytes=1 << 16) for _ in range(tasks))))
        for actor in executor.actors:
            if actor.handle.calls and actor not in working:
                working.add(actor)
                calls += 1
                heapq.heappush(events, (time + len(actor.handle.calls[0][0]), next(number), actor))
        if events:
            time, _, actor = heapq.heappop(events)
            working.discard(actor)
            answer(executor, actor, *[None] * len(actor.handle.calls[0][0]))
    return steps * tasks / time / len(executor.actors), steps * tasks / calls


@pytest.mark.parametrize(
    ("workers", "tasks", "prefetch", "least", "together"),
    [
        (2, 2, 3, 0.95, 1.2),
        (2, 8, 3, 0.98, 3.5),
        (4, 8, 2, 0.98, 1.5),
        (8, 16, 2, 0.98, 1.5),
        (8, 16, 4, 0.9, 3),
        (32, 64, 2, 0.98, 1.5),
        (8, 1, 16, 0.9, 1),
        (8, 8, 2, 0.98, 1),
    ],
)
def test_calls_of_several_tasks_leave_no_actor_waiting(start, workers, tasks, prefetch, least, together):
    busy, each = simulated(start(workers), tasks, prefetch)
    assert busy >= least and each >= together


def test_calls_are_bounded_and_a_job_that_lost_an_actor_goes_alone(start, tasks):
    def bundles(jobs: list[Job]) -> list[list[Job]]:
        executor = start(1)
        executor.waiting, made = deque(jobs), []
        while executor.waiting:
            executor.actors[0].calls = deque([ray_actors.Call(jobs * 20)])  # much is under way
            made.append(executor._bundle())
        return made

    jobs = [Job(task) for task in tasks]
    assert bundles(jobs) == [jobs]
    assert list(map(len, bundles(jobs * 3))) == [MOST, MOST, 18 - 2 * MOST]
    large = [Job(replace(task, nbytes=BUNDLE // 2)) for task in tasks[:5]]
    assert list(map(len, bundles(large))) == [2, 2, 1]
    larger = [Job(replace(task, nbytes=2 * BUNDLE)) for task in tasks[:2]]
    assert list(map(len, bundles(larger))) == [1, 1]
    jobs[1].lost = 1
    assert bundles(jobs) == [jobs[:1], jobs[1:2], jobs[2:]]
    jobs[2].future.cancel()
    assert bundles(jobs) == [jobs[:1], jobs[1:2], jobs[3:]]
    for job in jobs:
        job.future.cancel()
    assert bundles(jobs) == [[]]


def test_each_job_of_a_call_has_its_own_outcome(start, stream, tasks):
    executor = start(1)
    futures = executor.submit(*tasks)
    (actor,) = executor.actors
    assert sum(len(call.jobs) for call in actor.calls) + len(executor.waiting) == 6
    assert len(actor.calls) == DEPTH and len(actor.calls[0].jobs) == 3
    batches = actor.calls[0].batches
    made = Produced(None, None, [], {})
    answer(executor, actor, made, DataError("no such shard"), made)
    assert [f.done() for f in futures] == [True] * 3 + [False] * 3
    assert futures[2].result().elsewhere == Stored(batches, 2)
    with pytest.raises(DataError, match="no such shard"):
        futures[1].result()


def test_what_ends_a_whole_call_ends_all_its_jobs(start, tasks):
    executor = start(1)
    futures = executor.submit(*tasks[:3])
    (actor,) = executor.actors
    _, reference = actor.handle.calls.popleft()
    reference.value = TaskError("the object store is full")
    jobs = len(actor.calls[0].jobs)
    executor._done(actor, reference)
    assert jobs == 2 and [f.done() for f in futures] == [True, True, False]
    _, reference = actor.handle.calls.popleft()
    reference.value = b"no pickle"
    with pytest.raises(pickle.UnpicklingError):
        executor._done(actor, reference)
    executor._fail(DataError("over"))  # as the collecting thread does then
    assert futures[2].exception().args == ("over",)


def test_a_task_on_which_actors_are_lost_is_found_and_the_others_are_made(start, tasks):
    executor, made = start(1), Produced(None, None, [], {})
    futures = executor.submit(*tasks)
    bad, lost = executor.actors[0].calls[0].jobs[2].task, 0
    while not all(future.done() for future in futures):
        (actor,) = executor.actors
        given, reference = actor.handle.calls[0]
        if any(task.keys == bad.keys for task in given):
            reference.value = Lost("killed")
            executor._done(actor, reference)
            executor._dispatch()
            lost += 1
        else:
            answer(executor, actor, *[made] * len(given))
    failed = [n for n, future in enumerate(futures) if future.exception() is not None]
    assert failed == [2] and f"{ATTEMPTS} data actors were lost on {bad}" in str(futures[2].exception())
    assert lost == executor.lost == ATTEMPTS


class Odd(Exception):
    """Cannot be read from its pickle: it is made of two values and holds one."""

    def __init__(self, one: int, two: int):
        super().__init__(f"{one} of {two}")


def test_an_error_is_its_own_tasks_and_batches_are_found_by_their_numbers(stream, tasks, monkeypatch):
    maker = Maker()
    maker.producer = setup_of(stream).producer()
    produce = maker.producer.produce

    def fails(task):
        if task.keys == tasks[1].keys:
            raise Odd(3, 4)
        if task.keys == tasks[3].keys:
            raise DataError("gone")
        return produce(task)

    monkeypatch.setattr(maker.producer, "produce", fails)
    outcomes, stored = maker.make(pickle.dumps(tasks[:4]))
    first, odd, second, gone = pickle.loads(outcomes)
    assert isinstance(odd, DataError)
    why = "Odd.__init__() missing 1 required positional argument: 'two'"
    assert str(odd) == f"Odd: 3 of 4 (cannot be passed on as it is: {why})"
    assert isinstance(gone, DataError) and str(gone) == "gone"
    assert stored[1] is stored[3] is None
    for number, found in {0: first, 2: second}.items():
        expected = stream.producer.produce(tasks[number])
        assert found.checksums.tolist() == expected.checksums.tolist()
        assert not len(found.batch.tokens)  # it is elsewhere
        batch = fetch(Stored("object", number), {"object": stored})
        assert np.array_equal(batch.images, expected.batch.images)
        assert np.array_equal(batch.tokens, expected.batch.tokens)
