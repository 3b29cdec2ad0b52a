"""Image towers of transformers' CLIP and of timm: settings, names, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mmi_megatron.config import VisionConfig
from mmi_megatron.convert.released import clip_table
from mmi_megatron.convert.rules import ConvertError, Rule, Table, rename
from mmi_megatron.model.vision_towers import KINDS, VIT_NORM_EPS, build_vit

POSITIONS = "pos_embed"
CLIP_DEFAULTS: dict[str, Any] = {"image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu"}
ACTIVATIONS = {"quick_gelu": True, "gelu": False}

HF_LEFT_OUT = {
    r"text_model\.|text_projection\.|logit_scale$": "of the text tower",
    r"visual_projection\.": "of the contrastive head",
    r"(vision_model\.)?embeddings\.position_ids$": "0, 1, 2, ...",
}
TIMM_LEFT_OUT = {r"(head|fc_norm|head_drop)\.": "of the classifier", r"attn_pool\.": "of the pooling"}


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
        ConvertError: for an architecture that timm does not know or that is none of our towers.
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
    if not isinstance(model, VisionTransformer | Eva):
        raise ConvertError(f"{where}: {name!r} is no VisionTransformer of timm")
    block = model.blocks[0]
    found = VisionConfig(
        tower="eva" if isinstance(model, Eva) else "clip" if model.num_prefix_tokens else "siglip",
        image_size=model.patch_embed.img_size[0],
        patch_size=model.patch_embed.patch_size[0],
        width=model.embed_dim,
        layers=len(model.blocks),
        heads=block.attn.num_heads,
        ffn=block.mlp.fc2.in_features,
        quick_gelu=type(block.mlp.act).__name__ == "QuickGELU",
    )
    try:
        with torch.device("meta"):
            ours = build_vit(found)
    except ValueError as error:
        raise ConvertError(f"{where}: {name!r}: {error}") from None
    if _kinds(model) != _kinds(ours):
        raise ConvertError(
            f"{where}: {name!r} is no image tower of CLIP, EVA-02-CLIP or SigLIP as timm has it"
        )
    return found


def _kinds(tower: Any) -> list[tuple[str, str, Any]]:
    """Kind of every module that a token passes through, with the epsilon of norms: what shapes do not
    tell of a tower."""
    parts = [("norm_pre", tower.norm_pre), ("norm", tower.norm), *tower.blocks[0].named_modules()]
    kinds = {"LayerNormFp32": "LayerNorm"}
    return [
        (name, kinds.get(type(part).__name__, type(part).__name__), getattr(part, "eps", None))
        for name, part in parts
    ]


def timm_config(config: VisionConfig) -> dict[str, Any]:
    """A ``config.json`` for timm: an architecture of the same kind with this tower's sizes."""
    names = {"eva": "eva02_large_patch14_clip_224", "siglip": "vit_large_patch16_siglip_256"}
    clip = f"vit_large_patch14_clip_{'quickgelu_' if config.quick_gelu else ''}224"
    kind = KINDS[config.tower]
    return {
        "architecture": names.get(config.tower, clip),
        "num_classes": 0,
        "num_features": config.width,
        "global_pool": "token" if config.tower == "clip" else "",
        "model_args": {
            "img_size": config.image_size,
            "patch_size": config.patch_size,
            "embed_dim": config.width,
            "depth": config.layers,
            "num_heads": config.heads,
            "mlp_ratio": (config.ffn + 0.5) / config.width,
            "global_pool": "token" if config.tower == "clip" else "",
        },
        "pretrained_cfg": {
            "input_size": [3, config.image_size, config.image_size],
            "fixed_input_size": True,
            "mean": list(kind.mean),
            "std": list(kind.std),
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "num_classes": 0,
        },
    }


def timm_table(names: list[str]) -> Table:
    """timm's names are ours below ``visual_tokenizer.vit.``"""
    return Table([rename(name, name) for name in names])


def at_size(config: VisionConfig, side: int | None) -> VisionConfig:
    """The settings for images of another size, None for the same.

    Raises:
        ConvertError: when the patches do not fill it, or the coarsest map has no whole pixels.
    """
    if side is None:
        return config
    patch = config.patch_size
    if side < 1 or side % (2 * patch):
        raise ConvertError(
            f"--image-size {side}: must be an even number of patches of {patch} pixels a side, "
            f"as {max(side // (2 * patch), 1) * 2 * patch}"
        )
    return replace(config, image_size=side)


def resized(table: Table, ours: str, stored: Tensor, wanted: Tensor, prefix: int = 1) -> Table:
    """The table with the position embedding resized while loading, for images of another size.

    Args:
        table: of names.
        ours: name of the position embedding.
        stored, wanted: theirs after renaming, and ours, without values: [1, prefix + grid * grid, C].
        prefix: tokens in front of the patches.
    """
    if stored.shape == wanted.shape:
        return table
    side = math.isqrt(wanted.shape[1] - prefix)
    rules = []
    for rule in table.rules:
        if rule.ours == ours:
            rule = _resized(rule, stored, side, prefix)
        rules.append(rule)
    return Table(rules, table.constants, table.ours_only, table.legacy)


def _resized(rule: Rule, stored: Tensor, side: int, prefix: int) -> Rule:
    load, save, old = rule.load, rule.save, math.isqrt(stored.shape[1] - prefix)

    def resize(tensors: list[Tensor]) -> Tensor:
        return resample_abs_pos_embed(load(tensors), [side, side], [old, old], num_prefix_tokens=prefix)

    def shape(_: Tensor) -> list[Tensor]:
        return save(stored)

    how = f"{old} x {old} positions resized to {side} x {side}"
    return Rule(rule.ours, rule.theirs, resize, shape, how)
