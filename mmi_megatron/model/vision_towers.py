"""Image towers, as timm builds them, so that timm's weights load under their own names.

``clip``: OpenAI's and OpenCLIP's ViT (class token, norm before the layers). ``eva``: EVA-02-CLIP
(rotary positions, SwiGLU, norms inside attention and MLP). ``siglip``: no class token. Their pooling
and heads are not used here and not built.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmi_megatron.config import VisionConfig

Tower: TypeAlias = VisionTransformer | Eva

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
VIT_NORM_EPS = 1e-5
ROPE_GRID = 16
"""Patches a side of the grid in which EVA-02-CLIP's rotary positions are measured, at any resolution."""


@dataclass(frozen=True)
class Kind:
    """What all towers of a kind share: mean and deviation of their pixels, epsilon of their norms."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    norm_eps: float


KINDS = {
    "clip": Kind(CLIP_MEAN, CLIP_STD, VIT_NORM_EPS),
    "eva": Kind(CLIP_MEAN, CLIP_STD, 1e-6),
    "siglip": Kind((0.5,) * 3, (0.5,) * 3, 1e-6),
}


def build_vit(config: VisionConfig) -> Tower:
    """An image tower with random weights.

    Its final norm is not used here; it is kept, frozen, so that a tower can be exported whole.

    Raises:
        ValueError: when sizes do not divide, or for a tower that there is none of.
    """
    if config.tower not in KINDS:
        raise ValueError(f"vision.tower: expected one of {', '.join(KINDS)}, got {config.tower!r}")
    if config.image_size % config.patch_size:
        raise ValueError(
            f"vision.image_size {config.image_size} is no multiple of vision.patch_size {config.patch_size}"
        )
    if config.width % config.heads:
        raise ValueError(f"vision.width {config.width} does not divide into vision.heads {config.heads}")
    build = partial(
        Eva if config.tower == "eva" else VisionTransformer,
        img_size=config.image_size,
        patch_size=config.patch_size,
        num_classes=0,
        embed_dim=config.width,
        depth=config.layers,
        num_heads=config.heads,
        mlp_ratio=(config.ffn + 0.5) / config.width,  # timm rounds the product down
        norm_layer=partial(nn.LayerNorm, eps=KINDS[config.tower].norm_eps),
    )
    if config.tower == "eva":
        if config.width // config.heads % 4:
            raise ValueError(
                f"vision.width {config.width} over vision.heads {config.heads}: rotary positions of rows and "
                "columns need a head's width that divides by 4"
            )
        vit = build(
            global_pool="",
            qkv_fused=False,
            swiglu_mlp=True,
            scale_mlp=True,
            scale_attn_inner=True,
            use_rot_pos_emb=True,
            ref_feat_shape=(ROPE_GRID, ROPE_GRID),
        )
    elif config.tower == "siglip":
        vit = build(global_pool="", class_token=False)
    else:
        vit = build(pre_norm=True, act_layer="quick_gelu" if config.quick_gelu else "gelu")
    vit.norm.requires_grad_(False)
    return vit


def embed(vit: Tower, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """What the layers begin with.

    Args:
        vit: the tower.
        images: normalised, [I, 3, H, W].

    Returns:
        Tokens [I, prefix + patches, width], the class token in front where there is one, and the
        sines and cosines of the patches' rotary positions, or None.
    """
    embedded = vit._pos_embed(vit.patch_embed(images))
    tokens, rope = embedded if isinstance(vit, Eva) else (embedded, None)
    return vit.norm_pre(tokens), rope


def run_layer(layer: nn.Module, tokens: Tensor, rope: Tensor | None, again: bool = False) -> Tensor:
    """One layer on tokens [I, n, width]; ``again`` computes it anew in the backward pass."""
    run = layer if rope is None else partial(layer, rope=rope)
    return checkpoint(run, tokens, use_reentrant=False) if again else run(tokens)
