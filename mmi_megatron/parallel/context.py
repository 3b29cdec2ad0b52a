"""Context parallelism: a row's tokens divided over ranks, and inside attention its heads.

Outside of attention each context-parallel rank works on a contiguous part of the stream, as long as any
other's. For attention an all-to-all turns the tokens of a part with all their heads into all tokens with
a part of the heads, and another one turns the output back (DeepSpeed-Ulysses, arXiv 2309.14509; Megatron
and TransformerEngine call it ``a2a``). So attention itself is the same as without, whatever the documents'
bounds are: nothing is padded, and every rank does the same work though attention is causal.

Parameters are replicated over these ranks, and each rank's gradients are those of its own tokens; they are
summed where those of data parallelism are. With one rank everything here returns what it is given.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import all_to_all, gather_from_sequence_parallel_region
from torch import Tensor


def part(whole: Tensor) -> Tensor:
    """This rank's part of what has an entry a token: [T, ...] to [T / ranks, ...].

    Raises:
        ValueError: when the ranks cannot divide T.
    """
    ranks = parallel_state.get_context_parallel_world_size()
    if len(whole) % ranks:
        raise ValueError(f"{len(whole)} tokens do not divide by parallel.context, {ranks}")
    return whole.chunk(ranks)[parallel_state.get_context_parallel_rank()]


def own(positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Which positions of the stream are in this rank's part.

    Args:
        positions: int64 [n], in the whole stream.
        length: of the part.

    Returns:
        Positions in the part, and where these stood among those given; int64 [m] both.
    """
    within = positions - parallel_state.get_context_parallel_rank() * length
    which = ((within >= 0) & (within < length)).nonzero()[:, 0]
    return within[which], which


def gather(own_part: Tensor, alike: bool = False) -> Tensor:
    """[n, ...] of every rank, one after the other: [ranks * n, ...].

    Args:
        own_part: of this rank, everywhere of the same length.
        alike: whether what follows is the same on every rank, and so is the gradient. Otherwise each rank
            has a part of it, and they are summed. Either way each rank gets that of its own entries.
    """
    group = parallel_state.get_context_parallel_group()
    return gather_from_sequence_parallel_region(own_part, tensor_parallel_output_grad=not alike, group=group)


def by_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From all heads of this rank's tokens to all tokens of this rank's heads.

    Keys and values of fewer heads than there are ranks are repeated first, so that each rank gets those
    of its queries.

    Args:
        query: [T / ranks, heads, width]; the ranks divide ``heads``.
        key, value: [T / ranks, kv_heads, width]; the ranks divide ``kv_heads``, or ``kv_heads`` the ranks.

    Returns:
        [T, heads / ranks, width], and twice [T, max(kv_heads / ranks, 1), width].
    """
    ranks = parallel_state.get_context_parallel_world_size()
    if ranks == 1:
        return query, key, value
    if (repeats := ranks // key.shape[1]) > 1:
        key, value = (x.repeat_interleave(repeats, 1) for x in (key, value))
    shares = [x.unflatten(1, (ranks, -1)).transpose(0, 1) for x in (query, key, value)]
    whole = all_to_all(parallel_state.get_context_parallel_group(), torch.cat(shares, 2))
    query, key, value = whole.flatten(0, 1).split([share.shape[2] for share in shares], 1)
    return query, key, value


def by_tokens(out: Tensor) -> Tensor:
    """Undo ``by_heads``: [T, heads / ranks, width] to [T / ranks, heads, width]."""
    ranks = parallel_state.get_context_parallel_world_size()
    if ranks == 1:
        return out
    parts = all_to_all(parallel_state.get_context_parallel_group(), out.unflatten(0, (ranks, -1)))
    return parts.transpose(0, 1).flatten(1, 2)
