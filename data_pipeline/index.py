"""What is in the shards, found in one pass: each document's text as tokens, and where its images lie.

Beside a shard lies its index, ``000000.tar.<tokenizer>.parquet``: one line a document, first the good
ones in the order of the shard, then the bad ones with their reason (``COLUMNS``); it is made anew when
the shard's size or ETag changes. Beside the shards of a source lies ``manifest.<tokenizer>.parquet``:
one line a shard, with its counts and the digest of its index. A stream reads the manifest when it
starts, and the index of a shard when documents of it are planned, so a corpus of 100,000 shards takes
little memory. Batches are made of the text that was indexed; of the shards they need the images alone. An
index takes about two bytes for each token of text.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from data_pipeline.batch import IMAGE_ID_BITS
from data_pipeline.decode import open_image
from data_pipeline.errors import BadSample, DataError
from data_pipeline.formats import Member, parse_content, scan_shard, suffix_of
from data_pipeline.storage import Stamp, Storage, StoredFile
from data_pipeline.tables import read_table, write_table
from data_pipeline.tokens import Tokenizer

SCHEMA = 3
MAX_IMAGES = 1 << IMAGE_ID_BITS
IMAGE = -1
"""In place of a number of tokens: the piece is an image."""
MAX_PIXELS = 1 << 40
"""No limit of its own: how large an image may be is a setting of the run. Pillow's guard holds."""

COLUMNS = pa.schema(
    [
        ("key", pa.string()),
        ("json_offset", pa.int64()),
        ("json_size", pa.int64()),
        ("image_offsets", pa.list_(pa.int64())),
        ("image_sizes", pa.list_(pa.int64())),
        ("widths", pa.list_(pa.int32())),  # pixels, from the header; 0 where it cannot be read
        ("heights", pa.list_(pa.int32())),
        ("pieces", pa.list_(pa.int32())),  # tokens of each text, -1 for an image
        ("token_ids", pa.list_(pa.int32())),  # of all texts, one after the other
        ("text_bytes", pa.int64()),
        ("content_digest", pa.string()),  # of all texts and names of images in their order
        ("tokens", pa.int64()),  # of all texts together
        ("language", pa.string()),  # metadata's "language" or "lang", empty when unknown
        ("flags", pa.list_(pa.string())),  # what is odd and does no harm
        ("reason", pa.string()),  # empty for a good document
        ("detail", pa.string()),
    ]
)


class Entry(NamedTuple):
    """A document in a shard.

    Attributes:
        shard: number of the shard in its source.
        key: name of the document.
        json: offset and size of its JSON.
        images: offset and size of each image's file, in the order of the content.
        pieces: tokens of each piece of text, ``IMAGE`` for an image.
        tokens: ids of all texts, one after the other; int32 or uint16.
    """

    shard: int
    key: str
    json: list[int]
    images: list[list[int]]
    pieces: list[int]
    tokens: np.ndarray


@dataclass
class Line:
    """A line of a shard's index; the fields are those of ``COLUMNS``."""

    key: str
    json_offset: int = 0
    json_size: int = 0
    image_offsets: list[int] = field(default_factory=list)
    image_sizes: list[int] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    heights: list[int] = field(default_factory=list)
    pieces: list[int] = field(default_factory=list)
    token_ids: np.ndarray | tuple[()] = ()
    text_bytes: int = 0
    content_digest: str = ""
    tokens: int = 0
    language: str = ""
    flags: list[str] = field(default_factory=list)
    reason: str = ""
    detail: str = ""


class ShardIndex:
    """The good documents of one shard.

    Args:
        table: of ``COLUMNS``; its metadata ``mmi`` holds stamp, tokenizer, documents and digest.

    Attributes:
        about: what the table was made of.
        tokens: int64 [documents], of all texts of each.
        images: int64 [documents], of each.
        nbytes: of the arrays.
    """

    def __init__(self, table: pa.Table, about: dict):
        self.about = about
        good = table.slice(0, about["documents"])
        self._keys = good["key"].to_pylist()
        self._rows: dict[tuple[str, float], np.ndarray] = {}
        offsets, images = _ragged(good["image_offsets"])
        sizes, _ = _ragged(good["image_sizes"])
        self._places = np.stack([offsets, sizes], 1)
        self._pieces, pieces = _ragged(good["pieces"])
        ids, tokens = _ragged(good["token_ids"])
        self._ids = ids.astype(np.uint16) if len(ids) and ids.max() < 1 << 16 else ids
        self.tokens, self.images = np.diff(tokens), np.diff(images)
        json_offsets, json_sizes = (
            np.append(good[name].to_numpy(), 0) for name in ("json_offset", "json_size")
        )
        self.nbytes = sum(array.nbytes for array in (self._ids, self._pieces, self._places))
        # All that is to be known of a document and where the next one begins, in one piece of memory.
        self._starts = np.stack([images, pieces, tokens, json_offsets, json_sizes], 1)

    def __len__(self) -> int:
        return len(self._keys)

    def keys(self) -> list[str]:
        """Names of the documents."""
        return self._keys

    def entry(self, row: int, shard: int = 0) -> Entry:
        """A document by its place in the shard."""
        (image, piece, token, *place), (images, pieces, tokens, *_) = self._starts[row : row + 2].tolist()
        return Entry(
            shard,
            self._keys[row],
            place,
            self._places[image:images].tolist(),
            self._pieces[piece:pieces].tolist(),
            self._ids[token:tokens],
        )

    def rows(self, split: str, holdout: float) -> np.ndarray:
        """Places of the documents of a split: int64."""
        if (split, holdout) not in self._rows:
            held = np.fromiter((is_held_out(key, holdout) for key in self.keys()), bool, len(self))
            self._rows[split, holdout] = np.flatnonzero(held if split == "heldout" else ~held)
        return self._rows[split, holdout]


