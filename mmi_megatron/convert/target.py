"""Writes weight files tensor by tensor: safetensors, in shards with an index, and torch's ``.bin``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from mmi_megatron.convert.source import DTYPES

SHARD = 5 * 10**9
"""Bytes of a file at most, as transformers divides models; one tensor may be larger."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Group:
    """Tensors that are made together.

    Attributes:
        likes: name to a tensor of that shape and dtype, without values.
        values: makes them, in the order of the names.
    """

    likes: dict[str, Tensor]
    values: Callable[[], list[Tensor]]


def bytes_of(like: Tensor) -> int:
    """Bytes that a tensor takes in a file."""
    return like.numel() * like.element_size()


def write_safetensors(path: Path, groups: Iterable[Group], shard: int = SHARD) -> None:
    """Write ``path``, or, where that would be larger than ``shard`` bytes, several files and an index
    (``model-00001-of-00003.safetensors``, ``model.safetensors.index.json``)."""
    ordered = sorted(groups, key=lambda group: -_width(group))  # wide types first, so that all are aligned
    shards: list[list[Group]] = [[]]
    size = 0
    for group in ordered:
        here = sum(map(bytes_of, group.likes.values()))
        if shards[-1] and size + here > shard:
            shards.append([])
            size = 0
        shards[-1].append(group)
        size += here
    if len(shards) == 1:
        _write_file(path, shards[0])
        return
    index: dict[str, str] = {}
    for number, part in enumerate(shards, 1):
        file = path.with_name(f"{path.stem}-{number:05d}-of-{len(shards):05d}{path.suffix}")
        _write_file(file, part)
        index |= {name: file.name for group in part for name in group.likes}
    total = sum(bytes_of(like) for group in ordered for like in group.likes.values())
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=1)
    path.with_name(f"{path.name}.index.json").write_text(text)


def _width(group: Group) -> int:
    return max((like.element_size() for like in group.likes.values()), default=0)


def _write_file(path: Path, groups: list[Group]) -> None:
    """One safetensors file: the length of the header, the header as JSON, the tensors in its order."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for group in groups:
        for name, like in group.likes.items():
            start, end = end, end + bytes_of(like)
            header[name] = {
                "dtype": NAMES[like.dtype],
                "shape": list(like.shape),
                "data_offsets": [start, end],
            }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for group in groups:
            for (name, like), tensor in zip(group.likes.items(), group.values(), strict=True):
                file.write(_bytes(name, like, tensor))


def _bytes(name: str, like: Tensor, tensor: Tensor) -> Any:
    """The tensor's memory, to be written to a file."""
    if tensor.shape != like.shape or tensor.dtype != like.dtype:
        raise ValueError(
            f"{name}: {tensor.dtype} {tuple(tensor.shape)}, promised {like.dtype} {tuple(like.shape)}"
        )
    flat = tensor.contiguous().flatten()
    return flat.view(torch.uint8).numpy().data if flat.numel() else b""


def write_bin(path: Path, groups: Iterable[Group]) -> None:
    """Write a flat dict of tensors as ``torch.save`` would: the file first, with room for the tensors,
    then these in their places."""
    made = list(groups)
    with FakeTensorMode():
        state = {
            name: torch.empty(like.shape, dtype=like.dtype)
            for group in made
            for name, like in group.likes.items()
        }
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(state, path)
        places = torch.load(path, weights_only=True)
    with path.open("r+b") as file:
        for group in made:
            for (name, like), tensor in zip(group.likes.items(), group.values(), strict=True):
                file.seek(places[name].untyped_storage()._checkpoint_offset)
                file.write(_bytes(name, like, tensor))
