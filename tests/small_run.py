"""A small run to generate from and to judge: storybook shards, a tokenizer, and a model whose weights
are random everywhere, so that nothing hides behind a zero."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from data_pipeline.cli import fit_tokenizer
from data_pipeline.settings import SourceSettings
from data_pipeline.storybook import write_stories
from data_pipeline.tokens import load_tokenizer
from mmi_megatron.config import Config
from mmi_megatron.generate.load import Run
from mmi_megatron.model.image_decoder import ImageDecoder
from mmi_megatron.model.language_model import LanguageModel
from mmi_megatron.model.mm_interleaved import MMInterleaved
from mmi_megatron.model.visual_tokenizer import VisualTokenizer
from tests.samples import small_config


def story_config(folder: Path, stories: int = 40) -> Config:
    """A small configuration on stories written to ``folder``."""
    write_stories(folder / "shards", stories, seed=3, size=32)
    fit_tokenizer([folder / "shards"], folder / "tokenizer.json", 320)
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    config = small_config()
    config.model.language.vocabulary = tokenizer.size
    config.data = replace(
        config.data,
        sources=[SourceSettings("stories", str(folder / "shards"))],
        tokenizer=str(folder / "tokenizer.json"),
        context_length=160,
        holdout=0.5,
    )
    return config


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Random parameters of a size that keeps activations near 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name and name.endswith("weight") and parameter.ndim == 1:
            parameter.copy_(1 + 0.1 * noise)
        else:
            parameter.copy_(noise * (0.2 if parameter.ndim < 2 else parameter[0].numel() ** -0.5))


def random_run(config: Config, path: Path) -> Run:
    """A run of that configuration, as ``load_run`` would give it."""
    tokenizer = load_tokenizer(config.data.tokenizer)
    model, special = config.model, tokenizer.special
    vision = VisualTokenizer(model.vision, model.language.width)
    language = LanguageModel(model.language, model.vision.width, vision.shapes, special.boi, special.image)
    decoder = None
    if model.loss.next_image:
        decoder = ImageDecoder(model.decoder, model.language.width, model.vision.width, vision.shapes)
    whole = MMInterleaved(model, language, vision, decoder)
    randomise(whole)
    return Run(path, config, whole.eval(), tokenizer, 0, torch.device("cpu"))
