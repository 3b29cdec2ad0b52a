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
from collections.abc import Sequence
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

INNERMOST = 4
"""Lines of the stack of a rank that hung, in what is said of it; its file has them all."""

DUMP = signal.SIGUSR2
"""Signal on which a rank writes the stacks of all its threads."""

WAITING = (
    "torch/distributed/",
    "megatron/core/pipeline_parallel/p2p_communication",
    "mmi_megatron/train/setup",
)
"""Files whose functions wait for other ranks."""


@dataclass(frozen=True)
class Sign:
    """Where a rank was last.

    Attributes:
        step: steps it has made; None before the first has begun, in set-up.
        part: of the step, or phase of set-up, that it was in.
        time: when it wrote so, seconds since the epoch.
    """

    step: int | None
    part: str
    time: float

    @property
    def age(self) -> float:
        """Seconds since then."""
        return max(0.0, time.time() - self.time)

    def __str__(self) -> str:
        return f"set-up, {self.part}" if self.step is None else f"step {self.step}, {self.part}"


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
        self.sign = Sign(None, "starting", time.time())

    def beat(self, step: int | None = None, part: str | None = None) -> None:
        """Give a sign of life, in the same step and part if none is given."""
        last = self.sign
        self.sign = Sign(
            last.step if step is None else step, last.part if part is None else part, time.time()
        )
        made = "-" if self.sign.step is None else self.sign.step
        line = f"{self.sign.time:.3f} {made} {self.sign.part}\n".encode()[:SIZE]
        self._map[: len(line)] = line


def read(folder: Path, rank: int) -> Sign | None:
    """The last sign of life of a rank, None when it has given none."""
    try:
        line = _pulse_path(folder, rank).read_bytes().split(b"\n")[0].decode().strip()
        when, step, part = line.split(" ", 2)
        return Sign(None if step == "-" else int(step), part, float(when))
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


def ranks_in_words(ranks: Sequence[int]) -> str:
    """``rank 1``; ``ranks 1 and 3``; ``ranks 1, 3 and 5``."""
    *first, last = map(str, ranks)
    return f"ranks {', '.join(first)} and {last}" if first else f"rank {last}"


def waited(error: BaseException) -> bool:
    """Whether an error was raised where this rank waited for others, who may be its cause."""
    seen: BaseException | None = error
    while seen is not None:
        frames = traceback.extract_tb(seen.__traceback__)
        if frames and waits_for_others(frames[-1].filename):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


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
        setup_limit: the same for a phase of set-up.
    """

    def __init__(self, pulse: Pulse, limit: float, setup_limit: float):
        self.pulse, self.limit, self.setup_limit = pulse, limit, setup_limit
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
        while not self._over.wait(min(1.0, self.limit / 10, self.setup_limit / 10)):
            sign = self.pulse.sign
            if sign.age > (self.setup_limit if sign.step is None else self.limit):
                self._end(sign)

    def _end(self, sign: Sign) -> None:
        """Write down, and say for those whose launcher does not read it, where this rank is; end it."""
        frame = sys._current_frames().get(self._main or 0)
        stack = traceback.extract_stack(frame) if frame is not None else []
        waits = _is_waiting(frame)
        faulthandler.dump_traceback(self._stacks, all_threads=True)
        self._stacks.flush()
        what = "waited for other ranks" if waits else "hung"
        error = f"{what} at {sign}: no progress for {sign.age:.0f} s"
        frames = [f"{entry.filename}:{entry.lineno} in {entry.name}" for entry in stack]
        faults.record_hang(self.pulse.folder, self.pulse.rank, error, frames, waits)
        if waits:
            time.sleep(COURTESY)
        lines = [
            f"rank {self.pulse.rank} {error}",
            *(f"  its stack: {frame}" for frame in frames[-INNERMOST:]),
        ]
        print("\n".join(lines), file=sys.stderr, flush=True)
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
