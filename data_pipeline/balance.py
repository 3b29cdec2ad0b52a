"""The rows of a step dealt to ranks so that all have about the same work."""

from __future__ import annotations

from collections.abc import Sequence

from data_pipeline.plan import Part
from data_pipeline.settings import DataSettings

ATTENTION = 1 / 16
"""Attention of a document as long as a row, over the work of the row's tokens in all other layers: about
this for the 13B model at 2,048 tokens (0.8 MFLOP a pair of positions, 26 GFLOP a token)."""
IMAGE = 1.25
"""Encoding and drawing an image, in units of its placeholder tokens: beside the 13B model at 512 pixels a
side, ten drawn images cost about a third of a row of 2,048 tokens."""


def row_cost(row: Sequence[Part], settings: DataSettings) -> float:
    """Work of a row in tokens. Every row is as long, padding included; attention and images differ."""
    images = sum(part.images for part in row)
    attention = sum(part.length**2 for part in row) / settings.context_length
    return settings.context_length + ATTENTION * attention + IMAGE * settings.image_tokens * images


def balance(costs: list[float], bins: int) -> list[list[int]]:
    """Deal things into bins of equal count, longest processing time first.

    Args:
        costs: of each thing; a multiple of ``bins`` of them.
        bins: how many.

    Returns:
        Indices of the things in each bin, ascending.
    """
    each = len(costs) // bins
    held: list[list[int]] = [[] for _ in range(bins)]
    load = [0.0] * bins
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        target = min((b for b in range(bins) if len(held[b]) < each), key=lambda b: (load[b], b))
        held[target].append(index)
        load[target] += costs[index]
    return [sorted(own) for own in held]
