"""Micro-batches made by actors on a Ray cluster; they stay in its object store.

The actors hold nothing, so one that is lost, with its node or alone, or that is slow, is replaced and its
tasks are asked again of another.
"""

from __future__ import annotations

import logging
import os
import pickle
import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from data_pipeline.batch import NOTHING, Batch
from data_pipeline.errors import DataError
from data_pipeline.executors import ATTEMPTS, Job, Setup, collect_rarely, settle
from data_pipeline.executors.blocks import Blocks
from data_pipeline.optional import ray
from data_pipeline.task import Produced, Task

RESOURCE = "mmi_data"
"""Ray resource of the nodes that ``mmi data serve`` started; where there are some, only these decode."""

DEPTH = 2
"""Tasks an actor has been given at a time: one to work on, one so that it need not wait."""

START = 300.0
"""Seconds after which it is an error that no actor has come up: the cluster may have no room."""

PULSE = 0.2
"""Seconds after which slow actors are looked for."""

log = logging.getLogger(__name__)


class Maker:
    """The actor: makes tasks."""

    def start(self, setup: Setup) -> tuple[str, int]:
        """Load what is needed; raises what ``Setup.producer`` raises. Its node and its process."""
        self.producer = setup.producer(empty=Blocks().empty)  # Ray copies the pixels to its object store
        collect_rarely()
        return ray.get_runtime_context().get_node_id(), os.getpid()

    def make(self, task: bytes) -> tuple[bytes, tuple[bytes, np.ndarray, np.ndarray]]:
        """The result of a pickled task without its batch, pickled too; and the batch for the object store:
        without its pixels, pickled, and the pixels. Ray's own pickling asks Python about every object, which
        takes more than twice as long."""
        produced = self.producer.produce(pickle.loads(task))
        batch, rest = produced.batch, produced.without_pixels().batch
        result = pickle.dumps(replace(produced, batch=NOTHING), 5)
        return result, (pickle.dumps(rest, 5), batch.images, batch.drawn)


@dataclass(eq=False)
class Actor:
    """An actor: its handle; the reference to its start, while it starts; then its node and its process;
    its jobs with their two references, in order; since when it is at the first, or is starting; and whether
    it has been said that this takes long."""

    handle: Any
    starting: Any
    where: tuple[str, int] | None = None
    jobs: deque[tuple[Job, Any, Any]] = field(default_factory=deque)
    since: float = 0.0
    told: bool = False


