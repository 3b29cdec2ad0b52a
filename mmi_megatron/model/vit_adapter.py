"""ViT-Adapter: a pyramid of feature maps beside a plain ViT ("Vision Transformer Adapter for Dense
Predictions", with the changes of MM-Interleaved: LayerNorm in the stem, and maps of the ViT's width).

A convolutional stem makes four maps of strides 4, 8, 16 and 32. The ViT's patch tokens and the
three coarser maps exchange what they know through deformable attention: an injector before each
group of ViT layers, an extractor after it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmi_kernels import ms_deform_attn
from mmi_megatron.config import AdapterConfig
from mmi_megatron.model.vision_towers import Tower, embed, run_layer

Shapes = Sequence[tuple[int, int]]
STRIDE = 16  # the stem sees 16 pixels a patch, whatever the ViT's own patch size
STEM_NORM_EPS = 1e-6


def pyramid_shapes(grid: int) -> tuple[tuple[int, int], ...]:
    """(height, width) of the four maps of a ViT of ``grid`` patches a side, the finest first.

    Raises:
        ValueError: when the grid is odd; the coarsest map has half its side.
    """
    if grid < 2 or grid % 2:
        raise ValueError(f"the ViT's grid must be even for its coarsest map, got {grid} patches a side")
    return tuple((side, side) for side in (4 * grid, 2 * grid, grid, grid // 2))


@dataclass
class Levels:
    """The levels of a feature map and where their pixels lie.

    Attributes:
        shapes: (height, width) of each level.
        centres: [S, 2], centres of the pixels as (x, y) in 0..1, level by level, row-major.
        sizes: [L, 2], (width, height) of each level.
    """

    shapes: Shapes
    centres: Tensor
    sizes: Tensor

    @classmethod
    def of(cls, shapes: Shapes, device: torch.device, dtype: torch.dtype) -> Levels:
        """Built from fills on the device: nothing is copied there, which would stall a GPU."""
        centres, sizes = [], []
        for height, width in shapes:
            rows = (torch.arange(height, device=device, dtype=dtype) + 0.5) / height
            columns = (torch.arange(width, device=device, dtype=dtype) + 0.5) / width
            y, x = torch.meshgrid(rows, columns, indexing="ij")
            centres.append(torch.stack([x, y], -1).flatten(0, 1))
            sizes += [torch.full((1,), float(side), device=device, dtype=dtype) for side in (width, height)]
        return cls(shapes, torch.cat(centres), torch.cat(sizes).view(-1, 2))


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of [B, C, h, w]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def _conv(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
        ChannelNorm(outputs, eps=STEM_NORM_EPS),
        nn.ReLU(),
    )


class Stem(nn.Module):
    """Four maps of ``width`` channels from an image [I, 3, 16 g, 16 g]: sides 4 g, 2 g, g, g / 2."""

    def __init__(self, stem: int, width: int):
        super().__init__()
        widths = (stem, 2 * stem, 4 * stem, 4 * stem)
        first = [_conv(3, stem, 2), _conv(stem, stem, 1), _conv(stem, stem, 1), nn.MaxPool2d(3, 2, 1)]
        down = [_conv(*pair, 2) for pair in zip(widths, widths[1:], strict=False)]
        self.stages = nn.ModuleList([nn.Sequential(*first), *down])
        self.projections = nn.ModuleList(nn.Conv2d(channels, width, 1) for channels in widths)

    def forward(self, images: Tensor) -> list[Tensor]:
        maps, x = [], images
        for stage, projection in zip(self.stages, self.projections, strict=True):
            x = stage(x)
            maps.append(projection(x))
        return maps


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention (Deformable DETR, equation 3).

    Args:
        width: channels of queries, features and output.
        levels: number of levels of the features.
        config: heads, points and the values' width.
    """

    def __init__(self, width: int, levels: int, config: AdapterConfig):
        super().__init__()
        inner = int(width * config.value_ratio)
        if inner % config.heads:
            raise ValueError(
                f"vision.adapter: values of {inner} channels (width {width} x value_ratio "
                f"{config.value_ratio}) do not divide into {config.heads} heads"
            )
        self.split = (config.heads, levels, config.points)
        self.zero_offset_bias = config.zero_offset_bias
        self.offsets = nn.Linear(width, math.prod(self.split) * 2)
        self.weights = nn.Linear(width, math.prod(self.split))
        self.value_proj = nn.Linear(width, inner)
        self.output_proj = nn.Linear(inner, width)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Head h looks in the direction 2 pi h / heads, its point p (from 1) p pixels away on every
        level. With ``zero_offset_bias`` all points of a head start in one place and, being equal,
        stay together."""
        heads, levels, points = self.split
        nn.init.zeros_(self.offsets.weight)
        if self.zero_offset_bias:
            nn.init.zeros_(self.offsets.bias)
        else:
            angle = 2 * math.pi / heads * torch.arange(heads)
            ring = torch.stack([angle.cos(), angle.sin()], -1)
            ring = ring / ring.abs().amax(-1, keepdim=True)
            steps = torch.arange(1, points + 1)[:, None]
            self.offsets.bias.copy_((ring[:, None, None] * steps).expand(-1, levels, -1, -1).flatten())
        nn.init.zeros_(self.weights.weight)
        nn.init.zeros_(self.weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(self, query: Tensor, asking: Levels, features: Tensor, asked: Levels) -> Tensor:
        """[I, Q, width] from query [I, Q, width], the pixels of the levels ``asking``, and features
        [I, S, width] of the levels ``asked``. Locations and weights are computed in float32 or wider."""
        exact = torch.promote_types(query.dtype, torch.float32)
        heads, levels, points = self.split
        offsets = self.offsets(query).to(exact).unflatten(-1, (heads, levels, points, 2))
        locations = asking.centres[:, None, None, None] + offsets / asked.sizes[:, None]
        weights = self.weights(query).to(exact).unflatten(-1, (heads, levels * points)).softmax(-1)
        value = self.value_proj(features).unflatten(-1, (heads, -1))
        out = ms_deform_attn(value, asked.shapes, locations, weights.unflatten(-1, (levels, points)))
        return self.output_proj(out)


class Injector(nn.Module):
    """Patch tokens take from the pyramid; ``gamma`` is 0 at start, so that the ViT starts as it is."""

    def __init__(self, width: int, levels: int, config: AdapterConfig):
        super().__init__()
        self.query_norm = nn.LayerNorm(width)
        self.feature_norm = nn.LayerNorm(width)
        self.attention = DeformableAttention(width, levels, config)
        self.gamma = nn.Parameter(torch.zeros(width))

    def forward(self, patches: Tensor, grid: Levels, pyramid: Tensor, levels: Levels) -> Tensor:
        found = self.attention(self.query_norm(patches), grid, self.feature_norm(pyramid), levels)
        return patches + self.gamma * found


class ConvFFN(nn.Module):
    """FFN with a depthwise 3x3 convolution on the hidden maps of each level."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.conv = nn.Conv2d(hidden, hidden, 3, 1, 1, groups=hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor, shapes: Shapes) -> Tensor:
        levels = self.up(x).transpose(1, 2).split([height * width for height, width in shapes], 2)
        mixed = [
            self.conv(level.unflatten(2, shape)).flatten(2)
            for level, shape in zip(levels, shapes, strict=True)
        ]
        return self.down(F.gelu(torch.cat(mixed, 2).transpose(1, 2)))


