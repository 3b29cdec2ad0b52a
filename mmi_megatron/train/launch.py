"""Starts a training job: on this machine one process a rank, or, under torchrun, this rank.

The ranks are watched, from their start on. When one is lost or hangs the others are ended, and one
message says which, why, where its log is and how to go on. Under torchrun the ranks say so themselves
(``train.setup``, ``train.pulse``).
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from mmi_megatron import platform
from mmi_megatron.config import Config
from mmi_megatron.errors import ConfigError
from mmi_megatron.layout import data_parallel_size
from mmi_megatron.settings import save_config
from mmi_megatron.train import checkpoint_folder, faults, pulse, worker
from mmi_megatron.train.signals import SIGNALS, STOPPED

POLL = 0.1
"""Seconds between two looks at the ranks."""

SETTLE = 1.0
"""Seconds in which ranks that fail together are seen together, to find the one that began."""

SHOW_CURSOR = "\x1b[?25h"
"""For terminals: a progress bar hides the cursor, and a rank that is killed cannot bring it back."""

DUMP_TIME = 5.0
"""Seconds that ranks have to write their stacks when they are asked to."""

GRACE = 20.0
"""Seconds beyond ``train.timeout`` or ``train.setup_timeout`` in which ranks that hang should have said so
themselves."""


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
        The exit code: 0; 75 for a run that was sent SIGTERM or SIGUSR1, which has saved and goes on
        with ``--resume``; 70 for a rank that hung; else that of the rank that failed, or 128 and
        the number of a signal that ended it before it could save.

    Raises:
        ConfigError: before anything starts: ranks that do not fit the layout or this machine, or a
            folder that already holds another run's checkpoints.
    """
    out = out.absolute()
    checkpoints = config.train.checkpoints or out / "checkpoints"
    if not resume and (there := checkpoint_folder.newest(checkpoints)) is not None:
        raise ConfigError(f"{there.parent} holds a run at {there.name}; add --resume, or name another folder")
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return worker.run(config, out, resume, stop_after)
    count = ranks or _default_ranks(config)
    data_parallel_size(config, count)
    if platform.has_gpu() and count > platform.default_ranks():
        raise ConfigError(f"{count} ranks need as many GPUs, this machine has {platform.default_ranks()}")
    options = ["--resume"] if resume else []
    options += ["--stop-after", str(stop_after)] if stop_after else []
    return start(config, out, count, module, again or _this_command(), options)


