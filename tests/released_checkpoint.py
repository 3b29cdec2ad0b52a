"""A checkpoint with every key of the release, at small widths and random values.

The names are written out here, or come from what was recorded of the release, or from diffusers; none
come from our tables.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

DATA = Path(__file__).parent / "data"
WIDTH, LAYERS, FFN, VOCABULARY = 80, 40, 96, 100
MAPS, TOKENS, CHANNELS = 64, 32, [16, 32, 64, 64]
RESAMPLER_LAYERS = 12

SETTINGS = f"""
defaults: released-13b
model:
  vision: {{width: 64, heads: 4, ffn: 128,
    adapter: {{heads: 4, ffn_ratio: 0.25}},
    resampler: {{queries: 6, width: 48, layers: {RESAMPLER_LAYERS}, heads: 4, ffn: 96}}}}
  language: {{width: {WIDTH}, heads: 8, kv_heads: 8, ffn: {FFN}, vocabulary: {VOCABULARY},
    vocabulary_multiple: 64, mmfs: {{value_width: 64}}}}
  decoder:
    unet: {{channels: {CHANNELS}, head_width: 8, norm_groups: 8}}
    vae: {{channels: [8, 16, 32, 32], norm_groups: 4}}
    resampler: {{queries: 77, width: {TOKENS}, heads: 4, ffn: 64}}
    mmfs: {{value_width: 64}}
data: {{tokenizer: unused, image_tokens: 6}}
"""

CLIP = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 24, "num_attention_heads": 4} | {
    "patch_size": 14,
    "image_size": 224,
}
RESAMPLER = {"num_queries": 6, "hidden_size": 48, "encoder_hidden_size": 64, "num_hidden_layers": 12} | {
    "cross_attention_frequency": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "qk_normalization": True,
}
LLAMA = {"hidden_size": 80, "intermediate_size": 96, "num_hidden_layers": 40, "num_attention_heads": 8} | {
    "image_embed_dim": 64,
    "cross_attention_frequency": 4,
    "spatial_shapes": [32, 16, 8],
}
"""Configurations of its parts, as their builders take them."""


def values(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def linear(name: str, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def mmfs(prefix: str, query: int, levels: int, rows: int) -> dict[str, tuple[int, ...]]:
    """Of 16 heads and 8 points, values of width 64."""
    return {
        f"{prefix}ignore_token": (1, 1, 1, 64),
        **linear(f"{prefix}sampling_offsets", 256, query),
        **linear(f"{prefix}dynamic_offset_mask", query, query),
        **linear(f"{prefix}attention_weights", 16 * levels * 9, query),
        **linear(f"{prefix}value_proj", 64, MAPS),
        **linear(f"{prefix}output_proj", query, 64),
        f"{prefix}query_relpos.weight": (rows, query),
    }


def tokenizer() -> dict[str, Tensor]:
    """As recorded of the release, its resampler's four layers repeated to twelve."""
    state = {
        name.removeprefix("state_dict."): tensor
        for name, tensor in load_file(DATA / "tokenizer.safetensors").items()
        if name.startswith("state_dict.")
    }
    layer = "perceiver_resampler.blip2qformer.encoder.layer."
    for number in range(4, RESAMPLER_LAYERS):
        like = f"{layer}{number % 2}."
        for name in [name for name in state if name.startswith(like)]:
            state[name.replace(like, f"{layer}{number}.")] = state[name] + number
    return {f"visual_tokenizer.{name}": tensor for name, tensor in state.items()}


def language() -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {"mm_decoder.embed_tokens.weight": (VOCABULARY, WIDTH)}
    for number in range(LAYERS):
        layer = f"mm_decoder.layers.{number}."
        shapes |= {f"{layer}self_attn.{name}_proj.weight": (WIDTH, WIDTH) for name in "qkvo"}
        shapes |= {f"{layer}mlp.{name}_proj.weight": (FFN, WIDTH) for name in ("gate", "up")}
        shapes[f"{layer}mlp.down_proj.weight"] = (WIDTH, FFN)
        shapes |= {
            f"{layer}{name}.weight": (WIDTH,) for name in ("input_layernorm", "post_attention_layernorm")
        }
        if number % 4 == 0:
            look = f"{layer}llama_cross_attn."
            shapes |= {f"{look}gate": (1,), f"{look}norm1.weight": (WIDTH,), f"{look}norm2.weight": (MAPS,)}
            shapes |= mmfs(f"{look}attn.", WIDTH, 3, 50)
    shapes["mm_decoder.norm.weight"] = (WIDTH,)
    shapes |= {"soi_token": (1, WIDTH), "text_decoder.head.weight": (VOCABULARY, WIDTH)}
    shapes |= linear("text_decoder.head_new", 2, WIDTH) | linear("context_feat_proj", WIDTH, WIDTH)
    state = values(shapes, 1)
    state["text_decoder.head.weight"][-2:] = 0
    state["text_decoder.head.bias"] = torch.tensor([0.0] * (VOCABULARY - 2) + [-100.0] * 2)
    state["text_decoder.head_new.bias"] += 95
    return state


