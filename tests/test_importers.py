"""Importers and their commands: what is kept, what is dropped and counted, what is refused."""

import base64
import gzip
import io
import itertools
import json
import os
import zipfile

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from data_pipeline.cli import app
from data_pipeline.errors import DataError
from data_pipeline.importers.common import checked_image
from data_pipeline.importers.html import import_html
from data_pipeline.importers.mmc4 import Filters, assign, import_mmc4
from data_pipeline.importers.obelics import import_obelics
from data_pipeline.importers.pairs import import_pairs
from data_pipeline.settings import SourceSettings
from data_pipeline.stream import Stream
from tests.data_corpora import (
    cut_jpeg,
    documents,
    huge_png,
    make_settings,
    make_tokenizer,
    photo,
    picture,
    read_corpus,
    write_tar,
)

BIG = picture(5, (70, 80))
RUN = CliRunner()


def test_an_empty_folder_is_an_error(tmp_path):
    for run in (import_html, import_mmc4, import_obelics, import_pairs):
        with pytest.raises(DataError, match=f"{tmp_path}: no "):
            run(tmp_path, tmp_path / "out")
    (tmp_path / "a.html").write_text("no image")
    with pytest.raises(DataError, match=r"no document is kept \(page without an image 1\)"):
        import_html(tmp_path, tmp_path / "out")


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_images_are_kept_as_they_are_or_stored_as_png():
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 70, 3), dtype=np.uint8))
    for blob in (photo(), BIG, encoded(rgb, "WEBP"), encoded(rgb.convert("L"), "JPEG")):
        assert checked_image(blob) is blob
    deep = Image.fromarray(np.full((70, 70), 30_000, np.uint16))
    for blob in (encoded(rgb, "GIF"), encoded(rgb.convert("CMYK"), "JPEG"), encoded(deep, "PNG")):
        stored = Image.open(io.BytesIO(checked_image(blob)))
        assert (stored.format, stored.mode, stored.size) == ("PNG", "RGB", (70, 70))
    assert abs(int(np.asarray(stored)[0, 0, 0]) - 30_000 / 257) <= 1


# ---------------------------------------------------------------------------------------------- MMC4


def mmc4(count=4, images=3, **changes):
    """A document whose image n belongs to sentence n."""
    matrix = [[0.3 + 0.01 * n if n == t else 0.1 for t in range(count)] for n in range(images)]
    infos = [
        {
            "image_name": f"{n}.png",
            "matched_text_index": min(n, count - 1),
            "matched_sim": matrix[n][min(n, count - 1)],
            "image_base64": base64.b64encode(picture(n)).decode(),
        }
        for n in range(images)
    ]
    record = {"text_list": [f"sentence {t}" for t in range(count)], "similarity_matrix": matrix}
    return {**record, "image_info": infos, "url": "u", **changes}


def import_lines(tmp_path, records, run=import_mmc4, **kwargs):
    folder = tmp_path / "in"
    folder.mkdir(exist_ok=True)
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (folder / "docs.jsonl").write_text("\n".join(lines), encoding="utf-8")
    summary = run(folder, tmp_path / "out", **kwargs)
    return summary, read_corpus(tmp_path / "out")


def test_mmc4_puts_each_image_beside_its_sentence(tmp_path):
    summary, found = import_lines(tmp_path, [mmc4() for _ in range(60)])
    assert summary.as_dict() == {"documents": 60, "images": 180, "dropped": {}}
    before = 0
    for content in found.values():
        assert [p for p in content if isinstance(p, str)] == [f"sentence {t} " for t in range(4)]
        for n in range(3):
            image, text = content.index(picture(n)), content.index(f"sentence {n} ")
            assert abs(image - text) == 1
            before += image < text
    assert 60 < before < 120


def test_mmc4_filters_of_the_paper(tmp_path):
    low = mmc4()
    low["image_info"][1]["matched_sim"] = low["similarity_matrix"][1][1] = 0.2
    none = mmc4(images=0)
    many = mmc4(count=10, images=8)
    single = [mmc4(images=1) for _ in range(100)]
    summary, found = import_lines(tmp_path, [low, none, many, *single])
    assert [p for p in found["docs-1"] if isinstance(p, bytes)] == [picture(0), picture(2)]
    assert {p for p in found["docs-3"] if isinstance(p, bytes)} == {picture(n) for n in range(2, 8)}
    kept = summary.documents - 2
    assert 35 < kept < 65
    assert summary.as_dict()["dropped"] == {
        "document with one image": 100 - kept,
        "document without an image": 1,
        "image beyond 6 in its document": 2,
        "image unlike its sentence": 1,
    }


