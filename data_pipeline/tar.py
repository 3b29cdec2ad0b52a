"""Headers of tar files (POSIX ustar and pax, GNU long names), read in bounded memory.

Python's ``tarfile`` keeps every header it has met and reads extended headers and sparse maps of any
size into memory, which an outsider's shard could use; and it takes a broken header in the middle for
the end. This reader holds one header at a time and knows the difference.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

BLOCK = 512
MAX_EXTENDED = 1 << 16
"""Bytes of a pax header or of a long name at most."""
MAX_MEMBERS = 1 << 20
"""Members of a shard at most: what its index holds in memory."""
PLAIN, FOLDER = (b"0", b"\0", b"7"), b"5"
CUT_SHORT = "shard is cut short or broken"


class NotTar(Exception):
    """The file is not a tar file at all."""


class Reader(Protocol):
    """What is asked of a file: bytes at a place, fewer at its end; and its size."""

    size: int

    def read(self, offset: int, size: int) -> bytes: ...


@dataclass(frozen=True)
class Header:
    """A member: its name as written, where its bytes lie, and what is wrong with it (or nothing)."""

    name: str
    offset: int
    size: int
    problem: str = ""


def headers(file: Reader) -> Iterator[Header]:
    """All members but folders, in order.

    A file that is cut short or broken in the middle ends with a member of name ``""`` that says so;
    one with more than ``MAX_MEMBERS`` likewise.

    Raises:
        NotTar: when the first header is none.
    """
    offset, count = 0, 0
    extended: dict[str, str] = {}
    while True:
        block = file.read(offset, BLOCK)
        if block == bytes(BLOCK):
            return  # a whole archive ends in zeros
        if len(block) < BLOCK or not _sum_fits(block):
            if offset == 0:
                raise NotTar("its first header is none")
            yield Header("", 0, 0, CUT_SHORT)
            return
        try:
            size = int(extended["size"]) if "size" in extended else _number(block[124:136])
        except ValueError:
            size = -1
        start, kind = offset + BLOCK, block[156:157]
        offset = start + -(-size // BLOCK) * BLOCK
        if size < 0 or (kind in b"xgLK" and (size > MAX_EXTENDED or start + size > file.size)):
            yield Header("", 0, 0, CUT_SHORT)
            return
        if kind in b"xgLK":
            if kind == b"x":
                extended |= _pax(file.read(start, size))
            elif kind == b"L":
                extended["path"] = _text(file.read(start, size))
            continue  # a global header and a long link name are of no use here
        count += 1
        if count > MAX_MEMBERS:
            yield Header("", 0, 0, f"shard has more than {MAX_MEMBERS} members")
            return
        name = extended.get("path") or _name(block)
        if kind != FOLDER and not (kind == b"\0" and name.endswith("/")):
            yield Header(name, start, size, _problem(name, kind, extended, start + size, file.size))
        extended = {}


def _problem(name: str, kind: bytes, extended: dict[str, str], end: int, total: int) -> str:
    if name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name) or "\0" in name:
        return "member name points outside the shard"
    if "\ufffd" in name:
        return "member name is not UTF-8"
    if kind not in PLAIN or "sparse" in extended:
        return "member is not a plain file"
    return CUT_SHORT if end > total else ""


def _sum_fits(block: bytes) -> bool:
    try:
        expected = _number(block[148:156])
    except ValueError:
        return False
    return expected == sum(block) - sum(block[148:156]) + 8 * ord(" ")


def _number(field: bytes) -> int:
    """Octal digits, or GNU's base 256 for what does not fit."""
    if field[0] in (0o200, 0o377):
        value = int.from_bytes(field[1:], "big")
        return value if field[0] == 0o200 else value - (1 << 8 * (len(field) - 1))
    digits = field.split(b"\0", 1)[0].strip(b" ")
    if not re.fullmatch(rb"[0-7]*", digits):
        raise ValueError(f"not an octal number: {digits!r}")
    return int(digits or b"0", 8)


def _name(block: bytes) -> str:
    name = _text(block[:100])
    prefix = _text(block[345:500]) if block[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "replace")


def _pax(blob: bytes) -> dict[str, str]:
    """Path and size of ``LENGTH KEY=VALUE\\n`` records, and whether the file is sparse; what does not
    read as a record ends the list."""
    found: dict[str, str] = {}
    while match := re.match(rb"(\d{1,9}) ([^=]+)=", blob):
        length = int(match[1])
        if not match.end() < length + 1 <= len(blob) + 1 or blob[length - 1 : length] != b"\n":
            break
        if match[2] in (b"path", b"size"):
            found[match[2].decode()] = blob[match.end() : length - 1].decode("utf-8", "replace")
        elif match[2].startswith(b"GNU.sparse"):
            found["sparse"] = "yes"
        blob = blob[length:]
    return found
