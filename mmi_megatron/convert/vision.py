"""Image towers of transformers' CLIP and of timm: settings, names, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from mmi_megatron.config import VisionConfig
from mmi_megatron.convert.released import clip_table
from mmi_megatron.convert.rules import ConvertError, Rule, Table, rename
from mmi_megatron.model.visual_tokenizer import CLIP_MEAN, CLIP_STD, VIT_NORM_EPS

POSITIONS = "pos_embed"
CLIP_DEFAULTS: dict[str, Any] = {"image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu"}
ACTIVATIONS = {"quick_gelu": True, "gelu": False}

HF_LEFT_OUT = {
    r"text_model\.|text_projection\.|logit_scale$": "of the text tower",
    r"visual_projection\.": "of the contrastive head",
    r"(vision_model\.)?embeddings\.position_ids$": "0, 1, 2, ...",
}
TIMM_LEFT_OUT = {r"(head|fc_norm|head_drop)\.": "of the classifier"}


def hf_clip_settings(config: Mapping[str, Any], where: Path) -> VisionConfig:
    """Our settings from the ``config.json`` of a CLIPVisionModel or a whole CLIPModel.

    Raises:
        ConvertError: naming what this image tower cannot be.
    """
    config = {**CLIP_DEFAULTS, **config.get("vision_config", config)}
    if config.get("model_type") not in ("clip_vision_model", "clip", None):
        raise ConvertError(f"{where}: model_type {config['model_type']!r}; expected CLIP's")
    if config["hidden_act"] not in ACTIVATIONS:
        raise ConvertError(f"{where}: hidden_act {config['hidden_act']!r} is not built here")
    if config.get("layer_norm_eps", VIT_NORM_EPS) != VIT_NORM_EPS:
        raise ConvertError(f"{where}: layer_norm_eps {config['layer_norm_eps']}, only {VIT_NORM_EPS} here")
    try:
        return VisionConfig(
            image_size=config["image_size"],
            patch_size=config["patch_size"],
            width=config["hidden_size"],
            layers=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            ffn=config["intermediate_size"],
            quick_gelu=ACTIVATIONS[config["hidden_act"]],
        )
    except KeyError as error:
        raise ConvertError(f"{where}: no {error.args[0]!r} in it") from None


def hf_clip_config(config: VisionConfig, dtype: str) -> dict[str, Any]:
    """A ``config.json`` for transformers' CLIPVisionModel."""
    return {
        "architectures": ["CLIPVisionModel"],
        "model_type": "clip_vision_model",
        "hidden_size": config.width,
        "intermediate_size": config.ffn,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": 3,
        "hidden_act": "quick_gelu" if config.quick_gelu else "gelu",
        "layer_norm_eps": VIT_NORM_EPS,
        "dtype": dtype,
    }


def hf_clip_table(layers: int, prefix: str = "vision_model.") -> Table:
    """Names of CLIPVisionModel against those below ``visual_tokenizer.vit.``"""
    return clip_table(layers, final_norm=True).under("", prefix)


def hf_clip_prefix(names: Mapping[str, Tensor]) -> str:
    """What stands before the image tower's names: transformers 5 leaves it out."""
    return "vision_model." if any(name.startswith("vision_model.") for name in names) else ""


def timm_settings(config: Mapping[str, Any], where: Path) -> VisionConfig:
    """Our settings from the ``config.json`` that timm writes, by building the model without memory.

    Raises:
        ConvertError: for an architecture that timm or this tower does not know.
    """
    name = config.get("architecture", "")
    arguments = {**config.get("model_args", {}), "num_classes": 0}
    wanted = (config.get("pretrained_cfg") or {}).get("input_size")
    if wanted:
        arguments.setdefault("img_size", wanted[-1])
    try:
        with torch.device("meta"):
            model: Any = timm.create_model(name, pretrained=False, **arguments)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ConvertError(f"{where}: timm cannot build {name!r}: {error}") from None
    if not isinstance(model, timm.models.VisionTransformer):
        raise ConvertError(f"{where}: {name!r} is no VisionTransformer of timm")
    block, norm = model.blocks[0], model.norm
    activation = _activation(block.mlp.act)
    if isinstance(model.norm_pre, nn.Identity) or activation is None or norm.eps != VIT_NORM_EPS:
        raise ConvertError(f"{where}: {name!r} is no image tower of CLIP as timm has it")
    return VisionConfig(
        image_size=model.patch_embed.img_size[0],
        patch_size=model.patch_embed.patch_size[0],
        width=model.embed_dim,
        layers=len(model.blocks),
        heads=block.attn.num_heads,
        ffn=block.mlp.fc1.out_features,
        quick_gelu=activation,
    )


def _activation(module: nn.Module) -> bool | None:
    """Whether it is the quick GELU; None for something else."""
    named = {"QuickGELU": True, "QuickGELUTanh": None, "GELU": False}
    return named.get(type(module).__name__)


def timm_config(config: VisionConfig) -> dict[str, Any]:
    """A ``config.json`` for timm: CLIP's ViT of the same patch with this tower's sizes."""
    name = f"vit_large_patch14_clip_{'quickgelu_' if config.quick_gelu else ''}224"
    size = [3, config.image_size, config.image_size]
    return {
        "architecture": name,
        "num_classes": 0,
        "num_features": config.width,
        "model_args": {
            "img_size": config.image_size,
            "patch_size": config.patch_size,
            "embed_dim": config.width,
            "depth": config.layers,
            "num_heads": config.heads,
            "mlp_ratio": (config.ffn + 0.5) / config.width,
        },
        "pretrained_cfg": {
            "input_size": size,
            "fixed_input_size": True,
            "mean": list(CLIP_MEAN),
            "std": list(CLIP_STD),
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "num_classes": 0,
        },
    }


def timm_table(names: list[str]) -> Table:
    """timm's names are ours below ``visual_tokenizer.vit.``"""
    return Table([rename(name, name) for name in names])


def resized(table: Table, ours: str, stored: Tensor, wanted: Tensor) -> Table:
    """The table with the position embedding resized while loading, for images of another size.

    Args:
        table: of names.
        ours: name of the position embedding.
        stored, wanted: theirs after renaming, and ours, without values: [1, 1 + grid * grid, C].
    """
    if stored.shape == wanted.shape:
        return table
    side = math.isqrt(wanted.shape[1] - 1)
    rules = []
    for rule in table.rules:
        if rule.ours == ours:
            rule = _resized(rule, stored, side)
        rules.append(rule)
    return Table(rules, table.constants, table.ours_only, table.legacy)


def _resized(rule: Rule, stored: Tensor, side: int) -> Rule:
    load, save, old = rule.load, rule.save, math.isqrt(stored.shape[1] - 1)

    def resize(tensors: list[Tensor]) -> Tensor:
        return resample_abs_pos_embed(load(tensors), [side, side], [old, old], num_prefix_tokens=1)

    def shape(_: Tensor) -> list[Tensor]:
        return save(stored)

    how = f"{old} x {old} positions resized to {side} x {side}"
    return Rule(rule.ours, rule.theirs, resize, shape, how)
