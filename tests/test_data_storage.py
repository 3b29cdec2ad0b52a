"""Storage: local files, any fsspec URL, the cache under concurrent processes, forks; tar headers."""

import io
import multiprocessing
import os
import tarfile
import threading
from dataclasses import replace

import fsspec
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from data_pipeline.cache import BlockCache
from data_pipeline.corpus import make_index
from data_pipeline.errors import BadSample, DataError
from data_pipeline.remote import Changed, Gone, Transient
from data_pipeline.settings import StorageSettings
from data_pipeline.storage import MOST_OPEN, LocalFiles, Range, Stamp, Storage, StorageError, StoredFile
from data_pipeline.stream import Stream
from data_pipeline.tar import CUT_SHORT, MAX_EXTENDED, NotTar, headers
from tests.data_corpora import documents, make_settings

BLOB = np.random.default_rng(0).bytes(200_003)


class Bytes:
    """A file in memory, as ``tar.Reader``."""

    def __init__(self, blob: bytes):
        self.blob, self.size, self.most = blob, len(blob), 0

    def read(self, offset: int, size: int) -> bytes:
        self.most = max(self.most, size)
        return self.blob[offset : offset + size]


class Flaky:
    """A remote of one object whose answers follow a script; then they are right."""

    def __init__(self, script):
        self.script, self.asked = list(script), []

    async def read(self, url, offset, size, etag):
        self.asked.append((offset, size))
        if self.script:
            raise self.script.pop(0)
        return BLOB[offset : offset + size]


def flaky(*script, **changes) -> tuple[Storage, Flaky]:
    storage = Storage(StorageSettings(**{"deadline": 30.0, **changes}))
    remote = Flaky(script)
    storage._remotes["x"] = remote
    return storage, remote


