"""Deformable attention on the CPU: the fused operators against compositions of grid_sample.

``python benchmarks/kernels.py`` prints a table and writes benchmarks/results/kernels_cpu_<date>.md.
The shape is one row of the language model: 512 queries, 4 images of levels 32/16/8, 16 heads of 64
channels, 8 points. Baseline and ours take turns, so that a busy machine slows both.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mmi_kernels import mmfs_attention, ms_deform_attn, status

SHAPES = ((32, 32), (16, 16), (8, 8))
QUERIES, IMAGES, HEADS, CHANNELS, POINTS, ROWS, BASE = 512, 4, 16, 64, 8, 50, 16.0
RESULTS = Path(__file__).parent / "results"


def grid_sample_levels(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """The usual composition: one grid_sample a level over all images, then the weighted sum.

    value [N, S, H, D], locations [N, Q, H, L, P, 2], weights [N, Q, H, L, P] -> [N, Q, H, D].
    """
    batch, _, heads, channels = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    grid = 2 * locations - 1
    samples = []
    for level, (part, shape) in enumerate(
        zip(value.split([h * w for h, w in SHAPES], 1), SHAPES, strict=True)
    ):
        maps = part.flatten(2).transpose(1, 2).reshape(batch * heads, channels, *shape)
        at = grid[:, :, :, level].transpose(1, 2).flatten(0, 1)
        samples.append(F.grid_sample(maps, at, padding_mode="zeros", align_corners=False))
    mixing = weights.transpose(1, 2).reshape(batch * heads, 1, queries, len(SHAPES) * points)
    out = (torch.stack(samples, -2).flatten(-2) * mixing).sum(-1)
    return out.view(batch, heads, channels, queries).permute(0, 3, 1, 2)


def dense_mmfs(t: dict[str, Tensor], rel: Tensor) -> Tensor:
    """MMFS over all images with a mask; rel [Q, M] is 0 where an image is not visible."""
    shift = (t["offsets"][:, None] + t["table_offsets"][rel]) / BASE  # [Q, M, H, P, 2]
    locations = (t["reference_points"][:, None, None, None] + shift).transpose(0, 1)
    logits = (t["logits"][:, None] + t["table_logits"][rel]).masked_fill(
        (rel == 0)[..., None, None, None], -torch.inf
    )
    flat = logits.permute(0, 2, 1, 3, 4).flatten(2)
    weights = torch.softmax(F.pad(flat, (0, 1)), -1)[..., :-1]
    weights = weights.view(QUERIES, HEADS, IMAGES, len(SHAPES), POINTS).permute(2, 0, 1, 3, 4)
    locations = locations[:, :, :, None].expand(-1, -1, -1, len(SHAPES), -1, -1)
    return grid_sample_levels(t["value"], locations, weights).sum(0)


@dataclass
class Row:
    """One line of the table: a name, and the two functions with what gradients they give."""

    name: str
    baseline: Callable[[], Tensor]
    ours: Callable[[], Tensor]
    leaves: list[Tensor]
    tolerance: float = 1e-4


def forward_backward(function: Callable[[], Tensor], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of a fixed functional of the output."""
    out = function()
    return torch.autograd.grad(out, leaves, torch.ones_like(out))


def seconds(function: Callable[[], object]) -> tuple[float, float]:
    """Wall and process CPU seconds of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(baseline: Callable, ours: Callable, repeats: int) -> list[float]:
    """Median milliseconds: baseline wall and CPU, ours wall and CPU; the two take turns."""
    baseline(), ours(), ours()
    times = [(*seconds(baseline), *seconds(ours)) for _ in range(repeats)]
    return [statistics.median(column) * 1e3 for column in zip(*times, strict=True)]


def inputs(dtype: torch.dtype) -> dict[str, Tensor]:
    """Random projections of the language model's kind: samples scatter around one centre."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    positions = sum(h * w for h, w in SHAPES)
    t = {
        "value": normal(IMAGES, positions, HEADS, CHANNELS).to(dtype),
        "offsets": normal(QUERIES, HEADS, POINTS, 2) * 3,
        "logits": normal(QUERIES, HEADS, len(SHAPES), POINTS),
        "table_offsets": normal(ROWS, HEADS, POINTS, 2),
        "table_logits": normal(ROWS, HEADS, len(SHAPES), POINTS),
        "reference_points": torch.full((QUERIES, 2), 0.5),
    }
    return {name: tensor.requires_grad_(name != "reference_points") for name, tensor in t.items()}


def causal(share: float) -> Tensor:
    """Intervals [Q, 2]: images appear one after the other so that ``share`` of the pairs is visible."""
    seen = torch.linspace(0, 1, QUERIES)
    last = (
        (seen * IMAGES / (2 * (1 - share)) + 0.5).floor().clamp(0, IMAGES) if share < 1 else seen * 0 + IMAGES
    )
    return torch.stack([torch.zeros_like(last), last], -1).int()


