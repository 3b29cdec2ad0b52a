"""The rows of a step dealt to ranks so that all have about the same work."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from data_pipeline.plan import Part
from data_pipeline.settings import DataSettings

ATTENTION = 1 / 16
"""Attention of a document as long as a row, over the work of the row's tokens in all other layers: about
this for the 13B model at 2,048 tokens (0.8 MFLOP a pair of positions, 26 GFLOP a token)."""
IMAGE = 1.25
"""Encoding and drawing an image, in units of its placeholder tokens: beside the 13B model at 512 pixels a
side, ten drawn images cost about a third of a row of 2,048 tokens."""

PARTNERS, EXCHANGES = 64, 4
"""Bins that the fullest one may exchange with at a time, from the emptiest to nearly the fullest; exchanges
at most, for each bin."""

PAIRS = 12
"""Things of a bin up to which two may be exchanged at once; with more, one is enough."""


def row_cost(row: Sequence[Part], settings: DataSettings) -> float:
    """Work of a row in tokens. Every row is as long, padding included; attention and images differ."""
    images = sum(part.images for part in row)
    attention = sum(part.length**2 for part in row) / settings.context_length
    return settings.context_length + ATTENTION * attention + IMAGE * settings.image_tokens * images


def balance(costs: Sequence[float], bins: int) -> list[list[int]]:
    """Deal things into bins of equal count and about equal cost.

    Longest processing time first; then, while it helps, one or two things of the fullest bin are exchanged
    for as many of another bin. As counts are equal, the first alone leaves a bin that got a heavy thing early
    without light enough ones to make up for it.

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
    own = np.array(held, np.int64).reshape(bins, each)
    if bins > 1 and each > 1:
        _exchange(np.asarray(costs, np.float64), own, np.array(load))
    return [sorted(row) for row in own.tolist()]


def _exchange(costs: np.ndarray, held: np.ndarray, load: np.ndarray) -> None:
    """Exchange one or two things between the fullest bin and another, in place, while that lowers it."""
    bins, each = held.shape
    sets = [*combinations(range(each), 1), *(combinations(range(each), 2) if each <= PAIRS else ())]
    member = np.zeros((len(sets), each))
    for row, own in zip(member, sets, strict=True):
        row[list(own)] = 1.0
    count = member.sum(1)
    uneven = np.where(count[:, None] == count[None, :], 0.0, np.inf)
    for _ in range(EXCHANGES * bins):
        *order, high = load.argsort(kind="stable").tolist()
        others = np.array(order)[np.unique(np.linspace(0, bins - 2, PARTNERS).astype(int))]
        given, got = member @ costs[held[high]], costs[held[others]] @ member.T
        less = (
            given[None, :, None] - got[:, None, :]
        )  # what the fullest bin gets rid of: [others, its, their]
        fullest = np.maximum(load[high] - less, load[others][:, None, None] + less) + uneven
        low, mine, theirs = np.unravel_index(int(fullest.argmin()), fullest.shape)
        if fullest[low, mine, theirs] >= load[high] * (1 - 1e-9):
            return
        other = others[low]
        for one, its in zip(sets[mine], sets[theirs], strict=True):
            held[high, one], held[other, its] = held[other, its], held[high, one]
        load[high] -= less[low, mine, theirs]
        load[other] += less[low, mine, theirs]