def test_ranges_of_a_local_file_are_checked(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(BLOB)
    storage = Storage()
    stamp = storage.stat(str(path))
    assert stamp.size == len(BLOB)
    assert storage.read(Range(f"file://{path}", 5, 10, stamp.etag)) == BLOB[5:15]
    short, gone = storage.read_many([Range(str(path), len(BLOB) - 3, 10), Range(str(tmp_path / "no"), 0, 1)])
    assert (short.reason, gone.reason) == ("shard has changed", "shard cannot be read")
    os.utime(path, ns=(1, 1))
    with pytest.raises(BadSample, match="written to since"):
        storage.read(Range(str(path), 5, 10, stamp.etag))


def test_local_files_are_opened_once_a_few_at_a_time_and_closed(tmp_path, monkeypatch):
    places = []
    for number in range(40):
        (tmp_path / f"{number}").write_bytes(b"%02d" % number)
        places.append(Range(str(tmp_path / f"{number}"), 0, 2))
    held, most, opened = set(), 0, 0
    real_open, real_close = os.open, os.close

    def count_open(*given):
        nonlocal most, opened
        handle = real_open(*given)
        held.add(handle)
        most, opened = max(most, len(held)), opened + 1
        return handle

    def count_close(handle):
        held.discard(handle)
        real_close(handle)

    monkeypatch.setattr(os, "open", count_open)
    monkeypatch.setattr(os, "close", count_close)
    with LocalFiles() as files:
        assert [files.read(place) for place in places[:3] * 4] == [b"00", b"01", b"02"] * 4
        assert opened == 3
        assert [files.read(place) for place in places] == [b"%02d" % number for number in range(40)]
        stale = files.read(places[39]._replace(etag="other"))
        assert isinstance(stale, BadSample) and stale.reason == "shard has changed"
    assert most <= MOST_OPEN + 1
    assert not held


@pytest.mark.parametrize("cached", [False, True], ids=["no cache", "cache"])
def test_any_fsspec_url_is_read_and_a_change_is_named(tmp_path, cached):
    files = fsspec.filesystem("memory")
    files.pipe_file("/box/x.bin", BLOB)
    cache = {"cache": str(tmp_path / "cache"), "block_bytes": 10_000} if cached else {}
    storage = Storage(StorageSettings(**cache))
    stamp = storage.stat("memory://box/x.bin")
    draw = np.random.default_rng(1)
    wanted = []
    for start in draw.integers(0, len(BLOB) - 40_000, 50).tolist():
        wanted.append(Range("memory://box/x.bin", start, int(draw.integers(0, 40_000)), stamp.etag))
    for own, found in zip(wanted, storage.read_many(wanted), strict=True):
        assert found == BLOB[own.offset : own.offset + own.size]
    files.pipe_file("/box/x.bin", BLOB[::-1])
    if cached:  # what is kept is of the object that was asked for
        assert storage.read(wanted[0]) == BLOB[wanted[0].offset : wanted[0].offset + wanted[0].size]
    changed = Storage().read_many([wanted[1]._replace(size=5)])[0]
    assert changed.reason == "shard has changed"
    assert [url for url, _ in storage.find("memory://box", ".bin")] == ["memory:///box/x.bin"]
    with pytest.raises(StorageError, match="no such file"):
        storage.stat("memory://box/none")
    with pytest.raises(DataError, match="nonsense://"):
        storage.stat("nonsense://x")


def test_what_may_pass_is_tried_again_and_what_is_final_is_not():
    storage, remote = flaky(Transient("busy"), Transient("reset"), TimeoutError())
    assert storage.read(Range("x://b/f", 7, 100, "e")) == BLOB[7:107]
    assert storage.counts["retries"] == 3
    assert remote.asked == [(7, 100)] * 4
    for final, reason in ((Gone("x"), "shard cannot be read"), (Changed("etag"), "shard has changed")):
        storage, remote = flaky(final)
        with pytest.raises(BadSample, match=reason):
            storage.read(Range("x://b/f", 7, 100, "e"))
        assert len(remote.asked) == 1
    storage, remote = flaky(PermissionError("AccessDenied"))
    with pytest.raises(StorageError, match="x://b/f: access denied"):
        storage.read(Range("x://b/f", 0, 1))
    storage, _ = flaky(*[Transient("SlowDown (status 503)")] * 99, deadline=0.5)
    with pytest.raises(
        StorageError, match=r"x://b/f: failed \d+ times .*data.storage.deadline=0.5.*SlowDown"
    ):
        storage.read(Range("x://b/f", 0, 1))


def test_a_short_object_is_named_and_neighbours_are_fetched_as_one():
    storage, remote = flaky()
    near = [Range("x://f", start, 100, "e") for start in (5000, 0, 200, 100)]
    far = Range("x://f", 190_000, 10, "e")
    found = storage.read_many([*near, far, Range("x://f", len(BLOB) - 1, 2, "e")])
    assert found[:5] == [BLOB[r.offset : r.offset + r.size] for r in (*near, far)]
    assert found[5].reason == "shard has changed"
    assert sorted(remote.asked)[0] == (0, 5100)
    assert len(remote.asked) < 4


def test_requests_under_way_are_bounded():
    import asyncio

    storage, remote = flaky(concurrency=3)
    under_way = most = 0

    async def read(url, offset, size, etag):
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.01)
        under_way -= 1
        return BLOB[offset : offset + size]

    remote.read = read
    storage.read_many([Range(f"x://{i}", 0, 5, "e") for i in range(30)])
    assert most == 3


def _forked(storage, queue):
    queue.put(storage.read(Range("memory://fork/x", 3, 4)))


def test_storage_works_in_a_fork_of_a_process_that_has_used_it():
    fsspec.filesystem("memory").pipe_file("/fork/x", BLOB)
    storage = Storage()
    assert storage.read(Range("memory://fork/x", 0, 3)) == BLOB[:3]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_forked, args=(storage, queue))
    child.start()
    assert queue.get(timeout=60) == BLOB[3:7]
    child.join(60)
    assert child.exitcode == 0


