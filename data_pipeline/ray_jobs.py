"""Whole-corpus jobs on Ray Data, and the plan as a source of Ray Data.

A job reads a folder (or URL) of shards and writes another: one task a shard, the same names, and what is
left out is counted by reason. A shard takes its name once it is whole.

    filter     keeps the documents a function accepts
    recaption  changes documents through a function, in batches (a model that describes images, say)
    dedup      leaves out images whose perceptual hash came before, and documents left without images

The index of a corpus is made by ``mmi data index``, shard by shard, without Ray.
"""

from __future__ import annotations

import importlib
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipeline.decode import decode
from data_pipeline.errors import BadSample, DataError
from data_pipeline.feed import setup_of
from data_pipeline.formats import (
    Document,
    Member,
    ShardWriter,
    Summary,
    find_shards,
    parse_content,
    scan_file,
)
from data_pipeline.optional import ray
from data_pipeline.settings import DataSettings
from data_pipeline.storage import Range, Storage
from data_pipeline.stream import Stream

MAX_PIXELS = 89_478_485
HASH_SIDE = 32
"""Pixels a side of the picture that a perceptual hash is taken of."""

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


def filter_corpus(source: str, out: str, function: str, workers: int = 2) -> Summary:
    """Keep the documents that a function accepts.

    Args:
        source, out: folders of shards; ``out`` is made.
        function: ``module:name`` of a function of a ``Document`` that gives None to keep it, or the
            reason to leave it out.
        workers: shards at a time.

    Raises:
        DataError: when the source has no shards or the function cannot be imported.
    """
    load_function(function)
    return _rewrite(source, out, workers, {"kind": "filter", "function": function})


def recaption_corpus(source: str, out: str, function: str, workers: int = 2, batch: int = 32) -> Summary:
    """Change documents through a function of a list of documents; see ``Edit``.

    Args:
        source, out, function, workers: as in ``filter_corpus``.
        batch: documents given to the function at a time.
    """
    load_function(function)
    return _rewrite(source, out, workers, {"kind": "recaption", "function": function, "batch": batch})


def dedup_corpus(source: str, out: str, workers: int = 2) -> Summary:
    """Leave out images that look like one that comes before them in the corpus.

    Two images look alike when their perceptual hashes are the same 64 bits. The first in the order of
    the shards stays. A document left without any image goes, unless it had none before.
    """
    shards = [url for url, _ in find_shards(source, source)]
    rows = _dataset(shards, workers).flat_map(_hashes, concurrency=workers)
    first: dict[int, tuple[str, str, int]] = {}
    seen: list[tuple[int, tuple[str, str, int]]] = []
    for row in rows.iter_rows():
        place = (row["shard"], row["key"], row["image"])
        value = int(row["hash"])
        seen.append((value, place))
        first[value] = min(first.get(value, place), place)
    doubles: dict[str, set[tuple[str, int]]] = {}
    for value, (shard, key, image) in seen:
        if first[value] != (shard, key, image):
            doubles.setdefault(shard, set()).add((key, image))
    return _rewrite(source, out, workers, {"kind": "dedup"}, doubles)


def perceptual_hash(image: Image.Image) -> int:
    """64 bits that stay the same when an image is scaled, recompressed or slightly changed: the signs of
    the 8 x 8 lowest frequencies (DCT-II of 32 x 32 grey pixels) about their median (pHash, Zauner 2010)."""
    grey = image.convert("L").resize((HASH_SIDE, HASH_SIDE), Image.Resampling.BOX)
    pixels = np.asarray(grey, np.float64)
    n = np.arange(HASH_SIDE)
    basis = np.cos(np.pi * (2 * n[None] + 1) * n[:8, None] / (2 * HASH_SIDE))
    low = (basis @ pixels @ basis.T).ravel()
    bits = low > np.median(low[1:])
    bits[0] = False  # brightness alone says nothing
    return int(np.packbits(bits).view(">u8")[0])


