"""A checkpoint written anew for another layout holds the same weights."""

from __future__ import annotations

import shutil

import pytest
import torch

from mmi_megatron.generate.load import load_run
from mmi_megatron.train import checkpoint_folder, launch
from mmi_megatron.train.reshard import launch_reshard
from tests.small_run import story_config

pytestmark = pytest.mark.soak


def test_written_anew_for_two_ranks_and_then_for_one(tmp_path):
    config = story_config(tmp_path)
    config.train.steps, config.optimizer.warmup_steps = 2, 1
    config.train.validate_every, config.train.sample_every = 0, 0
    config.train.timeout = 600
    run, other = tmp_path / "run", tmp_path / "other"
    assert launch.launch(config, run, ranks=1) == 0
    config.parallel.tensor = 2
    assert launch_reshard(config, run, str(other / "checkpoints"), None, None) == 0
    (path,) = checkpoint_folder.by_step(other / "checkpoints")
    assert checkpoint_folder.run_of(path)["layout"]["tensor"] == 2 and checkpoint_folder.verify(path) == []
    assert len([name for name in path.files() if name.endswith(".distcp")]) == 2
    shutil.copy(run / "config.yaml", other)
    device = torch.device("cpu")
    before, after = (load_run(folder, device).model.state_dict() for folder in (run, other))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    frozen = [[path.name for path in (folder / "checkpoints").glob("frozen_*")] for folder in (run, other)]
    assert frozen[0] == frozen[1] and len(frozen[0]) == 1
