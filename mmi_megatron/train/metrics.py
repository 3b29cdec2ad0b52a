"""What a run reports: ``metrics.jsonl``, TensorBoard, and a progress bar or plain lines.

``metrics.jsonl`` holds one JSON object a line, ``{"kind": "train", "step": 1, ...}`` for each step,
with the values of ``FIELDS``, and ``{"kind": "validation", "step": 200, "story/next_token_loss": ...}``
for each validation. Other kinds tell of what happens now and then: ``checkpoint`` (seconds that
training stood still for it, and that writing took beside it) and ``anatomy`` (what the parts of a step
took; ``train.anatomy``). A value that is not finite, or has nothing to be measured on, is null.
"""

from __future__ import annotations

import datetime
import difflib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mmi_megatron.config import Config

FIELDS = {
    "next_token_loss": "nats a kept token, over the global batch",
    "next_image_loss": "squared error of the noise (or velocity) a drawn image, over the global batch",
    "grad_norm": "global norm of the gradient before clipping",
    "lr": "learning rate of the main group",
    "skipped": "1 when the step was not made, its gradient not being finite",
    "tokens": "kept tokens, those that carry loss",
    "images": "drawn images",
    "images_out_of_reach": "on this rank, images too far back for the relative table",
    "quarantined": "samples left out so far because they could not be read",
    "data_checksum": "CRC-32 of all samples of the step, the same at any layout",
    "seconds": "wall time of the step",
    "data_wait": "share of it spent waiting for data",
    "tokens_per_second": "positions of all rows a second, padding included",
    "images_per_second": "drawn images a second",
    "flops_per_second": "model FLOPs a second of all ranks together (train.flops)",
    "mfu": "their share of what the ranks' GPUs do at most, dense in bf16 (platform.PEAK_FLOPS)",
}
"""Each value of a step and its meaning."""

LOG = "metrics.jsonl"


def read(out: Path) -> list[dict[str, Any]]:
    """The records of the run in folder ``out``; a line cut off by a kill at the very end is left out.

    Raises:
        ValueError: for any other line that is no JSON, naming it.
    """
    path, records = out / LOG, []
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        if number == len(lines) and not line.endswith("\n"):
            break
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    return records


class Meter:
    """Reports a run.

    Args:
        out: folder of the run.
        config: the run; ``train.log_every`` steps are averaged in a plain line.
        writes: whether this rank reports; on all others every call does nothing.
        console: for tests; a progress bar is shown where it is a terminal.
    """

    def __init__(self, out: Path, config: Config, writes: bool, console: Console | None = None):
        self.out, self.writes = out, writes
        self.total, self.every = config.train.steps, config.train.log_every
        self.console = console or Console(highlight=False, soft_wrap=True)
        self.pending: list[dict[str, float | None]] = []
        self.log: IO[str] | None = None
        self.board: Any = None
        self.bar: Progress | None = None

    def resume(self, step: int) -> None:
        """Say that the run goes on after ``step`` steps. What an earlier process reported beyond them
        is removed with the first new record."""
        if self.writes:
            self.console.print(f"continuing after step {step} of {self.total}")

    def step(self, step: int, record: Mapping[str, float]) -> None:
        """Report the step that has become the ``step``-th, counted from 1.

        Raises:
            ValueError: for a record whose keys are not exactly those of ``FIELDS``.
        """
        if not self.writes:
            return
        values = _checked(record)
        self._write("train", step, values)
        self.pending.append(values)
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=step, status=self._status(values))
        elif step % self.every == 0 or step == self.total:
            means = {name: _mean([past[name] for past in self.pending]) for name in values}
            left = (self.total - step) * (means["seconds"] or 0)
            eta = datetime.timedelta(seconds=round(left))
            self.console.print(f"step {step}/{self.total}  {self._status(means)}  left {eta}")
            self.pending.clear()

    def validation(self, step: int, results: Mapping[str, float]) -> None:
        """Report the held-out losses after ``step`` steps, ``{"source/next_token_loss": nats}``."""
        if not self.writes:
            return
        values = {name: _finite(value) for name, value in results.items()}
        self._write("validation", step, values)
        shown = "  ".join(f"{name.replace('_', ' ')} {_number(value)}" for name, value in values.items())
        self.console.print(f"step {step}/{self.total}  held out: {shown}")

    def event(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Put down something else that happened by the ``step``-th step."""
        if self.writes:
            self._write(kind, step, {name: _finite(value) for name, value in values.items()})

    def close(self) -> None:
        """Finish the bar and the files."""
        for part in (self.log, self.board):
            if part is not None:
                part.close()
        if self.bar is not None:
            self.bar.stop()
        self.log = self.board = self.bar = None

    def _write(self, kind: str, step: int, values: Mapping[str, float | None]) -> None:
        if self.log is None:
            self._open(step)
        assert self.log is not None
        self.log.write(json.dumps({"kind": kind, "step": step, **values}, allow_nan=False) + "\n")
        self.log.flush()
        for name, value in values.items():
            if value is not None:
                self.board.add_scalar(f"{kind}/{name}", value, step)

    def _open(self, step: int) -> None:
        """Open everything to go on at ``step``, without what is there from this step on."""
        from torch.utils.tensorboard import SummaryWriter

        self.out.mkdir(parents=True, exist_ok=True)
        path = self.out / LOG
        draft = path.with_suffix(".tmp")
        kept = [record for record in read(self.out) if record["step"] < step]
        draft.write_text("".join(json.dumps(record) + "\n" for record in kept))
        os.replace(draft, path)
        self.log = path.open("a")
        self.board = SummaryWriter(str(self.out / "tensorboard"), purge_step=step)
        if self.console.is_terminal:
            columns = (BarColumn(20), MofNCompleteColumn(), TextColumn("{task.fields[status]}"))
            self.bar = Progress(*columns, TimeRemainingColumn(), console=self.console)
            self.bar.add_task("train", total=self.total, completed=step - 1, status="")
            self.bar.start()

    def _status(self, values: Mapping[str, float | None]) -> str:
        """The values a person looks at, in one line."""
        rates = f"{values['tokens_per_second'] or 0:,.0f} tok/s  {values['images_per_second'] or 0:.1f} img/s"
        text = (
            f"text {_number(values['next_token_loss'])}  image {_number(values['next_image_loss'])}  "
            f"norm {_number(values['grad_norm'])}  lr {values['lr'] or 0:.1e}  {rates}  "
            f"wait {100 * (values['data_wait'] or 0):.0f}%"
        )
        if values["quarantined"]:
            text += f"  quarantined {values['quarantined']:.0f}"
        return text + ("  SKIPPED" if values["skipped"] else "")


def _checked(record: Mapping[str, float]) -> dict[str, float | None]:
    """The record in the order of ``FIELDS``, losses that were measured on nothing taken out."""
    for name in record.keys() - FIELDS.keys():
        near = difflib.get_close_matches(name, FIELDS, n=1, cutoff=0)[0]
        raise ValueError(f"{name!r} is no value of a step; did you mean {near!r}, or add it to FIELDS?")
    if missing := FIELDS.keys() - record.keys():
        raise ValueError(f"the record of a step lacks {sorted(missing)}")
    values = {name: _finite(record[name]) for name in FIELDS}
    for loss, count in (("next_token_loss", "tokens"), ("next_image_loss", "images")):
        if not values[count]:
            values[loss] = None
    return values


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
