"""The U-Net of the image decoder with MMFS: pixels of its feature maps look into earlier images.

MM-Interleaved, section 3.2 ("Image decoder with MMFS"). The U-Net is diffusers'
UNet2DConditionModel and keeps its weights' names; its forward pass is run here part by part, so that
MMFS can sit between the parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from mmi_megatron.config import MMFSConfig, UNetConfig
from mmi_megatron.model.mmfs import MMFS, Shapes
from mmi_megatron.model.positions import sincos_2d

POSITION_GRID = 64
"""Side of the grid that position embeddings are made for, and resized from: 64 x 64 latents of a 512 x
512 image. So an embedding means a place in the picture, at any resolution."""

NORM_EPS = 1e-6


def build_unet(config: UNetConfig, side: int, channels: int, token_width: int) -> UNet2DConditionModel:
    """Stable Diffusion's U-Net, with random weights.

    Args:
        config: widths, and which blocks attend.
        side: pixels a side of its input; ``channels`` of input and output.
        token_width: of the tokens it attends to.
    """
    kinds = ["CrossAttn" if attends else "" for attends in config.attention]
    return UNet2DConditionModel(
        sample_size=side,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=tuple(config.channels),
        down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
        up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
        layers_per_block=config.layers_per_block,
        # What diffusers names attention_head_dim is the number of heads; a block that does not
        # attend has a count all the same.
        attention_head_dim=tuple(config.heads or max(w // config.head_width, 1) for w in config.channels),
        cross_attention_dim=token_width,
        norm_num_groups=config.norm_groups,
        use_linear_projection=config.linear_projection,
        addition_embed_type="text" if config.pooled_tokens else None,
        addition_embed_type_num_heads=max(token_width // config.head_width, 1),
    )


def mmfs_sites(config: UNetConfig, side: int, placement: str) -> list[tuple[int, int]]:
    """Where MMFS sits: (channels, pixels a side) of each place.

    Args:
        config: of the U-Net.
        side: pixels a side of the U-Net's input.
        placement: ``skip``: the skip tensors in the order in which the down path makes them (the
            first is the output of the first convolution), then the mid block's output; ``down`` and
            ``up``: the output of each down-sampling or up-sampling block, in their order.

    Raises:
        ValueError: for another placement.
    """
    widths = config.channels
    sides = [side >> level for level in range(len(widths))]
    below = [*sides[1:], sides[-1]]  # the last block does not shrink
    if placement == "down":
        return list(zip(widths, below, strict=True))
    if placement == "up":
        return list(zip(reversed(widths), [*reversed(sides[:-1]), sides[0]], strict=True))
    if placement != "skip":
        raise ValueError(f"mmfs_placement: expected 'skip', 'up' or 'down', got {placement!r}")
    sites = [(widths[0], side)]
    for level, width in enumerate(widths):
        sites += [(width, sides[level])] * config.layers_per_block
        sites += [(width, below[level])] * (level < len(widths) - 1)
    return [*sites, (widths[-1], sides[-1])]


class MMFSBlock(nn.Module):
    """MMFS on one feature map of the U-Net, added to it; adds nothing at first.

    Args:
        channels: of the feature map; ``side`` its pixels a side.
        maps_width: channels of the images' maps.
        config: of the MMFS. With ``base`` 0, offsets are in pixels of this feature map.
        shapes: (height, width) of the maps' levels.
    """

    positions: Tensor
    pixels: Tensor

    def __init__(self, channels: int, side: int, maps_width: int, config: MMFSConfig, shapes: Shapes):
        super().__init__()
        self.side = side
        self.query_norm = nn.LayerNorm(channels, eps=NORM_EPS)
        self.maps_norm = nn.LayerNorm(maps_width, eps=NORM_EPS)
        self.mmfs = MMFS(channels, maps_width, channels, config, shapes, base=config.base or side)
        # Frozen at zero, as the public weights were trained: what sees nothing gets nothing.
        self.mmfs.sink_value.requires_grad_(False)
        self.conv = nn.Linear(channels, channels)  # a 1x1 convolution, applied to pixels in a row
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)
        self.register_buffer("positions", position_embedding(side, channels), persistent=False)
        index = torch.arange(side)
        row, column = torch.meshgrid(index, index, indexing="ij")
        # Integers, which a change of the module's dtype leaves exact.
        self.register_buffer("pixels", torch.stack([column, row], -1).flatten(0, 1), persistent=False)

    def project(self, maps: Tensor) -> Tensor:
        """What the pixels look into, from maps [I, S, maps_width]; serves any number of forwards."""
        return self.mmfs.project(self.maps_norm(maps))

    def forward(self, x: Tensor, projected: Tensor, visible: Tensor) -> Tensor:
        """The feature map x [J, channels, side, side] with what it found added.

        Args:
            x: feature map.
            projected: of ``project``.
            visible: int32 [J, 2], half-open interval of the images that each of the J sees.

        Raises:
            ValueError: when x has another side.
        """
        if x.shape[2:] != (self.side, self.side):
            raise ValueError(
                f"U-Net MMFS: a feature map of {tuple(x.shape[2:])} pixels where the block was built "
                f"for {self.side} a side"
            )
        query = self.query_norm(x.permute(0, 2, 3, 1).flatten(1, 2)) + self.positions
        dtype = torch.promote_types(x.dtype, torch.float32)
        centres = ((self.pixels.to(dtype) + 0.5) / self.side).repeat(len(x), 1)
        found = self.conv(self.mmfs.attend(query.flatten(0, 1), projected, centres, visible))
        return x + found.view(len(x), self.side, self.side, -1).permute(0, 3, 1, 2)


class UNetMMFS(nn.Module):
    """The MMFS blocks of a U-Net, one a site of ``mmfs_sites``.

    Args:
        sites: (channels, pixels a side) of each.
        maps_width, config, shapes: as of ``MMFSBlock``.
    """

    def __init__(self, sites: Sequence[tuple[int, int]], maps_width: int, config: MMFSConfig, shapes: Shapes):
        super().__init__()
        blocks = [MMFSBlock(channels, side, maps_width, config, shapes) for channels, side in sites]
        self.blocks = cast(Sequence[MMFSBlock], nn.ModuleList(blocks))

    def project(self, maps: Tensor) -> list[Tensor]:
        """``MMFSBlock.project`` of every block."""
        return [block.project(maps) for block in self.blocks]

    def forward(
        self, features: Sequence[Tensor], projected: Sequence[Tensor], visible: Tensor
    ) -> list[Tensor]:
        """All blocks, each on its feature map [J, channels, side, side]."""
        return [
            block(x, values, visible)
            for block, x, values in zip(self.blocks, features, projected, strict=True)
        ]


class Looks:
    """The MMFS of a U-Net and what it looks at in one pass.

    Args:
        mmfs: the blocks, or None for MMFS off.
        placement: as of ``mmfs_sites``.
        projected: of ``UNetMMFS.project``.
        visible: int32 [J, 2].
    """

    def __init__(self, mmfs: UNetMMFS | None, placement: str, projected: Sequence[Tensor], visible: Tensor):
        self.mmfs, self.placement = mmfs, placement
        self.projected, self.visible = projected, visible

    def at_block(self, path: str, index: int, x: Tensor) -> Tensor:
        """The output x of a block of a path, ``down`` or ``up``."""
        if self.mmfs is None or self.placement != path:
            return x
        return self.mmfs.blocks[index](x, self.projected[index], self.visible)

    def at_skips(self, skips: list[Tensor], mid: Tensor) -> tuple[list[Tensor], Tensor]:
        """The skip tensors and the mid block's output."""
        if self.mmfs is None or self.placement != "skip":
            return skips, mid
        *skips, mid = self.mmfs([*skips, mid], self.projected, self.visible)
        return skips, mid


