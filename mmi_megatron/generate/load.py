"""A finished run, ready to be used: its newest checkpoint in the plain model, at any layout. The converted
public checkpoint serves as well."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from data_pipeline.tokens import Tokenizer, load_tokenizer
from mmi_megatron.config import Config, ParallelConfig
from mmi_megatron.convert.start import converted_model, load_whole
from mmi_megatron.errors import ConfigError
from mmi_megatron.model.language_model import LanguageModel
from mmi_megatron.model.mm_interleaved import MMInterleaved
from mmi_megatron.parallel import groups
from mmi_megatron.parallel.model import ShardedMMInterleaved, build_model
from mmi_megatron.parallel.plain import gather_plain
from mmi_megatron.settings import load_config
from mmi_megatron.train import checkpoint, checkpoint_folder
from mmi_megatron.train.checkpoint_reader import open_run, read_index
from mmi_megatron.train.storage import Folder

PARTS = ("vision", "language", "decoder")
FINAL_NORM = "language_model.decoder.final_layernorm.weight"


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


def load_run(run: Path, device: torch.device, tokenizer: Path | None = None) -> Run:
    """Load the newest complete checkpoint of a run, whatever its layout was, or a converted one.

    The sharded model is built on this process alone, filled, and taken over into the plain one.

    Args:
        run: folder of a run, or a checkpoint that ``mmi convert released`` wrote.
        device: where to put it.
        tokenizer: a ``tokenizer.json`` or its folder, in place of the run's ``data.tokenizer``;
            converted weights have none of their own.

    Raises:
        ConfigError: when the folder is neither, has no complete checkpoint, or the tokenizer is not
            that of the weights.
        DataError: when the tokenizer cannot be read.
        CheckpointError: when the checkpoint is of another model.
    """
    run = Path(run)
    folder, config = _converted(run) if (run / checkpoint_folder.RUN).is_file() else _trained(run)
    if tokenizer is not None:
        config.data.tokenizer = str(tokenizer)
    elif not config.data.tokenizer:
        raise ConfigError(f"{run}: converted weights come without a tokenizer; name theirs with --tokenizer")
    words = load_tokenizer(config.data.tokenizer)
    extra = open_run(folder)["extra"]
    _check_tokenizer(words, config, folder, extra)
    alone = replace(
        config,
        parallel=ParallelConfig(shard_images=False),
        train=replace(config.train, rows=1, micro_rows=1),
    )
    groups.initialize(alone)
    try:
        sharded = build_model(alone, words.special)
        with warnings.catch_warnings():
            # Megatron calls torch's loader by the older of its two names.
            warnings.filterwarnings("ignore", "`load_state_dict` is deprecated", FutureWarning)
            if "converted" in extra:
                load_whole(sharded, folder)
            else:
                checkpoint.load_weights(sharded, folder)
        model = _plain(sharded, config, words)
    finally:
        groups.destroy()
    return Run(run, config, model.to(device).eval(), words, extra.get("step", 0), device)


def _trained(run: Path) -> tuple[Folder, Config]:
    """Newest checkpoint and settings of a run."""
    if not (run / "config.yaml").is_file():
        raise ConfigError(
            f"{run}: no config.yaml in it; name a folder that `mmi train` or `mmi convert released` wrote"
        )
    config = load_config(run / "config.yaml")
    folder = config.train.checkpoints or run / "checkpoints"
    newest = checkpoint.latest(folder)
    if newest is None:
        raise ConfigError(
            f"{run}: no complete checkpoint in {folder}; train it further "
            f"(train.save_every={config.train.save_every})"
        )
    return newest, config


def _converted(path: Path) -> tuple[Folder, Config]:
    """A converted checkpoint and the settings to use it with: bfloat16 where it is stored so."""
    folder = Folder(path)
    extra = open_run(folder)["extra"]
    model = converted_model(extra)
    if model is None:
        raise ConfigError(f"{path}: a checkpoint of a run; name the run's folder instead")
    if missing := [part for part in PARTS if part not in extra["settings"]]:
        raise ConfigError(
            f"{path}: holds a part of a model, without {', '.join(missing)}; train a whole one from it "
            "(train.init_from), or convert the released checkpoint"
        )
    config = Config(model=model)
    config.data.image_tokens = model.vision.resampler.queries
    stored = read_index(folder).state_dict_metadata[FINAL_NORM]
    assert isinstance(stored, TensorStorageMetadata)
    half = stored.properties.dtype == torch.bfloat16
    config.train.precision = "bf16" if half else "fp32"
    return folder, config


def _check_tokenizer(words: Tokenizer, config: Config, folder: Folder, extra: dict[str, Any]) -> None:
    """Refuse a tokenizer that the weights were not trained with."""
    if "converted" not in extra:
        trained = extra["data"]["tokenizer"]
        if trained != words.fingerprint:
            raise ConfigError(
                f"data.tokenizer: {config.data.tokenizer} (fingerprint {words.fingerprint}) is not the "
                f"tokenizer that {folder} was trained with ({trained}); put that one back"
            )
        return
    last = config.model.language.vocabulary - 1
    if (words.special.boi, words.special.image) != (last - 1, last):
        raise ConfigError(
            f"--tokenizer {config.data.tokenizer}: with the image tokens behind it, BoI is "
            f"{words.special.boi} and the placeholder {words.special.image}; those of {folder} are "
            f"{last - 1} and {last}"
        )


def _plain(sharded: ShardedMMInterleaved, config: Config, tokenizer: Tokenizer) -> MMInterleaved:
    """The same model around the plain language model; other parts are taken over as they are."""
    special, model = tokenizer.special, config.model
    with torch.device("meta"):
        language = LanguageModel(
            model.language, model.vision.width, sharded.visual_tokenizer.shapes, special.boi, special.image
        )
    language.load_state_dict(gather_plain(sharded.language_model), assign=True)
    return MMInterleaved(model, language, sharded.visual_tokenizer, sharded.image_decoder)
