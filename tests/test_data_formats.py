"""Shards: what is written is read back, and hostile ones are refused or counted by name."""

import json
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from data_pipeline.errors import BadSample, DataError, TooManyFailures
from data_pipeline.formats import (
    Document,
    ShardWriter,
    find_shards,
    parse_content,
    read_document,
    read_range,
    scan_file,
)
from data_pipeline.index import ShardIndex, is_held_out
from data_pipeline.index import index_shard as index_one
from data_pipeline.quarantine import Failure, Ledger, LedgerFile
from data_pipeline.storage import Storage
from data_pipeline.stream import Stream
from data_pipeline.tokens import load_tokenizer
from tests.data_corpora import documents, make_settings, make_tokenizer, picture, write_tar

GOOD = json.dumps({"content": [{"text": "hi"}, {"image": "0.png"}], "metadata": {}}).encode()

CROWDED = json.dumps({"content": [{"image": "0.png"}] * 65_537}).encode()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(make_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def index_shard(path, tokenizer):
    """Entries, and (key, reason, detail) of the bad documents."""
    storage = Storage()
    table, about = index_one(storage, str(path), storage.stat(str(path)), tokenizer)
    index = ShardIndex(table, about)
    bad = table.slice(about["documents"]).select(["key", "reason", "detail"]).to_pylist()
    entries = [index.entry(row) for row in range(len(index))]
    good = [entry._replace(tokens=entry.tokens.tolist()) for entry in entries]
    return good, [tuple(line.values()) for line in bad]


def reasons(path, tokenizer):
    good, bad = index_shard(path, tokenizer)
    return [entry.key for entry in good], Counter((key, reason) for key, reason, _ in bad)


def test_documents_come_back_as_they_were_written(tmp_path):
    settings = make_settings(tmp_path, {"a": documents(45)})
    assert [Path(shard).name for shard, _ in find_shards(settings.sources[0].path, "a")] == [
        "000000.tar",
        "000001.tar",
        "000002.tar",
    ]
    stream = Stream(settings)
    for number, original in enumerate(documents(45)):
        read = stream.corpus.sources[0].document(number)
        assert (read.key, read.content, read.metadata) == (original.key, original.content, original.metadata)


def test_writer_splits_by_bytes_and_leaves_no_half_shard(tmp_path):
    made = documents(6)
    with ShardWriter(tmp_path / "small", bytes_per_shard=400) as writer:
        for document in made:
            writer.write(document)
    assert len(list((tmp_path / "small").glob("*.tar"))) > 2
    assert (writer.summary.documents, writer.summary.images) == (6, sum(len(d.images) for d in made))
    with pytest.raises(KeyError), ShardWriter(tmp_path / "broken") as writer:
        writer.write(made[0])
        raise KeyError
    assert list((tmp_path / "broken").iterdir()) == []


@pytest.mark.parametrize("key", ["a.b", "../a", "", "a b"])
def test_writer_refuses_keys_that_would_not_come_back(tmp_path, key):
    with ShardWriter(tmp_path) as writer, pytest.raises(ValueError, match="key"):
        writer.write(Document(key, ["x"]))


def test_writer_refuses_a_key_twice_and_a_folder_with_shards(tmp_path):
    with ShardWriter(tmp_path) as writer:
        writer.write(Document("a", ["x"]))
        with pytest.raises(ValueError, match="once"):
            writer.write(Document("a", ["x"]))
    with pytest.raises(DataError, match="already holds shards"):
        ShardWriter(tmp_path)


@pytest.mark.parametrize(
    ("members", "key", "reason"),
    [
        ([("k.json", b"{"), ("k.0.png", picture(1))], "k", "json cannot be read"),
        ([("k.json", b'{"content": [{"text": "\xff"}]}')], "k", "json cannot be read"),
        ([("k.json", b'{"content": [{"text": "\\ud800"}]}')], "k", "json cannot be read"),
        ([("k.json", b"[" * 100_000)], "k", "json cannot be read"),
        ([("k.json", b"[]")], "k", "json is not a document"),
        ([("k.json", b'{"content": [{"text": 3}]}')], "k", "json is not a document"),
        ([("k.json", b'{"content": [], "metadata": 3}')], "k", "json is not a document"),
        ([("k.json", b'{"content": [{"text": ""}]}')], "k", "document is empty"),
        ([("k.json", GOOD)], "k", "image is missing"),
        ([("k.json", CROWDED), ("k.0.png", picture(1))], "k", "document has too many images"),
        ([("k.json", GOOD), ("k.1.png", picture(1))], "k", "image is missing"),
        ([("k.0.png", picture(1)), ("k.bin", picture(1))], "k", "no json"),
        ([("../k.json", GOOD), ("../k.0.png", picture(1))], "../k", "member name points outside the shard"),
        (
            [("/etc/k.json", GOOD), ("/etc/k.0.png", picture(1))],
            "/etc/k",
            "member name points outside the shard",
        ),
        ([("k.json", GOOD), ("k.json", GOOD), ("k.0.png", picture(1))], "k", "member is there twice"),
    ],
)
def test_a_bad_document_is_counted_and_its_neighbours_are_kept(tmp_path, tokenizer, members, key, reason):
    good = [("a.json", GOOD), ("a.0.png", picture(1))]
    write_tar(tmp_path / "s.tar", [*good, *members, ("z.json", GOOD), ("z.0.png", picture(1))])
    assert reasons(tmp_path / "s.tar", tokenizer) == (["a", "z"], Counter({(key, reason): 1}))


def test_scattered_members_of_a_key_are_refused_by_name(tmp_path, tokenizer):
    write_tar(
        tmp_path / "s.tar",
        [
            ("a.json", GOOD),
            ("a.0.png", picture(1)),
            ("b.json", GOOD),
            ("b.0.png", picture(1)),
            ("a.1.png", picture(1)),
        ],
    )
    good, bad = reasons(tmp_path / "s.tar", tokenizer)
    assert good == ["b"]
    assert bad["a", "members of the key do not lie together"] == 1


def test_links_are_not_followed(tmp_path, tokenizer):
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        link = tarfile.TarInfo("a.json")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    assert reasons(tmp_path / "s.tar", tokenizer)[1]["a", "member is not a plain file"] == 1


def test_a_shard_cut_short_anywhere_loses_only_what_is_missing(tmp_path, tokenizer):
    settings = make_settings(tmp_path, {"a": documents(8)})
    whole = Path(find_shards(settings.sources[0].path, "a")[0][0]).read_bytes()
    everything = [entry.key for entry in index_shard(tmp_path / "a" / "000000.tar", tokenizer)[0]]
    cuts = [*range(512, len(whole) - 10240, 700), 512 * 20, 512 * 33]
    for number, cut in enumerate(cuts):
        path = tmp_path / f"cut{number}.tar"
        path.write_bytes(whole[:cut])
        good, bad = reasons(path, tokenizer)
        assert good == everything[: len(good)]
        assert len(good) < len(everything) or cut > len(whole) - 10241
        assert bad["", "shard is cut short or broken"] == 1, cut


def test_a_broken_header_in_the_middle_is_not_taken_for_the_end(tmp_path, tokenizer):
    settings = make_settings(tmp_path, {"a": documents(8)})
    path = find_shards(settings.sources[0].path, "a")[0][0]
    members = [m for _, group in scan_file(path) for m in group]
    blob = bytearray(Path(path).read_bytes())
    start = members[len(members) // 2].offset - 512
    blob[start : start + 512] = b"x" * 512
    (tmp_path / "broken.tar").write_bytes(blob)
    good, bad = reasons(tmp_path / "broken.tar", tokenizer)
    assert 0 < len(good) < 8
    assert bad["", "shard is cut short or broken"] == 1


@pytest.mark.parametrize("blob", [b"", b"not a tar file at all" * 100])
def test_what_is_no_tar_file_is_an_error_that_names_it(tmp_path, tokenizer, blob):
    path = tmp_path / "s.tar"
    path.write_bytes(blob)
    with pytest.raises(DataError, match="s.tar: not a tar file"):
        index_shard(path, tokenizer)


def test_index_is_kept_beside_the_shard_and_made_anew_when_it_changes(tmp_path, tokenizer):
    write_tar(tmp_path / "s.tar", [("a.json", GOOD), ("a.0.png", picture(1))])
    first = index_shard(tmp_path / "s.tar", tokenizer)
    (sidecar,) = tmp_path.glob("s.tar.*.parquet")
    stamp = sidecar.stat().st_mtime_ns
    assert index_shard(tmp_path / "s.tar", tokenizer) == first
    assert sidecar.stat().st_mtime_ns == stamp
    write_tar(tmp_path / "s.tar", [("bb.json", GOOD), ("bb.0.png", picture(1))] * 1 + [("c.json", GOOD)])
    good, bad = index_shard(tmp_path / "s.tar", tokenizer)
    assert [entry.key for entry in good] == ["bb"]
    assert bad[0][0] == "c"
    sidecar.write_bytes(sidecar.read_bytes()[:50])
    assert [entry.key for entry in index_shard(tmp_path / "s.tar", tokenizer)[0]] == ["bb"]


def test_reading_past_a_shortened_shard_is_a_bad_sample(tmp_path):
    (tmp_path / "s").write_bytes(b"abc")
    with pytest.raises(BadSample, match="shard has changed"):
        read_range(tmp_path / "s", 1, 3)
    with pytest.raises(BadSample, match="cannot be read"):
        read_range(tmp_path / "none", 0, 1)


def test_no_shards_is_an_error_that_says_what_to_do(tmp_path):
    with pytest.raises(DataError, match="source 'x': no .*import"):
        find_shards(str(tmp_path), "x")


def test_a_prompt_is_read_with_the_files_it_names(tmp_path):
    (tmp_path / "0.png").write_bytes(picture(3))
    (tmp_path / "doc.json").write_bytes(GOOD)
    document = read_document(tmp_path / "doc.json")
    assert document.content == ["hi", picture(3)]
    (tmp_path / "0.png").unlink()
    with pytest.raises(DataError, match="doc.json"):
        read_document(tmp_path / "doc.json")
    assert parse_content(GOOD)[0] == [("text", "hi"), ("image", "0.png")]


def test_held_out_documents_depend_on_their_key_and_come_in_proportion():
    keys = [f"key{i}" for i in range(20_000)]
    held = [is_held_out(key, 0.1) for key in keys]
    assert abs(sum(held) / len(held) - 0.1) < 0.01
    assert all(is_held_out(key, 0.2) for key, was in zip(keys, held, strict=True) if was)
    assert not any(is_held_out(key, 0.0) for key in keys)


def test_ledger_counts_names_and_stops_the_run():
    ledger = Ledger(limit=0.1)
    ledger.record({"a": 100}, [Failure("a", "0.tar", f"k{i}", "image cannot be read") for i in range(9)])
    ledger.record({"a": 100}, [Failure("a", "0.tar", "k0", "image cannot be read")])
    assert len(ledger) == 9
    assert ledger.counts("a") == {"image cannot be read": 10}
    with pytest.raises(TooManyFailures, match=r"source 'a'.*failure_limit.*image cannot be read.*1.tar.*kx"):
        ledger.record({"a": 0}, [Failure("a", "1.tar", "kx", "image cannot be read") for _ in range(20)])


def test_a_ledger_on_disk_names_each_bad_sample_once_through_kills_and_resumes(tmp_path):
    ledger = Ledger(limit=0.1)
    first, second = (Failure("a", "0.tar", key, 'rea"son', "detail") for key in ("ké", "l"))
    ledger.record({"a": 3}, [first, second, first])
    path = tmp_path / "quarantine" / "replica_0000.jsonl"
    LedgerFile(tmp_path / "quarantine", "replica_0000").add(3, [first], ledger.totals())
    with path.open("a") as file:
        file.write('{"step": 4, "source": "a", "sha')  # killed as it wrote
    again = LedgerFile(tmp_path / "quarantine", "replica_0000")
    for step in (2, 5):
        again.add(step, [first, second], ledger.totals())
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    common = {"source": "a", "shard": "0.tar", "reason": 'rea"son', "detail": "detail"}
    assert lines == [{"step": 3, "key": "ké", **common}, {"step": 2, "key": "l", **common}]
    assert json.loads(path.with_suffix(".json").read_text()) == {"a": {"seen": 3, 'rea"son': 3}}
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="ledger of bad samples cannot be written"):
        LedgerFile(tmp_path / "file", "x").add(0, [first], {})


def test_data_pipeline_needs_neither_torch_nor_megatron():
    code = """
import sys, pkgutil, importlib
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "megatron", "torchvision", "transformers", "mmi_megatron"):
            raise ImportError(f"blocked: {name}")
sys.meta_path.insert(0, Block())
import data_pipeline
names = [m.name for m in pkgutil.walk_packages(data_pipeline.__path__, "data_pipeline.")]
for name in names:
    importlib.import_module(name)
assert len(names) > 15, names
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
