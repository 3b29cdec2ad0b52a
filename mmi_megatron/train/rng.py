"""Seeds that depend on what is drawn, never on who draws it.

Noise, dropout and augmentation keyed by (seed, step, sample, image) are the same numbers at any
layout and after any resume.
"""

from __future__ import annotations

import hashlib


def keyed_seed(seed: int, step: int, *ids: int | str, purpose: str) -> int:
    """A seed for one draw: the same on every platform, unrelated for any other key.

    Args:
        seed: the run's seed.
        step: the optimizer step, counted from 0.
        ids: what the draw is for: sample, image, layer.
        purpose: what is drawn, so that two uses of the same ids stay independent.

    Returns:
        An integer in [0, 2**64), fit for ``torch.Generator.manual_seed`` and NumPy: the BLAKE2b
        digest of the key, in which every part carries its kind and length.
    """
    parts = [purpose, seed, step, *ids]
    texts = [f"{'s' if isinstance(part, str) else 'i'}{part}".encode() for part in parts]
    key = b"".join(len(text).to_bytes(8, "little") + text for text in texts)
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