def test_mmc4_assigns_anew_over_the_images_that_are_left(tmp_path):
    record = mmc4(count=2, images=3)
    # Image 0 owned sentence 0 and cannot be read: image 1, once second there, now takes it.
    record["similarity_matrix"] = [[0.9, 0.3], [0.8, 0.5], [0.4, 0.5]]
    for n, (index, similarity) in enumerate([(0, 0.9), (1, 0.5), (1, 0.5)]):
        record["image_info"][n].update(matched_text_index=index, matched_sim=similarity)
    record["image_info"][0]["image_base64"] = base64.b64encode(cut_jpeg()).decode()
    summary, found = import_lines(tmp_path, [record])
    content = found["docs-1"]
    assert abs(content.index(picture(1)) - content.index("sentence 0 ")) == 1
    assert abs(content.index(picture(2)) - content.index("sentence 1 ")) == 1
    assert summary.dropped == {"image cannot be read": 1}


def test_mmc4_with_more_images_than_sentences_keeps_the_best(tmp_path):
    record = mmc4(count=1, images=3)
    record["similarity_matrix"] = [[0.3], [0.5], [0.4]]
    for n in range(3):
        record["image_info"][n].update(matched_text_index=0, matched_sim=record["similarity_matrix"][n][0])
    _, found = import_lines(tmp_path, [record], filters=Filters(drop_single=0.0))
    assert [p for p in found["docs-1"] if isinstance(p, bytes)] == [picture(1)]


def test_assignment_is_optimal():
    rng = np.random.default_rng(0)
    for _ in range(200):
        rows = int(rng.integers(1, 5))
        columns = int(rng.integers(rows, 7))
        costs = rng.normal(size=(rows, columns)).round(1).tolist()
        chosen = assign(costs)
        assert len(set(chosen)) == rows
        best = min(
            sum(costs[r][c] for r, c in enumerate(columns_))
            for columns_ in itertools.permutations(range(columns), rows)
        )
        assert sum(costs[r][c] for r, c in enumerate(chosen)) == pytest.approx(best)
    assert assign([]) == []


@pytest.mark.parametrize(
    "bad",
    [
        "{",
        '"\ud800"'.encode("utf-8", "replace").decode() + "x",
        json.dumps([1]),
        json.dumps({}),
        json.dumps(mmc4(text_list=[1, 2, 3, 4])),
        json.dumps(mmc4(image_info=[3])),
        json.dumps(mmc4(similarity_matrix=[[1]])),
        json.dumps(mmc4(similarity_matrix=[["a"] * 4] * 3)),
        json.dumps(mmc4(similarity_matrix=None, image_info=[{"matched_text_index": 9, "matched_sim": 0.5}])),
        json.dumps(
            mmc4(similarity_matrix=None, image_info=[{"matched_text_index": True, "matched_sim": 0.5}])
        ),
    ],
)
def test_mmc4_counts_documents_that_are_none(tmp_path, bad):
    summary, found = import_lines(tmp_path, [mmc4(), bad, mmc4()])
    assert len(found) == 2
    assert sum(summary.dropped.values()) == 1
    assert next(iter(summary.dropped)).startswith("json")


def test_mmc4_from_zip_gz_tar_and_images_beside(tmp_path):
    folder = tmp_path / "in"
    (folder / "images").mkdir(parents=True)
    line = json.dumps(mmc4()).encode() + b"\n"
    with zipfile.ZipFile(folder / "a.jsonl.zip", "w") as archive:
        archive.writestr("a.jsonl", line)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(line))
    bare = mmc4()
    for info in bare["image_info"]:
        del info["image_base64"]
    (folder / "c.jsonl").write_text(json.dumps(bare))
    for n in range(3):
        (folder / "images" / f"{n}.png").write_bytes(picture(n))
    members = [("k1.json", json.dumps(bare).encode()), *((f"k1.{n}.jpg", picture(n)) for n in range(3))]
    write_tar(folder / "d.tar", [*members, ("k2.json", b"{"), ("../k3.json", b"{}")])
    summary = import_mmc4(folder, tmp_path / "out")
    assert sorted(read_corpus(tmp_path / "out")) == ["a-1", "b-1", "c-1", "k1"]
    assert summary.images == 12
    assert summary.dropped == {"json cannot be read": 1, "member name points outside the shard": 1}


