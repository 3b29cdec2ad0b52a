"""A checkpoint's weights to other programs: transformers, diffusers, timm, and the release's one file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.errors import DataError
from data_pipeline.tokens import load_tokenizer
from mmi_megatron.config import Config, ModelConfig
from mmi_megatron.convert import llama, released_model, vision
from mmi_megatron.convert import stable_diffusion as diffusion
from mmi_megatron.convert.families import DECODER, LANGUAGE, VIT, language_shapes, whole_shapes
from mmi_megatron.convert.report import Report, Row
from mmi_megatron.convert.rules import ConvertError, Rule, Table, cast, rename
from mmi_megatron.convert.sharded import Stored, draft
from mmi_megatron.convert.start import converted_model, resolve
from mmi_megatron.convert.target import Group, write_bin, write_safetensors
from mmi_megatron.model.image_decoder import build_vae
from mmi_megatron.model.unet_mmfs import build_unet
from mmi_megatron.model.vision_towers import build_vit
from mmi_megatron.settings import load_config
from mmi_megatron.train.checkpoint_reader import open_run
from mmi_megatron.train.storage import Folder

AVERAGE = f"{DECODER}average."
BIN = (".bin", ".pt", ".pth")


@dataclass
class Checkpoint:
    """A checkpoint that is exported.

    Attributes:
        stored: its tensors, read one at a time.
        model: settings of the model; of a converted one, true for the parts that it holds.
        text_rows: tokens of the language model without those for images.
        kept: for the language model's ``config.json``, keys of ``llama.KEPT``.
        dtype: of all floating-point tensors written; None keeps them.
        average: whether averaged weights of the decoder stand for its own, where there are such.
    """

    stored: Stored
    model: ModelConfig
    text_rows: int
    kept: Mapping[str, Any] = field(default_factory=lambda: llama.KEPT)
    dtype: torch.dtype | None = None
    average: bool = True

    @cached_property
    def averaged(self) -> bool:
        """Whether there are averages, and they are wanted."""
        updates = f"{AVERAGE}updates"
        return self.average and updates in self.stored and int(self.stored[updates]) > 0

    def name(self, ours: str) -> str:
        """Where a tensor's values are taken from."""
        average = AVERAGE + ours.removeprefix(DECODER)
        return average if ours.startswith(DECODER) and average in self.stored and self.averaged else ours

    def cast(self, like: Tensor) -> torch.dtype:
        """The type in which a tensor is written."""
        return self.dtype if self.dtype is not None and like.is_floating_point() else like.dtype


def open_checkpoint(
    address: str, settings: Path | None = None, dtype: torch.dtype | None = None, average: bool = True
) -> Checkpoint:
    """Open a checkpoint that was converted, or one of a run, or the newest of a run's folder.

    Args:
        address: of it.
        settings: YAML of the run, where it does not lie beside the checkpoints.
        dtype, average: as of ``Checkpoint``.

    Raises:
        ConvertError: when there is none, or its settings are not found.
        CheckpointError: when it is not whole.
    """
    folder = resolve(address)
    extra = open_run(folder)["extra"]
    if (model := converted_model(extra)) is not None:
        stored = Stored(folder, model.language)
        kept = llama.KEPT | extra.get("kept", {})
        return Checkpoint(stored, model, extra.get("text_rows", 0), kept, dtype, average)
    config = load_config(settings or _settings_beside(folder))
    rows, kept = _tokens(config)
    stored = Stored(folder, config.model.language)
    return Checkpoint(stored, config.model, rows, kept, dtype, average)


def _settings_beside(folder: Folder) -> Path:
    for place in (folder.parent.parent, folder.parent, folder):
        if place.local is not None and (file := place.local / "config.yaml").is_file():
            return file
    raise ConvertError(f"{folder}: no config.yaml of its run near it; name one with --config")


def _tokens(config: Config) -> tuple[int, dict[str, int]]:
    """Rows of the text tokens, which come before those for images, and ``llama.KEPT`` of a run."""
    vocabulary = config.model.language.vocabulary
    try:
        special = load_tokenizer(config.data.tokenizer).special
    except DataError as error:
        raise ConvertError(f"data.tokenizer: {error}; it says which rows are text") from None
    behind = {special.boi, special.image} == {vocabulary - 2, vocabulary - 1}
    kept = (special.bos, special.eos, config.data.context_length)
    return vocabulary - 2 if behind else vocabulary, dict(zip(llama.KEPT, kept, strict=True))


