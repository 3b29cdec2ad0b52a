"""Corpora as a stream sees them: which shards there are, and documents by number.

The manifest of a source is all that is held; the index of a shard is read when one of its documents is
asked for, and the last ones are kept.
"""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data_pipeline.errors import BadSample, DataError
from data_pipeline.formats import Document, find_shards, parse_content
from data_pipeline.index import IMAGE, SCHEMA, Entry, ShardIndex, index_shard, is_held_out, read_sidecar
from data_pipeline.quarantine import Failure, Ledger
from data_pipeline.settings import DataSettings, SourceSettings, StorageSettings
from data_pipeline.storage import Range, Stamp, Storage, is_local, join, local_path
from data_pipeline.tables import read_table, write_table
from data_pipeline.tokens import Tokenizer, load_tokenizer

HELD = 256 << 20
"""Bytes of indexes that a source holds at most, where it needs no more at a time."""

SPLITS = ("train", "heldout")
MANIFEST = pa.schema(
    [
        ("shard", pa.string()),  # file name
        ("size", pa.int64()),
        ("etag", pa.string()),
        ("documents", pa.int64()),  # good ones
        ("heldout", pa.int64()),  # of these, at the manifest's holdout
        ("images", pa.int64()),
        ("tokens", pa.int64()),  # of the texts
        ("digest", pa.string()),  # of the shard's index
        ("reasons", pa.string()),  # JSON: bad documents by reason
        ("bad", pa.string()),  # JSON: [key, reason, detail] of the first of them
    ]
)
NAMED = 100
"""Bad documents of a shard that the manifest names; the shard's index names all."""
Progress = Callable[[int, int], None]
"""Is told how many of how many shards are done."""


@dataclass(frozen=True)
class Shard:
    """A line of the manifest; ``url`` in place of the name."""

    url: str
    stamp: Stamp
    documents: int
    heldout: int
    images: int
    tokens: int
    digest: str
    reasons: str
    bad: str


