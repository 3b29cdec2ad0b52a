"""A worker process of ``processes.Processes``: ``python -m data_pipeline.executors.worker FD``.

It imports nothing of the trainer's (no torch), waits for tasks on the connection it was given, writes
pixels straight into shared memory and sends back the rest. It ends when the connection does.
"""

from __future__ import annotations

import mmap
import os
import signal
import sys
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from typing import Any

import numpy as np

from data_pipeline.executors import Setup, collect_rarely
from data_pipeline.executors.blocks import ALIGN, Place
from data_pipeline.task import Produced, Task


class Arena:
    """Hands out arrays of a block of shared memory, one after the other."""

    def __init__(self) -> None:
        self.blocks: dict[int, np.ndarray] = {}
        self.block = np.empty(0, np.uint8)
        self.used = 0

    def learn(self, number: int, size: int, handle: int) -> None:
        """Map a block that was not seen before."""
        self.blocks[number] = np.frombuffer(mmap.mmap(handle, size), np.uint8)
        os.close(handle)

    def start(self, number: int) -> None:
        """Begin to fill a block."""
        self.block, self.used = self.blocks[number], 0

    def empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Like ``numpy.empty``."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        start = self.used
        self.used = -(-(start + size) // ALIGN) * ALIGN
        if start + size > len(self.block):
            raise MemoryError(f"block of {len(self.block)} bytes is too small for {start + size}")
        return self.block[start : start + size].view(dtype).reshape(shape)

    def place(self, array: np.ndarray) -> Place:
        """Where in the block an array lies."""
        start = array.ctypes.data - self.block.ctypes.data if array.size else 0
        return Place(start, array.shape)


def serve(connection: Connection) -> None:
    """Make tasks until the connection ends."""
    arena = Arena()
    setup: Setup = connection.recv()
    try:
        producer = setup.producer(empty=arena.empty)
    except Exception as error:
        connection.send(error)
        return
    collect_rarely()
    connection.send(None)
    while True:
        task, number, size, fresh = connection.recv()
        if fresh:
            arena.learn(number, size, recv_handle(connection))
        arena.start(number)
        try:
            connection.send(_packed(producer.produce(task), arena))
        except Exception as error:
            connection.send(_plain(error, task))


def _packed(produced: Produced, arena: Arena) -> tuple[Produced, Place, Place]:
    """The result without its pixels, and where these are."""
    batch = produced.batch
    places = arena.place(batch.images), arena.place(batch.drawn)
    return produced.without_pixels(), *places


def _plain(error: Exception, task: Task) -> Exception:
    error.add_note(f"in a data worker, at {str(task)[:500]}")
    return error


def main() -> None:
    """Entry of the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the trainer, which ends us
    try:
        serve(Connection(int(sys.argv[1])))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the trainer has ended


if __name__ == "__main__":
    main()
