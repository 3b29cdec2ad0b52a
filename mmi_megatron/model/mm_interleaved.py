"""The whole model: images to tokens and maps, one language model over both, images drawn from it.

The language model is handed in: the plain one of ``model.language_model`` or the sharded one of
``parallel.language_model``; both have ``embed``, ``forward``, ``token_losses`` and ``freeze``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data_pipeline.batch import Batch
from data_pipeline.rows import RowDescription, SpecialTokens, describe_stream
from mmi_megatron.config import ModelConfig, RecomputeConfig
from mmi_megatron.model.image_decoder import ImageDecoder
from mmi_megatron.model.language_model import Visibility
from mmi_megatron.model.visual_tokenizer import VisualTokenizer


@dataclass
class Inputs:
    """A micro-batch as the model takes it; T tokens, I images, J drawn images.

    Attributes:
        tokens, labels: int64 [T].
        sees: positions, attention spans and visible images of the tokens.
        placeholders: int64 [I * n], where the visual tokens go.
        images: uint8 [I, 3, h, w].
        drawn: uint8 [J, 3, H, W]; ``drawn_ids`` their image ids.
        contexts: (first, last) position in the stream of each drawn image's BOS and BoI.
        references: int32 [J, 2] on the CPU, half-open interval of the images each may look at.
        out_of_reach: images that the end of their document cannot see, the table being too short.
    """

    tokens: Tensor
    labels: Tensor
    sees: Visibility
    placeholders: Tensor
    images: Tensor
    drawn: Tensor
    drawn_ids: list[int]
    contexts: list[tuple[int, int]]
    references: Tensor
    out_of_reach: int = 0


def planes(pixels: Tensor) -> Tensor:
    """Pixels [n, h, w, 3] as batches hold them to [n, 3, h, w]."""
    return pixels.permute(0, 3, 1, 2).contiguous()


def prepare(batch: Batch, special: SpecialTokens, config: ModelConfig, device: torch.device) -> Inputs:
    """Describe a batch to the model.

    Raises:
        ValueError: when the stream's placeholders do not match its images.
    """
    language = config.language
    described = describe(batch.tokens, batch.row_starts, special, config)
    spans = batch.cu_seqlens if language.document_attention else batch.row_starts
    row_start = batch.row_starts[:-1]
    position = described.position
    if not language.document_attention:
        position = np.arange(len(batch.tokens)) - np.repeat(row_start, np.diff(batch.row_starts))
    offset = described.image_offset
    visible = described.visible + np.repeat(offset, np.diff(batch.row_starts))[:, None]
    references = described.references + offset[described.image_row][:, None]
    starts = described.context_start + row_start[described.image_row]
    bois = described.image_boi + row_start[described.image_row]
    placeholders = np.flatnonzero(batch.tokens == special.image)
    expected = len(batch.images) * config.vision.resampler.queries
    if len(bois) != len(batch.images) or len(placeholders) != expected:
        raise ValueError(
            f"the stream holds {len(bois)} BoI tokens and {len(placeholders)} placeholders for "
            f"{len(batch.images)} images of {config.vision.resampler.queries} tokens each"
        )
    drawn = batch.drawn_index
    documents = np.searchsorted(batch.cu_seqlens, bois, "right")
    per_document = np.bincount(documents) if len(documents) else np.zeros(1, int)
    reach = _reach(language.mmfs)
    return Inputs(
        tokens=torch.from_numpy(batch.tokens).long().to(device),
        labels=torch.from_numpy(batch.labels).long().to(device),
        sees=Visibility(
            position=torch.from_numpy(position).long().to(device),
            bounds=spans.tolist(),
            visible=torch.from_numpy(visible.astype(np.int32)).to(device),
        ),
        placeholders=torch.from_numpy(placeholders).to(device),
        images=planes(torch.from_numpy(batch.images).to(device)),
        drawn=planes(torch.from_numpy(batch.drawn).to(device)),
        drawn_ids=batch.image_ids[drawn].tolist(),
        contexts=list(zip(starts[drawn].tolist(), bois[drawn].tolist(), strict=True)),
        references=torch.from_numpy(references[drawn].astype(np.int32)),
        out_of_reach=int(np.maximum(per_document - reach, 0).sum()),
    )


def describe(
    tokens: np.ndarray, row_starts: np.ndarray, special: SpecialTokens, config: ModelConfig
) -> RowDescription:
    """``describe_stream`` as far as the model's image tables reach."""
    decoder = config.decoder
    return describe_stream(
        tokens,
        row_starts,
        special,
        max_images=_reach(config.language.mmfs),
        max_references=1 if decoder.references == "nearest" else _reach(decoder.mmfs),
    )


