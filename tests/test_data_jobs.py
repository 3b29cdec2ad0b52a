"""Jobs over whole corpora on Ray Data, and the plan as a Ray dataset."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from data_pipeline.corpus import make_index
from data_pipeline.errors import DataError
from data_pipeline.feed import Division, Feed
from data_pipeline.formats import Document, find_shards, write_documents
from data_pipeline.ray_jobs import (
    dedup_corpus,
    filter_corpus,
    index_corpus,
    plan_dataset,
    recaption_corpus,
)
from data_pipeline.stream import Stream
from tests.data_corpora import documents, make_settings
from tests.test_data_duplicates import scene

pytestmark = pytest.mark.soak


@pytest.fixture(scope="module", autouse=True)
def ray():
    import ray

    from tests.test_data_ray import patiently

    patiently(lambda: ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False))
    yield ray
    ray.shutdown()


def read(folder) -> dict[str, Document]:
    from data_pipeline.ray_jobs import _documents, _item

    found = {}
    for shard, stamp in find_shards(str(folder), str(folder)):
        for document, bad in _documents(_item(0, shard, stamp)):
            assert not bad
            found[document.key] = document
    return found


def short(document: Document) -> str | None:
    return "odd" if document.metadata["index"] % 2 else None


def fails(document: Document) -> str | None:
    if document.metadata["index"] == 30:
        raise ValueError("no such model")
    return None


def agrees(document: Document) -> bool:
    return document.metadata["index"] % 2 == 0


def lost(given: list[Document]) -> list[Document | str]:
    return list(given[1:])


def renamed(given: list[Document]) -> list[Document | str]:
    return [Document("../" + document.key, document.content, {}) for document in given]


def same(given: list[Document]) -> list[Document | str]:
    return list(given)


def shout(given: list[Document]) -> list[Document | str]:
    assert 1 <= len(given) <= 7
    return [
        Document(d.key, [p.upper() if isinstance(p, str) else p for p in d.content], d.metadata)
        for d in given
    ]


def test_filter_keeps_what_is_accepted_and_counts_the_rest(tmp_path):
    write_documents(documents(50), tmp_path / "in", documents_per_shard=12)
    summary = filter_corpus(str(tmp_path / "in"), str(tmp_path / "out"), "tests.test_data_jobs:short")
    assert (summary.documents, dict(summary.dropped)) == (25, {"odd": 25})
    made, given = read(tmp_path / "out"), {d.key: d for d in documents(50)}
    assert sorted(made) == [key for key, d in sorted(given.items()) if d.metadata["index"] % 2 == 0]
    assert all(document.content == given[key].content for key, document in made.items())
    with pytest.raises(DataError, match="holds another job.*choose an empty folder"):
        filter_corpus(str(tmp_path / "in"), str(tmp_path / "out"), "tests.test_data_jobs:fails")
    with pytest.raises(DataError, match="already holds shards"):
        filter_corpus(str(tmp_path / "in"), str(tmp_path / "in"), "tests.test_data_jobs:short")
    with pytest.raises(DataError, match="module:function"):
        filter_corpus(str(tmp_path / "in"), str(tmp_path / "other"), "tests.nothing:short")


def test_recaption_changes_documents_in_batches(tmp_path):
    write_documents(documents(30), tmp_path / "in", documents_per_shard=10)
    where = str(tmp_path / "in"), str(tmp_path / "out"), "tests.test_data_jobs:shout"
    assert recaption_corpus(*where, batch=7).documents == 30
    made = read(tmp_path / "out")
    for document in documents(30):
        expected = [p.upper() if isinstance(p, str) else p for p in document.content]
        assert made[document.key].content == expected


def test_a_job_that_was_stopped_goes_on_and_one_that_fails_says_why(tmp_path):
    write_documents(documents(50), tmp_path / "in", documents_per_shard=12)
    where = str(tmp_path / "in"), str(tmp_path / "out"), "tests.test_data_jobs:short"
    whole = filter_corpus(*where)
    out = tmp_path / "out"
    shards = {path.name: path.read_bytes() for path in out.glob("*.tar")}
    (out / "000001.done.json").unlink()  # stopped before its counts were written
    (out / "000003.done.json").unlink()
    (out / "000003.tar").unlink()
    untouched = (out / "000000.tar").stat().st_mtime_ns
    seen = []
    again = filter_corpus(*where, progress=lambda *done: seen.append(done))
    assert again == whole
    assert seen == [(3, 5), (4, 5), (5, 5)]
    assert {path.name: path.read_bytes() for path in out.glob("*.tar")} == shards
    assert (out / "000000.tar").stat().st_mtime_ns == untouched
    with pytest.raises(DataError, match="no such model"):
        filter_corpus(where[0], str(tmp_path / "bad"), "tests.test_data_jobs:fails")
    with pytest.raises(DataError, match=r"made '../d00000' of 'd00000'; keys must stay"):
        recaption_corpus(where[0], str(tmp_path / "keys"), "tests.test_data_jobs:renamed")
    with pytest.raises(DataError, match="agrees: answered True for 'd00000'; None keeps a document"):
        filter_corpus(where[0], str(tmp_path / "bool"), "tests.test_data_jobs:agrees")
    with pytest.raises(DataError, match="gave 6 answers for 7 documents"):
        recaption_corpus(where[0], str(tmp_path / "worse"), "tests.test_data_jobs:lost", batch=7)


def test_a_job_writes_to_a_url(tmp_path):
    write_documents(documents(20), tmp_path / "in", documents_per_shard=12)
    out = f"file://{tmp_path}/out"
    summary = filter_corpus(str(tmp_path / "in"), out, "tests.test_data_jobs:short")
    assert summary.documents == len(read(tmp_path / "out")) == 10


def test_the_index_made_on_a_cluster_is_the_one_made_here(tmp_path):
    settings = make_settings(tmp_path, {"a": documents(70)})
    folder, seen = str(tmp_path / "a"), []
    here = make_index(folder, settings.tokenizer, 0.1)
    kept = {path.name: path.read_bytes() for path in (tmp_path / "a").glob("*.parquet")}
    for path in (tmp_path / "a").glob("*.parquet"):
        path.unlink()
    there = index_corpus(folder, settings.tokenizer, 0.1, workers=2, progress=lambda *done: seen.append(done))
    assert there == here
    assert seen == [(n, 4) for n in range(1, 5)]
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").glob("*.parquet")} == kept
    (tmp_path / "a" / "000009.tar").write_bytes(b"no tar")
    with pytest.raises(DataError, match="000009.tar: not a tar file"):
        index_corpus(folder, settings.tokenizer, 0.1)


def test_the_commands_work_on_a_cluster(tmp_path):
    """As a user starts them, each with a cluster of its own."""
    import subprocess
    import sys

    settings = make_settings(tmp_path, {"a": documents(30)})
    base = [sys.executable, "-c", "from mmi_megatron.cli import main; main()", "data"]
    source, out = str(tmp_path / "a"), str(tmp_path / "out")
    ran = [
        ["index", source, "--tokenizer", settings.tokenizer, "--ray", "local", "--json"],
        ["filter", source, "--out", out, "--function", "tests.test_data_jobs:short", "--json"],
    ]
    found = []
    for arguments in ran:
        done = subprocess.run([*base, *arguments], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(json.loads(done.stdout.splitlines()[-1]))
    assert found[0]["manifest"] == make_index(source, settings.tokenizer, 0.01)[1]
    assert found[1]["documents"] == 15


def test_dedup_leaves_out_images_that_came_before(tmp_path, monkeypatch):
    one, two = scene(1), scene(2)
    again = scene(1, 90, 60)  # smaller and worse
    given = [
        Document("a", ["first", one, two], {}),
        Document("b", ["copy", again], {}),
        Document("c", ["both", scene(3), again, "end"], {}),
        Document("d", ["text alone"], {}),
    ]
    write_documents(given, tmp_path / "in", documents_per_shard=2)
    summary = dedup_corpus(str(tmp_path / "in"), str(tmp_path / "out"))
    made = read(tmp_path / "out")
    assert made["a"].content == given[0].content
    assert made["c"].content == ["both", given[2].content[1], "end"]
    assert made["d"].content == ["text alone"]
    assert "b" not in made
    assert dict(summary.dropped) == {"all images are doubles": 1}
    # Nothing is hashed in vain: not again where all is done, not before the folder is seen to be fit.
    with monkeypatch.context() as patch:
        patch.setattr("data_pipeline.ray_jobs._rows", None)
        assert dedup_corpus(str(tmp_path / "in"), str(tmp_path / "out")) == summary
        with pytest.raises(DataError, match="holds another job"):
            dedup_corpus(str(tmp_path / "in"), str(tmp_path / "out"), distance=1)


def test_a_shard_that_changes_under_a_job_ends_it(tmp_path):
    from data_pipeline.ray_jobs import _documents, _item

    write_documents(documents(20), tmp_path / "in", documents_per_shard=12)
    (url, stamp), _ = find_shards(str(tmp_path / "in"), "in")
    items = _documents(_item(0, url, stamp))
    assert next(items)[0].key == "d00000"
    write_documents(documents(30), tmp_path / "other", documents_per_shard=30)
    (tmp_path / "other" / "000000.tar").rename(url)
    with pytest.raises(DataError, match="has changed since the job began"):
        next(_documents(_item(0, url, stamp)))


def test_the_plan_as_a_ray_dataset_is_the_plan(tmp_path, ray):
    settings = make_settings(tmp_path, {"a": documents(40)}, workers=1)
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    rows = list(plan_dataset(settings, steps=5, global_rows=4, start=2).iter_rows())
    assert [(row["step"], row["row"]) for row in rows] == [(s, r) for s in range(2, 7) for r in range(4)]
    with Feed(Stream(replace(settings, executor="inline"), global_rows=4), Division(0, 1, 1, 4)) as feed:
        shares = [feed.next() for _ in range(7)][2:]
    for number, share in enumerate(shares):
        checksums = {row: int(value) for row, value in zip(share.rows, share.checksums, strict=True)}
        assert checksums == {row["row"]: row["checksum"] for row in rows[4 * number : 4 * number + 4]}