class RayActors:
    """``Executor`` of ``data.workers`` actors. Its results leave the batch in the object store:
    ``Produced.elsewhere`` is the reference that ``fetch`` takes.

    Attributes:
        lost: actors replaced so far.
    """

    runs_ahead = True

    def __init__(self, setup: Setup):
        self.settings = setup.settings
        self.setup = ray.put(setup)
        self.node = ray.get_runtime_context().get_node_id()
        needs = {RESOURCE: 1} if ray.cluster_resources().get(RESOURCE) else {}
        self.options = {"num_cpus": 1, "resources": needs, "max_restarts": 0, "scheduling_strategy": "SPREAD"}
        self.lock = threading.Condition()
        self.waiting: deque[Job] = deque()
        self.failure: BaseException | None = None
        self.lost = 0
        self.stillborn = 0
        self.actors = [self._start() for _ in range(self.settings.workers)]
        self.thread = threading.Thread(target=self._run, name="mmi-data-collect", daemon=True)
        self.thread.start()

    def submit(self, task: Task) -> Future[Produced]:
        """Have an actor make the task."""
        job = Job(task)
        with self.lock:
            if self.failure is not None:
                settle(job, self.failure)
            else:
                self.waiting.append(job)
                self._dispatch()
            self.lock.notify()
        return job.future

    def close(self) -> None:
        """End the actors."""
        self._fail(DataError("the data workers have been closed"))
        self.thread.join()
        for actor in self.actors:
            ray.kill(actor.handle)

    def _start(self) -> Actor:
        handle = ray.remote(Maker).options(**self.options).remote()
        return Actor(handle, handle.start.remote(self.setup), since=time.monotonic())

    def _dispatch(self) -> None:
        """Give waiting jobs to the actors that have least to do."""
        while self.waiting:
            free = [a for a in self.actors if a.starting is None and len(a.jobs) < DEPTH]
            if not free:
                return
            job = self.waiting.popleft()
            if job.future.cancelled():
                continue
            actor = min(free, key=lambda a: len(a.jobs))
            if not actor.jobs:
                actor.since = time.monotonic()
            info, batch = actor.handle.make.options(num_returns=2).remote(pickle.dumps(job.task, 5))
            actor.jobs.append((job, info, batch))

    def _run(self) -> None:
        """The collecting thread."""
        try:
            while self.failure is None:
                self._collect()
        except Exception as error:
            self._fail(error)

    def _collect(self) -> None:
        with self.lock:
            watched = {a.starting or a.jobs[0][1]: a for a in self.actors if a.starting or a.jobs}
            if not watched:
                self.lock.wait(PULSE)
                return
        # The lock is free while waiting: jobs can be given out.
        done, _ = ray.wait(list(watched), num_returns=1, timeout=PULSE)
        with self.lock:
            for reference in done:
                self._done(watched[reference], reference)
            begun = time.monotonic() - START
            if all(actor.starting is not None and actor.since < begun for actor in self.actors):
                raise DataError(
                    f"no data actor came up within {START:g} s; each needs 1 CPU {self.options['resources']} "
                    "of the Ray cluster: see `ray status`"
                )
            for actor in self.actors:
                if actor.starting is not None and actor.since < begun and not actor.told:
                    actor.told = True
                    log.warning("a data actor has not come up within %g s: see `ray status`", START)
            late = time.monotonic() - self.settings.task_timeout
            for actor in [a for a in self.actors if a.jobs and a.since < late]:
                self._replace(actor, f"took more than data.task_timeout={self.settings.task_timeout} seconds")
            self._dispatch()

    def _done(self, actor: Actor, reference: Any) -> None:
        if actor not in self.actors:
            return
        try:
            answer = ray.get(reference)
        except ray.exceptions.RayTaskError as error:  # what the task itself raised
            answer = error.cause if isinstance(error.cause, Exception) else error
        except ray.exceptions.RayError as error:
            self._replace(actor, str(error).splitlines()[0])
            return
        if actor.starting is not None:
            if isinstance(answer, Exception):
                raise answer
            actor.starting, actor.where, self.stillborn = None, answer, 0
            return
        job, _, batch = actor.jobs.popleft()
        actor.since = time.monotonic()
        if isinstance(answer, Exception):
            settle(job, answer)
            return
        assert actor.where is not None
        if actor.where[0] != self.node:
            ray.wait([batch], timeout=0, fetch_local=True)  # begins to bring it here
        settle(job, replace(pickle.loads(answer), elsewhere=batch))

    def _replace(self, actor: Actor, why: str) -> None:
        """Start an actor in place of a lost one, and ask its tasks again."""
        log.warning("a data actor was lost (%s); another takes its place", why)
        ray.kill(actor.handle)
        self.lost += 1
        self.stillborn += actor.starting is not None
        if self.stillborn == ATTEMPTS * len(self.actors):
            raise DataError(f"{self.stillborn} data actors in a row could not start: the last {why}")
        jobs = [job for job, _, _ in actor.jobs]
        if jobs:
            jobs[0].lost += 1
            if jobs[0].lost == ATTEMPTS:
                first = jobs.pop(0)
                settle(first, DataError(f"{ATTEMPTS} data actors were lost on {first.task}: the last {why}"))
        self.waiting.extendleft(reversed(jobs))
        self.actors[self.actors.index(actor)] = self._start()

    def _fail(self, error: BaseException) -> None:
        """Tell everybody who waits, now and later."""
        with self.lock:
            self.failure = self.failure or error
            jobs = [*self.waiting, *(job for actor in self.actors for job, _, _ in actor.jobs)]
            self.waiting.clear()
            self.lock.notify()
        for job in jobs:
            settle(job, error)


def fetch(reference: Any, timeout: float | None = None) -> Batch:
    """The batch that an actor left in the object store. Its pixels are read-only and not copied.

    Raises:
        RayError: when it was lost, with its node.
    """
    try:
        rest, images, drawn = ray.get(reference, timeout=timeout)
    except ray.exceptions.GetTimeoutError as error:
        raise ray.exceptions.RayError(f"no batch after {timeout} seconds") from error
    return replace(pickle.loads(rest), images=images, drawn=drawn)
