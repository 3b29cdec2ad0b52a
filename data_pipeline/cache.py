"""Blocks of remote files on the local disk, shared by all processes of a machine.

A block appears under its name whole (written beside it, flushed, renamed), so a reader needs no lock.
Writers book their bytes in ``total`` under a lock before they write, so the limit holds however many
they are; who would exceed it first removes the blocks that were used longest ago. A block may be
removed while it is read: an open file stays readable.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from data_pipeline.errors import DataError

log = logging.getLogger(__name__)

TRAILER = b"mmiblock"
KEPT = 0.9
"""Share of the limit that is left after removing."""
STALE = 3600.0
"""Seconds after which a half-written block belongs to a process that has died."""
TOUCH = 60.0
"""Seconds between two notes of when a block was used."""


class BlockCache:
    """Blocks by key.

    Args:
        folder: made if missing.
        limit: bytes of all blocks together.

    Raises:
        DataError: when the folder cannot be made or written to.

    Attributes:
        failures: blocks that could not be kept because the disk refused.
    """

    def __init__(self, folder: str, limit: int):
        self.folder = Path(folder)
        self.limit = limit
        self.failures = 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked():
                pass
        except OSError as error:
            raise DataError(f"data.storage.cache={folder!r}: cannot be used ({error})") from None

    def get(self, url: str, etag: str, block: int, start: int, stop: int) -> bytes | None:
        """Bytes ``start`` to ``stop`` of a block, fewer where the file ends in it; None without the block."""
        path = self._path(url, etag, block)
        try:
            handle = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            status = os.fstat(handle)
            size = status.st_size - len(TRAILER)
            if size < 0 or os.pread(handle, len(TRAILER), size) != TRAILER:
                with suppress(FileNotFoundError):
                    os.unlink(path)
                return None
            blob = os.pread(handle, max(min(stop, size) - start, 0), start)
        finally:
            os.close(handle)
        if time.time() - status.st_mtime > TOUCH:
            with suppress(FileNotFoundError):
                os.utime(path)
        return blob

    def put(self, url: str, etag: str, block: int, blob: bytes) -> None:
        """Keep a block; not at all where the disk refuses, which is counted and logged."""
        size = len(blob) + len(TRAILER)
        if size > self.limit:
            return
        path = self._path(url, etag, block)
        partial = path.with_name(f"{path.name}.{os.getpid()}-{time.monotonic_ns()}.{size}.partial")
        try:
            path.parent.mkdir(exist_ok=True)
            self._book(partial, size)
            with open(partial, "wb") as file:
                file.write(blob + TRAILER)
                file.flush()
                os.fsync(file.fileno())
            with self._locked():
                os.replace(partial, path)
        except OSError as error:
            self.failures += 1
            log.warning("data.storage.cache: %s is not kept (%s)", partial.name, error)
            with suppress(OSError):
                partial.unlink()

    def held(self) -> int:
        """Bytes of all blocks, half-written ones at their full size."""
        with self._locked():
            return sum(size for _, size, _ in self._scan())

    def _path(self, url: str, etag: str, block: int) -> Path:
        name = hashlib.blake2b(f"{url}\0{etag}\0{block}".encode(), digest_size=16).hexdigest()
        return self.folder / name[:2] / name

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self.folder / "lock", "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _book(self, partial: Path, size: int) -> None:
        """Add to the total, making room first where that would exceed the limit. The empty file says
        how much is booked to whoever counts anew."""
        with self._locked():
            note = self.folder / "total"
            try:
                total = int(note.read_text())
            except (FileNotFoundError, ValueError):
                total = self._make_room(self.limit)  # the first, or one that died while it wrote
            if total + size > self.limit:
                total = self._make_room(min(int(self.limit * KEPT), self.limit - size))
            partial.touch()
            note.write_text(str(total + size))

    def _make_room(self, goal: int) -> int:
        """Remove the blocks used longest ago until at most ``goal`` bytes are left; their bytes."""
        found = sorted(self._scan())
        total, now = sum(size for _, size, _ in found), time.time()
        for used, size, path in found:
            partial = path.suffix == ".partial"
            if (partial and now - used > STALE) or (not partial and total > goal):
                with suppress(FileNotFoundError):
                    path.unlink()
                total -= size
        return total

    def _scan(self) -> Iterator[tuple[float, int, Path]]:
        """Time of last use, size and path of every block and half-written block."""
        for folder in self.folder.iterdir():
            if not folder.is_dir():
                continue
            for path in folder.iterdir():
                try:
                    status = path.stat()
                except FileNotFoundError:
                    continue
                partial = path.suffix == ".partial"
                yield status.st_mtime, int(path.suffixes[-2][1:]) if partial else status.st_size, path
