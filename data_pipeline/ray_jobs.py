"""Whole-corpus jobs on Ray Data, and the plan as a source of Ray Data.

    index      what ``corpus.make_index`` makes
    filter     keeps the documents a function accepts
    recaption  changes documents through a function, in batches (a model that describes images, say)
    dedup      leaves out images that look like an earlier one, and documents left without images

The last three read a folder (or URL) of shards and write another: one task a shard, the same names, and what
is left out is counted by reason. A shard takes its name once it is whole; beside it lies ``000000.done.json``
with its counts, and in the folder ``job.json``, which says what it comes from: a job that was stopped goes on
with the shards that are not done.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.corpus import Progress, Shard, summary, write_manifest
from data_pipeline.decode import decode
from data_pipeline.duplicates import MAX_DISTANCE, doubles, perceptual_hash
from data_pipeline.errors import BadSample, DataError
from data_pipeline.feed import setup_of
from data_pipeline.formats import (
    Document,
    Member,
    Summary,
    find_shards,
    parse_content,
    scan_shard,
    write_shard,
)
from data_pipeline.index import index_shard
from data_pipeline.optional import ray
from data_pipeline.settings import DataSettings, StorageSettings
from data_pipeline.storage import Range, Stamp, Storage, StoredFile, is_local, join, local_path
from data_pipeline.stream import Stream
from data_pipeline.tokens import Tokenizer, load_tokenizer

MAX_PIXELS = 89_478_485
JOB, DONE = "job.json", ".done.json"
MAX_BLOCKS = 10_000
"""Tasks of a job; with more shards a task takes several."""

log = logging.getLogger(__name__)

Work = Callable[[dict[str, Any]], bytes]
Edit = Callable[[list[Document]], list[Document | str]]
"""Changes documents; in the place of one that is to be left out it gives the reason."""


def load_function(name: str) -> Callable:
    """A function by ``module:name``.

    Raises:
        DataError: when there is none.
    """
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise DataError(f"function {name!r}: must be module:function and importable ({error})") from None


def _ignored(done: int, total: int) -> None:
    """Progress that nobody watches."""


def index_corpus(
    path: str,
    tokenizer: str,
    holdout: float,
    storage: StorageSettings | None = None,
    workers: int = 2,
    progress: Progress = _ignored,
) -> tuple[list[Shard], str]:
    """``corpus.make_index`` on a Ray cluster; ``tokenizer`` must be readable on all its nodes.

    Raises:
        DataError: when there are no shards, one is no tar file, or a node has another tokenizer.
    """
    own = Storage(storage)
    fingerprint = load_tokenizer(tokenizer).fingerprint
    found = find_shards(path, path, own)
    common = {"tokenizer": tokenizer, "fingerprint": fingerprint, "holdout": holdout}
    items = [{**_item(number, url, stamp), **common} for number, (url, stamp) in enumerate(found)]
    made: dict[int, Shard] = {}
    for number, line in _rows(items, partial(_index_shard, storage=own.settings), workers):
        fields = json.loads(line)
        made[number] = Shard(**{**fields, "stamp": Stamp(**fields["stamp"])})
        progress(len(made), len(found))
    shards = [made[number] for number in range(len(found))]
    return shards, write_manifest(own, path, shards, fingerprint, holdout)


def filter_corpus(
    source: str, out: str, function: str, workers: int = 2, progress: Progress = _ignored
) -> Summary:
    """Keep the documents that a function accepts.

    Args:
        source, out: folders or URLs of shards; ``out`` is made. All nodes must be able to write to it.
        function: ``module:name`` of a function of a ``Document`` that gives None to keep it, or the
            reason to leave it out.
        workers: shards at a time.
        progress: is told how many of how many shards are done.

    Raises:
        DataError: when the source has no shards, the function cannot be imported or fails, or ``out`` holds
            something else.
    """
    load_function(function)
    return _rewrite(source, out, workers, {"kind": "filter", "function": function}, progress)


def recaption_corpus(
    source: str,
    out: str,
    function: str,
    workers: int = 2,
    batch: int = 32,
    progress: Progress = _ignored,
) -> Summary:
    """Change documents through a function of a list of documents; see ``Edit``.

    Args:
        source, out, function, workers, progress: as in ``filter_corpus``.
        batch: documents given to the function at a time.
    """
    load_function(function)
    return _rewrite(
        source, out, workers, {"kind": "recaption", "function": function, "batch": batch}, progress
    )


def dedup_corpus(
    source: str, out: str, workers: int = 2, distance: int = 4, progress: Progress = _ignored
) -> Summary:
    """Leave out images that look like one that comes before them in the corpus.

    The first in the order of the shards stays. A document left without any image goes, unless it had none
    before. The hashes of all images are held here, 16 bytes each.

    Args:
        source, out, workers, progress: as in ``filter_corpus``.
        distance: bits in which the perceptual hashes of two images that look alike may differ; see
            ``duplicates.doubles`` for what it costs.
    """
    if not 0 <= distance <= MAX_DISTANCE:
        raise DataError(f"distance {distance}: must be from 0 to {MAX_DISTANCE}")

    def left_out(shards: list[tuple[str, Stamp]]) -> dict[str, bytes]:
        """Of each shard the numbers of its images that are doubles, uint64."""
        items = [_item(number, url, stamp) for number, (url, stamp) in enumerate(shards)]
        hashes: dict[int, np.ndarray] = {}
        places: dict[int, np.ndarray] = {}
        for number, both in _rows(items, _hashes, workers):
            hashes[number], places[number] = np.frombuffer(both, np.uint64).reshape(2, -1)
        every = range(len(shards))
        gone = doubles(np.concatenate([hashes[n] for n in every]), distance)
        starts = np.cumsum([0, *(len(hashes[n]) for n in every)])
        return {shards[n][0]: places[n][gone[starts[n] : starts[n + 1]]].tobytes() for n in every}

    return _rewrite(source, out, workers, {"kind": "dedup", "distance": distance}, progress, left_out)


def plan_dataset(settings: DataSettings, steps: int, global_rows: int, start: int = 0) -> Any:
    """Training steps as a Ray dataset, in the order of the plan: a row a micro-batch of one row.

    Args:
        settings: as for ``Stream``.
        steps, start: how many steps, from which.
        global_rows: rows of a step.

    Returns:
        A ``ray.data.Dataset`` of ``step``, ``row``, ``checksum``, ``tokens``, ``labels``, ``images`` and
        ``drawn`` (bytes of uint8 [side, side, 3], ``image_size`` and ``drawn_size`` a side); set
        ``DataContext.execution_options.preserve_order`` to read it in order.
    """
    stream = Stream(settings, "train", global_rows)
    for _ in range(start):
        stream.next()
    setup = ray.put(setup_of(stream))
    planned = [stream.next() for _ in range(steps)]
    items = [
        {"step": step.number, "row": row, "task": step.task([row])}
        for step in planned
        for row in range(global_rows)
    ]
    return ray.data.from_items(items).map(
        _Produce, fn_constructor_args=(setup,), concurrency=settings.workers
    )


class _Produce:
    """Makes the task of a row, in an actor of Ray Data."""

    def __init__(self, setup: Any):
        self.producer = ray.get(setup).producer()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        made = self.producer.produce(row["task"])
        batch = made.batch
        return {
            "step": row["step"],
            "row": row["row"],
            "checksum": int(made.checksums[0]),
            "tokens": batch.tokens.tolist(),
            "labels": batch.labels.tolist(),
            "images": [image.tobytes() for image in batch.images],
            "drawn": [image.tobytes() for image in batch.drawn],
        }


def _rows(items: list[dict[str, Any]], work: Work, workers: int) -> Iterator[tuple[int, bytes]]:
    """What ``work`` makes of each of them on the cluster, with its ``number``, in the order it is finished.

    Raises:
        DataError: what went wrong with the first that failed.
    """
    ray.data.DataContext.get_current().enable_progress_bars = False
    blocks = ray.data.from_items(items, override_num_blocks=min(len(items), MAX_BLOCKS))
    for row in blocks.map(partial(_guarded, work=work), concurrency=workers).iter_rows():
        if row["error"]:
            raise DataError(row["error"])
        yield row["number"], row["made"]


def _guarded(item: dict[str, Any], work: Work) -> dict[str, Any]:
    """A row of the work's answer, or of what it raised: Ray Data would wrap that in pages of its own."""
    row = {"number": item["number"], "error": "", "made": b""}
    try:
        return {**row, "made": work(item)}
    except DataError as error:
        return {**row, "error": str(error)}
    except Exception as error:  # of a function of the user's: all of it is in the log of the node
        log.exception("%s", item["shard"])
        return {**row, "error": f"{item['shard']}: {type(error).__name__}: {error}"}


