"""Lists of URLs as they are published: what becomes one document, and which are filtered out.

- LAION, COYO and the like, Parquet or JSON lines: one image a line; its URL in ``url``, its text in
  ``caption`` or ``text`` (any case).
- MMC4, JSON lines: ``text_list`` and ``image_info`` [{raw_url, ...}].
- OBELICS, Parquet or JSON lines: parallel lists ``images`` (URLs) and ``texts``.

A list is read line by line (Parquet in batches), so its size does not matter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.errors import BadSample, DataError
from data_pipeline.importers.common import Drop, find_inputs, read_lines
from data_pipeline.tokens import load_tokenizer

PATTERNS = ("*.parquet", "*.jsonl", "*.jsonl.gz", "*.jsonl.zip")
UNSAFE = {"nsfw": "NSFW", "likely": "NSFW", "unsafe": "NSFW", "true": "NSFW", "yes": "NSFW"}
AESTHETIC = ("aesthetic", "aesthetic_score", "aesthetics_score")
KEPT_COLUMNS = ("license", "width", "height", "similarity", "language", "lang", "punsafe", "pwatermark")


@dataclass
class Filters:
    """Lines that are not downloaded, by the columns that LAION and others publish.

    Attributes:
        unsafe: most probability of NSFW (``punsafe``); a column ``NSFW`` that says so is always out.
        watermark: most probability of a watermark (``pwatermark``).
        similarity: least CLIP similarity, 0 for any.
        licenses: those that are kept, any case; empty: all.
        opt_out: whether lines that say no (``opt_out``, or robots' ``noai``, ``noimageai``) are left out.
        aesthetic: least aesthetics score (``aesthetic``, ``aesthetic_score``), 0 for any.
        min_tokens: captions of fewer tokens are left out, counted with ``tokenizer``.
        tokenizer: a ``tokenizer.json``.
    """

    unsafe: float = 0.5
    watermark: float = 0.8
    similarity: float = 0.0
    licenses: list[str] = field(default_factory=list)
    opt_out: bool = True
    aesthetic: float = 0.0
    min_tokens: int = 0
    tokenizer: str = ""

    def __post_init__(self) -> None:
        if self.min_tokens and not self.tokenizer:
            raise DataError("--min-tokens needs --tokenizer to count with")

    def check(self, line: dict[str, Any]) -> None:
        """Check a line; its names are in lower case.

        Raises:
            BadSample: with the reason why it is left out.
        """
        if str(line.get("nsfw", "")).strip().lower() in UNSAFE or _number(line, "punsafe") > self.unsafe:
            raise BadSample("NSFW")
        if _number(line, "pwatermark") > self.watermark:
            raise BadSample("watermark")
        if _number(line, "similarity", 1.0) < self.similarity:
            raise BadSample("image unlike its text")
        if self.aesthetic and max(_number(line, name) for name in AESTHETIC) < self.aesthetic:
            raise BadSample("aesthetics score")
        if self.opt_out and str(line.get("opt_out", "")).strip().lower() in (
            "true",
            "1",
            "yes",
            "noai",
            "noimageai",
        ):
            raise BadSample("opted out")
        if self.licenses:
            own = str(line.get("license") or "").strip().lower()
            if own not in {name.lower() for name in self.licenses}:
                raise BadSample("license")


RECIPES: dict[str, dict[str, Any]] = {
    "mmc4": {},
    "laion-2b": {"aesthetic": 5.0},
    "laion-coco": {"min_tokens": 10},
    "captioned": {},
}
"""The paper's corpora (appendix, dataset details), by the names the preset ``paper-13b`` mixes 2:1:1:1, and
how their lists are filtered. MMC4's own rules (similarity 0.24, 6 images, half of the documents with one)
are ``importers.mmc4.Filters``. The paper filters LAION-2B by aesthetics scores and names no bound; 5 is that
of Stable Diffusion's second stage. It drops texts "with length shorter than 10" and names no unit: tokens
here."""


@dataclass
class Wanted:
    """A document to be: pieces of text, and URLs where images belong; the rest of MMC4's line goes along.

    Attributes:
        key: from the list's name and the number of the line, so it is the same in every run.
        content: ``("text", words)`` or ``("url", address)``.
        metadata: kept with the document.
        record: MMC4's line, for its own filters after the download; None for the others.
    """

    key: str
    content: list[tuple[str, str]]
    metadata: dict[str, Any]
    record: dict[str, Any] | None = None

    @property
    def urls(self) -> list[str]:
        """Addresses of the images, in order."""
        return [value for kind, value in self.content if kind == "url"]

    @property
    def texts(self) -> list[str]:
        """Pieces of text, in order."""
        return [value for kind, value in self.content if kind == "text"]


def read_lists(folder: Path | str, filters: Filters, drop: Drop) -> Iterator[Wanted]:
    """All documents that the lists name and the filters keep; what is left out is counted.

    Raises:
        DataError: when there are no lists.
    """
    encode = load_tokenizer(filters.tokenizer).encode if filters.min_tokens else None
    for path in find_inputs(folder, PATTERNS):
        stem = re.sub(r"[^A-Za-z0-9_\-]+", "_", path.name.split(".")[0])[:100]
        for number, line in _lines(path, drop):
            try:
                wanted = _wanted(
                    f"{stem}-{number:09d}", {str(k).lower(): v for k, v in line.items()}, filters
                )
                if encode is not None and sum(len(encode(t)) for t in wanted.texts) < filters.min_tokens:
                    raise BadSample(f"caption under {filters.min_tokens} tokens")
                yield wanted
            except BadSample as bad:
                drop(bad.reason)


def _lines(path: Path, drop: Drop) -> Iterator[tuple[int, dict[str, Any]]]:
    if path.suffix != ".parquet":
        yield from read_lines(path, drop)
        return
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for line in batch.to_pylist():
                    number += 1
                    yield number, line
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a Parquet file ({str(error)[:200]})") from None


def _wanted(key: str, line: dict[str, Any], filters: Filters) -> Wanted:
    filters.check(line)
    metadata = {name: line[name] for name in KEPT_COLUMNS if isinstance(line.get(name), str | int | float)}
    if isinstance(line.get("text_list"), list):
        return _mmc4(key, line, metadata)
    if isinstance(line.get("images"), list) and isinstance(line.get("texts"), list):
        return _obelics(key, line, metadata)
    url, text = line.get("url"), line.get("caption") or line.get("text")
    if not isinstance(url, str) or not isinstance(text, str) or not text.strip():
        raise BadSample("line has no url or no text")
    return Wanted(key, [("url", url), ("text", text.strip())], {**metadata, "url": url})


def _mmc4(key: str, line: dict[str, Any], metadata: dict[str, Any]) -> Wanted:
    infos = line.get("image_info")
    if not isinstance(infos, list) or not all(isinstance(info, dict) for info in infos):
        raise BadSample("json is not an MMC4 document")
    urls = [info.get("raw_url") for info in infos]
    if not urls or not all(isinstance(url, str) for url in urls):
        raise BadSample("json is not an MMC4 document")
    return Wanted(key, [("url", url) for url in urls], metadata, line)


def _obelics(key: str, line: dict[str, Any], metadata: dict[str, Any]) -> Wanted:
    images, texts = line["images"], line["texts"]
    content = []
    if len(images) != len(texts):
        raise BadSample("json is not an OBELICS document")
    for url, text in zip(images, texts, strict=True):
        if (url is None) == (text is None) or not isinstance(url or text or "", str):
            raise BadSample("json is not an OBELICS document")
        content.append(("url", url) if url is not None else ("text", text))
    if not any(kind == "url" for kind, _ in content):
        raise BadSample("document without an image")
    own = line.get("metadata") or line.get("general_metadata")
    try:
        general = json.loads(own) if isinstance(own, str) else own
    except ValueError:
        general = None
    page = general.get("url") if isinstance(general, dict) else None
    return Wanted(key, content, {**metadata, "url": page} if isinstance(page, str) else metadata)


def _number(line: dict[str, Any], name: str, default: float = 0.0) -> float:
    value = line.get(name)
    return float(value) if isinstance(value, int | float) else default
