"""Ranks that start in a second: forks of one process that has imported what they need.

``Forked`` takes the place of ``subprocess.Popen`` in the launcher. What runs is the same: the module as
``__main__``, in a session of its own, with the environment, arguments and log that the launcher gives.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import runpy
import signal
import sys
from pathlib import Path
from typing import IO

from mmi_megatron.train import worker


class Forked:
    """A rank of the launcher, as far as it looks like ``subprocess.Popen``.

    Attributes:
        ranks: the newest process of each rank.
    """

    ranks: dict[int, Forked] = {}

    def __init__(self, command: list[str], env: dict[str, str], stderr: IO, **_):
        module = command.index("-m") + 1
        # Its parent is the process it is a fork of, not the launcher.
        given = {name: value for name, value in env.items() if name != worker.PARENT}
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["mmi_megatron.train.loop"])
        what = (command[module], command[module + 1 :], given, Path(stderr.name))
        self.process = context.Process(target=_run, args=what, daemon=True)
        self.process.start()
        self.pid = self.process.pid
        Forked.ranks[int(env["RANK"])] = self

    @property
    def returncode(self) -> int | None:
        """Exit code, negative for a signal; None while it runs."""
        return self.process.exitcode

    def poll(self) -> int | None:
        """The same."""
        return self.process.exitcode

    def wait(self) -> None:
        """Wait for its end."""
        self.process.join()

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.process.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)


def _run(module: str, arguments: list[str], env: dict[str, str], log: Path) -> None:
    """In the fork: become what the launcher would have started. All that is printed goes to the log."""
    os.setsid()
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.enable()
    os.environ.clear()
    os.environ.update(env)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
