"""Downloads from a server on loopback that misbehaves: bounded, counted by reason, resumed; and the rule
of addresses."""

import io
import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from data_pipeline import cli
from data_pipeline.download import run as run_module
from data_pipeline.download.addresses import AddressRule, CheckedResolver, Forbidden
from data_pipeline.download.fetch import Limits
from data_pipeline.download.lists import Filters, read_lists
from data_pipeline.download.run import RECIPES, Download, download
from data_pipeline.errors import DataError, SettingsError
from data_pipeline.formats import parse_content, read_range, scan_file
from data_pipeline.importers import mmc4
from tests.data_corpora import make_tokenizer

LOOPBACK = ["127.0.0.0/8"]


def image(value: int, size: int = 80) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (size, size), (value % 256, 9, 7)).save(file, "PNG")
    return file.getvalue()


class Server(ThreadingHTTPServer):
    daemon_threads = True
    asked: Counter
    under_way = most = 0
    lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    """``/ok/N`` is an image; the other paths misbehave as they are named."""

    def log_message(self, *_):
        pass

    def send(self, status=200, blob=b"", kind="image/png", **headers):
        self.send_response(status)
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        for name, value in {"Content-Type": kind, "Content-Length": str(len(blob)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(blob)

    def do_GET(self):
        server = self.server
        with server.lock:
            server.asked[self.path] += 1
            server.under_way += 1
            server.most = max(server.most, server.under_way)
        try:
            _, name, number = (self.path.split("/") + ["0"])[:3]
            getattr(self, f"get_{name}")(int(number))
        except (BrokenPipeError, ConnectionResetError):
            pass
        finally:
            with server.lock:
                server.under_way -= 1

    def get_ok(self, number):
        time.sleep(0.01)
        self.send(blob=image(number))

    def get_flaky(self, number):
        if self.server.asked[self.path] == 1:
            self.send(503)
        else:
            self.send(blob=image(number))

    def get_broken(self, number):
        self.send(500)

    def get_missing(self, number):
        self.send(404)

    def get_stall(self, number):
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b"x" * 10)
        self.wfile.flush()
        time.sleep(3)

    def get_short(self, number):
        self.send(blob=image(number)[:40], Content_Length="500")

    def get_endless(self, number):
        self.send_response(200)
        self.end_headers()
        for _ in range(3000):
            self.wfile.write(bytes(1 << 16))

    def get_large(self, number):
        self.send(Content_Length=str(1 << 40))

    def get_page(self, number):
        self.send(blob=b"<html>", kind="text/html")

    def get_text(self, number):
        self.send(blob=b"no image at all")

    def get_icon(self, number):
        self.send(blob=image(number, 10))

    def get_gzip(self, number):
        self.send(blob=bytes(50), Content_Encoding="gzip")

    def get_noai(self, number):
        self.send(blob=image(number), X_Robots_Tag="noai")

    def get_loop(self, number):
        self.send(302, Location=self.path)

    def get_moved(self, number):
        self.send(301, Location=f"/ok/{number}")

    def get_inside(self, number):
        self.send(302, Location="http://169.254.169.254/latest/meta-data")

    def get_file(self, number):
        self.send(302, Location="file:///etc/passwd")

    def get_garbage(self, number):
        self.wfile.write(b"\0\xff nonsense\r\n\r\n")


@pytest.fixture
def server():
    running = Server(("127.0.0.1", 0), Handler)
    running.asked = Counter()
    threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield running
    running.shutdown()
    running.server_close()


def write_pairs(path: Path, port: int, paths: list[str], **columns) -> None:
    table = {"URL": [f"http://127.0.0.1:{port}/{p}" for p in paths], "TEXT": [f"text {p}" for p in paths]}
    pq.write_table(pa.table({**table, **columns}), path)


def read(folder: Path) -> dict[str, list]:
    found = {}
    for shard in sorted(folder.glob("*.tar")):
        for key, members in scan_file(shard):
            blobs = {m.name: read_range(shard, m.offset, m.size) for m in members}
            found[key] = [blobs.get(value, value) for _, value in parse_content(blobs["json"])[0]]
    return found


MISBEHAVIOUR = {
    "broken": "status 500",
    "missing": "status 404",
    "stall": "timeout",
    "short": "broken answer",
    "endless": "image is too large",
    "large": "image is too large",
    "page": "not an image",
    "text": "image cannot be read",
    "icon": "icon",
    "gzip": "compressed answer",
    "noai": "opted out",
    "loop": "too many redirects",
    "inside": "address is not allowed",
    "file": "address is not allowed",
    "garbage": "broken answer",
}


def quick(lists: Path, out: Path, **changes) -> Download:
    limits = Limits(connections=8, per_host=8, timeout=1.5, retries=1, max_bytes=1 << 20)
    return Download(lists, out, **{"limits": limits, "allow": LOOPBACK, "documents_per_shard": 8, **changes})


def test_what_misbehaves_is_left_out_by_reason_and_the_rest_comes(tmp_path, server):
    paths = [*MISBEHAVIOUR, *(f"ok/{i}" for i in range(12)), "flaky/3", "moved/4"]
    write_pairs(tmp_path / "list.parquet", server.server_port, paths)
    summary = download(quick(tmp_path / "list.parquet", tmp_path / "out"))
    assert (summary.documents, summary.images) == (14, 14)
    expected = Counter(MISBEHAVIOUR.values()) + Counter({"document without an image": len(MISBEHAVIOUR)})
    assert summary.dropped == expected
    found = read(tmp_path / "out")
    assert list(found) == [f"list-{n:09d}" for n, p in enumerate(paths, 1) if p not in MISBEHAVIOUR]
    assert [blob for blob, _ in found.values()] == [*map(image, range(12)), image(3), image(4)]
    assert server.asked["/broken"] == 2  # asked for again; what is final is not
    assert server.asked["/missing"] == server.asked["/page"] == 1
    lines = [
        json.loads(line)
        for path in sorted((tmp_path / "out").glob("*.failures.jsonl"))
        for line in path.read_text().splitlines()
    ]
    assert {line["url"].rpartition("/")[2]: line["reason"] for line in lines} == MISBEHAVIOUR
    assert {line["key"] for line in lines} == {f"list-{n:09d}" for n in range(1, len(MISBEHAVIOUR) + 1)}


def test_requests_to_a_host_are_bounded(tmp_path, server):
    write_pairs(tmp_path / "list.parquet", server.server_port, [f"ok/{i}" for i in range(40)])
    limits = Limits(connections=16, per_host=3, timeout=20)
    download(quick(tmp_path / "list.parquet", tmp_path / "out", limits=limits, documents_per_shard=40))
    assert 1 < server.most <= 3


def test_a_stopped_download_goes_on_and_asks_for_nothing_twice(tmp_path, server, monkeypatch):
    write_pairs(tmp_path / "list.parquet", server.server_port, [f"ok/{i}" for i in range(40)])
    write = run_module.write_shard

    def stop(path, documents):
        if path.name == "000003.tar":
            raise KeyboardInterrupt
        write(path, documents)

    monkeypatch.setattr(run_module, "write_shard", stop)
    with pytest.raises(KeyboardInterrupt):
        download(quick(tmp_path / "list.parquet", tmp_path / "out"))
    monkeypatch.setattr(run_module, "write_shard", write)
    summary = download(quick(tmp_path / "list.parquet", tmp_path / "out"))
    assert summary.documents == 40
    assert set(server.asked.values()) == {1}
    assert download(quick(tmp_path / "list.parquet", tmp_path / "out")).documents == 40
    whole = download(quick(tmp_path / "list.parquet", tmp_path / "again"))
    assert whole.documents == 40
    names = [path.name for path in sorted((tmp_path / "out").glob("*.tar"))]
    assert names == [f"{n:06d}.tar" for n in range(5)]
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    with pytest.raises(DataError, match="other documents_per_shard"):
        download(quick(tmp_path / "list.parquet", tmp_path / "out", documents_per_shard=4))


def test_filters_leave_lines_out_by_their_columns(tmp_path, server):
    write_pairs(
        tmp_path / "list.parquet",
        server.server_port,
        [f"ok/{i}" for i in range(7)],
        punsafe=[0.9, 0.1, 0.1, 0.1, 0.1, 0.1, None],
        pwatermark=[0.1, 0.95, 0.1, 0.1, 0.1, 0.1, None],
        NSFW=["UNLIKELY", "UNLIKELY", "NSFW", "UNLIKELY", "UNLIKELY", "UNLIKELY", None],
        LICENSE=["CC-BY"] * 3 + ["secret"] + ["cc-by"] * 3,
        opt_out=[False] * 4 + [True, False, None],
        similarity=[0.4] * 5 + [0.1, 0.4],
    )
    dropped = Counter()
    filters = Filters(similarity=0.3, licenses=["CC-BY"])
    kept = list(read_lists(tmp_path / "list.parquet", filters, lambda reason: dropped.update([reason])))
    assert [one.key for one in kept] == ["list-000000007"]
    reasons = ["NSFW", "NSFW", "watermark", "license", "opted out", "image unlike its text"]
    assert dropped == Counter(reasons)
    assert len(list(read_lists(tmp_path / "list.parquet", Filters(opt_out=False), dropped.update))) == 4


def test_recipes_are_the_corpora_of_the_preset_and_filter_as_the_paper(tmp_path, server):
    preset = Path(__file__).parent.parent / "mmi_megatron" / "presets" / "paper-13b.yaml"
    sources = yaml.safe_load(preset.read_text())["data"]["sources"]
    assert [(s["name"], s["weight"], s["kind"]) for s in sources] == [
        ("mmc4", 2.0, "interleaved"),
        *((name, 1.0, "pairs") for name in ("laion-2b", "laion-coco", "captioned")),
    ]
    assert list(RECIPES) == [s["name"] for s in sources]
    assert mmc4.Filters() == mmc4.Filters(similarity=0.24, max_images=6, drop_single=0.5)
    texts = ["one two", "one two three four five six seven eight nine ten eleven"]
    columns = {
        "url": ["http://127.0.0.1:1/a", "http://127.0.0.1:1/b"],
        "caption": texts,
        "AESTHETIC_SCORE": [5.5, 4.0],
    }
    pq.write_table(pa.table(columns), tmp_path / "list.parquet")
    given = [str(tmp_path / "list.parquet"), "--allow", "127.0.0.1", "--retries", "0", "--json"]
    tokenizer = make_tokenizer(tmp_path)
    for recipe, reason in (("laion-2b", "aesthetics score 1"), ("laion-coco", "caption under 10 tokens 1")):
        arguments = ["download", *given, "--out", str(tmp_path / recipe), "--recipe", recipe]
        result = CliRunner().invoke(cli.app, [*arguments, "--tokenizer", tokenizer])
        assert reason in result.output  # nothing is kept: nobody listens there
    assert "needs --tokenizer" in CliRunner().invoke(cli.app, arguments).output
    assert "none of mmc4" in CliRunner().invoke(cli.app, [*arguments, "--recipe", "x"]).output


def test_mmc4_and_obelics_lists_become_documents(tmp_path, server):
    base = f"http://127.0.0.1:{server.server_port}"
    info = [{"raw_url": f"{base}/ok/{i}", "matched_sim": s} for i, s in enumerate((0.4, 0.1, 0.35))]
    record = {
        "url": "http://page",
        "text_list": ["one", "two", "three"],
        "image_info": info,
        "similarity_matrix": [[0.4, 0.0, 0.0], [0.1, 0.0, 0.0], [0.0, 0.0, 0.35]],
    }
    (tmp_path / "mmc4.jsonl").write_text(
        json.dumps(record) + "\nnot json\n" + json.dumps({"text_list": 3}) + "\n"
    )
    obelics = {"images": [f"{base}/ok/9", None, f"{base}/missing"], "texts": [None, "words", None]}
    (tmp_path / "obelics.jsonl").write_text(json.dumps(obelics) + "\n")
    summary = download(quick(tmp_path, tmp_path / "out"))
    found = read(tmp_path / "out")
    assert found["obelics-000000001"] == [image(9), "words"]
    pieces = found["mmc4-000000001"]
    assert [p for p in pieces if isinstance(p, bytes)] == [image(0), image(2)]
    assert [p for p in pieces if isinstance(p, str)] == ["one ", "two ", "three "]
    assert "/ok/1" not in server.asked  # too unlike its sentence to be asked for
    assert summary.dropped == {
        "image unlike its sentence": 1,
        "status 404": 1,
        "json cannot be read": 1,
        "line has no url or no text": 1,
    }


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "127.9.9.9", "10.0.0.1", "172.16.5.5", "192.168.1.1", "169.254.169.254", "0.0.0.0", "::1"]
    + [
        "fe80::1",
        "fc00::1",
        "::ffff:127.0.0.1",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
        "100.64.0.1",
        "224.0.0.1",
    ]
    + ["255.255.255.255", "::", "nonsense"],
)
def test_addresses_inside_are_not_allowed(address):
    assert not AddressRule().permits(address)


