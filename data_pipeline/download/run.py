"""A download: lists to shards, in groups of documents, each group a shard.

Which documents make a group follows from the lists and the filters alone, so a download that was stopped
goes on with the first group that is not done, and the shards are the same in the end. Beside shard
``000007.tar`` lies ``000007.failures.jsonl``, one line for every file that did not come ({key, url, reason,
detail}), and ``000007.done.json`` with the counts, written last.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from data_pipeline.download.addresses import AddressRule
from data_pipeline.download.fetch import Fetcher, Limits
from data_pipeline.download.lists import PATTERNS, RECIPES, Filters, Wanted, read_lists
from data_pipeline.errors import BadSample, DataError
from data_pipeline.formats import Document, Summary, write_shard
from data_pipeline.importers import mmc4
from data_pipeline.importers.common import find_inputs

__all__ = ["RECIPES", "Download", "Filters", "Limits", "download"]

PLAN = "download.json"
MOST_IMAGES = 256
"""Of one document; one with more is left out."""


@dataclass
class Download:
    """What to get and how.

    Attributes:
        lists: a folder of lists, or one list; see ``lists``.
        out: folder of the shards.
        filters: lines that are left out.
        mmc4: the paper's filters, for MMC4's documents.
        limits: of the fetching; may change when a download goes on.
        allow: networks beyond the public addresses; see ``AddressRule``.
        documents_per_shard: listed documents of a group.
    """

    lists: Path
    out: Path
    filters: Filters = field(default_factory=Filters)
    mmc4: mmc4.Filters = field(default_factory=mmc4.Filters)
    limits: Limits = field(default_factory=Limits)
    allow: list[str] = field(default_factory=list)
    documents_per_shard: int = 1000


@dataclass
class _Made:
    document: Document | None
    dropped: Counter[str]
    failures: list[dict[str, str]]


def download(wanted: Download, progress: Callable[[int], None] = lambda documents: None) -> Summary:
    """Download what the lists name; goes on where an earlier call stopped.

    Args:
        progress: is told how many listed documents are done.

    Returns:
        Documents and images in the shards; what was left out, by reason.

    Raises:
        DataError: when there are no lists, the folder holds another download, or nothing is kept.
    """
    rule = AddressRule(wanted.allow)
    _check_folder(wanted)
    summary = Summary()

    def drop(reason: str) -> None:
        summary.dropped[reason] += 1

    listed = read_lists(wanted.lists, wanted.filters, drop)
    for number, group in enumerate(_groups(listed, wanted.documents_per_shard)):
        done = wanted.out / f"{number:06d}.done.json"
        if not done.exists():
            _group(wanted, rule, number, group)
        counts = json.loads(done.read_text())
        summary.documents += counts["documents"]
        summary.images += counts["images"]
        summary.dropped.update(counts["dropped"])
        progress(number * wanted.documents_per_shard + len(group))
    if summary.documents == 0:
        reasons = ", ".join(f"{reason} {n}" for reason, n in summary.dropped.most_common(8))
        raise DataError(f"{wanted.lists}: no document is kept ({reasons or 'nothing in it'})")
    return summary


def _check_folder(wanted: Download) -> None:
    """Note what the folder's shards come from, or check that it is this."""
    paths = find_inputs(wanted.lists, PATTERNS)
    plan: dict[str, Any] = {
        "lists": [[path.name, path.stat().st_size, _head(path)] for path in paths],
        "filters": asdict(wanted.filters),
        "mmc4": asdict(wanted.mmc4),
        "documents_per_shard": wanted.documents_per_shard,
    }
    note = wanted.out / PLAN
    try:
        wanted.out.mkdir(parents=True, exist_ok=True)
        if not note.exists():
            if any(wanted.out.glob("*.tar")):
                raise DataError(f"{wanted.out}: holds shards of something else; choose an empty folder")
            note.write_text(json.dumps(plan, indent=1))
        kept = json.loads(note.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{note}: cannot be used ({error})") from None
    changed = [name for name, value in plan.items() if kept.get(name) != value]
    if changed:
        raise DataError(
            f"{wanted.out}: holds a download with other {', '.join(changed)}; choose another folder"
        )


def _head(path: Path) -> str:
    """Digest of the first and last megabyte of a list."""
    with open(path, "rb") as file:
        digest = hashlib.blake2b(file.read(1 << 20), digest_size=8)
        file.seek(max(path.stat().st_size - (1 << 20), 0))
        digest.update(file.read(1 << 20))
    return digest.hexdigest()


def _groups(listed: Iterator[Wanted], size: int) -> Iterator[list[Wanted]]:
    while group := list(islice(listed, size)):
        yield group


def _group(wanted: Download, rule: AddressRule, number: int, group: list[Wanted]) -> None:
    """Download a group and write its shard, its failures and, last, its counts."""
    counts = Summary()
    failures: list[dict[str, str]] = []

    def documents() -> Iterator[Document]:
        with asyncio.Runner() as runner:
            made = _fetched(wanted, rule, group)
            try:
                while (one := runner.run(anext(made, None))) is not None:
                    counts.dropped.update(one.dropped)
                    failures.extend(one.failures)
                    if one.document is not None:
                        counts.documents += 1
                        counts.images += len(one.document.images)
                        yield one.document
            finally:
                runner.run(made.aclose())

    write_shard(wanted.out / f"{number:06d}.tar", documents())
    lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in failures)
    (wanted.out / f"{number:06d}.failures.jsonl").write_text(lines, encoding="utf-8", errors="replace")
    done = wanted.out / f"{number:06d}.done.json"
    partial = done.with_suffix(".partial")
    partial.write_text(json.dumps(counts.as_dict()))
    partial.rename(done)


