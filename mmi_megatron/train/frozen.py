"""Weights that are not trained: told apart from the rest, and named by their contents.

The name must not depend on how the weights are divided over ranks, so it is made of sums: every
element, mixed with its place in the whole tensor, counts once wherever it is held.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories, is_main_replica
from torch import Tensor, nn

CHUNK = 1 << 22
"""Elements hashed at a time: the mixing takes some 64-bit copies of them."""

SEEDS = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F)


def split(sharded: dict, model: nn.Module) -> tuple[dict, dict]:
    """A model's sharded state in two: what training changes, and its frozen parameters."""
    frozen = {id(parameter) for parameter in model.parameters() if not parameter.requires_grad}
    fixed = {key: value for key, value in sharded.items() if id(getattr(value, "data", None)) in frozen}
    return {key: value for key, value in sharded.items() if key not in fixed}, fixed


def digest(frozen: dict) -> str:
    """Hash of frozen weights, the same at any layout (collective); empty without such weights.

    Two 64-bit sums of mixed elements a tensor, hashed with names, shapes and dtypes. It tells weights
    apart; against someone who forges weights on purpose, ``complete.json`` holds SHA-256.

    Args:
        frozen: sharded tensors of this rank.
    """
    held = {key: copy.copy(value) for key, value in frozen.items()}
    apply_factories(held)
    sums: dict[tuple[str, str, tuple[int, ...]], list[int]] = {}
    for tensor in nested_values(held):
        if isinstance(tensor, ShardedTensor) and is_main_replica(tensor.replica_id):
            key = (tensor.key, str(tensor.dtype), tuple(tensor.global_shape))
            lanes = sums.setdefault(key, [0, 0])
            for lane, value in enumerate(_sums(tensor)):
                lanes[lane] = (lanes[lane] + value) % 2**64
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, sums)
    whole: dict[tuple[str, str, tuple[int, ...]], list[int]] = {}
    for part in everyone:
        for key, (first, second) in part.items():
            lanes = whole.setdefault(key, [0, 0])
            whole[key] = [(lanes[0] + first) % 2**64, (lanes[1] + second) % 2**64]
    if not whole:
        return ""
    text = "\n".join(f"{key} {lanes}" for key, lanes in sorted(whole.items()))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _sums(tensor: ShardedTensor) -> list[int]:
    """The two sums of this rank's part of a tensor."""
    totals = [0, 0]
    for bits, index in _elements(tensor):
        for lane, seed in enumerate(SEEDS):
            mixed = _mix(bits ^ _mix(index + _signed(seed)))
            totals[lane] += int(mixed.sum())
    return totals


def _elements(tensor: ShardedTensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Elements as integers with their flat index in the whole tensor, int64 both, piece by piece."""
    data = tensor.data.detach()
    data = data.reshape(tensor.local_shape).contiguous()
    bits = data.view(-1).view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[data.itemsize])
    rank = len(tensor.global_shape)
    strides = [1] * rank
    for axis in range(rank - 2, -1, -1):
        strides[axis] = strides[axis + 1] * tensor.global_shape[axis + 1]
    offset = tensor.global_offset[rank - len(tensor.local_shape) :]
    base = sum(o * s for o, s in zip(tensor.global_offset, strides, strict=True))
    base -= sum(o * s for o, s in zip(offset, strides[rank - len(offset) :], strict=True))
    for start in range(0, bits.numel(), CHUNK):
        place = torch.arange(start, min(start + CHUNK, bits.numel()), device=data.device)
        index, rest = torch.full_like(place, base), place
        for axis in range(data.ndim - 1, -1, -1):
            along = rest % data.shape[axis]
            rest = rest // data.shape[axis]
            index += (along + offset[axis]) * strides[rank - data.ndim + axis]
        yield bits[start : start + CHUNK].long(), index


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014) on int64, which wraps as uint64 does."""
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """A shift to the right that brings in zeros; torch's own brings in the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