def fused_row(name: str, visible: Tensor, dtype: torch.dtype) -> Row:
    t = inputs(dtype)
    rel = visible[:, 1:] - torch.arange(IMAGES)
    rel = rel.clamp_min(0).long()
    wide = {n: x.float().detach().requires_grad_() for n, x in t.items()} if dtype != torch.float32 else t
    leaves = [x for x in t.values() if x.requires_grad]

    def ours() -> Tensor:
        return mmfs_attention(
            t["value"], SHAPES, t["offsets"], t["logits"], t["table_offsets"], t["table_logits"],
            t["reference_points"], visible, base=BASE,
        )  # fmt: skip

    baseline = (
        (lambda: dense_mmfs(t, rel))
        if wide is t
        else (lambda: dense_mmfs({**t, "value": t["value"].float()}, rel))
    )
    return Row(name, baseline, ours, leaves, 1e-4 if dtype == torch.float32 else 2e-2)


def general_row() -> Row:
    """Sampling alone: locations and weights are given."""
    generator = torch.Generator().manual_seed(0)
    axes = (IMAGES, QUERIES, HEADS, len(SHAPES), POINTS)
    locations = (torch.randn(*axes, 2, generator=generator) * 0.2 + 0.5).requires_grad_()
    weights = torch.rand(*axes, generator=generator).requires_grad_()
    value = inputs(torch.float32)["value"]
    return Row(
        "ms_deform_attn fp32, locations and weights given",
        lambda: grid_sample_levels(value, locations, weights).flatten(2),
        lambda: ms_deform_attn(value, SHAPES, locations, weights),
        [value, locations, weights],
    )


def check(row: Row) -> None:
    """Both sides compute the same, gradients included."""
    with torch.no_grad():
        pairs = [(row.baseline(), row.ours())]
    pairs += zip(
        forward_backward(row.baseline, row.leaves), forward_backward(row.ours, row.leaves), strict=True
    )
    for want, got in pairs:
        error = float((want.float() - got.float()).abs().max() / want.float().abs().max())
        assert error < row.tolerance, f"{row.name}: results differ by {error:.1e}"


def table(rows: list[Row], repeats: int) -> list[str]:
    lines = [
        "| case | pass | grid_sample ms (wall, CPU) | ours ms (wall, CPU) | times faster (wall, CPU) |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        check(row)

        def forward(function: Callable) -> Callable:
            def run() -> None:
                with torch.no_grad():
                    function()

            return run

        def both(function: Callable, leaves: list[Tensor] = row.leaves) -> Callable:
            return lambda: forward_backward(function, leaves)

        for name, wrap in (("forward", forward), ("forward + backward", both)):
            wall, cpu, our_wall, our_cpu = measure(wrap(row.baseline), wrap(row.ours), repeats)
            lines.append(
                f"| {row.name} | {name} | {wall:.1f}, {cpu:.1f} | {our_wall:.1f}, {our_cpu:.1f} "
                f"| {wall / our_wall:.1f}, {cpu / our_cpu:.1f} |"
            )
            print(lines[-1], flush=True)
    return lines


def hardware() -> str:
    """Processor, and how many of it."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    model = names[0].split(":")[1].strip() if names else platform.processor()
    running = (
        f"{torch.get_num_threads()} threads, {status()['instruction_set']}, load {os.getloadavg()[0]:.1f}"
    )
    return f"{model}, {os.cpu_count()} cores, {running}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if status()["implementation"] != "compiled":
        raise SystemExit(f"no compiled kernels: {status()['reason']}")
    everything, some = causal(1.0), causal(0.62)
    share = float((some[:, 1] - some[:, 0]).float().mean() / IMAGES)
    rows = [
        fused_row("mmfs_attention fp32, all visible", everything, torch.float32),
        fused_row(f"mmfs_attention fp32, {share:.0%} visible", some, torch.float32),
        fused_row("mmfs_attention bf16 value, all visible (baseline in fp32)", everything, torch.bfloat16),
        general_row(),
    ]
    lines = table(rows, arguments.repeats)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    today = date.today().isoformat()
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"kernels_cpu_{today}.md"
    head = [
        "# Deformable attention on the CPU",
        "",
        f"{today}, commit {commit or 'unknown'}, torch {torch.__version__}, {hardware()}.",
        f"{QUERIES} queries, {IMAGES} images of levels 32/16/8, {HEADS} heads x {CHANNELS}, {POINTS} points; "
        f"medians of {arguments.repeats}, both sides in turn. Written by benchmarks/kernels.py.",
        "",
    ]
    path.write_text("\n".join(head + lines) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
