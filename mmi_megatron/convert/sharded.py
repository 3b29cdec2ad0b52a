"""Tensors of the plain model in a sharded checkpoint: which there are, written one after the other, and
read back.

The checkpoint is one that training writes (Megatron's ``torch_dist`` format), with the same keys, but
of weights alone; it may hold a part of a model only. Any layout reads it. ``Layout`` decides into which
files and slices it is divided, so that ranks of that layout read whole slices of their own files.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from mmi_megatron.config import LanguageConfig
from mmi_megatron.convert.rules import ConvertError
from mmi_megatron.model.language_model import has_mmfs
from mmi_megatron.parallel import plain
from mmi_megatron.train.checkpoint_folder import DRAFT, MARKER, RUN
from mmi_megatron.train.checkpoint_reader import FORMAT, read_index
from mmi_megatron.train.storage import Folder

LANGUAGE = "language_model."
MODEL = (LANGUAGE, "visual_tokenizer.", "image_decoder.")
"""How the names of the model's tensors begin; a checkpoint of a run has others besides."""

SWIGLU = "mlp.linear_fc1.weight"
"""Megatron keeps the gate above the up projection in the whole tensor, so a rank has a slice of each."""


@dataclass(frozen=True)
class Layout:
    """Tensor-parallel ranks and pipeline stages."""

    tensor: int = 1
    pipeline: int = 1

    @classmethod
    def parse(cls, text: str) -> Layout:
        """From ``tp=2,pp=2``. Raises ConvertError for anything else."""
        found = dict(re.findall(r"(tp|pp)=(\d+)(?:,|$)", text))
        if not found or ",".join(f"{key}={value}" for key, value in found.items()) != text:
            raise ConvertError(f"--layout {text!r}: expected tp=N, pp=N or tp=N,pp=N")
        layout = cls(int(found.get("tp", 1)), int(found.get("pp", 1)))
        if layout.tensor < 1 or layout.pipeline < 1:
            raise ConvertError(f"--layout {text!r}: expected at least 1 of each")
        return layout


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint.

    Attributes:
        key: its name there.
        names: tensors of the plain model that it is made of.
        place: where in the model, from 0 to 1: the stages divide that among themselves.
        rule: between these and the tensor as ranks hold it.
    """

    key: str
    names: tuple[str, ...]
    place: float
    rule: plain.Rule

    def join(self, tensors: list[Tensor]) -> Tensor:
        """The whole tensor from the plain ones."""
        return self.rule.join(tensors, 1)[0]

    def part(self, whole: Tensor) -> list[Tensor]:
        """The plain tensors from the whole one."""
        return self.rule.part([whole])

    def axis(self, like: list[Tensor], ranks: int) -> int | None:
        """The axis that is divided over ranks; None where all hold everything.

        Raises:
            ConvertError: when it does not divide.
        """
        whole, halves = self.join(like), self.rule.join(like, 2)
        pairs = zip(whole.shape, halves[0].shape, strict=True)
        found = next((axis for axis, (a, b) in enumerate(pairs) if a != b), None)
        if found is not None and whole.shape[found] % (ranks * self.blocks):
            raise ConvertError(f"--layout: {self.key}, {tuple(whole.shape)}, does not divide over tp={ranks}")
        return found

    @property
    def blocks(self) -> int:
        """Parts of the whole tensor that are each divided over the ranks."""
        return 2 if self.key.endswith(SWIGLU) else 1


def entries(names: Iterable[str], language: LanguageConfig | None) -> list[Entry]:
    """Tensors of a checkpoint that holds these tensors of the plain model.

    Args:
        names: of the plain ``MMInterleaved``.
        language: settings of the language model, where there are tensors of it.

    Raises:
        ValueError: when a tensor of the language model has no place, or a part of one is missing.
    """
    names = list(names)
    rest = {name for name in names if name.startswith(LANGUAGE)}
    made = []
    for key, rule, place in _language_rules(language) if language and rest else ():
        wanted = tuple(LANGUAGE + name for name in rule.plain)
        there = [name for name in wanted if name in rest]
        if there and len(there) < len(wanted):
            raise ValueError(f"{key}: {sorted(set(wanted) - set(there))} are missing")
        if there:
            made.append(Entry(LANGUAGE + key, wanted, place, rule))
            rest -= set(there)
    if rest:
        raise ValueError(f"no place in a checkpoint for {sorted(rest)[:8]}")
    for name in names:
        if not name.startswith(LANGUAGE):
            place = 0.0 if name.startswith("visual_tokenizer.") else 1.0
            made.append(Entry(name, (name,), place, plain._whole(name)))
    return made


def _language_rules(language: LanguageConfig) -> Iterator[tuple[str, plain.Rule, float]]:
    for key, rule in plain.outer_rules(language).items():
        yield key, rule, 0.0 if "embedding" in key else 1.0
    for layer in range(language.layers):
        for key, rule in plain.layer_rules(language, has_mmfs(language, layer)).items():
            below = plain.Rule(tuple(f"layers.{layer}.{name}" for name in rule.plain), rule.join, rule.part)
            yield f"decoder.layers.{layer}.{key}", below, layer / language.layers


# Writing


@contextmanager
def draft(out: Path) -> Iterator[Path]:
    """A path beside ``out`` to write at; it becomes ``out`` when all is well, and goes when not.

    Raises:
        ConvertError: when ``out`` is there already, or in no file system of this machine.
    """
    if re.match(r"\w+:/", str(out)):
        raise ConvertError(f"{out}: written to local paths only; name one, and copy it there afterwards")
    if out.exists():
        raise ConvertError(f"{out} exists; delete it or name another")
    path = out.with_name(out.name + DRAFT)
    _remove(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield path
        path.rename(out)
    except BaseException:
        _remove(path)
        raise


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class _File:
    """A file of a checkpoint: tensors one after the other, hashed on the way."""

    def __init__(self, path: Path):
        self.name, self.bytes, self.hash = path.name, 0, hashlib.sha256()
        self.stream = path.open("wb")

    def write(self, tensor: Tensor) -> _StorageInfo:
        """Append a tensor; where it is."""
        buffer = io.BytesIO()
        torch.save(tensor.clone(memory_format=torch.contiguous_format), buffer)
        data = buffer.getbuffer()
        self.stream.write(data)
        self.hash.update(data)
        place = _StorageInfo(self.name, self.bytes, len(data))
        self.bytes += len(data)
        return place

    def close(self) -> dict[str, Any]:
        """What the checkpoint's marker says of it."""
        self.stream.close()
        return {"bytes": self.bytes, "sha256": self.hash.hexdigest()}


