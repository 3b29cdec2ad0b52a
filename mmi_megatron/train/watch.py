"""What a run looks after itself with: signs of life, skipped steps, loss spikes, slow ranks, memory that
ran out, time and memory of the parts of a step, traces.

Reports are files ``out/reports/WHAT_step_N_rank_R.json``; one line of each goes to the log.
"""

from __future__ import annotations

import json
import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from data_pipeline.batch import PADDING, Batch
from mmi_megatron import platform
from mmi_megatron.config import Config
from mmi_megatron.model.mm_interleaved import Inputs
from mmi_megatron.parallel.groups import Layout
from mmi_megatron.train import anatomy
from mmi_megatron.train.anatomy import Anatomy
from mmi_megatron.train.flops import count_step
from mmi_megatron.train.metrics import Meter
from mmi_megatron.train.pulse import Pulse

log = logging.getLogger(__name__)

HISTORY = 64
"""Steps that a loss is compared with."""

LEAST_HISTORY = 16
"""Steps before a loss is called a spike at all."""

NAMED = 8
"""Parameters named in a line of the log; the report has them all."""


class NotFinite(RuntimeError):
    """Too many steps in a row without a finite loss and gradient."""


class OutOfMemory(RuntimeError):
    """Memory ran out; the message says where, and what would take less."""


