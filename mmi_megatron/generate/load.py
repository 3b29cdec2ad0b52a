"""A finished run, ready to be used: its newest checkpoint in the plain model, at any layout."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from data_pipeline.tokens import Tokenizer, load_tokenizer
from mmi_megatron.config import Config, ParallelConfig
from mmi_megatron.errors import ConfigError
from mmi_megatron.model.language_model import LanguageModel
from mmi_megatron.model.mm_interleaved import MMInterleaved
from mmi_megatron.parallel import groups
from mmi_megatron.parallel.model import ShardedMMInterleaved, build_model
from mmi_megatron.parallel.plain import gather_plain
from mmi_megatron.settings import load_config
from mmi_megatron.train import checkpoint


@dataclass
class Run:
    """A trained model.

    Attributes:
        path: folder of the run.
        config: what it was trained with.
        model: around the plain language model, in evaluation mode.
        tokenizer: its tokenizer.
        step: optimizer steps behind its weights.
        device: where it is.
    """

    path: Path
    config: Config
    model: MMInterleaved
    tokenizer: Tokenizer
    step: int
    device: torch.device


def load_run(run: Path, device: torch.device) -> Run:
    """Load the newest complete checkpoint of a run, whatever its layout was.

    The sharded model is built on this process alone, filled, and taken over into the plain one.

    Raises:
        ConfigError: when the folder is no run, has no complete checkpoint, or its tokenizer is not
            the one it was trained with.
        DataError: when the tokenizer cannot be read.
        CheckpointError: when the checkpoint is of another model.
    """
    run = Path(run)
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"{run}: no config.yaml in it; name a folder that `mmi train` wrote")
    config = load_config(run / "config.yaml")
    newest = checkpoint.latest(run / "checkpoints")
    if newest is None:
        raise ConfigError(
            f"{run}: no complete checkpoint in {run / 'checkpoints'}; train it further "
            f"(train.save_every={config.train.save_every})"
        )
    tokenizer = load_tokenizer(config.data.tokenizer)
    alone = replace(
        config,
        parallel=ParallelConfig(shard_images=False),
        train=replace(config.train, rows=1, micro_rows=1),
    )
    groups.initialize(alone)
    try:
        sharded = build_model(alone, tokenizer.special)
        with warnings.catch_warnings():
            # Megatron calls torch's loader by the older of its two names.
            warnings.filterwarnings("ignore", "`load_state_dict` is deprecated", FutureWarning)
            extra = checkpoint.load_weights(sharded, newest)
        model = _plain(sharded, config, tokenizer)
    finally:
        groups.destroy()
    trained = extra["data"]["tokenizer"]
    if trained != tokenizer.fingerprint:
        raise ConfigError(
            f"data.tokenizer: {config.data.tokenizer} (fingerprint {tokenizer.fingerprint}) is not the "
            f"tokenizer that {newest} was trained with ({trained}); put that one back"
        )
    return Run(run, config, model.to(device).eval(), tokenizer, extra["step"], device)


def _plain(sharded: ShardedMMInterleaved, config: Config, tokenizer: Tokenizer) -> MMInterleaved:
    """The same model around the plain language model; other parts are taken over as they are."""
    special, model = tokenizer.special, config.model
    with torch.device("meta"):
        language = LanguageModel(
            model.language, model.vision.width, sharded.visual_tokenizer.shapes, special.boi, special.image
        )
    language.load_state_dict(gather_plain(sharded.language_model), assign=True)
    return MMInterleaved(model, language, sharded.visual_tokenizer, sharded.image_decoder)
