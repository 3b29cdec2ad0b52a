"""What is asked of a worker and what it gives back: nothing else passes between them.

A task names every byte it needs, so a worker holds no index and no position; a lost one is simply asked
again elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.batch import Batch
from data_pipeline.index import IMAGE
from data_pipeline.plan import Part
from data_pipeline.quarantine import Failure
from data_pipeline.storage import Range


class Address(NamedTuple):
    """Where the bytes of a planned part lie.

    Attributes:
        part: what the row holds of the document.
        source: name of the source; ``pair``: whether it is one of image-text pairs.
        shard: path or URL of the shard; ``etag``: of the shard that was indexed.
        key: of the document.
        json: offset and size of its JSON.
        images: offset and size of each of its images.
        pieces: tokens of each of its texts, ``index.IMAGE`` for an image.
    """

    part: Part
    source: str
    pair: bool
    shard: str
    etag: str
    key: str
    json: tuple[int, int]
    images: tuple[tuple[int, int], ...]
    pieces: tuple[int, ...]

    def ranges(self) -> list[Range]:
        """The bytes that the part needs: its JSON, then its images in their order."""
        given = iter(self.images)
        where = [next(given) if tokens == IMAGE else None for tokens in self.pieces]
        if self.part.flipped:
            where.reverse()
        own = [where[segment.piece] for segment in self.part.segments]
        places = [self.json, *(place for place in own if place is not None)]
        return [Range(self.shard, *place, self.etag) for place in places]


@dataclass(frozen=True)
class Task:
    """Rows to make a micro-batch of.

    Attributes:
        rows: what each row holds.
        nbytes: of its pixels at most.
    """

    rows: tuple[tuple[Address, ...], ...]
    nbytes: int

    def __str__(self) -> str:
        """Names of its documents, for messages."""
        return ", ".join(f"{a.source}/{a.key}" for row in self.rows for a in row)


@dataclass(frozen=True)
class Produced:
    """A micro-batch made of a task.

    Attributes:
        batch: the micro-batch.
        checksums: uint32 [R], of what each row holds; see ``state.row_checksums``.
        failures: the bad samples.
        seen: samples looked at, by source.
        pixels: with an executor that leaves them elsewhere: where the batch's images and drawn images
            are; the batch's own have no size then.
    """

    batch: Batch
    checksums: np.ndarray
    failures: Sequence[Failure]
    seen: dict[str, int]
    pixels: Any = None

    def without_pixels(self) -> Produced:
        """The same, images and drawn images left out."""
        nothing = np.empty((0, 0, 0, 3), np.uint8)
        return replace(self, batch=replace(self.batch, images=nothing, drawn=nothing))

    def with_pixels(self, images: np.ndarray, drawn: np.ndarray) -> Produced:
        """The same, these put in."""
        return replace(self, batch=replace(self.batch, images=images, drawn=drawn), pixels=None)
