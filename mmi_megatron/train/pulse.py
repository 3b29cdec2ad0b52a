"""Signs of life: which step and part each rank is in, written where anyone on its file system can look,
and what is said about a rank that stops giving them."""

from __future__ import annotations

import faulthandler
import mmap
import os
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

from mmi_megatron.train import faults

SIZE = 256
"""Bytes of a sign of life: one line, padded."""

HUNG = 70
"""Exit code of a rank that ended itself because it made no progress (EX_SOFTWARE)."""

COURTESY = 3.0
"""Seconds that a rank which waits for others leaves to the one that does not."""

DUMP = signal.SIGUSR2
"""Signal on which a rank writes the stacks of all its threads."""

WAITING = ("torch/distributed/", "megatron/core/pipeline_parallel/p2p_communication")
"""Files whose functions wait for other ranks."""


@dataclass(frozen=True)
class Sign:
    """Where a rank was last.

    Attributes:
        step: steps it has made.
        part: of the step it was in.
        time: when it wrote so, seconds since the epoch.
    """

    step: int
    part: str
    time: float

    def __str__(self) -> str:
        return f"step {self.step}, {self.part}"


class Pulse:
    """This rank's signs of life, one memory-mapped line: writing one costs a few microseconds.

    Args:
        folder: of the run's logs.
        rank: of this process.
    """

    def __init__(self, folder: Path, rank: int):
        folder.mkdir(parents=True, exist_ok=True)
        path = _pulse_path(folder, rank)
        path.write_bytes(b" " * SIZE)
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), SIZE)
        self.folder, self.rank = folder, rank
        self.sign = Sign(0, "set-up", time.time())

    def beat(self, step: int | None = None, part: str | None = None) -> None:
        """Give a sign of life, in the same step and part if none is given."""
        last = self.sign
        self.sign = Sign(
            last.step if step is None else step, last.part if part is None else part, time.time()
        )
        line = f"{self.sign.time:.3f} {self.sign.step} {self.sign.part}\n".encode()[:SIZE]
        self._map[: len(line)] = line


def read(folder: Path, rank: int) -> Sign | None:
    """The last sign of life of a rank, None when it has given none."""
    try:
        line = _pulse_path(folder, rank).read_bytes().split(b"\n")[0].decode().strip()
        when, step, part = line.split(" ", 2)
        return Sign(int(step), part, float(when))
    except (FileNotFoundError, ValueError):  # none yet, or half of one
        return None


def clear(folder: Path, rank: int) -> None:
    """Remove what an earlier run of this rank left."""
    _pulse_path(folder, rank).unlink(missing_ok=True)
    stacks_path(folder, rank).unlink(missing_ok=True)


def _pulse_path(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank}.pulse"


def stacks_path(folder: Path, rank: int) -> Path:
    """Where a rank writes the stacks of its threads."""
    return folder / f"rank_{rank}.stacks"


def waits_for_others(filename: str) -> bool:
    """Whether code of this file waits for other ranks."""
    return any(part in filename for part in WAITING)


class Watchdog:
    """Ends this rank when it gives no sign of life for too long, with its step, part and stack.

    A thread of the process looks, so that it works wherever the rank was started. Should that thread be
    kept from running too, the launcher sees the old sign of life and asks for the stacks by signal.

    Args:
        pulse: of this rank.
        limit: seconds.
    """

    def __init__(self, pulse: Pulse, limit: float):
        self.pulse, self.limit = pulse, limit
        self._over = threading.Event()
        self._stacks: IO[str] = stacks_path(pulse.folder, pulse.rank).open("w")
        faulthandler.register(DUMP, self._stacks, all_threads=True, chain=False)
        self._main = threading.main_thread().ident
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop watching."""
        self._over.set()
        self._thread.join()
        faulthandler.unregister(DUMP)
        self._stacks.close()

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self.limit / 10)):
            still = time.time() - self.pulse.sign.time
            if still > self.limit:
                self._end(still)

    def _end(self, still: float) -> None:
        frame = sys._current_frames().get(self._main or 0)
        stack = traceback.extract_stack(frame) if frame is not None else []
        waits = _is_waiting(frame)
        faulthandler.dump_traceback(self._stacks, all_threads=True)
        self._stacks.flush()
        what = "waited for other ranks" if waits else "hung"
        faults.record_hang(
            self.pulse.folder,
            self.pulse.rank,
            f"{what} at {self.pulse.sign}: no progress for {still:.0f} s",
            [f"{entry.filename}:{entry.lineno} in {entry.name}" for entry in stack],
            waits,
        )
        if waits:
            time.sleep(COURTESY)
        os._exit(HUNG)


def _is_waiting(frame: FrameType | None) -> bool:
    """Whether the innermost frames of a stack wait for other ranks."""
    for _ in range(4):
        if frame is None:
            return False
        if waits_for_others(frame.f_code.co_filename):
            return True
        frame = frame.f_back
    return False


def dumped(folder: Path, rank: int) -> list[str]:
    """Frames of the main thread as ``DUMP`` wrote them last, the outermost first: ``file:line in name``."""
    try:
        text = stacks_path(folder, rank).read_text(errors="replace")
    except FileNotFoundError:
        return []
    frames: list[str] = []
    for line in text.splitlines():
        if line.startswith("  File "):
            name, _, rest = line.removeprefix('  File "').partition('", line ')
            number, _, function = rest.partition(" in ")
            frames.append(f"{name}:{number} in {function}")
        else:
            frames.clear()  # another thread begins; the main thread is the last
    return frames[::-1]
