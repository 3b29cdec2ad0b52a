"""Blocks of memory, used again and again; worker processes can share them.

A block has no name and belongs to no file system, so nothing is left over when processes are killed, and
the size of /dev/shm does not matter. It is taken for a task and comes back when the last array on it is
gone.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
import threading
import weakref
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np

ALIGN = 64
SMALLEST = 1 << 16


@dataclass(frozen=True)
class Place:
    """Where in a block an array of bytes lies, and its shape."""

    start: int
    shape: tuple[int, ...]


@dataclass(eq=False)
class Block:
    """A block: its number, its size in bytes, its file descriptor and its memory."""

    number: int
    size: int
    handle: int
    memory: mmap.mmap = field(repr=False)

    @classmethod
    def make(cls, number: int, size: int) -> Block:
        """A new block; its pages are taken as they are written."""
        handle = _anonymous_file()
        os.ftruncate(handle, size)
        return cls(number, size, handle, mmap.mmap(handle, size))

    def __del__(self) -> None:
        os.close(self.handle)


class Blocks:
    """The blocks of an executor. Safe in threads.

    Arrays may be collected, and ``give`` called, at any point of any thread, also while that thread holds the
    lock: so it takes none.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.free: dict[int, list[Block]] = {}
        self.given: deque[Block] = deque()
        self.made = 0

    def take(self, nbytes: int, known: Collection[int] = ()) -> Block:
        """A block that holds at least so many bytes in two arrays; one of those known, if it is free: a
        process pays for every page of a block that it has not met."""
        size = max(SMALLEST, 1 << (nbytes + 2 * ALIGN - 1).bit_length())
        with self.lock:
            while self.given:
                block = self.given.popleft()
                self.free.setdefault(block.size, []).append(block)
            free = self.free.get(size)
            if free:
                return free.pop(next((i for i, block in enumerate(free) if block.number in known), -1))
            self.made += 1
            return Block.make(self.made, size)

    def give(self, block: Block) -> None:
        """Take a block back that nothing uses any more."""
        self.given.append(block)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Like ``numpy.empty``, on memory that was used before: fresh pages take time to be cleared."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        (array,) = self.arrays(self.take(size), Place(0, (size,)))
        return array.view(dtype).reshape(shape)

    def arrays(self, block: Block, *places: Place) -> list[np.ndarray]:
        """uint8 arrays on a block. It comes back by itself when all of them are gone."""
        root = np.frombuffer(block.memory, np.uint8)
        weakref.finalize(root, self.give, block)
        return [root[at.start : at.start + math.prod(at.shape)].reshape(at.shape) for at in places]


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("mmi-data")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