def write(
    out: Path,
    things: list[Entry],
    like: Mapping[str, Tensor],
    read: Callable[[str], Tensor],
    layout: Layout,
    run: dict[str, Any],
    files: Mapping[str, str],
) -> None:
    """Write a checkpoint, one whole tensor in memory at a time. It is there whole or not at all.

    Args:
        out: its folder, which must not exist.
        things: its tensors, in the order in which they are read.
        like: plain name to a tensor of that shape and dtype, without values.
        read: the values by plain name; asked for once each.
        layout: how it is divided into files and slices.
        run: goes into ``run.json`` under ``extra``.
        files: more files of text, by name.
    """
    # What cannot be divided is found before anything is written.
    axes = {
        entry.key: entry.axis([like[name] for name in entry.names], layout.tensor)
        if layout.tensor * entry.blocks > 1
        else None
        for entry in things
    }
    with draft(out) as folder:
        folder.mkdir()
        opened: dict[int, _File] = {}
        index: dict[str, Any] = {}
        results: list[WriteResult] = []
        for entry in things:
            whole = entry.join([read(name) for name in entry.names])
            stage = min(int(entry.place * layout.pipeline), layout.pipeline - 1)
            chunks: list[ChunkStorageMetadata] = []
            for rank, offsets, piece in _slices(entry, whole, axes[entry.key], layout.tensor):
                number = stage * layout.tensor + rank
                if number not in opened:
                    opened[number] = _File(folder / f"__{number}_0.distcp")
                place = opened[number].write(piece)
                where = MetadataIndex(entry.key, torch.Size(offsets), len(chunks))
                results.append(WriteResult(where, place.length, place))
                chunks.append(ChunkStorageMetadata(torch.Size(offsets), piece.shape))
            index[entry.key] = TensorStorageMetadata(TensorProperties(whole.dtype), whole.shape, chunks)
        marks = {file.name: file.close() for file in opened.values()}
        _write_index(folder, Metadata(index), results)
        steps = {"format": FORMAT, "step": 0, "frozen": None, "adam_step": 0, "schedule_step": 0}
        run = steps | {"layout": {"tensor": layout.tensor, "pipeline": layout.pipeline}, "extra": run}
        for name, text in {RUN: json.dumps(run, indent=1), **files}.items():
            (folder / name).write_text(text)
        for path in folder.iterdir():
            if path.name not in marks:
                data = path.read_bytes()
                marks[path.name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        (folder / MARKER).write_text(json.dumps(marks, indent=1))


def _slices(
    entry: Entry, whole: Tensor, axis: int | None, ranks: int
) -> Iterator[tuple[int, tuple[int, ...], Tensor]]:
    """Rank, offsets and values of every slice."""
    if axis is None:
        yield 0, (0,) * whole.ndim, whole
        return
    start = 0
    for number, piece in enumerate(whole.chunk(ranks * entry.blocks, axis)):
        offsets = [0] * whole.ndim
        offsets[axis] = start
        yield number % ranks, tuple(offsets), piece
        start += piece.shape[axis]


def _write_index(folder: Path, metadata: Metadata, results: list[WriteResult]) -> None:
    """Megatron's and torch's small files around the tensors."""
    FileSystemWriter(folder).finish(metadata, [results])
    torch.save({}, folder / "common.pt")
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))


