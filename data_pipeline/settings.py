"""Settings of the data pipeline: plain dataclasses, fit for OmegaConf's structured configurations."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction

from data_pipeline.errors import SettingsError

KINDS = ("interleaved", "pairs")
CROPS = ("center", "random")
EXECUTORS = ("inline", "threads", "processes", "ray")
CHANGES = ("manifest", "tokenizer", "decoder", "settings", "weights")
"""What ``accept_changes`` may name."""

MAX_SOURCES = 256
"""An image's id keeps 8 bits for its source."""


@dataclass
class SourceSettings:
    """One corpus.

    Attributes:
        name: what logs, ledgers and validation call it; unique.
        path: folder of tar shards (``*.tar``, see ``formats.py``), or one shard; a path or a URL
            (``s3://bucket/folder``).
        weight: its share of the samples, relative to the other sources; above 0.
        kind: ``interleaved``, documents as they stand, or ``pairs``, one image and its caption: the
            image comes before or after its text with p = 0.5, and text before it is not predicted.
        crop: what is taken of a picture: ``center``, the largest square in the middle, or ``random``, one
            anywhere, another in each pass over the source.
        crop_scale: with ``random``, the least area of the square, a share of the largest one's.
        flip: probability that a document's pictures are mirrored, all of them together. Not for a source
            whose texts speak of left and right, or give coordinates.
    """

    name: str = ""
    path: str = ""
    weight: float = 1.0
    kind: str = "interleaved"
    crop: str = "center"
    crop_scale: float = 1.0
    flip: float = 0.0


@dataclass
class StorageSettings:
    """How files are read that are not on this machine (``s3://...`` and every URL fsspec knows).

    Attributes:
        cache: folder on a local disk for blocks of remote files, shared by all processes; empty: none.
        cache_bytes: its size at most.
        block_bytes: what the cache fetches and keeps at a time.
        concurrency: requests under way at most, of each process.
        timeout: seconds for one request.
        deadline: seconds for one range, with all its repetitions; then the run stops by name.
    """

    cache: str = ""
    cache_bytes: int = 64 << 30
    block_bytes: int = 4 << 20
    concurrency: int = 16
    timeout: float = 30.0
    deadline: float = 300.0


@dataclass
class DataSettings:
    """Everything the stream of training steps depends on, beside the data itself.

    Attributes:
        sources: the corpora to mix.
        tokenizer: a ``tokenizer.json``, or the folder that holds one.
        context_length: tokens of a row.
        image_tokens: placeholders an image stands for, its BoI token not counted.
        image_size: pixels a side of an input image.
        drawn_size: pixels a side of a drawn image (one that carries image loss).
        holdout: fraction of the documents held out for validation, chosen by a hash of the key.
        window: samples packed together. More fills rows better and takes longer to start again:
            a resumed run plans its current window anew.
        max_images_per_row: cap on the images of a row, None for no cap.
        max_pixels: an image of more pixels is a bad sample; never decoded.
        failure_limit: the run stops when a source has more than this fraction of bad samples.
        seed: of the order of samples and of which side of its text a pair's image is on.
        decoder: ``native``, compiled with the package where libjpeg-turbo's headers are; ``turbo``
            (simplejpeg and OpenCV, the ``data-fast`` extra), which takes a quarter more CPU time for
            480 x 360 to 224; ``pillow``, which takes six times as much; ``auto``, the first of these that
            is there.
        executor: where batches are made. ``inline``: in the trainer, when it asks for them;
            ``threads``: ahead of it in threads; ``processes``: ahead of it in processes of their own,
            over shared memory; ``ray``: on a Ray cluster. All give the same batches in the same order.
        workers: threads, processes or Ray actors that make them.
        prefetch: steps made ahead of the one that is trained on.
        prefetch_bytes: pixels held ahead at most, on each data-parallel rank; the next step always
            may be made, however large. The object store of a Ray cluster that a run starts for itself is
            twice as large, but at least 256 MiB and at most 30 % of the memory.
        task_timeout: seconds that a worker may take for a micro-batch; then it is asked again
            elsewhere. With Ray several may be made in one call, which has as many times this.
        ray_address: of the cluster: ``auto`` takes the one this machine is part of, ``local`` starts
            one for this run, or ``host:port``.
        accept_changes: what may have changed when a run resumes: manifest, tokenizer, decoder,
            settings, weights (the sources are mixed by the new ones from there on, and the change is
            recorded). Anything else that has is an error.
        shuffle_shards: shards whose documents are shuffled together: shards come in an order of their
            own, and so many of them are open at a time.
        storage: reading of remote files.
    """

    sources: list[SourceSettings] = field(default_factory=list)
    tokenizer: str = ""
    context_length: int = 2048
    image_tokens: int = 64
    image_size: int = 224
    drawn_size: int = 512
    holdout: float = 0.01
    window: int = 1024
    max_images_per_row: int | None = None
    max_pixels: int = 89_478_485
    failure_limit: float = 0.05
    seed: int = 0
    decoder: str = "auto"
    executor: str = "inline"
    workers: int = 2
    prefetch: int = 2
    prefetch_bytes: int = 2 << 30
    task_timeout: float = 300.0
    ray_address: str = "auto"
    accept_changes: list[str] = field(default_factory=list)
    shuffle_shards: int = 16
    storage: StorageSettings = field(default_factory=StorageSettings)