async def _fetched(wanted: Download, rule: AddressRule, group: list[Wanted]) -> Any:
    """The documents of a group, in order; a bounded number of them is under way."""
    async with Fetcher(wanted.limits, rule) as fetcher:
        under_way: deque[asyncio.Task[_Made]] = deque()
        try:
            for one in group:
                under_way.append(asyncio.create_task(_make(wanted, fetcher, one)))
                if len(under_way) > wanted.limits.connections:
                    yield await under_way.popleft()
            while under_way:
                yield await under_way.popleft()
        finally:
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)


async def _make(wanted: Download, fetcher: Fetcher, one: Wanted) -> _Made:
    """A document with its images; one that does not come is left out of it and noted."""
    made = _Made(None, Counter(), [])
    found: dict[int, bytes | BadSample] = {}

    async def get(number: int, url: str) -> None:
        try:
            found[number] = await fetcher.image(url)
        except BadSample as bad:
            found[number] = bad
            made.failures.append(
                {"key": one.key, "url": url[:2000], "reason": bad.reason, "detail": bad.detail}
            )

    try:
        if len(one.urls) > MOST_IMAGES:
            raise BadSample("document has too many images")
        chosen = [n for n, _ in enumerate(one.urls) if _is_wanted(one, n, wanted.mmc4)]
        await asyncio.gather(*(get(number, one.urls[number]) for number in chosen))
        made.document = _document(one, found, wanted.mmc4, made.dropped)
    except BadSample as bad:
        made.dropped[bad.reason] += 1
    return made


def _is_wanted(one: Wanted, number: int, filters: mmc4.Filters) -> bool:
    if one.record is None:
        return True
    similarity = one.record["image_info"][number].get("matched_sim")
    return not isinstance(similarity, int | float) or similarity >= filters.similarity


def _document(
    one: Wanted, found: dict[int, bytes | BadSample], filters: mmc4.Filters, dropped: Counter[str]
) -> Document:
    def blob_of(number: int) -> bytes:
        blob = found[number]
        if isinstance(blob, BadSample):
            raise blob
        return blob

    def drop(reason: str) -> None:
        dropped[reason] += 1

    if one.record is not None:
        document = mmc4.build_document(one.key, one.record, lambda number, _: blob_of(number), filters, drop)
        return Document(document.key, document.content, {**one.metadata, **document.metadata})
    content: list[str | bytes] = []
    images = 0
    for kind, value in one.content:
        if kind == "text":
            content.append(value)
            continue
        try:
            content.append(blob_of(images))
        except BadSample as bad:
            drop(bad.reason)
        images += 1
    if not any(isinstance(piece, bytes) for piece in content):
        raise BadSample("document without an image")
    return Document(one.key, content, one.metadata)
