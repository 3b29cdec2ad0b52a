"""Mixing sources by weight, exactly: after n samples each source has its share of n, to within one."""

from __future__ import annotations


def next_source(drawn: list[int], weights: list[int]) -> int:
    """Which source the next sample comes from.

    Taking the source that lags most can leave one more than a sample behind when there are many.
    Taking, among those that are not ahead, the one that would first fall a whole sample behind
    never does: it is earliest-deadline-first scheduling of unit jobs at full load.

    Args:
        drawn: samples taken from each source so far.
        weights: positive whole numbers.

    Returns:
        Number of the source; for every prefix of n samples |drawn - n * share| < 1.
    """
    position, total = sum(drawn), sum(weights)
    due = [
        (-(-(count + 1) * total // weight), index)
        for index, (count, weight) in enumerate(zip(drawn, weights, strict=True))
        if count * total < weight * (position + 1)
    ]
    return min(due)[1]
