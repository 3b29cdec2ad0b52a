"""Starts a training job: on this machine one process a rank, or, under torchrun, this rank.

The ranks are watched. When one is lost the others are ended, and one message says which, why, where
its log is and how to go on.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from mmi_megatron import platform
from mmi_megatron.config import Config
from mmi_megatron.errors import ConfigError
from mmi_megatron.layout import data_parallel_size
from mmi_megatron.settings import save_config
from mmi_megatron.train import checkpoint_folder, faults, worker

POLL = 0.1
"""Seconds between two looks at the ranks."""

SETTLE = 1.0
"""Seconds in which ranks that fail together are seen together, to find the one that began."""

SHOW_CURSOR = "\x1b[?25h"
"""For terminals: a progress bar hides the cursor, and a rank that is killed cannot bring it back."""

PATIENCE = 10.0
"""Seconds that a rank has to end after SIGTERM before it is killed."""


def launch(
    config: Config,
    out: Path,
    resume: bool = False,
    stop_after: int | None = None,
    ranks: int | None = None,
    again: str | None = None,
    module: str = "mmi_megatron.train.worker",
) -> int:
    """Run a training job to its end.

    Under torchrun (``RANK`` and ``WORLD_SIZE`` are set) this process becomes its rank. Otherwise it
    starts all ranks here: rank 0 prints to this terminal, everything else goes to
    ``out/logs/rank_N.log``.

    Args:
        config: the run.
        out: its folder.
        resume: continue from the newest whole checkpoint.
        stop_after: stop, with a checkpoint, after this many steps of the whole run.
        ranks: how many to start; by default one a GPU, or on CPUs those of one replica.
        again: the command that resumes this run, for the message; by default this one, ``--resume``
            added.
        module: what each rank runs.

    Returns:
        The exit code: 0, or that of the rank that failed, or 128 and the number of a signal.

    Raises:
        ConfigError: before anything starts: ranks that do not fit the layout or this machine, or a
            folder that already holds another run's checkpoints.
    """
    out = out.absolute()
    if not resume and (there := checkpoint_folder.newest(out / "checkpoints")) is not None:
        raise ConfigError(f"{out} holds a run at {there.name}; add --resume, or name another folder")
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        worker.run(config, out, resume, stop_after)
        return 0
    count = ranks or _default_ranks(config)
    data_parallel_size(config, count)
    if platform.has_gpu() and count > platform.default_ranks():
        raise ConfigError(f"{count} ranks need as many GPUs, this machine has {platform.default_ranks()}")
    logs = out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    save_config(config, logs / "settings.yaml")
    command = [sys.executable, "-X", "faulthandler", "-m", module, str(logs / "settings.yaml"), str(out)]
    command += ["--resume"] if resume else []
    command += ["--stop-after", str(stop_after)] if stop_after else []
    return _Job(command, count, logs, config.train.threads).supervise(again or _this_command())


def _default_ranks(config: Config) -> int:
    parallel = config.parallel
    replica = parallel.tensor * parallel.pipeline * parallel.context
    return max(replica, platform.default_ranks())


def _this_command() -> str:
    """The command line of this process, resuming."""
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    return shlex.join(words if "--resume" in words else [*words, "--resume"])


class _Job:
    """The ranks of a job on this machine."""

    def __init__(self, command: list[str], ranks: int, logs: Path, threads: int):
        from torch.distributed import TCPStore

        self.logs = logs
        # The ranks meet at a store of this process, on a port that the system gives out: nobody can
        # take it in between, and it outlives any rank.
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.starts: dict[int, int] = {}
        self.processes: dict[int, subprocess.Popen] = {}
        common = {
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
            "OMP_NUM_THREADS": str(threads or max(1, platform.usable_cores() // ranks)),
            "PYTHONUNBUFFERED": "1",
            worker.PARENT: str(os.getpid()),
        }
        for rank in range(ranks):
            environment = os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            self.processes[rank] = self._start(rank, command, environment)

    def _start(self, rank: int, command: list[str], environment: dict[str, str]) -> subprocess.Popen:
        faults.clear(self.logs, rank)
        with faults.log_path(self.logs, rank).open("ab") as log:
            self.starts[rank] = log.tell()
            return subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=None if rank == 0 else log,
                stderr=log,
                # Ctrl-C must reach this process alone, which then ends the ranks in order.
                start_new_session=True,
            )

    def supervise(self, again: str) -> int:
        """Wait for all ranks, or for the first that fails; its exit code."""
        previous = signal.signal(signal.SIGTERM, _raise_exit)
        try:
            while any(process.poll() is None for process in self.processes.values()):
                if self._failed():
                    break
                time.sleep(POLL)
            if not self._failed():
                return 0
            time.sleep(SETTLE)
            cause = faults.first_failure(self.logs, self._failed(), self.starts)
            self.end()
            print(self._message(cause, again), file=sys.stderr, flush=True)
            return cause.exit_code if cause.exit_code > 0 else 128 - cause.exit_code
        except KeyboardInterrupt:
            self.end()
            print(f"\nStopped. To go on: {again}", file=sys.stderr, flush=True)
            return 128 + signal.SIGINT
        finally:
            self.end()
            if sys.stdout.isatty():
                print(SHOW_CURSOR, end="", flush=True)
            signal.signal(signal.SIGTERM, previous)

    def _failed(self) -> dict[int, int]:
        """Exit codes of the ranks that have failed so far."""
        codes = {rank: process.poll() for rank, process in self.processes.items()}
        return {rank: code for rank, code in codes.items() if code}

    def end(self) -> None:
        """End the ranks that still run, in kindness first."""
        for process in self.processes.values():
            if process.poll() is None:
                process.terminate()
        deadline = time.monotonic() + PATIENCE
        for process in self.processes.values():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _message(self, cause: faults.Failure, again: str) -> str:
        whole = checkpoint_folder.newest(self.logs.parent / "checkpoints")
        where = f"continues after {whole.name}" if whole else "there is no checkpoint yet: starts anew"
        return (
            f"\nTraining ended: rank {cause.rank} {cause.reason}.\n"
            f"  last said: {cause.error}\n"
            f"  its log:   {faults.log_path(self.logs, cause.rank)}\n"
            f"  to go on:  {again}   ({where})"
        )


def _raise_exit(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)