def _reach(mmfs) -> int:
    """Images that an MMFS's table reaches; row 0 is unused."""
    rows = mmfs.table_rows - 1
    return rows if mmfs.max_images is None else min(rows, mmfs.max_images)


class Images:
    """How a rank's images are chosen and brought together; here one rank holds them all."""

    def share(self, count: int) -> Tensor:
        """Indices of the images this rank works on, int64."""
        return torch.arange(count)

    def owned(self, count: int) -> int:
        """How many of ``share(count)`` count; the rest fills up to equal lengths."""
        return count

    def gather(self, shares: Tensor, count: int) -> Tensor:
        """All images [count, ...] from the ranks' shares; what follows is the same on every rank."""
        return shares

    def gather_maps(self, shares: Tensor, count: int) -> Tensor:
        """The same for maps; what follows differs by rank, and so does their gradient: each rank has a
        part of it, that of its attention heads and drawn images, and the parts are summed."""
        return shares

    def own_part(self, maps: Tensor) -> Tensor:
        """Maps for the drawn images of this rank's share, such that the ranks' gradients add up."""
        return maps

    def spread(self, hidden: Tensor) -> Tensor:
        """All hidden states [T, width] of those that each rank holds, about to be used for its images."""
        return hidden

    def total(self, part: Tensor) -> Tensor:
        """The sum of a tensor over the ranks."""
        return part


@dataclass
class Losses:
    """Losses before they are normalised.

    Attributes:
        tokens: float32 [T], next-token loss, 0 where ignored (equation 2).
        images: float32 [J], next-image loss of every drawn image (equation 3).
        zero: a zero through which every trainable parameter takes part in the backward pass.
    """

    tokens: Tensor
    images: Tensor
    zero: Tensor


