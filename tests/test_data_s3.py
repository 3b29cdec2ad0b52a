"""A real S3 server on loopback behind a proxy that injects faults: every byte is right or an error names
what is wrong; nothing is lost or comes twice."""

import logging
import random
import socket
from dataclasses import replace

import numpy as np
import pytest

from data_pipeline.corpus import make_index
from data_pipeline.errors import BadSample
from data_pipeline.feed import Division, Feed
from data_pipeline.settings import StorageSettings
from data_pipeline.storage import Range, Storage, StorageError
from data_pipeline.stream import Stream
from tests.data_corpora import documents, make_settings, pairs, photo
from tests.fault_proxy import FaultProxy

pytestmark = pytest.mark.soak

SECRET = "wJalrXUtnFEMI-secret"
QUICK = StorageSettings(timeout=4.0, deadline=200.0, block_bytes=1 << 16)


@pytest.fixture(scope="module")
def server():
    from moto.server import ThreadedMotoServer

    running = ThreadedMotoServer("127.0.0.1", 0)
    running.start()
    yield running.get_host_and_port()[1]
    running.stop()


@pytest.fixture(autouse=True)
def credentials(monkeypatch, tmp_path, server):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    to(monkeypatch, server)


def to(monkeypatch, port: int) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")


def client(port: int):
    import botocore.session

    return botocore.session.get_session().create_client("s3", endpoint_url=f"http://127.0.0.1:{port}")


def upload(port: int, bucket: str, files: dict[str, bytes]) -> None:
    own = client(port)
    own.create_bucket(Bucket=bucket)
    for key, blob in files.items():
        own.put_object(Bucket=bucket, Key=key, Body=blob)


@pytest.mark.parametrize("cached", [False, True], ids=["no cache", "cache"])
def test_ranges_are_right_through_every_fault(monkeypatch, tmp_path, server, cached):
    bucket = f"ranges-{cached}".lower()
    blob = np.random.default_rng(0).bytes(3_000_001)
    upload(server, bucket, {"a/x.bin": blob})
    cache = {"cache": str(tmp_path / "cache"), "cache_bytes": 700_000} if cached else {}
    with FaultProxy(server, 0.4) as proxy:
        to(monkeypatch, proxy.port)
        storage = Storage(replace(QUICK, **cache))
        url = f"s3://{bucket}/a/x.bin"
        stamp = storage.stat(url)
        assert stamp.size == len(blob)
        draw = random.Random(1)
        for _ in range(12):
            wanted = []
            for _ in range(8):
                start = draw.randrange(len(blob))
                wanted.append(
                    Range(url, start, draw.randrange(min(200_000, len(blob) - start) + 1), stamp.etag)
                )
            for own, found in zip(wanted, storage.read_many(wanted), strict=True):
                assert found == blob[own.offset : own.offset + own.size]
    assert storage.counts["retries"] > 10
    assert len(proxy.met) > 6
    if cached:
        assert 0 < storage.cache.held() <= 700_000
        assert storage.counts["cache_hits"] > 0
        assert storage.cache.failures == 0


@pytest.fixture
def twins(tmp_path, server):
    """The same corpus on disk and on S3: settings of both."""
    sources = {"a": documents(90), "b": documents(61, "e", 1), "pairs": pairs(80)}
    here = make_settings(tmp_path, sources, holdout=0.1, failure_limit=0.5)
    here.sources[0].weight = 2.0
    bucket = f"twins-{tmp_path.name[-20:].replace('_', '-').lower()}"
    files = {}
    for source in here.sources:
        for path in sorted((tmp_path / source.name).glob("*.tar")):
            files[f"{source.name}/{path.name}"] = path.read_bytes()
    upload(server, bucket, files)
    there = replace(
        here,
        sources=[replace(source, path=f"s3://{bucket}/{source.name}") for source in here.sources],
        storage=replace(QUICK, cache=str(tmp_path / "cache"), cache_bytes=1 << 19),
    )
    return here, there


def checksums(settings, steps, executor="inline", state=None):
    with Feed(Stream(replace(settings, executor=executor), global_rows=4), Division(0, 1, 2, 2)) as feed:
        if state is not None:
            feed.load_state(state)
        shares = [feed.next() for _ in range(steps)]
        return [share.checksums.tolist() for share in shares], shares[-1].state, feed.stream.ledger


@pytest.mark.parametrize("executor", ["inline", "threads", "processes"])
def test_a_stream_from_s3_through_faults_is_the_one_from_disk(monkeypatch, server, twins, executor):
    here, there = twins
    expected, _, _ = checksums(here, 40)
    with FaultProxy(server, 0.1) as proxy:
        to(monkeypatch, proxy.port)
        for source in there.sources:
            shards, _ = make_index(source.path, there.tokenizer, there.holdout, there.storage)
            assert make_index(source.path, there.tokenizer, there.holdout, there.storage)[0] == shards
        first, state, ledger = checksums(there, 15, executor)
        second, _, more = checksums(there, 25, executor, state)
    assert first + second == expected
    assert not ledger.lines
    assert not more.lines
    assert sum(proxy.met.values()) - proxy.met["none"] > 5


@pytest.mark.parametrize("cached", [False, True], ids=["no cache", "cache"])
def test_an_object_that_changes_under_a_run_is_named_and_the_rest_goes_on(server, twins, cached):
    here, there = twins
    if not cached:
        there = replace(there, storage=replace(there.storage, cache=""))
    for source in there.sources:
        make_index(source.path, there.tokenizer, there.holdout, there.storage)
    stream, twin = Stream(there, global_rows=4), Stream(here, global_rows=4)
    bucket = there.sources[0].path.split("/")[2]
    blob = client(server).get_object(Bucket=bucket, Key="a/000001.tar")["Body"].read()
    client(server).put_object(Bucket=bucket, Key="a/000001.tar", Body=photo() + blob)
    for _ in range(20):
        one, other = stream.next(), twin.next()
        assert one.rows == other.rows
        got, expected = one.batches(0, 1, 4, 1)[0], other.batches(0, 1, 4, 1)[0]
        kept = np.isin(expected.image_ids, got.image_ids)
        assert np.array_equal(got.images, expected.images[kept])
    assert {line.shard for line in stream.ledger.lines} == {"000001.tar"}
    assert set(stream.ledger.counts("a")) == {"shard has changed"}
    assert "ETag" in stream.ledger.lines[0].detail


def test_without_an_index_or_a_server_the_error_says_so_and_holds_no_credentials(
    monkeypatch, server, twins, caplog
):
    _, there = twins
    with pytest.raises(
        Exception, match=r"s3://.* has no index for this tokenizer; make it with `mmi data index"
    ):
        Stream(there)
    caplog.set_level(logging.DEBUG)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        to(monkeypatch, unused.getsockname()[1])
        storage = Storage(replace(QUICK, deadline=1.5))
        with pytest.raises(
            StorageError, match=r"s3://b/x: failed \d+ times within data.storage.deadline=1.5"
        ) as caught:
            storage.read(Range("s3://b/x", 0, 10))
    own = "\n".join(r.getMessage() for r in caplog.records if r.name.startswith(("data_pipeline", "mmi")))
    assert SECRET not in str(caught.value) + own
    to(monkeypatch, server)
    fresh = Storage(QUICK)
    with pytest.raises(BadSample, match="no such file"):
        fresh.read(Range(f"{there.sources[0].path}/none.tar", 0, 10))
    with pytest.raises(Exception, match="holds credentials") as caught:
        fresh.read(Range(f"s3://AKID:{SECRET}@b/x", 0, 10))
    assert SECRET not in str(caught.value)