# Reading


class Stored(Mapping[str, Tensor]):
    """The plain model's tensors in a checkpoint, read one at a time.

    Attributes:
        like: plain name to a tensor of that shape and dtype, without values.

    Args:
        folder: of the checkpoint.
        language: settings of the language model in it.

    Raises:
        CheckpointError: when its index cannot be trusted.
    """

    def __init__(self, folder: Folder, language: LanguageConfig | None):
        self.folder = folder
        self.index = read_index(folder)
        tensors = {
            key: torch.empty(value.size, dtype=value.properties.dtype, device="meta")
            for key, value in self.index.state_dict_metadata.items()
            if isinstance(value, TensorStorageMetadata) and key.startswith(MODEL)
        }
        rules = {LANGUAGE + key: rule for key, rule, _ in _language_rules(language)} if language else {}
        self._of: dict[str, tuple[str, int, plain.Rule]] = {}
        self.like: dict[str, Tensor] = {}
        for key, tensor in tensors.items():
            if key.startswith(LANGUAGE) and key not in rules:
                continue
            rule = rules.get(key, plain._whole(key))
            prefix = LANGUAGE if key in rules else ""
            for number, (name, part) in enumerate(zip(rule.plain, rule.part([tensor]), strict=True)):
                self._of[prefix + name] = key, number, rule
                self.like[prefix + name] = part
        self._last: tuple[str, list[Tensor]] = "", []

    def __getitem__(self, name: str) -> Tensor:
        key, number, rule = self._of[name]
        if self._last[0] != key:
            self._last = "", []
            self._last = key, rule.part([self._whole(key)])
        return self._last[1][number].contiguous()

    def __contains__(self, name: object) -> bool:
        return name in self.like  # the inherited one would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.like)

    def __len__(self) -> int:
        return len(self.like)

    def _whole(self, key: str) -> Tensor:
        stored = self.index.state_dict_metadata[key]
        assert isinstance(stored, TensorStorageMetadata)
        whole = torch.empty(stored.size, dtype=stored.properties.dtype)
        for number, chunk in enumerate(stored.chunks):
            place = self.index.storage_data[MetadataIndex(key, chunk.offsets, number)]
            data = self.folder.parent.read(place.relative_path, place.offset, place.offset + place.length)
            piece = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            target = whole
            for axis, (offset, size) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
                target = target.narrow(axis, offset, size)
            target.copy_(piece)
        return whole
