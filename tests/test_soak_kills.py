"""A run that is killed again and again, any rank at any moment, is in the end the run that was left
alone. ``MMI_KILLS`` says how often (50)."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mmi_megatron.train import checkpoint_folder, launch, metrics, pulse
from tests.small_run import story_config
from tests.test_loop import losses

pytestmark = pytest.mark.soak

KILLS = int(os.environ.get("MMI_KILLS", "50"))
RANKS = 2
OPTIONS = {"ranks": RANKS, "module": "tests.noting_rank", "again": "AGAIN"}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    config = story_config(tmp_path_factory.mktemp("stories"))
    train = config.train
    train.steps, train.micro_rows = 4 * KILLS, 1
    train.save_every, train.keep, train.validate_every, train.sample_every = 1, 2, 0, 0
    train.timeout = 600
    return config


@dataclass
class Killer:
    """Kills one rank of each life of a run at a moment drawn by chance."""

    out: Path
    random: random.Random
    moments: list[str] = field(default_factory=list)
    started_at: int = 0

    def strike(self) -> None:
        """Wait for the moment and kill."""
        rank = self.random.randrange(RANKS)
        moment = self.random.choice(["starting", "training", "training", "saving", "saving", "saving"])
        deadline, began = time.monotonic() + 600, time.time()
        before, wanted = self.steps(), self.random.randrange(1, 4)
        whole = checkpoint_folder.newest(self.out / "checkpoints")
        self.started_at = 0 if whole is None else checkpoint_folder.step_of(whole.name)
        if moment == "starting":
            time.sleep(self.random.uniform(0, 10))
        elif moment == "training":
            while self.steps() < before + wanted and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(self.random.uniform(0, 0.5))
        else:
            while self.drafts(began) < wanted and time.monotonic() < deadline:
                time.sleep(0.0005)
            time.sleep(self.random.uniform(0, 0.05))
        found = process_of(self.out, rank)
        if found is not None:
            sign = pulse.read(self.out / "logs", rank)
            halves = [path.name for path in (self.out / "checkpoints").glob("*.tmp")]
            os.kill(found, signal.SIGKILL)
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


def process_of(out: Path, rank: int) -> int | None:
    """The process of a rank of the run in this folder."""
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                words = (process / "cmdline").read_bytes().split(b"\0")
                environment = (process / "environ").read_bytes().split(b"\0")
            except OSError:
                continue  # it has ended meanwhile, or is not ours
            if str(out).encode() in words and f"RANK={rank}".encode() in environment:
                return int(process.name)
    return None


def samples(out: Path, rank: int) -> dict[int, list]:
    """What a rank has read for each step; of a step made several times, each time the same."""
    found: dict[int, list] = {}
    for line in (out / f"read_by_{rank}.jsonl").read_text().splitlines():
        entry = json.loads(line)
        assert found.setdefault(entry["step"], entry["batches"]) == entry["batches"], entry["step"]
    return found


def test_killed_at_random_it_is_the_run_that_was_left_alone(config, tmp_path, capfd):
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    assert launch.launch(config, alone, **OPTIONS) == 0
    killer, lives = Killer(killed, random.Random(7)), 0
    while len(killer.moments) < KILLS:
        lives += 1
        assert lives < 3 * KILLS + 10
        striker = threading.Thread(target=killer.strike)
        striker.start()
        code = launch.launch(config, killed, resume=lives > 1, **OPTIONS)
        striker.join()
        whole = checkpoint_folder.newest(killed / "checkpoints")
        if whole is not None:
            assert checkpoint_folder.verify(whole) == []
        if code == 0:
            break
    assert launch.launch(config, killed, resume=True, **OPTIONS) == 0
    with capfd.disabled():
        print(f"\n{len(killer.moments)} kills in {lives} lives:", *killer.moments, sep="\n  ")
    assert len(killer.moments) >= KILLS, "the run ended before it had been killed often enough"
    assert losses(killed) == losses(alone)
    for rank in range(RANKS):
        assert samples(killed, rank) == samples(alone, rank)
        assert sorted(samples(alone, rank)) == list(range(config.train.steps))
    final = [checkpoint_folder.newest(out / "checkpoints") for out in (alone, killed)]
    assert final[0].name == final[1].name and tensors(final[0]) == tensors(final[1])


def tensors(path) -> dict[str, str]:
    """Hashes of the files that hold a checkpoint's tensors."""
    listed = json.loads((Path(path) / checkpoint_folder.MARKER).read_text())
    return {name: entry["sha256"] for name, entry in listed.items() if name.endswith(".distcp")}