def _hammer(folder, limit, seed, failures):
    cache = BlockCache(folder, limit)
    draw = np.random.default_rng(seed)
    for _ in range(150):
        block = int(draw.integers(0, 40))
        expected = bytes([block]) * (1000 + block)
        start = int(draw.integers(0, 900))
        found = cache.get("u", "e", block, start, 2000)
        if found is None:
            cache.put("u", "e", block, expected)
        elif found != expected[start:]:
            failures.put((block, len(found)))


def test_the_cache_is_right_and_within_its_limit_under_concurrent_processes(tmp_path):
    limit, context = 15_000, multiprocessing.get_context("fork")
    failures = context.Queue()
    workers = [context.Process(target=_hammer, args=(str(tmp_path), limit, i, failures)) for i in range(4)]
    for worker in workers:
        worker.start()
    cache = BlockCache(str(tmp_path), limit)
    most = 0
    while any(worker.is_alive() for worker in workers):
        most = max(most, cache.held())
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert failures.empty()
    assert 0 < most <= limit
    assert not list(tmp_path.glob("*/*.partial"))


def test_the_cache_forgets_what_was_used_longest_ago_and_mends_itself(tmp_path):
    cache = BlockCache(str(tmp_path), 5000)
    for block in range(4):
        cache.put("u", "e", block, bytes(1000))
        os.utime(cache._path("u", "e", block), (1000 + block, 1000 + block))
    cache.get("u", "e", 0, 0, 10)  # used now
    cache.put("u", "e", 4, bytes(1000))
    assert [cache.get("u", "e", block, 0, 1) for block in range(5)] == [b"\0", None, b"\0", b"\0", b"\0"]
    assert cache.get("u", "other", 0, 0, 1) is None
    cache._path("u", "e", 2).write_bytes(b"cut")
    assert cache.get("u", "e", 2, 0, 1) is None
    (tmp_path / "total").write_text("nonsense")
    cache.put("u", "e", 5, bytes(1000))
    assert cache.get("u", "e", 5, 998, 2000) == b"\0\0"
    assert cache.held() <= 5000
    with pytest.raises(DataError, match="data.storage.cache"):
        BlockCache(str(tmp_path / "total"), 5000)


def test_a_block_is_fetched_once_by_the_threads_that_want_it(tmp_path):
    storage, remote = flaky(cache=str(tmp_path), block_bytes=50_000)
    threads = [
        threading.Thread(target=storage.read, args=(Range("x://f", 10 + i, 100, "e"),)) for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(remote.asked) <= 2  # a thread may look just before the block appears
    assert storage.counts["cache_hits"] + storage.counts["cache_misses"] <= 8


def test_a_stream_from_a_url_is_the_one_from_disk(tmp_path):
    here = make_settings(tmp_path, {"a": documents(50)}, holdout=0.1)
    files = fsspec.filesystem("memory")
    for path in (tmp_path / "a").glob("*.tar"):
        files.pipe_file(f"/corpus/{path.name}", path.read_bytes())
    there = replace(here, sources=[replace(here.sources[0], path="memory://corpus")])
    with pytest.raises(DataError, match="mmi data index"):
        Stream(there)
    # Another process has memory of its own, so the index is made on disk and taken along.
    make_index(str(tmp_path / "a"), here.tokenizer, here.holdout)
    local = Stream(here, global_rows=4)
    storage = Storage()
    from data_pipeline.corpus import open_source, write_manifest
    from data_pipeline.index import index_shard

    shards = []
    for shard in local.corpus.sources[0].shards:
        url = f"memory://corpus/{shard.url.rpartition('/')[2]}"
        table, about = index_shard(storage, url, storage.stat(url), local.tokenizer)
        shards.append(replace(shard, url=url, stamp=Stamp(about["size"], about["etag"])))
    write_manifest(storage, "memory://corpus", shards, local.tokenizer.fingerprint, here.holdout)
    assert len(open_source(there.sources[0], local.tokenizer, storage, 0.1)) == 50
    stream = Stream(there, global_rows=4)
    assert stream.corpus.manifest == local.corpus.manifest
    for _ in range(5):
        one, other = stream.next().batches(0, 1, 4, 1)[0], local.next().batches(0, 1, 4, 1)[0]
        assert np.array_equal(one.images, other.images)
        assert np.array_equal(one.tokens, other.tokens)
    stream.load_state(local.next().state)
    assert stream.next().rows == local.next().rows


NAMES = st.text(
    st.characters(codec="utf-8", exclude_characters="\0/\ufffd", exclude_categories=["Cs"]), min_size=1
)
KINDS = st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])


