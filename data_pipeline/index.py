"""What is in the shards, found in one pass: where each document's bytes lie and how long it is.

The index of a shard is kept beside it (``000000.tar.<tokenizer>.json``), made anew when the shard's
size or time changes, and only held in memory when the folder cannot be written to.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from data_pipeline.batch import IMAGE_ID_BITS
from data_pipeline.errors import BadSample, DataError
from data_pipeline.formats import Member, find_shards, parse_content, read_range, scan_shard
from data_pipeline.quarantine import Failure, Ledger
from data_pipeline.settings import DataSettings, SourceSettings
from data_pipeline.tokens import Tokenizer

SCHEMA = 1
MAX_IMAGES = 1 << IMAGE_ID_BITS
IMAGE = -1
"""In place of a number of tokens: the piece is an image."""


@dataclass(frozen=True)
class Entry:
    """A document in a shard.

    Attributes:
        shard: number of the shard in its source.
        key: name of the document.
        json: offset and size of its JSON.
        images: offset and size of each image's file, in the order of the content.
        pieces: tokens of each piece of text, ``IMAGE`` for an image.
    """

    shard: int
    key: str
    json: tuple[int, int]
    images: list[tuple[int, int]]
    pieces: list[int]


@dataclass
class Source:
    """A corpus with its index.

    Attributes:
        settings: name, path, weight, kind.
        shards: paths of the shards.
        entries: all its good documents, in the order of the shards.
        train, heldout: int64 arrays, numbers of the documents of each split.
    """

    settings: SourceSettings
    shards: list[Path]
    entries: list[Entry]
    train: np.ndarray
    heldout: np.ndarray


@dataclass
class Corpus:
    """All sources, and ``manifest``, a digest of what is in their shards."""

    sources: list[Source]
    manifest: str


def open_corpus(settings: DataSettings, tokenizer: Tokenizer, ledger: Ledger) -> Corpus:
    """Index all sources; bad documents go to the ledger.

    Raises:
        DataError: when a source has no shards, or no good document; ``TooManyFailures``.
    """
    digest = hashlib.blake2b(digest_size=16)
    sources = []
    for source in settings.sources:
        shards = find_shards(source.path, source.name)
        entries, failures = [], []
        digest.update(json.dumps(["source", source.name]).encode())
        for number, shard in enumerate(shards):
            good, bad = index_shard(shard, number, tokenizer)
            entries += good
            failures += [Failure(source.name, shard.name, *line) for line in bad]
            digest.update(json.dumps(["shard", shard.name, shard.stat().st_size]).encode())
            for entry in good:
                digest.update(json.dumps([entry.key, entry.json, entry.images]).encode())
        ledger.record(Counter({source.name: len(entries) + len(failures)}), failures)
        if not entries:
            why = f" ({failures[0].key}: {failures[0].reason})" if failures else ""
            raise DataError(f"source {source.name!r}: no usable document in {source.path!r}{why}")
        held = np.array([is_held_out(entry.key, settings.holdout) for entry in entries])
        sources.append(Source(source, shards, entries, np.flatnonzero(~held), np.flatnonzero(held)))
    return Corpus(sources, digest.hexdigest())


def is_held_out(key: str, fraction: float) -> bool:
    """Whether a document is held out; depends on its key alone, so it stays held out in any run."""
    value = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
    return value < fraction * 2**64


def index_shard(
    path: Path, number: int, tokenizer: Tokenizer
) -> tuple[list[Entry], list[tuple[str, str, str]]]:
    """Index a shard, or read the index kept beside it.

    Returns:
        Its good documents; and (key, reason, detail) of each bad one.

    Raises:
        DataError: when it is not a tar file.
    """
    stat = path.stat()
    stamp = {
        "schema": SCHEMA,
        "size": stat.st_size,
        "time": stat.st_mtime_ns,
        "tokenizer": tokenizer.fingerprint,
    }
    sidecar = path.with_name(f"{path.name}.{tokenizer.fingerprint}.json")
    kept = _read_sidecar(sidecar, stamp)
    if kept is None:
        good, bad = _scan(path, tokenizer)
        kept = {**stamp, "documents": [asdict(entry) for entry in good], "bad": bad}
        _write_sidecar(sidecar, kept)
    entries = [
        Entry(
            number,
            item["key"],
            tuple(item["json"]),
            [tuple(image) for image in item["images"]],
            item["pieces"],
        )
        for item in kept["documents"]
    ]
    return entries, [tuple(line) for line in kept["bad"]]


def _scan(path: Path, tokenizer: Tokenizer) -> tuple[list[Entry], list[tuple[str, str, str]]]:
    good: list[Entry] = []
    bad: list[tuple[str, str, str]] = []
    groups: Counter[str] = Counter()
    for key, members in scan_shard(path):
        groups[key] += 1
        try:
            good.append(_entry(path, key, members, tokenizer))
        except BadSample as sample:
            bad.append((key, sample.reason, sample.detail))
    scattered = {key for key, count in groups.items() if count > 1}
    bad += [
        (entry.key, "members of the key do not lie together", "") for entry in good if entry.key in scattered
    ]
    return [entry for entry in good if entry.key not in scattered], bad


def _entry(path: Path, key: str, members: list[Member], tokenizer: Tokenizer) -> Entry:
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
    pieces, _ = parse_content(read_range(path, head.offset, head.size))
    images, lengths = [], []
    for kind, value in pieces:
        if kind == "text":
            lengths.append(len(tokenizer.encode(value)))
            continue
        if value not in by_name or value == "json":
            raise BadSample("image is missing", value)
        images.append((by_name[value].offset, by_name[value].size))
        lengths.append(IMAGE)
    if len(images) > MAX_IMAGES:
        raise BadSample("document has too many images", f"{len(images)}, at most {MAX_IMAGES}")
    return Entry(0, key, (head.offset, head.size), images, lengths)


def _read_sidecar(sidecar: Path, stamp: dict) -> dict | None:
    try:
        kept = json.loads(sidecar.read_bytes())
    except (OSError, ValueError):
        return None  # not there yet, or cut short by a full disk: made anew
    fits = isinstance(kept, dict) and all(kept.get(name) == value for name, value in stamp.items())
    return kept if fits else None


def _write_sidecar(sidecar: Path, value: dict) -> None:
    """Write beside the shard, whole or not at all; several ranks may do so at once."""
    if not os.access(sidecar.parent, os.W_OK):
        return
    handle, name = tempfile.mkstemp(dir=sidecar.parent, prefix=".index-")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(value, file, separators=(",", ":"))
        os.replace(name, sidecar)
    except BaseException:
        os.unlink(name)
        raise
