"""Deformable attention: the fused operators against a composition of grid_sample and a classic kernel.

``python -m benchmarks.kernels`` measures on the GPU, or on the CPU where there is none, prints a table
and writes benchmarks/results/kernels_<device>_<date>.md. What to expect of a GPU, from its floors:
benchmarks/kernel_floors.py.

The shapes are those of every preset (kernel_shapes.json) and, on the CPU, one row of 512 queries with
4 images, which the first version was measured at. Baselines and ours take turns, so that a busy
machine slows all. On the CPU: process CPU time and wall. On a GPU: CUDA events, the L2 cache flushed
before each run; ours also by the first tier alone and by each half of the second wherever it can run,
from which the rule of kernels/csrc/cuda/plan.h is to be set.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import torch

from benchmarks.kernel_cases import Case, check, gradients
from benchmarks.kernel_shapes import Site, load
from mmi_kernels import build, library, status

RESULTS = Path(__file__).parent / "results"
FIRST = Site("language", ("one row",), 512, ((32, 32), (16, 16), (8, 8)), 16, 64, 8, 50, 16)
CPU_QUERIES, CPU_IMAGES = 256, 2  # most of a preset's row that the CPU measures
GPU_ROWS, GPU_IMAGES = 4, 6
VISIBLE = 0.58  # of a row's (token, image) pairs
TIERS = {"first": 1, "matrices": 2, "windows": 3}  # of mmi_kernels.library.set_device_tier
HEAD_START = 4_000_000  # clocks, about 2 ms: longer than Python takes to launch what is timed


@dataclass
class Run:
    """One line's worth: what is timed under which name; ``baselines`` may be missing."""

    case: Case
    name: str
    composition: Callable[[], object]
    ours: Callable[[], object]
    classic: Callable[[], object] | None
    moved: int


class CpuMeter:
    """Milliseconds of process CPU time and of wall."""

    columns = ("CPU", "wall")

    def time(self, function: Callable[[], object]) -> tuple[float, ...]:
        wall, cpu = time.perf_counter(), time.process_time()
        function()
        return (time.process_time() - cpu) * 1e3, (time.perf_counter() - wall) * 1e3

    def peak(self, function: Callable[[], object]) -> int | None:
        """Bytes that the process grew by, at most; None where Linux does not tell."""
        if not Path("/proc/self/clear_refs").exists():
            return None
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = _resident("VmRSS")
        function()
        return max(_resident("VmHWM") - before, 0)

    def copy_rate(self) -> float:
        """Bytes read and written a second by a copy that fits no cache, of CPU time."""
        source = torch.ones(32 << 20)
        to = torch.empty_like(source)
        times = [self.time(lambda: to.copy_(source))[0] for _ in range(7)][2:]
        return 2 * source.nbytes / (statistics.median(times) / 1e3) * torch.get_num_threads()

    def description(self) -> str:
        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.exists() else []
        names = [line.split(":")[1].strip() for line in lines if "model name" in line]
        load_average = os.getloadavg()[0]
        return (
            f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores, "
            f"{torch.get_num_threads()} threads, {status()['instruction_set']}, load {load_average:.1f}"
        )


