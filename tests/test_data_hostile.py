"""Shards made to do harm: refused or quarantined by name, in bounded memory, their neighbours kept."""

import json
import struct
import subprocess
import sys
import tarfile
import zlib
from collections import Counter

import pytest

from data_pipeline.batch import PADDING
from data_pipeline.index import read_sidecar
from data_pipeline.storage import Storage
from data_pipeline.stream import Stream
from tests.data_corpora import cut_jpeg, documents, huge_png, make_settings, picture, write_tar

IMAGE = {"content": [{"text": "hi"}, {"image": "0.png"}]}
GOOD = json.dumps(IMAGE).encode()


def bomb_chunk(kind: bytes) -> bytes:
    """A small PNG with a compressed chunk that swells to 64 MB."""
    blob = picture(1)
    head = b"profile\0\0" if kind == b"iCCP" else b"Comment\0\0"
    body = kind + head + zlib.compress(bytes(64 << 20), 9)
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return blob[:33] + chunk + blob[33:]


HOSTILE = {
    "traversal": (
        [("../../k.json", GOOD), ("../../k.0.png", picture(1))],
        "member name points outside the shard",
    ),
    "absolute": (
        [("/tmp/k.json", GOOD), ("/tmp/k.0.png", picture(1))],
        "member name points outside the shard",
    ),
    "backslash": (
        [("..\\k.json", GOOD), ("..\\k.0.png", picture(1))],
        "member name points outside the shard",
    ),
    "pickle": (
        [("k.json", GOOD), ("k.0.png", picture(1)), ("k.pkl", b"\x80\x04.")],
        "member is a pickle, which is never opened",
    ),
    "pickle as image": (
        [("k.json", GOOD.replace(b"0.png", b"0.pth")), ("k.0.pth", b"\x80\x04.")],
        "member is a pickle, which is never opened",
    ),
    "pickle named as an image": ([("k.json", GOOD), ("k.0.png", b"\x80\x04.")], "image cannot be read"),
    "pickle named as json": ([("k.json", b"\x80\x04."), ("k.0.png", picture(1))], "json cannot be read"),
    "tar in a tar": ([("k.tar", b"x" * 2000)], "no json"),
    "twice": ([("k.json", GOOD), ("k.json", GOOD), ("k.0.png", picture(1))], "member is there twice"),
    "broken json": ([("k.json", b'{"content": ['), ("k.0.png", picture(1))], "json cannot be read"),
    "broken utf-8": ([("k.json", b'{"content": [{"text": "\xc3\x28"}]}')], "json cannot be read"),
    "deep json": ([("k.json", b'{"content": ' + b"[" * 200_000)], "json cannot be read"),
    "huge number": ([("k.json", b'{"content": ' + b"9" * 100_000 + b"}")], "json cannot be read"),
    "json of another kind": ([("k.json", b'{"content": {"text": "x"}}')], "json is not a document"),
    "text as image": ([("k.json", GOOD), ("k.0.png", b"#!/bin/sh\nrm -rf /")], "image cannot be read"),
    "svg as image": (
        [("k.json", GOOD), ("k.0.png", b"<svg xmlns='http://www.w3.org/2000/svg'/>")],
        "image cannot be read",
    ),
    "eps as image": (
        [("k.json", GOOD), ("k.0.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")],
        "image cannot be read",
    ),
    "cut image": ([("k.json", GOOD), ("k.0.png", cut_jpeg())], "image cannot be read"),
    "pixel bomb": ([("k.json", GOOD), ("k.0.png", huge_png())], "image is too large"),
    "text bomb": ([("k.json", GOOD), ("k.0.png", bomb_chunk(b"zTXt"))], "image cannot be read"),
    "image elsewhere": ([("k.json", GOOD.replace(b"0.png", b"../../etc/passwd"))], "image is missing"),
    "image of another": ([("k.json", GOOD.replace(b"0.png", b"d00000.0.png"))], "image is missing"),
    "itself as image": ([("k.json", GOOD.replace(b"0.png", b"json"))], "image is missing"),
    "long key": ([(f"{'k' * 600}.json", GOOD)], "key is too long"),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Settings, and the members of a good shard that hostile ones are put between."""
    folder = tmp_path_factory.mktemp("hostile")
    settings = make_settings(folder, {"a": documents(10)}, failure_limit=0.9)
    with tarfile.open(folder / "a" / "000000.tar") as tar:
        good = [(info.name, tar.extractfile(info).read()) for info in tar]
    return settings, good


def run_over(settings, folder, members):
    """What a stream makes of a shard: ids of the documents that were trained on, and the reasons."""
    folder.mkdir(exist_ok=True)
    if members is not None:
        write_tar(folder / "000000.tar", members)
    settings.sources[0].path = str(folder)
    stream = Stream(settings, global_rows=4)
    seen = set()
    for _ in range(12):
        batch = stream.next().batches(0, 1, 4, 1)[0]
        batch.validate()
        seen |= {int(i) for i in batch.sample_ids if i != PADDING}
    keys = {stream.corpus.sources[0].entry(number).key for number in seen}
    return keys, Counter(line.reason for line in stream.ledger.lines), stream


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_document_is_named_and_its_neighbours_are_trained_on(tmp_path, corpus, name):
    settings, good = corpus
    members, reason = HOSTILE[name]
    half = next(i for i, (own, _) in enumerate(good) if own == "d00005.json")
    keys, reasons, stream = run_over(settings, tmp_path / "s", [*good[:half], *members, *good[half:]])
    assert keys == {f"d{i:05d}" for i in range(10)}
    assert reasons == {reason: 1}
    assert {path.suffix for path in (tmp_path / "s").iterdir()} == {
        ".tar",
        ".parquet",
    }  # nothing was extracted
    assert stream.ledger.lines[0].shard == "000000.tar"


def test_an_image_under_a_wrong_suffix_is_flagged_and_used(tmp_path, corpus):
    settings, good = corpus
    wrong = [("k.json", GOOD.replace(b"0.png", b"0.jpg")), ("k.0.jpg", picture(1))]
    keys, reasons, stream = run_over(settings, tmp_path / "s", [*good, *wrong])
    assert "k" in keys
    assert not reasons
    source = stream.corpus.sources[0]
    table, _ = read_sidecar(Storage(), source.shards[0].url, source.tokenizer)
    flags = dict(zip(table["key"].to_pylist(), table["flags"].to_pylist(), strict=True))
    assert flags["k"] == ["jpg holds png"]
    assert flags["d00000"] == []


def test_interleaved_keys_are_refused_by_name(tmp_path, corpus):
    settings, good = corpus
    mixed = [("k.json", GOOD), ("l.json", GOOD), ("k.0.png", picture(1)), ("l.0.png", picture(2))]
    keys, reasons, stream = run_over(settings, tmp_path / "s", [*good, *mixed])
    assert keys == {f"d{i:05d}" for i in range(10)}
    assert {line.key for line in stream.ledger.lines} == {"k", "l"}
    assert reasons == {"image is missing": 2, "no json": 2}


def test_a_bomb_in_a_colour_profile_does_no_harm(tmp_path, corpus):
    settings, good = corpus
    bomb = [("k.json", GOOD), ("k.0.png", bomb_chunk(b"iCCP"))]
    keys, reasons, _ = run_over(settings, tmp_path / "s", [*good, *bomb])
    assert set(keys) - {"k"} == {f"d{i:05d}" for i in range(10)}
    assert sum(reasons.values()) == (0 if "k" in keys else 1)


def sparse_shard(path, members):
    """A shard whose members have the claimed sizes, on disk as a file with holes."""
    with open(path, "wb") as file:
        for name, blob, size in members:
            info = tarfile.TarInfo(name)
            info.size = size
            file.write(info.tobuf(tarfile.GNU_FORMAT))
            start = file.tell()
            file.write(blob)
            file.seek(start + -(-size // 512) * 512)
        file.truncate(file.tell() + 1024)


MEMORY = """
import resource, sys
from data_pipeline.index import index_shard
from data_pipeline.storage import Storage
from data_pipeline.tokens import load_tokenizer
tokenizer, storage = load_tokenizer(sys.argv[2]), Storage()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
table, about = index_shard(storage, sys.argv[1], storage.stat(sys.argv[1]), tokenizer)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(after - before, about["documents"], sorted(set(table["reason"].to_pylist())))
"""


def test_huge_members_take_no_memory(tmp_path, corpus):
    settings, _ = corpus
    huge = GOOD.replace(b"hi", b"hi" * 10)
    sparse_shard(
        tmp_path / "000000.tar",
        [
            ("a.json", b"{", 3 << 30),
            ("b.json", huge, len(huge)),
            ("b.0.png", picture(1), 4 << 30),
            ("c.json", GOOD, len(GOOD)),
            ("c.0.png", picture(1), len(picture(1))),
            *((f"n{i}.json", b"", 0) for i in range(5000)),
        ],
    )
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "000000.tar"), settings.tokenizer]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    kilobytes, found, reasons = out.split(maxsplit=2)
    assert int(found) == 1
    assert "member is too large" in reasons
    assert int(kilobytes) < 200 << 10


def test_extended_headers_that_claim_gigabytes_are_not_read(tmp_path, corpus):
    settings, _ = corpus
    info = tarfile.TarInfo("@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2 << 30
    path = tmp_path / "000000.tar"
    write_tar(path, [("a.json", b'{"content": [{"text": "hi"}]}')])
    blob = path.read_bytes()[:1024]
    with open(path, "wb") as file:
        file.write(blob + info.tobuf(tarfile.GNU_FORMAT))
        file.truncate(3 << 30)
    command = [sys.executable, "-c", MEMORY, str(path), settings.tokenizer]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    kilobytes, found, reasons = out.split(maxsplit=2)
    assert (int(found), "cut short" in reasons) == (1, True)
    assert int(kilobytes) < 100 << 10


def test_a_shard_of_nothing_but_keys_is_bounded(tmp_path, corpus, monkeypatch):
    from data_pipeline import tar

    monkeypatch.setattr(tar, "MAX_MEMBERS", 50)
    settings, good = corpus
    with pytest.raises(Exception, match="failure_limit|no usable"):
        run_over(settings, tmp_path / "s", [(f"x{i}.json", b"{") for i in range(100)])
    keys, reasons, _ = run_over(settings, tmp_path / "t", [*good, *((f"x{i}.txt", b"") for i in range(100))])
    assert keys == {f"d{i:05d}" for i in range(10)}
    assert reasons["shard has more than 50 members"] == 1
