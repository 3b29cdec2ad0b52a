"""What travels between pipeline stages: one flat tensor [rows, 1, width].

First come the hidden states of this tensor-parallel rank, then, as further rows, the maps that later
stages look at. Each tensor-parallel rank carries an equal share of their positions and gathers all
of them once, where the next stage begins; backwards, the gradients of the stage's layers and drawn
images are summed over the ranks there, and each rank sends back its share. So a map's gradient adds
up from the last stage to the first, in the dtype of the parameters.

Stages exchange the shape of every payload, so micro-batches may differ in tokens and images.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from mmi_megatron.config import ModelConfig
from mmi_megatron.model.language_model import has_mmfs
from mmi_megatron.model.mm_interleaved import Inputs

Shapes = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Route:
    """The maps that cross one border between stages; the same on both sides of it.

    Attributes:
        images, positions: of the micro-batch, and of one image's maps.
        wanted: int64 [P], which of the images x positions travel, ascending.
    """

    images: int
    positions: int
    wanted: Tensor

    @property
    def share(self) -> int:
        """Positions that each tensor-parallel rank carries; the last may be filled up."""
        return -(-len(self.wanted) // parallel_state.get_tensor_model_parallel_world_size())


def route(inputs: Inputs, config: ModelConfig, shapes: Shapes, layer: int) -> Route:
    """The maps that the layers from ``layer`` on and the image decoder look at.

    Args:
        inputs: the micro-batch; its pixels are not read.
        config: the model.
        shapes: (height, width) of the pyramid's levels.
        layer: first layer behind the border.
    """
    images, language, decoder = len(inputs.images), config.language, config.decoder
    wanted = torch.zeros(images, len(shapes), dtype=torch.bool)
    if any(has_mmfs(language, later) for later in range(layer, language.layers)):
        wanted[:, language.mmfs.levels] = True  # its own visual tokens see every image
    if config.loss.next_image and decoder.mmfs.kind != "none":
        for first, last in inputs.references.tolist():
            wanted[first:last, decoder.mmfs.levels] = True
    sizes = torch.tensor([height * width for height, width in shapes])
    each = wanted.repeat_interleave(sizes, 1)
    return Route(images, each.shape[1], each.flatten().nonzero()[:, 0])


def pack(hidden: Tensor, maps: Tensor, route: Route) -> Tensor:
    """The payload of this rank.

    Args:
        hidden: [t, 1, width].
        maps: [I, S, C], whose gradient is this rank's part.
        route: of the border ahead.

    Returns:
        [t + rows, 1, width], rows = ceil(route.share * C / width).
    """
    width, share = hidden.shape[-1], route.share
    start = parallel_state.get_tensor_model_parallel_rank() * share
    mine = route.wanted[start : start + share].to(maps.device)
    values = maps.flatten(0, 1).index_select(0, mine).flatten()
    total = -(-share * maps.shape[-1] // width) * width
    rows = F.pad(values, (0, total - len(values))).view(-1, 1, width)
    return torch.cat([hidden, rows.to(hidden.dtype)])


def unpack(payload: Tensor, tokens: int, channels: int, route: Route) -> tuple[Tensor, Tensor]:
    """Undo ``pack`` on all tensor-parallel ranks (collective).

    Args:
        payload: [tokens + rows, 1, width].
        tokens: t of ``pack``.
        channels: C of the maps.
        route: of the border behind.

    Returns:
        hidden [t, 1, width], and maps [I, S, C]: zero where they did not travel, their gradients
        summed over the tensor-parallel ranks.
    """
    hidden, rows = payload.split([tokens, len(payload) - tokens])
    share = route.share
    values = rows.flatten()[: share * channels].view(share, channels)
    every = gather_from_sequence_parallel_region(values)[: len(route.wanted)] if share else values
    maps = every.new_zeros(route.images * route.positions, channels)
    maps = maps.index_copy(0, route.wanted.to(maps.device), every)
    return hidden, maps.view(route.images, route.positions, channels)
