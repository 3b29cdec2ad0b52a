"""What goes wrong on a rank, written down where the process that started it can tell the cause from
what follows: when one rank is lost, the others fail too, with errors about a closed connection."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

PR_SET_PDEATHSIG = 1
"""Of Linux' prctl: the signal that this process gets when its parent dies."""


@dataclass(frozen=True)
class Failure:
    """The rank that ended a run, how it ended, and what it said last.

    Attributes:
        exit_code: None for a rank that had not ended by itself.
        stack: where it was, for a rank that hung: ``file:line in function``, the outermost first.
        waits: whether it hung because it waited for another rank.
    """

    rank: int
    exit_code: int | None
    error: str
    stack: list[str] = field(default_factory=list)
    waits: bool = False

    @property
    def reason(self) -> str:
        """How the rank ended, in words."""
        if self.exit_code is None or self.stack:
            return "hung"
        if self.exit_code >= 0:
            return f"ended with exit code {self.exit_code}"
        number = -self.exit_code
        name = signal.Signals(number).name if number in set(signal.Signals) else "unknown"
        hint = "; often the machine was out of memory" if number == signal.SIGKILL else ""
        return f"was killed by signal {number} ({name}{hint})"

    @property
    def may_follow(self) -> bool:
        """Whether ranks that hang may be its cause: it hung or waited for others itself, or was ended as NCCL
        ends a rank whose collective takes too long."""
        return bool(self.stack) or self.waits or self.exit_code == -signal.SIGABRT


def log_path(folder: Path, rank: int) -> Path:
    """Log of a rank: everything it prints, but for rank 0 its errors and warnings alone."""
    return folder / f"rank_{rank}.log"


def _record_path(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank}.error.json"


def record(folder: Path, rank: int, error: BaseException, waits: bool = False) -> None:
    """Write down, on the rank itself, the error that ends it, and whether it came while the rank waited
    for others."""
    lines = str(error).strip().splitlines() or [""]
    text = f"{type(error).__name__}: {lines[0]}"
    _write(folder, rank, {"error": text} | ({"waits": True} if waits else {}))


def record_hang(folder: Path, rank: int, error: str, stack: list[str], waits: bool) -> None:
    """Write down, on the rank itself, that it made no progress.

    Args:
        folder: of logs and records.
        rank: of this process.
        error: what is known, in words.
        stack: ``file:line in function``, the outermost first.
        waits: whether it waited for other ranks.
    """
    _write(folder, rank, {"error": error, "stack": stack, "waits": waits})


def _write(folder: Path, rank: int, what: dict) -> None:
    path = _record_path(folder, rank)
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps({"time": time.time(), **what}))
    draft.rename(path)


def clear(folder: Path, rank: int) -> None:
    """Remove what an earlier run of this rank wrote down."""
    _record_path(folder, rank).unlink(missing_ok=True)


def failures(folder: Path, exit_codes: dict[int, int], logs_start: dict[int, int]) -> list[Failure]:
    """What ended ranks that failed at nearly the same time, the likely cause first.

    Args:
        folder: of logs and records.
        exit_codes: of the ranks that failed, negative for a signal.
        logs_start: bytes of each rank's log before this run.

    Returns:
        Ranks that hung, waiting for nobody; then those that could not even write down their error
        (killed, crashed); then those that could, the earliest first; last those that only waited.
    """
    found = []
    for rank, exit_code in exit_codes.items():
        try:
            written = json.loads(_record_path(folder, rank).read_text())
            failure = Failure(
                rank, exit_code, written["error"], written.get("stack", []), written.get("waits", False)
            )
            order = {None: 1, False: -1, True: 2}[written.get("waits")]
            found.append((order, written["time"], failure))
        except (FileNotFoundError, ValueError):  # killed before or while it wrote
            last = _last_line(log_path(folder, rank), logs_start.get(rank, 0))
            found.append((0, 0.0, Failure(rank, exit_code, last)))
    return [failure for *_, failure in sorted(found, key=lambda entry: (*entry[:2], entry[2].rank))]


def _last_line(path: Path, start: int) -> str:
    """Last line of a log after byte ``start`` that is no warning and not the inside of one."""
    with path.open("rb") as file:
        file.seek(max(start, path.stat().st_size - 4096))
        lines = file.read().decode(errors="replace").splitlines()
    told = [line for line in lines if line.strip() and not line.startswith(" ") and "Warning: " not in line]
    return told[-1].strip() if told else "nothing"


def end_with_parent(parent: int) -> None:
    """Let this process be killed when the one that started it dies, however it dies. Linux only;
    elsewhere ranks end when their next collective finds no partner."""
    if sys.platform != "linux":
        return
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it died before the call above
        sys.exit("the process that started this rank is gone")