class Watch:
    """Looks after a run on this rank.

    Args:
        config, layout: of the run.
        out: its folder.
        meter: gets what belongs in the log.
        pulse: of this rank; by default one that nobody watches.
    """

    def __init__(self, config: Config, layout: Layout, out: Path, meter: Meter, pulse: Pulse | None = None):
        self.config, self.settings, self.layout, self.meter = config, config.train.watch, layout, meter
        self.reports = out / "reports"
        self.traces = out / "traces"
        self.pulse = pulse or Pulse(out / "logs", layout.rank)
        self.anatomy = Anatomy(self.pulse)
        self.step = 0
        self.batches: Sequence[Batch] = ()
        self.flops: dict[str, float] = {}
        self.skipped = self.skipped_in_a_row = 0
        self._losses: dict[str, deque[float]] = {}
        self._profiler: Any = None
        self._traced = [0, 0]

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around the steps of a run: a trace under way is written however they end."""
        self.pulse.beat()
        try:
            yield
        finally:
            self._stop_trace()

    # Around every step

    @contextmanager
    def watching(self, step: int) -> Iterator[None]:
        """Around one step, of this number from 0 (collective).

        Raises:
            OutOfMemory: in place of torch's error, with a report.
        """
        self.step, self.batches = step, ()
        every = self.settings.measure_every
        measured = every > 0 and step % every == every - 1
        self._trace(step)
        try:
            with self.anatomy.step(step, measured):
                yield
        except (RuntimeError, MemoryError) as error:
            if not platform.ran_out_of_memory(error):
                raise
            raise self._out_of_memory(error) from error
        if self._profiler is not None:
            self._profiler.step()
            self._traced[1] = step
        if measured:
            self._measured()

    def reading(self, batches: Sequence[Batch], inputs: Sequence[Inputs]) -> Sequence[Batch]:
        """Remember what the step is made of and count its FLOPs over all replicas (collective).

        Returns:
            The batches.
        """
        self.batches = batches
        mine = count_step(self.config, inputs)
        total = torch.tensor(list(mine.values()), dtype=torch.float64, device=platform.device())
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
        self.flops = dict(zip(mine, total.tolist(), strict=True))
        return batches

    def rates(self, seconds: float) -> dict[str, float]:
        """Model FLOPs a second of all ranks, and their share of what the GPUs could do at most (model
        FLOPs utilisation), of a step that took so many seconds; the latter NaN without a known peak."""
        rate, peak = sum(self.flops.values()) / seconds, platform.peak_flops()
        share = math.nan if peak is None else rate / (peak[0] * self.layout.world)
        return {"flops_per_second": rate, "mfu": share}

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps."""
        return {"skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}

    def load_state(self, state: Mapping[str, int]) -> None:
        """Go on from what ``state`` returned."""
        self.skipped, self.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]

    def part(self, name: str) -> AbstractContextManager[None]:
        """Inside, the step is in this part."""
        return self.anatomy.inside(name)

    # Steps that were not made

    def made(self, skipped: bool, norm: float, model: Any, repeat: Callable[[], object]) -> None:
        """Whether the step was made, or skipped on all ranks, loss or gradient not being finite (collective).

        A skipped step is computed once more, without reducing its gradients, to find out whose they are.

        Args:
            norm: of the gradient.
            model: Megatron's wrapped model, or a list of its pieces.
            repeat: computes the micro-batches again, adding to the gradients.

        Raises:
            NotFinite: when this has happened too often in a row, with what was found last.
        """
        if not skipped:
            self.skipped_in_a_row = 0
            return
        self.skipped += 1
        self.skipped_in_a_row += 1
        names = _culprits(model, repeat)
        batches = [identity(batch) for batch in self.batches]
        self._report("skipped", {"norm": norm, "parameters": names, "batches": batches})
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, names)
        said = _who(everyone)
        line = f"step {self.step} skipped: the gradient's norm is {norm}; {said}"
        if self.layout.rank == 0:
            log.warning("%s; skipped so far: %d; reports: %s", line, self.skipped, self.reports)
        limit = self.settings.skip_limit
        if limit and self.skipped_in_a_row > limit:
            raise NotFinite(
                f"{line}; {self.skipped_in_a_row} steps in a row, train.watch.skip_limit={limit}; "
                f"look at {self.reports}, lower the learning rate or resume from an older checkpoint"
            )

    # Losses

    def losses(self, record: Mapping[str, float]) -> None:
        """Report a loss far above those of the steps before. Losses are the same on all ranks."""
        for name in ("next_token_loss", "next_image_loss"):
            value = record[name]
            before = self._losses.setdefault(name, deque(maxlen=HISTORY))
            if math.isfinite(value) and value != 0:
                self._spike(name, value, before)
                before.append(value)

    def _spike(self, name: str, value: float, before: Sequence[float]) -> None:
        if len(before) < LEAST_HISTORY or not self.settings.spike:
            return
        usual = anatomy.median(list(before))
        spread = anatomy.median([abs(past - usual) for past in before])
        if value <= usual + self.settings.spike * max(spread, 1e-3 * abs(usual)):
            return
        facts = {"loss": name, "value": value, "median": usual, "spread": spread}
        self._report("spike", facts | {"batches": [identity(batch) for batch in self.batches]})
        if self.layout.rank == 0:
            log.warning(
                "step %d: %s is %.4g, the median of the last %d steps is %.4g; its samples are in %s",
                self.step,
                name.replace("_", " "),
                value,
                len(before),
                usual,
                self.reports,
            )

    # Time and memory

    def _measured(self) -> None:
        """Bring the ranks' measurements of a step together and report them (collective)."""
        mine = (self.anatomy.seconds, self.anatomy.peak)
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        seconds, peaks = [times for times, _ in everyone], [peak for _, peak in everyone]
        rows = anatomy.table(seconds, peaks)
        values = {f"{part}/{name}": value for part, row in rows.items() for name, value in row.items()}
        values |= {f"flops/{name}": value for name, value in self.flops.items()}
        self.meter.event("anatomy", self.step + 1, values)
        if self.layout.rank == 0:
            self.reports.mkdir(parents=True, exist_ok=True)
            path = self.reports / f"anatomy_step_{self.step:07d}.txt"
            path.write_text(anatomy.as_text(rows, self.flops, platform.peak_flops(), self.layout.world))
        slow = anatomy.straggler(seconds, self.settings.straggler)
        if slow is not None and self.layout.rank == 0:
            log.warning("step %d: %s", self.step, slow)
            self._report("straggler", {"said": slow, "seconds": seconds})

    def _out_of_memory(self, error: BaseException) -> OutOfMemory:
        where = self.anatomy.failed_in or self.anatomy.part
        report = self._report(
            "out_of_memory",
            {
                "part": where,
                "error": str(error),
                "memory": platform.memory_report(),
                "peaks_of_measured_step": self.anatomy.peak,
                "batches": [identity(batch) for batch in self.batches],
            },
        )
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return OutOfMemory(
            f"out of memory at step {self.step} in {where} on rank {self.layout.rank}: {first} "
            f"(report: {report}); less is taken with train.micro_rows, train.recompute, parallel.tensor "
            "or parallel.pipeline"
        )

    def _trace(self, step: int) -> None:
        """Start or stop torch's profiler."""
        first, count = self.settings.trace_from, self.settings.trace_steps
        if self._profiler is None and first <= step < first + count:
            self._traced = [step, step]
            activities = [torch.profiler.ProfilerActivity.CPU]
            if platform.has_gpu():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profiler = torch.profiler.profile(activities=activities)
            self._profiler.start()
        elif self._profiler is not None and step >= first + count:
            self._stop_trace()

    def _stop_trace(self) -> None:
        if self._profiler is None:
            return
        self._profiler.stop()
        self.traces.mkdir(parents=True, exist_ok=True)
        first, last = self._traced
        path = self.traces / f"steps_{first}_to_{last}_rank_{self.layout.rank}.json.gz"
        self._profiler.export_chrome_trace(str(path))
        self._profiler = None
        if self.layout.rank == 0:
            log.warning("trace written to %s; open it at ui.perfetto.dev or chrome://tracing", path)

    def _report(self, what: str, facts: dict[str, Any]) -> Path:
        self.reports.mkdir(parents=True, exist_ok=True)
        path = self.reports / f"{what}_step_{self.step:07d}_rank_{self.layout.rank}.json"
        place = {"step": self.step, "rank": self.layout.rank, "data_rank": self.layout.dp_rank}
        path.write_text(json.dumps(place | facts, indent=1, default=str))
        return path


