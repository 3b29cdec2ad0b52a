"""Bad samples in a training run: named on disk, counted in the log, and too many of them end it by name."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from data_pipeline.errors import TooManyFailures
from data_pipeline.formats import find_shards, read_range, scan_file
from mmi_megatron.train import metrics
from mmi_megatron.train.loop import train
from tests.small_run import story_config


def corrupt(folder, share: float) -> int:
    """Overwrite the images of some documents of the only shard; how many documents."""
    ((path, _),) = find_shards(str(folder), "stories")
    groups = list(scan_file(path))
    chosen = [members for _, members in groups[: int(len(groups) * share)]]
    with open(path, "r+b") as file:
        for members in chosen:
            for member in members:
                if member.name != "json":
                    file.seek(member.offset + 20)
                    file.write(b"\0" * (member.size - 20))
                    file.flush()
                    assert read_range(path, member.offset, 4)
    return len(chosen)


@pytest.fixture
def config(tmp_path):
    config = story_config(tmp_path / "data", 60)
    config.data.holdout = 0.1
    config.train.rows = config.train.micro_rows = 2
    config.train.steps, config.train.save_every, config.train.validate_every = 8, 4, 8
    config.train.sample_every = 0
    return config


def test_bad_samples_are_named_on_disk_and_counted(tmp_path, config):
    bad = corrupt(tmp_path / "data" / "shards", 0.2)
    config.data = replace(config.data, failure_limit=0.9)
    train(config, tmp_path / "out", stop_after=6)
    train(config, tmp_path / "out", resume=True)
    path = tmp_path / "out" / "quarantine" / "replica_0000.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert 0 < len(lines) <= bad
    assert len({line["key"] for line in lines}) == len(lines)
    for line in lines:
        assert (line["source"], line["shard"], line["reason"]) == (
            "stories",
            "000000.tar",
            "image cannot be read",
        )
    totals = json.loads(path.with_suffix(".json").read_text())
    assert totals["stories"]["image cannot be read"] > 0 < totals["stories"]["seen"]
    counted = [
        record["quarantined"] for record in metrics.read(tmp_path / "out") if record["kind"] == "train"
    ]
    assert len(counted) == 8
    assert counted[5] > 0


def test_too_many_bad_samples_end_the_run_by_name(tmp_path, config):
    corrupt(tmp_path / "data" / "shards", 1.0)
    config.data = replace(config.data, failure_limit=0.2)
    with pytest.raises(TooManyFailures, match="source 'stories'.*data.failure_limit=0.2.*000000.tar, key"):
        train(config, tmp_path / "out")
    lines = (tmp_path / "out" / "quarantine" / "replica_0000.jsonl").read_text().splitlines()
    assert len(lines) >= 8