class MMInterleaved(nn.Module):
    """MM-Interleaved (section 3.2).

    Args:
        config: the model.
        language: the language model, plain or sharded.
        tokenizer, decoder: the visual tokenizer and the image decoder (None without image loss). A
            stage of a pipeline that does not hold them has None too.
        images: how images are divided over ranks.
        recompute: whose activations are computed again in the backward pass.
    """

    def __init__(
        self,
        config: ModelConfig,
        language: nn.Module,
        tokenizer: VisualTokenizer | None,
        decoder: ImageDecoder | None,
        images: Images | None = None,
        recompute: RecomputeConfig | None = None,
    ):
        super().__init__()
        self.settings = config
        self.visual_tokenizer: Any = tokenizer
        self.language_model: Any = language
        self.image_decoder = decoder
        self.image_ranks = images or Images()
        self.recompute = recompute or RecomputeConfig()
        self.freeze()
        if tokenizer is not None and self.recompute.vision == "selective":
            tokenizer.vit.set_grad_checkpointing()
        if decoder is not None and self.recompute.decoder == "selective":
            decoder.unet.enable_gradient_checkpointing()

    def freeze(self) -> None:
        """Take the frozen parts out of training."""
        if self.visual_tokenizer is not None and self.settings.vision.frozen:
            self.visual_tokenizer.vit.requires_grad_(False)
        if self.settings.language.frozen:
            self.language_model.freeze()
        if self.image_decoder is not None and self.settings.decoder.frozen:
            self.image_decoder.requires_grad_(False)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Visual tokens [I, n, width] and maps [I, S, C] of images uint8 [I, 3, h, w]."""
        count = len(images)
        mine = self.image_ranks.share(count).to(images.device)
        pixels = images[mine] if count else images.new_zeros(1, *images.shape[1:])
        dtype = next(self.visual_tokenizer.parameters()).dtype
        again = self.recompute.vision == "full" and self.training
        tokens, maps = _call(self.visual_tokenizer, again, pixels.to(dtype) / 255)
        return self.image_ranks.gather(tokens, count), self.image_ranks.gather_maps(maps, count)

    def embed(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """The stream's embeddings [T, width], visual tokens among them, and the maps [I, S, C]."""
        tokens, maps = self.encode(inputs.images)
        count = len(inputs.images)
        embeddings = self.language_model.embed(inputs.tokens)
        visual = tokens[:count].flatten(0, 1).to(embeddings.dtype)
        embeddings = self.place(embeddings, visual, inputs.placeholders)
        # What nothing looks at still takes part, so that every rank has all gradients: the tokenizer
        # in a batch without images, the adapter where the language model does not look at maps.
        if not (count and self.settings.language.mmfs.kind != "none"):
            embeddings = embeddings + 0 * (tokens.sum() + maps.sum()).to(embeddings.dtype)
        return embeddings, maps[:count]

    def place(self, embeddings: Tensor, visual: Tensor, placeholders: Tensor) -> Tensor:
        """Embeddings [T, width] with visual tokens [I * n, width] in their places."""
        return embeddings.index_copy(0, placeholders, visual)

    def read(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Hidden states [T, width] after the final norm, and the images' maps [I, S, C]."""
        embeddings, maps = self.embed(inputs)
        return self.language_model(embeddings, inputs.sees, maps), maps

    def forward(self, inputs: Inputs, seed: int, step: int) -> Losses:
        """Losses of a micro-batch; the noise is keyed by (seed, step, image id)."""
        return self.losses(inputs, *self.read(inputs), seed, step)

    def losses(self, inputs: Inputs, hidden: Tensor, maps: Tensor, seed: int, step: int) -> Losses:
        """Losses of what was read: hidden states [T, width] and maps [I, S, C]."""
        images, zero = self._image_losses(inputs, hidden, maps, seed, step)
        return Losses(self.language_model.token_losses(hidden, inputs.labels), images, zero)

    def _image_losses(
        self, inputs: Inputs, hidden: Tensor, maps: Tensor, seed: int, step: int
    ) -> tuple[Tensor, Tensor]:
        count = len(inputs.drawn)
        nothing = torch.zeros(count, device=hidden.device)
        if self.image_decoder is None:
            return nothing, hidden.new_zeros(())
        if not count:
            return nothing, self.image_decoder.zero_term()
        mine = self.image_ranks.share(count)
        owned = self.image_ranks.owned(count)
        ids = [inputs.drawn_ids[j] for j in mine.tolist()]
        context, mask = self.contexts(self.image_ranks.spread(hidden), inputs.contexts, mine.tolist())
        losses = _call(
            self.image_decoder.loss,
            self.recompute.decoder == "full" and self.training,
            inputs.drawn[mine],
            context,
            mask,
            self.image_ranks.own_part(maps),
            inputs.references[mine],
            self.image_decoder.draw_keys(ids, seed, step),
        )
        zero = 0 * losses.sum() if owned == 0 else hidden.new_zeros(())
        every = nothing.index_copy(0, mine[:owned].to(nothing.device), losses[:owned])
        return self.image_ranks.total(every), zero

    @staticmethod
    def contexts(hidden: Tensor, bounds: list[tuple[int, int]], which: list[int]) -> tuple[Tensor, Tensor]:
        """States from each image's BoI back to its BOS.

        Args:
            hidden: [T, width].
            bounds: positions of BOS and BoI of the drawn images.
            which: the drawn images wanted.

        Returns:
            context [j, longest, width], BoI first, and its mask, bool [j, longest].
        """
        longest = max(bounds[j][1] - bounds[j][0] + 1 for j in which)
        back = torch.arange(longest, device=hidden.device)
        first, last = torch.tensor([bounds[j] for j in which], device=hidden.device).T
        position = last[:, None] - back
        mask = position >= first[:, None]
        return hidden[position.clamp_min(0)], mask

    @torch.no_grad()
    def draw(self, inputs: Inputs, **options) -> Tensor:
        """Draw every drawn image of the batch from its true context, uint8 [J, 3, H, W]; the options
        are those of ``draw_from``."""
        return self.draw_from(inputs, *self.read(inputs), **options)

    @torch.no_grad()
    def draw_from(
        self,
        inputs: Inputs,
        hidden: Tensor,
        maps: Tensor,
        *,
        steps: int,
        guidance: float,
        seeds: list[int],
        **options,
    ) -> Tensor:
        """The same, of what was read: hidden states [T, width] and maps [I, S, C]."""
        count = len(inputs.drawn)
        if not count:
            return inputs.drawn
        if self.image_decoder is None:
            raise ValueError("model.loss.next_image is 0: this model has no image decoder to draw with")
        mine, owned = self.image_ranks.share(count), self.image_ranks.owned(count)
        context, mask = self.contexts(self.image_ranks.spread(hidden), inputs.contexts, mine.tolist())
        pictures = self.image_decoder.sample(
            context,
            mask,
            maps,
            inputs.references[mine],
            steps=steps,
            guidance=guidance,
            generator_seeds=[seeds[j] for j in mine.tolist()],
            **options,
        )
        every = torch.zeros(count, *pictures.shape[1:], device=pictures.device)
        every[mine[:owned]] = pictures[:owned].float()
        return self.image_ranks.total(every).to(torch.uint8)


def _call(function: Callable, again: bool, *arguments):
    """The function's result; with ``again``, its activations are computed again in the backward pass."""
    return checkpoint(function, *arguments, use_reentrant=False) if again else function(*arguments)