# What every export does


def _groups(checkpoint: Checkpoint, table: Table, targets: Mapping[str, Tensor]) -> Iterator[Group]:
    """The other side's tensors, rule by rule, checked against what the settings promise."""
    missing = [rule.ours for rule in table.rules if rule.ours not in checkpoint.stored]
    if missing:
        raise ConvertError(
            f"{checkpoint.stored.folder} lacks {len(missing)} tensors for this, the first: {missing[:4]}"
        )
    for rule in table.rules:
        like = checkpoint.stored.like[rule.ours]
        if like.shape != targets[rule.ours].shape:
            raise ConvertError(
                f"{checkpoint.stored.folder}: {rule.ours} is {tuple(like.shape)}, "
                f"its settings say {tuple(targets[rule.ours].shape)}"
            )
        kind = checkpoint.cast(like)
        likes = dict(zip(rule.theirs, rule.save(torch.empty_like(like, dtype=kind)), strict=True))
        yield Group(likes, _values(checkpoint, rule, kind))
    for name, value in table.constants.items():
        yield Group({name: value.to("meta")}, lambda value=value: [value])  # type: ignore[misc]


def _values(checkpoint: Checkpoint, rule: Rule, kind: torch.dtype) -> Callable[[], list[Tensor]]:
    name = checkpoint.name(rule.ours)
    return lambda: rule.save(cast(name, checkpoint.stored[name], kind))


def _report(checkpoint: Checkpoint, what: str, table: Table, prefix: str, notes: list[str]) -> Report:
    rows = []
    for rule in table.rules:
        like, source = checkpoint.stored.like[rule.ours], checkpoint.name(rule.ours)
        how = "; ".join(part for part in (rule.how, "averaged" * (source != rule.ours)) if part)
        kind = str(checkpoint.cast(like)).removeprefix("torch.")
        rows.append(Row(rule.theirs, rule.ours, tuple(like.shape), kind, how))
    used = {rule.ours for rule in table.rules} | table.ours_only
    for name, like in checkpoint.stored.like.items():
        if name.startswith(prefix) and name not in used and not name.startswith(AVERAGE):
            kind = str(like.dtype).removeprefix("torch.")
            rows.append(Row((), name, tuple(like.shape), kind, "left out: has no place there"))
    for name, value in table.constants.items():
        rows.append(
            Row((name,), "", tuple(value.shape), str(value.dtype).removeprefix("torch."), "a constant")
        )
    return Report(what, rows, notes)


def _dtype_name(checkpoint: Checkpoint, prefix: str) -> str:
    """The type that a model's configuration names: that of its tensors."""
    likes = [like for name, like in checkpoint.stored.like.items() if name.startswith(prefix)]
    return str(checkpoint.cast(likes[0])).removeprefix("torch.") if likes else "float32"


def _json(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2))


# The kinds


def export_llm(checkpoint: Checkpoint, out: Path) -> Report:
    """Write a folder that transformers' LlamaForCausalLM loads, or, with biases, Qwen2ForCausalLM.

    MMFS and what is trained of the image tokens have no place in it; the report lists them.

    Raises:
        ConvertError: when the checkpoint holds no such model, or ``out`` exists.
    """
    language = replace(checkpoint.model.language, train_image_tokens=False)
    bare = replace(language, mmfs=replace(language.mmfs, kind="none"))
    rows = checkpoint.text_rows or language.vocabulary - llama.IMAGE_TOKENS
    table = llama.llama_table(bare, rows).under(LANGUAGE, "")
    groups = list(_groups(checkpoint, table, language_shapes(bare)))
    with draft(out) as folder:
        folder.mkdir()
        write_safetensors(folder / "model.safetensors", groups)
        config = llama.llama_config(bare, rows, checkpoint.kept, _dtype_name(checkpoint, LANGUAGE))
        _json(folder / "config.json", config)
    left = any(".mmfs." in name for name in checkpoint.stored)
    notes = ["without its MMFS: the same function only where a document has no images"] if left else []
    return _report(checkpoint, f"language model to {out}", table, LANGUAGE, notes)


