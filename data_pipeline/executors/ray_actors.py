"""Micro-batches made by actors on a Ray cluster; they stay in its object store.

The actors hold nothing, so one that is lost, with its node or alone, or that is slow, is replaced and its
tasks are asked again of another.

A call and its result cost Ray some milliseconds in five processes, as much as ten pictures. So where more
tasks are under way than calls that actors are given, several are made in one call. Their batches lie in the
object store as one object, which stays as long as any of them is in use.
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
"""Calls an actor has been given at a time: one to work on, one so that it need not wait."""

MOST, BUNDLE = 8, 64 << 20
"""Tasks of one call at most, and bytes of their pixels; one task may have more."""

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

    def make(self, tasks: bytes) -> tuple[bytes, list[tuple[bytes, np.ndarray, np.ndarray] | None]]:
        """What becomes of pickled tasks, pickled too: the result without its batch, or the error; and the
        batches for the object store: without its pixels, pickled, and the pixels. Ray's own pickling asks
        Python about every object, which takes more than twice as long."""
        outcomes: list[Produced | Exception] = []
        stored: list[tuple[bytes, np.ndarray, np.ndarray] | None] = []
        for task in pickle.loads(tasks):
            try:
                produced = self.producer.produce(task)
            except Exception as error:
                outcomes.append(_plain(error))
                stored.append(None)
                continue
            outcomes.append(replace(produced, batch=NOTHING))
            rest = pickle.dumps(produced.without_pixels().batch, 5)
            stored.append((rest, produced.batch.images, produced.batch.drawn))
        return pickle.dumps(outcomes, 5), stored


def _plain(error: Exception) -> Exception:
    """The error; where it cannot be pickled and read again, for whatever reason its class has, one that says
    the same and why."""
    try:
        pickle.loads(pickle.dumps(error, 5))
    except Exception as why:
        return DataError(f"{type(error).__name__}: {error} (cannot be passed on as it is: {why})")
    return error


@dataclass(frozen=True)
class Stored:
    """Where a batch is: the object, and its number in it."""

    reference: Any
    number: int


@dataclass(eq=False)
class Call:
    """Jobs that are made together, and the references to what becomes of them and to their batches."""

    jobs: list[Job]
    outcomes: Any = None
    batches: Any = None


@dataclass(eq=False)
class Actor:
    """An actor: its handle; the reference to its start, while it starts; then its node and its process;
    its calls in order; since when it is at the first, or is starting; and whether it has been said that this
    takes long."""

    handle: Any
    starting: Any
    where: tuple[str, int] | None = None
    calls: deque[Call] = field(default_factory=deque)
    since: float = 0.0
    told: bool = False


class RayActors:
    """``Executor`` of ``data.workers`` actors. Its results leave the batch in the object store:
    ``Produced.elsewhere`` says where, a ``Stored`` that ``fetch`` takes.

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

    def submit(self, *tasks: Task) -> list[Future[Produced]]:
        """Have actors make the tasks."""
        jobs = [Job(task) for task in tasks]
        with self.lock:
            if self.failure is not None:
                for job in jobs:
                    settle(job, self.failure)
            else:
                self.waiting.extend(jobs)
                self._dispatch()
            self.lock.notify()
        return [job.future for job in jobs]

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
            free = [a for a in self.actors if a.starting is None and len(a.calls) < DEPTH]
            if not free:
                return
            call = Call(self._bundle())
            if not call.jobs:
                return
            actor = min(free, key=lambda a: len(a.calls))
            if not actor.calls:
                actor.since = time.monotonic()
            actor.calls.append(call)
            tasks = pickle.dumps([job.task for job in call.jobs], 5)
            call.outcomes, call.batches = actor.handle.make.options(num_returns=2).remote(tasks)

    def _bundle(self) -> list[Job]:
        """The next jobs that are still wanted, for one call: all that are under way shall make as many calls
        as actors can be given. With fewer, actors would wait for each other, as steps are handed over in
        order. A job on which an actor was lost goes alone."""
        jobs: list[Job] = []
        given = sum(len(call.jobs) for actor in self.actors for call in actor.calls)
        most = min(MOST, -(-(given + len(self.waiting)) // (DEPTH * len(self.actors))))
        nbytes = 0
        while self.waiting and len(jobs) < most:
            job = self.waiting[0]
            nbytes += job.task.nbytes
            if jobs and (nbytes > BUNDLE or job.lost or jobs[0].lost):
                break
            self.waiting.popleft()
            if not job.future.cancelled():
                jobs.append(job)
        return jobs

    def _run(self) -> None:
        """The collecting thread."""
        try:
            while self.failure is None:
                self._collect()
        except Exception as error:
            self._fail(error)

    def _collect(self) -> None:
        with self.lock:
            watched = {a.starting or a.calls[0].outcomes: a for a in self.actors if a.starting or a.calls}
            if not watched:
                self.lock.wait(PULSE)
                return
        # The lock is free while waiting: jobs can be given out.
        done, _ = ray.wait(list(watched), num_returns=1, timeout=PULSE)
        with self.lock:
            if self.failure is not None:
                return
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
            now, limit = time.monotonic(), self.settings.task_timeout
            for actor in [a for a in self.actors if a.calls and now - a.since > limit * len(a.calls[0].jobs)]:
                self._replace(actor, f"took more than data.task_timeout={limit} seconds a task")
            self._dispatch()

    def _done(self, actor: Actor, reference: Any) -> None:
        if actor not in self.actors:
            return
        try:
            answer = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            answer = error.cause if isinstance(error.cause, Exception) else error
        except ray.exceptions.RayError as error:
            self._replace(actor, str(error).splitlines()[0])
            return
        if actor.starting is not None:
            if isinstance(answer, Exception):
                raise answer
            actor.starting, actor.where, self.stillborn = None, answer, 0
            return
        failed = isinstance(answer, Exception)  # not in a task, whose error is among the outcomes
        outcomes = [answer] * len(actor.calls[0].jobs) if failed else pickle.loads(answer)
        call = actor.calls.popleft()
        actor.since = time.monotonic()
        assert actor.where is not None
        if actor.where[0] != self.node:
            ray.wait([call.batches], timeout=0, fetch_local=True)  # begins to bring them here
        for number, (job, outcome) in enumerate(zip(call.jobs, outcomes, strict=True)):
            if isinstance(outcome, Produced):
                outcome = replace(outcome, elsewhere=Stored(call.batches, number))
            settle(job, outcome)

    def _replace(self, actor: Actor, why: str) -> None:
        """Start an actor in place of a lost one, and ask its tasks again."""
        log.warning("a data actor was lost (%s); another takes its place", why)
        ray.kill(actor.handle)
        self.lost += 1
        self.stillborn += actor.starting is not None
        if self.stillborn == ATTEMPTS * len(self.actors):
            raise DataError(f"{self.stillborn} data actors in a row could not start: the last {why}")
        jobs = [job for call in actor.calls for job in call.jobs]
        for job in actor.calls[0].jobs if actor.calls else []:
            job.lost += 1
            if job.lost == ATTEMPTS:
                jobs.remove(job)
                settle(job, DataError(f"{ATTEMPTS} data actors were lost on {job.task}: the last {why}"))
        self.waiting.extendleft(reversed(jobs))
        self.actors[self.actors.index(actor)] = self._start()

    def _fail(self, error: BaseException) -> None:
        """Tell everybody who waits, now and later."""
        with self.lock:
            self.failure = self.failure or error
            calls = [call for actor in self.actors for call in actor.calls]
            jobs = [*self.waiting, *(job for call in calls for job in call.jobs)]
            self.waiting.clear()
            self.lock.notify()
        for job in jobs:
            settle(job, error)


def fetch(stored: Stored, held: dict[Any, Any], timeout: float | None = None) -> Batch:
    """The batch that an actor left in the object store. Its pixels are read-only and not copied.

    Args:
        stored: where it is.
        held: objects that were fetched already, by reference; this one is added.
        timeout: seconds to wait for it.

    Raises:
        RayError: when it was lost, with its node.
    """
    if stored.reference not in held:
        try:
            held[stored.reference] = ray.get(stored.reference, timeout=timeout)
        except ray.exceptions.GetTimeoutError as error:
            raise ray.exceptions.RayError(f"no batch after {timeout} seconds") from error
    rest, images, drawn = held[stored.reference][stored.number]
    return replace(pickle.loads(rest), images=images, drawn=drawn)
