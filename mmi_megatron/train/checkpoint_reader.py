"""Reading checkpoints: from a local folder or an object store, only the slices that a rank needs."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies import torch as megatron_strategies
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint import FileSystemReader, Metadata
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from mmi_megatron.train import checkpoint_folder
from mmi_megatron.train.checkpoint_folder import RUN, Address
from mmi_megatron.train.storage import Folder

FORMAT = 2
AHEAD = 16
"""Slices that are fetched at the same time from an object store."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; the message names the file and what to do."""


def open_run(path: Address) -> dict[str, Any]:
    """What ``run.json`` holds, of a checkpoint that is whole.

    Raises:
        CheckpointError: for one that is not, or of another version.
    """
    path = Folder(path)
    fault = checkpoint_folder.fault(path)
    if fault is not None:
        raise CheckpointError(f"checkpoint refused: {fault}; use an older one or train without --resume")
    run = checkpoint_folder.run_of(path)
    if run["format"] != FORMAT:
        raise CheckpointError(f"{path}/{RUN}: format {run['format']}, this version reads {FORMAT}")
    return run


def read_index(path: Address) -> Metadata:
    """torch's index of a checkpoint, that of its frozen weights included; file names are relative to
    the folder of all checkpoints.

    Raises:
        CheckpointError: for an index that would run code.
    """
    whole: Metadata | None = None
    for part in checkpoint_folder.parts_of(path):
        index = _unpickled(part)
        for place in index.storage_data.values():
            place.relative_path = f"{part.name}/{place.relative_path}"
        if whole is None:
            whole = index
        else:
            whole.state_dict_metadata |= index.state_dict_metadata
            whole.storage_data |= index.storage_data
    assert whole is not None
    return whole


def shapes_of(index: Metadata) -> dict[str, tuple[int, ...]]:
    """Shape of every whole tensor."""
    tensors = index.state_dict_metadata.items()
    return {key: tuple(value.size) for key, value in tensors if isinstance(value, TensorStorageMetadata)}


def fill(path: Address, state: dict, waiting: Callable[[], object] = lambda: None) -> dict:
    """Megatron's load of sharded tensors (collective), refusing those that are missing or of another shape.
    ``waiting`` is called again and again while this rank reads.

    Raises:
        CheckpointError: naming them.
    """
    path, index = Folder(path), read_index(path)
    saved = shapes_of(index)
    wanted = [value for value in nested_values(state) if isinstance(value, ShardedTensor)]
    missing = sorted({tensor.key for tensor in wanted} - saved.keys())
    if missing:
        raise CheckpointError(
            f"{path} lacks {len(missing)} tensors of this model or optimizer, the first: {missing[:5]}; "
            "was it trained with another model, or with these parameters frozen?"
        )
    for tensor in wanted:
        if saved[tensor.key] != tuple(tensor.global_shape):
            raise CheckpointError(
                f"{path}: {tensor.key} is {saved[tensor.key]}, this model has {tuple(tensor.global_shape)}"
            )
    with path.small_files_here("metadata.json", "common.pt") as here:
        return dist_checkpointing.load(
            state, str(here), _Load(path.parent, index, waiting), strict=StrictHandling.ASSUME_OK_UNEXPECTED
        )


class _Load(megatron_strategies.TorchDistLoadShardedStrategy):
    """Megatron's strategy with a reader of our own."""

    def __init__(self, folder: Folder, index: Metadata, waiting: Callable[[], object]):
        super().__init__()
        self.folder, self.index, self.waiting = folder, index, waiting

    def load(self, sharded_state_dict: dict, checkpoint_dir: Path) -> dict:
        original = megatron_strategies._get_filesystem_reader
        reader: Callable = lambda *_, **__: _Slices(self.folder, self.index, self.waiting)  # noqa: E731
        megatron_strategies._get_filesystem_reader = reader
        try:
            return super().load(sharded_state_dict, checkpoint_dir)
        finally:
            megatron_strategies._get_filesystem_reader = original


class _Slices(FileSystemReader):
    """Reads the saved pieces of tensors that the plan asks for, and nothing else of a file.

    Args:
        folder: of all checkpoints.
        index: as ``read_index`` gives it.
        waiting: called before every few pieces.
    """

    def __init__(self, folder: Folder, index: Metadata, waiting: Callable[[], object]):
        super().__init__(folder.local or "/")
        self.folder, self.index, self.waiting = folder, index, waiting

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.index

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        with ThreadPoolExecutor(1 if self.folder.local else AHEAD) as pool:
            for start in range(0, len(plan.items), AHEAD):  # as much as is in memory at a time
                self.waiting()
                items = plan.items[start : start + AHEAD]
                for item, data in zip(items, pool.map(self._fetch, items), strict=True):
                    _give(item, data, planner)
        done: Future = Future()
        done.set_result(None)
        return done

    def _fetch(self, item: ReadItem) -> bytes:
        place = self.storage_data[item.storage_index]
        return self.folder.read(place.relative_path, place.offset, place.offset + place.length)


def _give(item: ReadItem, data: bytes, planner: LoadPlanner) -> None:
    """Hand a saved piece to the planner, of a tensor the part that it wants."""
    if item.type == LoadItemType.BYTE_IO:
        planner.load_bytes(item, io.BytesIO(data))
        return
    saved = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    for axis, (offset, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
        saved = saved.narrow(axis, offset, length)
    target = planner.resolve_tensor(item).detach()
    target.copy_(saved)
    planner.commit_tensor(item, target)


class _Unpickler(pickle.Unpickler):
    """Unpickles what torch writes as ``.metadata`` and nothing that could run code."""

    MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
    NAMES = {
        ("torch", "Size"),
        ("torch", "device"),
        ("torch.serialization", "_get_layout"),
        ("builtins", "getattr"),
        ("collections", "OrderedDict"),
        ("pathlib", "PosixPath"),
        ("pathlib._local", "PosixPath"),
    }

    def find_class(self, module: str, name: str) -> Any:
        plain = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if plain or module in self.MODULES or (module, name) in self.NAMES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's index")


def _unpickled(path: Folder) -> Metadata:
    try:
        return _Unpickler(io.BytesIO(path.read(".metadata"))).load()
    except (pickle.UnpicklingError, EOFError, AttributeError) as error:
        raise CheckpointError(f"checkpoint refused: {path}/.metadata: {error}") from error
