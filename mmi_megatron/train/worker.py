"""One rank of a training job, started by ``train.launch``:
``python -m mmi_megatron.train.worker SETTINGS OUT [--resume] [--stop-after N]``."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mmi_megatron.config import Config
from mmi_megatron.settings import load_config
from mmi_megatron.train import faults, pulse
from mmi_megatron.train.setup import SetUp

PARENT = "MMI_PARENT"
"""Environment variable with the process id of the launcher."""


class _ToTerminal(logging.Handler):
    """Warnings on rank 0's terminal, through whatever stands for it (a progress bar, say)."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), flush=True)


def run(config: Config, out: Path, resume: bool, stop_after: int | None) -> int:
    """Train on this rank; torchrun's environment variables say which one it is.

    Returns:
        The exit code: 0, or 75 when a signal made it save and stop.
    """
    rank = int(os.environ.get("RANK", "0"))
    logging.basicConfig(level=logging.WARNING, format=f"%(asctime)s rank {rank} %(levelname)s %(message)s")
    if rank == 0:
        handler = _ToTerminal()
        handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        for name in ("mmi_megatron", "data_pipeline"):
            logging.getLogger(name).addHandler(handler)
    with watched(config, out, rank) as setup:
        from mmi_megatron.train.loop import train
        from mmi_megatron.train.signals import STOPPED, Stopped

        try:
            train(config, out, resume, stop_after, setup)
        except Stopped as stopped:
            if rank == 0:
                print(stopped, flush=True)
            return STOPPED
    return 0


@contextmanager
def watched(config: Config, out: Path, rank: int) -> Iterator[SetUp]:
    """Around all that this rank does, before it imports anything that takes long: it gives signs of life
    and ends when it gives none for too long."""
    signs = pulse.Pulse(out / "logs", rank)
    signs.beat(part="importing")
    watchdog = pulse.Watchdog(signs, config.train.timeout, config.train.setup_timeout)
    setup = SetUp(signs, config.train.setup_timeout)
    try:
        yield setup
    except BaseException as error:
        setup.give_up(error)
        raise
    finally:
        watchdog.close()


def main(arguments: Sequence[str] | None = None, work: Callable = run) -> None:
    """Entry of the process. An error is written down for the launcher before it ends the process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("settings", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--stop-after", type=int)
    given = parser.parse_args(arguments)
    if PARENT in os.environ:
        faults.end_with_parent(int(os.environ[PARENT]))
    try:
        code = work(load_config(given.settings), given.out, given.resume, given.stop_after)
    except BaseException as error:
        faults.record(given.out / "logs", int(os.environ["RANK"]), error, pulse.waited(error))
        raise
    raise SystemExit(code)


if __name__ == "__main__":
    main()