def plan_dataset(settings: DataSettings, steps: int, global_rows: int, start: int = 0) -> Any:
    """Training steps as a Ray dataset, in the order of the plan: a row a micro-batch of one row.

    Args:
        settings: as for ``Stream``.
        steps, start: how many steps, from which.
        global_rows: rows of a step.

    Returns:
        A ``ray.data.Dataset`` of ``step``, ``row``, ``checksum``, ``tokens``, ``labels``, ``images`` and
        ``drawn`` (bytes with ``image_size`` and ``drawn_size`` a side); set
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


def _dataset(shards: list[str], workers: int) -> Any:
    return ray.data.from_items(
        [{"shard": shard} for shard in shards], override_num_blocks=min(len(shards), 8 * workers)
    )


def _hashes(row: dict[str, str]) -> list[dict[str, Any]]:
    """Hash of every image of a shard that can be decoded."""
    found = []
    for document, _ in _documents(row["shard"]):
        if document is None:
            continue  # counted when the shard is written
        for number, blob in enumerate(document.images):
            try:
                value = perceptual_hash(decode(blob, MAX_PIXELS))
            except BadSample:
                continue  # what cannot be read is no double; training masks and counts it
            found.append({"hash": str(value), "shard": row["shard"], "key": document.key, "image": number})
    return found


def _rewrite(
    source: str, out: str, workers: int, job: dict[str, Any], doubles: dict[str, set] | None = None
) -> Summary:
    """Run a job over all shards; its counts together."""
    shards = [url for url, _ in find_shards(source, source)]
    Path(out).mkdir(parents=True, exist_ok=True)
    if any(Path(out).glob("*.tar")):
        raise DataError(f"{out}: already holds shards; choose an empty folder or remove them")
    left = {shard: sorted((doubles or {}).get(shard, ())) for shard in shards}
    items = [{"shard": shard, "out": out, "doubles": left[shard], **job} for shard in shards]
    rows = ray.data.from_items(items, override_num_blocks=min(len(items), 8 * workers)).map(
        _rewrite_shard, concurrency=workers
    )
    total = Summary()
    for row in rows.iter_rows():
        total.documents += row["documents"]
        total.images += row["images"]
        total.dropped.update(dict(zip(row["reasons"], row["counts"], strict=True)))
    return total


def _rewrite_shard(job: dict[str, Any]) -> dict[str, Any]:
    """One shard of a job; written under its own name once it is whole."""
    name, out = job["shard"].rpartition("/")[2], Path(job["out"])
    dropped: Counter[str] = Counter()
    kept = _edited(job, dropped)
    draft = out / f".{name}.draft"
    shutil.rmtree(draft, ignore_errors=True)  # of a job that was stopped
    with ShardWriter(draft, documents_per_shard=1 << 30, bytes_per_shard=1 << 60) as writer:
        for document in kept:
            writer.write(document)
    if writer.summary.documents:
        (draft / "000000.tar").replace(out / name)
    draft.rmdir()
    return {
        "documents": writer.summary.documents,
        "images": writer.summary.images,
        "reasons": list(dropped),
        "counts": list(dropped.values()),
    }


def _edited(job: dict[str, Any], dropped: Counter[str]) -> Iterator[Document]:
    edit = _edit_of(job)
    held: list[Document] = []

    def flush() -> Iterator[Document]:
        answers = edit(held)
        if len(answers) != len(held):
            raise DataError(f"{job['function']}: gave {len(answers)} answers for {len(held)} documents")
        for answer in answers:
            if isinstance(answer, str):
                dropped[answer] += 1
            else:
                yield answer
        held.clear()

    for document, bad in _documents(job["shard"]):
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
        doubles = {(key, image) for key, image in job["doubles"]}
        return lambda documents: [_without(document, doubles) for document in documents]
    function = load_function(job["function"])
    if job["kind"] == "recaption":
        return function
    return lambda documents: [function(document) or document for document in documents]


def _without(document: Document, doubles: set[tuple[str, int]]) -> Document | str:
    """The document without its doubles, or the reason to leave it out."""
    content: list[str | bytes] = []
    number = -1
    for piece in document.content:
        number += isinstance(piece, bytes)
        if isinstance(piece, str) or (document.key, number) not in doubles:
            content.append(piece)
    if document.images and not any(isinstance(piece, bytes) for piece in content):
        return "all images are doubles"
    return Document(document.key, content, document.metadata)


def _documents(shard: str) -> Iterator[tuple[Document | None, str]]:
    """Documents of a shard in order; in the place of a bad one None and the reason."""
    storage = Storage()
    for key, members in scan_file(shard):
        by_name = {member.name: member for member in members}
        problem = next((member.problem for member in members if member.problem), "")
        try:
            if problem or "json" not in by_name:
                raise BadSample(problem or "no json")
            if len(by_name) < len(members):
                raise BadSample("member is there twice")
            read = partial(_read, storage, shard, by_name)
            pieces, metadata = parse_content(read("json"))
            content: list[str | bytes] = [read(value) if kind == "image" else value for kind, value in pieces]
        except BadSample as bad:
            yield None, bad.reason
            continue
        yield Document(key, content, metadata), ""


def _read(storage: Storage, shard: str, members: dict[str, Member], name: str) -> bytes:
    if name not in members:
        raise BadSample("image is missing", name)
    return storage.read(Range(shard, members[name].offset, members[name].size))
