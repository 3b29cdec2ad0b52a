"""The U-Net's MMFS of the released checkpoint: its names, and our blocks built from its state dict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmi_megatron.config import MMFSConfig, UNetConfig
from mmi_megatron.convert.released_mmfs import filled, intervals, mmfs_table
from mmi_megatron.convert.rules import Rule, Table, renames
from mmi_megatron.model.mmfs import Shapes
from mmi_megatron.model.unet_mmfs import POSITION_GRID, UNetMMFS, mmfs_sites, position_embedding

HEADS, POINTS, LEVELS = 16, 8, 4


def unet_mmfs_table(sites: Sequence[tuple[int, int]], heads: int, levels: int, points: int) -> Table:
    """Names below ``image_decoder.decoder.mmfs_module.`` of MMFS at the skip tensors and the mid block.

    Args:
        sites: (channels, pixels a side) of ``mmfs_sites``, the mid block last.
        heads, levels, points: of every MMFS.
    """
    same = renames({"query_norm": "query_norm", "maps_norm": "feat_norm"})
    # Theirs is a 1x1 convolution, [C, C, 1, 1].
    conv = Rule(
        "conv.weight", ("conv.weight",), lambda t: t[0].flatten(1), lambda tensor: [tensor[:, :, None, None]]
    )
    block = Table([*same, conv, Rule("conv.bias", ("conv.bias",))])
    block += mmfs_table(heads, levels, points).under("mmfs.", "mmfs.")
    table = Table()
    for index, (channels, _) in enumerate(sites):
        last = index == len(sites) - 1
        theirs = "mmfs_mid_block." if last else f"mmfs_down_blocks.{index}."
        positions = {f"{theirs}pos_embed": position_embedding(POSITION_GRID, channels)}
        table += block.under(f"blocks.{index}.", theirs) + Table(constants=positions)
    return table


class ReleasedUNetMMFS(nn.Module):
    """Our U-Net MMFS behind the release's arguments, for feature maps and pyramids of any size.

    Args:
        channels: of the sites, the mid block's last.
        maps_width: channels of the images' maps.
        config: of the MMFS.
    """

    def __init__(self, channels: Sequence[int], maps_width: int, config: MMFSConfig):
        super().__init__()
        self.channels, self.maps_width, self.config = list(channels), maps_width, config
        sides = [POSITION_GRID] * len(self.channels)
        levels = [(POSITION_GRID >> level,) * 2 for level in range(LEVELS)]
        self.core = self._built(sides, levels)

    def forward(
        self, skips: Sequence[Tensor], mid: Tensor, maps: Sequence[Tensor], visibility: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """Feature maps with what they found in the images added.

        Args:
            skips: [B, C, h, w] each, in the order in which the down path makes them; ``mid`` the mid
                block's output. Square.
            maps: [B, M, maps_width, h, w] each, the finest first.
            visibility: 0/1 [B, M], with gaps too.

        Returns:
            The skips and the mid block's output.

        Raises:
            ValueError: on maps, features or a visibility that do not fit each other.
        """
        features = [*skips, mid]
        batch, images = visibility.shape
        if len(maps) != LEVELS or any(level.shape[:2] != (batch, images) for level in maps):
            raise ValueError(
                f"maps: expected {LEVELS} of [{batch}, {images}, C, h, w], got "
                f"{[tuple(level.shape) for level in maps]}"
            )
        if [x.shape[:2] for x in features] != [(batch, channels) for channels in self.channels]:
            raise ValueError(
                f"features: expected batch {batch} and channels {self.channels}, got "
                f"{[tuple(x.shape) for x in features]}"
            )
        self._fit([x.shape[2] for x in features], [(level.shape[3], level.shape[4]) for level in maps])
        flat = torch.cat([level.flatten(3) for level in maps], 3).flatten(0, 1).transpose(1, 2)
        order, visible = intervals(visibility[:, None])
        if order is not None:
            flat = flat[order]
        out = self.core(features, self.core.project(flat), visible)
        return out[:-1], out[-1]

    def _fit(self, sides: list[int], shapes: Shapes) -> None:
        """Take on other sizes; the parameters stay the same ones."""
        blocks = self.core.blocks
        if [block.side for block in blocks] == sides and blocks[0].mmfs.shapes == tuple(shapes):
            return
        like = blocks[0].conv.weight
        core = self._built(sides, shapes).to(like.device, like.dtype)
        core.load_state_dict(self.core.state_dict(keep_vars=True), assign=True)
        self.core = core.train(self.training)

    def _built(self, sides: Sequence[int], shapes: Shapes) -> UNetMMFS:
        sites = list(zip(self.channels, sides, strict=True))
        return UNetMMFS(sites, self.maps_width, self.config, shapes)


def unet_mmfs(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> ReleasedUNetMMFS:
    """The U-Net's MMFS of the release.

    Args:
        state_dict: its tensors, named from ``mmfs_down_blocks.`` and ``mmfs_mid_block.`` on. The fixed
            position embeddings may be absent.
        config: input_channel (of the maps) and block_out_channels (of the U-Net), layers_per_block (2
            when absent). 16 heads, 8 points, 4 levels.

    Returns:
        The module, in the dtype of the tensors, in evaluation mode.

    Raises:
        ValueError: naming tensors that are missing, left over or of another shape, and position
            embeddings that are not the model's.
    """
    what, first = "released U-Net MMFS", "mmfs_mid_block.mmfs."
    sizes = {}
    for name in ("value_proj.weight", "query_relpos.weight"):
        if first + name not in state_dict:
            raise ValueError(f"{what}: missing {first + name}")
        sizes[name] = state_dict[first + name].shape[0]
    settings = MMFSConfig(
        heads=HEADS,
        points=POINTS,
        value_width=sizes["value_proj.weight"],
        table_rows=sizes["query_relpos.weight"],
        levels=list(range(LEVELS)),
        base=0,
        offset_init=1.0,
    )
    channels = list(config["block_out_channels"])
    unet = UNetConfig(channels=channels, layers_per_block=config.get("layers_per_block", 2))
    sites = mmfs_sites(unet, POSITION_GRID, "skip")
    module = ReleasedUNetMMFS([width for width, _ in sites], config["input_channel"], settings)
    filled(module.core, state_dict, unet_mmfs_table(sites, HEADS, LEVELS, POINTS), what)
    return module.eval()
