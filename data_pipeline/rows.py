"""Who sees what and what is predicted, from the tokens alone.

This is the only place that knows the rule. A document runs from a BOS token to the next one;
images are a BoI token followed by placeholders; a token sees an image of its own document once
the image's BoI lies before it, so an image's own placeholders see it and its BoI does not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_pipeline.batch import IGNORED


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the tokens that carry structure.

    Attributes:
        bos: starts a document, and every part of a document that was split.
        eos: ends a document.
        pad: fills a row behind its last document.
        boi: begins an image; the state that predicts the picture.
        image: placeholder, one for each visual token of an image.
    """

    bos: int
    eos: int
    pad: int
    boi: int
    image: int


@dataclass(frozen=True)
class RowDescription:
    """Structure of a stream of T tokens with M images.

    Attributes:
        document: int32 [T], number of the token's document within its row, from 0.
        position: int32 [T], position within the document (within the row in the release's way).
        image_row: int32 [M], row of each image, images in the order of their BoI tokens.
        image_boi: int32 [M], position of the image's BoI within its row.
        visible: int32 [T, 2], half-open interval of the row's images that the token sees,
            counted from 0 within the row.
        context_start: int32 [M], position within the row of the BOS of the image's document.
        references: int32 [M, 2], half-open interval of the row's images that the image may look
            at while it is drawn, counted from 0 within the row.
        labels: int32 [T], the next token, or ``IGNORED``.
        image_loss: bool [M], False where the image's context is BOS and BoI alone.
        image_offset: int32 [R], images before each row: adds up to indices into all M images.
    """

    document: np.ndarray
    position: np.ndarray
    image_row: np.ndarray
    image_boi: np.ndarray
    visible: np.ndarray
    context_start: np.ndarray
    references: np.ndarray
    labels: np.ndarray
    image_loss: np.ndarray
    image_offset: np.ndarray


def describe_stream(
    tokens: np.ndarray,
    row_starts: np.ndarray,
    special: SpecialTokens,
    *,
    pair_source: bool | np.ndarray = False,
    release: bool = False,
    max_images: int | None = None,
    max_references: int | None = None,
) -> RowDescription:
    """Describe rows laid end to end.

    A row whose first token is not BOS counts as starting a document there. Padding belongs to
    the document before it; nothing is predicted on it.

    Args:
        tokens: integers [T].
        row_starts: integers [R + 1], offsets of the rows, from 0 to T.
        special: ids of the structural tokens.
        pair_source: whether a token belongs to an image-text pair, for all or per token [T]:
            text before the first image of such a document is not predicted (its BoI is). A
            document without an image keeps all its text.
        release: as the public checkpoint was trained: positions run on across the documents of
            a row, and an image looks at the one image before it only.
        max_images: rows of the language model's image table; older images are not visible.
        max_references: rows of the image decoder's table; older images are not looked at.

    Returns:
        The description, in ``RowDescription``.

    Raises:
        ValueError: when ``tokens`` is not one-dimensional, or ``row_starts`` does not cover it.
    """
    tokens, row_starts, row, starts = _structure(tokens, row_starts, special)
    index, row_start = np.arange(len(tokens)), row_starts[row]
    start = np.maximum.accumulate(np.where(starts, index, 0))
    count = np.cumsum(starts)
    document = count - count[row_start]

    boi = np.flatnonzero(tokens == special.boi)
    image_row = row[boi]
    image_offset = np.searchsorted(boi, row_starts[:-1])
    last = np.searchsorted(boi, index)
    first = np.searchsorted(boi, start)
    visible = np.stack([_at_most(first, last, max_images), last], -1) - image_offset[row][:, None]

    image = np.arange(len(boi))
    first_of_document = np.searchsorted(boi, start[boi])
    reference_first = _at_most(first_of_document, image, 1 if release else max_references)
    references = np.stack([reference_first, image], -1) - image_offset[image_row][:, None]

    return RowDescription(
        document=_int32(document),
        position=_int32(index - (row_start if release else start)),
        image_row=_int32(image_row),
        image_boi=_int32(boi - row_start[boi]),
        visible=_int32(visible),
        context_start=_int32(start[boi] - row_start[boi]),
        references=_int32(references),
        labels=_labels(tokens, row_starts, special, start, boi, pair_source),
        image_loss=_image_loss(tokens, special, start, boi),
        image_offset=_int32(image_offset),
    )


def predicted(
    tokens: np.ndarray,
    row_starts: np.ndarray,
    special: SpecialTokens,
    *,
    pair_source: bool | np.ndarray = False,
) -> tuple[np.ndarray, np.ndarray]:
    """``labels`` and ``image_loss`` of ``describe_stream`` alone, in a quarter of the time."""
    tokens, row_starts, _, starts = _structure(tokens, row_starts, special)
    start = np.maximum.accumulate(np.where(starts, np.arange(len(tokens)), 0))
    boi = np.flatnonzero(tokens == special.boi)
    labels = _labels(tokens, row_starts, special, start, boi, pair_source)
    return labels, _image_loss(tokens, special, start, boi)


def _structure(
    tokens: np.ndarray, row_starts: np.ndarray, special: SpecialTokens
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Tokens and offsets of the rows, checked; each token's row, and whether a document starts there."""
    tokens, row_starts = np.asarray(tokens), np.asarray(row_starts)
    if tokens.ndim != 1:
        raise ValueError(f"tokens: expected one axis, got shape {tokens.shape}")
    total = len(tokens)
    if row_starts[0] != 0 or row_starts[-1] != total or (np.diff(row_starts) < 0).any():
        raise ValueError(f"row_starts: must rise from 0 to the {total} tokens, got {row_starts}")
    row = np.repeat(np.arange(len(row_starts) - 1), np.diff(row_starts))
    starts = tokens == special.bos
    starts[row_starts[:-1][np.diff(row_starts) > 0]] = True
    return tokens, row_starts, row, starts


def _image_loss(tokens: np.ndarray, special: SpecialTokens, start: np.ndarray, boi: np.ndarray) -> np.ndarray:
    """Whether an image has more before it than BOS and BoI."""
    return boi - start[boi] > (tokens[start[boi]] == special.bos)


def _labels(
    tokens: np.ndarray,
    row_starts: np.ndarray,
    special: SpecialTokens,
    start: np.ndarray,
    boi: np.ndarray,
    pair_source: bool | np.ndarray,
) -> np.ndarray:
    """The next token of the same row, or ``IGNORED``."""
    total = len(tokens)
    keep = (tokens != special.pad) & (tokens != special.image) & (tokens != special.bos)
    keep[1:] &= ~((tokens[1:] == special.boi) & (tokens[:-1] == special.bos))
    pair = np.broadcast_to(np.asarray(pair_source, dtype=bool), (total,))
    if pair.any():
        following = np.searchsorted(boi, start)
        has_image = following < len(boi)
        first_boi = boi[np.minimum(following, len(boi) - 1)] if len(boi) else np.zeros(total, int)
        has_image &= start[first_boi] == start if total else has_image
        keep &= ~(pair & has_image & (np.arange(total) < first_boi))
    labels = np.full(total, IGNORED, np.int32)
    labels[:-1] = np.where(keep[1:], tokens[1:], IGNORED)
    ends = row_starts[1:][np.diff(row_starts) > 0] - 1
    labels[ends] = IGNORED
    return labels


def _at_most(first: np.ndarray, last: np.ndarray, limit: int | None) -> np.ndarray:
    return first if limit is None else np.maximum(first, last - limit)


def _int32(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array, dtype=np.int32)
