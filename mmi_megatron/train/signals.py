"""Stopping a run from outside: SIGTERM and SIGUSR1 let it save and end after the step it is in."""

from __future__ import annotations

import signal
from types import FrameType

import torch
import torch.distributed as dist

from mmi_megatron.platform import device

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What SLURM sends before a time limit or a preemption (``--signal=USR1@120``), and what people send."""

STOPPED = 75
"""Exit code of a run that saved and stopped on a signal: to be resumed (EX_TEMPFAIL)."""


class Stopped(Exception):
    """The run has saved its state and stops, because it was asked to."""


class StopSignals:
    """Remembers a signal until all ranks have heard of it. Use as a context manager, in the main thread."""

    def __init__(self) -> None:
        self.received = 0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _remember(self, number: int, _: FrameType | None) -> None:
        self.received = number

    def agreed(self) -> str | None:
        """Name of the signal that any rank has received, the same on all ranks (collective)."""
        number = torch.tensor([self.received], device=device())
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
        return signal.Signals(int(number)).name if int(number) else None
