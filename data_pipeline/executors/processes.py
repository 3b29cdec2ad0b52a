"""Micro-batches made in processes of their own, over shared memory.

One light thread hands tasks to idle workers and takes back results; it decodes nothing. A worker that
dies, or takes longer than ``data.task_timeout``, is replaced and its task asked again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from concurrent.futures import Future
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import send_handle
from pathlib import Path

from data_pipeline.errors import DataError
from data_pipeline.executors import ATTEMPTS, Job, Setup, settle
from data_pipeline.executors.blocks import Block, Blocks
from data_pipeline.task import Produced, Task

START = 120.0
"""Seconds that a worker has to come up."""

PATIENCE = 2.0
"""Seconds that workers have to end by themselves."""

log = logging.getLogger(__name__)


class Worker:
    """A process; ``job`` is what it is at, due at ``deadline``, in ``block``."""

    def __init__(self, setup: Setup):
        ours, theirs = socket.socketpair()
        self.connection = Connection(ours.detach())
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        quiet = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "data_pipeline.executors.worker", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env={**os.environ, **quiet, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        self.ready = False
        self.known: set[int] = set()
        self.job: Job | None = None
        self.block: Block | None = None
        self.deadline = time.monotonic() + START
        with contextlib.suppress(BrokenPipeError):  # died at once: seen as any loss is
            self.connection.send(setup)

    def ask(self, job: Job, block: Block, timeout: float) -> None:
        """Hand over a job. It waits for nothing else, so this does not block."""
        self.job, self.block, self.deadline = job, block, time.monotonic() + timeout
        fresh = block.number not in self.known
        self.connection.send((job.task, block.number, block.size, fresh))
        if fresh:
            send_handle(self.connection, block.handle, self.process.pid)
            self.known.add(block.number)

    def end(self) -> None:
        """Kill it."""
        self.process.kill()
        self.process.wait()
        self.connection.close()


class Processes:
    """``Executor`` of ``data.workers`` processes.

    Attributes:
        lost: workers replaced so far.
    """

    runs_ahead = True

    def __init__(self, setup: Setup):
        self.setup = setup
        self.blocks = Blocks()
        self.waiting: deque[Job] = deque()
        self.lock = threading.Lock()
        self.failure: BaseException | None = None
        self.closed = False
        self.lost = 0
        self.stillborn = 0
        self.bell, self.ears = socket.socketpair()
        self.bell.setblocking(False)
        self.workers = [Worker(setup) for _ in range(setup.settings.workers)]
        self.thread = threading.Thread(target=self._run, name="mmi-data-dispatch", daemon=True)
        self.thread.start()

    def submit(self, *tasks: Task) -> list[Future[Produced]]:
        """Have processes make the tasks."""
        jobs = [Job(task) for task in tasks]
        with self.lock:
            failure = self.failure
            if failure is None and self.closed:
                failure = DataError("the data workers have been closed")
            if failure is None:
                self.waiting.extend(jobs)
        if failure is not None:
            for job in jobs:
                settle(job, failure)
        self._ring()
        return [job.future for job in jobs]

    def close(self) -> None:
        """End all workers."""
        self.closed = True
        self._ring()
        self.thread.join()
        for worker in self.workers:
            worker.connection.close()
        until = time.monotonic() + PATIENCE
        for worker in self.workers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.process.wait(max(0.0, until - time.monotonic()))
            worker.process.kill()
            worker.process.wait()
        self.bell.close()
        self.ears.close()

    def _ring(self) -> None:
        with contextlib.suppress(BlockingIOError):  # full: it is awake anyway
            self.bell.send(b"!")

    def _run(self) -> None:
        """The dispatching thread."""
        try:
            while not self.closed:
                self._dispatch()
                self._collect()
            self._fail(DataError("the data workers have been closed"))
        except Exception as error:
            self._fail(error)

    def _dispatch(self) -> None:
        for number, worker in enumerate(self.workers):
            if not worker.ready or worker.job is not None:
                continue
            job = self._next_job()
            if job is None:
                return
            block = self.blocks.take(job.task.nbytes, worker.known)
            try:
                worker.ask(job, block, self.setup.settings.task_timeout)
            except OSError:
                self._replace(number, "is gone")

    def _next_job(self) -> Job | None:
        """The first job that is still wanted."""
        with self.lock:
            while self.waiting:
                job = self.waiting.popleft()
                if not job.future.cancelled():
                    return job
        return None

    def _collect(self) -> None:
        """Wait until something happens, and deal with it."""
        due = min(worker.deadline for worker in self.workers) - time.monotonic()
        sources = [worker.connection for worker in self.workers]
        ready = wait([self.ears, *sources], None if due == float("inf") else max(0.0, due))
        if self.ears in ready:
            self.ears.recv(4096)
        for number, worker in enumerate(self.workers):
            if worker.connection in ready:
                try:
                    answer = worker.connection.recv()
                except (EOFError, OSError):
                    self._replace(number, f"ended with code {worker.process.wait()}")
                    continue
                self._answer(worker, answer)
            elif worker.deadline < time.monotonic():
                limit = f"data.task_timeout={self.setup.settings.task_timeout}" if worker.ready else START
                self._replace(number, f"took more than {limit} seconds")

    def _answer(self, worker: Worker, answer) -> None:
        if not worker.ready:
            if isinstance(answer, BaseException):
                raise answer
            worker.ready, worker.deadline, self.stillborn = True, float("inf"), 0
            return
        job, block = worker.job, worker.block
        assert job is not None and block is not None
        worker.job, worker.block, worker.deadline = None, None, float("inf")
        if isinstance(answer, BaseException):
            self.blocks.give(block)
            settle(job, answer)
            return
        produced, images, drawn = answer
        settle(job, produced.with_pixels(*self.blocks.arrays(block, images, drawn)))

    def _replace(self, number: int, why: str) -> None:
        """Start a worker in place of a lost one, and ask its task again."""
        worker = self.workers[number]
        worker.end()
        self.lost += 1
        job = worker.job
        if worker.block is not None:
            self.blocks.give(worker.block)
        self.stillborn = 0 if worker.ready else self.stillborn + 1
        if self.stillborn == ATTEMPTS:
            raise DataError(f"{ATTEMPTS} data workers in a row could not start: the last {why}")
        log.warning("a data worker %s; another takes its place", why)
        if job is not None:
            job.lost += 1
            if job.lost < ATTEMPTS:
                with self.lock:
                    self.waiting.appendleft(job)
            else:
                settle(job, DataError(f"{ATTEMPTS} data workers were lost on {job.task}: the last {why}"))
        self.workers[number] = Worker(self.setup)

    def _fail(self, error: BaseException) -> None:
        """Tell everybody who waits, now and later."""
        with self.lock:
            self.failure = error
            jobs = [*self.waiting, *(worker.job for worker in self.workers if worker.job is not None)]
            self.waiting.clear()
        for job in jobs:
            settle(job, error)
