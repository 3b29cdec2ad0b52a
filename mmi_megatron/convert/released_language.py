"""Language model's layers of the released checkpoint: their names, and ours built from its state dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmi_megatron.config import LanguageConfig, MMFSConfig
from mmi_megatron.convert.llama import layers_table
from mmi_megatron.convert.released_mmfs import filled, intervals, level_shapes, mask_of, mmfs_table
from mmi_megatron.convert.rules import Table, rename
from mmi_megatron.model.attention import rotary_angles
from mmi_megatron.model.language_model import DecoderLayer, Visibility, has_mmfs
from mmi_megatron.model.mmfs import Shapes

HEADS, POINTS, BASE = 16, 8, 16
MODEL = "model."
OUTER = ("model.embed_tokens.weight", "lm_head.weight")
"""Tensors of the state dict's own model that the layers have no use for."""

DEFAULTS = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
"""What transformers' LlamaConfig has where a configuration leaves it out."""


def language_layers_table(language: LanguageConfig) -> Table:
    """Names of the layers with their MMFS and of the final norm."""
    mmfs = mmfs_table(language.mmfs.heads, len(language.mmfs.levels), language.mmfs.points)
    block = Table([rename("gate", "gate"), rename("norm_query.weight", "norm1.weight")])
    block += Table([rename("norm_maps.weight", "norm2.weight")]) + mmfs.under("attention.", "attn.")
    table = layers_table(language)
    for layer in range(language.layers):
        if has_mmfs(language, layer):
            table += block.under(f"layers.{layer}.mmfs.", f"layers.{layer}.llama_cross_attn.")
    return table


class ReleasedLanguageLayers(nn.Module):
    """Our layers behind the release's arguments: rows of equal length, each attended to as a whole.

    Args:
        config: of the language model, its MMFS levels those of ``shapes``.
        maps_width: channels of the images' maps.
        shapes: (height, width) of the levels.
    """

    def __init__(self, config: LanguageConfig, maps_width: int, shapes: Shapes):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer, maps_width, tuple(shapes)) for layer in range(config.layers)
        )
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)

    def forward(self, embeddings: Tensor, features: Tensor, visibility: Tensor) -> Tensor:
        """Hidden states after the final norm.

        Args:
            embeddings: [B, S, d]. Attention is causal over the whole row, whatever documents it holds.
            features: [B, M, positions of all levels, dv].
            visibility: 0/1 [B, S, M], with gaps too.

        Returns:
            [B, S, d].

        Raises:
            ValueError: when the visibility is of another shape.
        """
        batch, length, width = embeddings.shape
        order, visible = intervals(mask_of(visibility, batch, length, features.shape[1]))
        maps = features.flatten(0, 1)
        if order is not None:
            maps = maps[order]
        position = torch.arange(length, device=embeddings.device).repeat(batch)
        sees = Visibility(position, [row * length for row in range(batch + 1)], visible)
        angles = rotary_angles(position, width // self.config.heads, self.config.rope_theta)
        hidden = embeddings.flatten(0, 1)
        for layer in self.layers:
            hidden = layer(hidden, angles, sees, maps, None)
        return self.norm(hidden).unflatten(0, (batch, length))


def language_layers(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> ReleasedLanguageLayers:
    """The language model's layers of the release.

    Args:
        state_dict: its tensors, ``model.`` in front of their names. Embeddings, output head and rotary
            frequencies may be there or not; the layers do not use the tables.
        config: of transformers' LlamaConfig, with image_embed_dim (channels of the maps),
            cross_attention_frequency and spatial_shapes (pixels a side of each level). What it leaves out
            has that class's defaults. The MMFS has 16 heads, 8 points and base 16.

    Returns:
        The module, in the dtype of the tensors, in evaluation mode.

    Raises:
        ValueError: naming tensors that are missing, left over or of another shape.
    """
    what, first = "released language layers", f"{MODEL}layers.0.llama_cross_attn."
    for name in (f"{first}attn.value_proj.weight", f"{first}attn.query_relpos.weight"):
        if name not in state_dict:
            raise ValueError(f"{what}: missing {name}")
    shapes = level_shapes(config)
    mmfs = MMFSConfig(
        heads=HEADS,
        points=POINTS,
        value_width=state_dict[f"{first}attn.value_proj.weight"].shape[0],
        table_rows=state_dict[f"{first}attn.query_relpos.weight"].shape[0],
        levels=list(range(len(shapes))),
        base=BASE,
    )
    language = _settings(config, mmfs)
    module = ReleasedLanguageLayers(language, config["image_embed_dim"], shapes)
    inner = {name: tensor for name, tensor in state_dict.items() if name not in OUTER}
    return filled(module, inner, language_layers_table(language).under("", MODEL), what)


def _settings(config: Mapping[str, Any], mmfs: MMFSConfig) -> LanguageConfig:
    """Ours from transformers' LlamaConfig as a dict, of any of its versions."""
    given = {key: value for key, value in config.items() if value is not None}
    known = DEFAULTS | (given.get("rope_parameters") or {}) | given
    return LanguageConfig(
        width=known["hidden_size"],
        layers=known["num_hidden_layers"],
        heads=known["num_attention_heads"],
        kv_heads=known.get("num_key_value_heads") or known["num_attention_heads"],
        ffn=known["intermediate_size"],
        norm_eps=known["rms_norm_eps"],
        rope_theta=float(known["rope_theta"]),
        mmfs_every=known["cross_attention_frequency"],
        mmfs=mmfs,
        document_attention=False,
    )