class Extractor(nn.Module):
    """The pyramid takes from the ViT's patch tokens, then an FFN."""

    def __init__(self, width: int, config: AdapterConfig):
        super().__init__()
        self.query_norm = nn.LayerNorm(width)
        self.feature_norm = nn.LayerNorm(width)
        self.attention = DeformableAttention(width, 1, config)
        self.ffn_norm = nn.LayerNorm(width)
        self.ffn = ConvFFN(width, int(width * config.ffn_ratio))

    def forward(self, pyramid: Tensor, levels: Levels, patches: Tensor, grid: Levels) -> Tensor:
        found = self.attention(self.query_norm(pyramid), levels, self.feature_norm(patches), grid)
        pyramid = pyramid + found
        return pyramid + self.ffn(self.ffn_norm(pyramid), levels.shapes)


class ViTAdapter(nn.Module):
    """The adapter around an image tower of timm, which is handed in at each call: the ViT may
    be frozen and has its own place in the model.

    Args:
        width, layers: of the ViT.
        grid: patches a side, even.
        config: the adapter's sizes.

    Raises:
        ValueError: when the ViT has fewer layers than the adapter interactions, or the grid is odd.
    """

    def __init__(self, width: int, layers: int, grid: int, config: AdapterConfig):
        super().__init__()
        if not 1 <= config.interactions <= layers:
            raise ValueError(
                "vision.adapter.interactions: "
                f"expected 1..{layers} (the ViT's layers), got {config.interactions}"
            )
        self.shapes = pyramid_shapes(grid)
        self.grid = (grid, grid)
        count = config.interactions
        self.bounds = [layers * index // count for index in range(count + 1)]
        self.stem = Stem(config.stem, width)
        self.level_embedding = nn.Parameter(torch.zeros(3, width))
        self.injectors = nn.ModuleList(Injector(width, 3, config) for _ in range(count))
        self.extractors = nn.ModuleList(Extractor(width, config) for _ in range(count))
        self.extra_extractors = nn.ModuleList(
            Extractor(width, config) for _ in range(config.extra_extractors)
        )
        self.up = nn.ConvTranspose2d(width, width, 2, 2)
        self.apply(_initialise)

    def forward(self, vit: Tower, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Run ViT and adapter together.

        Args:
            vit: an image tower of this width, depth and grid.
            images: normalised, [I, 3, H, W] at the ViT's own size.

        Returns:
            The ViT's last tokens [I, prefix + grid * grid, width], before its final norm, and four
            maps [I, width, h, w].
        """
        exact = torch.promote_types(images.dtype, torch.float32)
        grid = Levels.of((self.grid,), images.device, exact)
        coarse = Levels.of(self.shapes[1:], images.device, exact)
        side = STRIDE * self.grid[0]
        fine, *levels = self.stem(F.interpolate(images, (side, side), mode="bilinear", align_corners=False))
        pyramid = torch.cat(
            [
                level.flatten(2).transpose(1, 2) + row
                for level, row in zip(levels, self.level_embedding, strict=True)
            ],
            1,
        )
        tokens, rope = embed(vit, images)
        prefix, seen, blocks = vit.num_prefix_tokens, [], list(vit.blocks.children())
        again = vit.grad_checkpointing and torch.is_grad_enabled()
        for index, (injector, extractor) in enumerate(zip(self.injectors, self.extractors, strict=True)):
            patches = injector(tokens[:, prefix:], grid, pyramid, coarse)
            tokens = torch.cat([tokens[:, :prefix], patches], 1)
            for block in blocks[self.bounds[index] : self.bounds[index + 1]]:
                tokens = run_layer(block, tokens, rope, again)
            patches = tokens[:, prefix:]
            pyramid = extractor(pyramid, coarse, patches, grid)
            seen.append(patches.transpose(1, 2).unflatten(2, self.grid))
        for extractor in self.extra_extractors:
            pyramid = extractor(pyramid, coarse, patches, grid)
        return tokens, self._merge(fine, pyramid, seen)

    def _merge(self, fine: Tensor, pyramid: Tensor, seen: list[Tensor]) -> list[Tensor]:
        """The four maps: stem and pyramid plus the ViT's maps after its groups of layers, the
        earliest for the finest level. With other than four groups they are shared out evenly."""
        sizes = [height * width for height, width in self.shapes[1:]]
        levels = [
            level.transpose(1, 2).unflatten(2, shape)
            for level, shape in zip(pyramid.split(sizes, 1), self.shapes[1:], strict=True)
        ]
        maps = [fine + self.up(levels[0]), *levels]
        for index, shape in enumerate(self.shapes):
            patches = seen[-(-(index + 1) * len(seen) // 4) - 1]
            if shape != self.grid:
                patches = F.interpolate(patches, shape, mode="bilinear", align_corners=False)
            maps[index] = maps[index] + patches
        return maps


@torch.no_grad()
def _initialise(module: nn.Module) -> None:
    """ViT-Adapter's start values of convolutions and of the FFN's linear layers."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, ConvFFN):
        for linear in (module.up, module.down):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
