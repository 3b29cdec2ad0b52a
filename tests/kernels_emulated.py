"""The CUDA kernels compiled for the CPU by the emulation, as operators beside the real ones.

The library is named after a hash of its sources and lies where the package's own library does, so
it is compiled once: 4 translation units and the registration, about 15 s on one core.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch

from mmi_kernels import autograd, build, library, ops
from mmi_kernels.library import SOURCES, STABLE_ABI

TYPES = ("f32", "f64", "bf16", "f16")
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wno-psabi", "-Wno-unknown-pragmas"]
FLAGS += ["-U_FORTIFY_SOURCE"]  # it takes the emulation's longjmp between stacks for a mistake


def compile_kernels(sources: Path, folder: Path, types: tuple[str, ...], register: bool) -> Path:
    """Compile the .cu files below ``sources`` for the CPU.

    Args:
        sources: the folder csrc or a changed copy of it.
        folder: where the library and its objects go.
        types: of values, each a translation unit.
        register: with the operators ``mmi_kernels_emulated``, or the kernels alone.

    Returns:
        Path of the library.
    """
    tool = build.compiler()
    units = [
        ["-x", "c++", f"-DMMI_TYPE={name}", "-c", str(sources / "cuda" / "kernels.cu")] for name in types
    ]
    if register:
        include = Path(torch.__file__).parent / "include"
        flags = ["-DMMI_EMULATED", f"-DTORCH_TARGET_VERSION={STABLE_ABI}", "-isystem", str(include)]
        units.append([*flags, "-c", str(sources / "cuda" / "register.cpp")])

    def one(numbered: tuple[int, list[str]]) -> str:
        index, unit = numbered
        compiled = str(folder / f"{index}.o")
        build._run([tool, *FLAGS, *unit, "-o", compiled])
        return compiled

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(one, enumerate(units)))
    out = folder / "kernels.so"
    link = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-ldl"] if register else []
    build._run([tool, "-shared", "-Wl,-Bsymbolic", *objects, "-o", str(out), *link])
    return out


def fingerprint() -> str:
    digest = hashlib.sha256()
    for part in ("cuda", "common", "emulation"):
        for path in sorted((SOURCES / part).iterdir()):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    digest.update(json.dumps([FLAGS, TYPES, STABLE_ABI, torch.__version__]).encode())
    return digest.hexdigest()[:16]


@functools.cache
def loaded() -> ctypes.CDLL:
    """The emulated library, compiled if it has to be, with autograd on its operators."""
    folder = build._writable_folder()
    target = folder / f"mmi_kernels_emulated-{fingerprint()}.so"
    if not target.is_file():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            os.replace(compile_kernels(SOURCES, Path(scratch), TYPES, register=True), target)
    torch.ops.load_library(str(target))
    autograd.register("mmi_kernels_emulated")
    return ctypes.CDLL(str(target))


@contextmanager
def emulated() -> Iterator[None]:
    """Inside, the package's operators run the emulated kernels on CPU tensors."""
    loaded()
    with (
        patch.object(ops, "OPS", torch.ops.mmi_kernels_emulated),
        patch.object(library, "compiled", lambda device: True),
    ):
        yield


@contextmanager
def changed_kernels(folder: Path, value_type: str, file: str, old: str, new: str) -> Iterator[None]:
    """Inside, the emulation runs kernels for one type of value in whose source ``old`` reads ``new``.

    Raises:
        ValueError: ``old`` does not occur exactly once.
    """
    sources = folder / "csrc"
    shutil.copytree(SOURCES, sources)
    source = sources / "cuda" / file
    text = source.read_text()
    if text.count(old) != 1:
        raise ValueError(f"{file}: {text.count(old)} places read {old!r}, expected one")
    source.write_text(text.replace(old, new))
    changed = compile_kernels(sources, folder, (value_type,), register=False)
    own = loaded()
    if own.mmi_emulated_use(os.fsencode(changed)) != 1:
        raise RuntimeError(f"{changed} does not load")
    try:
        yield
    finally:
        own.mmi_emulated_use(None)
