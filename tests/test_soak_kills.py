"""A run that is killed again and again, any rank at any moment, is in the end the run that was left
alone. ``MMI_KILLS`` says how often (50). Ranks are forks (``tests.forked``), so that a life takes seconds.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest

from mmi_megatron.train import checkpoint_folder, launch, metrics, pulse
from tests.forked import Forked
from tests.small_run import story_config
from tests.test_loop import losses

pytestmark = pytest.mark.soak

KILLS = int(os.environ.get("MMI_KILLS", "50"))
RANKS, STEPS = 2, 24
OPTIONS = {"ranks": RANKS, "module": "tests.noting_rank", "again": "AGAIN"}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    config = story_config(tmp_path_factory.mktemp("stories"))
    model, train = config.model, config.train
    # As few tensors as a model with every part can have: most of a life is the saving of them.
    model.language.layers, model.vision.layers, model.vision.resampler.layers = 2, 2, 1
    model.vision.adapter.interactions = 1
    train.steps, train.micro_rows = STEPS, 1
    train.save_every, train.keep, train.validate_every, train.sample_every = 2, 2, 0, 0
    train.timeout = 600
    return config


@dataclass
class Killer:
    """Kills one rank of each life of a run at a moment drawn by chance."""

    out: Path
    random: random.Random
    over: threading.Event = field(default_factory=threading.Event)
    moments: list[str] = field(default_factory=list)
    started_at: int = 0

    def strike(self) -> None:
        """Wait for the moment and kill; no longer than this life lasts."""
        rank = self.random.randrange(RANKS)
        moment = self.random.choice(["starting", "training", "training", "saving", "saving", "saving"])
        before, began, wanted = self.steps(), time.time(), self.random.randrange(1, 3)
        whole = checkpoint_folder.newest(self.out / "checkpoints")
        self.started_at = 0 if whole is None else checkpoint_folder.step_of(whole.name)
        if moment == "starting":
            self.over.wait(self.random.uniform(0.2, 4))
        elif moment == "training":
            while self.steps() < before + wanted and not self.over.wait(0.01):
                pass
            self.over.wait(self.random.uniform(0, 0.3))
        else:
            while self.drafts(began) < wanted and not self.over.wait(0.0005):
                pass
            self.over.wait(self.random.uniform(0, 0.05))
        process = Forked.ranks.get(rank)
        if process is not None and process.poll() is None and not self.over.is_set():
            sign = pulse.read(self.out / "logs", rank)
            halves = [path.name for path in (self.out / "checkpoints").glob("*.tmp")]
            os.kill(process.pid, signal.SIGKILL)
            self.moments.append(f"rank {rank} {moment} at {sign}, being written: {halves}")

    def drafts(self, began: float) -> int:
        """How many checkpoints this life has begun to write, the one under way included."""
        names = {record["step"] for record in metrics.read(self.out) if record["kind"] == "checkpoint"}
        under_way = [path for path in (self.out / "checkpoints").glob("step_*.tmp") if age(path) > began]
        return len([step for step in names if step > self.started_at]) + bool(under_way)

    def steps(self) -> int:
        """Last step reported."""
        return max((record["step"] for record in metrics.read(self.out)), default=0)


def age(path: Path) -> float:
    """When a folder was changed last, 0 for one that has gone meanwhile."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def samples(out: Path, rank: int) -> dict[int, list]:
    """What a rank has read for each step; of a step made several times, each time the same."""
    found: dict[int, list] = {}
    for line in (out / f"read_by_{rank}.jsonl").read_text().splitlines():
        entry = json.loads(line)
        assert found.setdefault(entry["step"], entry["batches"]) == entry["batches"], entry["step"]
    return found


def test_killed_at_random_it_is_the_run_that_was_left_alone(config, tmp_path, capfd, monkeypatch):
    """As many runs as it takes until there were so many kills; each ends as the one left alone."""
    started_so = SimpleNamespace(Popen=Forked, DEVNULL=subprocess.DEVNULL)
    monkeypatch.setattr(launch, "subprocess", started_so)
    alone, chance, kills = tmp_path / "alone", random.Random(7), 0
    assert launch.launch(config, alone, **OPTIONS) == 0
    for rank in range(RANKS):
        assert sorted(samples(alone, rank)) == list(range(STEPS))
    for run in itertools.count():
        if kills >= KILLS:
            break
        killer = Killer(tmp_path / f"killed_{run}", chance)
        with capfd.disabled():
            live_and_die(config, killer, KILLS - kills)
        kills += len(killer.moments)
        assert_same_run(alone, killer.out)


def live_and_die(config, killer: Killer, most: int) -> None:
    """Run and kill, again and again, until the run is at its end or has been killed often enough; then
    let it go to its end."""
    for life in itertools.count(1):
        killer.over.clear()
        before = len(killer.moments)
        striker = threading.Thread(target=killer.strike)
        if before < most:
            striker.start()
        code = launch.launch(config, killer.out, resume=life > 1, **OPTIONS)
        killer.over.set()
        if before < most:
            striker.join()
        print(f"{killer.out.name}, life {life} ends with {code}:", *killer.moments[before:], flush=True)
        # A rank that is killed when it has done all its work is no failure.
        assert code == 0 or (code == 128 + signal.SIGKILL and len(killer.moments) > before)
        whole = checkpoint_folder.newest(killer.out / "checkpoints")
        assert whole is None or checkpoint_folder.verify(whole) == []
        if code == 0:
            return


def assert_same_run(alone: Path, killed: Path) -> None:
    """Losses, what every rank read for every step, and the last checkpoint."""
    assert losses(killed) == losses(alone)
    for rank in range(RANKS):
        assert samples(killed, rank) == samples(alone, rank)
    final = [checkpoint_folder.newest(out / "checkpoints") for out in (alone, killed)]
    assert final[0].name == final[1].name and tensors(final[0]) == tensors(final[1])


def tensors(path) -> dict[str, str]:
    """Hashes of the files that hold a checkpoint's tensors."""
    listed = json.loads((Path(path) / checkpoint_folder.MARKER).read_text())
    return {name: entry["sha256"] for name, entry in listed.items() if name.endswith(".distcp")}
