"""A rank for the tests of the launcher: ``FAKE`` in the environment says what it does."""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

from mmi_megatron.train import worker


def act(config, out: Path, resume: bool, stop_after: int | None) -> None:
    """Do what the test wants of this rank."""
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
