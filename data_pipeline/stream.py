"""The stream of training steps: what the trainer holds.

The order is fixed by (manifest, tokenizer, settings): samples are mixed over the sources, taken by
windows, packed to rows, and rows taken by steps. A position is a few numbers, so a run resumes
exactly, at any number of ranks. Nothing is decoded before a rank asks for its batches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from data_pipeline.balance import balance, row_cost
from data_pipeline.batch import Batch
from data_pipeline.corpus import SPLITS, open_corpus
from data_pipeline.decode import decode
from data_pipeline.errors import BadSample, DataError
from data_pipeline.formats import Document
from data_pipeline.plan import SAMPLE_BITS, Part
from data_pipeline.planner import Planner
from data_pipeline.produce import Producer
from data_pipeline.quarantine import Failure, Ledger
from data_pipeline.settings import DataSettings, check_settings, whole_weights
from data_pipeline.state import SCHEMA, check_state, fixed_settings
from data_pipeline.task import Layout, Produced, Task
from data_pipeline.tokens import load_tokenizer


@dataclass(frozen=True)
class Step:
    """The global batch of one optimizer step, planned.

    Attributes:
        number: of the step, from 0.
        rows: what every row holds, in the global order.
        state: position of the stream after this step; what a checkpoint taken after it saves, however
            far ahead the stream has been read.
    """

    number: int
    rows: list[list[Part]]
    state: dict[str, Any]
    _stream: Stream

    def division(self, rank: int, ranks: int, rows_per_micro_batch: int, count: int) -> list[list[int]]:
        """Which rows the micro-batches of one data-parallel rank take, in order.

        The rows of the step are the same for any division; they are dealt so that ranks, and the
        micro-batches of a rank, cost about the same.

        Args:
            rank, ranks: which of how many data-parallel ranks.
            rows_per_micro_batch: rows of one batch.
            count: micro-batches of the rank; ``ranks * rows_per_micro_batch * count`` is the step.

        Returns:
            Numbers of rows, for each micro-batch.

        Raises:
            ValueError: when the division does not come out even.
        """
        if ranks * rows_per_micro_batch * count != len(self.rows) or not 0 <= rank < ranks:
            raise ValueError(
                f"rank {rank} of {ranks} with {count} micro-batches of {rows_per_micro_batch} rows does not "
                f"divide a step of {len(self.rows)} rows"
            )
        costs = [row_cost(row, self._stream.settings) for row in self.rows]
        own = balance(costs, ranks)[rank]
        groups = balance([costs[index] for index in own], count)
        return [[own[index] for index in group] for group in groups]

    def task(self, rows: list[int]) -> Task:
        """What a worker needs to make a micro-batch of these rows."""
        return self._stream.task([self.rows[row] for row in rows])

    def batches(self, rank: int, ranks: int, rows_per_micro_batch: int, count: int) -> list[Batch]:
        """The micro-batches of one data-parallel rank, made here and now; see ``division``."""
        groups = self.division(rank, ranks, rows_per_micro_batch, count)
        return [self._stream.produce([self.rows[row] for row in group]) for group in groups]


class Stream:
    """Training steps from shards.

    Args:
        settings: see ``DataSettings``.
        split: ``train``, or ``heldout`` for the documents kept from it.
        global_rows: rows of a step, all ranks together. May change when a run resumes.

    Raises:
        DataError: when settings, tokenizer or shards are not usable, or a source has too many bad
            documents.

    Attributes:
        tokenizer: the loaded ``tokens.Tokenizer``.
        corpus: the index of all sources.
        ledger: bad samples this process has met.
    """

    def __init__(self, settings: DataSettings, split: str = "train", global_rows: int = 1):
        check_settings(settings)
        if split not in SPLITS or global_rows < 1:
            raise ValueError(f"split {split!r} must be of {SPLITS} and global_rows {global_rows} at least 1")
        self.settings = settings
        self.split = split
        self.global_rows = global_rows
        self.tokenizer = load_tokenizer(settings.tokenizer)
        self.ledger = Ledger(settings.failure_limit)
        self.producer = Producer(settings, self.tokenizer)
        self.corpus = open_corpus(settings, self.tokenizer, self.ledger, self.producer.storage)
        self.planner = Planner(settings, self.corpus, split)
        if split == "train":
            self.planner.check()
        self._step = 0
        self._drawn = [0] * len(settings.sources)  # samples of each source before the window
        self._row = 0  # rows of the window that are used up
        self._window: tuple[list[list[Part]], list[int]] | None = None

    def next(self) -> Step:
        """The next step; planned, not yet decoded. Sources start anew when they end."""
        rows: list[list[Part]] = []
        while len(rows) < self.global_rows:
            if self._window is None:
                self._window = self.planner.window(self._drawn)
            planned, after = self._window
            taken = planned[self._row : self._row + self.global_rows - len(rows)]
            rows += taken
            self._row += len(taken)
            if self._row >= len(planned):
                self._drawn, self._row, self._window = after, 0, None
        self._step += 1
        return Step(self._step - 1, rows, self.state(), self)

    def state(self) -> dict[str, Any]:
        """Position after the last step taken, as JSON values (about 1 KB)."""
        return {
            "schema": SCHEMA,
            "manifest": self.corpus.manifest,
            "tokenizer": self.tokenizer.fingerprint,
            "decoder": self.producer.decoder.fingerprint,
            "settings": fixed_settings(self.settings, self.split),
            "mix": self.planner.events(),
            "cursor": {"step": self._step, "drawn": list(self._drawn), "row": self._row},
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken.

        Raises:
            ResumeError: when it belongs to other data, another tokenizer, image decoder or other
                settings; it names what has changed, unless ``data.accept_changes`` does.
        """
        check_state(state, self.state(), self.settings.accept_changes)
        cursor = state["cursor"]
        self._step, self._drawn, self._row = cursor["step"], list(cursor["drawn"]), cursor["row"]
        self.planner.load_events(state["mix"])
        self._window = self.planner.window(self._drawn) if self._row else None
        wanted = whole_weights(self.settings)
        if self.planner.mixes[-1].weights != wanted:
            self.change_weights(wanted)

    def change_weights(self, weights: list[int]) -> None:
        """Mix by other weights from the next window on; the change becomes part of the position.

        Args:
            weights: a positive whole number for each source.

        Raises:
            ValueError: when they are not that.
        """
        if len(weights) != len(self.settings.sources) or any(type(w) is not int or w < 1 for w in weights):
            raise ValueError(
                f"weights must be {len(self.settings.sources)} positive whole numbers, got {weights}"
            )
        self.planner.change_weights(self._drawn if self._window is None else self._window[1], weights)

    def validation_tasks(
        self, source: str | int, documents: int, rows_per_micro_batch: int, rank: int = 0, ranks: int = 1
    ) -> list[Task]:
        """Held-out documents of a source, packed; the same ones each time.

        Args:
            source: its name or number.
            documents: how many, or as many as there are.
            rows_per_micro_batch: rows of a batch; the last batch may have fewer.
            rank, ranks: only every ``ranks``-th batch, from the ``rank``-th on.

        Raises:
            DataError: when the source is unknown or has no held-out documents.
        """
        number = self._source(source)
        parts = [
            part
            for document in islice(self._heldout(number), documents)
            for part in self.planner.parts(number, document, 0)
        ]
        rows = self.planner.pack(parts)
        groups = [rows[at : at + rows_per_micro_batch] for at in range(0, len(rows), rows_per_micro_batch)]
        return [self.task(group) for group in groups[rank::ranks]]

    def validation_batches(
        self, source: str | int, documents: int, rows_per_micro_batch: int, rank: int = 0, ranks: int = 1
    ) -> list[Batch]:
        """The batches of ``validation_tasks``, made here and now."""
        tasks = self.validation_tasks(source, documents, rows_per_micro_batch, rank, ranks)
        return [self.record(self.producer.produce(task)).batch for task in tasks]

    def heldout_documents(self, documents: int, source: str | int = 0) -> list[Document]:
        """The first held-out documents of a source whose images all decode, with their metadata.

        Raises:
            DataError: when the source is unknown or has no held-out documents.
        """
        number = self._source(source)
        found: list[Document] = []
        for index in self._heldout(number):
            if len(found) == documents:
                break
            own = self.corpus.sources[number]
            try:
                document = own.document(index)
                for blob in document.images:
                    decode(blob, self.settings.max_pixels)
                found.append(document)
                self.ledger.record({own.settings.name: 1}, [])
            except BadSample as bad:
                entry = own.entry(index)
                shard = own.shards[entry.shard].url.rpartition("/")[2]
                failure = Failure(own.settings.name, shard, entry.key, bad.reason, bad.detail)
                self.ledger.record({own.settings.name: 1}, [failure])
        return found

    def row_of(self, documents: Document | list[Document], end: bool = True, source: str | int = 0) -> Batch:
        """Given documents as a batch, each a row of its own without padding.

        Args:
            documents: held-out ones, or a user's prompt.
            end: close them with EOS; a prompt stays open.
            source: the source whose kind they are taken as (pair or interleaved).

        Raises:
            DataError: when there are none, one does not fit the context length, or an image cannot be
                decoded.
        """
        given = [documents] if isinstance(documents, Document) else documents
        if not given:
            raise DataError("no documents to make rows of")
        number = self._source(source)
        layout = Layout(self.tokenizer.special, self.settings)
        for document in given:
            digest = hashlib.blake2b(document.key.encode(), digest_size=8).digest()
            sample = int.from_bytes(digest, "little") >> (64 - SAMPLE_BITS)
            pieces = [self.tokenizer.encode(p) if isinstance(p, str) else None for p in document.content]
            length = layout.document(number, sample, document.key, pieces, end)
            layout.end_row(fill=False)
            if length > self.settings.context_length:
                raise DataError(
                    f"document {document.key!r}: {length} tokens, more than "
                    f"data.context_length={self.settings.context_length}; shorten it"
                )
        blobs = [blob for document in given for blob in document.images]
        batch, bad = self.producer.assemble(layout.task(), blobs)
        for index, why in bad.items():
            raise DataError(f"document {given[index].key!r}: {why}")
        return batch

    def task(self, rows: list[list[Part]]) -> Task:
        """What a worker needs to make a micro-batch of planned rows."""
        layout = Layout(self.tokenizer.special, self.settings)
        for row in rows:
            for part in row:
                source = self.corpus.sources[part.source]
                entry = source.entry(part.number)
                layout.part(part, entry, source.places[entry.shard])
            layout.end_row(fill=True)
        return layout.task()

    def produce(self, rows: list[list[Part]]) -> Batch:
        """Make a micro-batch of planned rows here and now."""
        return self.record(self.producer.produce(self.task(rows))).batch

    def record(self, produced: Produced) -> Produced:
        """Enter the bad samples of a micro-batch in the ledger.

        Raises:
            TooManyFailures: when a source has more than ``failure_limit`` allows.
        """
        self.ledger.record(produced.seen, list(produced.failures))
        return produced

    def _source(self, source: str | int) -> int:
        names = [settings.name for settings in self.settings.sources]
        if source in names:
            return names.index(source)
        if isinstance(source, int) and 0 <= source < len(names):
            return source
        raise DataError(f"source {source!r}: not one of {', '.join(names)}")

    def _heldout(self, source: int) -> Iterator[int]:
        """Numbers of a source's held-out documents in a fixed order, the same for any seed."""
        if not self.corpus.sources[source].counts("heldout").any():
            name = self.settings.sources[source].name
            raise DataError(f"source {name!r}: no document is held out; raise data.holdout")
        return self.planner.heldout(source)