def export_vision(checkpoint: Checkpoint, out: Path, layout: str = "hf") -> Report:
    """Write a folder that transformers' CLIPVisionModel (``hf``) or timm (``timm``) loads.

    Raises:
        ConvertError: when the checkpoint holds no image tower, or ``out`` exists.
    """
    config = checkpoint.model.vision
    with torch.device("meta"):
        tower: Any = build_vit(config)
        targets = {VIT + name: tensor for name, tensor in tower.state_dict().items()}
    if layout == "timm":
        table = vision.timm_table([name.removeprefix(VIT) for name in targets]).under(VIT, "")
        settings = vision.timm_config(config)
    elif layout == "hf":
        if config.tower != "clip":
            raise ConvertError(
                f"--vision-format hf: only CLIP's tower; write this one, {config.tower}, for timm"
            )
        table = vision.hf_clip_table(config.layers).under(VIT, "")
        settings = vision.hf_clip_config(config, _dtype_name(checkpoint, VIT))
    else:
        raise ConvertError(f"--vision-format {layout!r}: expected hf or timm")
    groups = list(_groups(checkpoint, table, targets))
    with draft(out) as folder:
        folder.mkdir()
        write_safetensors(folder / "model.safetensors", groups)
        _json(folder / "config.json", settings)
    return _report(checkpoint, f"image tower to {out}", table, "visual_tokenizer.", [])


def export_decoder(checkpoint: Checkpoint, out: Path) -> Report:
    """Write a folder with ``unet``, ``vae`` and ``scheduler`` that diffusers loads.

    Raises:
        ConvertError: when the checkpoint holds no decoder, or ``out`` exists.
    """
    config = checkpoint.model.decoder
    shrinks = 1 if config.vae is None else 2 ** (len(config.vae.channels) - 1)
    side = config.image_size // shrinks
    channels = 3 if config.vae is None else config.vae.latent_channels
    with torch.device("meta"):
        models: dict[str, Any] = {"unet": build_unet(config.unet, side, channels, config.resampler.width)}
        if config.vae is not None:
            models["vae"] = build_vae(config.vae, config.image_size)
    parts = {}
    for name, model in models.items():
        ours = f"{DECODER}{name}."
        table = Table([rename(tensor, tensor) for tensor in model.state_dict()]).under(ours, "")
        targets = {ours + tensor: like for tensor, like in model.state_dict().items()}
        parts[name] = table, list(_groups(checkpoint, table, targets))
    with draft(out) as folder:
        for name, (_, groups) in parts.items():
            _json(folder / name / "config.json", diffusion.diffusers_config(models[name]))
            write_safetensors(folder / name / "diffusion_pytorch_model.safetensors", groups)
        _json(folder / "scheduler" / "scheduler_config.json", diffusion.schedule_config(config))
    whole = Table()
    for name, (table, _) in parts.items():
        whole += table.under("", f"{name}/")
    notes = ["without its MMFS and its resampler: not the same function"]
    return _report(checkpoint, f"image decoder to {out}", whole, DECODER, notes)


def export_released(checkpoint: Checkpoint, out: Path) -> Report:
    """Write the whole model in the release's naming, as one file: ``.bin`` as the release is, or
    ``.safetensors``.

    Raises:
        ConvertError: when the checkpoint is not of a whole model of that kind, or ``out`` exists.
    """
    if out.suffix not in (*BIN, ".safetensors"):
        raise ConvertError(f"--released {out}: expected a name that ends in .bin or .safetensors")
    config = checkpoint.model
    released_model.check_settings(config)
    targets = whole_shapes(replace(config, decoder=replace(config.decoder, ema=0.0)))
    table = released_model.released_table(config, list(targets))
    groups = list(_groups(checkpoint, table, targets))
    with draft(out) as file:
        if out.suffix in BIN:
            write_bin(file, groups)
        else:
            write_safetensors(file, groups, shard=1 << 62)
    return _report(checkpoint, f"release's naming to {out}", table, "", [])