def test_the_rule_can_be_widened_by_name_and_takes_urls_apart():
    assert AddressRule().permits("93.184.216.34")
    assert AddressRule().permits("2606:2800:220:1::1")
    assert AddressRule(LOOPBACK).permits("127.0.0.1")
    assert not AddressRule(LOOPBACK).permits("10.0.0.1")
    with pytest.raises(SettingsError, match="--allow"):
        AddressRule(["everything"])
    for url in ("ftp://a/b", "http://127.1/", "http://0x7f.1/x", "http://2130706433/", "http://[::1]/"):
        with pytest.raises(Forbidden):
            AddressRule().check(url)
    for url in (
        "http://user:pw@example.com/",
        "http://[bad/",
        "file:///etc/passwd",
        "http://",
        "http://h:99999/",
    ):
        with pytest.raises(Forbidden):
            AddressRule().check(url)
    AddressRule().check("https://example.com/a.jpg")


def test_a_name_that_resolves_to_an_address_inside_is_refused():
    import asyncio

    async def resolve(rule):
        return await CheckedResolver(rule).resolve("localhost", 80)

    with pytest.raises(Forbidden, match="localhost is not a public address"):
        asyncio.run(resolve(AddressRule()))
    assert asyncio.run(resolve(AddressRule(LOOPBACK)))[0]["host"] == "127.0.0.1"


def test_nothing_on_loopback_is_asked_unless_it_is_allowed(tmp_path, server):
    port = server.server_port
    urls = [f"http://127.0.0.1:{port}/ok/1", f"http://localhost:{port}/ok/2"]
    pq.write_table(pa.table({"url": urls, "caption": ["a", "b"]}), tmp_path / "list.parquet")
    with pytest.raises(DataError, match="address is not allowed 2"):
        download(quick(tmp_path / "list.parquet", tmp_path / "out", allow=[]))
    assert not server.asked


def test_the_command_downloads_and_counts(tmp_path, server):
    write_pairs(tmp_path / "list.parquet", server.server_port, ["ok/1", "missing"])
    given = [
        "download",
        str(tmp_path / "list.parquet"),
        "--out",
        str(tmp_path / "out"),
        "--allow",
        "127.0.0.1",
    ]
    result = CliRunner().invoke(cli.app, [*given, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["documents"] == 1
    assert found["dropped"] == {"document without an image": 1, "status 404": 1}