def test_mmc4_image_names_do_not_leave_the_folder(tmp_path):
    (tmp_path / "secret.png").write_bytes(BIG)
    record = mmc4()
    for info, name in zip(
        record["image_info"], ("../secret.png", str(tmp_path / "secret.png"), "x.png"), strict=True
    ):
        del info["image_base64"]
        info["image_name"] = name
    summary, _ = import_lines(tmp_path, [mmc4(), record])
    assert summary.dropped["image outside the folder"] == 2
    assert summary.dropped["image is missing"] == 1


def test_a_compressed_list_cut_short_is_counted(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    lines = b"".join(json.dumps(mmc4(url=os.urandom(3000).hex())).encode() + b"\n" for _ in range(50))
    blob = gzip.compress(lines)
    (folder / "a.jsonl.gz").write_bytes(blob[: len(blob) // 2])
    (folder / "b.jsonl.zip").write_bytes(b"PK no zip")
    summary = import_mmc4(folder, tmp_path / "out")
    assert 0 < summary.documents < 50
    assert summary.dropped["file cannot be read to its end"] == 2


# ------------------------------------------------------------------------------------ OBELICS, pairs


def test_obelics_keeps_the_order_and_counts_what_is_missing(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.png").write_bytes(BIG)
    data = base64.b64encode(picture(1)).decode()
    good = {
        "images": [None, "a.png", "http://localhost/x.png", None, {"base64": data}, "none.png"],
        "texts": ["first", None, None, " second ", None, None],
        "metadata": json.dumps([None, {"src": "a"}]),
        "general_metadata": json.dumps({"url": "u"}),
    }
    bad = [
        {"images": [None], "texts": [None]},
        {"images": ["a.png"], "texts": ["both"]},
        {"images": [None], "texts": []},
        {"images": [None], "texts": [3]},
    ]
    text = {"images": [None], "texts": ["only text"]}
    summary, found = import_lines(tmp_path, [good, *bad, text], import_obelics)
    assert found == {"docs-1": ["first\n", BIG, "second\n", picture(1)]}
    assert summary.dropped == {
        "image on the network": 1,
        "image is missing": 1,
        "json is not an OBELICS document": 4,
        "document without an image": 1,
    }


def test_obelics_from_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    folder = tmp_path / "in"
    folder.mkdir()
    table = pyarrow.table(
        {
            "images": [[None, {"bytes": BIG}], [{"bytes": cut_jpeg()}, None]],
            "texts": [["t", None], [None, "u"]],
        }
    )
    parquet.write_table(table, folder / "a.parquet")
    summary = import_obelics(folder, tmp_path / "out")
    assert read_corpus(tmp_path / "out") == {"a-1": ["t\n", BIG]}
    assert summary.dropped == {"image cannot be read": 1, "document without an image": 1}
    (folder / "a.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="a.parquet: not a Parquet file"):
        import_obelics(folder, tmp_path / "again")


def test_pairs_in_the_layout_of_img2dataset(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    write_tar(
        folder / "00000.tar",
        [
            *(("0.jpg", photo()), ("0.txt", b"a caption"), ("0.json", b'{"url": "u"}')),
            *(("1.jpg", photo()), ("1.json", b'{"caption": "from json"}')),
            *(("2.jpg", cut_jpeg()), ("2.txt", b"x")),
            ("3.txt", b"no image"),
            ("4.jpg", photo()),
            *(("5.jpg", huge_png()), ("5.txt", b"x")),
            *(("6.jpg", photo()), ("6.txt", b"\xff\xfe")),
            *(("7.jpg", photo()), ("7.json", b"["), ("7.txt", b"x")),
            *(("../8.jpg", photo()), ("../8.txt", b"x")),
            *(("1.jpg", photo()), ("1.txt", b"again")),
        ],
    )
    summary = import_pairs(folder, tmp_path / "out")
    assert read_corpus(tmp_path / "out") == {"0": [photo(), "a caption"], "1": [photo(), "from json"]}
    assert summary.dropped == {
        "image cannot be read": 1,
        "pair without an image": 1,
        "pair without a caption": 1,
        "image is too large": 1,
        "caption is not UTF-8": 1,
        "json cannot be read": 1,
        "member name points outside the shard": 1,
        "members of the key do not lie together": 1,
    }


def test_short_captions_are_dropped_on_request(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    members = [
        (f"{i}.{kind}", blob) for i in range(1, 6) for kind, blob in (("jpg", photo()), ("txt", b"one " * i))
    ]
    write_tar(folder / "a.tar", members)
    with pytest.raises(DataError, match="--tokenizer"):
        import_pairs(folder, tmp_path / "out", min_tokens=3)
    tokenizer = make_tokenizer(tmp_path)
    summary = import_pairs(folder, tmp_path / "out", 4, tokenizer)
    assert summary.documents + summary.dropped["caption under 4 tokens"] == 5
    assert 0 < summary.documents < 5


def test_imported_pairs_train(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    members = [(f"{i}.{kind}", b) for i in range(9) for kind, b in (("jpg", photo()), ("txt", b"one two"))]
    write_tar(folder / "a.tar", members)
    import_pairs(folder, tmp_path / "out")
    settings = make_settings(tmp_path, {"a": documents(3)})
    settings.sources = [SourceSettings("p", str(tmp_path / "out"), 1.0, "pairs")]
    batch = Stream(settings, global_rows=2).next().batches(0, 1, 2, 1)[0]
    assert len(batch.images)


# -------------------------------------------------------------------------------------------- commands


def test_commands_end_with_a_summary_and_json_on_request(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "page.html").write_text("<p>hello</p><img src='big.png'><img src='none.png'>")
    (folder / "big.png").write_bytes(BIG)
    run = RUN.invoke(app, ["import-html", str(folder), "--out", str(tmp_path / "a"), "--json"])
    assert run.exit_code == 0
    assert json.loads(run.stdout) == {"documents": 1, "images": 1, "dropped": {"image is missing": 1}}
    run = RUN.invoke(app, ["import-html", str(folder), "--out", str(tmp_path / "b")])
    assert run.exit_code == 0
    for word in ("documents", "images", "image is missing"):
        assert word in run.stdout


def test_storybook_and_tokenizer_commands(tmp_path):
    out = tmp_path / "stories"
    run = RUN.invoke(app, ["storybook", "--out", str(out), "--stories", "7", "--seed", "3", "--json"])
    summary = json.loads(run.stdout)
    assert (summary["documents"], summary["dropped"]) == (7, {})
    (out / "zz.tar").write_bytes((out / "000000.tar").read_bytes()[:2000])
    file = tmp_path / "made" / "tokenizer.json"
    run = RUN.invoke(app, ["tokenizer", str(out), "--out", str(file), "--vocab", "270", "--json"])
    assert json.loads(run.stdout)["documents"] == 8
    assert json.loads(run.stdout)["dropped"] == {"shard is cut short or broken": 1}
    settings = make_settings(tmp_path, {"a": documents(2)}, tokenizer=str(file))
    assert Stream(settings).tokenizer.size == 270


@pytest.mark.parametrize(
    "arguments",
    [
        ["import-html", "{empty}", "--out", "{out}"],
        ["import-html", "{empty}/none", "--out", "{out}"],
        ["import-mmc4", "{empty}", "--out", "{out}"],
        ["import-obelics", "{empty}", "--out", "{out}"],
        ["import-pairs", "{empty}", "--out", "{out}"],
        ["storybook", "--out", "{full}"],
        ["storybook", "--out", "{out}", "--stories", "0"],
        ["storybook", "--out", "{file}"],
        ["tokenizer", "{empty}", "--out", "{out}/t.json"],
        ["tokenizer", "{full}", "--out", "{out}/t.json", "--vocab", "10"],
        ["import-pairs", "{full}", "--out", "{out}", "--min-tokens", "3"],
    ],
)
def test_a_mistake_is_one_line_and_exit_code_1(tmp_path, arguments):
    places = {name: tmp_path / name for name in ("empty", "out", "full", "file")}
    places["empty"].mkdir()
    places["full"].mkdir()
    write_tar(places["full"] / "000000.tar", [("a.json", b"{}")])
    places["file"].write_text("x")
    run = RUN.invoke(app, [argument.format(**places) for argument in arguments])
    assert run.exit_code == 1
    assert run.stdout == ""
    assert run.stderr.startswith("error: ")
    assert run.stderr.count("\n") == 1
    assert "Traceback" not in run.stderr
