"""What dividing the model costs on this machine: times of steps as ratios, bytes sent, memory.

    python -m benchmarks.parallel [--steps 8] [--only "Bytes" ...] [--out FOLDER]

Ranks are processes of this machine over gloo, one thread each, in fp32. Two ways of doing the same are
built side by side in the same processes and take turns, step by step, on the same stories, so that a slow
minute of the machine slows both; given is the median of their ratios, and the quarter below and above.

Two models: ``quickstart``, the preset, everything trained; and ``paper / 10``, the paper's proportions at a
tenth of the language model's width: MMFS in one layer of four, heads and values narrower in proportion,
images of 112 pixels with 64 tokens, language model and ViT frozen.

Sections measured anew replace those of the same title in the day's file.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import socket
import statistics
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from data_pipeline.cli import fit_tokenizer
from data_pipeline.storybook import write_stories
from data_pipeline.stream import Stream
from data_pipeline.tokens import load_tokenizer
from mmi_megatron.config import Config
from mmi_megatron.params import build_on_meta
from mmi_megatron.settings import load_config
from tests.ranks import Ranks

RESULTS = Path(__file__).parent / "results"
PAPER = [
    "model.language={width: 512, layers: 8, heads: 8, kv_heads: 8, ffn: 1376, vocabulary_multiple: 64}",
    "model.language.mmfs={heads: 4, value_width: 128}",
    "model.vision={image_size: 112, width: 128, layers: 6, heads: 4, ffn: 512}",
    "model.vision.adapter={heads: 4, stem: 16, interactions: 3}",
    "model.vision.resampler={width: 96, layers: 4, heads: 4, ffn: 384}",
    "model.decoder={image_size: 32, vae: null}",
    "model.decoder.unet={channels: [32, 64, 128, 128], norm_groups: 8, head_width: 16}",
    "model.decoder.resampler={width: 128, heads: 4, ffn: 384}",
    "model.decoder.mmfs={heads: 4, points: 4, value_width: 64}",
    "data.context_length=256",
    "train.recompute.language=none",
]
"""The paper's model, smaller; what is not named stays as it is at full size."""

MODELS = {"quickstart": ("quickstart", []), "paper / 10": ("paper-13b", PAPER)}
ROWS = {"quickstart": (4, 1), "paper / 10": (2, 1)}
"""Rows of a step and of a micro-batch."""
OFF = ["model.language.mmfs.kind=none", "model.decoder.mmfs.kind=none"]
FULL = ["model.vision.frozen=false", "model.language.frozen=false", "model.language.train_image_tokens=false"]
BYTES_ACKED = 120
"""Where Linux's ``struct tcp_info`` holds the bytes that the other end has acknowledged (include/uapi)."""


@dataclass
class Way:
    """A way of training: settings on top of a model's."""

    name: str
    overrides: list[str]


@dataclass
class Comparison:
    """Two ways at one layout, timed in turns: the layout's settings, and what each adds."""

    what: str
    ranks: int
    layout: list[str]
    one: Way
    other: Way

    @property
    def ways(self) -> list[Way]:
        """Both, with all their settings."""
        return [Way(way.name, [*self.layout, *way.overrides]) for way in (self.one, self.other)]


SINGLE, TENSOR = ["parallel.tensor=1"], ["parallel.tensor=2"]
SEQUENCE, PIPELINE = [*TENSOR, "parallel.sequence=true"], [*SINGLE, "parallel.pipeline=2"]
CONTEXT = "parallel.context=2"
WHOLE, BY_QUERIES, AHEAD = (
    "parallel.shard_images=false",
    "parallel.mmfs=queries",
    "parallel.vision_ahead=true",
)
COMPARISONS = [
    Comparison("MMFS", 1, SINGLE, Way("on", []), Way("off", OFF)),
    Comparison("images over TP2", 2, TENSOR, Way("divided", []), Way("not divided", [WHOLE])),
    Comparison("MMFS at TP2 + SP", 2, SEQUENCE, Way("queries in place", [BY_QUERIES]), Way("by heads", [])),
    Comparison("visual tokenizer at PP2", 2, PIPELINE, Way("one ahead", [AHEAD]), Way("in turn", [])),
]
PAPER_SAYS = {"MMFS": "1.06, FLOPs 1.02"}
"""Ratios of the paper (figure 6)."""

