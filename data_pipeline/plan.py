"""The order of samples and their parts: pure functions of (seed, source, position).

Nothing here holds a random generator's state; every choice is a keyed hash, so any position can be
computed on its own, on any machine.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from data_pipeline.index import IMAGE
from data_pipeline.keys import keyed

SAMPLE_BITS = 39
"""A sample's id is ``source << SAMPLE_BITS | its number in the source``."""


class Permutation:
    """A keyed permutation of ``count`` things, without listing them.

    A four-round Feistel network over the smallest even number of bits that holds ``count``,
    applied until the result is below it (cycle walking). The values of its round functions are kept:
    there are ``4 * sqrt(4 * count)`` of them at most, and a hash costs as much as all the rest.
    """

    def __init__(self, count: int, *key: int):
        self.count = count
        self.key = key
        self._half = max(1, ((count - 1).bit_length() + 1) // 2)
        self._mask = (1 << self._half) - 1
        self._rounds = np.full((4, self._mask + 1), -1)  # not known yet

    def __call__(self, first: int, count: int) -> np.ndarray:
        """Where ``count`` things from ``first`` on go: int64 [count]."""
        half, mask = self._half, self._mask
        found, out = np.arange(first, first + count), np.arange(count)
        while len(out):
            left, right = found[out] >> half, found[out] & mask
            for number, values in enumerate(self._rounds):
                for new in np.unique(right[values[right] < 0]).tolist():
                    values[new] = keyed(*self.key, number, new) & mask
                left, right = right, left ^ values[right]
            found[out] = left << half | right
            out = out[found[out] >= self.count]
        return found


def shuffled(count: int, *key: int) -> np.ndarray:
    """A keyed permutation of ``count`` things, listed: int64 [count].

    The things are sorted by a keyed hash (SplitMix64's finalizer), which is the same everywhere.
    """
    mixed = np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(keyed(*key))
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(mixed ^ (mixed >> np.uint64(31)), kind="stable")


def sample_id(source: int, number: int) -> int:
    """Identity of a document in all sources together."""
    return source << SAMPLE_BITS | number


class Segment(NamedTuple):
    """A piece of a document, or tokens ``start`` to ``stop`` of a long text; an image is whole."""

    piece: int
    start: int
    stop: int


class Part(NamedTuple):
    """What a row holds of a document: all of it, or one part of an over-long one.

    Attributes:
        source: number of the source.
        number: number of the document in the source.
        flipped: the pieces are taken in reverse order (pairs).
        segments: what it holds, in order; None for all of the document.
        first_image: images of the document before this part.
        images: images in it.
        length: tokens, BOS and EOS included.
        last: it ends the document, with EOS.
        view: key of the random views of its images (``views.view_of``), None for the plain ones.
    """

    source: int
    number: int
    flipped: bool
    segments: tuple[Segment, ...] | None
    first_image: int
    images: int
    length: int
    last: bool
    view: int | None = None


def split_document(
    pieces: list[int], room: int, image_tokens: int, max_images: int | None
) -> list[list[Segment]]:
    """Divide a document into parts that fit a row.

    Cuts lie between pieces where possible; text that alone is longer than a row is cut between
    tokens. An image is never cut. The first piece of a part may be an image without context.

    Args:
        pieces: tokens of each text, ``IMAGE`` for an image.
        room: tokens of a row; each part also takes BOS, the last one EOS.
        image_tokens: placeholders of an image; ``image_tokens + 3 <= room``.
        max_images: cap on the images of a part, or None.

    Returns:
        Segments of each part; at least one part.
    """
    parts: list[list[Segment]] = [[]]
    free, images = room - 1, 0
    for number, tokens in enumerate(pieces):
        size = image_tokens + 1 if tokens == IMAGE else tokens
        over = tokens == IMAGE and max_images is not None and images == max_images
        if parts[-1] and (size > free or over):
            parts.append([])
            free, images = room - 1, 0
        start = 0
        while size - start > free:
            parts[-1].append(Segment(number, start, start + free))
            start += free
            parts.append([])
            free, images = room - 1, 0
        if size > start:
            parts[-1].append(Segment(number, start, size))
        free -= size - start
        images += tokens == IMAGE
    if free == 0:
        parts.append(_make_room(parts[-1], pieces))
    return parts


def _make_room(part: list[Segment], pieces: list[int]) -> list[Segment]:
    """Take the end off a part that has no room for EOS: its last piece, or half of its only text."""
    segment = part.pop()
    if part:
        return [segment]
    middle = (segment.start + segment.stop) // 2
    part.append(Segment(segment.piece, segment.start, middle))
    return [Segment(segment.piece, middle, segment.stop)]


def parts_of(
    pieces: list[int],
    source: int,
    number: int,
    *,
    room: int,
    image_tokens: int,
    max_images: int | None,
    flipped: bool = False,
    view: int | None = None,
) -> list[Part]:
    """The parts of a document; the arguments are those of ``split_document`` and fields of ``Part``."""
    order = pieces[::-1] if flipped else pieces
    divided = split_document(order, room, image_tokens, max_images)
    parts, first = [], 0
    for index, segments in enumerate(divided):
        images, last = 0, index == len(divided) - 1
        length = 1 + last
        for piece, start, stop in segments:
            images += order[piece] == IMAGE
            length += stop - start
        parts.append(Part(source, number, flipped, tuple(segments), first, images, length, last, view))
        first += images
    return parts
