"""What is asked of a worker and what it gives back: nothing else passes between them.

A task holds the text and names every byte of its images, so a worker holds no index and no position; a
lost one is simply asked again elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np

from data_pipeline.batch import PADDING, Batch
from data_pipeline.index import IMAGE, Entry
from data_pipeline.plan import Part, sample_id
from data_pipeline.quarantine import Failure
from data_pipeline.rows import SpecialTokens
from data_pipeline.settings import DataSettings
from data_pipeline.storage import Range

NOWHERE = "", ""
"""In place of a shard."""


@dataclass(frozen=True)
class Task:
    """Rows to make a micro-batch of: parts of documents laid end to end, and padding.

    Letters: T tokens, R rows, D parts (the padding of a row counts as one).

    Attributes:
        tokens: int32 [T], with all structural tokens, placeholders and padding.
        row_starts: int32 [R + 1], offsets of the rows into the tokens.
        cu_seqlens: int32 [D + 1], offsets of the parts into the tokens.
        source: int32 [D], number of each part's source, ``PADDING`` for padding.
        sample_ids: int64 [D], identity of each part's document, ``PADDING`` for padding.
        keys: name of each part's document.
        shards: path or URL of each part's shard, and the ETag it was indexed with.
        images: offset and size in the shard of each part's images, in the order of their BoI.
        first_image: images of the document before each part.
        views: ``Part.view`` of each part.
        nbytes: of all pixels at most.
    """

    tokens: np.ndarray
    row_starts: np.ndarray
    cu_seqlens: np.ndarray
    source: np.ndarray
    sample_ids: np.ndarray
    keys: Sequence[str]
    shards: Sequence[tuple[str, str]]
    images: Sequence[list[list[int]]]
    first_image: Sequence[int]
    views: Sequence[int | None]
    nbytes: int

    def __str__(self) -> str:
        """Names of its documents, for messages."""
        named = zip(self.shards, self.keys, strict=True)
        return ", ".join(f"{shard}/{key}" for (shard, _), key in named if key)

    def ranges(self) -> list[Range]:
        """The bytes of all images in their order."""
        return [
            Range(url, offset, size, etag)
            for (url, etag), places in zip(self.shards, self.images, strict=True)
            for offset, size in places
        ]


class Layout:
    """Lays parts of documents end to end, row by row, for a ``Task``.

    Args:
        special: the structural tokens.
        settings: sizes of rows and images.
    """

    def __init__(self, special: SpecialTokens, settings: DataSettings):
        self._settings = settings
        self._image = np.array([special.boi] + [special.image] * settings.image_tokens, np.int32)
        self._bos, self._eos, self._pad = (
            np.array([token], np.int32) for token in (special.bos, special.eos, special.pad)
        )
        self._tokens: list[np.ndarray] = []
        self._parts: list[tuple[Any, ...]] = []  # length, and a value for each field of Task from source on
        self._row_starts, self._end = [0], 0

    def part(self, part: Part, entry: Entry, shard: tuple[str, str]) -> None:
        """Append a planned part of a document that lies in a shard (its path or URL, and its ETag)."""
        pieces, own = _placed(entry.pieces), []
        if part.flipped:
            pieces.reverse()
        tokens = self._tokens
        tokens.append(self._bos)
        for piece, start, stop in _whole(pieces) if part.segments is None else part.segments:
            length, at = pieces[piece]
            if length == IMAGE:
                tokens.append(self._image)
                own.append(entry.images[at])
            else:
                tokens.append(entry.tokens[at + start : at + stop])
        if part.last:
            tokens.append(self._eos)
        sample = sample_id(part.source, part.number)
        self._add(part.length, part.source, sample, entry.key, shard, own, part.first_image, part.view)

    def document(
        self, source: int, sample: int, key: str, pieces: Iterable[list[int] | None], end: bool
    ) -> int:
        """Append a document that lies in no shard.

        Args:
            source, sample: number of its source and its identity.
            key: its name.
            pieces: ids of each text, None for an image.
            end: close it with EOS.

        Returns:
            Its length in tokens.
        """
        own = [self._image if ids is None else np.array(ids, np.int32) for ids in pieces]
        images = [[0, 0] for piece in own if piece is self._image]
        own = [self._bos, *own, *([self._eos] if end else [])]
        self._tokens += own
        length = sum(map(len, own))
        self._add(length, source, sample, key, NOWHERE, images, 0, None)
        return length

    def end_row(self, fill: bool) -> None:
        """End a row; with padding up to the context length, where ``fill`` says so."""
        rest = self._row_starts[-1] + self._settings.context_length - self._end
        if fill and rest:
            self._tokens.append(self._pad.repeat(rest))
            self._add(rest, PADDING, PADDING, "", NOWHERE, [], 0, None)
        self._row_starts.append(self._end)

    def _add(self, length: int, *values: Any) -> None:
        self._end += length
        self._parts.append((length, *values))

    def task(self) -> Task:
        """The rows so far."""
        lengths, source, samples, keys, shards, images, first_image, views = zip(*self._parts, strict=True)
        sides = self._settings.image_size, self._settings.drawn_size
        return Task(
            np.concatenate(self._tokens, dtype=np.int32),
            np.array(self._row_starts, np.int32),
            np.array([0, *accumulate(lengths)], np.int32),
            np.array(source, np.int32),
            np.array(samples, np.int64),
            keys,
            shards,
            images,
            first_image,
            views,
            3 * sum(map(len, images)) * sum(side**2 for side in sides),
        )


def _placed(pieces: list[int]) -> list[tuple[int, int]]:
    """Each piece with where its ids begin among those of all texts, or with the number of the image."""
    placed, ids, images = [], 0, 0
    for tokens in pieces:
        if tokens == IMAGE:
            placed.append((tokens, images))
            images += 1
        else:
            placed.append((tokens, ids))
            ids += tokens
    return placed


def _whole(pieces: list[tuple[int, int]]) -> Iterable[tuple[int, int, int]]:
    """Segments of a whole document."""
    return ((number, 0, tokens) for number, (tokens, _) in enumerate(pieces))


@dataclass(frozen=True)
class Produced:
    """A micro-batch made of a task.

    Attributes:
        batch: the micro-batch.
        checksums: uint32 [R], of what each row holds; see ``state.row_checksums``.
        failures: the bad samples.
        seen: samples looked at, by source.
        elsewhere: with an executor that leaves the batch elsewhere: where; ``batch`` is ``NOTHING`` then.
    """

    batch: Batch
    checksums: np.ndarray
    failures: Sequence[Failure]
    seen: dict[str, int]
    elsewhere: Any = None

    def without_pixels(self) -> Produced:
        """The same, images and drawn images left out."""
        nothing = np.empty((0, 0, 0, 3), np.uint8)
        return replace(self, batch=replace(self.batch, images=nothing, drawn=nothing))

    def with_pixels(self, images: np.ndarray, drawn: np.ndarray) -> Produced:
        """The same, these put in."""
        return replace(self, batch=replace(self.batch, images=images, drawn=drawn))