@cache
def _tokenizer(path: str) -> Tokenizer:
    return load_tokenizer(path)


def _index_shard(item: dict[str, Any], storage: StorageSettings) -> bytes:
    """A shard's line of the manifest, as JSON."""
    tokenizer = _tokenizer(item["tokenizer"])
    if tokenizer.fingerprint != item["fingerprint"]:
        raise DataError(f"{item['tokenizer']}: another tokenizer on a node of the cluster")
    stamp = Stamp(**json.loads(item["stamp"]))
    made = index_shard(Storage(storage), item["shard"], stamp, tokenizer)
    return json.dumps(asdict(summary(item["shard"], *made, item["holdout"]))).encode()


def _item(number: int, url: str, stamp: Stamp) -> dict[str, Any]:
    """What a task is told of its shard."""
    return {"number": number, "shard": url, "stamp": json.dumps(asdict(stamp))}


def _hashes(item: dict[str, Any]) -> bytes:
    """Hashes, then numbers in the shard, of all images that can be decoded: uint64 [2, images]."""
    hashes, places, number = [], [], -1
    for document, _ in _documents(item):
        for blob in document.images if document else ():  # others are counted when the shard is written
            number += 1
            try:
                hashes.append(perceptual_hash(decode(blob, MAX_PIXELS)))
            except BadSample:
                continue  # what cannot be read is no double; training masks and counts it
            places.append(number)
    return np.array([hashes, places], np.uint64).tobytes()


