"""Calls of Ray's actors, without Ray: which tasks go together, and what comes back of each."""

from __future__ import annotations

import pickle
from collections import deque
from dataclasses import replace

import numpy as np
import pytest

from data_pipeline.executors import Job
from data_pipeline.executors.ray_actors import BUNDLE, Maker, RayActors, Stored, fetch
from data_pipeline.feed import setup_of
from data_pipeline.stream import Stream
from tests.data_soak import ROWS, mixed_settings


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    return Stream(mixed_settings(tmp_path_factory.mktemp("calls")), global_rows=ROWS)


@pytest.fixture(scope="module")
def tasks(stream):
    step = stream.next()
    return [step.task([row]) for row in range(6)]


def bundles(jobs: list[Job], idle: int) -> list[list[Job]]:
    """The calls that are made of waiting jobs while so many actors are idle."""
    executor = RayActors.__new__(RayActors)
    executor.waiting, made = deque(jobs), []
    while executor.waiting:
        made.append(executor._bundle(idle))
        idle = max(0, idle - 1)
    return made


def test_tasks_that_wait_for_busy_actors_go_together_and_idle_actors_share_them(tasks):
    jobs = [Job(task) for task in tasks]
    assert bundles(jobs, 0) == [jobs]
    assert bundles(jobs, 1) == [jobs]
    assert bundles(jobs, 2) == [jobs[:3], jobs[3:]]
    assert bundles(jobs, 4) == [jobs[:2], jobs[2:4], jobs[4:5], jobs[5:]]
    assert bundles(jobs[:1], 4) == [jobs[:1]]


def test_a_call_is_bounded_and_a_job_that_lost_an_actor_goes_alone(tasks):
    large = [Job(replace(task, nbytes=BUNDLE // 2)) for task in tasks[:5]]
    assert list(map(len, bundles(large, 0))) == [2, 2, 1]
    larger = [Job(replace(task, nbytes=2 * BUNDLE)) for task in tasks[:2]]
    assert list(map(len, bundles(larger, 0))) == [1, 1]
    jobs = [Job(task) for task in tasks[:5]]
    jobs[1].lost = 1
    assert bundles(jobs, 0) == [jobs[:1], jobs[1:2], jobs[2:]]


def test_jobs_that_nobody_wants_any_more_are_left_out(tasks):
    jobs = [Job(task) for task in tasks[:4]]
    jobs[0].future.cancel()
    jobs[2].future.cancel()
    assert bundles(jobs, 0) == [[jobs[1], jobs[3]]]
    for job in jobs:
        job.future.cancel()
    assert bundles(jobs, 0) == [[]]


def test_an_error_is_its_own_tasks_and_batches_are_found_by_their_numbers(stream, tasks):
    maker = Maker()
    maker.producer = setup_of(stream).producer()
    broken = replace(tasks[1], cu_seqlens=tasks[1].cu_seqlens[:-1])
    outcomes, stored = maker.make(pickle.dumps([tasks[0], broken, tasks[2]]))
    first, error, second = pickle.loads(outcomes)
    assert isinstance(error, ValueError) and stored[1] is None
    for number, (found, task) in {0: (first, tasks[0]), 2: (second, tasks[2])}.items():
        expected = stream.producer.produce(task)
        assert found.checksums.tolist() == expected.checksums.tolist()
        assert not len(found.batch.tokens)  # it is elsewhere
        batch = fetch(Stored("object", number), {"object": stored})
        assert np.array_equal(batch.images, expected.batch.images)
        assert np.array_equal(batch.tokens, expected.batch.tokens)
