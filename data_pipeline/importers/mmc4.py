"""MMC4, with the filters of the paper (section 4.1).

One document a line (or one ``key.json`` a group of a tar): ``text_list``, ``similarity_matrix``
[images x sentences], ``image_info`` [{image_name, matched_text_index, matched_sim, ...}]. An image's
bytes are ``image_base64`` in its info, ``key.N.jpg`` or ``image_name`` in the tar, or a file
``image_name`` beside the list or in ``images/`` beside it.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import BadSample
from data_pipeline.formats import Document, Summary, read_range, scan_file
from data_pipeline.importers.common import (
    Drop,
    checked_image,
    find_inputs,
    read_inside,
    read_lines,
    run_import,
)
from data_pipeline.importers.obelics import decoded

PATTERNS = ("*.jsonl", "*.jsonl.gz", "*.jsonl.zip", "*.tar")
Find = Callable[[int, dict[str, Any]], bytes]
"""Bytes of an image, from its number and its info."""


@dataclass
class Filters:
    """The paper's: CLIP similarity of an image to its sentence, images a document, and the share of
    the documents with a single image that is dropped."""

    similarity: float = 0.24
    max_images: int = 6
    drop_single: float = 0.5


def import_mmc4(folder: Path | str, out: Path | str, filters: Filters | None = None) -> Summary:
    """Import MMC4 documents.

    Raises:
        DataError: when there are no such files, or no document is kept.
    """
    files = find_inputs(folder, PATTERNS)
    chosen = filters or Filters()

    def documents(drop: Drop) -> Iterator[Document]:
        for file in files:
            for key, record, find in _records(file, drop):
                try:
                    yield build_document(key, record, find, chosen, drop)
                except BadSample as bad:
                    drop(bad.reason)

    return run_import(documents, out, folder)


def _records(file: Path, drop: Drop) -> Iterator[tuple[str, dict[str, Any], Find]]:
    if file.suffix == ".tar":
        yield from _tar_records(file, drop)
        return
    for number, record in read_lines(file, drop):
        yield f"{file.name.split('.')[0]}-{number}", record, functools.partial(_beside, file.parent)


def _tar_records(file: Path, drop: Drop) -> Iterator[tuple[str, dict[str, Any], Find]]:
    seen: set[str] = set()
    for key, members in scan_file(file):
        problem = next((member.problem for member in members if member.problem), "")
        if problem or key in seen:
            drop(problem or "members of the key do not lie together")
            continue
        seen.add(key)
        places = {member.name: (member.offset, member.size) for member in members}
        try:
            record = json.loads(read_range(file, *places["json"]).decode("utf-8"))
        except (KeyError, ValueError, RecursionError, BadSample):
            drop("json cannot be read")
            continue
        yield key, record, functools.partial(_in_tar, file, places)


def _in_tar(file: Path, places: dict[str, tuple[int, int]], number: int, info: dict[str, Any]) -> bytes:
    names = [f"{number}.{suffix}" for suffix in ("jpg", "jpeg", "png", "webp")] + [
        str(info.get("image_name"))
    ]
    for name in names:
        if name in places:
            return read_range(file, *places[name])
    raise BadSample("image is missing", str(info.get("image_name")))


def _beside(folder: Path, _: int, info: dict[str, Any]) -> bytes:
    name = info.get("image_name")
    if not isinstance(name, str) or not name:
        raise BadSample("image is missing")
    path = folder / "images" / name
    return read_inside(folder, path if path.exists() else folder / name)


def build_document(key: str, record: Any, find: Find, filters: Filters, drop: Drop) -> Document:
    """A document of a line of MMC4, filtered; what is left out of it is counted.

    Raises:
        BadSample: when it is none, or nothing of it is left.
    """
    texts, infos, matrix = _checked(record)
    blobs: dict[int, bytes] = {}
    order = sorted(range(len(infos)), key=lambda n: (-_similarity(infos[n], matrix, n), n))
    for number in order:
        try:
            if _similarity(infos[number], matrix, number) < filters.similarity:
                raise BadSample("image unlike its sentence")
            if len(blobs) == filters.max_images:
                raise BadSample(f"image beyond {filters.max_images} in its document")
            given = infos[number].get("image_base64")
            blob = decoded(given) if isinstance(given, str) else find(number, infos[number])
            blobs[number] = checked_image(blob)
        except BadSample as bad:
            drop(bad.reason)
    placed = _place(sorted(blobs), infos, matrix, len(texts), filters.similarity, drop)
    if not placed:
        raise BadSample("document without an image")
    if len(placed) == 1 and _chance(key) < filters.drop_single:
        raise BadSample("document with one image")
    content: list[str | bytes] = []
    for sentence, text in enumerate(texts):
        own = [number for number, at in placed.items() if at == sentence]
        content += [blobs[n] for n in own if _chance(key, n) < 0.5]
        content += [text.strip() + " "] if text.strip() else []
        content += [blobs[n] for n in own if _chance(key, n) >= 0.5]
    return Document(key, content, {"url": record["url"]} if isinstance(record.get("url"), str) else {})


def _checked(record: Any) -> tuple[list[str], list[dict[str, Any]], list[list[float]] | None]:
    """Texts, image infos and similarity matrix (None when it is left out), of the right shapes."""
    wrong = BadSample("json is not an MMC4 document")
    if not isinstance(record, dict):
        raise wrong
    texts, infos, matrix = record.get("text_list"), record.get("image_info"), record.get("similarity_matrix")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise wrong
    if not isinstance(infos, list) or not all(isinstance(info, dict) for info in infos):
        raise wrong
    if matrix is None:
        for info in infos:
            at, similarity = info.get("matched_text_index"), info.get("matched_sim")
            if type(at) is not int or not 0 <= at < len(texts) or not isinstance(similarity, int | float):
                raise wrong
    elif (
        not isinstance(matrix, list)
        or len(matrix) != len(infos)
        or not all(isinstance(row, list) and len(row) == len(texts) for row in matrix)
        or not all(type(value) in (int, float) for row in matrix for value in row)
    ):
        raise wrong
    return texts, infos, matrix


def _similarity(info: dict[str, Any], matrix: list[list[float]] | None, number: int) -> float:
    value = info.get("matched_sim")
    if isinstance(value, int | float):
        return value
    return max(matrix[number], default=0.0) if matrix else 0.0


def _place(
    images: list[int],
    infos: list[dict[str, Any]],
    matrix: list[list[float]] | None,
    sentences: int,
    similarity: float,
    drop: Drop,
) -> dict[int, int]:
    """Sentence of each image: assigned anew over the images that are left, each to its own."""
    if matrix is None:
        return {number: infos[number]["matched_text_index"] for number in images}
    if len(images) <= sentences:
        chosen = assign([[-value for value in matrix[number]] for number in images])
        placed = dict(zip(images, chosen, strict=True))
    else:
        columns = [[-matrix[number][sentence] for number in images] for sentence in range(sentences)]
        placed = {images[image]: sentence for sentence, image in enumerate(assign(columns))}
    kept = {number: at for number, at in placed.items() if matrix[number][at] >= similarity}
    for _ in range(len(images) - len(kept)):
        drop("image unlike its sentence")
    return dict(sorted(kept.items()))


def assign(costs: Sequence[Sequence[float]]) -> list[int]:
    """Give each row a column of its own at the least total cost (Hungarian method with potentials).

    Args:
        costs: [rows][columns], rows <= columns.

    Returns:
        The column of each row.
    """
    rows, columns = len(costs), len(costs[0]) if costs else 0
    of_row, of_column = [0.0] * (rows + 1), [0.0] * (columns + 1)
    owner = [0] * (columns + 1)  # row of each column, both from 1; 0 is none
    for row in range(1, rows + 1):
        owner[0], column = row, 0
        slack = [float("inf")] * (columns + 1)
        came, used = [0] * (columns + 1), [False] * (columns + 1)
        while owner[column]:
            used[column] = True
            current, delta, nearest = owner[column], float("inf"), 0
            for other in range(1, columns + 1):
                if used[other]:
                    continue
                reduced = costs[current - 1][other - 1] - of_row[current] - of_column[other]
                if reduced < slack[other]:
                    slack[other], came[other] = reduced, column
                if slack[other] < delta:
                    delta, nearest = slack[other], other
            for other in range(columns + 1):
                if used[other]:
                    of_row[owner[other]] += delta
                    of_column[other] -= delta
                else:
                    slack[other] -= delta
            column = nearest
        while column:
            owner[column], column = owner[came[column]], came[column]
    chosen = [0] * rows
    for column in range(1, columns + 1):
        if owner[column]:
            chosen[owner[column] - 1] = column - 1
    return chosen


def _chance(*key: object) -> float:
    """A number in 0..1 that depends on the key alone."""
    digest = hashlib.blake2b(repr(key).encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64
