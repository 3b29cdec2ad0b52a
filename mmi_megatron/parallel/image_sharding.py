"""The images of a micro-batch divided over the ranks that work on its row: tensor- and context-parallel.

The visual tokenizer and the image decoder are replicated; each of these ranks takes an equal share of the
images. What comes before and after is the same on every tensor-parallel rank, and about other tokens on
every context-parallel one.

Equal is meant by number, and that is by cost. All images that are read are of one size, and so are all
that are drawn. The two kinds are worked on apart, each between exchanges that every rank waits for, so a
rank with one image fewer of the one kind has nothing to gain from one more of the other. Drawn images
differ in the length of their contexts and the number of their references. Contexts are padded to the
longest of a share (at full size 2,048 states are 0.15 TFLOP beside 1.9 of U-Net and VAE, forward): the
share with the longest one is the slowest whatever the others are, and least slow when it has no more
images than they. References cost samples of MMFS and no matrix products.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor

from mmi_megatron.model.mm_interleaved import Images
from mmi_megatron.parallel import context


def place() -> tuple[int, int]:
    """This rank's place among those that work on its row in its stage, and how many these are; context-
    parallel ranks follow each other, and within each its tensor-parallel ones."""
    tensor = parallel_state.get_tensor_model_parallel_world_size()
    first = tensor * parallel_state.get_context_parallel_rank()
    ranks = tensor * parallel_state.get_context_parallel_world_size()
    return first + parallel_state.get_tensor_model_parallel_rank(), ranks


def gather_maps(shares: Tensor) -> Tensor:
    """Maps [ranks * n, ...] from the shares [n, ...] of all ranks in the order of ``place``. What follows
    differs by rank: each has a part of their gradient, and gets the sum of its own share's."""
    return context.gather(gather_from_sequence_parallel_region(shares))


class DividedImages(Images):
    """``Images`` over the ranks that work on one row."""

    def share(self, count: int) -> Tensor:
        """This rank's images; the last share wraps around so that all are of one length."""
        rank, ranks = place()
        length = -(-count // ranks)
        return torch.arange(rank * length, (rank + 1) * length) % max(count, 1)

    def owned(self, count: int) -> int:
        """How many of ``share(count)`` are this rank's own and not there to fill up."""
        rank, ranks = place()
        length = -(-count // ranks)
        return max(0, min(length, count - rank * length))

    def gather(self, shares: Tensor, count: int) -> Tensor:
        """All images from every rank's share. What follows is the same on all tensor-parallel ranks, and
        so is the gradient: each takes its part of it. Context-parallel ranks have the gradients of the
        images' tokens that are theirs."""
        same = gather_from_sequence_parallel_region(shares, tensor_parallel_output_grad=False)
        return context.gather(same)[:count]

    def gather_maps(self, shares: Tensor, count: int) -> Tensor:
        """All images' maps from every rank's share; their gradients are summed, each rank getting
        those of its own images."""
        return gather_maps(shares)[:count]

    def spread(self, hidden: Tensor) -> Tensor:
        """All hidden states of those that tensor-parallel ranks hold alike and each context-parallel one
        of its tokens, about to be used for different images: gradients are summed."""
        return context.gather(copy_to_tensor_model_parallel_region(hidden))

    def total(self, part: Tensor) -> Tensor:
        """The sum over the ranks' images."""
        group = parallel_state.get_context_parallel_group()
        return reduce_from_tensor_model_parallel_region(reduce_from_tensor_model_parallel_region(part), group)


class ReplicatedImages(Images):
    """Every rank of the tensor-parallel group works on all images, for comparison and without context
    parallelism. What it does is the same on each, so the drawn images' gradient of the maps counts on
    the first rank alone."""

    def gather_maps(self, shares: Tensor, count: int) -> Tensor:
        """The maps as they are; their gradients are summed."""
        return copy_to_tensor_model_parallel_region(shares)

    def own_part(self, maps: Tensor) -> Tensor:
        """The maps, whose gradient is passed on by the first rank."""
        return maps if parallel_state.get_tensor_model_parallel_rank() == 0 else maps.detach()