class GpuMeter:
    """Milliseconds between CUDA events, with a cold L2."""

    columns = ("GPU",)

    def __init__(self) -> None:
        self.flush = torch.empty(1 << 28, dtype=torch.int8, device="cuda")  # several times any L2

    def time(self, function: Callable[[], object]) -> tuple[float, ...]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        torch.cuda._sleep(HEAD_START)  # so that the device never waits for the launches it is timed with
        begin.record()
        function()
        end.record()
        end.synchronize()
        return (begin.elapsed_time(end),)

    def peak(self, function: Callable[[], object]) -> int | None:
        """Bytes allocated on top of what was there."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def copy_rate(self) -> float:
        source = torch.ones(1 << 28, device="cuda")
        to = torch.empty_like(source)
        times = [self.time(lambda: to.copy_(source))[0] for _ in range(7)][2:]
        return 2 * source.nbytes / (statistics.median(times) / 1e3)

    def description(self) -> str:
        return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"


Meter = CpuMeter | GpuMeter


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def cases(device: str) -> Iterator[tuple[str, Case]]:
    """(title, case), those of the issue's own figures first."""
    if device == "cpu":
        for share in (1.0, 0.62):
            yield f"one row, fp32, {share:.0%} visible", Case(FIRST, 1, 4, share, torch.float32, device)
        yield "one row, bf16, all visible", Case(FIRST, 1, 4, 1.0, torch.bfloat16, device)
        general = replace(FIRST, place="adapter")
        yield "one row, fp32, given locations", Case(general, 1, 4, 1.0, torch.float32, device)
    for site in load():
        names = ", ".join(site.presets)
        limit = min(site.reach or site.rows, site.rows - 1) if site.rows else GPU_IMAGES
        share = VISIBLE if site.place == "language" else 1.0
        if device == "cpu":
            small = replace(site, queries=min(site.queries, CPU_QUERIES))
            images = min(CPU_IMAGES, limit)
            yield f"{names}: {small.title}", Case(small, 1, images, 1.0, torch.float32, device)
            continue
        rows, images = (1, GPU_ROWS * GPU_IMAGES) if site.place == "adapter" else (GPU_ROWS, GPU_IMAGES)
        for dtype in (torch.bfloat16, torch.float32):
            title = f"{names}: {site.title}, {str(dtype)[6:]}"
            yield title, Case(site, rows, min(images, limit) if site.rows else images, share, dtype, device)


def passes(case: Case, title: str) -> Iterator[Run]:
    """What is timed: forward, then forward + backward (CPU) or the backward alone (GPU)."""
    grad, on_gpu = case.tensors["grad"], case.device != "cpu"
    classic = case.classic() if on_gpu else None

    def without_graph(function: Callable[[], object]) -> Callable[[], object]:
        def call() -> None:
            with torch.no_grad():
                function()

        return call

    yield Run(
        case, f"{title} | forward", without_graph(case.composition), without_graph(case.ours),
        classic.forward if classic else None, case.moved_bytes(False),
    )  # fmt: skip
    if classic is None:
        yield Run(
            case, f"{title} | forward + backward",
            lambda: gradients(case.composition, case.leaves, grad),
            lambda: gradients(case.ours, case.leaves, grad),
            None, case.moved_bytes(False) + case.moved_bytes(True),
        )  # fmt: skip
        return

    def backward_of(function: Callable[[], torch.Tensor]) -> Callable[[], object]:
        out = function()
        return lambda: torch.autograd.grad(out, case.leaves, grad, retain_graph=True)

    yield Run(
        case, f"{title} | backward", backward_of(case.composition), backward_of(case.ours),
        classic.backward, case.moved_bytes(True),
    )  # fmt: skip


def line(run: Run, meter: Meter, repeats: int, rate: float) -> str:
    """One row of the table."""
    functions = {"composition": run.composition, "classic": run.classic, "ours": run.ours}
    present = {name: function for name, function in functions.items() if function is not None}
    if isinstance(meter, GpuMeter):
        present |= {name: in_tier(tier, run.ours) for name, tier in TIERS.items()}
    for function in present.values():
        function()
    times: dict[str, list[tuple[float, ...]]] = {name: [] for name in present}
    for _ in range(repeats):
        for name, function in present.items():
            times[name].append(meter.time(function))
    middle = {name: [statistics.median(c) for c in zip(*rows, strict=True)] for name, rows in times.items()}

    def milliseconds(name: str) -> str:
        return ", ".join(f"{value:.3g}" for value in middle[name]) if name in middle else "-"

    def faster(name: str) -> str:
        if name not in middle:
            return "-"
        return ", ".join(f"{a / b:.1f}" for a, b in zip(middle[name], middle["ours"], strict=True))

    share = run.moved / (middle["ours"][0] / 1e3) / rate
    peaks = [meter.peak(run.composition), meter.peak(run.ours)]
    peak = ", ".join("-" if value is None else f"{value / 1e6:.0f}" for value in peaks)
    cells = [milliseconds("composition")]
    if isinstance(meter, GpuMeter):
        cells.append(milliseconds("classic"))
    cells += [milliseconds("ours"), faster("composition")]
    if isinstance(meter, GpuMeter):
        tiers = ", ".join(milliseconds(name) for name in TIERS)
        cells += [faster("classic"), tiers, f"{l1_floor(run.case) * 1e3:.3g}"]
    return f"| {run.name} | {' | '.join(cells)} | {run.moved / 1e6:.0f} | {share:.1%} | {peak} |"