COUNTED = [
    ("paper / 10", 2, Way("TP2", TENSOR)),
    ("paper / 10", 2, Way("TP2, images not divided", [*TENSOR, WHOLE])),
    ("paper / 10", 2, Way("TP2 + SP", SEQUENCE)),
    ("paper / 10", 2, Way("TP2 + SP, queries in place", [*SEQUENCE, BY_QUERIES])),
    ("paper / 10", 2, Way("PP2", PIPELINE)),
    ("paper / 10", 2, Way("DP2, distributed optimizer", SINGLE)),
    ("paper / 10", 4, Way("TP2 x PP2 + SP", [*SEQUENCE, "parallel.pipeline=2"])),
    ("paper / 10", 2, Way("CP2", [*SINGLE, CONTEXT])),
    ("paper / 10", 4, Way("TP2 x CP2 + SP", [*SEQUENCE, CONTEXT])),
    ("paper / 10", 4, Way("CP2 x PP2", [*PIPELINE, CONTEXT])),
    ("quickstart", 2, Way("TP2", TENSOR)),
]
"""Whose bytes are counted: model, ranks and way."""


# On the ranks


def settings(folder: str, model: str, way: Way) -> Config:
    """A configuration on the stories in a folder."""
    preset, overrides = MODELS[model]
    tokenizer = f"{folder}/tokenizer.json"
    given = [
        f"data.sources=[{{name: stories, path: {folder}/shards}}]",
        f"data.tokenizer={tokenizer}",
        "data.executor=inline",
        f"model.language.vocabulary={load_tokenizer(tokenizer).size}",
        f"train.rows={ROWS[model][0]}",
        f"train.micro_rows={ROWS[model][1]}",
        "train.precision=fp32",
        "train.threads=1",
        "train.timeout=120",
    ]
    return load_config(preset, [*overrides, *given, *way.overrides])


class Training:
    """A model in training on this rank; process groups must be up."""

    def __init__(self, config: Config, layout: Any):
        from mmi_megatron.parallel.model import build_stages
        from mmi_megatron.train import optimizer as optimization

        self.config, self.layout, self.steps = config, layout, 0
        self.special = load_tokenizer(config.data.tokenizer).special
        stages = build_stages(config, self.special)
        self.wrapped = optimization.wrap_stages(stages, config)
        self.optimizer, _ = optimization.build_optimizer(self.wrapped, config)
        self.stream = Stream(config.data, "train", global_rows=config.train.rows)
        self.inputs: list[Any] = []

    def prepare(self) -> None:
        """The micro-batches of the next step."""
        from mmi_megatron.model.mm_interleaved import prepare

        rows, layout = self.config.train.micro_rows, self.layout
        count = self.config.train.rows // layout.dp_size // rows
        batches = self.stream.next().batches(layout.dp_rank, layout.dp_size, rows, count)
        device = torch.device("cpu")
        self.inputs = [prepare(batch, self.special, self.config.model, device) for batch in batches]

    def step(self) -> None:
        """Forward, backward and update."""
        from mmi_megatron.parallel import schedule
        from mmi_megatron.train.optimizer import finish

        for chunk in self.wrapped:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        tokens = sum(len(item.tokens) for item in self.inputs)
        images = sum(len(item.drawn) for item in self.inputs)
        loss = self.config.model.loss
        schedule.train_step(self.wrapped, self.inputs, loss, (tokens, images), 0, self.steps)
        finish(self.wrapped, self.optimizer)
        self.steps += 1


@contextmanager
def world(config: Config) -> Iterator[Any]:
    """This rank's process groups."""
    from mmi_megatron.parallel import groups

    try:
        yield groups.initialize(config)
    finally:
        groups.destroy()
        gc.collect()


def timed(folder: str, model: str, ways: list[Way], steps: int) -> tuple[list[list[float]], list[float]]:
    """Seconds of every step of each way, taken in turns, and the FLOPs of each way's steps; the first step
    of each is left out."""
    import torch.distributed as dist

    from mmi_megatron.train.flops import count_step

    configs = [settings(folder, model, way) for way in ways]
    seconds: list[list[float]] = [[] for _ in ways]
    flops = [0.0 for _ in ways]
    with world(configs[0]) as layout:
        trainings = [Training(config, layout) for config in configs]
        for step in range(steps + 1):
            for index, training in enumerate(trainings):
                training.prepare()
                dist.barrier()
                began = time.perf_counter()
                training.step()
                dist.barrier()
                if step:
                    seconds[index].append(time.perf_counter() - began)
                    flops[index] += sum(count_step(training.config, training.inputs).values())
    return seconds, flops


def acknowledged() -> int:
    """Bytes that have arrived at the other ends of this process's TCP connections."""
    total = 0
    for descriptor in Path("/proc/self/fd").iterdir():
        if not os.path.lexists(descriptor) or not os.readlink(descriptor).startswith("socket:"):
            continue
        with socket.socket(fileno=os.dup(int(descriptor.name))) as connection, suppress(OSError):
            # An error: it is none of TCP.
            info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 232)
            total += struct.unpack_from("Q", info, BYTES_ACKED)[0]
    return total


