"""Fixed sine-cosine position embeddings.

A position p becomes [sin(p w_0) .. sin(p w_{n-1}), cos(p w_0) .. cos(p w_{n-1})] with frequencies
w_k = 10000^(-k / n) and n half the width ("Attention is all you need", section 3.5, with sines and
cosines in two halves instead of interleaved).
"""

from __future__ import annotations

import torch
from torch import Tensor


def sincos(positions: Tensor, width: int) -> Tensor:
    """Embeddings of given positions.

    Args:
        positions: [n], any real numbers.
        width: of an embedding, even.

    Returns:
        float64 [n, width].

    Raises:
        ValueError: when the width is odd.
    """
    if width % 2:
        raise ValueError(f"a sine-cosine position embedding needs an even width, got {width}")
    half = width // 2
    exponent = torch.arange(half, dtype=torch.float64, device=positions.device) / half
    angle = positions.to(torch.float64)[:, None] * 10000.0**-exponent
    return torch.cat([angle.sin(), angle.cos()], 1)


def sincos_1d(length: int, width: int) -> Tensor:
    """Embeddings of the positions 0 .. length - 1, float32 [length, width]."""
    return sincos(torch.arange(length), width).float()


def sincos_2d(height: int, width_pixels: int, width: int) -> Tensor:
    """Embeddings of a grid: one half of the channels is the row, the other the column.

    Args:
        height, width_pixels: of the grid.
        width: of an embedding, a multiple of 4.

    Returns:
        float32 [height * width_pixels, width], row-major.

    Raises:
        ValueError: when the width is no multiple of 4.
    """
    if width % 4:
        raise ValueError(f"a 2-D sine-cosine position embedding needs a width that divides by 4, got {width}")
    rows = sincos(torch.arange(height), width // 2)
    columns = sincos(torch.arange(width_pixels), width // 2)
    rows = rows[:, None].expand(-1, width_pixels, -1)
    columns = columns[None].expand(height, -1, -1)
    return torch.cat([rows, columns], -1).flatten(0, 1).float()
