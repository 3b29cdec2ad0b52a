"""Pictures that look alike: a perceptual hash, and which of many came before."""

from __future__ import annotations

import numpy as np
from PIL import Image

HASH_SIDE = 32
"""Pixels a side of the picture that a perceptual hash is taken of."""
BITS = 64
MAX_DISTANCE = 15


def perceptual_hash(image: Image.Image) -> int:
    """64 bits of which few change when an image is scaled, recompressed or slightly changed: the signs of
    the 8 x 8 lowest frequencies (DCT-II of 32 x 32 grey pixels) about their median (pHash, Zauner 2010)."""
    grey = image.convert("L").resize((HASH_SIDE, HASH_SIDE), Image.Resampling.BOX)
    pixels = np.asarray(grey, np.float64)
    n = np.arange(HASH_SIDE)
    basis = np.cos(np.pi * (2 * n[None] + 1) * n[:8, None] / (2 * HASH_SIDE))
    low = (basis @ pixels @ basis.T).ravel()
    bits = low > np.median(low[1:])
    bits[0] = False  # brightness alone says nothing
    return int(np.packbits(bits).view(">u8")[0])


def doubles(hashes: np.ndarray, distance: int) -> np.ndarray:
    """Which pictures look like one that comes before them and stays.

    Args:
        hashes: uint64 [N], in the order of the corpus.
        distance: bits in which the hashes of two pictures that look alike may differ, at most
            ``MAX_DISTANCE``. With 0 the cost grows as N; otherwise a part of it as N squared over
            2 ** (64 / (distance + 1)).

    Returns:
        bool [N].
    """
    unique, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    order = np.argsort(first)
    values = unique[order]  # each once, in the order they first come
    gone = np.zeros(len(values), bool)
    if distance:
        for early, late in _alike(values, distance):
            if not gone[early]:
                gone[late] = True
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    stays = ~gone[place[inverse]]
    stays &= np.arange(len(hashes)) == first[inverse]
    return ~stays


def _alike(values: np.ndarray, distance: int) -> list[tuple[int, int]]:
    """All pairs of places whose values differ in at most so many bits, by the second, then the first.

    Two such values agree in at least one of ``distance + 1`` bands of bits, so only those are compared
    that do.
    """
    found = []
    edges = np.linspace(0, BITS, distance + 2).astype(int)
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        band = (values >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
        order = np.argsort(band, kind="stable")
        band, own = band[order], values[order]
        for offset in range(1, len(values)):
            same = np.flatnonzero(band[offset:] == band[:-offset])
            if not len(same):
                break
            near = same[np.bitwise_count(own[same] ^ own[same + offset]) <= distance]
            found.append(np.stack([order[near], order[near + offset]], 1))
    if not found:
        return []
    pairs = np.unique(np.sort(np.concatenate(found), axis=1), axis=0)
    return [(early, late) for early, late in pairs[np.lexsort((pairs[:, 0], pairs[:, 1]))].tolist()]
