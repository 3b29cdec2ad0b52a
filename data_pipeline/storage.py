"""Bytes of files: ``pread`` for local paths, ranges of objects for every URL that fsspec knows.

A range of an object is asked for with the ETag that the index recorded, and its length is checked: what
comes back is right to the byte or is an error that names the object. What may pass (a server that is
busy, a broken connection, a stalled or short answer) is tried again after a random pause until
``deadline``; the pauses are drawn from 0 up to a bound that doubles (full jitter), so that many workers
do not come back at once. S3 credentials come from where AWS looks for them (environment, files, roles)
and are never logged.

Every process has its own filesystem and event loop: neither survives a fork.
"""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NamedTuple, Self, TypeVar

from data_pipeline.cache import BlockCache
from data_pipeline.errors import BadSample, DataError
from data_pipeline.remote import Changed, Gone, Remote, Transient, open_remote
from data_pipeline.settings import StorageSettings

T = TypeVar("T")
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0
"""Seconds: upper bounds of the first and of the last pauses before a range is asked for again."""
JOIN, MOST = 64 << 10, 16 << 20
"""Ranges of one object that lie closer than ``JOIN`` bytes are asked for as one, of at most ``MOST``."""

MOST_OPEN = 32
"""Local files that a task holds open at a time."""


class StorageError(DataError):
    """A file that could not be read or written for a reason that is not the file's content."""


@dataclass(frozen=True)
class Stamp:
    """Identity of a file's content: bytes, and an ETag (of a local file, its time of change in ns)."""

    size: int
    etag: str


class Range(NamedTuple):
    """Bytes of a file; ``etag`` is checked unless it is empty."""

    url: str
    offset: int
    size: int
    etag: str = ""


def is_local(url: str) -> bool:
    """Whether it is a path of this machine (``file://`` too)."""
    return "://" not in url or url.startswith("file://")


def local_path(url: str) -> str:
    """The path of a local URL."""
    return url.removeprefix("file://")


def join(folder: str, name: str) -> str:
    """A name in a folder."""
    return f"{folder.rstrip('/')}/{name}"


