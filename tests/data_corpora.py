"""Small corpora for the tests of the data pipeline."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.formats import Document, find_shards, parse_content, read_range, scan_file, write_documents
from data_pipeline.settings import DataSettings, SourceSettings
from data_pipeline.tokens import train_tokenizer

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def picture(value: int, size: tuple[int, int] = (20, 20), kind: str = "PNG") -> bytes:
    """An image file of one colour that tells ``value``."""
    file = io.BytesIO()
    Image.new("RGB", size, (value % 256, value // 256 % 256, 7)).save(file, kind)
    return file.getvalue()


def photo(size: int = 128) -> bytes:
    """A JPEG with much in it."""
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def cut_jpeg() -> bytes:
    """A JPEG whose second half is missing."""
    blob = photo()
    return blob[: len(blob) // 2]


def huge_png(side: int = 30_000) -> bytes:
    """A PNG of a few hundred bytes that claims side x side pixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = b"IDAT" + zlib.compress(bytes(1000))
    chunks = [head, body, b"IEND"]
    framed = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def words(count: int, start: int = 0) -> str:
    """Text of about ``count`` tokens."""
    return "".join(f" {WORDS[(start + i) % len(WORDS)]}" for i in range(count))


def documents(count: int, name: str = "d", seed: int = 0) -> list[Document]:
    """Documents of 1 to 4 images between texts of 1 to 12 words; their images are all different."""
    rng = np.random.default_rng(seed)
    made = []
    for index in range(count):
        content: list[str | bytes] = []
        for number in range(int(rng.integers(1, 5))):
            content.append(words(int(rng.integers(1, 13)), index))
            content.append(picture(index * 5 + number))
        made.append(Document(f"{name}{index:05d}", content, {"index": index}))
    return made


def pairs(count: int, name: str = "p") -> list[Document]:
    """Image-text pairs."""
    return [Document(f"{name}{i:05d}", [picture(i), words(4 + i % 7, i)], {}) for i in range(count)]


def make_tokenizer(folder: Path, vocabulary: int = 300) -> str:
    """Train and save a tokenizer; returns its path."""
    path = folder / "tokenizer.json"
    train_tokenizer([words(200)], vocabulary).save(path)
    return str(path)


def make_settings(folder: Path, sources: dict[str, list[Document]], **changes) -> DataSettings:
    """Write sources to shards of 20 documents; names that start with ``pairs`` are of that kind."""
    settings = DataSettings(
        sources=[
            SourceSettings(
                name, str(folder / name), 1.0, "pairs" if name.startswith("pairs") else "interleaved"
            )
            for name in sources
        ],
        tokenizer=make_tokenizer(folder),
        context_length=64,
        image_tokens=4,
        image_size=8,
        drawn_size=12,
        holdout=0.0,
        window=32,
    )
    for name, made in sources.items():
        write_documents(made, folder / name, documents_per_shard=20)
    for name, value in changes.items():
        setattr(settings, name, value)
    return settings


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    """A tar file of the given members, names as they are."""
    with tarfile.open(path, "w") as tar:
        for name, blob in members:
            info = tarfile.TarInfo(name)
            info.size = len(blob)
            tar.addfile(info, io.BytesIO(blob))


def read_corpus(folder: Path) -> dict[str, list[str | bytes]]:
    """Documents of a folder of shards: {key: [text or image bytes, ...]}."""
    found = {}
    for shard, _ in find_shards(str(folder), "x"):
        for key, members in scan_file(shard):
            blobs = {m.name: read_range(shard, m.offset, m.size) for m in members}
            pieces, _ = parse_content(blobs["json"])
            found[key] = [blobs[value] if kind == "image" else value for kind, value in pieces]
    return found
