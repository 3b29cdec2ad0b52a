"""What a trainer reads from: its share of each step, made ahead of time.

The stream plans, an executor makes, the feed keeps ``data.prefetch`` steps under way and hands them over
in order. What was made ahead is never part of the position.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from data_pipeline.batch import Batch
from data_pipeline.errors import TooManyFailures
from data_pipeline.executors import Executor, Setup, make_executor
from data_pipeline.quarantine import Failure
from data_pipeline.settings import DataSettings
from data_pipeline.state import step_checksum
from data_pipeline.stream import Step, Stream
from data_pipeline.task import Produced, Task

if TYPE_CHECKING:
    from data_pipeline.ray_service import RemoteFeed


@dataclass(frozen=True)
class Division:
    """Which part of a step a data-parallel rank takes; see ``Step.division``."""

    rank: int = 0
    ranks: int = 1
    rows_per_micro_batch: int = 1
    count: int = 1


@dataclass(frozen=True)
class Share:
    """A rank's part of a step.

    Attributes:
        number: of the step, from 0.
        state: position after the step, for a checkpoint.
        batches: the micro-batches, in order.
        rows: numbers of their rows in the step, in the order they come.
        checksums: uint32, of each of these rows.
        step_rows: rows of the whole step.
        quarantined: bad samples met so far; those that the index names are counted by rank 0 alone.
        failures: the bad samples among them that no share before has named.
        totals: samples looked at and bad ones by source and reason; see ``Ledger.totals``.
        elsewhere: where each batch is, with an executor that leaves them elsewhere.
    """

    number: int
    state: dict[str, Any]
    batches: list[Batch]
    rows: list[int]
    checksums: np.ndarray
    step_rows: int
    quarantined: int = 0
    elsewhere: list[Any] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    totals: dict[str, dict[str, int]] = field(default_factory=dict)

    def spread(self) -> np.ndarray:
        """The checksums at their rows' places in the step, 0 elsewhere: float64 [step_rows], which
        holds them exactly, so that the sum over all ranks gives those of the whole step."""
        values = np.zeros(self.step_rows)
        values[self.rows] = self.checksums
        return values


@dataclass(frozen=True)
class _Ahead:
    step: Step
    groups: list[list[int]]
    nbytes: int
    pending: list[Future[Produced]]


class Feed:
    """A rank's shares of the steps of a stream.

    Args:
        stream: the plan; nothing else may take steps from it.
        division: which part of each step is this rank's.
        executor: by default the one that ``data.executor`` names; closed with the feed.

    Raises:
        DataError: when the executor cannot be started.
    """

    def __init__(self, stream: Stream, division: Division, executor: Executor | None = None):
        self.stream = stream
        self.division = division
        self.executor = executor or make_executor(setup_of(stream))
        self._ahead: deque[_Ahead] = deque()
        self._last: _Ahead | None = None
        self._state = stream.state()
        own = division.rank == 0  # bad documents that the index names are told once
        self._elsewhere, self._told = (0, 0) if own else (len(stream.ledger), len(stream.ledger.lines))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def next(self) -> Share:
        """The next step's share; waits until it is made.

        Raises:
            TooManyFailures: when a source has more bad samples than ``data.failure_limit`` allows.
            DataError: when a worker says so, or was lost again and again.
        """
        self._fill()
        first = self._ahead[0]
        try:
            made = [self.stream.record(pending.result()) for pending in first.pending]
        except TooManyFailures as error:
            error.failures = self._untold()
            raise
        self._ahead.popleft()
        self._last = first
        self._state = first.step.state
        if self.executor.runs_ahead:
            self._fill()
        return Share(
            first.step.number,
            first.step.state,
            [produced.batch for produced in made],
            [row for group in first.groups for row in group],
            np.concatenate([produced.checksums for produced in made]),
            len(first.step.rows),
            len(self.stream.ledger) - self._elsewhere,
            [produced.elsewhere for produced in made],
            self._untold(),
            self.stream.ledger.totals(),
        )

    def _untold(self) -> list[Failure]:
        """Bad samples that no share has named."""
        lines = self.stream.ledger.lines
        told, self._told = self._told, len(lines)
        return lines[told:]

    def ready(self) -> bool:
        """Whether the next share is made, so that ``next`` does not wait."""
        return bool(self._ahead) and all(pending.done() for pending in self._ahead[0].pending)

    def settle(self) -> None:
        """Wait until everything that is under way is made."""
        wait([pending for ahead in self._ahead for pending in ahead.pending])

    def state(self) -> dict[str, Any]:
        """Position after the last share handed over, whatever is made ahead."""
        return self._state

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken; see ``Stream.load_state``."""
        self.drop()
        self.stream.load_state(state)
        self._state = self.stream.state()

    def again(self, index: int) -> Produced:
        """Have a micro-batch of the last share made once more: it was lost on the way."""
        assert self._last is not None
        (pending,) = self.executor.submit(self._last.step.task(self._last.groups[index]))
        return pending.result()

    def heldout(self, documents: int) -> Batch:
        """Held-out documents of the first source, a row each; see ``Stream.heldout_documents``."""
        return self.stream.row_of(self.stream.heldout_documents(documents))

    def validation(
        self, source: str | int, documents: int, rows_per_micro_batch: int, rank: int = 0, ranks: int = 1
    ) -> list[Produced]:
        """What ``validation_batches`` gives, as the executor made it."""
        tasks = self.stream.validation_tasks(source, documents, rows_per_micro_batch, rank, ranks)
        pending = self.executor.submit(*tasks)
        return [self.stream.record(future.result()) for future in pending]

    def validation_batches(
        self, source: str | int, documents: int, rows_per_micro_batch: int, rank: int = 0, ranks: int = 1
    ) -> list[Batch]:
        """Held-out documents, made by the executor; see ``Stream.validation_tasks``."""
        made = self.validation(source, documents, rows_per_micro_batch, rank, ranks)
        return [produced.batch for produced in made]

    def close(self) -> None:
        """Stop making; give back the workers."""
        self.drop()
        self.executor.close()

    def _fill(self) -> None:
        """Have steps made up to the limits. One always may be."""
        settings = self.stream.settings
        steps = settings.prefetch if self.executor.runs_ahead else 1
        while not self._ahead or (
            len(self._ahead) < steps and sum(a.nbytes for a in self._ahead) < settings.prefetch_bytes
        ):
            division, step = self.division, self.stream.next()
            groups = step.division(
                division.rank, division.ranks, division.rows_per_micro_batch, division.count
            )
            tasks: list[Task] = [step.task(group) for group in groups]
            nbytes = sum(task.nbytes for task in tasks)
            self._ahead.append(_Ahead(step, groups, nbytes, self.executor.submit(*tasks)))

    def drop(self) -> None:
        """Forget what is made ahead."""
        for ahead in list(self._ahead):  # another thread may be at its next
            for pending in ahead.pending:
                pending.cancel()
        self._ahead.clear()


def open_feed(settings: DataSettings, division: Division, global_rows: int) -> Feed | RemoteFeed:
    """A rank's feed of the training split; with ``data.executor=ray`` from its node's feeder.

    Raises:
        DataError: when the data cannot be opened.
    """
    if settings.executor == "ray":
        from data_pipeline.ray_service import RemoteFeed

        return RemoteFeed(settings, division, global_rows)
    return Feed(Stream(settings, "train", global_rows), division)


def setup_of(stream: Stream) -> Setup:
    """What the workers of a stream are made of."""
    return Setup(stream.settings, stream.tokenizer.fingerprint, stream.producer.decoder.fingerprint)


def checksum_of(shares: list[Share]) -> int:
    """The checksum of a step from the shares of all its ranks; see ``state.step_checksum``."""
    return step_checksum(np.sum([share.spread() for share in shares], axis=0).astype(np.uint32))
