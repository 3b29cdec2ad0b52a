"""What travels between pipeline stages: one flat tensor [rows, 1, width].

First come the hidden states of this rank, then, as further rows, the maps that later stages look at.
Each of the tensor- and context-parallel ranks of a stage carries an equal share of their positions and
gathers all of them once, where the next stage begins; backwards, the gradients of the stage's layers and
drawn images are summed over these ranks there, and each sends back its share. So a map's gradient adds
up from the last stage to the first, in the dtype of the parameters.

Stages exchange the shape of every payload, so micro-batches may differ in tokens and images.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmi_megatron.config import ModelConfig
from mmi_megatron.model.language_model import has_mmfs
from mmi_megatron.model.mm_interleaved import Inputs
from mmi_megatron.parallel.image_sharding import gather_maps, place

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
        """Positions that each rank of a stage carries; the last may be filled up."""
        return -(-len(self.wanted) // place()[1])


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
    start = place()[0] * share
    mine = route.wanted[start : start + share].to(maps.device)
    values = maps.flatten(0, 1).index_select(0, mine).flatten()
    total = -(-share * maps.shape[-1] // width) * width
    rows = F.pad(values, (0, total - len(values))).view(-1, 1, width)
    return torch.cat([hidden, rows.to(hidden.dtype)])


def unpack(payload: Tensor, tokens: int, channels: int, route: Route) -> tuple[Tensor, Tensor]:
    """Undo ``pack`` on all tensor- and context-parallel ranks (collective).

    Args:
        payload: [tokens + rows, 1, width].
        tokens: t of ``pack``.
        channels: C of the maps.
        route: of the border behind.

    Returns:
        hidden [t, 1, width], and maps [I, S, C]: zero where they did not travel, their gradients
        summed over these ranks.
    """
    hidden, rows = payload.split([tokens, len(payload) - tokens])
    share = route.share
    values = rows.flatten()[: share * channels].view(share, channels)
    every = gather_maps(values)[: len(route.wanted)] if share else values
    maps = every.new_zeros(route.images * route.positions, channels)
    maps = maps.index_copy(0, route.wanted.to(maps.device), every)
    return hidden, maps.view(route.images, route.positions, channels)