def identity(batch: Batch) -> dict[str, list[int]]:
    """What a micro-batch is made of: ids of its samples and of its images, sources of the samples."""
    real = batch.source != PADDING
    return {
        "samples": batch.sample_ids[real].tolist(),
        "sources": batch.source[real].tolist(),
        "images": batch.image_ids.tolist(),
    }


def part_of(name: str) -> str:
    """Part of the model that a parameter of this name belongs to."""
    for prefix, part in (("visual_tokenizer", anatomy.TOKENIZER), ("image_decoder", anatomy.DECODER)):
        if name.startswith(prefix):
            return part
    return anatomy.MMFS if "cross_attention" in name or "cross_attn" in name else anatomy.LANGUAGE


def _culprits(model: Any, repeat: Callable[[], object]) -> list[str]:
    """Names of parameters whose own gradient on this rank is not finite. Leaves no gradients."""
    chunks = model if isinstance(model, list) else [model]
    configs = {id(chunk.ddp_config): chunk.ddp_config for chunk in chunks}
    overlaps = {key: config.overlap_grad_reduce for key, config in configs.items()}
    for chunk in chunks:
        chunk.zero_grad_buffer()
    try:
        for config in configs.values():
            config.overlap_grad_reduce = False  # its hooks would reduce the gradients on the way
        repeat()
    finally:
        for key, config in configs.items():
            config.overlap_grad_reduce = overlaps[key]
    names = [
        name
        for chunk in chunks
        for name, parameter in chunk.module.named_parameters()
        if parameter.requires_grad and not bool(parameter.main_grad.isfinite().all())
    ]
    for chunk in chunks:
        chunk.zero_grad_buffer()
    return names


def _who(everyone: list[list[str]]) -> str:
    """Ranks with gradients that are not finite, and where, in words."""
    said = []
    for rank, names in enumerate(everyone):
        if names:
            parts = ", ".join(dict.fromkeys(part_of(name) for name in names))
            said.append(f"rank {rank}: {parts} ({len(names)} parameters: {', '.join(names[:NAMED])})")
    return "; ".join(said) or (
        "computed again it is finite on every rank: not the data's fault; suspect memory, the "
        "interconnect or a race"
    )
