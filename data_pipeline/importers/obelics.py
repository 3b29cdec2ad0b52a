"""OBELICS: parallel lists ``images`` and ``texts`` with exactly one given at each position."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from data_pipeline.errors import BadSample, DataError
from data_pipeline.formats import Document, Summary
from data_pipeline.importers.common import (
    Drop,
    checked_image,
    find_inputs,
    read_inside,
    read_lines,
    run_import,
)

PATTERNS = ("*.jsonl", "*.jsonl.gz", "*.jsonl.zip", "*.parquet")


def import_obelics(folder: Path | str, out: Path | str) -> Summary:
    """Import OBELICS documents from JSON lines or Parquet.

    An image is a file named relative to its list, ``{"bytes": ...}`` (Parquet), or ``{"base64":
    ...}``. An address on the network is a counted drop: download first.

    Raises:
        DataError: when there are no such files, or no document with an image is kept.
    """
    files = find_inputs(folder, PATTERNS)

    def documents(drop: Drop) -> Iterator[Document]:
        for file in files:
            for number, record in _records(file, drop):
                try:
                    document = _document(record, file.parent, drop)
                except BadSample as bad:
                    drop(bad.reason)
                    continue
                document.key = f"{file.name.split('.')[0]}-{number}"
                yield document

    return run_import(documents, out, folder)


def _records(file: Path, drop: Drop) -> Iterator[tuple[int, dict[str, Any]]]:
    if file.suffix != ".parquet":
        yield from read_lines(file, drop)
        return
    import pyarrow  # heavy, and only Parquet needs it
    from pyarrow import parquet

    try:
        number = 0
        with parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=64):
                for record in batch.to_pylist():
                    number += 1
                    yield number, record
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file}: not a Parquet file ({error})") from None


def _document(record: dict[str, Any], folder: Path, drop: Drop) -> Document:
    images, texts = record.get("images"), record.get("texts")
    if not isinstance(images, list) or not isinstance(texts, list) or len(images) != len(texts):
        raise BadSample("json is not an OBELICS document", "images and texts are not parallel lists")
    content: list[str | bytes] = []
    for image, text in zip(images, texts, strict=True):
        if (image is None) == (text is None) or not isinstance(text, str | None):
            raise BadSample("json is not an OBELICS document", "not exactly one of image and text")
        if text is not None:
            if text.strip():
                content.append(text.strip() + "\n")
            continue
        try:
            content.append(checked_image(_blob(image, folder)))
        except BadSample as bad:
            drop(bad.reason)
    if not any(isinstance(piece, bytes) for piece in content):
        raise BadSample("document without an image")
    return Document("", content, _metadata(record))


def _blob(image: Any, folder: Path) -> bytes:
    if isinstance(image, dict):
        if isinstance(image.get("bytes"), bytes):
            return image["bytes"]
        if isinstance(image.get("base64"), str):
            return decoded(image["base64"])
        image = image.get("path") or image.get("url")
    if not isinstance(image, str):
        raise BadSample("image without an address")
    try:
        parts = urlsplit(image)
    except ValueError:
        raise BadSample("image without an address") from None
    if parts.scheme or parts.netloc:
        raise BadSample("image on the network", image)
    return read_inside(folder, folder / image)


def decoded(text: str) -> bytes:
    """Bytes of base64.

    Raises:
        BadSample: when it is not.
    """
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise BadSample("image cannot be read", "not base64") from None


def _metadata(record: dict[str, Any]) -> dict[str, Any]:
    """The document's own metadata; OBELICS keeps it as JSON text."""
    value = record.get("general_metadata") or record.get("metadata")
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = {"text": value}
    if isinstance(value, list):
        value = {"pieces": value}
    return value if isinstance(value, dict) else {}