@given(st.lists(st.tuples(NAMES.map(lambda n: n * 7), st.binary(max_size=1500)), max_size=12), KINDS)
@examples(max_examples=60, deadline=None)
def test_headers_are_those_that_tarfile_reads(members, kind):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=kind) as tar:
        for name, blob in members:
            info = tarfile.TarInfo(name)
            info.size = len(blob)
            tar.addfile(info, io.BytesIO(blob))
    blob = file.getvalue()
    with tarfile.open(fileobj=io.BytesIO(blob)) as tar:
        expected = [(info.name, info.offset_data, info.size) for info in tar]
    found = list(headers(Bytes(blob)))
    assert [(h.name, h.offset, h.size) for h in found] == expected
    assert [blob[h.offset : h.offset + h.size] for h in found] == [content for _, content in members]


def _tar(*infos: tuple[tarfile.TarInfo, bytes], kind: int = tarfile.PAX_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=kind) as tar:
        for info, blob in infos:
            info.size = len(blob) if info.isreg() else 0
            tar.addfile(info, io.BytesIO(blob))
    return file.getvalue()


def test_a_huge_extended_header_is_not_read():
    info = tarfile.TarInfo("k" * (2 * MAX_EXTENDED))
    for kind in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        file = Bytes(_tar((info, b"x"), kind=kind))
        assert [h.problem for h in headers(file)] == [CUT_SHORT]
        assert file.most <= MAX_EXTENDED


def test_links_devices_and_sparse_files_are_no_plain_files():
    infos = []
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
        info = tarfile.TarInfo("k.json")
        info.type, info.linkname = kind, "/etc/passwd"
        infos.append((info, b""))
    sparse = tarfile.TarInfo("s.json")
    sparse.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
    found = list(headers(Bytes(_tar(*infos, (sparse, b"abc")))))
    assert {h.problem for h in found} == {"member is not a plain file"}
    assert len(found) == 5


@given(st.binary(min_size=512, max_size=4096))
@examples(max_examples=100, deadline=None)
def test_any_bytes_are_no_tar_file_or_end_as_cut_short(blob):
    try:
        found = list(headers(Bytes(blob)))
    except NotTar:
        return
    assert not found or found[-1].problem


@given(st.integers(0, 4), st.integers(0, 511), st.integers(0, 255))
@example(0, 148, 9)
@example(0, 148, 32)
@examples(max_examples=200, deadline=None)
def test_a_changed_byte_of_a_header_is_found_or_does_no_harm(number, place, value):
    members = [(tarfile.TarInfo(f"k{i}.json"), bytes([i]) * 100) for i in range(4)]
    blob = bytearray(_tar(*members))
    whole = list(headers(Bytes(bytes(blob))))
    at = 1024 * number + place
    if number == 4 or blob[at] == value:
        return
    blob[at] = value
    try:
        found = list(headers(Bytes(bytes(blob))))
    except NotTar:
        return
    if found == whole and (148 + 6 <= place < 156 or (place == 148 and value == ord(" "))):
        return  # what ends the digits of the checksum, or its leading zero: no part of the sum itself
    assert len(found) == number + 1
    assert found[-1].problem == CUT_SHORT


def test_a_stored_file_reads_ahead_and_holds_little():
    storage, remote = flaky()
    with StoredFile(storage, "x://f", Stamp(len(BLOB), "e"), ahead=50_000) as file:
        assert b"".join(file.read(at, 512) for at in range(0, len(BLOB), 512)) == BLOB
        assert len(file._held) <= 50_000
    assert len(remote.asked) <= 6
