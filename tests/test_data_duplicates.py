"""Perceptual hashes, and which pictures came before: against comparing all with all."""

import io

import numpy as np
import pytest
from PIL import Image

from data_pipeline.duplicates import doubles, perceptual_hash


def scene(seed: int, size: int = 160, quality: int = 90) -> bytes:
    """A JPEG of its own coarse structure."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC).save(file, "JPEG", quality=quality)
    return file.getvalue()


def test_a_perceptual_hash_stays_and_tells_apart():
    def bits(one: bytes, other: bytes) -> int:
        hashes = [perceptual_hash(Image.open(io.BytesIO(blob))) for blob in (one, other)]
        return (hashes[0] ^ hashes[1]).bit_count()

    assert max(bits(scene(n), scene(n, 90, 60)) for n in range(8)) <= 4
    assert min(bits(scene(n), scene(n + 1)) for n in range(8)) >= 12


@pytest.mark.parametrize("distance", [0, 1, 3, 4, 9])
def test_doubles_are_those_of_comparing_all_with_all(distance):
    rng = np.random.default_rng(distance)
    hashes = rng.integers(0, 1 << 63, 400, dtype=np.uint64)
    for _ in range(600):  # copies with some bits turned, of originals and of other copies
        value = int(hashes[rng.integers(len(hashes))])
        for bit in rng.integers(0, 64, rng.integers(0, 7)).tolist():
            value ^= 1 << bit
        hashes = np.append(hashes, np.uint64(value))
    hashes = rng.permutation(hashes)
    kept: list[int] = []
    expected = []
    for value in hashes.tolist():
        expected.append(any((value ^ other).bit_count() <= distance for other in kept))
        if not expected[-1]:
            kept.append(value)
    assert doubles(hashes, distance).tolist() == expected
    assert 0 < sum(expected) < len(expected)
    assert doubles(np.empty(0, np.uint64), distance).tolist() == []
