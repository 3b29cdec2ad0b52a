"""A rank for the tests of the launcher: ``FAKE`` in the environment says what it does."""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

from mmi_megatron.train import worker
from mmi_megatron.train.pulse import Pulse, Watchdog
from mmi_megatron.train.signals import STOPPED, StopSignals


def act(config, out: Path, resume: bool, stop_after: int | None) -> int | None:
    """Do what the test wants of this rank; its exit code."""
    rank, what = int(os.environ["RANK"]), os.environ["FAKE"]
    (out / f"pid_{rank}").write_text(str(os.getpid()))
    print(f"hello from {rank} of {os.environ['WORLD_SIZE']}, threads {os.environ['OMP_NUM_THREADS']}")
    if what == "report":
        given = f"tensor={config.parallel.tensor} resume={resume} stop_after={stop_after}"
        (out / f"given_{rank}").write_text(given)
    elif what == "raise":
        if rank == 1:
            raise ValueError("the second rank's own error\nand its second line")
        while not (out / "logs" / "rank_1.error.json").exists():
            time.sleep(0.05)
        time.sleep(0.3)  # the consequence comes a moment later
        raise RuntimeError("connection closed by peer")
    elif what == "stubborn":
        if rank == 1:
            os._exit(7)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(120)
    elif what == "wait":
        time.sleep(120)
    elif what in ("collective", "hang"):
        collective(rank, what)
    elif what in ("stuck", "frozen"):
        stuck(rank, out, what, config.train.timeout)
    elif what in ("behind", "absent"):
        set_up(config, out, rank, what)
    elif what == "saves":
        with StopSignals() as signals:
            (out / f"ready_{rank}").touch()
            while not signals.received:
                time.sleep(0.05)
        return STOPPED
    return None


def stuck(rank: int, out: Path, what: str, timeout: int) -> None:
    """Three steps, after which rank 1 takes part in no collective any more."""
    import torch
    import torch.distributed as dist

    # The collective outlives the watchdog, except where the rank cannot even watch.
    limit = timedelta(seconds=timeout if what == "frozen" else 120)
    dist.init_process_group("gloo", timeout=limit)
    pulse = Pulse(out / "logs", rank)
    Watchdog(pulse, timeout, timeout)
    for step in range(3):
        pulse.beat(step, "language model forward")
        dist.all_reduce(torch.ones(10))
    if rank == 1:
        wait_for_nobody(what)
    dist.all_reduce(torch.ones(10))


def set_up(config, out: Path, rank: int, what: str) -> None:
    """Two phases of set-up; rank 0 alone comes through the first, or rank 1 does not even begin."""
    if what == "absent" and rank == 1:
        wait_for_nobody("frozen")
    with worker.watched(config, out, rank) as setup:
        setup.phase("joining the process groups")
        setup.phase("opening the corpus")
        if what == "behind" and rank > 0:
            wait_for_nobody(what)
        setup.phase("building the model")
        time.sleep(120)


def wait_for_nobody(what: str) -> None:
    """Make no progress."""
    if what == "frozen":
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(120)


def collective(rank: int, what: str) -> None:
    """All-reduce for ever; rank 1 is killed by the test, or stops taking part."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(seconds=120 if what == "collective" else 3))
    Path(sys.argv[2], f"ready_{rank}").touch()
    while True:
        if rank == 1 and what == "hang":
            time.sleep(120)
        dist.all_reduce(torch.ones(10))


if __name__ == "__main__":
    worker.main(work=act)