def resampler() -> dict[str, Tensor]:
    """The image decoder's, of one layer without norms of q and k."""
    inner = "blip2qformer.encoder.layer.0."
    shapes: dict[str, tuple[int, ...]] = {"queries": (1, 77, TOKENS)}
    for kind, inputs in (("attention", TOKENS), ("crossattention", WIDTH)):
        for part in ("query", "key", "value"):
            width = TOKENS if part == "query" else inputs
            shapes |= linear(f"{inner}{kind}.attention.{part}", TOKENS, width)
        shapes |= linear(f"{inner}{kind}.output.dense", TOKENS, TOKENS)
        shapes |= {f"{inner}{kind}.output.LayerNorm.{part}": (TOKENS,) for part in ("weight", "bias")}
    shapes |= linear(f"{inner}intermediate_query.dense", 64, TOKENS)
    shapes |= linear(f"{inner}output_query.dense", TOKENS, 64)
    for norm in (f"{inner}output_query.LayerNorm", "blip2qformer.layernorm"):
        shapes |= {f"{norm}.{part}": (TOKENS,) for part in ("weight", "bias")}
    return {f"image_decoder.perceiver_resampler.{name}": t for name, t in values(shapes, 2).items()}


def positions(channels: int) -> Tensor:
    """2-D sine-cosine embedding of 64 x 64 places: rows in the first half of the channels."""
    quarter = channels // 4
    angle = torch.arange(64)[:, None] * 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    one = torch.cat([angle.sin(), angle.cos()], 1)
    rows, columns = one[:, None].expand(64, 64, -1), one[None].expand(64, 64, -1)
    return torch.cat([rows, columns], -1).reshape(4096, channels).float()


def unet_mmfs() -> dict[str, Tensor]:
    a, b, c, d = CHANNELS
    sites = [a] * 4 + [b] * 3 + [c] * 3 + [d] * 2
    names = [f"mmfs_down_blocks.{number}." for number in range(12)] + ["mmfs_mid_block."]
    state: dict[str, Tensor] = {}
    for number, (name, width) in enumerate(zip(names, [*sites, d], strict=True)):
        shapes = mmfs(f"{name}mmfs.", width, 4, 10)
        shapes |= {f"{name}query_norm.{part}": (width,) for part in ("weight", "bias")}
        shapes |= {f"{name}feat_norm.{part}": (MAPS,) for part in ("weight", "bias")}
        shapes |= {f"{name}conv.weight": (width, width, 1, 1), f"{name}conv.bias": (width,)}
        state |= values(shapes, 10 + number) | {f"{name}pos_embed": positions(width)}
    return {f"image_decoder.decoder.mmfs_module.{name}": tensor for name, tensor in state.items()}


def diffusion() -> dict[str, Tensor]:
    from diffusers import AutoencoderKL, UNet2DConditionModel

    unet = UNet2DConditionModel(
        block_out_channels=CHANNELS,
        attention_head_dim=[width // 8 for width in CHANNELS],
        cross_attention_dim=TOKENS,
        use_linear_projection=True,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[8, 16, 32, 32],
        layers_per_block=2,
        norm_num_groups=4,
    )
    shapes = {f"unet.{name}": tuple(tensor.shape) for name, tensor in unet.state_dict().items()}
    shapes |= {f"vae.{name}": tuple(tensor.shape) for name, tensor in vae.state_dict().items()}
    return {f"image_decoder.decoder.{name}": tensor for name, tensor in values(shapes, 3).items()}


def whole() -> dict[str, Tensor]:
    """Every tensor."""
    state = tokenizer() | language() | resampler() | unet_mmfs() | diffusion()
    state |= values({"image_decoder.neg_prompt_embeds": (1, 77, TOKENS)}, 4)
    for name, tensor in state.items():
        if name.endswith(("mmfs.attention_weights.weight", "cross_attn.attn.attention_weights.weight")) or (
            name.endswith("attention_weights.bias") and "adapter" not in name
        ):
            tensor.view(-1, 9, *tensor.shape[1:])[:, 8] = 0  # the slot that the release overwrites
    return state


def save(folder: Path, files: int = 2) -> dict[str, Tensor]:
    """As the release lies on disk: several ``.bin`` without an index. Returns what is in them."""
    state = whole()
    folder.mkdir(parents=True)
    names = sorted(state)
    each = math.ceil(len(names) / files)
    for number in range(files):
        part = {name: state[name] for name in names[number * each : (number + 1) * each]}
        torch.save(part, folder / f"pytorch_model_{number}.bin")
    return state


def under(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The language model's layers with ``model.`` in front."""
    return {f"model.{name}": tensor for name, tensor in under(state, "mm_decoder.").items()}
