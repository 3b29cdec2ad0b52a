"""`mmi data` on a machine without torch: every command, from documents to an inspected index."""

import json
import re
import subprocess
import sys
import threading
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from typer.testing import CliRunner

from data_pipeline import cli
from data_pipeline.corpus import make_index, read_manifest
from data_pipeline.errors import DataError
from data_pipeline.formats import Document, write_documents
from data_pipeline.storage import Storage
from data_pipeline.stream import Stream
from data_pipeline.tokens import load_tokenizer
from tests.data_corpora import cut_jpeg, documents, make_settings, picture, write_tar

WITHOUT = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "megatron", "torchvision", "transformers", "diffusers", "timm"):
            raise ModuleNotFoundError(f"blocked: {name}", name=name.split(".")[0])
sys.meta_path.insert(0, Block())
from mmi_megatron.cli import main
for arguments in eval(sys.argv[1]):
    sys.argv = ["mmi", "data", *arguments]
    try:
        main()
    except SystemExit as end:
        if end.code:
            print("FAILED", arguments, end.code)
            raise
assert "torch" not in sys.modules
print("ALL DONE")
"""


def run_without(commands: list[list[str]]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, repr(commands)], capture_output=True, text=True, timeout=500
    )
    assert "ALL DONE" in done.stdout, done.stdout[-2000:] + done.stderr[-3000:]


LONG = {"bench", "serve", "filter", "recaption", "dedup"}
"""Commands that take long or need Ray: the soak tests have them work; here they are asked for help."""


@pytest.fixture
def address(tmp_path):
    """Of a server on this machine that gives out one picture."""
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "a.png").write_bytes(picture(5, (200, 200)))

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "web")))
    threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}/a.png"
    running.shutdown()
    running.server_close()


def test_every_data_command_works_without_torch(tmp_path, address):
    pages, mmc4, obelics, pairs = (tmp_path / name for name in ("pages", "mmc4", "obelics", "pairs"))
    for folder in (pages, mmc4, obelics, pairs):
        folder.mkdir()
    (pages / "0.png").write_bytes(picture(1, (200, 200)))
    words = "<p>Enough words to be a paragraph of a page that is kept.</p>"
    (pages / "a.html").write_text(
        f"<html><body><article>{words}<img src=0.png>{words}</article></body></html>"
    )
    (mmc4 / "x.png").write_bytes(picture(2, (200, 200)))
    info = [{"image_name": "x.png", "matched_text_index": 0, "matched_sim": 0.5}]
    (mmc4 / "a.jsonl").write_text(json.dumps({"text_list": ["one"], "image_info": info}))
    (obelics / "a.png").write_bytes(picture(3, (200, 200)))
    line = {"images": [None, "a.png"], "texts": ["some words", None], "metadata": None}
    (obelics / "a.jsonl").write_text(json.dumps(line))
    write_tar(pairs / "0.tar", [("k.jpg", picture(4, (200, 200), "JPEG")), ("k.txt", b"a caption")])
    (tmp_path / "list.jsonl").write_text(json.dumps({"url": address, "caption": "a picture"}))
    out, token = str(tmp_path / "shards"), str(tmp_path / "t" / "tokenizer.json")
    run = [
        ["storybook", "--out", out, "--stories", "30", "--json"],
        ["tokenizer", out, "--out", token, "--vocab", "300", "--json"],
        ["index", out, "--tokenizer", token, "--workers", "1", "--json"],
        ["inspect", out, "--tokenizer", token, "--out", str(tmp_path / "page.html"), "--rows", "2", "--json"],
        ["import-html", str(pages), "--out", str(tmp_path / "h"), "--json"],
        ["import-mmc4", str(mmc4), "--out", str(tmp_path / "m"), "--drop-single", "0", "--json"],
        ["import-obelics", str(obelics), "--out", str(tmp_path / "o"), "--json"],
        ["import-pairs", str(pairs), "--out", str(tmp_path / "p"), "--json"],
        ["download", str(tmp_path / "list.jsonl"), "--out", str(tmp_path / "d"), "--allow", "127.0.0.1"],
    ]
    names = {command.name for command in cli.app.registered_commands}
    assert {arguments[0] for arguments in run} | LONG == names
    run_without(run + [[name, "--help"] for name in sorted(LONG)])
    for folder in "hmopd":
        assert (tmp_path / folder / "000000.tar").stat().st_size > 0, folder


@pytest.mark.soak
def test_long_commands_and_those_of_a_cluster_work_without_torch(tmp_path):
    write_documents(documents(20), tmp_path / "in")
    source, function = str(tmp_path / "in"), "tests.test_data_jobs:{}"
    common = ["--ray", "local", "--workers", "1", "--json"]
    run_without(
        [
            ["filter", source, "--out", f"{tmp_path}/f", "--function", function.format("short"), *common],
            ["recaption", source, "--out", f"{tmp_path}/r", "--function", function.format("same"), *common],
            ["dedup", source, "--out", f"{tmp_path}/d", *common],
            ["bench", "--images", "64", "--rounds", "1", "--executors", "inline", "--decoder", "pillow"],
        ]
    )
    assert len(list(tmp_path.glob("[frd]/000000.tar"))) == 3


def test_the_index_command_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    settings = make_settings(tmp_path, {"a": documents(70)})
    (tmp_path / "a" / "000002.tar").rename(tmp_path / "later.tar")
    make_index(str(tmp_path / "a"), settings.tokenizer, 0.1)
    (tmp_path / "later.tar").rename(tmp_path / "a" / "000002.tar")
    first = (tmp_path / "a").glob("000000.tar.*.parquet").__next__()
    written = first.stat().st_mtime_ns
    seen = []
    shards, digest = make_index(
        str(tmp_path / "a"), settings.tokenizer, 0.1, workers=2, progress=lambda *done: seen.append(done)
    )
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert first.stat().st_mtime_ns == written
    assert [shard.documents for shard in shards] == [20, 20, 20, 10]
    kept = read_manifest(Storage(), str(tmp_path / "a"), load_tokenizer(settings.tokenizer).fingerprint)
    assert kept[0] == shards
    assert kept[1]["hash"] == digest
    result = CliRunner().invoke(
        cli.app,
        [
            "index",
            str(tmp_path / "a"),
            "--tokenizer",
            settings.tokenizer,
            "--holdout",
            "0.1",
            "--workers",
            "1",
            "--json",
        ],
    )
    assert json.loads(result.stdout.splitlines()[-1])["manifest"] == digest
    (tmp_path / "a" / "000003.tar").write_bytes(b"no tar")
    with pytest.raises(DataError, match="000003.tar: not a tar file"):
        make_index(str(tmp_path / "a"), settings.tokenizer, 0.1)


def test_an_index_that_is_gone_is_named_or_made_again(tmp_path):
    settings = make_settings(tmp_path, {"a": documents(70)})
    Stream(settings)
    for path in (tmp_path / "a").glob("*.tar.*.parquet"):
        path.unlink()
    stream = Stream(settings, global_rows=4)  # made again: the shards are on this machine
    assert len(list((tmp_path / "a").glob("*.tar.*.parquet"))) == 4
    for path in (tmp_path / "a").glob("*.tar.*.parquet"):
        path.unlink()
    with pytest.raises(DataError, match="its index is gone or another one; run `mmi data index`"):
        stream.next()


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.text = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_shows_documents_masks_and_statistics_and_runs_nothing(tmp_path):
    made = documents(40)
    made[0].content[0] = "<script>alert(1)</script> one"
    made[1].metadata["language"] = "de<b>"
    made[2].content[1] = cut_jpeg()
    settings = make_settings(tmp_path, {"a": made})
    page = tmp_path / "page.html"
    given = [
        "inspect",
        str(tmp_path / "a"),
        "--tokenizer",
        settings.tokenizer,
        "--out",
        str(page),
        "--rows",
        "30",
    ]
    result = CliRunner().invoke(cli.app, [*given, "--context-length", "64", "--image-tokens", "4", "--json"])
    assert result.exit_code == 0, result.output
    text = page.read_text()
    parsed = Tags()
    parsed.feed(text)
    names = {tag for tag, _ in parsed.tags}
    assert not names & {"script", "b>", "iframe", "link"}
    assert not re.search(r"(?:src|href)=\"?http", text)
    assert "de&lt;b&gt;" in text
    pictures = [attrs for tag, attrs in parsed.tags if tag == "img"]
    assert all(attrs["src"].startswith("data:image/png;base64,") for attrs in pictures)
    assert len(pictures) > 20
    classes = [attrs.get("class") for tag, attrs in parsed.tags if tag == "span"]
    assert {"t", "t s", "t off s"} <= set(classes)
    assert sum(tag == "svg" for tag, _ in parsed.tags) == 6
    assert "tokens of padding" in text
    assert "left out: image cannot be read" in text
    shown = "".join(parsed.text)
    assert "d00003" in shown
    assert "manifest" in shown


def test_what_cannot_be_inspected_is_one_line(tmp_path):
    settings = make_settings(tmp_path, {"a": [Document("k", ["hi", picture(1)], {})]})
    given = [
        "inspect",
        str(tmp_path / "none"),
        "--tokenizer",
        settings.tokenizer,
        "--out",
        str(tmp_path / "p"),
    ]
    result = CliRunner().invoke(cli.app, given)
    assert result.exit_code == 1
    assert "no *.tar shards" in result.output
