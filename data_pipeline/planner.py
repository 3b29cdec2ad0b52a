"""Windows of packed rows: which samples are trained on, in which order.

Everything follows from (manifest, settings, samples drawn so far): shards come in an order of their
own in each pass over a source, ``shuffle_shards`` of them at a time have their documents shuffled
together, sources are mixed by weight, and a window of samples is packed to rows.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from data_pipeline.corpus import Corpus, Source
from data_pipeline.errors import DataError, ResumeError
from data_pipeline.keys import keyed
from data_pipeline.mix import next_source
from data_pipeline.pack import pack
from data_pipeline.plan import Part, Permutation, parts_of, shuffled
from data_pipeline.settings import DataSettings, whole_weights
from data_pipeline.views import is_random

ORDER, FLIP, ROWS, VALIDATION, SHARDS, VIEW = range(6)
"""What a keyed choice is for: order of documents, side of a pair's image, order of rows, validation,
order of shards, views of a document's images."""


@dataclass
class Block:
    """Shards whose documents are shuffled together.

    Attributes:
        epoch: pass over the source.
        start, end: of its documents' places in the pass.
        shards: their numbers; ``ends``: documents up to the end of each.
        order: of its documents.
    """

    epoch: int
    start: int
    end: int
    shards: list[int]
    ends: list[int]
    order: Permutation


