"""What the importers share: keys, lines of JSON, images, files that stay inside a folder."""

from __future__ import annotations

import gzip
import io
import json
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from data_pipeline.decode import decode, open_image
from data_pipeline.errors import BadSample, DataError
from data_pipeline.formats import MAX_IMAGE_BYTES, MAX_JSON_BYTES, Document, ShardWriter, Summary
from data_pipeline.settings import DataSettings

MAX_PIXELS = DataSettings().max_pixels
KEPT_MODES = ("RGB", "L", "P", "RGBA", "LA", "1")
Drop = Callable[[str], None]
"""Counts one thing left out, by reason."""


def run_import(
    documents: Callable[[Drop], Iterable[Document]], out: Path | str, source: Path | str, **limits: int
) -> Summary:
    """Write what an importer yields to shards, under keys made fit and unique.

    Raises:
        DataError: when no document is kept.
    """
    used: dict[str, int] = {}
    with ShardWriter(out, **limits) as writer:

        def drop(reason: str) -> None:
            writer.summary.dropped[reason] += 1

        for document in documents(drop):
            document.key = _unique(document.key, used)
            writer.write(document)
        if writer.summary.documents == 0:
            reasons = ", ".join(f"{reason} {n}" for reason, n in sorted(writer.summary.dropped.items()))
            raise DataError(f"{source}: no document is kept ({reasons or 'nothing in it'})")
    return writer.summary


def _unique(key: str, used: dict[str, int]) -> str:
    key = re.sub(r"[^A-Za-z0-9_\-]+", "_", key)[:150] or "document"
    while key in used:
        used[key] += 1
        key = f"{key}-{used[key]}"
    used[key] = 1
    return key


def checked_image(blob: bytes, smallest: int = 1) -> bytes:
    """The file as it shall be stored: as it is, or as PNG where its format or mode is unusual.

    The image is decoded to its end, so a cut one is found here and not in training.

    Raises:
        BadSample: when it cannot be decoded, is too large, or has a side below ``smallest``.
    """
    header = open_image(blob, MAX_PIXELS)
    if min(header.size) < smallest:
        raise BadSample("icon", f"{header.width} x {header.height}")
    image = decode(blob, MAX_PIXELS)
    if header.format in ("JPEG", "PNG", "WEBP") and header.mode in KEPT_MODES:
        return blob
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def read_inside(root: Path, path: Path) -> bytes:
    """Read a file that must lie in a folder, links followed.

    Raises:
        BadSample: when it lies elsewhere, is missing, no plain file, or too large.
    """
    try:
        real = path.resolve()
        if not real.is_relative_to(root.resolve()):
            raise BadSample("image outside the folder", str(path))
        if not real.is_file():
            raise BadSample("image is missing", str(path))
        if real.stat().st_size > MAX_IMAGE_BYTES:
            raise BadSample("image is too large", str(path))
        return real.read_bytes()
    except (OSError, ValueError, RuntimeError) as error:  # a name no file can have; a loop of links
        raise BadSample("image is missing", str(error)) from None


def find_inputs(folder: Path | str, patterns: tuple[str, ...]) -> list[Path]:
    """Files under a folder (or the one file given) that fit a pattern, sorted.

    Raises:
        DataError: when there are none.
    """
    root = Path(folder)
    found = [root] if root.is_file() else sorted({p for pattern in patterns for p in root.rglob(pattern)})
    found = [path for path in found if path.is_file()]
    if not found:
        raise DataError(f"{folder}: no {' or '.join(patterns)} in it")
    return found


def read_lines(path: Path, drop: Drop) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and object of each line of a ``.jsonl``, ``.jsonl.gz`` or ``.jsonl.zip``.

    A line that is not a JSON object, or of more than 64 MB, is dropped and counted, and so is the
    rest of a file that cannot be read to its end.
    """
    try:
        for stream in _streams(path):
            yield from _objects(stream, drop)
    except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error):  # RuntimeError: encrypted
        drop("file cannot be read to its end")


def _objects(stream: IO[bytes] | gzip.GzipFile, drop: Drop) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    while line := stream.readline(MAX_JSON_BYTES):
        number += 1
        if len(line) == MAX_JSON_BYTES:
            while line and not line.endswith(b"\n"):
                line = stream.readline(MAX_JSON_BYTES)
            drop("line is too long")
            continue
        if not line.strip():
            continue
        try:
            value = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            yield number, value
        else:
            drop("json cannot be read")


def _streams(path: Path) -> Iterator[IO[bytes] | gzip.GzipFile]:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            for name in sorted(archive.namelist()):
                if not name.endswith("/"):
                    with archive.open(name) as stream:
                        yield stream
    else:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as stream:
            yield stream
