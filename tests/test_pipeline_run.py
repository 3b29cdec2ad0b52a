"""The whole loop over a pipeline and over divided rows: validation, samples, the average of the decoder's
weights, bf16."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmi_megatron.train import metrics
from tests.small_run import story_config

STEPS = 2


@pytest.fixture(scope="module")
def stories(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stories")
    story_config(folder, stories=16)
    return folder


def run(folder: Path, out: Path, layout: dict, precision: str) -> None:
    """On a rank: train a run with everything that the loop does besides steps."""
    from dataclasses import replace

    from data_pipeline.settings import SourceSettings
    from data_pipeline.tokens import load_tokenizer
    from mmi_megatron.train.loop import train
    from tests.samples import small_config

    config = small_config()
    tokenizer = str(folder / "tokenizer.json")
    config.model.language.vocabulary = load_tokenizer(tokenizer).size
    sources = [SourceSettings("stories", str(folder / "shards"))]
    config.data = replace(config.data, sources=sources, tokenizer=tokenizer, context_length=160, holdout=0.5)
    for name, value in layout.items():
        setattr(config.parallel, name, value)
    config.model.decoder.ema = 0.5
    config.optimizer.warmup_steps = 1
    settings = config.train
    settings.precision, settings.steps, settings.micro_rows = precision, STEPS, 1
    settings.validate_every, settings.validate_documents = 1, 2
    settings.sample_every, settings.sample_documents, settings.sample_steps = STEPS, 1, 2
    train(config, out)


def validations(out: Path) -> list[tuple[float, float]]:
    names = ("stories/next_token_loss", "stories/next_image_loss")
    records = [record for record in metrics.read(out) if record["kind"] == "validation"]
    assert [record["step"] for record in records] == [1, STEPS]
    return [tuple(record[name] for name in names) for record in records]


def picture(out: Path) -> np.ndarray:
    return np.asarray(Image.open(out / "samples" / f"step_{STEPS:07d}.png")).astype(int)


def steps(out: Path) -> list[tuple[float, ...]]:
    names = ("next_token_loss", "next_image_loss", "grad_norm", "tokens", "images", "data_checksum")
    return [tuple(r[name] for name in names) for r in metrics.read(out) if r["kind"] == "train"]


@pytest.fixture(scope="module")
def one(ranks, stories, tmp_path_factory) -> Path:
    """The run of a single process."""
    out = tmp_path_factory.mktemp("one")
    ranks.run(1, run, stories, out, {}, "fp32")
    return out


@pytest.mark.parametrize(
    "layout",
    [{"pipeline": 2}, {"tensor": 2, "sequence": True, "context": 2}],
    ids=lambda layout: " ".join(map(str, layout)),
)
def test_a_run_validates_averages_and_draws_as_one_process(ranks, stories, one, tmp_path, layout):
    two = tmp_path / "two"
    ranks.run(math.prod(layout.values()), run, stories, two, layout, "fp32")
    torch.testing.assert_close(torch.tensor(steps(two)), torch.tensor(steps(one)), atol=0, rtol=1e-5)
    torch.testing.assert_close(
        torch.tensor(validations(two)), torch.tensor(validations(one)), atol=0, rtol=1e-5
    )
    assert np.abs(picture(one) - picture(two)).max() <= 1  # of 255
    assert picture(one)[picture(one).shape[0] // 2 :].std() > 0


@pytest.mark.soak
@pytest.mark.parametrize(
    "layout",
    [
        {"pipeline": 2},
        {"pipeline": 2, "vision_ahead": True},
        {"pipeline": 2, "virtual": 2, "overlap": False},
        {"tensor": 2, "sequence": True, "mmfs": "queries"},
        {"context": 2},
    ],
    ids=lambda layout: " ".join(map(str, layout)),
)
def test_bf16_over_every_kind_of_layout(ranks, stories, tmp_path, layout):
    ranks.run(1, run, stories, tmp_path / "one", {}, "bf16")
    ranks.run(2, run, stories, tmp_path / "two", layout, "bf16")
    one, two = validations(tmp_path / "one"), validations(tmp_path / "two")
    torch.testing.assert_close(torch.tensor(two), torch.tensor(one), atol=0, rtol=2e-2)
    assert np.isfinite(picture(tmp_path / "two")).all()
