"""Each fault in a real run of two replicas, with everything overlapped: what is said names the rank, the
step and the part. (``tests/test_watch.py`` and ``tests/test_launch.py`` look at the pieces.)"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from mmi_megatron.settings import save_config
from mmi_megatron.train import faults, launch, pulse
from tests.faulty_rank import AT
from tests.forked import Forked
from tests.ranks import free_port
from tests.small_run import story_config
from tests.test_loop import losses

pytestmark = pytest.mark.soak

STEPS = 4


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    config = story_config(tmp_path_factory.mktemp("stories"))
    train = config.train
    config.optimizer.warmup_steps = 1
    train.steps, train.micro_rows, train.watch.measure_every = STEPS, 1, 2
    train.save_every, train.validate_every, train.sample_every = 0, 0, 0
    return config


@pytest.fixture
def run(config, tmp_path, capfd, monkeypatch):
    """Run with a fault: exit code, what the launcher said, and what rank 0 logged."""

    def run(fault: str, timeout: int = 300, setup_timeout: int = 300) -> tuple[int, str, str]:
        monkeypatch.setenv("FAULT", fault)
        monkeypatch.setattr(launch, "subprocess", SimpleNamespace(Popen=Forked, DEVNULL=subprocess.DEVNULL))
        config.train.timeout, config.train.setup_timeout = timeout, setup_timeout
        code = launch.launch(config, tmp_path, ranks=2, module="tests.faulty_rank", again="AGAIN")
        return code, capfd.readouterr().err, faults.log_path(tmp_path / "logs", 0).read_text()

    return run


def reports(out: Path, what: str) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted((out / "reports").glob(f"{what}_*.json"))]


def test_one_gradient_that_is_not_a_number_skips_the_step_and_is_named(run, tmp_path):
    code, _, log = run("nan")
    assert code == 0 and sorted(losses(tmp_path)) == list(range(1, STEPS + 1))
    assert f"step {AT} skipped" in log and "; skipped so far: 1;" in log
    assert "rank 1: image decoder (1 parameters: image_decoder.unet.conv_in.weight)" in log
    first, second = reports(tmp_path, "skipped")
    assert first["parameters"] == [] and second["parameters"] == ["image_decoder.unet.conv_in.weight"]
    assert first["batches"] != second["batches"] and second["step"] == AT


def test_a_rank_slowed_threefold_is_named(run, tmp_path):
    code, _, log = run("slow")
    assert code == 0 and "rank 1 is slow" in log and "most of it in language model forward" in log
    assert {report["step"] for report in reports(tmp_path, "straggler")} <= {1, 3}


def test_a_rank_without_memory_is_named(run, tmp_path):
    code, said, _ = run("memory")
    assert code == 1 and "rank 1 ended with exit code 1" in said
    assert f"out of memory at step {AT} in image decoder backward on rank 1" in said
    (report,) = reports(tmp_path, "out_of_memory")
    assert report["rank"] == 1 and report["part"] == "image decoder backward" and report["batches"]


def test_a_rank_that_leaves_a_collective_waiting_is_named(run, tmp_path):
    code, said, _ = run("hung", timeout=15)
    assert code == pulse.HUNG and "rank 1 hung" in said
    assert f"hung at step {AT}, language model forward" in said and "in late" in said


def test_a_rank_that_hangs_in_set_up_is_named(run, tmp_path):
    code, said, _ = run("hung in set-up", setup_timeout=20)
    assert code == pulse.HUNG and "Training ended: rank 1 hung." in said
    assert "hung at set-up, opening the corpus: no progress for" in said and "in behind" in said


def test_a_rank_that_is_stopped_in_set_up_is_named(run, tmp_path):
    code, said, log = run("frozen in set-up", setup_timeout=20)
    assert code == pulse.HUNG and "Training ended: rank 1 hung at set-up, opening the corpus." in said
    assert "rank 1 of 2 did not finish opening the corpus within 20 s (train.setup_timeout)" in log


@pytest.mark.parametrize("fault", ["hung in set-up", "frozen in set-up", "failed in set-up"])
def test_under_torchrun_on_two_nodes_without_common_storage_it_is_named(config, tmp_path, fault):
    config.train.timeout, config.train.setup_timeout = 300, 40
    save_config(config, tmp_path / "settings.yaml")
    port, nodes = free_port(), []
    for node in range(2):
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={node}"]
        command += ["--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={port}"]
        command += ["-m", "tests.faulty_rank", str(tmp_path / "settings.yaml"), str(tmp_path / str(node))]
        with (tmp_path / f"node_{node}").open("wb") as output:
            nodes.append(
                subprocess.Popen(command, env=os.environ | {"FAULT": fault}, stdout=output, stderr=output)
            )
    try:
        assert nodes[0].wait(timeout=480) != 0
        said = (tmp_path / "node_0").read_text()
        if fault == "failed in set-up":
            assert "set-up: rank 1 ended: ValueError: no corpus on this node" in said
            return
        assert "rank 1 of 2 did not finish opening the corpus within 40 s (train.setup_timeout)" in said
        assert "rank 1 has given no sign of life in this run's folder" in said
        if fault == "hung in set-up":
            assert nodes[1].wait(timeout=120) != 0
            own = (tmp_path / "node_1").read_text()
            assert "rank 1 hung at set-up, opening the corpus" in own and "in behind" in own
    finally:
        for node in nodes:
            end(node)


def end(node: subprocess.Popen) -> None:
    """End a node and its rank, which torchrun starts in a session of its own; it may be stopped."""
    for rank in psutil.Process(node.pid).children(recursive=True) if node.poll() is None else ():
        rank.kill()
    node.kill()
    node.wait()
