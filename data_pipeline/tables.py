"""Parquet files in storage, with a JSON object in their metadata that says what they were made of."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.storage import Storage

ABOUT = b"mmi"


def write_table(storage: Storage, url: str, table: pa.Table, about: dict[str, Any]) -> None:
    """Write a table, whole or not at all.

    Raises:
        StorageError: when it cannot be written.
    """
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata({ABOUT: json.dumps(about)}), sink, compression="zstd")
    storage.write(url, sink.getvalue().to_pybytes())


def read_table(
    storage: Storage, url: str, columns: list[str] | None = None
) -> tuple[pa.Table, dict[str, Any]] | None:
    """A table and what it was made of; None where there is none, or none that is whole.

    Raises:
        StorageError: when it is there and cannot be read.
    """
    blob = storage.read_file(url)
    if blob is None:
        return None
    try:
        table = pq.read_table(pa.BufferReader(blob), columns=columns, use_threads=False)
        about = json.loads((table.schema.metadata or {}).get(ABOUT, b"null"))
    except (pa.ArrowException, ValueError, OSError):
        return None  # cut short by a full disk or written by someone else: made anew
    return (table, about) if isinstance(about, dict) else None
