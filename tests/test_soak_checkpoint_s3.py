"""Checkpoints in an object store: a real S3 protocol on this machine (moto)."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mmi_megatron.train import checkpoint_folder
from mmi_megatron.train.storage import Folder
from tests.ranks import free_port
from tests.test_checkpoint import STEPS, adam_state, read, same

pytestmark = pytest.mark.soak


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """Address of an empty bucket of a server that is gone with the module."""
    import boto3
    import requests
    import s3fs

    port = free_port()
    log = (tmp_path_factory.mktemp("moto") / "log").open("w")
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=log, stderr=log)
    patch = pytest.MonkeyPatch()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        patch.setenv(name, value)
    end = time.monotonic() + 240
    while True:
        try:
            requests.get(f"http://127.0.0.1:{port}", timeout=5)
            break
        except requests.ConnectionError:
            assert time.monotonic() < end and server.poll() is None, "the server did not start"
            time.sleep(0.2)
    boto3.client("s3").create_bucket(Bucket="runs")
    s3fs.S3FileSystem.clear_instance_cache()  # one of them may know a server of another file's tests
    yield "s3://runs"
    patch.undo()
    server.terminate()
    server.wait()


def write(address: str, stage: Path) -> dict:
    """On a rank: train, save to the store, and go on; the bytes of a step are replaced once."""
    from mmi_megatron.train.checkpoint import Checkpoints
    from tests.tiny import Run, tiny_config

    with Run(tiny_config(2)) as run:
        checkpoints = Checkpoints(address, stage, keep=2)
        for _ in range(STEPS):
            run.train(1)
            extra = {"step": run.step, "data": {"cursor": [1, 2]}}
            checkpoints.save(run.model, run.optimizer, run.scheduler, extra, run.step)
        checkpoints.save(run.model, run.optimizer, run.scheduler, extra, run.step)
        checkpoints.wait()
        result = {"weights": run.parameters(), "state": adam_state(run)}
        return result | {"later": run.train(3)}


def test_a_run_is_kept_in_a_bucket_and_goes_on_from_there(bucket, ranks, tmp_path):
    address = f"{bucket}/first"
    before = ranks.run(2, write, address, tmp_path)
    names = [path.name for path in checkpoint_folder.by_step(address)]
    assert names == ["step_0000002", "step_0000003"]
    newest = checkpoint_folder.newest(address)
    assert newest is not None and newest.name == "step_0000003"
    assert checkpoint_folder.verify(newest) == []
    assert not [file for file in tmp_path.rglob("*") if file.is_file()], "staged files were left behind"
    after = ranks.run(2, read, 2, newest.address)
    for old, new in zip(before, after, strict=True):
        same(new["weights"], old["weights"])
        same(new["state"], old["state"])
        assert new["later"] == old["later"]
    (alone,) = ranks.run(1, read, 1, newest.address)
    same(alone["weights"], before[0]["weights"])


def test_what_has_no_marker_or_is_damaged_is_not_taken(bucket, ranks, tmp_path):
    address = f"{bucket}/second"
    ranks.run(2, write, address, tmp_path)
    newest = Folder(address) / "step_0000003"
    name = max((n for n in newest.files() if n.endswith(".distcp")), key=newest.files().__getitem__)
    data = bytearray(newest.read(name))
    data[len(data) // 2] ^= 1
    newest.write(name, bytes(data))
    (wrong,) = checkpoint_folder.verify(newest)
    assert name in wrong and "damaged" in wrong
    newest.remove(checkpoint_folder.MARKER)
    assert checkpoint_folder.newest(address).name == "step_0000002"


def test_only_the_slices_that_are_needed_are_fetched(bucket, ranks, tmp_path):
    address = f"{bucket}/third"
    ranks.run(2, write, address, tmp_path)
    fetched, whole = ranks.run(2, bytes_fetched, address)[0]
    assert 0 < fetched < 0.6 * whole


def bytes_fetched(address: str) -> tuple[int, int]:
    """On a rank: bytes of tensor files read to load the weights alone, and bytes of these files."""
    from mmi_megatron.train.checkpoint import latest, load_weights
    from tests.tiny import Run, tiny_config

    count, plain = [0], Folder.read

    def counting(folder, name, start=None, end=None):
        data = plain(folder, name, start, end)
        count[0] += len(data) * name.endswith(".distcp")
        return data

    with Run(tiny_config(2)) as run:
        path = latest(address)
        parts = checkpoint_folder.parts_of(path)
        whole = sum(size for part in parts for name, size in part.files().items() if ".distcp" in name)
        Folder.read = counting
        try:
            load_weights(run.model.module, path)
        finally:
            Folder.read = plain
        assert all(torch.isfinite(value).all() for value in run.parameters().values())
    return count[0], whole


def test_the_list_of_files_is_complete(bucket):
    for path in checkpoint_folder.by_step(f"{bucket}/first"):
        listed = json.loads(path.read(checkpoint_folder.MARKER))
        assert listed.keys() | {checkpoint_folder.MARKER} == path.files().keys()
