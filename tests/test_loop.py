"""The training loop on the real model: a run that loses a rank to kill -9 and is resumed has the
losses of the run that was left alone; and what a run writes."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmi_megatron.train import launch, metrics
from mmi_megatron.train.checkpoint_folder import newest
from mmi_megatron.train.loop import check_tokenizer
from mmi_megatron.train.signals import STOPPED
from tests.small_run import story_config

STEPS = 10


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    config = story_config(tmp_path_factory.mktemp("stories"))
    config.parallel.tensor = 2
    train = config.train
    train.steps, train.save_every, train.validate_every, train.validate_documents = STEPS, 3, 5, 4
    train.sample_every, train.sample_documents, train.sample_steps = STEPS, 1, 2
    train.timeout = 60
    return config


def losses(out: Path) -> dict[int, tuple]:
    """What each step reported that does not depend on the clock."""
    names = ("next_token_loss", "next_image_loss", "grad_norm", "tokens", "images")
    steps = [record for record in metrics.read(out) if record["kind"] == "train"]
    assert len({record["step"] for record in steps}) == len(steps), "a step is reported twice"
    return {record["step"]: tuple(record[name] for name in names) for record in steps}


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    assert launch.launch(config, out, ranks=2) == 0
    return out


def stop_after(out: Path, step: int) -> None:
    """Send this process, the launcher, SIGUSR1 when a step is reported."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and max(losses(out), default=0) < step:
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGUSR1)


def kill_a_rank(out: Path, after: int) -> None:
    """Kill rank 1 once ``after`` steps are reported."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and len(metrics.read(out)) < after:
        time.sleep(0.02)
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            environment = (process / "environ").read_bytes().split(b"\0")
        except OSError:
            continue  # it has ended meanwhile, or is not ours
        if str(out).encode() in words and b"RANK=1" in environment:
            os.kill(int(process.name), signal.SIGKILL)


def test_killed_and_resumed_is_as_if_nothing_had_happened(config, undisturbed, tmp_path, capfd):
    """Its checkpoints lie elsewhere, those of the undisturbed run in its folder."""
    checkpoints = tmp_path / "elsewhere"
    config = replace(config, train=replace(config.train, checkpoints=str(checkpoints)))
    killer = threading.Thread(target=kill_a_rank, args=(tmp_path, 5))
    killer.start()
    began = time.monotonic()
    code = launch.launch(config, tmp_path, ranks=2, again="AGAIN")
    killer.join()
    said = capfd.readouterr().err
    assert code != 0 and time.monotonic() - began < 180
    assert said.count("Training ended") == 1 and "rank 1" in said and "SIGKILL" in said
    done = len(losses(tmp_path))
    assert newest(checkpoints) is not None and done < STEPS and not (tmp_path / "checkpoints").exists()
    stopper = threading.Thread(target=stop_after, args=(tmp_path, 7))
    stopper.start()
    assert launch.launch(config, tmp_path, ranks=2, resume=True, again="AGAIN") == STOPPED
    stopper.join()
    done = max(losses(tmp_path))
    assert 7 <= done < STEPS and newest(checkpoints).name == f"step_{done:07d}"
    assert f"AGAIN   (continues after step_{done:07d})" in capfd.readouterr().err
    assert launch.launch(config, tmp_path, ranks=2, resume=True) == 0
    assert losses(tmp_path) == losses(undisturbed)


def test_what_a_run_leaves_behind(config, undisturbed):
    kept = sorted(path.name for path in (undisturbed / "checkpoints").glob("step_*"))
    assert kept == ["step_0000006", "step_0000009", "step_0000010"]
    validations = [record for record in metrics.read(undisturbed) if record["kind"] == "validation"]
    assert [record["step"] for record in validations] == [5, STEPS]
    assert all(0 < record["stories/next_token_loss"] < 10 for record in validations)
    picture = np.asarray(Image.open(undisturbed / "samples" / f"step_{STEPS:07d}.png"))
    assert picture.shape[0] == 2 * config.model.decoder.image_size
    first, last = losses(undisturbed)[1], losses(undisturbed)[STEPS]
    assert last[0] < first[0], "the next-token loss did not fall"


def test_another_tokenizer_is_refused(config):
    with pytest.raises(ValueError, match=r"has 99 tokens.*model.language.vocabulary is"):
        check_tokenizer(config, 99)