def check_settings(settings: DataSettings) -> None:
    """Check that the settings make sense together.

    Raises:
        SettingsError: naming the first setting that does not.
    """
    if not settings.sources:
        raise SettingsError("data.sources: empty; name at least one source")
    if len(settings.sources) > MAX_SOURCES:
        raise SettingsError(f"data.sources: {len(settings.sources)}, at most {MAX_SOURCES}")
    names = [source.name for source in settings.sources]
    for index, source in enumerate(settings.sources):
        where = f"data.sources[{index}]"
        if not source.name or names.count(source.name) > 1:
            raise SettingsError(f"{where}.name: must be given and unique, got {source.name!r}")
        if source.kind not in KINDS:
            raise SettingsError(f"{where}.kind: must be one of {', '.join(KINDS)}, got {source.kind!r}")
        if not 0 < source.weight < float("inf"):
            raise SettingsError(f"{where}.weight: must be above 0, got {source.weight}")
        if source.crop not in CROPS:
            raise SettingsError(f"{where}.crop: must be one of {', '.join(CROPS)}, got {source.crop!r}")
        if not 0 < source.crop_scale <= 1:
            raise SettingsError(f"{where}.crop_scale: must be above 0 and at most 1, got {source.crop_scale}")
        if not 0 <= source.flip <= 1:
            raise SettingsError(f"{where}.flip: must be from 0 to 1, got {source.flip}")
    _check_service(settings)
    counts = ("image_tokens", "image_size", "drawn_size", "window", "max_pixels", "workers", "prefetch")
    for name in (*counts, "shuffle_shards"):
        if getattr(settings, name) < 1:
            raise SettingsError(f"data.{name}: must be at least 1, got {getattr(settings, name)}")
    if settings.max_images_per_row is not None and settings.max_images_per_row < 1:
        raise SettingsError(f"data.max_images_per_row: must be at least 1, got {settings.max_images_per_row}")
    for name in ("holdout", "failure_limit"):
        if not 0 <= getattr(settings, name) < 1:
            raise SettingsError(f"data.{name}: must be at least 0 and below 1, got {getattr(settings, name)}")
    if settings.context_length < settings.image_tokens + 3:
        raise SettingsError(
            f"data.context_length: {settings.context_length} does not hold one image of "
            f"{settings.image_tokens} tokens with BOS, BoI and EOS"
        )


def _check_service(settings: DataSettings) -> None:
    for name in ("cache_bytes", "block_bytes", "concurrency", "timeout", "deadline"):
        value = getattr(settings.storage, name)
        if not value > 0:
            raise SettingsError(f"data.storage.{name}: must be above 0, got {value}")
    if settings.executor not in EXECUTORS:
        raise SettingsError(
            f"data.executor: must be one of {', '.join(EXECUTORS)}, got {settings.executor!r}"
        )
    for name in ("prefetch_bytes", "task_timeout"):
        if getattr(settings, name) <= 0:
            raise SettingsError(f"data.{name}: must be above 0, got {getattr(settings, name)}")
    for change in settings.accept_changes:
        if change not in CHANGES:
            raise SettingsError(f"data.accept_changes: {change!r} is none of {', '.join(CHANGES)}")


def whole_weights(settings: DataSettings) -> list[int]:
    """Weights of the sources as the smallest whole numbers, so that mixing is exact: 0.5 and 0.25 are 2
    and 1."""
    shares = [Fraction(str(source.weight)) for source in settings.sources]
    unit = math.lcm(*(share.denominator for share in shares))
    whole = [int(share * unit) for share in shares]
    return [weight // math.gcd(*whole) for weight in whole]
