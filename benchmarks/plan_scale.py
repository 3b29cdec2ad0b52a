"""What the plan costs at scale: memory, opening and resuming with 100 M documents in 100,000 shards.

    python benchmarks/plan_scale.py [--shards 100000] [--documents 1000] [--out FILE]

A synthetic index stands for two sources of that many shards together, MMC4-like documents and pairs, mixed
2:3 as in the paper (2:1:1:1). All shards of a source are links to one empty file and share its index; the
plan cannot tell. What is measured happens in a process of its own: open the corpus as a run does (list the
shards, look at each, compare with the manifest), take up a position at step 100,000 and plan the first step;
then ten more windows of samples. Bytes of samples are not read. In object storage nothing is listed: opening
reads one manifest a source.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pyarrow as pa

from data_pipeline.balance import balance, row_cost
from data_pipeline.corpus import Shard, open_corpus, write_manifest
from data_pipeline.index import COLUMNS, SCHEMA, Line, is_held_out, sidecar_of
from data_pipeline.planner import Planner
from data_pipeline.quarantine import Ledger
from data_pipeline.settings import DataSettings, SourceSettings
from data_pipeline.storage import Storage
from data_pipeline.tables import write_table
from data_pipeline.tokens import Tokenizer

TOKENIZER = "synthetic"
HOLDOUT = 0.01
STEP, ROWS = 100_000, 384
RANKS, MICRO_BATCHES = 64, 6


def lines(count: int, pair: bool) -> list[Line]:
    """Documents of 1 to 6 images and log-normal texts (median about 500 tokens), or pairs."""
    rng = np.random.default_rng(0)
    made, at = [], 512
    for number in range(count):
        images = 1 if pair else int(rng.integers(1, 7))
        texts = (
            [int(rng.integers(8, 60))]
            if pair
            else np.clip(rng.lognormal(4.8, 0.9, images), 3, 2000).astype(int).tolist()
        )
        pieces = [n for text in texts for n in (-1, text)]
        sizes = rng.integers(20_000, 120_000, images).tolist()
        offsets = (at + 2048 + np.cumsum([0, *sizes[:-1]])).tolist()
        ids = rng.integers(0, 32_000, sum(texts)).tolist()
        made.append(
            Line(f"doc{number:07d}", at, 1500, offsets, sizes, [640] * images, [480] * images, pieces, ids)
        )
        at = offsets[-1] + sizes[-1] + 512
    return made


def write_source(folder: Path, shards: int, documents: int, pair: bool) -> None:
    """The manifest of a source, and indexes for all its shards."""
    storage = Storage()
    folder.mkdir(parents=True)
    own = lines(documents, pair)
    shard = folder / "000000.tar"
    shard.write_bytes(bytes(1024))
    stamp = storage.stat(str(shard))
    digest = hashlib.blake2b(str(pair).encode(), digest_size=16).hexdigest()
    table = pa.table({name: [getattr(line, name) for line in own] for name in COLUMNS.names}, schema=COLUMNS)
    about = {
        "schema": SCHEMA,
        "size": stamp.size,
        "etag": stamp.etag,
        "tokenizer": TOKENIZER,
        "documents": documents,
        "digest": digest,
    }
    first = sidecar_of(str(shard), TOKENIZER)
    write_table(storage, first, table, about)
    held = sum(is_held_out(line.key, HOLDOUT) for line in own)
    images = sum(len(line.image_sizes) for line in own)
    made = []
    for number in range(shards):
        url = str(folder / f"{number:06d}.tar")
        if number:
            os.symlink(shard, url)
            os.symlink(first, sidecar_of(url, TOKENIZER))
        made.append(Shard(url, stamp, documents, held, images, 0, digest, "{}", "[]"))
    write_manifest(storage, str(folder), made, TOKENIZER, HOLDOUT)


def peak() -> float:
    """Megabytes this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(folder: Path) -> dict[str, float]:
    """Open, resume and plan, in this process."""
    before, started = peak(), time.perf_counter()
    settings = DataSettings(
        sources=[
            SourceSettings("mmc4", str(folder / "mmc4"), 2.0),
            SourceSettings("pairs", str(folder / "pairs"), 3.0, "pairs"),
        ],
        holdout=HOLDOUT,
    )
    tokenizer = cast(Tokenizer, SimpleNamespace(fingerprint=TOKENIZER))
    corpus = open_corpus(settings, tokenizer, Ledger(settings.failure_limit), Storage())
    opened = time.perf_counter()
    planner, sources = Planner(settings, corpus, "train"), corpus.sources
    # A position about 100,000 steps of 384 rows in: the samples drawn, as the mixing shares them out.
    drawn = [40_000_000, 60_000_000]
    rows, after = planner.window(drawn)
    while len(rows) < ROWS:
        more, after = planner.window(after)
        rows += more
    resumed, spent = time.perf_counter(), time.process_time()
    for _ in range(10):
        more, after = planner.window(after)
        rows += more
    planned = time.perf_counter()
    fills, spreads = Counter(), []
    for source, name in enumerate(("mmc4", "pairs")):
        own = [row for row in rows if row[0].source == source]
        fills[name] = sum(part.length for row in own for part in row) / (settings.context_length * len(own))
    step = RANKS * MICRO_BATCHES
    for at in range(0, len(rows) - step + 1, step):
        costs = [row_cost(row, settings) for row in rows[at : at + step]]
        loads = [sum(costs[i] for i in own) for own in balance(costs, RANKS)]
        spreads.append(max(loads) / (sum(loads) / len(loads)))
    return {
        "documents": sum(len(source) for source in sources),
        "shards": sum(len(source.shards) for source in sources),
        "open the corpus, s": opened - started,
        "resume and plan the first step, s": resumed - opened,
        "from nothing to the first step planned, s": resumed - started,
        "the same in CPU seconds": spent,
        "one window of 1,024 samples later on, s": (planned - resumed) / 10,
        "memory before, MB": before,
        "memory at most, MB": peak(),
        "memory of the plan, MB": peak() - before,
        "fill of MMC4-like rows": fills["mmc4"],
        "fill of rows of pairs": fills["pairs"],
        f"max/mean cost over {RANKS} ranks of {MICRO_BATCHES} rows, mean": float(np.mean(spreads)),
        f"max/mean cost over {RANKS} ranks of {MICRO_BATCHES} rows, worst": max(spreads),
    }


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def _cpu() -> str:
    named = [
        s.split(":")[1].strip() for s in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in s
    ]
    return named[0] if named else platform.machine()


def main() -> None:
    """Write the synthetic index, measure in a fresh process, print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--documents", type=int, default=1000, help="of a shard")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(given.measure)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_source(folder / "mmc4", given.shards // 2, given.documents, False)
        write_source(folder / "pairs", given.shards - given.shards // 2, given.documents, True)
        command = [sys.executable, __file__, "--measure", name]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    defaults = DataSettings()
    lines = [
        "# The plan at scale",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, commit {_commit()}, {_cpu()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, load average {os.getloadavg()[0]:.0f}.",
        f"`python benchmarks/plan_scale.py --shards {given.shards} --documents {given.documents}`: local "
        f"files, rows of {defaults.context_length} tokens,",
        f"windows of {defaults.window} samples, {defaults.shuffle_shards} shards shuffled together. CPU "
        "seconds are those of the measured process.",
        "",
        "| | |",
        "|---|---|",
    ]
    lines += [f"| {name} | {f'{n:,}' if isinstance(n, int) else f'{n:.4g}'} |" for name, n in found.items()]
    text = "\n".join(lines) + "\n"
    print(text)
    if given.out:
        given.out.write_text(text)


if __name__ == "__main__":
    main()
