"""Documents and the shards that hold them.

A shard is a tar file in WebDataset's layout. The document with key K is ``K.json`` followed by its
images ``K.0.jpg``, ``K.1.png``, ...:

    {"content": [{"text": "A red circle."}, {"image": "0.jpg"}], "metadata": {...}}

An image's name is the member's name without the key and its dot. A key holds no dot, and the
members of a document lie next to each other. Nothing is ever extracted to disk.
"""

from __future__ import annotations

import io
import json
import os
import re
import secrets
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from data_pipeline.errors import BadSample, DataError
from data_pipeline.storage import Range, Stamp, Storage, StoredFile
from data_pipeline.tar import Header, NotTar, Reader, headers

MAX_JSON_BYTES = 64 << 20
"""Of one line of a corpus that is imported; images may be in it."""
MAX_DOCUMENT_BYTES = 8 << 20
"""Of a document's JSON, which takes some thirty times as much memory to read."""
MAX_IMAGE_BYTES = 64 << 20
MAX_KEY = 512
MAX_GROUP = 1 << 17
"""Members of a document at most; more are taken for another one with the same key."""
PICKLES = (".pkl", ".pickle", ".pyd", ".pt", ".pth", ".joblib")
KEY = re.compile(r"[A-Za-z0-9_\-]+")


@dataclass
class Document:
    """Images and text in order.

    Attributes:
        key: name within its source.
        content: text as ``str``, an image as the ``bytes`` of its file.
        metadata: whatever came with it, as JSON values.
    """

    key: str
    content: list[str | bytes]
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def images(self) -> list[bytes]:
        """Files of the images, in order."""
        return [piece for piece in self.content if isinstance(piece, bytes)]


@dataclass
class Summary:
    """What a command kept and left out; ``dropped`` counts by reason, ``notes`` is what else there is."""

    documents: int = 0
    images: int = 0
    dropped: Counter = field(default_factory=Counter)
    notes: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "documents": self.documents,
            "images": self.images,
            "dropped": dict(sorted(self.dropped.items())),
            **self.notes,
        }


