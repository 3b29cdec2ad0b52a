"""Two ranks that share a long row: tensor, sequence and context parallelism beside each other.

    python -m benchmarks.long_rows [--steps 2] [--turns 3] [--out FOLDER]

The model is ``paper / 10`` of benchmarks/parallel.py with one row of 2,048 tokens a step. Ranks are processes
of this machine over gloo, one thread each, in fp32. The layouts take turns, a few steps each, in the same
processes, so that a slow minute of the machine slows all of them.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path

import torch

from benchmarks.parallel import (
    CONTEXT,
    RESULTS,
    SEQUENCE,
    SINGLE,
    TENSOR,
    Training,
    Way,
    head,
    machine,
    processes,
    row,
    settings,
    world,
)
from data_pipeline.cli import fit_tokenizer
from data_pipeline.storybook import write_stories

MODEL = "paper / 10"
LONG = ["train.rows=1", "data.context_length=2048"]
LAYOUTS = [
    Way("TP2", [*TENSOR, *LONG]),
    Way("TP2 + SP", [*SEQUENCE, *LONG]),
    Way("CP2", [*SINGLE, CONTEXT, *LONG]),
]
"""The first is what the others are compared with."""
ABOUT = (
    "paper / 10 with one row of 2,048 tokens a step; median seconds of a step, and its ratio to the first "
    "line's. Kept: what autograd saves for the backward pass on the rank that saves most, parameters left "
    "out. Sent: all groups together, as counted by mmi_megatron/parallel/traffic.py. Images: read in the "
    "step that was counted."
)


def paced(folder: str, way: Way, steps: int) -> tuple[list[float], int, int, int]:
    """On a rank: seconds of every step but the first; of one more step, bytes kept for the backward pass,
    bytes sent, and images read."""
    import torch.distributed as dist

    from mmi_megatron.parallel import traffic

    config, seconds = settings(folder, MODEL, way), []
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with world(config) as layout:
        training = Training(config, layout)
        for _ in range(steps + 1):
            training.prepare()
            dist.barrier()
            began = time.perf_counter()
            training.step()
            dist.barrier()
            seconds.append(time.perf_counter() - began)
        training.prepare()
        images = sum(len(item.images) for item in training.inputs)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), traffic.Sent() as counted:
            training.step()
        for chunk in training.wrapped:
            for tensor in (*chunk.module.parameters(), *chunk.module.buffers()):
                kept.pop(tensor.untyped_storage().data_ptr(), None)
        return seconds[1:], sum(kept.values()), round(sum(counted.bytes.values())), images


def table(folder: str, steps: int, turns: int) -> list[str]:
    """The lines of the table."""
    found: list[list[list]] = [[] for _ in LAYOUTS]
    with processes() as on:
        for _ in range(turns):
            for way, results in zip(LAYOUTS, found, strict=True):
                results.append(on(2, paced, folder, way, steps))
    columns = ("s a step", "ratio", "least to most", "kept, MB a rank", "ratio", "sent, MB a rank", "images")
    lines = [head("layout", *columns)]
    first = None
    for way, results in zip(LAYOUTS, found, strict=True):
        times = [second for ranks in results for second in ranks[0][0]]
        kept, sent = (max(rank[place] for rank in results[0]) for place in (1, 2))
        middle = statistics.median(times)
        first = first or (middle, kept)
        lines.append(
            row(
                way.name,
                f"{middle:.3g}",
                f"**{middle / first[0]:.3f}**",
                f"{min(times):.3g} to {max(times):.3g}",
                f"{kept / 1e6:.0f}",
                f"**{kept / first[1]:.3f}**",
                f"{sent / 1e6:.0f}",
                results[0][0][3],
            )
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2, help="steps that are timed of each layout in a turn")
    parser.add_argument("--turns", type=int, default=3, help="turns of each layout")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the table")
    arguments = parser.parse_args()
    about = machine()
    with tempfile.TemporaryDirectory() as folder:
        write_stories(Path(folder) / "shards", 200, seed=3, size=64)
        fit_tokenizer([Path(folder) / "shards"], Path(folder) / "tokenizer.json", 384)
        lines = table(folder, arguments.steps, arguments.turns)
    title = (
        "# Two ranks that share a long row\n\nWritten by `python -m benchmarks.long_rows`, which says how.\n"
    )
    text = "\n".join([title, about, ABOUT, "", *lines]) + "\n"
    print(text)
    (arguments.out / f"long_rows_{date.today().isoformat()}.md").write_text(text)


if __name__ == "__main__":
    main()
