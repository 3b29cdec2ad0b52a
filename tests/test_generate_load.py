"""A run's newest checkpoint in the plain model, whatever layout it was written at."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from mmi_megatron.cli import app
from mmi_megatron.errors import ConfigError
from mmi_megatron.settings import save_config
from tests.ranks import Ranks
from tests.small_run import random_run, story_config


def write_run(config, folder, extra, steps):
    """Write checkpoints of random weights on one rank of a layout."""
    from data_pipeline.tokens import load_tokenizer
    from mmi_megatron.parallel import groups
    from mmi_megatron.parallel.model import build_model
    from mmi_megatron.parallel.plain import load_plain
    from mmi_megatron.settings import save_config
    from mmi_megatron.train import checkpoint
    from mmi_megatron.train.optimizer import build_optimizer, wrap

    tokenizer = load_tokenizer(config.data.tokenizer)
    layout = groups.initialize(config)
    try:
        model = build_model(config, tokenizer.special)
        plain = random_run(config, folder).model
        load_plain(model.language_model, plain.language_model.state_dict())
        model.visual_tokenizer.load_state_dict(plain.visual_tokenizer.state_dict())
        model.image_decoder.load_state_dict(plain.image_decoder.state_dict())
        wrapped = wrap(model, config)
        optimizer, scheduler = build_optimizer(wrapped, config)
        if layout.rank == 0:
            save_config(config, folder / "config.yaml")
        data = {"tokenizer": tokenizer.fingerprint} | extra
        for step in steps:
            checkpoint.save(
                wrapped, optimizer, scheduler, {"step": step, "data": data}, folder / "checkpoints", step=step
            )
    finally:
        groups.destroy()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A run written at TP = 2, and its configuration."""
    folder = tmp_path_factory.mktemp("run")
    config = story_config(folder)
    config = replace(config, parallel=replace(config.parallel, tensor=2))
    with Ranks() as ranks:
        ranks.run(2, write_run, config, folder, {}, [3, 12])
    return folder, config


def load(folder):
    from mmi_megatron.generate.load import load_run

    return load_run(folder, torch.device("cpu"))


def test_a_run_of_two_ranks_is_read_whole(written):
    folder, config = written
    run, want = load(folder), random_run(config, folder).model.state_dict()
    assert run.step == 12 and run.config == config and not run.model.training
    got = run.model.state_dict()
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name


def test_checkpoints_kept_elsewhere_are_found(tmp_path, written):
    folder, config = written
    run, elsewhere = tmp_path / "run", tmp_path / "store" / "of_this_run"
    run.mkdir()
    shutil.copytree(folder / "checkpoints", elsewhere)
    shutil.copytree(folder / "checkpoints" / "step_0000003", run / "checkpoints" / "step_0000003")
    save_config(replace(config, train=replace(config.train, checkpoints=str(elsewhere))), run / "config.yaml")
    (tmp_path / "prompt.json").write_text(json.dumps({"content": [{"text": "Once"}]}))
    assert load(run).step == 12  # not the one of the run's own folder
    result = CliRunner().invoke(
        app,
        ["generate", str(run), "--prompt", str(tmp_path / "prompt.json"), "--out", str(tmp_path / "x.html")]
        + ["--max-tokens", "3", "--max-images", "0"],
    )
    assert result.exit_code == 0, result.output
    assert (tmp_path / "x.html").is_file()
    shutil.rmtree(elsewhere / "step_0000012")
    shutil.rmtree(elsewhere / "step_0000003")
    with pytest.raises(ConfigError, match=f"no complete checkpoint in {elsewhere}"):
        load(run)


def test_a_folder_that_is_no_run_is_a_clear_error(tmp_path, written):
    with pytest.raises(ConfigError, match="no config.yaml"):
        load(tmp_path)
    shutil.copy(written[0] / "config.yaml", tmp_path)
    with pytest.raises(ConfigError, match="no complete checkpoint"):
        load(tmp_path)
    half = tmp_path / "checkpoints" / "step_0000012"
    shutil.copytree(written[0] / "checkpoints" / "step_0000012", half)
    (half / "complete.json").unlink()
    with pytest.raises(ConfigError, match="no complete checkpoint"):
        load(tmp_path)


def test_another_tokenizer_is_refused(tmp_path, written):
    from data_pipeline.tokens import train_tokenizer

    folder, config = written
    train_tokenizer(["other words entirely, and then some more of them"], 300).save(
        tmp_path / "tokenizer.json"
    )
    text = (
        (folder / "config.yaml").read_text().replace(config.data.tokenizer, str(tmp_path / "tokenizer.json"))
    )
    (tmp_path / "config.yaml").write_text(text)
    shutil.copytree(folder / "checkpoints", tmp_path / "checkpoints")
    with pytest.raises(ConfigError, match="not the tokenizer"):
        load(tmp_path)
