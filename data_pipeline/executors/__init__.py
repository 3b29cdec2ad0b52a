"""Where micro-batches are made: in the trainer, in threads, in processes, or on a Ray cluster.

All do the same: a ``Task`` goes in, a ``Produced`` comes out, and it depends on the task alone. The order
is the plan's, so it is the same with any executor, any number of workers, and whatever becomes of them.
"""

from __future__ import annotations

import gc
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

from data_pipeline.errors import DataError
from data_pipeline.executors.blocks import Blocks
from data_pipeline.produce import Producer
from data_pipeline.settings import DataSettings
from data_pipeline.task import Produced, Task
from data_pipeline.tokens import load_tokenizer

ATTEMPTS = 3
"""A task whose worker is lost so many times is taken to be the cause, and ends the run by name."""


@dataclass(frozen=True)
class Setup:
    """What a worker is made of: the settings, and the fingerprints its tokenizer and decoder must have."""

    settings: DataSettings
    tokenizer: str
    decoder: str

    def producer(self, **options) -> Producer:
        """The worker's producer.

        Raises:
            DataError: when the tokenizer or the decoder here are not those of the trainer.
        """
        producer = Producer(self.settings, load_tokenizer(self.settings.tokenizer), **options)
        own = producer.tokenizer.fingerprint, producer.decoder.fingerprint
        for name, found, wanted in zip(
            ("tokenizer", "image decoder"), own, (self.tokenizer, self.decoder), strict=True
        ):
            if found != wanted:
                raise DataError(
                    f"data worker: its {name} is {found!r}, the trainer's {wanted!r}; "
                    "install the same versions"
                )
        return producer


class Executor(Protocol):
    """Makes micro-batches.

    Attributes:
        runs_ahead: whether tasks are made while the trainer does something else.
    """

    runs_ahead: bool

    def submit(self, *tasks: Task) -> list[Future[Produced]]:
        """Have tasks made. Each future holds what became of one, or raises what went wrong."""
        ...

    def close(self) -> None:
        """Give back all workers; what is not finished is dropped."""
        ...


@dataclass(eq=False)
class Job:
    """A task, its future, and how many workers were lost on it."""

    task: Task
    future: Future[Produced] = field(default_factory=Future)
    lost: int = 0


def settle(job: Job, outcome: Produced | BaseException) -> None:
    """Fulfil a job's future, unless it has been cancelled."""
    if not job.future.set_running_or_notify_cancel():
        return
    if isinstance(outcome, BaseException):
        job.future.set_exception(outcome)
    else:
        job.future.set_result(outcome)


def collect_rarely() -> None:
    """Have Python look for garbage in cycles rarely, in a process that only makes tasks: it makes thousands
    of small objects for each, and none of them is in a cycle."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


class Inline:
    """In the caller, when it asks."""

    runs_ahead = False

    def __init__(self, setup: Setup):
        self.producer = setup.producer(empty=Blocks().empty)

    def submit(self, *tasks: Task) -> list[Future[Produced]]:
        """Make the tasks now."""
        return [self._made(task) for task in tasks]

    def _made(self, task: Task) -> Future[Produced]:
        future: Future[Produced] = Future()
        try:
            future.set_result(self.producer.produce(task))
        except Exception as error:
            future.set_exception(error)
        return future

    def close(self) -> None:
        """Nothing to give back."""


class Threads:
    """In threads of this process; the decoders release the interpreter's lock."""

    runs_ahead = True

    def __init__(self, setup: Setup):
        self.producer = setup.producer(empty=Blocks().empty)
        self.pool = ThreadPoolExecutor(setup.settings.workers, thread_name_prefix="mmi-data")

    def submit(self, *tasks: Task) -> list[Future[Produced]]:
        """Have threads make the tasks."""
        return [self.pool.submit(self.producer.produce, task) for task in tasks]

    def close(self) -> None:
        """End the threads after the tasks they are at."""
        self.pool.shutdown(wait=True, cancel_futures=True)


def make_executor(setup: Setup) -> Executor:
    """The executor that ``data.executor`` names; for ``ray``, this process must be part of a cluster.

    Raises:
        DataError: when it cannot be started.
    """
    name = setup.settings.executor
    if name == "inline":
        return Inline(setup)
    if name == "threads":
        return Threads(setup)
    if name == "processes":
        from data_pipeline.executors.processes import Processes

        return Processes(setup)
    from data_pipeline.executors.ray_actors import RayActors

    return RayActors(setup)
