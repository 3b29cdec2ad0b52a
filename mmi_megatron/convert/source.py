"""Reads other programs' weight files tensor by tensor: safetensors, and torch's ``.bin`` without running
what is in it.

A folder holds one file, several with an index that says which tensor is where
(``model.safetensors.index.json``), or several without one. Only the file that is being read is mapped
into memory, and it is mapped anew after every ``MAPPED`` bytes, so that what has been read is given back.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmi_megatron.convert.rules import ConvertError

MAPPED = 1 << 30
"""Bytes read through one mapping of a file."""

STEMS = ("model", "pytorch_model", "diffusion_pytorch_model", "open_clip_model")
"""Names of weight files in the folders of transformers, diffusers and timm."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Safetensors' names of the types that occur in models."""


class Source(Mapping[str, Tensor]):
    """The tensors of some weight files: shapes of all at once, values one at a time.

    Attributes:
        files: in the order in which they are read.
        like: name to a tensor of the same shape and dtype without values (device ``meta``).
        file_of: name to its file.

    Args:
        path: a weight file, or a folder of them.

    Raises:
        ConvertError: naming the file that is missing, truncated, no weight file or a pickle with code in
            it, or the tensors that the index and the files do not agree on.
    """

    def __init__(self, path: Path | str):
        self.files, indexed = find_files(Path(path))
        self.like: dict[str, Tensor] = {}
        self.file_of: dict[str, Path] = {}
        self._open: tuple[Path, Any] | None = None
        self._read = 0
        for file in self.files:
            for name, tensor in _contents(file).items():
                if name in self.like:
                    raise ConvertError(f"{file}: {name} is in {self.file_of[name].name} too")
                self.like[name], self.file_of[name] = tensor, file
        if indexed is not None:
            _check_index(indexed, {name: file.name for name, file in self.file_of.items()})

    def __getitem__(self, name: str) -> Tensor:
        """The tensor, copied out of its file."""
        file, like = self.file_of[name], self.like[name]
        if self._open is None or self._open[0] != file or self._read > MAPPED:
            self._open = None  # the old mapping goes before the new one comes
            self._open, self._read = (file, _opened(file)), 0
        self._read += like.numel() * like.element_size()
        opened = self._open[1]
        tensor = opened[name] if isinstance(opened, dict) else opened.get_tensor(name)
        return tensor.clone(memory_format=torch.contiguous_format)

    def __contains__(self, name: object) -> bool:
        return name in self.like  # the inherited one would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.like)

    def __len__(self) -> int:
        return len(self.like)


def find_files(path: Path) -> tuple[list[Path], Path | None]:
    """The weight files at a path, and the index that binds them, if there is one.

    Safetensors go before ``.bin``. Raises ConvertError where there is nothing to read.
    """
    if path.is_file():
        return [path], None
    if not path.is_dir():
        raise ConvertError(f"{path}: no such file or folder of weights")
    for ending in ("safetensors", "bin"):
        for stem in STEMS:
            file = path / f"{stem}.{ending}"
            if file.is_file():
                return [file], None
            if (index := path / f"{file.name}.index.json").is_file():
                return _indexed(index), index
    for pattern in ("*.safetensors", "*.bin", "*.pt", "*.pth"):
        if files := sorted(path.glob(pattern)):
            return files, None
    raise ConvertError(f"{path}: no *.safetensors or *.bin in it")


def _weight_map(index: Path) -> dict[str, str]:
    try:
        return dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConvertError(f"{index}: no index of weights ({type(error).__name__}: {error})") from None


def _indexed(index: Path) -> list[Path]:
    files = [index.parent / name for name in dict.fromkeys(_weight_map(index).values())]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ConvertError(f"{index}: names {missing[:4]}, which are not beside it")
    return files


def _check_index(index: Path, found: dict[str, str]) -> None:
    wanted = _weight_map(index)
    wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if wrong:
        name = wrong[0]
        raise ConvertError(
            f"{index}: {len(wrong)} tensors are not where it says, the first: {name}, "
            f"said to be in {wanted.get(name)}, found in {found.get(name)}"
        )


def _contents(file: Path) -> dict[str, Tensor]:
    """Shapes and dtypes of a file's tensors, without values."""
    opened = _opened(file)
    if isinstance(opened, dict):
        return {name: tensor.to("meta") for name, tensor in opened.items()}
    found = {}
    for name in opened.keys():  # noqa: SIM118  (no mapping)
        piece = opened.get_slice(name)
        kind = piece.get_dtype()
        if kind not in DTYPES:
            raise ConvertError(f"{file}: {name} is of type {kind}, which is not read here")
        found[name] = torch.empty(piece.get_shape(), dtype=DTYPES[kind], device="meta")
    return found


def _opened(file: Path) -> Any:
    """Safetensors' handle of a file, or the tensors of a ``.bin``, mapped."""
    if file.suffix == ".safetensors":
        try:
            return safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ConvertError(f"{file}: truncated, or no safetensors file ({error})") from None
    state = _unpickled(file)
    wrong = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    if wrong:
        raise ConvertError(f"{file}: expected a flat dict of tensors; others under {wrong[:4]}")
    return state


def _unpickled(file: Path) -> dict:
    try:
        with file.open("rb") as stream:
            zipped = stream.read(2) == b"PK"  # torch's format before 1.6 cannot be mapped
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        asked = f"it asks for {named[1]}" if named else str(error).split(chr(10))[0].strip()
        raise ConvertError(
            f"{file}: holds more than tensors, and loading it could run code ({asked}); "
            "have whoever made it save safetensors"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise ConvertError(f"{file}: truncated, or not written by torch.save ({error})") from None
    if not isinstance(state, dict):
        raise ConvertError(f"{file}: expected a dict of tensors, found {type(state).__name__}")
    return state