class Storage:
    """Reads and writes files; made anew by itself in a forked process.

    Args:
        settings: limits and the cache.

    Attributes:
        counts: requests, retries, bytes, cache_hits and cache_misses so far, of this process.
    """

    def __init__(self, settings: StorageSettings | None = None):
        self.settings = settings or StorageSettings()
        self.counts: Counter[str] = Counter()
        self.cache = (
            BlockCache(self.settings.cache, self.settings.cache_bytes) if self.settings.cache else None
        )
        self._pid = 0
        self._start()

    def __reduce__(self) -> tuple[Any, ...]:
        return Storage, (self.settings,)

    # Reading

    def read(self, wanted: Range) -> bytes:
        """Read one range.

        Raises:
            BadSample: when the file is gone or has changed.
            StorageError: when it cannot be read for any other reason.
        """
        (found,) = self.read_many([wanted])
        if isinstance(found, BadSample):
            raise found
        return found

    def read_many(self, wanted: Sequence[Range]) -> list[bytes | BadSample]:
        """Read ranges at once: those of objects together and in parallel, in the order given.

        Raises:
            StorageError: when the storage fails; what is wrong with a file comes back in its place.
        """
        with LocalFiles() as files:
            found = [files.read(r) if is_local(r.url) else b"" for r in wanted]
        far = [index for index, r in enumerate(wanted) if not is_local(r.url)]
        if far:
            for index, answer in zip(far, self._run(self._fetch([wanted[i] for i in far])), strict=True):
                found[index] = answer
        return found

    def stat(self, url: str) -> Stamp:
        """Size and ETag of a file.

        Raises:
            StorageError: when it is not there or cannot be looked at.
        """
        if is_local(url):
            try:
                return _stamp(os.stat(local_path(url)))
            except OSError as error:
                raise StorageError(f"{url}: {error.strerror or error}") from None
        try:
            return Stamp(*self._run(self._insist(url, lambda remote: remote.stat(url))))
        except Gone:
            raise StorageError(f"{url}: no such file") from None

    def read_file(self, url: str, limit: int = 1 << 30) -> bytes | None:
        """A whole file of at most ``limit`` bytes; None where there is none.

        Raises:
            StorageError: when it cannot be read, is larger, or changes while it is read.
        """
        if is_local(url):
            try:
                with open(local_path(url), "rb") as file:
                    blob = file.read(limit + 1)
            except FileNotFoundError:
                return None
            except OSError as error:
                raise StorageError(f"{url}: {error.strerror or error}") from None
        else:
            try:
                size, etag = self._run(self._insist(url, lambda remote: remote.stat(url)))
                blob = self.read(Range(url, 0, min(size, limit + 1), etag)) if size else b""
            except Gone:
                return None
            except BadSample as bad:
                raise StorageError(f"{url}: {bad}") from None
        if len(blob) > limit:
            raise StorageError(f"{url}: more than {limit} bytes")
        return blob

    def find(self, folder: str, suffix: str) -> list[tuple[str, Stamp]]:
        """Files right in a folder whose names end so, sorted by name.

        Raises:
            StorageError: when the folder cannot be listed.
        """
        if is_local(folder):
            try:
                with os.scandir(local_path(folder)) as entries:
                    found = [(e.path, _stamp(e.stat())) for e in entries if e.name.endswith(suffix)]
            except FileNotFoundError:
                return []
            except OSError as error:
                raise StorageError(f"{folder}: {error.strerror or error}") from None
        else:
            listed = self._run(self._insist(folder, lambda remote: remote.list(folder)))
            found = [(url, Stamp(size, etag)) for url, size, etag in listed if url.endswith(suffix)]
        return sorted(found)

    def write(self, url: str, blob: bytes) -> None:
        """Write a file, whole or not at all.

        Raises:
            StorageError: when it cannot be written.
        """
        if not is_local(url):
            self._run(self._insist(url, lambda remote: remote.write(url, blob)))
            return
        path = local_path(url)
        partial = f"{path}.{os.getpid()}-{threading.get_ident()}.partial"
        try:
            with open(partial, "wb") as file:
                file.write(blob)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except OSError as error:
            if os.path.exists(partial):
                os.unlink(partial)
            raise StorageError(f"{url}: {error.strerror or error}") from None

    # The event loop of this process

    def _start(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._remotes: dict[str, Remote] = {}
        self._under_way: dict[tuple[str, str, int], asyncio.Task[bytes]] = {}

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        if self._pid != os.getpid():
            self._start()
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._slots = asyncio.Semaphore(self.settings.concurrency)
                threading.Thread(target=self._loop.run_forever, name="mmi-storage", daemon=True).start()
        future: Future[T] = asyncio.run_coroutine_threadsafe(work, self._loop)
        return future.result()

    async def _insist(self, url: str, ask: Callable[[Remote], Awaitable[T]]) -> T:
        """Ask until it works, the answer is final, or the deadline has passed."""
        settings = self.settings
        start, pause, tries = 0.0, FIRST_PAUSE, 0
        while True:
            tries += 1
            async with self._slots:
                start = start or time.monotonic()
                self.counts["requests"] += 1
                patience = max(min(settings.timeout, start + settings.deadline - time.monotonic()), 0.01)
                try:
                    return await asyncio.wait_for(ask(self._remote(url)), patience)
                except TimeoutError:
                    reason = f"no answer in {patience:.2g} s"
                except Transient as error:
                    reason = str(error)
                except PermissionError as error:
                    raise StorageError(f"{url}: access denied ({error}); check the credentials") from None
            wait = random.uniform(0, pause)
            if time.monotonic() + wait >= start + settings.deadline:
                raise StorageError(
                    f"{url}: failed {tries} times within data.storage.deadline={settings.deadline:g} s; "
                    f"the last: {reason}"
                )
            self.counts["retries"] += 1
            await asyncio.sleep(wait)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _remote(self, url: str) -> Remote:
        scheme = url.partition("://")[0]
        if scheme not in self._remotes:
            self._remotes[scheme] = open_remote(scheme, self.settings.concurrency)
        return self._remotes[scheme]

    # Ranges

    async def _fetch(self, wanted: Sequence[Range]) -> list[bytes | BadSample]:
        """Neighbours are fetched as one range; through the cache where there is one."""
        groups = _groups(wanted)
        spans = [_span([wanted[i] for i in group]) for group in groups]
        blobs = await asyncio.gather(*(self._one(span) for span in spans))
        found: list[bytes | BadSample] = [b""] * len(wanted)
        for group, span, blob in zip(groups, spans, blobs, strict=True):
            for index in group:
                found[index] = blob if isinstance(blob, BadSample) else _cut(blob, span, wanted[index])
        return found

    async def _one(self, wanted: Range) -> bytes | BadSample:
        try:
            cached = self.cache is not None and wanted.etag
            return await (self._blocks(wanted) if cached else self._range(wanted))
        except Gone:
            return BadSample("shard cannot be read", f"{wanted.url}: no such file")
        except Changed as error:
            return BadSample("shard has changed", f"{wanted.url}: {error}")

    async def _range(self, wanted: Range) -> bytes:
        if wanted.size == 0:
            return b""
        blob = await self._insist(
            wanted.url, lambda remote: remote.read(wanted.url, wanted.offset, wanted.size, wanted.etag)
        )
        self.counts["bytes"] += len(blob)
        return blob

    async def _blocks(self, wanted: Range) -> bytes:
        """A range put together from whole blocks; those that the cache lacks are fetched."""
        size, end = self.settings.block_bytes, wanted.offset + wanted.size
        pieces = []
        for block in range(wanted.offset // size, -(-end // size)):
            start, stop = max(wanted.offset - block * size, 0), min(end - block * size, size)
            pieces.append(self._piece(wanted.url, wanted.etag, block, start, stop))
        return b"".join(await asyncio.gather(*pieces))

    async def _piece(self, url: str, etag: str, block: int, start: int, stop: int) -> bytes:
        assert self.cache is not None
        held = await asyncio.to_thread(self.cache.get, url, etag, block, start, stop)
        if held is not None:
            self.counts["cache_hits"] += 1
            return held
        key = (url, etag, block)
        if key not in self._under_way:  # who asks for a block that is under way waits for the same
            self.counts["cache_misses"] += 1
            self._under_way[key] = asyncio.ensure_future(self._fetch_block(*key))
        return (await asyncio.shield(self._under_way[key]))[start:stop]

    async def _fetch_block(self, url: str, etag: str, block: int) -> bytes:
        assert self.cache is not None
        size = self.settings.block_bytes
        try:
            blob = await self._range(Range(url, block * size, size, etag))
            await asyncio.to_thread(self.cache.put, url, etag, block, blob)
            return blob
        finally:
            del self._under_way[url, etag, block]


class LocalFiles:
    """Files of this machine that ranges are read of; each is opened and its ETag checked once, as that
    costs more than to read a short range. For use by one thread, and not for long: close it."""

    def __init__(self) -> None:
        self._open: dict[tuple[str, str], int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def read(self, wanted: Range) -> bytes | BadSample:
        """The bytes, or what is wrong with the file."""
        url, offset, size, etag = wanted
        try:
            handle = self._open.get((url, etag))
            if handle is None:
                handle = self._opened(url, etag)
            blob = os.pread(handle, size, offset)
        except OSError as error:
            return BadSample("shard cannot be read", str(error))
        except BadSample as bad:
            return bad
        if len(blob) != size:
            return BadSample("shard has changed", f"{len(blob)} of {size} bytes at {offset}")
        return blob

    def _opened(self, url: str, etag: str) -> int:
        if len(self._open) == MOST_OPEN:
            os.close(self._open.pop(next(iter(self._open))))
        handle = os.open(local_path(url), os.O_RDONLY)
        if etag and _etag(os.fstat(handle)) != etag:
            os.close(handle)
            raise BadSample("shard has changed", f"{url}: written to since it was indexed")
        self._open[url, etag] = handle
        return handle


class StoredFile:
    """A file as ``tar.Reader`` and for ranges in a row: what lies ahead is fetched with what is asked for.

    Args:
        storage: where it is.
        url: of the file.
        stamp: of its content; every range is checked against it.
        ahead: bytes fetched at a time; of a local file nothing is held.
    """

    def __init__(self, storage: Storage, url: str, stamp: Stamp, ahead: int = 8 << 20):
        self.storage, self.url, self.stamp, self.ahead = storage, url, stamp, ahead
        self.size = stamp.size
        self._start, self._held = 0, b""
        self._handle = os.open(local_path(url), os.O_RDONLY) if is_local(url) else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._handle is not None:
            os.close(self._handle)

    def read(self, offset: int, size: int) -> bytes:
        """Bytes at a place, fewer where the file ends.

        Raises:
            BadSample, StorageError: as ``Storage.read``.
        """
        size = max(min(size, self.size - offset), 0)
        if self._handle is not None:
            return os.pread(self._handle, size, offset)
        at = offset - self._start
        if at < 0 or at + size > len(self._held):
            length = min(max(size, self.ahead), self.size - offset)
            self._held = self.storage.read(Range(self.url, offset, length, self.stamp.etag)) if size else b""
            self._start = at = offset
            return self._held[:size]
        return self._held[at : at + size]


def _stamp(status: os.stat_result) -> Stamp:
    return Stamp(status.st_size, _etag(status))


def _etag(status: os.stat_result) -> str:
    return f"{status.st_size}-{status.st_mtime_ns}"


def _groups(wanted: Sequence[Range]) -> list[list[int]]:
    """Numbers of the ranges that are fetched together: of one file, near each other, not too many bytes."""
    order = sorted(range(len(wanted)), key=lambda i: (wanted[i].url, wanted[i].etag, wanted[i].offset))
    groups: list[list[int]] = []
    span = Range("", 0, 0)
    for index in order:
        own = wanted[index]
        joined = _span([span, own])
        near = own.offset <= span.offset + span.size + JOIN and joined.size <= MOST
        if groups and near and (span.url, span.etag) == (own.url, own.etag):
            groups[-1].append(index)
            span = joined
        else:
            groups.append([index])
            span = own
    return groups


def _cut(blob: bytes, span: Range, wanted: Range) -> bytes | BadSample:
    """A range out of what was fetched for several; the file may have ended before it."""
    start = wanted.offset - span.offset
    own = blob[start : start + wanted.size]
    if len(own) == wanted.size:
        return own
    place = f"{len(own)} of {wanted.size} bytes at {wanted.offset}"
    return BadSample("shard has changed", f"{wanted.url}: {place}")


def _span(ranges: Sequence[Range]) -> Range:
    start = min(r.offset for r in ranges)
    end = max(r.offset + r.size for r in ranges)
    return Range(ranges[0].url, start, end - start, ranges[0].etag)