def sent(folder: str, model: str, way: Way) -> tuple[dict[str, float], dict[str, float], int]:
    """Bytes that this rank sends in a step: counted, by the sizes, and by the kernel."""
    from mmi_megatron.parallel import traffic

    config = settings(folder, model, way)
    config.train.rows = 2 * config.train.micro_rows
    with world(config) as layout:
        training = Training(config, layout)
        training.prepare()
        training.step()  # the first step's exchanges do not overlap, nor does it gather parameters
        training.prepare()
        before, counted = acknowledged(), traffic.Sent()
        with counted:
            training.step()
        arrived = acknowledged() - before
        stages = [chunk.module for chunk in training.wrapped]
        return dict(counted.bytes), traffic.expected(config, stages, training.inputs, layout.dp_size), arrived


def held(folder: str, model: str, way: Way) -> dict[str, float]:
    """Bytes that a training holds on this rank, part by part, and what its process takes."""
    from mmi_megatron.train.optimizer import parts

    config = settings(folder, model, way)
    process = psutil.Process()
    with world(config) as layout:
        before = process.memory_info().rss
        training = Training(config, layout)
        for _ in range(2):
            training.prepare()
            training.step()
        after = process.memory_info().rss
        found = {"parameters": 0, "trained": 0, "gradients": 0, "optimizer": 0}
        for chunk in training.wrapped:
            for parameter in chunk.module.parameters():
                size = parameter.numel() * parameter.element_size()
                found["parameters"] += size
                found["trained"] += size * parameter.requires_grad
            buffers = chunk.buffers + chunk.expert_parallel_buffers
            found["gradients"] += sum(b.grad_data.numel() * b.grad_data.element_size() for b in buffers)
        for part in parts(training.optimizer):
            for state in part.optimizer.state.values():
                found["optimizer"] += sum(v.numel() * v.element_size() for v in state.values() if v.dim())
        return found | {"process": after - before, "most": _most() - before}


