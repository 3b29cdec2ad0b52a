"""A small pool of processes that can play the ranks of any layout."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess


def free_port() -> int:
    """A TCP port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _serve(connection) -> None:
    while (task := connection.recv()) is not None:
        function, arguments, environment = task
        os.environ.clear()
        os.environ.update(environment)
        try:
            connection.send((True, function(*arguments)))
        except BaseException:  # the whole story goes back to the test, which raises it
            connection.send((False, traceback.format_exc()))


class Ranks:
    """Processes started when first needed and used for every layout; a call returns all ranks' results."""

    def __init__(self):
        # One process imports what all ranks need, once for all pools, and every rank is a fork of it.
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["mmi_megatron.parallel.model", "mmi_megatron.train.optimizer"])
        self.connections: list[Connection] = []
        self.processes: list[BaseProcess] = []

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, ranks: int) -> None:
        """Let at least so many processes run."""
        while len(self.processes) < ranks:
            here, there = self.context.Pipe()
            process = self.context.Process(target=_serve, args=(there,), daemon=True)
            process.start()
            self.connections.append(here)
            self.processes.append(process)

    def run(self, ranks: int, function: Callable, *arguments, timeout: float = 300) -> list:
        """Run ``function(*arguments)`` on ranks 0..ranks-1 of a fresh world, with this process's
        environment."""
        self._start(ranks)
        world = {
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "OMP_NUM_THREADS": "1",
        }
        for rank, connection in enumerate(self.connections[:ranks]):
            environment = dict(os.environ) | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            connection.send((function, arguments, environment))
        results = []
        for rank, connection in enumerate(self.connections[:ranks]):
            if not connection.poll(timeout):
                self.close()
                raise TimeoutError(f"rank {rank} of {ranks} gave no answer in {timeout} s")
            results.append(connection.recv())
        failed = [(rank, text) for rank, (fine, text) in enumerate(results) if not fine]
        if failed:
            raise RuntimeError("\n".join(f"rank {rank}:\n{text}" for rank, text in failed))
        return [result for _, result in results]

    def close(self) -> None:
        """End the processes. A later call starts new ones."""
        for process in self.processes:
            process.kill()
            process.join()
        self.connections.clear()
        self.processes.clear()
