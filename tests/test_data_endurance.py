"""Hundreds of steps of mixed sources through kills and resumes with other ranks, workers and executors;
and the memory of a trainer over thousands of steps."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from dataclasses import replace

import psutil
import pytest

from tests.data_soak import checksums, feeds, mixed_settings, step

pytestmark = pytest.mark.soak

STEPS = 520


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    return mixed_settings(tmp_path_factory.mktemp("endurance"))


@pytest.fixture(scope="module")
def expected(mixed):
    found = checksums(mixed, "inline", steps=STEPS)
    assert len(set(found)) == STEPS
    return found


@pytest.mark.parametrize(
    ("executor", "ranks"),
    [("inline", 2), ("threads", 1), ("threads", 4), ("processes", 1), ("processes", 2), ("inline", 8)],
)
def test_five_hundred_steps_are_the_same(mixed, expected, executor, ranks):
    assert checksums(mixed, executor, ranks, STEPS) == expected


def test_five_hundred_steps_through_kills_and_resumes(mixed, expected):
    """At random: a worker is killed; or all feeds go, and others with another number of ranks, workers
    and another executor go on from the last position."""
    rng = random.Random(0)
    position, state, lost, resumes = 0, None, 0, 0
    while position < STEPS:
        ranks, executor = rng.choice([1, 2, 4, 8]), rng.choice(["inline", "threads", "processes"])
        workers = rng.randint(1, 3) if ranks < 4 else 1
        made = feeds(replace(mixed, workers=workers, prefetch=rng.randint(1, 4)), executor, ranks, state)
        for _ in range(min(rng.randint(1, 60), STEPS - position)):
            if executor == "processes" and rng.random() < 0.05:
                os.kill(made[0].executor.workers[0].process.pid, signal.SIGKILL)
                lost += 1
            value, share = step(made)
            assert value == expected[position], f"step {position}"
            position, state = position + 1, share.state
        for feed in made:
            feed.close()
        resumes += 1
    assert resumes > 8
    assert lost > 1


TRAINER = """
import sys
import torch
from pathlib import Path
from mmi_megatron.settings import load_config
from mmi_megatron.train.loop import train
train(load_config(Path(sys.argv[1])), Path(sys.argv[2]))
"""


@pytest.mark.parametrize("executor", ["inline", "processes"])
def test_memory_of_the_trainer_does_not_grow_over_two_thousand_steps(tmp_path, executor):
    """The real model and loop, small; resident memory after 2,000 steps is that after 500."""
    from mmi_megatron.settings import save_config
    from mmi_megatron.train import metrics
    from tests.small_run import story_config

    config = story_config(tmp_path / "data")
    config.data.executor, config.data.workers = executor, 1
    train = config.train
    train.steps, train.rows, train.micro_rows, train.log_every = 2000, 1, 1, 500
    train.save_every = train.validate_every = train.sample_every = 0
    save_config(config, tmp_path / "settings.yaml")
    out = tmp_path / "out"
    command = [sys.executable, "-c", TRAINER, str(tmp_path / "settings.yaml"), str(out)]
    seen: dict[int, int] = {}
    with subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        trainer = psutil.Process(process.pid)
        while process.poll() is None:
            steps = sum(1 for _ in (out / "metrics.jsonl").open()) if (out / "metrics.jsonl").exists() else 0
            try:
                seen[steps] = trainer.memory_info().rss
            except psutil.NoSuchProcess:
                break
            try:
                process.wait(0.5)
            except subprocess.TimeoutExpired:
                continue
    assert process.returncode == 0
    assert len([r for r in metrics.read(out) if r["kind"] == "train"]) == 2000
    early = max(rss for steps, rss in seen.items() if steps <= 500)
    late = max(rss for steps, rss in seen.items() if steps > 1500 and rss)
    assert late < early * 1.02 + (8 << 20), (
        f"{early >> 20} MiB in the first 500 steps, {late >> 20} MiB at the end"
    )


def test_memory_of_a_feed_does_not_grow_over_two_thousand_steps(mixed):
    (feed,) = feeds(mixed, "processes")
    resident = {}
    for number in range(2001):
        feed.next()
        if number in (500, 2000):
            resident[number] = psutil.Process().memory_info().rss
    feed.close()
    assert resident[2000] < resident[500] + (8 << 20)
