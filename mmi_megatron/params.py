"""Parameters of a model, part by part, trainable and frozen; built without memory for its weights."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich import box
from rich.table import Table

from mmi_megatron.config import LanguageConfig, ModelConfig
from mmi_megatron.model.image_decoder import ImageDecoder
from mmi_megatron.model.language_model import LanguageModel, has_mmfs
from mmi_megatron.model.mm_interleaved import MMInterleaved
from mmi_megatron.model.visual_tokenizer import VisualTokenizer

IMAGE_TOKENS = 2
"""BoI and the placeholder: the last tokens of a vocabulary."""

VISION, LANGUAGE, MMFS, DECODER = (
    "visual tokenizer",
    "language model",
    "language model's MMFS",
    "image decoder",
)
IMAGE_ROWS = "image rows and padding"

PARTS = [
    (r"visual_tokenizer\.vit\.", VISION, "ViT"),
    (r"visual_tokenizer\.adapter\.", VISION, "ViT-Adapter"),
    (r"visual_tokenizer\.input_(proj|norm)\.", VISION, "resampler, input"),
    (r"visual_tokenizer\.position_norm\.", VISION, "resampler, input"),
    (r"visual_tokenizer\.resampler\.", VISION, "resampler"),
    (r"visual_tokenizer\.output_proj\.", VISION, "resampler, output"),
    (r"visual_tokenizer\.learned_tokens", VISION, "learned tokens"),
    (r"language_model\.embed_tokens\.", LANGUAGE, "embeddings"),
    (r"language_model\.lm_head\.", LANGUAGE, "head"),
    (r"language_model\.norm\.", LANGUAGE, "final norm"),
    (r"language_model\.image_tokens\.", MMFS, "image tokens"),
    (r"language_model\.layers\.\d+\.mmfs\.attention\.", MMFS, "MMFS"),
    (r"language_model\.layers\.\d+\.mmfs\.", MMFS, "its norms and gates"),
    (r"language_model\.layers\.", LANGUAGE, "layers"),
    (r"image_decoder\.unet\.", DECODER, "U-Net"),
    (r"image_decoder\.unet_mmfs\.", DECODER, "MMFS"),
    (r"image_decoder\.vae\.", DECODER, "VAE"),
    (r"image_decoder\.context_proj\.", DECODER, "context projection"),
    (r"image_decoder\.resampler\.", DECODER, "resampler"),
    (r"image_decoder\.negatives", DECODER, "negatives of guidance"),
]
"""Pattern of a parameter's name, and the group and part it is counted in; the first that fits."""


@dataclass
class Part:
    """Parameters of one part; ``layers`` equal ones, where there are several."""

    group: str
    part: str
    trainable: int = 0
    frozen: int = 0
    layers: int = 1

    @property
    def parameters(self) -> int:
        """Trainable and frozen."""
        return self.trainable + self.frozen

    def add(self, numbers: int, trainable: bool) -> None:
        """Count some more."""
        if trainable:
            self.trainable += numbers
        else:
            self.frozen += numbers


def build_on_meta(config: ModelConfig) -> MMInterleaved:
    """The plain model with shapes and no memory, frozen parts marked."""
    first = config.language.vocabulary - IMAGE_TOKENS
    with torch.device("meta"):
        tokenizer = VisualTokenizer(config.vision, config.language.width)
        language = LanguageModel(config.language, config.vision.width, tokenizer.shapes, first, first + 1)
        decoder = None
        if config.loss.next_image:
            decoder = ImageDecoder(
                config.decoder, config.language.width, config.vision.width, tokenizer.shapes
            )
        return MMInterleaved(config, language, tokenizer, decoder)


def count(config: ModelConfig) -> list[Part]:
    """Count every parameter of the model that these settings describe, once."""
    return tally(build_on_meta(config), config.language)


def tally(model: MMInterleaved, language: LanguageConfig) -> list[Part]:
    """Count every parameter of a model once.

    The rows that its vocabulary tables have beyond the text tokens, for the image tokens and as
    padding, are apart, so that the rest is the language model as it was published.
    """
    parts: dict[tuple[str, str], Part] = {}

    def add(group: str, part: str, numbers: int, trainable: bool) -> None:
        parts.setdefault((group, part), Part(group, part)).add(numbers, trainable)

    text_rows = language.vocabulary - IMAGE_TOKENS
    for name, parameter in model.named_parameters():
        group, part = _place(name)
        numbers = parameter.numel()
        if part in ("embeddings", "head"):
            extra = (len(parameter) - text_rows) * language.width
            add(LANGUAGE, IMAGE_ROWS, extra, parameter.requires_grad)
            numbers -= extra
        add(group, part, numbers, parameter.requires_grad)
    if mmfs := parts.get((MMFS, "MMFS")):
        mmfs.layers = sum(has_mmfs(language, layer) for layer in range(language.layers))
    order = list(dict.fromkeys((group, part) for _, group, part in PARTS)) + [(LANGUAGE, IMAGE_ROWS)]
    groups = [VISION, LANGUAGE, MMFS, DECODER]
    ranked = {key: (groups.index(key[0]), place) for place, key in enumerate([*order, *parts])}
    return [parts[key] for key in sorted(parts, key=lambda key: ranked[key])]


def _place(name: str) -> tuple[str, str]:
    """Group and part of a parameter; what no pattern knows is counted under its module's name."""
    for pattern, group, part in PARTS:
        if re.match(pattern, name):
            return group, part
    module, _, rest = name.partition(".")
    group = {"visual_tokenizer": VISION, "language_model": LANGUAGE}.get(module, DECODER)
    return group, rest.split(".")[0]


def totals(parts: list[Part]) -> dict[str, Part]:
    """Sums of the groups, and of everything under ``all``."""
    sums: dict[str, Part] = {}
    for part in parts:
        for group in (part.group, "all"):
            whole = sums.setdefault(group, Part(group, "all"))
            whole.trainable += part.trainable
            whole.frozen += part.frozen
    sums["all"] = sums.pop("all")
    return sums


def as_json(parts: list[Part]) -> dict[str, Any]:
    """Everything, for programs."""
    return {
        "parts": [asdict(part) | {"parameters": part.parameters} for part in parts],
        "totals": {
            name: {"trainable": part.trainable, "frozen": part.frozen, "parameters": part.parameters}
            for name, part in totals(parts).items()
        },
    }


def as_table(parts: list[Part], title: str) -> Table:
    """Everything, for people."""
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("part", no_wrap=True)
    for heading in ("parameters", "trainable", "frozen"):
        table.add_column(heading, justify="right", no_wrap=True)
    for group, whole in totals(parts).items():
        table.add_section()
        table.add_row(group, *_numbers(whole), style="bold")
        for part in (part for part in parts if part.group == group):
            each = f": {part.layers} x {part.parameters // part.layers:,}" if part.layers > 1 else ""
            table.add_row(f"  {part.part}{each}", *_numbers(part))
    return table


def _numbers(part: Part) -> list[str]:
    return [f"{number:,}" if number else "-" for number in (part.parameters, part.trainable, part.frozen)]
