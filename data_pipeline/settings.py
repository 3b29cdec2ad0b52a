"""Settings of the data pipeline: plain dataclasses, fit for OmegaConf's structured configurations."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction

from data_pipeline.errors import SettingsError

KINDS = ("interleaved", "pairs")
MAX_SOURCES = 256
"""An image's id keeps 8 bits for its source."""


@dataclass
class SourceSettings:
    """One corpus.

    Attributes:
        name: what logs, ledgers and validation call it; unique.
        path: folder of tar shards (``*.tar``, see ``formats.py``), or one shard.
        weight: its share of the samples, relative to the other sources; above 0.
        kind: ``interleaved``, documents as they stand, or ``pairs``, one image and its caption: the
            image comes before or after its text with p = 0.5, and text before it is not predicted.
    """

    name: str = ""
    path: str = ""
    weight: float = 1.0
    kind: str = "interleaved"


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
    for name in ("image_tokens", "image_size", "drawn_size", "window", "max_pixels"):
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


def whole_weights(settings: DataSettings) -> list[int]:
    """Weights of the sources as whole numbers, so that mixing is exact: 0.5 and 0.25 are 2 and 1."""
    shares = [Fraction(str(source.weight)) for source in settings.sources]
    unit = math.lcm(*(share.denominator for share in shares))
    return [int(share * unit) for share in shares]
