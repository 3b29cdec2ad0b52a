"""Resampler and visual tokenizer of the released checkpoint: their names, and our modules built from
its state dicts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmi_megatron.config import AdapterConfig, ResamplerConfig, VisionConfig
from mmi_megatron.convert.released_mmfs import filled
from mmi_megatron.convert.rules import Table, joined, rename, renames, squeezed, unsqueezed
from mmi_megatron.model.perceiver import Resampler
from mmi_megatron.model.positions import sincos_2d
from mmi_megatron.model.visual_tokenizer import CLIP_MEAN, CLIP_STD, VisualTokenizer

ADAPTER_POINTS = 4


def perceiver_table(config: ResamplerConfig) -> Table:
    """Names of a resampler: transformers' BLIP-2 Q-Former, with q and k norms."""
    rules = [unsqueezed("queries", "queries", 1), *renames({"norm": "blip2qformer.layernorm"})]
    parts = {"query": "attention.query", "key": "attention.key", "value": "attention.value"}
    parts |= {"output": "output.dense", "norm": "output.LayerNorm"}
    if config.qk_norm:
        parts |= {"query_norm": "attention.q_norm", "key_norm": "attention.k_norm"}
    ffn = {"up": "intermediate_query.dense", "down": "output_query.dense", "norm": "output_query.LayerNorm"}
    for layer in range(config.layers):
        ours, theirs = f"layers.{layer}.", f"blip2qformer.encoder.layer.{layer}."
        names = {f"{ours}attention.{a}": f"{theirs}attention.{b}" for a, b in parts.items()}
        if layer % config.cross_every == 0:
            names |= {f"{ours}cross.{a}": f"{theirs}crossattention.{b}" for a, b in parts.items()}
        names |= {f"{ours}ffn.{a}": f"{theirs}{b}" for a, b in ffn.items()}
        rules += renames(names)
    return Table(rules)


def resampler_config(config: Mapping[str, Any]) -> ResamplerConfig:
    """Our settings from the release's keyword arguments."""
    return ResamplerConfig(
        queries=config["num_queries"],
        width=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        ffn=config["intermediate_size"],
        cross_every=config["cross_attention_frequency"],
        qk_norm=config.get("qk_normalization", False),
    )


class ReleasedPerceiver(nn.Module):
    """Our resampler behind the release's arguments: its mask is of any type, nonzero where a
    position counts."""

    def __init__(self, core: Resampler):
        super().__init__()
        self.core = core

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tokens [B, queries, hidden] from x [B, S, C] and mask [B, S] or None."""
        return self.core(x, None if mask is None else mask.ne(0))


def perceiver(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> ReleasedPerceiver:
    """A resampler of the release.

    Args:
        state_dict: its tensors, names without prefix.
        config: num_queries, hidden_size, encoder_hidden_size, cross_attention_frequency,
            num_hidden_layers, num_attention_heads, intermediate_size, qk_normalization (false when absent).

    Raises:
        ValueError: naming tensors that are missing, left over or of another shape.
    """
    settings = resampler_config(config)
    core = Resampler(config["encoder_hidden_size"], settings)
    return ReleasedPerceiver(filled(core, state_dict, perceiver_table(settings), "released resampler"))


def clip_table(layers: int, final_norm: bool) -> Table:
    """Names of transformers' CLIPVisionModel below ``vision_model.`` against timm's
    VisionTransformer; ``pre_layrnorm`` is their spelling."""
    rules = [
        rename("patch_embed.proj.weight", "embeddings.patch_embedding.weight"),
        squeezed("cls_token", "embeddings.class_embedding", 2),
        squeezed("pos_embed", "embeddings.position_embedding.weight", 1),
        *renames({"norm_pre": "pre_layrnorm"}),
    ]
    same = {"norm1": "layer_norm1", "attn.proj": "self_attn.out_proj", "norm2": "layer_norm2"}
    same |= {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    for layer in range(layers):
        ours, theirs = f"blocks.{layer}.", f"encoder.layers.{layer}."
        rules += renames({ours + a: theirs + b for a, b in same.items()})
        for part in ("weight", "bias"):
            names = [f"{theirs}self_attn.{projection}_proj.{part}" for projection in "qkv"]
            rules.append(joined(f"{ours}attn.qkv.{part}", names))
    norm = {"norm.weight", "norm.bias"}
    if final_norm:
        return Table(rules + renames({"norm": "post_layernorm"}))
    return Table(rules, ours_only=norm)


def adapter_table(config: AdapterConfig) -> Table:
    """Names of the ViT-Adapter, which the release keeps beside CLIP's own below ``vision_model.``."""
    spm = "adapter_spm."
    stem = {
        f"stem.stages.0.{block}.{part}": f"{spm}stem.{3 * block + part}"
        for block in range(3)
        for part in (0, 1)
    }
    stem |= {
        f"stem.stages.{stage}.{part}": f"{spm}conv{stage + 1}.{part}"
        for stage in (1, 2, 3)
        for part in (0, 1)
    }
    weights = [rename(f"{a}.weight", f"{b}.weight") for a, b in stem.items()]
    norms = [rename(f"{a}.bias", f"{b}.bias") for a, b in stem.items() if a.endswith(".1")]
    names = {f"stem.projections.{level}": f"{spm}fc{level + 1}" for level in range(4)} | {"up": "adapter_up"}
    rules = [*weights, *norms, rename("level_embedding", "adapter_level_embed")]
    attention = {
        "query_norm": "query_norm",
        "feature_norm": "feat_norm",
        "attention.offsets": "attn.sampling_offsets",
        "attention.weights": "attn.attention_weights",
        "attention.value_proj": "attn.value_proj",
        "attention.output_proj": "attn.output_proj",
    }
    ffn = {
        "ffn_norm": "ffn_norm",
        "ffn.up": "ffn.fc1",
        "ffn.conv": "ffn.dwconv.dwconv",
        "ffn.down": "ffn.fc2",
    }
    extractors = {}
    for index in range(config.interactions):
        interaction = f"adapter_interactions.{index}."
        names |= {f"injectors.{index}.{a}": f"{interaction}injector.{b}" for a, b in attention.items()}
        rules.append(rename(f"injectors.{index}.gamma", f"{interaction}injector.gamma"))
        extractors[f"extractors.{index}."] = f"{interaction}extractor."
    for index in range(config.extra_extractors):
        extractors[f"extra_extractors.{index}."] = f"{interaction}extra_extractors.{index}."
    for ours, theirs in extractors.items():
        names |= {ours + a: theirs + b for a, b in (attention | ffn).items()}
    return Table(rules + renames(names))


