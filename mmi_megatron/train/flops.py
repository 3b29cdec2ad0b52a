"""Model FLOPs of a step, counted from the configuration and from what the step really holds.

Counted are matrix products, convolutions and attention, a multiplication and an addition as two, as
``torch.utils.flop_counter`` does: attention to n tokens counts all n x n pairs, though a causal kernel
need compute only half. Backward passes are counted where they happen: with respect to the inputs of an
operation if something before it is trained, with respect to its weights if it is trained itself. The
sampling of MMFS and of deformable attention, norms and activations are left out, and so is what is
computed again to save memory: this is the work that the model asks for, not what a layout adds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields

import numpy as np

from mmi_megatron.config import Config, LanguageConfig, MMFSConfig, ModelConfig, ResamplerConfig, VisionConfig
from mmi_megatron.model.language_model import has_mmfs, padded_vocabulary
from mmi_megatron.model.mm_interleaved import Inputs
from mmi_megatron.model.vit_adapter import STRIDE, pyramid_shapes
from mmi_megatron.train.flops_unet import count_unet, count_vae

IMAGE_ROWS = 2
"""Output rows of the image tokens, which a frozen language model trains."""


@dataclass
class Flops:
    """Of one part: the forward pass, and the backward pass with respect to inputs and to weights."""

    forward: int = 0
    inputs: int = 0
    weights: int = 0

    @property
    def total(self) -> int:
        """All three."""
        return self.forward + self.inputs + self.weights


@dataclass(frozen=True)
class Holds:
    """What a micro-batch holds, as far as FLOPs depend on it.

    Attributes:
        tokens: positions of all rows, padding included.
        pairs: sum of the squared lengths of the spans that attend within themselves.
        images: that are read; ``drawn``: that carry image loss; ``referenced``: that drawn ones may
            look at.
        context: longest context of a drawn image, which all of the micro-batch are padded to.
    """

    tokens: int
    pairs: int
    images: int
    drawn: int
    referenced: int
    context: int

    @classmethod
    def of(cls, inputs: Inputs) -> Holds:
        """What these inputs hold."""
        used = {image for first, last in inputs.references.tolist() for image in range(first, last)}
        return cls(
            tokens=len(inputs.tokens),
            pairs=int((np.diff(inputs.sees.bounds).astype(np.int64) ** 2).sum()),
            images=len(inputs.images),
            drawn=len(inputs.drawn),
            referenced=len(used),
            context=max((last - first + 1 for first, last in inputs.contexts), default=0),
        )


@dataclass
class Tally:
    """Adds up operations, part by part.

    ``part`` and ``trained`` are what the next operations belong to, and whether their weights are
    trained. Every operation is told whether its input needs a gradient and returns whether its output
    does. ``backward`` off counts forward passes alone.
    """

    parts: dict[str, Flops] = field(default_factory=dict)
    part: str = ""
    trained: bool = True
    backward: bool = True

    def at(self, part: str, trained: bool, backward: bool = True) -> Tally:
        """Go to another part."""
        self.part, self.trained, self.backward = part, trained, backward
        self.parts.setdefault(part, Flops())
        return self

    def _add(self, flops: int, inputs: bool, weights: bool) -> bool:
        entry = self.parts[self.part]
        entry.forward += flops
        entry.inputs += flops * (inputs and self.backward)
        entry.weights += flops * (weights and self.backward)
        return inputs or weights

    def linear(self, rows: int, width: int, out: int, inputs: bool = True) -> bool:
        """A linear layer on ``rows`` rows."""
        return self._add(2 * rows * width * out, inputs, self.trained)

    def conv(self, pixels: int, kernel: int, width: int, out: int, inputs: bool = True) -> bool:
        """A convolution. ``pixels``: of all images of its output (transposed: of its input); ``kernel``:
        its pixels; ``width``: input channels that one output channel sees."""
        return self._add(2 * pixels * kernel * width * out, inputs, self.trained)

    def attend(
        self, pairs: int, width: int, query: bool = True, keys: bool = True, value_width: int | None = None
    ) -> bool:
        """Attention. No weights; two products forward; backward one for the queries, one for the keys,
        and two to get there.

        Args:
            pairs: of query and key, over batch and heads.
            width: channels of a query and of a key; ``value_width``: of a value, the same by default.
            query, keys: whether queries, and keys and values, need a gradient.
        """
        value_width = width if value_width is None else value_width
        self._add(2 * pairs * (width + value_width), False, False)
        back = value_width * keys + value_width * (query or keys) + width * (query + keys)
        self.parts[self.part].inputs += 2 * pairs * back * self.backward
        return query or keys


def count(model: ModelConfig, holds: Holds) -> dict[str, Flops]:
    """FLOPs of forward and backward pass of a micro-batch, by part of the model."""
    tally = Tally()
    if holds.images:
        _count_vision(tally, model.vision, model.language.width, holds.images)
    _count_language(tally, model, holds)
    if holds.drawn and model.loss.next_image:
        _count_decoder(tally, model, holds)
    return tally.parts


def count_step(config: Config, inputs: Iterable[Inputs]) -> dict[str, int]:
    """FLOPs of some micro-batches, by part and kind: ``{"U-Net/forward": ..., "U-Net/weights": ...}``.
    The same keys whatever they hold."""
    empty = Holds(0, 0, 0, 0, 0, 0)
    most = Holds(1, 1, 1, 1, 1, 1)
    total = {f"{part}/{kind.name}": 0 for part in count(config.model, most) for kind in fields(Flops)}
    for holds in [Holds.of(item) for item in inputs] or [empty]:
        for part, flops in count(config.model, holds).items():
            for kind in fields(Flops):
                total[f"{part}/{kind.name}"] += getattr(flops, kind.name)
    return total


def _count_vision(tally: Tally, vision: VisionConfig, llm_width: int, images: int) -> None:
    grid, width, adapter = vision.image_size // vision.patch_size, vision.width, vision.adapter
    shapes = pyramid_shapes(grid)
    patches, coarse = grid * grid, sum(height * across for height, across in shapes[1:])
    tokens = patches + (vision.tower != "siglip")  # which has no class token
    _count_vit(tally, vision, images, patches, tokens)
    tally.at("adapter", True)
    _count_stem(tally, adapter.stem, width, images, STRIDE * grid)
    tally.conv(images * shapes[1][0] ** 2, 4, width, width)  # the transposed one, from level 1 to 0
    inner, hidden = int(width * adapter.value_ratio), int(width * adapter.ffn_ratio)

    def deformable(queries: int, values: int, levels: int) -> None:
        points = adapter.heads * levels * adapter.points
        tally.linear(images * queries, width, 3 * points)  # offsets and weights
        tally.linear(images * values, width, inner)
        tally.linear(images * queries, inner, width)

    for _ in range(adapter.interactions):
        deformable(patches, coarse, 3)
    for _ in range(adapter.interactions + adapter.extra_extractors):
        deformable(coarse, patches, 1)
        tally.linear(images * coarse, width, hidden)
        tally.conv(images * coarse, 9, 1, hidden)
        tally.linear(images * coarse, hidden, width)
    if vision.use_resampler:
        tally.at("resampler", True)
        tally.linear(images * tokens, width, width)
        _count_resampler(tally, vision.resampler, images, tokens, width)
        tally.linear(images * vision.resampler.queries, vision.resampler.width, llm_width)


def _count_vit(tally: Tally, vision: VisionConfig, images: int, patches: int, tokens: int) -> None:
    width, rows = vision.width, images * tokens
    gates = 2 if vision.tower == "eva" else 1  # SwiGLU
    tally.at("ViT", not vision.frozen)
    tally.conv(images * patches, vision.patch_size**2, 3, width, inputs=False)
    for _ in range(vision.layers):  # the first injector, which is trained, sits before them
        tally.linear(rows, width, 3 * width)
        tally.attend(images * tokens**2, width)
        tally.linear(rows, width, width)
        tally.linear(rows, width, gates * vision.ffn)
        tally.linear(rows, vision.ffn, width)


def _count_stem(tally: Tally, stem: int, width: int, images: int, side: int) -> None:
    pixels, seen = images * (side // 2) ** 2, False
    for inputs in (3, stem, stem):
        seen = tally.conv(pixels, 9, inputs, stem, seen)
    widths = (stem, 2 * stem, 4 * stem, 4 * stem)
    for level, channels in enumerate(widths):
        pixels = images * (side // 4 >> level) ** 2
        if level:
            tally.conv(pixels, 9, widths[level - 1], channels)
        tally.conv(pixels, 1, channels, width)


def _count_resampler(
    tally: Tally, config: ResamplerConfig, batch: int, length: int, width_in: int, inputs: bool = True
) -> bool:
    """A Perceiver resampler; ``inputs``: whether what it reads needs a gradient."""
    queries, width, rows = config.queries, config.width, batch * config.queries
    seen = tally.trained
    for layer in range(config.layers):
        for _ in range(3):
            own = tally.linear(rows, width, width, seen)
        tally.attend(batch * queries**2, width, own, own)
        seen = tally.linear(rows, width, width, own)
        if layer % config.cross_every == 0:
            own = tally.linear(rows, width, width, seen)
            for _ in range(2):
                read = tally.linear(batch * length, width_in, width, inputs)
            own = tally.attend(batch * queries * length, width, own, read)
            seen = tally.linear(rows, width, width, own) or seen
        seen = tally.linear(rows, width, config.ffn, seen)
        seen = tally.linear(rows, config.ffn, width, seen)
    return seen


def _count_language(tally: Tally, model: ModelConfig, holds: Holds) -> None:
    language, rows = model.language, holds.tokens
    width, head = language.width, language.width // language.heads
    grid = model.vision.image_size // model.vision.patch_size
    positions = [height * across for height, across in pyramid_shapes(grid)]
    for layer in range(language.layers):
        if has_mmfs(language, layer):
            looked_at = holds.images * sum(positions[level] for level in language.mmfs.levels)
            tally.at("MMFS", True)
            _count_mmfs(tally, language.mmfs, rows, width, looked_at, holds.images, model.vision.width)
        tally.at("LLM", not language.frozen)
        tally.linear(rows, width, (language.heads + 2 * language.kv_heads) * head)
        tally.attend(holds.pairs, width)
        tally.linear(rows, width, width)
        tally.linear(rows, width, 2 * language.ffn)
        tally.linear(rows, language.ffn, width)
    _count_head(tally, language, rows)


def _count_head(tally: Tally, language: LanguageConfig, rows: int) -> None:
    tally.at("LLM head", not language.frozen)
    tally.linear(rows, language.width, padded_vocabulary(language))
    if language.train_image_tokens:
        tally.at("LLM head", True)
        tally.linear(rows, language.width, IMAGE_ROWS)


def _count_mmfs(
    tally: Tally, mmfs: MMFSConfig, queries: int, width: int, positions: int, images: int, maps_width: int,
    inputs: bool = True, maps: bool = True, out: int | None = None,
) -> bool:  # fmt: skip
    """MMFS of ``queries`` rows of ``width`` to ``positions`` of ``images``; ``inputs`` and ``maps``:
    whether queries and maps need a gradient."""
    inner, table = mmfs.value_width, mmfs.table_rows
    reach = table if mmfs.max_images is None else min(table, mmfs.max_images + 1)
    if mmfs.kind == "dense":
        query = tally.linear(queries, width, inner, inputs)
        for _ in range(2):
            value = tally.linear(positions, maps_width, inner, maps)
        head = inner // mmfs.heads
        query = tally._add(2 * queries * inner * reach, query, query and tally.trained) or query
        pairs = mmfs.heads * queries * (positions + 1)  # one key more is the sink
        found = tally.attend(pairs, head + images + 1, query, value, head)  # a channel more for each image
    else:
        query = tally.linear(queries, width, width, inputs)
        projected = mmfs.heads * mmfs.points * (2 + len(mmfs.levels))
        tally.linear(queries, width, projected, query)
        tally.linear(reach, width, projected, tally.trained)
        found = tally.linear(positions, maps_width, inner, maps) or query
    return tally.linear(queries, inner, width if out is None else out, found)


def _count_decoder(tally: Tally, model: ModelConfig, holds: Holds) -> None:
    decoder, width, drawn = model.decoder, model.language.width, holds.drawn
    trained = not decoder.frozen
    if decoder.vae is not None:
        count_vae(tally.at("VAE", False, backward=False), decoder.vae, decoder.image_size, drawn)
    shrinks = 1 if decoder.vae is None else 2 ** (len(decoder.vae.channels) - 1)
    channels = 3 if decoder.vae is None else decoder.vae.latent_channels
    tally.at("decoder resampler", trained)
    tally.linear(drawn * holds.context, width, width)
    _count_resampler(tally, decoder.resampler, drawn, holds.context, width)
    grid = model.vision.image_size // model.vision.patch_size
    positions = sum(pyramid_shapes(grid)[level][0] ** 2 for level in decoder.mmfs.levels)

    def look(pixels: int, width: int, inputs: bool) -> bool:
        """MMFS on a feature map of the U-Net."""
        tally.at("U-Net MMFS", trained)
        looked_at = holds.referenced * positions
        found = _count_mmfs(
            tally,
            decoder.mmfs,
            pixels,
            width,
            looked_at,
            holds.referenced,
            model.vision.width,
            inputs or trained,
        )
        found = tally.linear(pixels, width, width, found)
        tally.at("U-Net", trained)
        return found

    tally.at("U-Net", trained)
    looks = look if decoder.mmfs.kind != "none" else None
    count_unet(tally, decoder, drawn, decoder.image_size // shrinks, channels, looks)