def _rewrite(
    source: str,
    out: str,
    workers: int,
    job: dict[str, Any],
    progress: Progress,
    left_out: Callable[[list[tuple[str, Stamp]]], dict[str, bytes]] = lambda shards: {},
) -> Summary:
    """Run a job over all shards that are not done; the counts of all.

    ``left_out`` is asked for the doubles in each shard, once the folder has been claimed and only where
    shards are left to do: it reads the whole corpus.
    """
    storage = Storage()
    shards = find_shards(source, source, storage)
    _claim(storage, out, job, shards)
    done = {url.rpartition("/")[2] for url, _ in storage.find(out, DONE)}
    to_do = [
        (number, url, stamp) for number, (url, stamp) in enumerate(shards) if _name(url) + DONE not in done
    ]
    finished = len(shards) - len(to_do)
    progress(finished, len(shards))
    left = left_out(shards) if to_do else {}
    items = [
        {**_item(number, url, stamp), "out": out, "doubles": left.get(url, b""), **job}
        for number, url, stamp in to_do
    ]
    for _ in _rows(items, _rewrite_shard, workers) if items else ():
        finished += 1
        progress(finished, len(shards))
    total = Summary()
    for url, _ in shards:
        note = join(out, _name(url) + DONE)
        written = storage.read_file(note)
        if written is None:
            raise DataError(f"{note}: was there and is gone; is another process at work in {out}?")
        counts = json.loads(written)
        total.documents += counts["documents"]
        total.images += counts["images"]
        total.dropped.update(counts["dropped"])
    return total


def _name(url: str) -> str:
    """Of a shard, without its suffix."""
    return url.rpartition("/")[2].removesuffix(".tar")


def _claim(storage: Storage, out: str, job: dict[str, Any], shards: list[tuple[str, Stamp]]) -> None:
    """Note what the folder's shards come from, or check that it is this."""
    listed = [[_name(url), stamp.size, stamp.etag] for url, stamp in shards]
    digest = hashlib.blake2b(json.dumps(listed).encode(), digest_size=16).hexdigest()
    plan = {**job, "shards": len(shards), "source": digest}
    if is_local(out):
        os.makedirs(local_path(out), exist_ok=True)
    note = join(out, JOB)
    found = storage.read_file(note)
    if found is not None and json.loads(found) != plan:
        raise DataError(f"{out}: holds another job, {found.decode()}; choose an empty folder")
    if found is None:
        if storage.find(out, ".tar"):
            raise DataError(f"{out}: already holds shards; choose an empty folder or remove them")
        storage.write(note, json.dumps(plan).encode())


