"""The release's U-Net MMFS from its own names: pixel by pixel, with nothing of our modules."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmi_megatron.convert import released
from tests.test_released_language import mmfs
from tests.test_unet_mmfs import CHANNELS, RELEASED, released_state

SIDES = [16] * 3 + [8] * 3 + [4] * 3 + [2] * 4
LEVELS = [8, 4, 2, 1]


def place(side: int, x: int, y: int, channels: int) -> Tensor:
    """2-D sine-cosine embedding of a pixel where the map is as fine as the table, 64 a side."""
    assert side == 64
    quarter = channels // 4
    angles = [(p * 10000 ** (-k / quarter)) for p in (y, x) for k in range(quarter)]
    row, column = angles[:quarter], angles[quarter:]
    parts = [math.sin(a) for a in row], [math.cos(a) for a in row]
    parts += [math.sin(a) for a in column], [math.cos(a) for a in column]
    return torch.tensor([value for part in parts for value in part], dtype=torch.float64)


def table(side: int, channels: int) -> Tensor:
    """Embeddings [side, side, channels], resized from those of 64 a side."""
    whole = torch.stack([torch.stack([place(64, x, y, channels) for x in range(64)]) for y in range(64)])
    plane = whole.float().permute(2, 0, 1)[None]
    return (
        F.interpolate(plane, (side, side), mode="bicubic", align_corners=False)[0].permute(1, 2, 0).double()
    )


def added(state: dict[str, Tensor], block: str, x: Tensor, y_x: tuple[int, int], maps: list[Tensor], seen):
    """What MMFS adds at one pixel of x [C, h, w]; maps [M, C, h, w] each."""
    own = {name.removeprefix(block): tensor for name, tensor in state.items() if name.startswith(block)}
    side, (row, column) = x.shape[-1], y_x
    query = F.layer_norm(
        x[:, row, column], x.shape[:1], own["query_norm.weight"], own["query_norm.bias"], 1e-6
    )
    query = query + table(side, len(x))[row, column]
    flat = torch.cat([level.flatten(2) for level in maps], 2).transpose(1, 2)
    flat = F.layer_norm(flat, flat.shape[-1:], own["feat_norm.weight"], own["feat_norm.bias"], 1e-6)
    inner = {name.removeprefix("mmfs."): tensor for name, tensor in own.items()}
    centre = torch.tensor([(column + 0.5) / side, (row + 0.5) / side], dtype=torch.float64)
    found = mmfs(inner, query, flat, seen, sides=LEVELS, base=side, centre=centre)
    return own["conv.weight"][:, :, 0, 0] @ found + own["conv.bias"]


@pytest.mark.parametrize("positions", [False, True])
def test_pixels_equal_the_definition(positions):
    state = released_state(positions=positions)
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    features = [normal(2, c, side, side) for c, side in zip(CHANNELS, SIDES, strict=True)]
    maps = [normal(2, 3, 12, side, side) for side in LEVELS]
    visibility = torch.tensor([[1, 0, 1], [0, 0, 0]])
    module = released.unet_mmfs(state, RELEASED)
    with torch.no_grad():
        skips, mid = module(features[:-1], features[-1], maps, visibility)
    assert len(skips) == 12
    for index, pixel in ((0, (3, 14)), (3, (7, 0)), (8, (1, 2)), (12, (1, 0))):
        block = "mmfs_mid_block." if index == 12 else f"mmfs_down_blocks.{index}."
        for row in range(2):
            found = ([*skips, mid][index] - features[index])[row, :, pixel[0], pixel[1]]
            mine = [level[row] for level in maps]
            wanted = added(state, block, features[index][row], pixel, mine, visibility[row])
            assert wanted.abs().max() > 1e-3
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def test_the_dtype_is_that_of_the_weights_not_of_the_fixed_positions():
    state = {
        name: tensor if "pos_embed" in name else tensor.bfloat16()
        for name, tensor in sorted(
            released_state(positions=True).items(), key=lambda item: "pos_embed" not in item[0]
        )
    }
    assert "pos_embed" in next(iter(state))
    assert {p.dtype for p in released.unet_mmfs(state, RELEASED).parameters()} == {torch.bfloat16}
