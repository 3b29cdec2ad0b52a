"""Choices without a random generator: keyed hashes, the same on any machine."""

from __future__ import annotations

import hashlib
import struct


def keyed(*key: int) -> int:
    """64 bits that look random and depend on the key alone."""
    packed = struct.pack(f"<{len(key)}q", *key)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")