def run_unet(
    unet: UNet2DConditionModel, looks: Looks, sample: Tensor, timestep: Tensor, tokens: Tensor
) -> Tensor:
    """The U-Net's forward pass with MMFS; without, it is diffusers' own.

    A down-sampling block's output is what the next block gets and also the block's last skip tensor,
    so MMFS ``down`` reaches both.

    Args:
        unet: the U-Net.
        looks: MMFS, and what it looks at.
        sample: [J, channels, side, side], noisy.
        timestep: int64 [J].
        tokens: [J, n, token width], what its cross-attention reads.

    Returns:
        Its prediction, of the sample's shape.
    """
    embedding = unet.time_embedding(unet.time_proj(timestep).to(sample.dtype))
    if unet.config.addition_embed_type == "text":
        embedding = embedding + unet.add_embedding(tokens)
    x = unet.conv_in(sample)
    skips = [x]
    for index, block in enumerate(unet.down_blocks):
        x, made = _block(block, tokens, hidden_states=x, temb=embedding)
        x = looks.at_block("down", index, x)
        skips += [*made[:-1], x]
    x = unet.mid_block(x, embedding, encoder_hidden_states=tokens)
    skips, x = looks.at_skips(skips, x)
    for index, block in enumerate(unet.up_blocks):
        used = len(block.resnets)
        skips, last = skips[:-used], skips[-used:]
        x = _block(block, tokens, hidden_states=x, temb=embedding, res_hidden_states_tuple=tuple(last))
        x = looks.at_block("up", index, x)
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(x)))


def _block(block: nn.Module, tokens: Tensor, **inputs):
    if getattr(block, "has_cross_attention", False):
        inputs["encoder_hidden_states"] = tokens
    return block(**inputs)


def position_embedding(side: int, channels: int) -> Tensor:
    """Fixed 2-D sine-cosine embedding of a square feature map, float32 [side * side, channels]."""
    embedding = sincos_2d(POSITION_GRID, POSITION_GRID, channels)
    if side == POSITION_GRID:
        return embedding
    plane = embedding.T.unflatten(1, (POSITION_GRID, POSITION_GRID))[None]
    plane = F.interpolate(plane, (side, side), mode="bicubic", align_corners=False)
    return plane[0].flatten(1).T.contiguous()
