"""Our data service beside five others, on the same shards, with the same fast decoder: images a CPU-second.

    pip install -e .[bench]
    python -m venv STREAMING       # Mosaic Streaming's pins do not agree with ours
    STREAMING/bin/pip install mosaicml-streaming torch torchvision simplejpeg opencv-python-headless psutil
    python benchmarks/data_peers.py FOLDER --streaming-python STREAMING/bin/python [--out FILE.md]

Each peer runs in a process of its own, two workers, batches of 64, nothing shuffled, and only decodes,
crops and resizes, with the same two library calls everywhere; litData and Mosaic Streaming read their own
format, made of the same images, the others the tar files. Ours also plans, shuffles, packs, masks and
checks; it decodes with its own decoder (``native``), and once more with the two calls (``turbo``).

CPU-seconds are those of the process and all its children while ``COUNTED`` images come out, after the first
``SKIPPED`` and well before the last, so that as much is under way at the end as at the beginning. The ratio
is to the raw decode limit that the same process measures just before and just after. Rounds go over all
peers in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
import simplejpeg

SIZE, BATCH, WORKERS = 224, 64, 2
IMAGES, SKIPPED, COUNTED = 10_000, 5000, 4000


def decode(blob: bytes) -> np.ndarray:
    """The raw limit: decode, crop the middle, resize; uint8 [224, 224, 3]."""
    pixels = simplejpeg.decode_jpeg(bytes(blob), "RGB")
    side = min(pixels.shape[:2])
    top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    square = pixels[top : top + side, left : left + side]
    return cv2.resize(square, (SIZE, SIZE), interpolation=cv2.INTER_LINEAR)


def webdataset(shards: list[str], folder: Path) -> Iterator[int]:
    """webdataset in torch's DataLoader."""
    import webdataset as wds
    from torch.utils.data import DataLoader

    def pick(sample: dict) -> tuple[np.ndarray, bytes]:
        return decode(sample["0.jpg"]), sample["json"]

    data = wds.WebDataset(shards, shardshuffle=False, nodesplitter=wds.split_by_node).map(pick)
    data = data.batched(BATCH, collation_fn=_stacked)
    yield from map(len, DataLoader(data, num_workers=WORKERS, batch_size=None))


def litdata(shards: list[str], folder: Path) -> Iterator[int]:
    """litData, on its own format."""
    from litdata import StreamingDataLoader, StreamingDataset

    own = folder / "litdata"
    if not own.exists():
        # A chunk written by a writer in this process: optimize() starts processes that need a main module.
        from litdata.streaming.writer import BinaryWriter

        own.mkdir()
        writer = BinaryWriter(str(own), chunk_bytes="20MB")
        for number, (blob, text) in enumerate(_members(shards)):
            writer[number] = {"image": blob, "text": text}
        writer.done()
        writer.merge()

    class Images(StreamingDataset):
        def __getitem__(self, index: Any) -> np.ndarray:
            return decode(super().__getitem__(index)["image"])

    loader = StreamingDataLoader(
        Images(str(own), shuffle=False), batch_size=BATCH, num_workers=WORKERS, collate_fn=np.stack
    )
    yield from map(len, loader)


def energon(shards: list[str], folder: Path) -> Iterator[int]:
    """Megatron Energon, on the same tar files, with its index beside them."""
    from megatron.energon import (
        Cooker,
        DefaultTaskEncoder,
        WorkerConfig,
        basic_sample_keys,
        get_savable_loader,
        get_train_dataset,
    )
    from megatron.energon.epathlib import EPath
    from megatron.energon.flavors.webdataset.prepare import WebdatasetPreparator

    own = folder / "energon"
    if not own.exists():
        own.mkdir()
        for shard in shards:
            shutil.copy(shard, own)
        names = [Path(shard).name for shard in shards]
        WebdatasetPreparator.prepare_dataset(
            EPath(own), names, split_parts_ratio=[("train", 1.0)], shuffle_seed=None, workers=1
        )
        (own / ".nv-meta" / "dataset.yaml").write_text(
            "__module__: megatron.energon\n__class__: CrudeWebdataset\n"
        )
    from dataclasses import dataclass

    from megatron.energon import Sample, stateless

    @dataclass
    class Picture(Sample):
        image: Any

    @stateless
    def cook(sample: dict) -> Picture:
        return Picture(**basic_sample_keys(sample), image=decode(sample["0.jpg"]))

    class Encoder(DefaultTaskEncoder):
        cookers = (Cooker(cook),)
        decoder = None

        def batch(self, samples: list) -> Any:
            return np.stack([sample.image for sample in samples])

    data = get_train_dataset(
        own,
        batch_size=BATCH,
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
        worker_config=WorkerConfig.default_worker_config(WORKERS),
        task_encoder=Encoder(),
        repeat=False,
    )
    yield from map(len, get_savable_loader(data))


