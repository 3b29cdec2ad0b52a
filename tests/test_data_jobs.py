"""Jobs over whole corpora on Ray Data, and the plan as a Ray dataset."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from data_pipeline.errors import DataError
from data_pipeline.feed import Division, Feed
from data_pipeline.formats import Document, write_documents
from data_pipeline.ray_jobs import (
    dedup_corpus,
    filter_corpus,
    perceptual_hash,
    plan_dataset,
    recaption_corpus,
)
from data_pipeline.stream import Stream
from tests.data_corpora import documents, make_settings

pytestmark = pytest.mark.soak


@pytest.fixture(scope="module", autouse=True)
def ray():
    import ray

    from tests.test_data_ray import patiently

    patiently(lambda: ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False))
    yield ray
    ray.shutdown()


def scene(seed: int, size: int = 160, quality: int = 90) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC).save(file, "JPEG", quality=quality)
    return file.getvalue()


def read(folder) -> dict[str, Document]:
    from data_pipeline.ray_jobs import _documents

    found = {}
    for shard in sorted(folder.glob("*.tar")):
        for document, bad in _documents(str(shard)):
            assert not bad
            found[document.key] = document
    return found


def short(document: Document) -> str | None:
    return "odd" if document.metadata["index"] % 2 else None


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
    with pytest.raises(DataError, match="already holds shards"):
        filter_corpus(str(tmp_path / "in"), str(tmp_path / "out"), "tests.test_data_jobs:short")
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


def test_dedup_leaves_out_images_that_came_before(tmp_path):
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


def test_a_perceptual_hash_stays_and_tells_apart():
    def bits(one: bytes, other: bytes) -> int:
        hashes = [perceptual_hash(Image.open(io.BytesIO(blob))) for blob in (one, other)]
        return (hashes[0] ^ hashes[1]).bit_count()

    assert max(bits(scene(n), scene(n, 90, 60)) for n in range(8)) <= 4
    assert min(bits(scene(n), scene(n + 1)) for n in range(8)) >= 12


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
