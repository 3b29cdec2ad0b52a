"""The position of a stream, what it depends on, and checksums of what was trained on.

A position is about 1 KB of JSON in the trainer's checkpoint:

    {"schema": 4, "manifest": ..., "tokenizer": ..., "decoder": ..., "settings": {...},
     "mix": [{"drawn": [0, 0], "weights": [2, 1]}], "cursor": {"step": 120, "drawn": [640, 320], "row": 17}}

``cursor`` says where the stream stands, ``mix`` the weights of the sources from which position on, the
rest what the order and the pixels depend on.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import xxhash

from data_pipeline.batch import PADDING, Batch
from data_pipeline.errors import ResumeError
from data_pipeline.settings import DataSettings, SourceSettings
from data_pipeline.views import is_random

SCHEMA = 4
FIXED = (
    "context_length",
    "image_tokens",
    "image_size",
    "drawn_size",
    "holdout",
    "window",
    "max_images_per_row",
    "max_pixels",
    "seed",
    "shuffle_shards",
)
"""Settings that the order or the content of the samples depends on."""


def fixed_settings(settings: DataSettings, split: str) -> dict[str, Any]:
    """The settings that a position depends on, as JSON values."""
    sources = [_fixed_source(source) for source in settings.sources]
    return {"sources": sources, "split": split, **{name: getattr(settings, name) for name in FIXED}}


def _fixed_source(source: SourceSettings) -> list[Any]:
    """Name and kind, and how its pictures are seen where that is not the plain view."""
    views = {"crop": source.crop, "crop_scale": source.crop_scale, "flip": source.flip}
    return [source.name, source.kind, *([views] if is_random(source) else [])]


def check_state(saved: Any, own: dict[str, Any], accept: Collection[str] = ()) -> None:
    """Check that a saved position belongs to this stream.

    Args:
        saved: the position, as read from a checkpoint.
        own: a position of the stream as it is now.
        accept: which of ``settings.CHANGES`` may have changed.

    Raises:
        ResumeError: naming everything else that has, and the setting that accepts it.
    """
    if not isinstance(saved, dict) or saved.get("schema") != SCHEMA or own.keys() != saved.keys():
        found = saved.get("schema") if isinstance(saved, dict) else None
        raise ResumeError(
            f"data position: not one this version can read (schema {found!r}, this one reads {SCHEMA}); "
            "resume with the version that wrote it"
        )
    changed: dict[str, list[str]] = {}
    changed["settings"] = [
        f"data.{name} was {saved['settings'].get(name)!r}, now {value!r}"
        for name, value in own["settings"].items()
        if saved["settings"].get(name) != value
    ]
    if saved["tokenizer"] != own["tokenizer"]:
        changed["tokenizer"] = [f"another tokenizer (was {saved['tokenizer']}, now {own['tokenizer']})"]
    if saved["decoder"] != own["decoder"]:
        changed["decoder"] = [f"another image decoder (was {saved['decoder']}; now {own['decoder']})"]
    if saved["manifest"] != own["manifest"]:
        changed["manifest"] = ["other documents in the shards (manifest)"]
    if saved["mix"][-1]["weights"] != own["mix"][-1]["weights"]:
        was, now = saved["mix"][-1]["weights"], own["mix"][-1]["weights"]
        changed["weights"] = [f"the weights of data.sources were {was}, now {now}"]
    refused = {name: lines for name, lines in changed.items() if lines and name not in accept}
    if refused:
        lines = "; ".join(line for own_lines in refused.values() for line in own_lines)
        raise ResumeError(
            f"cannot continue at the saved data position: {lines}; "
            f"data.accept_changes=[{','.join(refused)}] goes on all the same"
        )


def row_checksums(
    batch: Batch, boi: int, digests: tuple[Sequence[int], Sequence[int]] | None = None
) -> np.ndarray:
    """A checksum of what each row of a batch holds, whatever other rows it comes with.

    CRC-32 over tokens, labels, the place, source and id of each document, and each image's id and
    ``pixel_digest``.

    Args:
        batch: the micro-batch.
        boi: id of the token that starts an image.
        digests: of its images and drawn images, where they are known.

    Returns:
        uint32 [R].
    """
    per_row = np.searchsorted(np.flatnonzero(batch.tokens == boi), batch.row_starts)
    own = digests or ([*map(pixel_digest, batch.images)], [*map(pixel_digest, batch.drawn)])
    pixels, drawn = (np.array(values, np.uint64) for values in own)
    starts, good = batch.cu_seqlens[:-1], batch.source != PADDING
    checksums = np.empty(len(batch.row_starts) - 1, np.uint32)
    for row in range(len(checksums)):
        first, last = batch.row_starts[row : row + 2]
        own = good & (starts >= first) & (starts < last)
        image, end = per_row[row : row + 2]
        large = slice(*np.searchsorted(batch.drawn_index, (image, end)))
        parts = (
            batch.tokens[first:last],
            batch.labels[first:last],
            starts[own] - first,
            batch.source[own],
            batch.sample_ids[own],
            batch.image_ids[image:end],
            pixels[image:end],
            batch.drawn_index[large] - np.int32(image),
            drawn[large],
        )
        value = 0
        for part in parts:
            value = zlib.crc32(part.tobytes(), value)
        checksums[row] = value
    return checksums


def step_checksum(rows: Sequence[int] | np.ndarray) -> int:
    """CRC-32 of the checksums of a step's rows, in their global order."""
    return zlib.crc32(np.asarray(rows, np.uint32).tobytes())


def pixel_digest(image: np.ndarray) -> int:
    """64-bit XXH3 of an image's pixels, uint8 [h, w, 3]."""
    return xxhash.xxh3_64_intdigest(image.data)