def is_held_out(key: str, fraction: float) -> bool:
    """Whether a document is held out; depends on its key alone, so it stays held out in any run."""
    value = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
    return value < fraction * 2**64


def sidecar_of(url: str, tokenizer: str) -> str:
    """Where the index of a shard is kept."""
    return f"{url}.{tokenizer}.parquet"


def read_sidecar(
    storage: Storage, url: str, tokenizer: str, columns: list[str] | None = None
) -> tuple[pa.Table, dict] | None:
    """A shard's index, all of it or some columns, and what it was made of; None where there is none that can
    be read."""
    found = read_table(storage, sidecar_of(url, tokenizer), columns)
    if found is None or found[1].get("schema") != SCHEMA or found[1].get("tokenizer") != tokenizer:
        return None
    return found


def index_shard(
    storage: Storage, url: str, stamp: Stamp, tokenizer: Tokenizer, keep: bool = True
) -> tuple[pa.Table, dict]:
    """Index a shard, or read the index kept beside it.

    Args:
        stamp: of the shard as it is now.
        keep: write the index beside the shard.

    Returns:
        Table of ``COLUMNS``, and what it was made of.

    Raises:
        DataError: when it is not a tar file, or changes while it is read.
    """
    kept = read_sidecar(storage, url, tokenizer.fingerprint)
    if kept is not None and (kept[1]["size"], kept[1]["etag"]) == (stamp.size, stamp.etag):
        return kept
    good, bad = _scan(storage, url, stamp, tokenizer)
    digest = hashlib.blake2b(digest_size=16)
    for line in good:
        place = [line.json_offset, line.json_size, line.image_offsets, line.image_sizes]
        digest.update(json.dumps([line.key, *place, line.content_digest]).encode())
    lines = [*good, *bad]
    table = pa.table(
        {name: [getattr(line, name) for line in lines] for name in COLUMNS.names}, schema=COLUMNS
    )
    about = {
        "schema": SCHEMA,
        "size": stamp.size,
        "etag": stamp.etag,
        "tokenizer": tokenizer.fingerprint,
        "documents": len(good),
        "digest": digest.hexdigest(),
    }
    if keep:
        write_table(storage, sidecar_of(url, tokenizer.fingerprint), table, about)
    return table, about


def _scan(storage: Storage, url: str, stamp: Stamp, tokenizer: Tokenizer) -> tuple[list[Line], list[Line]]:
    good: list[Line] = []
    bad: list[Line] = []
    groups: Counter[str] = Counter()
    with StoredFile(storage, url, stamp) as file:
        try:
            for key, members in scan_shard(file, url):
                groups[key] += 1
                try:
                    good.append(_line(file, key, members, tokenizer))
                except BadSample as sample:
                    bad.append(Line(key, reason=sample.reason, detail=sample.detail[:200]))
        except BadSample as changed:  # the shard itself: no header can be read
            raise DataError(f"{url}: {changed}; index it again") from None
    scattered = {key for key, count in groups.items() if count > 1}
    apart = "members of the key do not lie together"
    bad += [Line(line.key, reason=apart) for line in good if line.key in scattered]
    return [line for line in good if line.key not in scattered], bad


def _line(file: StoredFile, key: str, members: Sequence[Member], tokenizer: Tokenizer) -> Line:
    """Index one document, or raise ``BadSample``."""
    for member in members:
        if member.problem:
            raise BadSample(member.problem, member.name)
    by_name = {member.name: member for member in members}
    if len(by_name) < len(members):
        raise BadSample("member is there twice")
    if "json" not in by_name:
        raise BadSample("no json", ", ".join(by_name)[:200])
    head = by_name["json"]
    content, metadata = parse_content(file.read(head.offset, head.size))
    line = Line(key, head.offset, head.size)
    line.content_digest = hashlib.blake2b(json.dumps(content).encode(), digest_size=8).hexdigest()
    ids: list[int] = []
    for kind, value in content:
        if kind == "text":
            own = tokenizer.encode(value)
            ids += own
            line.pieces.append(len(own))
            line.tokens += len(own)
            line.text_bytes += len(value.encode())
            continue
        if value not in by_name or value == "json":
            raise BadSample("image is missing", value)
        if len(line.image_sizes) == MAX_IMAGES:
            raise BadSample("document has too many images", f"at most {MAX_IMAGES}")
        _add_image(line, file, by_name[value])
    line.token_ids = np.array(ids, np.int32)
    language = metadata.get("language", metadata.get("lang", ""))
    line.language = language[:16] if isinstance(language, str) else ""
    return line


def _add_image(line: Line, file: StoredFile, member: Member) -> None:
    """Enter an image by its header. One that cannot be read is flagged and stays: what a decoder makes
    of it is found when it is decoded, and must not move the plan."""
    blob = file.read(member.offset, member.size)
    try:
        width, height = open_image(blob, MAX_PIXELS).size
    except BadSample as bad:
        width = height = 0
        line.flags.append(bad.reason)
    line.pieces.append(IMAGE)
    line.image_offsets.append(member.offset)
    line.image_sizes.append(member.size)
    line.widths.append(width)
    line.heights.append(height)
    suffix = member.name.rpartition(".")[2].lower().replace("jpeg", "jpg")
    if suffix != suffix_of(blob):
        line.flags.append(f"{suffix} holds {suffix_of(blob)}"[:40])


def _ragged(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Values and offsets of a column of lists; the first offset is 0."""
    whole = column.combine_chunks()
    starts = whole.offsets.to_numpy().astype(np.int64)
    return whole.flatten().to_numpy(zero_copy_only=False), starts - starts[0]
