"""Stable Diffusion as diffusers stores it: settings, names, and back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError
from torch import Tensor

from mmi_megatron.config import DecoderConfig, UNetConfig, VAEConfig
from mmi_megatron.convert.rules import ConvertError
from mmi_megatron.model.image_decoder import build_vae
from mmi_megatron.model.unet_mmfs import build_unet

FREE = {"sample_size", "upcast_attention", "force_upcast", "dropout", "addition_embed_type_num_heads"}
"""Keys of a configuration that do not change what the weights mean."""

TARGETS = {"epsilon": "epsilon", "v_prediction": "v"}

DEPRECATED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Names of an attention's parts in VAEs of diffusers before 0.18, among them those of Stable Diffusion
1 and 2 as published."""


def vae_name(name: str) -> str:
    """A VAE's name as diffusers has it now."""
    found = re.fullmatch(r"(.*attentions\.\d+\.)(query|key|value|proj_attn)(\.\w+)", name)
    return name if found is None else f"{found[1]}{DEPRECATED[found[2]]}{found[3]}"


def unet_settings(config: Mapping[str, Any], where: Path) -> tuple[UNetConfig, int, int]:
    """Our settings, the channels of its input and the width of the tokens it attends to.

    Raises:
        ConvertError: naming what this U-Net cannot be.
    """
    theirs = _complete(UNet2DConditionModel, config, where)
    channels = list(theirs["block_out_channels"])
    heads = _per_block(theirs["attention_head_dim"], channels)  # diffusers' name for how many there are
    width = {c // h for c, h in zip(channels, heads, strict=True)}
    if len(set(heads)) > 1 and len(width) > 1:
        raise ConvertError(f"{where}: attention_head_dim {heads} is neither the same nor in step with widths")
    fixed = len(width) > 1
    unet = UNetConfig(
        channels=channels,
        attention=["CrossAttn" in kind for kind in theirs["down_block_types"]],
        layers_per_block=theirs["layers_per_block"],
        head_width=UNetConfig().head_width if fixed else min(width),  # means nothing beside a count of heads
        heads=heads[0] if fixed else None,
        norm_groups=theirs["norm_num_groups"],
        linear_projection=theirs["use_linear_projection"],
    )
    inputs, tokens = theirs["in_channels"], theirs["cross_attention_dim"]
    with torch.device("meta"):
        ours = dict(build_unet(unet, 8, inputs, tokens).config)
    theirs["attention_head_dim"] = heads
    _same(theirs, ours, where)
    return unet, inputs, tokens


def vae_settings(config: Mapping[str, Any], where: Path) -> VAEConfig:
    """Our settings. Raises ConvertError naming what this VAE cannot be."""
    theirs = _complete(AutoencoderKL, config, where)
    vae = VAEConfig(
        channels=list(theirs["block_out_channels"]),
        layers_per_block=theirs["layers_per_block"],
        latent_channels=theirs["latent_channels"],
        norm_groups=theirs["norm_num_groups"],
        scaling_factor=theirs["scaling_factor"],
    )
    with torch.device("meta"):
        _same(theirs, dict(build_vae(vae, 8).config), where)
    return vae


def _complete(kind: Any, config: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """A configuration with diffusers' defaults in it, read by diffusers itself."""
    try:
        with torch.device("meta"):
            return dict(kind.from_config(dict(config)).config)
    except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise ConvertError(f"{where}: diffusers cannot build {kind.__name__} of it: {error}") from None


def _per_block(value: Any, channels: list[int]) -> list[int]:
    return list(value) if isinstance(value, list | tuple) else [value] * len(channels)


def _same(theirs: Mapping[str, Any], ours: Mapping[str, Any], where: Path) -> None:
    """Refuse a model that differs from ours in anything that its configuration says."""
    for key, value in ours.items():
        if key.startswith("_") or key in FREE:
            continue
        found = theirs.get(key)
        if _plain(found) != _plain(value):
            raise ConvertError(f"{where}: {key} {found!r} is not built here, only {value!r}")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def schedule_settings(config: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """Settings of ``DecoderConfig`` from a scheduler's. Raises ConvertError for another diffusion."""
    target = config.get("prediction_type", "epsilon")
    if target not in TARGETS:
        raise ConvertError(f"{where}: prediction_type {target!r}; expected one of {', '.join(TARGETS)}")
    for key in ("trained_betas", "rescale_betas_zero_snr"):
        if config.get(key):
            raise ConvertError(f"{where}: {key} is not built here")
    return {
        "target": TARGETS[target],
        "timesteps": config.get("num_train_timesteps", 1000),
        "beta_schedule": config.get("beta_schedule", "linear"),
        "beta_start": config.get("beta_start", 0.0001),
        "beta_end": config.get("beta_end", 0.02),
    }


def schedule_config(config: DecoderConfig) -> dict[str, Any]:
    """A ``scheduler_config.json`` for diffusers' DDIMScheduler."""
    names = {ours: theirs for theirs, ours in TARGETS.items()}
    return {
        "_class_name": "DDIMScheduler",
        "prediction_type": names[config.target],
        "num_train_timesteps": config.timesteps,
        "beta_schedule": config.beta_schedule,
        "beta_start": config.beta_start,
        "beta_end": config.beta_end,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }


def diffusers_config(model: Any) -> dict[str, Any]:
    """The ``config.json`` of a model of diffusers."""
    return {key: value for key, value in model.config.items() if key != "_name_or_path"} | {
        "_class_name": type(model).__name__
    }


@torch.no_grad()
def negatives(folder: Path, queries: int, width: int) -> Tensor | None:
    """The text encoder's tokens for the empty prompt, float32 [queries, width]: what the negatives of
    guidance start from, as in the release. None where there is no text encoder.

    Raises:
        ConvertError: when it does not fit the U-Net.
    """
    if not ((folder / "text_encoder").is_dir() and (folder / "tokenizer").is_dir()):
        return None
    from transformers import CLIPTextModel, CLIPTokenizer

    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", torch_dtype="auto").eval()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConvertError(f"{folder / 'text_encoder'}: transformers cannot load it: {error}") from None
    ids = tokenizer("", padding="max_length", max_length=queries, truncation=True, return_tensors="pt")
    tokens = encoder(ids.input_ids)[0][0].float()
    if tuple(tokens.shape) != (queries, width):
        raise ConvertError(
            f"{folder / 'text_encoder'}: gives {tuple(tokens.shape)}, the U-Net reads {(queries, width)}"
        )
    return tokens
