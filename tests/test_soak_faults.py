"""Each fault in a real run of two replicas, with everything overlapped: what is said names the rank, the
step and the part. (``tests/test_watch.py`` and ``tests/test_launch.py`` look at the pieces.)"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from mmi_megatron.train import faults, launch, pulse
from tests.faulty_rank import AT
from tests.forked import Forked
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

    def run(fault: str, timeout: int = 300) -> tuple[int, str, str]:
        monkeypatch.setenv("FAULT", fault)
        monkeypatch.setattr(launch, "subprocess", SimpleNamespace(Popen=Forked, DEVNULL=subprocess.DEVNULL))
        config.train.timeout = timeout
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