def in_tier(tier: int, function: Callable[[], object]) -> Callable[[], object]:
    """``function`` with the GPU's kernels of one tier."""

    def call() -> None:
        library.set_device_tier(tier)
        try:
            function()
        finally:
            library.set_device_tier(0)

    return call


def l1_floor(case: Case) -> float:
    """Seconds that the L1 caches need at least to hand out what the samples read: 128 bytes a clock and
    multiprocessor."""
    device = torch.cuda.get_device_properties(case.device)
    clock = getattr(device, "clock_rate", 1_755_000) * 1e3  # H200's boost where torch does not say
    return case.gathered_bytes() / (device.multi_processor_count * 128 * clock)


def header(meter: Meter) -> list[str]:
    unit = ", ".join(meter.columns)
    cells = ["case", "pass", f"grid_sample ms ({unit})"]
    if isinstance(meter, GpuMeter):
        cells.append("classic kernel ms")
    cells += [f"ours ms ({unit})", f"times faster than grid_sample ({unit})"]
    if isinstance(meter, GpuMeter):
        cells += [
            "than classic",
            f"ours ms by tier ({', '.join(TIERS)})",
            "L1 floor of a forward's reads, ms",
        ]
    cells += ["MB that must move", "share of copy bandwidth", "peak MB (grid_sample, ours)"]
    return [f"| {' | '.join(cells)} |", "|" + "---|" * len(cells)]


def measure(device: str, repeats: int, only: str) -> Iterator[list[str]]:
    """The table so far, after each of its lines; cases whose title does not contain ``only`` are left out."""
    meter: Meter = CpuMeter() if device == "cpu" else GpuMeter()
    rate = meter.copy_rate()
    note = (
        f"{meter.description()}; a copy moves {rate / 1e9:.1f} GB/s (bytes read and written). Medians of "
        f"{repeats}, the ways in turn."
    )
    if device == "cpu":
        note += (
            f" Presets: one row of up to {CPU_QUERIES} queries, {CPU_IMAGES} images (fewer where fewer are "
            "within reach), fp32; shares are of CPU time."
        )
    else:
        note += (
            f" {GPU_ROWS} rows of {GPU_IMAGES} images (fewer where fewer are within reach), {VISIBLE:.0%} of "
            "a row's pairs visible. The classic kernel is given locations and weights ready-made; ours and "
            "the composition make them."
        )
    lines = [note, "", *header(meter)]
    for title, case in cases(device):
        if only not in title:
            continue
        try:
            check(case, with_classic=device != "cpu")
            for run in passes(case, title):
                lines.append(line(run, meter, repeats, rate))
                yield lines
        except torch.OutOfMemoryError as error:
            lines.append(f"| {title} | out of memory: {str(error).splitlines()[0]} |")
            yield lines
        if device != "cpu":
            torch.cuda.empty_cache()


def commit() -> str:
    if shutil.which("git") is None:
        return "unknown"
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", default="", help="measure cases whose title contains this")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the table")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.device != "cpu":
        build.build()
    if status()["implementation"] != "compiled":
        raise SystemExit(f"no compiled kernels: {status()['reason']}")
    today = date.today().isoformat()
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"kernels_{arguments.device}_{today}.md"
    title = f"# Deformable attention on the {arguments.device.replace('cuda', 'gpu').upper()}"
    about = (
        f"{today}, commit {commit()}, torch {torch.__version__}. Written by `python -m benchmarks.kernels`."
    )
    for lines in measure(arguments.device, arguments.repeats, arguments.only):
        print(lines[-1], flush=True)
        path.write_text("\n".join([title, "", about, "", *lines]) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