def _rewrite_shard(job: dict[str, Any]) -> bytes:
    """One shard of a job; its counts are written last."""
    name, out, storage = _name(job["shard"]), job["out"], Storage()
    counts: dict[str, Any] = {"documents": 0, "images": 0}
    dropped: Counter[str] = Counter()

    def kept() -> Iterator[Document]:
        for document in _edited(job, dropped):
            counts["documents"] += 1
            counts["images"] += len(document.images)
            yield document

    if is_local(out):
        write_shard(Path(local_path(out)) / f"{name}.tar", kept())
    else:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{name}.tar"
            write_shard(path, kept())
            if path.exists():
                storage.write(join(out, f"{name}.tar"), path.read_bytes())
    text = json.dumps({**counts, "dropped": dropped}, ensure_ascii=False)
    storage.write(join(out, name + DONE), text.encode())
    return b""


def _edited(job: dict[str, Any], dropped: Counter[str]) -> Iterator[Document]:
    edit = _edit_of(job)
    held: list[Document] = []

    def flush() -> Iterator[Document]:
        answers = edit(held)
        if len(answers) != len(held):
            raise DataError(f"{job['function']}: gave {len(answers)} answers for {len(held)} documents")
        for given, answer in zip(held, answers, strict=True):
            if isinstance(answer, str):
                dropped[answer] += 1
            elif not isinstance(answer, Document):
                raise DataError(
                    f"{job['function']}: answered {answer!r} for {given.key!r}; "
                    + ("None keeps a document, " if job["kind"] == "filter" else "a Document keeps it, ")
                    + "a string is the reason to leave it out"
                )
            elif answer.key != given.key:
                raise DataError(f"{job['function']}: made {answer.key!r} of {given.key!r}; keys must stay")
            else:
                yield answer
        held.clear()

    for document, bad in _documents(job):
        if document is None:
            dropped[bad] += 1
            continue
        held.append(document)
        if len(held) == job.get("batch", 1):
            yield from flush()
    if held:
        yield from flush()


def _edit_of(job: dict[str, Any]) -> Edit:
    if job["kind"] == "dedup":
        left = set(np.frombuffer(job["doubles"], np.uint64).tolist())
        seen = [0]
        return lambda documents: [_without(document, left, seen) for document in documents]
    function = load_function(job["function"])
    if job["kind"] == "recaption":
        return function

    def kept(document: Document) -> Any:
        answer = function(document)
        return document if answer is None else answer

    return lambda documents: [kept(document) for document in documents]


def _without(document: Document, left: set[int], seen: list[int]) -> Document | str:
    """The document without its doubles, or the reason to leave it out; ``seen`` counts the shard's images."""
    content: list[str | bytes] = []
    for piece in document.content:
        if isinstance(piece, str):
            content.append(piece)
            continue
        if seen[0] not in left:
            content.append(piece)
        seen[0] += 1
    if document.images and not any(isinstance(piece, bytes) for piece in content):
        return "all images are doubles"
    return Document(document.key, content, document.metadata)


def _documents(item: dict[str, Any]) -> Iterator[tuple[Document | None, str]]:
    """Documents of a shard in order; in the place of a bad one None and the reason.

    Raises:
        DataError: when the shard is not what it was when the job began.
    """
    storage, shard, stamp = Storage(), item["shard"], Stamp(**json.loads(item["stamp"]))
    if storage.stat(shard) != stamp:
        raise DataError(f"{shard}: has changed since the job began; begin again in an empty folder")
    with StoredFile(storage, shard, stamp) as file:
        for key, members in scan_shard(file, shard):
            by_name = {member.name: member for member in members}
            problem = next((member.problem for member in members if member.problem), "")
            try:
                if problem or "json" not in by_name:
                    raise BadSample(problem or "no json")
                if len(by_name) < len(members):
                    raise BadSample("member is there twice")
                read = partial(_read, storage, shard, by_name)
                pieces, metadata = parse_content(read("json"))
                content: list[str | bytes] = [
                    read(value) if kind == "image" else value for kind, value in pieces
                ]
            except BadSample as bad:
                yield None, bad.reason
                continue
            yield Document(key, content, metadata), ""


def _read(storage: Storage, shard: str, members: dict[str, Member], name: str) -> bytes:
    if name not in members:
        raise BadSample("image is missing", name)
    return storage.read(Range(shard, members[name].offset, members[name].size))
