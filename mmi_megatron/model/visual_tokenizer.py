"""Visual tokenizer: an image becomes a few visual tokens and a pyramid of feature maps.

MM-Interleaved, section 3.2: CLIP ViT (or another tower), ViT-Adapter and Perceiver resampler.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmi_megatron.config import VisionConfig
from mmi_megatron.model.perceiver import Resampler
from mmi_megatron.model.positions import sincos_2d
from mmi_megatron.model.vision_towers import CLIP_MEAN, CLIP_STD, KINDS, VIT_NORM_EPS, build_vit

__all__ = ["CLIP_MEAN", "CLIP_STD", "VIT_NORM_EPS", "VisualTokenizer", "build_vit"]
from mmi_megatron.model.vit_adapter import ViTAdapter, pyramid_shapes


class VisualTokenizer(nn.Module):
    """Images to visual tokens and maps.

    Args:
        config: sizes.
        llm_width: channels of a visual token.

    Attributes:
        vit: timm's image tower. Gradients pass through it also where it is frozen, for the
            adapter's injectors sit between its layers.
        shapes: (height, width) of the four maps, the finest first.
    """

    mean: Tensor
    std: Tensor
    token_positions: Tensor
    map_positions: Tensor

    def __init__(self, config: VisionConfig, llm_width: int):
        super().__init__()
        self.config = config
        grid, width = config.image_size // config.patch_size, config.width
        self.vit = build_vit(config)
        self.shapes = pyramid_shapes(grid)
        self.adapter = ViTAdapter(width, config.layers, grid, config.adapter)
        if config.use_resampler:
            self.input_proj = nn.Linear(width, width)
            self.input_norm = nn.LayerNorm(width)
            self.position_norm = nn.LayerNorm(width)
            self.resampler = Resampler(width, config.resampler)
            self.output_proj = nn.Linear(config.resampler.width, llm_width)
            for projection in (self.input_proj, self.output_proj):
                nn.init.normal_(projection.weight, std=0.02)
                nn.init.zeros_(projection.bias)
        else:
            self.learned_tokens = nn.Parameter(torch.empty(config.resampler.queries, llm_width))
            nn.init.normal_(self.learned_tokens, std=0.02)
        self.register_buffer("mean", torch.tensor(KINDS[config.tower].mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(KINDS[config.tower].std).view(3, 1, 1), persistent=False)
        patches = sincos_2d(grid, grid, width)
        tokens = torch.cat([torch.zeros(self.vit.num_prefix_tokens, width), patches])
        self.register_buffer("token_positions", tokens, persistent=False)
        self.register_buffer("map_positions", _on_levels(patches, grid, self.shapes), persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Visual tokens [I, queries, llm_width] and maps [I, S, width] from images [I, 3, H, W].

        Pixels are in 0..1 and of the parameters' dtype. The maps are the four levels one after the
        other, row-major, each with its fixed position embedding: that of the ViT's grid, resized.

        Raises:
            ValueError: when the images are not of the configured size.
        """
        side = self.config.image_size
        if tuple(images.shape[1:]) != (3, side, side):
            raise ValueError(f"images: expected [I, 3, {side}, {side}], got {tuple(images.shape)}")
        tokens, levels = self.adapter(self.vit, (images - self.mean) / self.std)
        maps = torch.cat([level.flatten(2) for level in levels], 2).transpose(1, 2) + self.map_positions
        if not self.config.use_resampler:
            return self.learned_tokens.expand(len(images), -1, -1), maps
        tokens = self.position_norm(self.input_norm(self.input_proj(tokens)) + self.token_positions)
        return self.output_proj(self.resampler(tokens)), maps


def _on_levels(patches: Tensor, grid: int, shapes: tuple[tuple[int, int], ...]) -> Tensor:
    """Position embeddings of a grid [grid * grid, C] resized to every level, [S, C]. (Bicubic: what
    the public weights were trained with.)"""
    plane = patches.T.unflatten(1, (grid, grid))[None]
    levels = [F.interpolate(plane, shape, mode="bicubic", align_corners=False).flatten(2) for shape in shapes]
    return torch.cat(levels, 2)[0].T.contiguous()