def start(config: Config, out: Path, ranks: int, module: str, again: str, options: Sequence[str] = ()) -> int:
    """Start so many ranks of ``module`` on this machine and watch over them; see ``launch``."""
    logs = out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    save_config(config, logs / "settings.yaml")
    command = [sys.executable, "-X", "faulthandler", "-m", module, str(logs / "settings.yaml"), str(out)]
    return _Job([*command, *options], ranks, logs, config).supervise(again)


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

    def __init__(self, command: list[str], ranks: int, logs: Path, config: Config):
        from torch.distributed import TCPStore

        self.logs = logs
        self.timeout, self.setup_timeout = config.train.timeout, config.train.setup_timeout
        self.checkpoints = config.train.checkpoints or logs.parent / "checkpoints"
        self.asked: list[int] = []
        # The ranks meet at a store of this process, on a port that the system gives out: nobody can
        # take it in between, and it outlives any rank.
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.starts: dict[int, int] = {}
        self.began = time.time()
        self.processes: dict[int, subprocess.Popen] = {}
        common = {
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
            "OMP_NUM_THREADS": str(config.train.threads or max(1, platform.usable_cores() // ranks)),
            "PYTHONUNBUFFERED": "1",
            worker.PARENT: str(os.getpid()),
        }
        for rank in range(ranks):
            environment = os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            self.processes[rank] = self._start(rank, command, environment)

    def _start(self, rank: int, command: list[str], environment: dict[str, str]) -> subprocess.Popen:
        faults.clear(self.logs, rank)
        pulse.clear(self.logs, rank)
        with faults.log_path(self.logs, rank).open("ab") as log:
            self.starts[rank] = log.tell()
            return subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=None if rank == 0 else log,
                stderr=log,
                # Signals must reach this process alone, which then ends the ranks in order.
                start_new_session=True,
            )

    def supervise(self, again: str) -> int:
        """Wait for all ranks, or for the first that fails; its exit code."""
        previous = {number: signal.signal(number, self._forward) for number in SIGNALS}
        try:
            while any(process.poll() is None for process in self.processes.values()):
                if self._failed() or self._some_cannot_say():
                    break
                time.sleep(POLL)
            return self._over(again)
        except KeyboardInterrupt:
            self.end()
            print(f"\nStopped. To go on: {again}", file=sys.stderr, flush=True)
            return 128 + signal.SIGINT
        finally:
            self.end()
            if sys.stdout.isatty():
                print(SHOW_CURSOR, end="", flush=True)
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _forward(self, number: int, _: FrameType | None) -> None:
        """Ask all ranks to save and stop; a second time, end them."""
        if number in self.asked:
            raise SystemExit(128 + number)
        self.asked.append(number)
        for process in self.processes.values():
            if process.poll() is None:
                process.send_signal(number)

    def _over(self, again: str) -> int:
        """Say how the job ended; its exit code."""
        if not self._failed() and not any(p.poll() is None for p in self.processes.values()):
            codes = {process.returncode for process in self.processes.values()}
            if STOPPED not in codes:
                return 0
            print(f"\nSaved and stopped. {self._way_on(again)}", file=sys.stderr, flush=True)
            return STOPPED
        time.sleep(SETTLE)
        failed = self._failed()
        for number in self.asked:
            if set(failed.values()) == {-number}:  # before the ranks could have anything to save
                return 128 + number
        found = faults.failures(self.logs, failed, self.starts)
        if not found or found[0].may_follow:  # those that hang may not have been able to say so
            hung = [failure for failure in found if failure.stack and not failure.waits] + self._hung()
            found = hung or found[:1] or [self._stillest()]
        else:
            del found[1:]
        cause = found[0]
        self.end()
        print(self._message(found, again), file=sys.stderr, flush=True)
        if cause.exit_code is None:
            return pulse.HUNG
        return cause.exit_code if cause.exit_code > 0 else 128 - cause.exit_code

    def _failed(self) -> dict[int, int]:
        """Exit codes of the ranks that have failed so far."""
        codes = {rank: process.poll() for rank, process in self.processes.items()}
        return {rank: code for rank, code in codes.items() if code and code != STOPPED}

    def _signs(self) -> dict[int, pulse.Sign]:
        """Where every rank that runs was last; one that has given no sign of life yet is starting."""
        starting = pulse.Sign(None, "starting", self.began)
        running = [rank for rank, process in self.processes.items() if process.poll() is None]
        return {rank: pulse.read(self.logs, rank) or starting for rank in running}

    def _some_cannot_say(self) -> bool:
        """Whether a rank hangs so that it cannot even say so."""
        return any(
            sign.age > GRACE + (self.setup_timeout if sign.step is None else self.timeout)
            for sign in self._signs().values()
        )

    def _hung(self) -> list[faults.Failure]:
        """The ranks that run, have given no sign of life for long, and do not wait for another rank: those
        whose stack says so, then those that do not even give their stack."""
        long = min(self.timeout, self.setup_timeout) / 2
        still = {rank: sign for rank, sign in self._signs().items() if sign.age > long}
        asked = [rank for rank in still if pulse.read(self.logs, rank) is not None]
        for rank in asked:  # one that is starting cannot answer, the signal would end it
            self.processes[rank].send_signal(pulse.DUMP)
        deadline = time.monotonic() + DUMP_TIME
        stacks: dict[int, list[str]] = {}
        while len(stacks) < len(asked) and time.monotonic() < deadline:
            time.sleep(POLL)
            stacks = {rank: stack for rank in asked if (stack := pulse.dumped(self.logs, rank))}
        found = []
        for rank, sign in still.items():
            stack = stacks.get(rank, [])
            if not any(pulse.waits_for_others(frame) for frame in stack[-3:]):
                error = f"hung at {sign}: no progress for {sign.age:.0f} s"
                found.append(faults.Failure(rank, None, error, stack))
        return sorted(found, key=lambda failure: not failure.stack)

    def _stillest(self) -> faults.Failure:
        """Where no rank failed and all wait for each other: the one that has waited longest."""
        signs = self._signs()
        rank = max(signs, key=lambda rank: signs[rank].age)
        error, stack = f"waits for ever at {signs[rank]}, as all ranks do", pulse.dumped(self.logs, rank)
        return faults.Failure(rank, None, error, stack, waits=True)

    def end(self) -> None:
        """End the ranks that still run. At once: what they wait for will not come."""
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
        for process in self.processes.values():
            process.wait()

    def _message(self, found: Sequence[faults.Failure], again: str) -> str:
        """What ended the job, one rank or several that hung, and how to go on."""
        cause, *others = found
        sign = pulse.read(self.logs, cause.rank)
        where = f" at {sign}" if sign is not None and not cause.stack and not others else ""
        who = pulse.ranks_in_words(sorted(failure.rank for failure in found))
        lines = [f"\nTraining ended: {who} {cause.reason}{where}."]
        for failure in found:
            lines += [f"  rank {failure.rank}:"] if others else []
            lines += [
                f"  last said: {failure.error}",
                *(f"  its stack: {frame}" for frame in failure.stack[-pulse.INNERMOST :]),
                f"  its log:   {faults.log_path(self.logs, failure.rank)}",
            ]
            if failure.stack:
                lines.append(f"  all stacks: {pulse.stacks_path(self.logs, failure.rank)}")
        return "\n".join([*lines, f"  {self._way_on(again)}"])

    def _way_on(self, again: str) -> str:
        whole = checkpoint_folder.newest(self.checkpoints)
        where = f"continues after {whole.name}" if whole else "there is no checkpoint yet: starts anew"
        return f"to go on:  {again}   ({where})"
