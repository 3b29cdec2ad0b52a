"""What the pipeline costs beside decoding: images a CPU-second, against the machine's raw decode limit.

The raw limit is what the two calls that do the work give, on bytes in memory: decode, then crop and
resize. Everything else the pipeline does (plan, read, pack, describe, check, carry to the trainer) makes its
rate smaller. The pipeline's own decoder saves work that the two calls do, so it is faster than they are;
delivery is therefore also set against this decoder alone, which leaves what the rest costs.

CPU-seconds are those of the process and of all it has started, so a busy machine moves them little. Its clock
and its caches are shared with others all the same, so limits and delivery are measured in turns of about half
a second, each delivery against what comes right before and right after it, and what is reported is the median
of these ratios with its quartiles.

The two calls write into memory that is placed as the decoder's is (``decode.Room``). Left to an allocator it
is chance, another in each process, whether the same calls take a tenth longer.
"""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from data_pipeline.decode import Decoder, Room, has_turbo
from data_pipeline.feed import Division, open_feed
from data_pipeline.formats import Document, write_documents
from data_pipeline.settings import DataSettings, SourceSettings
from data_pipeline.storage import Storage
from data_pipeline.stream import Stream
from data_pipeline.tokens import train_tokenizer

SIZE = 224
DISTINCT = 48
"""Different pictures in the shards; more would only take longer to make."""

REPEAT, TURN = 5, 4
"""Turns: how often the sampled images are decoded for the raw limit, and steps of delivery."""

WARM_UP, WARM_UP_RAY = 16, 64
"""Steps before the first turn, after which workers have met all memory they use; with Ray it is the whole of
its object store, and each actor meets every page for itself."""

WORDS = ["a", "red", "blue", "small", "house", "by", "the", "sea", "with", "two", "boats", "and", "birds"]


@dataclass(frozen=True)
class Rate:
    """Things done in ``seconds`` of CPU time and ``wall`` seconds."""

    name: str
    unit: str
    count: float
    seconds: float
    wall: float

    @property
    def each(self) -> float:
        """Things a CPU-second."""
        return self.count / max(self.seconds, 1e-9)


def make_shards(folder: Path, images: int, side: tuple[int, int] = (480, 360)) -> None:
    """Write image-caption documents with JPEGs of about 41 KB, and ``tokenizer.json``."""
    rng = np.random.default_rng(0)
    pictures = [_photo(rng, side) for _ in range(DISTINCT)]
    captions = [" ".join(rng.choice(WORDS, 12)) for _ in range(images)]
    made = (Document(f"{i:07d}", [pictures[i % DISTINCT], captions[i]], {"number": i}) for i in range(images))
    write_documents(made, folder / "shards", documents_per_shard=500)
    train_tokenizer(captions[:200], 400).save(folder / "tokenizer.json")


def bench_settings(folder: Path, executor: str, workers: int, decoder: str = "auto") -> DataSettings:
    """Settings of the measured runs: 64 images or so a micro-batch, nothing drawn."""
    return DataSettings(
        sources=[SourceSettings("bench", str(folder / "shards"))],
        tokenizer=str(folder / "tokenizer.json"),
        context_length=4096,
        image_tokens=32,
        image_size=SIZE,
        drawn_size=SIZE,
        holdout=0.0,
        decoder=decoder,
        executor=executor,
        workers=workers,
        prefetch=3,
        prefetch_bytes=160 << 20,  # as much as is ever ahead here; Ray's object store is twice as large
        ray_address="local",
    )


def raw_limit(blobs: list[bytes], repeat: int) -> Rate:
    """The bare library calls in a loop, one thread: simplejpeg's and OpenCV's, without them Pillow's."""
    decode = _bare()
    decode(blobs[0])
    started = time.thread_time(), time.perf_counter()
    for _ in range(repeat):
        for blob in blobs:
            decode(blob)
    return Rate("raw limit", "images", repeat * len(blobs), *_since(started))


def reading(folder: Path, repeat: int) -> Rate:
    """Images of the shards, as tasks ask for them; megabytes."""
    stream = Stream(bench_settings(folder, "inline", 1), global_rows=1)
    storage, ranges = Storage(), [place for _ in range(8) for place in stream.next().task([0]).ranges()]
    started = time.thread_time(), time.perf_counter()
    count = 0
    for _ in range(repeat):
        count += sum(len(blob) for blob in storage.read_many(ranges) if isinstance(blob, bytes))
    return Rate("reading", "MB", count / 1e6, *_since(started))


def packing(folder: Path, windows: int) -> Rate:
    """Windows of samples planned and packed; samples."""
    stream = Stream(bench_settings(folder, "inline", 1), global_rows=1)
    drawn = [0]
    started = time.thread_time(), time.perf_counter()
    for _ in range(windows):
        _, drawn = stream.planner.window(drawn)
    return Rate("planning and packing", "samples", sum(drawn), *_since(started))


def decoding(blobs: list[bytes], decoder: str, repeat: int) -> Rate:
    """The pipeline's decoder with all its checks."""
    one, out = Decoder(decoder, 1 << 30), np.empty((SIZE, SIZE, 3), np.uint8)
    one.squares(blobs[0], [out])
    started = time.thread_time(), time.perf_counter()
    for _ in range(repeat):
        for blob in blobs:
            one.squares(blob, [out])
    return Rate("decoding", "images", repeat * len(blobs), *_since(started))