def ray_data(shards: list[str], folder: Path) -> Iterator[int]:
    """Ray Data: map_batches over a list of shards."""
    import ray

    ray.init(address="local", num_cpus=WORKERS, include_dashboard=False, log_to_driver=False)

    def images(batch: dict) -> dict:
        return {"image": np.stack([decode(blob) for blob, _ in _members(batch["shard"].tolist())])}

    data = ray.data.from_items([{"shard": shard} for shard in shards], override_num_blocks=len(shards))
    for batch in data.map_batches(images, batch_size=1).iter_batches(batch_size=BATCH):
        yield len(batch["image"])


def streaming(shards: list[str], folder: Path) -> Iterator[int]:
    """Mosaic Streaming, on its own format."""
    from streaming import MDSWriter, StreamingDataset
    from torch.utils.data import DataLoader

    own = folder / "streaming"
    if not own.exists():
        columns = {"image": "bytes", "text": "bytes"}
        with MDSWriter(out=str(own), columns=columns, size_limit="20mb") as writer:
            for blob, text in _members(shards):
                writer.write({"image": blob, "text": text})

    class Images(StreamingDataset):
        def __getitem__(self, index: Any) -> np.ndarray:
            return decode(super().__getitem__(index)["image"])

    data = Images(local=str(own), shuffle=False, batch_size=BATCH)
    yield from map(len, DataLoader(data, batch_size=BATCH, num_workers=WORKERS, collate_fn=np.stack))


def ours(executor: str, decoder: str = "native") -> Callable[[list[str], Path], Iterator[int]]:
    """This project, with an executor and a decoder."""

    def run(shards: list[str], folder: Path) -> Iterator[int]:
        from data_pipeline.bench import bench_settings
        from data_pipeline.feed import Division, open_feed

        settings = bench_settings(folder, executor, WORKERS, decoder)
        with open_feed(settings, Division(0, 1, 1, 1), 1) as feed:
            while True:
                for batch in feed.next().batches:
                    yield len(batch.images)

    return run


PEERS: dict[str, Callable[[list[str], Path], Iterator[int]]] = {
    "ours, threads": ours("threads"),
    "ours, processes": ours("processes"),
    "ours, ray": ours("ray"),
    "ours, threads, turbo": ours("threads", "turbo"),
    "ours, processes, turbo": ours("processes", "turbo"),
    "ours, ray, turbo": ours("ray", "turbo"),
    "litdata": litdata,
    "webdataset": webdataset,
    "ray data": ray_data,
    "energon": energon,
    "streaming": streaming,
}


def measure(name: str, folder: Path) -> dict[str, float]:
    """One peer in this process."""
    cv2.setNumThreads(0)
    shards = sorted(str(path) for path in (folder / "shards").glob("*.tar"))
    blobs = [blob for blob, _ in _members(shards[:1])][:200]
    before = raw(blobs)
    batches = PEERS[name](shards, folder)
    _take(batches, SKIPPED)
    started, wall = tree_seconds(), time.perf_counter()
    images = _take(batches, COUNTED)
    seconds, wall = tree_seconds() - started, time.perf_counter() - wall
    time.sleep(1.0)  # what is made ahead is made
    limit = 2 / (1 / before + 1 / raw(blobs))
    return {
        "a CPU-second": images / seconds,
        "a second": images / wall,
        "raw": limit,
        "ratio": images / seconds / limit,
    }


def _take(batches: Iterator[int], images: int) -> int:
    """So many images, and those that come with the last of them."""
    taken = 0
    while taken < images:
        taken += next(batches)
    return taken


def raw(blobs: list[bytes], repeat: int = 4) -> float:
    """The raw limit in images a CPU-second."""
    started = time.thread_time()
    for _ in range(repeat):
        for blob in blobs:
            decode(blob)
    return repeat * len(blobs) / (time.thread_time() - started)