def _most() -> int:
    """The most memory this process has had."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")


# Tables


@contextmanager
def processes() -> Iterator[Callable[..., list[Any]]]:
    """Fresh processes, and a function that returns what so many of them as ranks make of a call."""
    with Ranks() as pool:
        yield partial(pool.run, timeout=900)


def row(*cells: object) -> str:
    """A line of a table."""
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def head(*cells: str) -> str:
    """The first two lines of a table."""
    return row(*cells) + "\n" + "|---" * len(cells) + "|"


def times(model: str, folder: str, steps: int) -> Iterator[str]:
    """Ratios of times."""
    yield head("", "ranks", "compared", "s a step", "ratio", "quarters", "model FLOPs", "paper")
    with processes() as on:
        for item in COMPARISONS:
            (one, other), flops = on(item.ranks, timed, folder, model, item.ways, steps)[0]
            ratios = [a / b for a, b in zip(one, other, strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            yield row(
                item.what,
                item.ranks,
                f"{item.one.name} / {item.other.name}",
                f"{statistics.median(one):.3g} / {statistics.median(other):.3g}",
                f"**{middle:.3f}**",
                f"{low:.3f} to {high:.3f}",
                f"{flops[0] / flops[1]:.3f}",
                PAPER_SAYS.get(item.what, ""),
            )


def traffics(folder: str, steps: int) -> Iterator[str]:
    """Bytes sent by group."""
    yield head("layout", "model", "rank", "group", "counted", "by the sizes", "ratio", "kernel / counted")
    for model, ranks, way in COUNTED:
        with processes() as on:
            yield from _sent_rows(model, way.name, on(ranks, sent, folder, model, way))


def _sent_rows(model: str, name: str, results: list[Any]) -> Iterator[str]:
    rank = max(range(len(results)), key=lambda rank: sum(results[rank][0].values()))
    counted, sizes, arrived = results[rank]
    for group in sorted(counted, key=lambda group: -counted[group]):
        size = sizes.get(group, 0)
        if counted[group]:
            ratio = f"{counted[group] / size:.4f}" if size else ""
            yield row(name, model, rank, group, f"{counted[group]:,.0f}", f"{size:,.0f}", ratio, "")
    whole, by_sizes = sum(counted.values()), sum(sizes.values())
    ratio = f"**{whole / by_sizes:.4f}**"
    yield row(name, model, rank, "all", f"{whole:,.0f}", f"{by_sizes:,.0f}", ratio, f"{arrived / whole:.3f}")


def memories(folder: str, steps: int) -> Iterator[str]:
    """Frozen and full training."""
    parts = ("parameters", "trained", "gradients", "optimizer")
    names = ("parameters, MB", "of these trained", "gradients", "Adam", "these together")
    yield head("model", "trained", *names, "process grew by", "at most")
    rows = []
    for name, overrides in (("all but LLM and ViT", []), ("everything", FULL)):
        with processes() as on:
            [held_by] = on(1, held, folder, "paper / 10", Way(name, [*SINGLE, *overrides]))
        whole = sum(held_by[part] for part in ("parameters", "gradients", "optimizer"))
        rows.append((whole, held_by["process"], held_by["most"]))
        values = [*(held_by[part] for part in parts), *rows[-1]]
        yield row("paper / 10", name, *(f"{value / 1e6:.1f}" for value in values))
    ratios = [f"**{frozen / full:.3f}**" for frozen, full in zip(*rows, strict=True)]
    yield row("", "the first / everything", "", "", "", "", *ratios)
    wholes = []
    for name, overrides in (("all but LLM and ViT", []), ("everything", FULL)):
        values = by_the_sizes(load_config("paper-13b", overrides))
        wholes.append(values[0] + sum(values[2:]))
        cells = (f"{value / 1e6:,.0f}" for value in (*values, wholes[-1]))
        yield row("paper-13b, bf16, by the sizes", name, *cells, "", "")
    yield row("", "the first / everything", "", "", "", "", f"**{wholes[0] / wholes[1]:.3f}**", "", "")


def by_the_sizes(config: Config) -> tuple[int, int, int, int]:
    """Bytes of all parameters, of the trained ones, of their gradients and of the optimizer at full size,
    over all ranks of one replica: parameters in bf16; gradients, main parameters and moments in fp32."""
    sizes = [(p.numel(), p.requires_grad) for p in build_on_meta(config.model).parameters()]
    parameters, trained = sum(n for n, _ in sizes), sum(n for n, trains in sizes if trains)
    return 2 * parameters, 2 * trained, 4 * trained, 12 * trained


SECTIONS: dict[str, tuple[Callable[[str, int], Iterator[str]], str]] = {
    **{
        f"Time of a step, {model}": (
            partial(times, model),
            "Steps of the two ways in turns: median seconds of each, median and quartiles of the "
            "ratio; and the ratio of the model's FLOPs (mmi_megatron/train/flops.py).",
        )
        for model in MODELS
    },
    "Bytes sent in a step": (
        traffics,
        "Of the rank that sends most, counted at torch's collectives and derived from the sizes (both in "
        "mmi_megatron/parallel/traffic.py), by what a ring sends. The last column is what the kernel has "
        "really sent over all its connections: more, because gloo's reduce-scatter sends what an "
        "all-reduce does.",
    ),
    "Memory of frozen and of full training": (
        memories,
        "In fp32 on one rank: what tensors hold, and by how much the process has grown after two steps, "
        "activations included. Below, the full size from its numbers of parameters.",
    ),
}
"""Title of each, what makes its lines, and what they are."""


def machine() -> str:
    """Where and when this runs."""
    command = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True, cwd=RESULTS).stdout.strip()
    names = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
    cpu = names[0].partition(":")[2].strip() if names else platform.machine()
    return (
        f"{date.today().isoformat()}, commit {commit}, {cpu}, {os.cpu_count()} cores, torch "
        f"{torch.__version__}, Python {platform.python_version()}, load average {os.getloadavg()[0]:.0f}."
    )


def write(path: Path, title: str, lines: list[str]) -> None:
    """Put a section into the file, in place of one of the same title."""
    first = "# What dividing the model costs\n\nWritten by `python -m benchmarks.parallel`, which says how.\n"
    before = path.read_text().split("\n## ")[1:] if path.exists() else []
    sections = {section.partition("\n")[0]: section.partition("\n")[2] for section in before}
    sections[title] = "\n" + "\n".join(lines) + "\n"
    ordered = [f"\n## {name}\n{sections[name]}" for name in SECTIONS if name in sections]
    path.write_text(first + "".join(ordered))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=8, help="steps that are timed of each way")
    parser.add_argument("--only", nargs="*", default=[""], help="sections whose title begins so")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the table")
    arguments = parser.parse_args()
    path = arguments.out / f"parallel_{date.today().isoformat()}.md"
    with tempfile.TemporaryDirectory() as folder:
        write_stories(Path(folder) / "shards", 200, seed=3, size=64)
        fit_tokenizer([Path(folder) / "shards"], Path(folder) / "tokenizer.json", 384)
        for title, (section, about) in SECTIONS.items():
            if not title.startswith(tuple(arguments.only)):
                continue
            lines = [machine(), about, ""]
            for line in section(folder, arguments.steps):
                print(line, flush=True)
                lines.append(line)
                write(path, title, lines)


if __name__ == "__main__":
    main()
