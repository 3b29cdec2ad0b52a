"""The data service as a user runs it: `mmi data serve` on two machines, a trainer that reads from it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from data_pipeline.errors import DataError
from data_pipeline.ray_cluster import _make_token, connect
from data_pipeline.settings import DataSettings
from mmi_megatron.settings import save_config
from mmi_megatron.train import metrics
from tests.small_run import story_config

pytestmark = pytest.mark.soak

STEPS = 30


@pytest.fixture
def start(tmp_path):
    """Starts commands of ours; their home, and so the cluster's token, is the test's."""
    home = tmp_path / "home"
    home.mkdir()
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env |= {"HOME": str(home), "OMP_NUM_THREADS": "1"}
    started = []

    def run(*arguments: str) -> subprocess.Popen:
        log = (tmp_path / f"{len(started)}.log").open("w")
        command = [sys.executable, "-c", "from mmi_megatron.cli import main; main()", *arguments]
        started.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
        return started[-1]

    yield run
    for process in started:
        if process.poll() is None:
            process.kill()
    for process in ours(home):
        process.kill()


def ours(home: Path, name: str = "") -> list[psutil.Process]:
    """Processes of the test's home whose name begins so."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("HOME") == str(home) and process.cmdline()[0].startswith(name):
                found.append(process)
        except (psutil.Error, IndexError):
            continue
    return found


def wait_for(what, seconds: float = 120.0) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until
        time.sleep(0.2)


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def trained(out: Path) -> list[dict]:
    return [record for record in metrics.read(out) if record["kind"] == "train"]


def values(out: Path) -> list[tuple]:
    """What must not depend on where batches are made."""
    kept = ("step", "data_checksum", "next_token_loss", "next_image_loss", "grad_norm")
    steps = [tuple(record[name] for name in kept) for record in trained(out)]
    held = [tuple(sorted(r.items())) for r in metrics.read(out) if r["kind"] == "validation"]
    assert held
    return steps + held


def test_a_trainer_reads_from_a_service_through_the_loss_of_an_actor_its_feeder_and_a_machine(
    tmp_path, start
):
    config = story_config(tmp_path / "data", 60)
    train = config.train
    train.steps, train.rows, train.micro_rows, train.validate_every = STEPS, 2, 1, 10
    train.save_every = train.sample_every = 0
    save_config(config, tmp_path / "settings.yaml")
    settings, home = str(tmp_path / "settings.yaml"), tmp_path / "home"
    assert start("train", settings, "--out", str(tmp_path / "inline")).wait(300) == 0

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    first = start("data", "serve", "--port", str(port), "--workers", "2")
    wait_for(lambda: answers(port))
    assert (home / ".ray" / "auth_token").stat().st_mode & 0o777 == 0o600
    address = f"127.0.0.1:{port}"
    second = start("data", "serve", "--address", address, "--workers", "2")
    wait_for(lambda: len(ours(home, str(Path(sys.prefix) / "lib"))) >= 3)  # the second raylet
    service = ["data.executor=ray", f"data.ray_address={address}", "data.workers=3"]
    out = tmp_path / "ray"
    trainer = start("train", settings, "--out", str(out), *service)
    for step, lose in ((5, "ray::Maker"), (12, "ray::Feeder"), (20, "")):
        wait_for(lambda step=step: len(trained(out)) >= step or trainer.poll() is not None)
        assert trainer.poll() is None
        if lose:
            ours(home, lose)[0].kill()
        else:
            second.terminate()
    assert trainer.wait(300) == 0
    assert values(out) == values(tmp_path / "inline")
    assert second.wait(60) == 0
    first.send_signal(signal.SIGINT)
    assert first.wait(60) == 0
    wait_for(lambda: not ours(home, "ray::") and not answers(port), 30)


def test_the_token_of_a_cluster_is_made_whole_and_once(tmp_path):
    path = tmp_path / ".ray" / "auth_token"
    _make_token(path)
    made = path.read_text()
    assert len(made) == 64 and path.stat().st_mode & 0o777 == 0o600
    _make_token(path)  # as one that another process has made meanwhile
    assert path.read_text() == made and [file.name for file in path.parent.iterdir()] == ["auth_token"]


def test_another_clusters_token_is_one_line(monkeypatch):
    import ray

    def refused(**_):
        raise ray.exceptions.AuthenticationError("invalid token")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refused)
    with pytest.raises(DataError, match=r"no Ray cluster answers \(.*invalid token.*give this machine its"):
        connect(DataSettings(ray_address="auto"))


def test_no_cluster_or_another_token_is_one_line(tmp_path, start):
    config = story_config(tmp_path / "data", 20)
    save_config(config, tmp_path / "settings.yaml")
    given = ["data.executor=ray", "data.ray_address=127.0.0.1:1"]
    run = start("train", str(tmp_path / "settings.yaml"), "--out", str(tmp_path / "out"), *given)
    assert run.wait(200) == 1
    assert "data.ray_address=127.0.0.1:1: no Ray cluster answers" in (tmp_path / "0.log").read_text()
    joins = start("data", "serve", "--address", "127.0.0.1:1")
    assert joins.wait(60) == 1
    assert "no token: copy " in (tmp_path / "1.log").read_text()