@contextmanager
def delivering(folder: Path, executor: str, workers: int, decoder: str) -> Iterator[Callable[[], Rate]]:
    """Delivery by an executor, warmed up; yields what measures ``TURN`` steps of two rows."""
    settings = bench_settings(folder, executor, workers, decoder)
    with open_feed(settings, Division(0, 1, 1, 2), 2) as feed:
        for _ in range(WARM_UP_RAY if executor == "ray" else WARM_UP):
            feed.next()

        def measure() -> Rate:
            feed.settle()
            before, wall = tree_seconds(), time.perf_counter()
            images = sum(len(batch.images) for _ in range(TURN) for batch in feed.next().batches)
            feed.settle()  # as much is under way as before: so many steps were made
            spent = tree_seconds() - before, time.perf_counter() - wall
            return Rate(f"delivery, {executor}", "images", images, *spent)

        yield measure


def tree_seconds() -> float:
    """CPU seconds of this process and of all that live under it."""
    total = 0.0
    me = psutil.Process()
    for process in [me, *me.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def run(
    executors: list[str], images: int, workers: int, decoder: str, rounds: int, folder: Path | None = None
) -> dict[str, Any]:
    """Measure everything, in turns with the raw limit.

    Args:
        executors: which to measure.
        images: of the shards that are made.
        workers: of each executor.
        decoder: as ``data.decoder``.
        rounds: turns of the raw limit and of delivery.
        folder: where shards are, or are made; by default a temporary one.

    Returns:
        JSON values: ``rates`` (name, unit, a CPU-second, a second); ``ratios`` of each executor to the
        raw limit and to the decoder alone: lower quartile, median and upper quartile over the rounds.

    Raises:
        DataError: when an executor cannot be started.
    """
    if folder is None:
        with tempfile.TemporaryDirectory() as place:
            return run(executors, images, workers, decoder, rounds, Path(place))
    if not (folder / "shards").exists():
        make_shards(folder, images)
    kind = Decoder(decoder, 1).name  # the same one in every process
    blobs = sample_blobs(folder)
    rates = [reading(folder, 4), packing(folder, 4)]
    measures = (lambda: raw_limit(blobs, REPEAT)), (lambda: decoding(blobs, kind, REPEAT))
    alone: list[list[Rate]] = [[], []]
    ratios: dict[str, dict[str, list[float]]] = {}
    for executor in executors:
        with delivering(folder, executor, workers, kind) as deliver:
            own, made = [[measure()] for measure in measures], []
            for _ in range(rounds):
                made.append(deliver())
                for one, measure in zip(own, measures, strict=True):
                    one.append(measure())
        rates.append(_total(made))
        for measured, one in zip(alone, own, strict=True):
            measured += one
        ratios[executor] = {one[0].name: _ratios(made, one) for one in own}
    return {
        "decoder": Decoder(kind, 1).fingerprint,
        "workers": workers,
        "rates": [_row(rate) for rate in [*map(_total, alone), *rates]],
        "ratios": ratios,
    }


def sample_blobs(folder: Path) -> list[bytes]:
    """Image files of the shards."""
    stream = Stream(bench_settings(folder, "inline", 1), global_rows=1)
    storage = Storage()
    return [storage.read(place) for place in stream.next().task([0]).ranges()]


def _bare() -> Callable[[bytes], Any]:
    if has_turbo():
        import cv2
        import simplejpeg

        cv2.setNumThreads(0)
        room, resized = Room(), np.empty((SIZE, SIZE, 3), np.uint8)

        def turbo(blob: bytes) -> Any:
            height, width, *_ = simplejpeg.decode_jpeg_header(blob)
            pixels = simplejpeg.decode_jpeg(blob, "RGB", buffer=room.whole(3 * height * width))
            side = min(height, width)
            top, left = (height - side) // 2, (width - side) // 2
            square = pixels[top : top + side, left : left + side]
            return cv2.resize(square, (SIZE, SIZE), dst=resized, interpolation=cv2.INTER_LINEAR)

        return turbo

    def pillow(blob: bytes) -> Any:
        image = Image.open(io.BytesIO(blob)).convert("RGB")
        side = min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        box = (left, top, left + side, top + side)
        return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box))

    return pillow


def _photo(rng: np.random.Generator, size: tuple[int, int]) -> bytes:
    """A JPEG with detail at all scales, about 41 KB at 480 x 360."""
    width, height = size
    image = np.zeros((height, width, 3))
    for cells, strength in ((4, 90), (16, 40), (60, 22), (200, 9)):
        coarse = rng.normal(0, strength, (cells * height // width + 1, cells, 3))
        layer = np.stack([_stretched(coarse[..., c], size) for c in range(3)], -1)
        image += layer
    file = io.BytesIO()
    pixels = (image + 128).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(file, "JPEG", quality=87)
    return file.getvalue()


def _stretched(coarse: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    image = Image.fromarray(coarse.astype(np.float32))
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC))


def _since(started: tuple[float, float]) -> tuple[float, float]:
    return time.thread_time() - started[0], time.perf_counter() - started[1]


def _ratios(made: list[Rate], alone: list[Rate]) -> list[float]:
    """Quartiles of deliveries over what was measured right before and right after each."""
    around = [_total(alone[turn : turn + 2]).each for turn in range(len(made))]
    found = [one.each / limit for one, limit in zip(made, around, strict=True)]
    return [round(float(value), 3) for value in np.percentile(found, [25, 50, 75])]


def _total(rates: list[Rate]) -> Rate:
    """Several measurements of one thing as one."""
    sums = [sum(getattr(rate, name) for rate in rates) for name in ("count", "seconds", "wall")]
    return Rate(rates[0].name, rates[0].unit, *sums)


def _row(rate: Rate) -> dict[str, Any]:
    return {
        "name": rate.name,
        "unit": rate.unit,
        "a CPU-second": round(rate.each, 1),
        "a second": round(rate.count / max(rate.wall, 1e-9), 1),
    }