class Order:
    """The order of a source's documents of one split.

    Args:
        source: the corpus.
        split: ``train`` or ``heldout``.
        together: shards whose documents are shuffled together.
        key: of all choices.
    """

    def __init__(self, source: Source, split: str, together: int, *key: int):
        self.source = source
        self.split = split
        self.together = together
        self.key = key
        self.counts = source.counts(split)
        self.documents = int(self.counts.sum())
        self._pass = lru_cache(maxsize=2)(self._arranged)
        self._block: Block | None = None

    def drawn(self, first: int, count: int) -> Iterator[tuple[int, np.ndarray]]:
        """The documents that come ``first``-th and later, over all passes.

        Returns:
            Each pass that they are of, and the numbers of its documents in their source: int64.
        """
        while count:
            epoch, index = divmod(first, self.documents)
            block = self._block
            if block is None or block.epoch != epoch or not block.start <= index < block.end:
                block = self._block = self._opened(epoch, index)
            taken = min(count, block.end - index)
            yield epoch, self._numbers(block, block.order(index - block.start, taken))
            first, count = first + taken, count - taken

    def _numbers(self, block: Block, places: np.ndarray) -> np.ndarray:
        """Numbers of the documents at some places of a block."""
        numbers = np.empty(len(places), np.int64)
        inside = np.searchsorted(block.ends, places, side="right")
        for at in np.unique(inside).tolist():
            own = inside == at
            shard = self.source.numbers(self.split, block.shards[at])
            numbers[own] = shard[places[own] - (block.ends[at - 1] if at else 0)]
        return numbers

    def _opened(self, epoch: int, index: int) -> Block:
        """The block that holds the ``index``-th document of a pass; the indexes of its shards are read."""
        shards, ends = self._pass(epoch)
        number = int(np.searchsorted(ends[self.together - 1 : -1 : self.together], index, side="right"))
        first = number * self.together
        own = shards[first : first + self.together].tolist()
        self.source.fetch(own)
        start = int(ends[first - 1]) if first else 0
        inside = (ends[first : first + self.together] - start).tolist()
        order = Permutation(inside[-1], *self.key, ORDER, epoch, number)
        return Block(epoch, start, start + inside[-1], own, inside, order)

    def _arranged(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Shards in the order of a pass, and how many documents there are up to the end of each."""
        shards = shuffled(len(self.counts), *self.key, SHARDS, epoch)
        return shards, np.cumsum(self.counts[shards])


@dataclass(frozen=True)
class Mix:
    """Weights from a position on.

    Attributes:
        drawn: samples taken from each source before it.
        weights: whole numbers, one a source.
    """

    drawn: list[int]
    weights: list[int]

    def next_source(self, drawn: list[int]) -> int:
        """Source of the next sample; since the change, each has had its share to within one."""
        if len(drawn) == 1:
            return 0
        return next_source([n - base for n, base in zip(drawn, self.drawn, strict=True)], self.weights)


class Planner:
    """Windows of packed rows: a pure function of the samples drawn so far.

    Args:
        settings: as checked by ``check_settings``.
        corpus: the index.
        split: ``train`` or ``heldout``.

    Attributes:
        mixes: the weights, each from a position on; the first from the beginning.
    """

    def __init__(self, settings: DataSettings, corpus: Corpus, split: str):
        self.settings = settings
        self.corpus = corpus
        self.split = split
        self.mixes = [Mix([0] * len(corpus.sources), whole_weights(settings))]
        together, seed = settings.shuffle_shards, settings.seed
        self.orders = [Order(s, split, together, seed, number) for number, s in enumerate(corpus.sources)]

    def check(self) -> None:
        """Check that every source has documents in the split.

        Raises:
            DataError: naming the first that has none.
        """
        for source, order in zip(self.corpus.sources, self.orders, strict=True):
            if order.documents == 0:
                raise DataError(
                    f"source {source.settings.name!r}: none of its {len(source)} documents is in the "
                    f"{self.split} split; change data.holdout={self.settings.holdout} or add documents"
                )

    def window(self, drawn: list[int]) -> tuple[list[list[Part]], list[int]]:
        """Plan one window.

        Args:
            drawn: samples taken from each source before it.

        Returns:
            Its rows, in the order they are trained; and ``drawn`` after it.

        Raises:
            DataError: when a source has no document in the split.
        """
        self.check()
        mix, after = self.mix(sum(drawn)), list(drawn)
        for _ in range(self.settings.window):
            after[mix.next_source(after)] += 1
        samples = [self.samples(n, a, b - a) for n, (a, b) in enumerate(zip(drawn, after, strict=True))]
        rows = [row for own in samples for row in self.pack(own)]
        order = Permutation(len(rows), self.settings.seed, ROWS, sum(drawn))
        return [rows[index] for index in order(0, len(rows)).tolist()], after

    def mix(self, position: int) -> Mix:
        """The weights at a position, in samples of all sources."""
        return self.mixes[bisect_right([sum(mix.drawn) for mix in self.mixes], position) - 1]

    def change_weights(self, drawn: list[int], weights: list[int]) -> None:
        """Have other weights from a position on; what was to come after it before is forgotten."""
        self.mixes = [mix for mix in self.mixes if sum(mix.drawn) < sum(drawn)] + [
            Mix(list(drawn), list(weights))
        ]

    def events(self) -> list[dict[str, Any]]:
        """The weights and their positions, as JSON values."""
        return [{"drawn": mix.drawn, "weights": mix.weights} for mix in self.mixes]

    def load_events(self, events: list[dict[str, Any]]) -> None:
        """Take up recorded weights.

        Raises:
            ResumeError: when they are of another number of sources.
        """
        mixes = [Mix(list(event["drawn"]), list(event["weights"])) for event in events]
        if not mixes or any(len(mix.weights) != len(self.orders) for mix in mixes):
            raise ResumeError("data position: its weights are not those of these sources")
        self.mixes = mixes

    def samples(self, source: int, first: int, count: int) -> list[Part]:
        """The parts of a source's ``first``-th and later samples: each pass over it has its own order."""
        room, most = self.settings.context_length, self.settings.max_images_per_row
        corpus = self.corpus.sources[source]
        parts: list[Part] = []
        for epoch, numbers in self.orders[source].drawn(first, count):
            texts, images = corpus.sizes(numbers)
            lengths = 2 + texts + (self.settings.image_tokens + 1) * images
            whole = lengths <= room
            if most is not None:
                whole &= images <= most
            columns = (column.tolist() for column in (numbers, lengths, images, whole))
            for number, length, pictures, fits in zip(*columns, strict=True):
                if fits:
                    flipped, view = self._seen(source, number, epoch, True)
                    parts.append(Part(source, number, flipped, None, 0, pictures, length, True, view))
                else:
                    parts += self.parts(source, number, epoch, random_views=True)
        return parts

    def parts(self, source: int, number: int, epoch: int, random_views: bool = False) -> list[Part]:
        """The parts of a document as it is seen in a pass over its source.

        Args:
            source, number: of the document.
            epoch: the pass.
            random_views: whether its images are cropped and mirrored as the source's settings say; for
                validation they are not.
        """
        flipped, view = self._seen(source, number, epoch, random_views)
        return parts_of(
            self.corpus.sources[source].entry(number).pieces,
            source,
            number,
            room=self.settings.context_length,
            image_tokens=self.settings.image_tokens,
            max_images=self.settings.max_images_per_row,
            flipped=flipped,
            view=view,
        )

    def _seen(self, source: int, number: int, epoch: int, random_views: bool) -> tuple[bool, int | None]:
        """``flipped`` and ``view`` of a document's parts in a pass."""
        own, view = self.corpus.sources[source].settings, None
        if random_views and is_random(own):
            view = keyed(self.settings.seed, VIEW, source, epoch, number) >> 1  # a key has 63 bits
        flipped = own.kind == "pairs" and keyed(self.settings.seed, FLIP, source, epoch, number) & 1 == 1
        return flipped, view

    def pack(self, parts: list[Part]) -> list[list[Part]]:
        """Rows of parts of one source."""
        return pack(parts, self.settings.context_length, self.settings.max_images_per_row)

    def heldout(self, source: int) -> Iterator[int]:
        """Numbers of a source's held-out documents in a fixed order, the same for any seed."""
        order = Order(
            self.corpus.sources[source], "heldout", self.settings.shuffle_shards, VALIDATION, source
        )
        for _, numbers in order.drawn(0, order.documents):
            yield from numbers.tolist()