def tokenizer_table(tokenizer: VisualTokenizer) -> Table:
    """Names below ``visual_tokenizer.``"""
    return tokenizer_names(tokenizer.config)


def tokenizer_names(config: VisionConfig) -> Table:
    """Names below ``visual_tokenizer.``"""
    vision, grid = "encoder.vision_model.", config.image_size // config.patch_size
    positions = torch.cat([torch.zeros(1, config.width), sincos_2d(grid, grid, config.width)])
    constants = {
        "pos_embed": positions,
        "clip_mean": torch.tensor(CLIP_MEAN).view(1, 3, 1, 1),
        "clip_std": torch.tensor(CLIP_STD).view(1, 3, 1, 1),
        f"{vision}embeddings.position_ids": torch.arange(len(positions))[None],
    }
    outer = {
        "input_proj": "pos_proj",
        "input_norm": "pos_ln",
        "position_norm": "post_ln",
        "output_proj": "proj",
    }
    return (
        Table(renames(outer), constants)
        + clip_table(config.layers, final_norm=False).under("vit.", vision)
        + adapter_table(config.adapter).under("adapter.", vision)
        + perceiver_table(config.resampler).under("resampler.", "perceiver_resampler.")
    )


class ReleasedTokenizer(nn.Module):
    """Our visual tokenizer behind the release's results."""

    def __init__(self, core: VisualTokenizer):
        super().__init__()
        self.core = core

    def forward(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Tokens [B, queries, llm width] and four maps [B, C, h, w] of images [B, 3, H, W] in 0..1."""
        tokens, maps = self.core(image)
        levels = maps.transpose(1, 2).split([height * width for height, width in self.core.shapes], 2)
        return tokens, [
            level.unflatten(2, shape) for level, shape in zip(levels, self.core.shapes, strict=True)
        ]


def visual_tokenizer(
    state_dict: Mapping[str, Tensor], clip_config: Mapping[str, Any], perceiver_config: Mapping[str, Any]
) -> ReleasedTokenizer:
    """The visual tokenizer of the release.

    Args:
        state_dict: its tensors, names without prefix.
        clip_config: of transformers' CLIPVisionConfig; what it leaves out has that class's defaults.
        perceiver_config: as of ``perceiver``.

    Raises:
        ValueError: naming tensors that are missing, left over or of another shape, and constants
            that are not the model's.
    """
    config = vision_config(state_dict, clip_config, perceiver_config)
    proj = _known(state_dict, "proj.weight")
    core = VisualTokenizer(config, proj.shape[0])
    return ReleasedTokenizer(filled(core, state_dict, tokenizer_table(core), "released visual tokenizer"))


def vision_config(
    state_dict: Mapping[str, Tensor], clip_config: Mapping[str, Any], perceiver_config: Mapping[str, Any]
) -> VisionConfig:
    """Our settings from the release's; the adapter's are read off its tensors."""
    adapter = "encoder.vision_model.adapter_"
    injected = [name for name in state_dict if name.startswith(adapter) and name.endswith("injector.gamma")]
    extra = {
        name.split(".")[5] for name in state_dict if name.startswith(adapter) and ".extra_extractors." in name
    }
    first = f"{adapter}interactions.0."
    width = clip_config["hidden_size"]
    slots = _known(state_dict, f"{first}extractor.attn.attention_weights.bias").shape[0]
    return VisionConfig(
        image_size=clip_config.get("image_size", 224),
        patch_size=clip_config.get("patch_size", 32),
        width=width,
        layers=clip_config.get("num_hidden_layers", 12),
        heads=clip_config.get("num_attention_heads", 12),
        ffn=clip_config.get("intermediate_size", 3072),
        quick_gelu=clip_config.get("hidden_act", "quick_gelu") == "quick_gelu",
        adapter=AdapterConfig(
            heads=slots // ADAPTER_POINTS,
            points=ADAPTER_POINTS,
            value_ratio=_known(state_dict, f"{first}extractor.attn.value_proj.bias").shape[0] / width,
            ffn_ratio=_known(state_dict, f"{first}extractor.ffn.fc1.bias").shape[0] / width,
            stem=_known(state_dict, f"{adapter}spm.stem.0.weight").shape[0],
            interactions=len(injected),
            extra_extractors=len(extra),
        ),
        resampler=resampler_config(perceiver_config),
    )


def _known(state_dict: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in state_dict:
        raise ValueError(f"released visual tokenizer: missing {name}")
    return state_dict[name]
