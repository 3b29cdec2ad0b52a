"""What one forward pass takes: the contract between the data pipeline and the trainer.

A micro-batch is one stream of tokens. Rows (documents packed to the context length) lie one
after the other in it, and so do the documents inside a row. Everything is a plain NumPy array,
so that it crosses process, shared-memory and network borders without a framework.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

IGNORED = -100
"""Label of a position whose next token is not predicted."""

PADDING = -1
"""Source and sample id of the padding that fills the end of a row."""

IMAGE_ID_BITS = 16
"""An image's id is ``sample_id << IMAGE_ID_BITS | its number in the sample``."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    Letters: T tokens, R rows, D documents (a run of padding in a row counts as one), I input images,
    J drawn images; h, w input pixels; H, W drawn pixels.

    Attributes:
        tokens: int32 [T]. An image is one BoI token and a fixed number of placeholders.
        labels: int32 [T], the next token or ``IGNORED``; see ``rows.describe_stream``.
        row_starts: int32 [R + 1], offsets of the rows into the stream; last is T.
        cu_seqlens: int32 [D + 1], offsets of the documents into the stream; last is T.
        source: int32 [D], index of the source each document comes from, ``PADDING`` for padding.
        sample_ids: int64 [D], identity of each document in its corpus, ``PADDING`` for padding.
        images: uint8 [I, h, w, 3], RGB, in the order of their BoI tokens; as decoders write them.
        image_ids: int64 [I], identity of each image; with the seed and the step it keys all
            randomness, so that no number depends on where an image is processed.
        drawn: uint8 [J, H, W, 3], RGB, the images that carry image loss, at output resolution.
        drawn_index: int32 [J], ascending, which input image each drawn one is.
    """

    tokens: np.ndarray
    labels: np.ndarray
    row_starts: np.ndarray
    cu_seqlens: np.ndarray
    source: np.ndarray
    sample_ids: np.ndarray
    images: np.ndarray
    image_ids: np.ndarray
    drawn: np.ndarray
    drawn_index: np.ndarray

    def validate(self) -> None:
        """Check dtypes, shapes and offsets.

        Raises:
            ValueError: naming the first field that does not fit the contract.
        """
        for name, (dtype, ndim) in _LAYOUT.items():
            array = getattr(self, name)
            if not isinstance(array, np.ndarray) or array.dtype != dtype or array.ndim != ndim:
                got = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array)
                raise ValueError(f"Batch.{name}: expected {np.dtype(dtype)} with {ndim} axes, got {got}")
        total = len(self.tokens)
        for name in ("row_starts", "cu_seqlens"):
            offsets = getattr(self, name)
            if offsets[0] != 0 or offsets[-1] != total or (np.diff(offsets) <= 0).any():
                raise ValueError(f"Batch.{name}: must rise from 0 to the {total} tokens, got {offsets}")
        documents = len(self.cu_seqlens) - 1
        pairs = [
            ("labels", self.labels, total),
            ("source", self.source, documents),
            ("sample_ids", self.sample_ids, documents),
            ("image_ids", self.image_ids, len(self.images)),
            ("drawn_index", self.drawn_index, len(self.drawn)),
        ]
        for name, array, length in pairs:
            if len(array) != length:
                raise ValueError(f"Batch.{name}: expected {length} entries, got {len(array)}")
        index = self.drawn_index
        if len(index) and (index[0] < 0 or index[-1] >= len(self.images) or (np.diff(index) <= 0).any()):
            raise ValueError(f"Batch.drawn_index: must rise within {len(self.images)} images, got {index}")

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays together."""
        return sum(getattr(self, field.name).nbytes for field in fields(self))


_LAYOUT: dict[str, tuple[type, int]] = {
    "tokens": (np.int32, 1),
    "labels": (np.int32, 1),
    "row_starts": (np.int32, 1),
    "cu_seqlens": (np.int32, 1),
    "source": (np.int32, 1),
    "sample_ids": (np.int64, 1),
    "images": (np.uint8, 4),
    "image_ids": (np.int64, 1),
    "drawn": (np.uint8, 4),
    "drawn_index": (np.int32, 1),
}

NOTHING = Batch(**{name: np.empty((0,) * ndim, dtype) for name, (dtype, ndim) in _LAYOUT.items()})
"""In place of a batch that is elsewhere."""