def parse_content(blob: bytes) -> tuple[list[tuple[str, str]], dict[str, Any]]:
    """Read a document's JSON.

    Returns:
        Pieces in order, each ``("text", words)`` or ``("image", name)``; and the metadata.

    Raises:
        BadSample: when it is not JSON in UTF-8 or not of the format above.
    """
    try:
        value = json.loads(blob.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # of numbers too long to read as well
        raise BadSample("json cannot be read", str(error)) from None
    if not isinstance(value, dict) or not isinstance(value.get("content"), list):
        raise BadSample("json is not a document", 'expected {"content": [...], "metadata": {...}}')
    metadata = value.get("metadata", {})
    if not isinstance(metadata, dict):
        raise BadSample("json is not a document", "metadata is not an object")
    pieces = []
    for number, piece in enumerate(value["content"]):
        kind = next(iter(piece)) if isinstance(piece, dict) and len(piece) == 1 else None
        if kind not in ("text", "image") or not isinstance(piece[kind], str):
            raise BadSample("json is not a document", f'content[{number}] is neither "text" nor "image"')
        try:
            piece[kind].encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadSample("json cannot be read", f"content[{number}]: {error}") from None
        pieces.append((kind, piece[kind]))
    if not any(kind == "image" or text for kind, text in pieces):
        raise BadSample("document is empty")
    return pieces, metadata


def read_document(path: Path | str) -> Document:
    """Read a document from a JSON file, its images from the files it names, relative to it.

    Raises:
        DataError: when the file or an image of it cannot be read.
    """
    path = Path(path)
    try:
        pieces, metadata = parse_content(path.read_bytes())
        content = [(path.parent / value).read_bytes() if kind == "image" else value for kind, value in pieces]
    except (OSError, BadSample) as error:
        raise DataError(f"{path}: {error}") from None
    return Document(path.stem, content, metadata)


class ShardWriter:
    """Writes documents to ``folder/000000.tar``, ``000001.tar``, ...

    A shard takes its name once it is complete, so a reader never sees half of one.

    Args:
        folder: made if missing; must hold no shards yet.
        documents_per_shard: a new shard starts after so many documents, or
        bytes_per_shard: after so many bytes, whichever comes first.

    Raises:
        DataError: when the folder already holds shards or cannot be made.
    """

    def __init__(self, folder: Path | str, documents_per_shard: int = 1000, bytes_per_shard: int = 256 << 20):
        self.folder = Path(folder)
        self.limits = (documents_per_shard, bytes_per_shard)
        self.summary = Summary()
        self._shards = 0
        self._held = (0, 0)
        self._tar: tarfile.TarFile | None = None
        self._keys: set[str] = set()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{folder}: cannot be made a folder ({error})") from None
        if any(self.folder.glob("*.tar")):
            raise DataError(f"{folder}: already holds shards; choose an empty folder or remove them")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._finish()
        elif self._tar is not None:
            self._tar.close()
            self._partial.unlink(missing_ok=True)

    def write(self, document: Document) -> None:
        """Append a document and count it.

        Raises:
            ValueError: when its key is not of letters, digits, ``_`` and ``-``, or was used before.
        """
        if not KEY.fullmatch(document.key) or document.key in self._keys:
            raise ValueError(f"key {document.key!r}: letters, digits, _ and - only, each key once")
        self._keys.add(document.key)
        members = members_of(document)
        size = sum(len(blob) for _, blob in members)
        count, held = self._held
        if count and (count >= self.limits[0] or held + size > self.limits[1]):
            self._finish()
        if self._tar is None:
            self._tar = tarfile.open(self._partial, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115 closed by _finish
        _add(self._tar, document.key, members)
        self._held = (self._held[0] + 1, self._held[1] + size)
        self.summary.documents += 1
        self.summary.images += len(document.images)

    @property
    def _partial(self) -> Path:
        return self.folder / f".{self._shards:06d}.partial"

    def _finish(self) -> None:
        if self._tar is None:
            return
        self._tar.close()
        with open(self._partial, "rb") as file:
            os.fsync(file.fileno())
        self._partial.rename(self.folder / f"{self._shards:06d}.tar")
        self._shards += 1
        self._tar, self._held = None, (0, 0)


def write_shard(path: Path, documents: Iterable[Document]) -> None:
    """Write one shard, whole or not at all; none where there are no documents. Two that write the same
    (a task that was given up and its repetition) do not meet."""
    partial = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.partial")
    count = 0
    try:
        with tarfile.open(partial, "w", format=tarfile.PAX_FORMAT) as tar:
            for document in documents:
                _add(tar, document.key, members_of(document))
                count += 1
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        if count:
            partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def _add(tar: tarfile.TarFile, key: str, members: list[tuple[str, bytes]]) -> None:
    for name, blob in members:
        info = tarfile.TarInfo(f"{key}.{name}")
        info.size = len(blob)
        tar.addfile(info, io.BytesIO(blob))
    tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every header it has written


def members_of(document: Document) -> list[tuple[str, bytes]]:
    """The document as files: ``("json", ...), ("0.png", ...), ...``, names without the key."""
    content: list[dict[str, str]] = []
    images: list[tuple[str, bytes]] = []
    for piece in document.content:
        if isinstance(piece, bytes):
            images.append((f"{len(images)}.{suffix_of(piece)}", piece))
            content.append({"image": images[-1][0]})
        else:
            content.append({"text": piece})
    value = {"content": content, "metadata": document.metadata}
    return [("json", json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")), *images]


def suffix_of(blob: bytes) -> str:
    """File suffix of an image, from its first bytes; ``bin`` for a format we do not know."""
    for start, suffix in ((b"\xff\xd8\xff", "jpg"), (b"\x89PNG\r\n", "png"), (b"GIF8", "gif")):
        if blob.startswith(start):
            return suffix
    return "webp" if blob[:4] == b"RIFF" and blob[8:12] == b"WEBP" else "bin"


@dataclass(frozen=True)
class Member:
    """A file in a shard: ``name`` without the key, where its bytes lie, and what is wrong with it."""

    name: str
    offset: int
    size: int
    problem: str = ""


def scan_shard(file: Reader, name: str) -> Iterator[tuple[str, list[Member]]]:
    """Read the headers of a tar file and group its members by key, in order.

    A run of members with one key is a group; a key that comes back later makes a second group. A
    shard that is cut short or broken in the middle ends with a group of key ``""`` that says so.

    Args:
        file: the shard, as a ``storage.StoredFile``.
        name: what errors call it.

    Raises:
        DataError: when it is not a tar file at all.
    """
    key = ""
    members: list[Member] = []
    try:
        for header in headers(file):
            own, suffix = split_name(header.name)
            if members and (own != key or len(members) == MAX_GROUP):
                yield key, members
                members = []
            key = own
            members.append(
                Member(suffix, header.offset, header.size, header.problem or _problem(own, header))
            )
    except NotTar as error:
        raise DataError(f"{name}: not a tar file ({error}); write it again or remove it") from None
    if members:
        yield key, members


def scan_file(path: Path | str) -> Iterator[tuple[str, list[Member]]]:
    """``scan_shard`` of a file on this machine."""
    storage = Storage()
    with StoredFile(storage, str(path), storage.stat(str(path))) as file:
        yield from scan_shard(file, str(path))


def split_name(name: str) -> tuple[str, str]:
    """Key and the rest of a member's name: up to and after the first dot behind the last slash."""
    while name.startswith("./"):
        name = name[2:]
    folder, _, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem)[:MAX_KEY], suffix


def _problem(key: str, header: Header) -> str:
    if header.name.lower().endswith(PICKLES):
        return "member is a pickle, which is never opened"
    if len(key) == MAX_KEY:
        return "key is too long"
    if header.size > (MAX_DOCUMENT_BYTES if header.name.endswith(".json") else MAX_IMAGE_BYTES):
        return "member is too large"
    return ""


def read_range(path: Path | str, offset: int, size: int) -> bytes:
    """Bytes of a file on this machine.

    Raises:
        BadSample: when it is gone, or shorter than that.
    """
    return Storage().read(Range(str(path), offset, size))


def find_shards(path: str, name: str, storage: Storage | None = None) -> list[tuple[str, Stamp]]:
    """The shards of a source, in order of their names, and what they are at the moment.

    Args:
        path: a folder of ``*.tar``, or one such file; a path or a URL.
        name: of the source, for messages.

    Raises:
        DataError: when there are none.
    """
    storage = storage or Storage()
    shards = [(path, storage.stat(path))] if path.endswith(".tar") else storage.find(path, ".tar")
    if not shards:
        raise DataError(f"source {name!r}: no *.tar shards at {path!r}; make them with `mmi data import-...`")
    return shards


def write_documents(documents: Iterable[Document], folder: Path | str, **limits: int) -> Summary:
    """Write documents to shards; the arguments are those of ``ShardWriter``."""
    with ShardWriter(folder, **limits) as writer:
        for document in documents:
            writer.write(document)
    return writer.summary
