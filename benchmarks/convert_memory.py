"""Peak memory of converting a language model of 13 billion parameters, and of exporting it again.

``python benchmarks/convert_memory.py`` makes a LLaMA-13B in bf16 as transformers stores it, three shards
with an index, of sparse files that take no room on the disk; runs ``mmi convert`` and ``mmi export`` on it
in processes of their own; prints a table and writes benchmarks/results/convert_memory_<date>.md. The
checkpoint that is written is real: 26 GB. ``--layers 10`` makes a quarter of it.

Peak memory is what the kernel reports: of the process's own pages (RssAnon, sampled), and of all its
pages (ru_maxrss), mapped pieces of the files that are read included.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
WIDTH, HEADS, FFN, VOCABULARY, SHARDS = 5120, 40, 13824, 32000, 3
BOUND = "1.2 x largest shard + 2 GB"

CHILD = """
import resource, sys
from mmi_megatron.cli import main
sys.argv = ["mmi", *sys.argv[1:]]
try:
    main()
finally:
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, file=sys.stderr)
"""


@dataclass
class Run:
    """What a process took: bytes and seconds; ``cpu`` is its own time."""

    what: str
    all_pages: int
    own_pages: int
    seconds: float
    cpu: float


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Tensors of a LLaMA in the order of transformers' shards."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, WIDTH)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        found |= {f"{prefix}self_attn.{name}_proj.weight": (WIDTH, WIDTH) for name in "qkvo"}
        found |= {f"{prefix}mlp.{name}_proj.weight": (FFN, WIDTH) for name in ("gate", "up")}
        found[f"{prefix}mlp.down_proj.weight"] = (WIDTH, FFN)
        found |= {
            f"{prefix}{name}.weight": (WIDTH,) for name in ("input_layernorm", "post_attention_layernorm")
        }
    return found | {"model.norm.weight": (WIDTH,), "lm_head.weight": (VOCABULARY, WIDTH)}


def size(shape: tuple[int, ...]) -> int:
    """Bytes in bf16."""
    total = 2
    for length in shape:
        total *= length
    return total


def make(folder: Path, layers: int) -> tuple[int, int]:
    """Write the sparse model; bytes of all of it and of its largest shard."""
    every = shapes(layers)
    whole = sum(map(size, every.values()))
    parts: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in every.items():
        if sum(map(size, parts[-1].values())) > whole / SHARDS:
            parts.append({})
        parts[-1][name] = shape
    folder.mkdir()
    index = {}
    for number, part in enumerate(parts, 1):
        file = folder / f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        header, end = {}, 0
        for name, shape in part.items():
            start, end = end, end + size(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        with file.open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + end)
        index |= dict.fromkeys(part, file.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    config = {
        "model_type": "llama", "hidden_size": WIDTH, "intermediate_size": FFN, "num_hidden_layers": layers,
        "num_attention_heads": HEADS, "vocab_size": VOCABULARY, "rms_norm_eps": 1e-6, "hidden_act": "silu",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return whole, max(file.stat().st_size for file in folder.glob("*.safetensors"))


def own_pages(process: int) -> int:
    """Bytes of a process's memory that are no file's, 0 when it is gone."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def run(what: str, arguments: list[str]) -> Run:
    """Run the command to its end and watch its memory."""
    started, peak = time.perf_counter(), 0
    before = os.times()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", CHILD, *arguments],
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
        while process.poll() is None:
            peak = max(peak, own_pages(process.pid))
            time.sleep(0.02)
        errors.seek(0)
        said = errors.read()
    after = os.times()
    if process.returncode:
        raise SystemExit(f"{what} failed:\n{said}")
    pages = int(said.split("peak ")[1].split()[0])
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Run(what, pages, peak, time.perf_counter() - started, cpu)


def table(runs: list[Run], whole: int, largest: int, layers: int) -> str:
    """The results as Markdown."""
    bound = 1.2 * largest + 2e9
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=RESULTS, capture_output=True, text=True
    ).stdout.strip()
    lines = [
        "# Peak memory of converting a 13B language model",
        "",
        f"{date.today()}, commit {commit}, {platform.machine()}, {os.cpu_count()} cores, "
        f"load {os.getloadavg()[0]:.1f}. LLaMA of {layers} layers of 13B's width in bf16: "
        f"{whole / 1e9:.1f} GB in {SHARDS} sparse shards, the largest {largest / 1e9:.1f} GB. "
        f"Bound: {BOUND} = {bound / 1e9:.1f} GB. Written by benchmarks/convert_memory.py.",
        "",
        "| command | own pages GB | with mapped files GB | below the bound | seconds (CPU) |",
        "|---|---|---|---|---|",
    ]
    for entry in runs:
        fits = "yes" if entry.all_pages < bound else "NO"
        lines.append(
            f"| {entry.what} | {entry.own_pages / 1e9:.2f} | {entry.all_pages / 1e9:.2f} | {fits} | "
            f"{entry.seconds:.0f} ({entry.cpu:.0f}) |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Make the model, convert it, export it, write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--layout", default="tp=8,pp=2")
    parser.add_argument("--no-export", action="store_true", help="spares the disk as much again")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    given = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="mmi_convert_", dir=given.folder))
    try:
        whole, largest = make(place / "in", given.layers)
        free = shutil.disk_usage(place).free
        needed = whole * (1 if given.no_export else 2)
        if free < 1.1 * needed:
            raise SystemExit(f"{place}: {free / 1e9:.0f} GB free, {needed / 1e9:.0f} needed; use --layers")
        name = f"mmi convert hf-llama --layout {given.layout}"
        source, checkpoint = str(place / "in"), str(place / "checkpoint")
        runs = [run(name, ["convert", "hf-llama", source, "--out", checkpoint, "--layout", given.layout])]
        if not given.no_export:
            runs.append(run("mmi export --llm", ["export", checkpoint, "--llm", str(place / "back")]))
    finally:
        shutil.rmtree(place)
    text = table(runs, whole, largest, given.layers)
    print(text)
    (RESULTS / f"convert_memory_{date.today()}.md").write_text(text)


if __name__ == "__main__":
    main()