def tree_seconds() -> float:
    """CPU seconds of this process, of its living children and of those that were waited for."""
    times = psutil.Process().cpu_times()
    total = times.user + times.system + times.children_user + times.children_system
    for child in psutil.Process().children(recursive=True):
        try:
            own = child.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += own.user + own.system
    return total


def _members(shards: list[str]) -> Iterator[tuple[bytes, bytes]]:
    """Image and JSON of every document."""
    import tarfile

    for shard in shards:
        with tarfile.open(shard) as tar:
            head = b""
            for info in tar:
                blob = tar.extractfile(info)
                assert blob is not None
                if info.name.endswith(".json"):
                    head = blob.read()
                else:
                    yield blob.read(), head


def _stacked(samples: list) -> np.ndarray:
    return np.stack([image for image, _ in samples])


VERSIONS = {
    "litdata": "litdata",
    "webdataset": "webdataset",
    "ray data": "ray",
    "energon": "megatron-energon",
    "streaming": "mosaicml-streaming",
}
"""Distribution of each peer."""


def table(found: dict[str, list[dict[str, float]]], versions: dict[str, str], command: str) -> str:
    """The results in Markdown, with date and machine: medians over the rounds."""
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    rounds = max(len(rows) for rows in found.values())
    middle = {
        name: {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        for name, rows in found.items()
    }
    lines = [
        f"# Data pipelines on the same shards, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "",
        f"{os.cpu_count()} cores,{cpu.partition(':')[2]}, load average {os.getloadavg()[0]:.1f}; Python "
        f"{platform.python_version()}, simplejpeg {version('simplejpeg')}, OpenCV {cv2.__version__}; commit "
        f"{commit.stdout.strip()}. Two workers, 480 x 360 JPEGs of about 41 KB to 224 x 224, {COUNTED} "
        f"images counted; medians of {rounds} rounds. `{command}`.",
        "",
        "| pipeline | images a CPU-second | images a second | raw limit | ratio | least and most |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in sorted(middle.items(), key=lambda item: -item[1]["ratio"]):
        values = [f"{row[key]:.0f}" for key in ("a CPU-second", "a second", "raw")]
        ratios = [one["ratio"] for one in found[name]]
        label = f"{name} {versions.get(name, '')}".strip()
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        lines.append(f"| {label} | {' | '.join(values)} | {row['ratio']:.2f} | {spread} |")
    if "energon" in middle:
        over = [
            f"{name.partition(', ')[2]} {row['ratio'] / middle['energon']['ratio']:.2f}"
            for name, row in middle.items()
            if name.startswith("ours")
        ]
        lines += ["", f"Ours over Energon: {', '.join(over)}."]
    return "\n".join(lines) + "\n"


def _versions(streaming_python: str) -> dict[str, str]:
    """Of the peers."""
    ask = "import sys; from importlib.metadata import version; print(version(sys.argv[1]))"
    found = {}
    for name, package in VERSIONS.items():
        python = streaming_python if name == "streaming" else sys.executable
        done = subprocess.run([python, "-c", ask, package], capture_output=True, text=True)
        found[name] = done.stdout.strip()
    return found


def main() -> None:
    """Entry: all peers, each in its own process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--peer")
    parser.add_argument("--only", default=";".join(PEERS), help="names, with ; between them")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streaming-python", default=sys.executable)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.peer:
        print(json.dumps(measure(given.peer, given.folder)))
        return
    if not (given.folder / "shards").exists():
        from data_pipeline.bench import make_shards

        make_shards(given.folder, IMAGES)
    names = [one.strip() for one in given.only.split(";")]
    found: dict[str, list[dict[str, float]]] = {}
    versions = _versions(given.streaming_python)
    for number in range(given.rounds):
        for name in names:
            python = given.streaming_python if name == "streaming" else sys.executable
            command = [python, __file__, str(given.folder), "--peer", name]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{name}: failed\n{done.stderr[-2000:]}")
            row = json.loads(done.stdout.splitlines()[-1])
            found.setdefault(name, []).append(row)
            print(number, name, json.dumps({key: round(value, 3) for key, value in row.items()}), flush=True)
        text = table(found, versions, "python " + " ".join(sys.argv))
        if given.out:
            given.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