@dataclass
class Source:
    """A corpus.

    Attributes:
        settings: name, path, weight, kind.
        shards: in the order of their names.
        holdout: fraction of the documents that is held out.
        storage: where they are.
        tokenizer: fingerprint of the one their texts were encoded with.
        starts: int64 [shards + 1], number of the first document of each shard.
        places: URL and ETag of each shard.
        limit: indexes of shards that are kept in memory at most.
        together: shards whose indexes are in use at a time.
        fixed: indexes that cannot be kept beside their shards, as the folder is read-only; all are held.
    """

    settings: SourceSettings
    shards: list[Shard]
    holdout: float
    storage: Storage
    tokenizer: str
    limit: int = 64
    together: int = 1
    fixed: dict[int, ShardIndex] = field(default_factory=dict)
    _recent: OrderedDict[int, ShardIndex] = field(default_factory=OrderedDict)

    def __post_init__(self) -> None:
        self.starts = np.cumsum([0, *(shard.documents for shard in self.shards)])
        self.places = [(shard.url, shard.stamp.etag) for shard in self.shards]
        self._starts: list[int] = self.starts.tolist()  # a plain list is bisected in a tenth of the time

    def __len__(self) -> int:
        return int(self.starts[-1])

    def counts(self, split: str) -> np.ndarray:
        """Documents of a split in each shard: int64."""
        held = np.array([shard.heldout for shard in self.shards], np.int64)
        return held if split == "heldout" else np.diff(self.starts) - held

    def entry(self, number: int) -> Entry:
        """A document by its number.

        Raises:
            DataError: when the index of its shard is gone.
        """
        shard = bisect_right(self._starts, number) - 1
        return self.index(shard).entry(number - self._starts[shard], shard)

    def document(self, number: int) -> Document:
        """A document as it stands in its shard, by its number.

        Raises:
            BadSample: when it cannot be read, or is not the one that was indexed.
        """
        entry = self.entry(number)
        url, etag = self.places[entry.shard]
        places = [Range(url, offset, size, etag) for offset, size in (entry.json, *entry.images)]
        pieces, metadata = parse_content(self.storage.read(places[0]))
        if [kind == "image" for kind, _ in pieces] != [tokens == IMAGE for tokens in entry.pieces]:
            raise BadSample("shard has changed", "the document's pieces are not those of its index")
        images = iter(places[1:])
        content = [self.storage.read(next(images)) if kind == "image" else value for kind, value in pieces]
        return Document(entry.key, content, metadata)

    def sizes(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of text and images of documents: int64 each."""
        found = np.empty((2, len(numbers)), np.int64)
        inside = self.starts.searchsorted(numbers, side="right") - 1
        for shard in np.unique(inside).tolist():
            own, index = inside == shard, self.index(shard)
            rows = numbers[own] - self.starts[shard]
            found[:, own] = index.tokens[rows], index.images[rows]
        return found[0], found[1]

    def numbers(self, split: str, shard: int) -> np.ndarray:
        """Numbers of the documents of a split in a shard: int64, ascending."""
        return self.starts[shard] + self.index(shard).rows(split, self.holdout)

    def index(self, shard: int) -> ShardIndex:
        """The index of a shard, read when it is not at hand.

        Raises:
            DataError: when it is gone or not the one of the manifest.
        """
        if shard in self.fixed:
            return self.fixed[shard]
        if shard not in self._recent:
            own = self.shards[shard]
            found = read_sidecar(self.storage, own.url, self.tokenizer)
            if found is None or found[1]["digest"] != own.digest:
                raise DataError(f"{own.url}: its index is gone or another one; run `mmi data index`")
            self._keep(shard, ShardIndex(*found))
        self._recent.move_to_end(shard)
        return self._recent[shard]

    def fetch(self, shards: Iterable[int]) -> None:
        """Read the indexes of some shards that belong together at once."""
        asked = list(shards)
        missing = [s for s in asked if s not in self._recent and s not in self.fixed]
        self.together, self.limit = max(self.together, len(asked)), max(self.limit, 4 * len(asked))
        if len(missing) < 2 or is_local(self.settings.path):
            return
        with ThreadPoolExecutor(min(len(missing), self.storage.settings.concurrency)) as pool:
            urls = [self.shards[shard].url for shard in missing]
            found = pool.map(lambda url: read_sidecar(self.storage, url, self.tokenizer), urls)
            for shard, kept in zip(missing, found, strict=True):
                if kept is not None and kept[1]["digest"] == self.shards[shard].digest:
                    self._keep(shard, ShardIndex(*kept))

    def _keep(self, shard: int, index: ShardIndex) -> None:
        """Hold an index; the oldest are given up, but never what two sets of shards need."""
        self._recent[shard] = index
        held = sum(one.nbytes for one in self._recent.values())
        while len(self._recent) > 2 * self.together and (len(self._recent) > self.limit or held > HELD):
            held -= self._recent.popitem(last=False)[1].nbytes


@dataclass
class Corpus:
    """All sources, and ``manifest``, a digest of what is in their shards."""

    sources: list[Source]
    manifest: str


def open_corpus(settings: DataSettings, tokenizer: Tokenizer, ledger: Ledger, storage: Storage) -> Corpus:
    """Open all sources; bad documents go to the ledger.

    Shards on this machine are indexed here when they are not yet, or have changed. Remote ones are
    taken as their manifest says; ``mmi data index`` makes it.

    Raises:
        DataError: when a source has no shards, no index or no good document; ``TooManyFailures``.
    """
    digest = hashlib.blake2b(digest_size=16)
    sources = []
    for own in settings.sources:
        source = open_source(own, tokenizer, storage, settings.holdout)
        digest.update(json.dumps(["source", own.name]).encode())
        reasons: Counter[str] = Counter()
        failures = []
        for shard in source.shards:
            name = shard.url.rpartition("/")[2]
            digest.update(json.dumps([name, shard.stamp.size, shard.digest]).encode())
            if shard.reasons != "{}":
                reasons.update(json.loads(shard.reasons))
                failures += [Failure(own.name, name, *line) for line in json.loads(shard.bad)]
        ledger.record({own.name: len(source) + reasons.total()}, failures, reasons)
        if len(source) == 0:
            why = f" ({failures[0].key}: {failures[0].reason})" if failures else ""
            raise DataError(f"source {own.name!r}: no usable document in {own.path!r}{why}")
        sources.append(source)
    return Corpus(sources, digest.hexdigest())


def open_source(own: SourceSettings, tokenizer: Tokenizer, storage: Storage, holdout: float) -> Source:
    """Open one source; see ``open_corpus``."""
    kept = read_manifest(storage, own.path, tokenizer.fingerprint)
    if not is_local(own.path):
        if kept is None:
            raise DataError(
                f"source {own.name!r}: {own.path} has no index for this tokenizer; make it with "
                f"`mmi data index {own.path} --tokenizer ...`"
            )
        return Source(
            own, _recounted(kept, storage, tokenizer, holdout), holdout, storage, tokenizer.fingerprint
        )
    found = find_shards(own.path, own.name, storage)
    if (
        kept is not None
        and [(s.url, s.stamp) for s in kept[0]] == found
        and _kept_beside(own.path, kept[0], tokenizer)
    ):
        shards = _recounted(kept, storage, tokenizer, holdout)
        return Source(own, shards, holdout, storage, tokenizer.fingerprint)
    writable = os.access(_folder(own.path), os.W_OK)
    shards, fixed = [], {}
    for number, (url, stamp) in enumerate(found):
        table, about = index_shard(storage, url, stamp, tokenizer, writable)
        shards.append(summary(url, table, about, holdout))
        if not writable:
            fixed[number] = ShardIndex(table, about)
    if writable:
        write_manifest(storage, own.path, shards, tokenizer.fingerprint, holdout)
    return Source(own, shards, holdout, storage, tokenizer.fingerprint, fixed=fixed)


def _kept_beside(path: str, shards: list[Shard], tokenizer: Tokenizer) -> bool:
    """Whether the indexes of all shards of a local source are still there."""
    there = set(os.listdir(_folder(path)))
    return all(f"{s.url.rpartition('/')[2]}.{tokenizer.fingerprint}.parquet" in there for s in shards)


def _folder(path: str) -> Path:
    own = Path(local_path(path))
    return own.parent if own.suffix == ".tar" else own


# The manifest


def manifest_of(path: str, tokenizer: str) -> str:
    """Where the manifest of a source is kept: in its folder, or beside its only shard."""
    return (
        f"{path}.manifest.{tokenizer}.parquet"
        if path.endswith(".tar")
        else join(path, f"manifest.{tokenizer}.parquet")
    )


SUMMED = ["key", "image_sizes", "tokens", "reason", "detail"]
"""Columns of an index that ``summary`` needs."""


def summary(url: str, table: pa.Table, about: dict[str, Any], holdout: float) -> Shard:
    """A shard's line of the manifest."""
    good, bad = table.slice(0, about["documents"]), table.slice(about["documents"])
    reasons = Counter(bad["reason"].to_pylist())
    named = bad.slice(0, NAMED).select(["key", "reason", "detail"]).to_pylist()
    return Shard(
        url,
        Stamp(about["size"], about["etag"]),
        len(good),
        sum(is_held_out(key, holdout) for key in good["key"].to_pylist()),
        len(good["image_sizes"].combine_chunks().flatten()),
        sum(good["tokens"].to_pylist()),
        about["digest"],
        json.dumps(reasons, sort_keys=True),
        json.dumps([list(line.values()) for line in named]),
    )


def write_manifest(storage: Storage, path: str, shards: list[Shard], tokenizer: str, holdout: float) -> str:
    """Write the manifest of a source.

    Returns:
        Its hash: changes with any document of any shard, not with where or when they were written.
    """
    digest = hashlib.blake2b(digest_size=16)
    columns: dict[str, list[Any]] = {name: [] for name in MANIFEST.names}
    for shard in shards:
        name = shard.url.rpartition("/")[2]
        digest.update(json.dumps([name, shard.stamp.size, shard.digest]).encode())
        for column in ("documents", "heldout", "images", "tokens", "digest", "reasons", "bad"):
            columns[column].append(getattr(shard, column))
        columns["shard"].append(name)
        columns["size"].append(shard.stamp.size)
        columns["etag"].append(shard.stamp.etag)
    about = {"schema": SCHEMA, "tokenizer": tokenizer, "holdout": holdout, "hash": digest.hexdigest()}
    write_table(storage, manifest_of(path, tokenizer), pa.table(columns, schema=MANIFEST), about)
    return digest.hexdigest()


def read_manifest(storage: Storage, path: str, tokenizer: str) -> tuple[list[Shard], dict[str, Any]] | None:
    """The manifest of a source and what it was made of; None where there is none that can be read."""
    found = read_table(storage, manifest_of(path, tokenizer))
    if found is None or found[1].get("schema") != SCHEMA or found[0].schema.names != MANIFEST.names:
        return None
    table, about = found
    folder = path.rpartition("/")[0] if path.endswith(".tar") else path
    columns = [table[name].to_pylist() for name in MANIFEST.names]
    shards = [
        Shard(join(folder, name) if folder else name, Stamp(size, etag), *rest)
        for name, size, etag, *rest in zip(*columns, strict=True)
    ]
    return shards, about


def _recounted(
    kept: tuple[list[Shard], dict[str, Any]], storage: Storage, tokenizer: Tokenizer, holdout: float
) -> list[Shard]:
    """The manifest's shards, the held-out documents counted anew where the fraction is another one."""
    shards, about = kept
    if about["holdout"] == holdout:
        return shards
    counted = []
    for shard in shards:
        found = read_sidecar(storage, shard.url, tokenizer.fingerprint, SUMMED)
        if found is None:
            raise DataError(f"{shard.url}: its index is gone; run `mmi data index`")
        counted.append(summary(shard.url, *found, holdout))
    return counted


# Making it in parallel

_worker: tuple[Storage, Tokenizer] | None = None


def make_index(
    path: str,
    tokenizer: str,
    holdout: float,
    storage: StorageSettings | None = None,
    workers: int = 1,
    progress: Progress = lambda done, total: None,
) -> tuple[list[Shard], str]:
    """Index all shards of a source and write its manifest. Goes on where it was stopped.

    Args:
        path: folder or URL of the shards.
        tokenizer: path of the ``tokenizer.json``.
        holdout: fraction of the documents to be held out.
        workers: processes.

    Returns:
        The shards, and the manifest's hash.

    Raises:
        DataError: when there are no shards, or one is no tar file.
    """
    own = Storage(storage)
    loaded = load_tokenizer(tokenizer)
    found = find_shards(path, path, own)
    shards: list[Shard] = []
    for shard in _indexed(found, own, loaded, tokenizer, holdout, workers):
        shards.append(shard)
        progress(len(shards), len(found))
    return shards, write_manifest(own, path, shards, loaded.fingerprint, holdout)


def _indexed(
    found: list[tuple[str, Stamp]],
    storage: Storage,
    tokenizer: Tokenizer,
    path: str,
    holdout: float,
    workers: int,
) -> Iterator[Shard]:
    """Lines of the manifest, in the order of the shards; made here where there is one worker."""
    if workers == 1:
        for url, stamp in found:
            yield summary(url, *index_shard(storage, url, stamp, tokenizer), holdout)
        return
    context, begin = get_context("spawn"), (path, storage.settings)
    with ProcessPoolExecutor(workers, context, initializer=_begin, initargs=begin) as pool:
        try:
            yield from pool.map(_index_one, found, [holdout] * len(found))
        finally:
            pool.shutdown(cancel_futures=True)


def _begin(tokenizer: str, storage: StorageSettings) -> None:
    global _worker
    _worker = Storage(storage), load_tokenizer(tokenizer)


def _index_one(found: tuple[str, Stamp], holdout: float) -> Shard:
    assert _worker is not None
    url, stamp = found
    storage, tokenizer = _worker
    return summary(url, *index_shard(storage, url, stamp, tokenizer), holdout)
