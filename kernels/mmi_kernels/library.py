"""Finds and loads the compiled operators, and says which implementation is in use."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import platform
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

PACKAGE = Path(__file__).resolve().parent
# In an installed package the sources lie inside it, in the repository beside it.
SOURCES = next((p for p in (PACKAGE / "csrc", PACKAGE.parent / "csrc") if p.is_dir()), PACKAGE / "csrc")
PARTS = ("common", "cpu", "cuda")  # of the sources: what goes into the library
STABLE_ABI = "0x020a000000000000ULL"  # libtorch 2.10, the oldest version the library loads into
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-psabi", "-Wno-unknown-pragmas"]
FLAGS += ["-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]  # loops with floor and min vectorise
# Compiled for A100 and H100 and, as PTX, for what comes after.
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
CUDA_TARGETS = {"sm_80": "compute_80", "sm_90": "compute_90", "compute_90": "compute_90"}
VALUE_TYPES = ("f32", "f64", "bf16", "f16")  # the CUDA kernels are compiled once for each
_AVX2 = ["-mavx2", "-mfma"]
_AVX512 = [f"-mavx512{part}" for part in ("f", "bw", "dq", "vl")]
INSTRUCTION_SETS = {
    "baseline": [],
    "avx2": _AVX2,
    "avx512": [*_AVX2, *_AVX512, "-mprefer-vector-width=512"],
}


def fingerprint() -> str:
    """Sixteen hex digits over every source, every flag and the architecture.

    Not over torch's version: the library keeps to libtorch's stable ABI, so one serves them all.
    """
    digest = hashlib.sha256()
    for path in sorted(path for part in PARTS for path in (SOURCES / part).iterdir()):
        digest.update(path.relative_to(SOURCES).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    settings = [
        STABLE_ABI,
        FLAGS,
        INSTRUCTION_SETS,
        NVCC_FLAGS,
        CUDA_TARGETS,
        platform.machine(),
        sys.platform,
    ]
    digest.update(json.dumps(settings).encode())
    return digest.hexdigest()[:16]


def folders() -> Iterator[Path]:
    """Where libraries lie: inside the package, then in the user's cache."""
    yield PACKAGE / "_lib"
    yield Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmi_kernels"


def find() -> Path | None:
    """The library that fits the sources, if it has been built."""
    name = f"mmi_kernels-{fingerprint()}.so"
    return next((folder / name for folder in folders() if (folder / name).is_file()), None)


class _State:
    """What importing found: the library's path, or why there is none."""

    path: str | None = None
    reason: str = ""
    handle: ctypes.CDLL | None = None
    loaded: bool = False
    warned: bool = False


def load() -> bool:
    """Load the prebuilt library if one fits; never compiles. Returns whether it is loaded."""
    if _State.loaded:
        return True
    path = find()
    if path is None:
        _State.reason = "no library built for these sources; run `python -m mmi_kernels.build`"
        return False
    try:
        torch.ops.load_library(str(path))
        _State.handle = ctypes.CDLL(str(path))
    except OSError as error:
        _State.reason = f"{path} does not load: {error}"
        return False
    _State.handle.mmi_cpu_instruction_set.restype = ctypes.c_char_p
    _State.handle.mmi_set_cpu_instruction_set.restype = ctypes.c_bool
    _State.path, _State.reason = str(path), "prebuilt library fits the sources"
    _State.loaded = True
    return True


def compiled(device: torch.device) -> bool:
    """Whether the compiled operators run on ``device``; warns once where the reference has to."""
    if _State.loaded and (
        device.type == "cpu" or device.type == "cuda" and hasattr(_State.handle, "mmi_device_kernels_f32")
    ):
        return True
    if not _State.warned:
        _State.warned = True
        reason = f"no compiled operators for {device.type}" if _State.loaded else _State.reason
        warnings.warn(f"mmi_kernels runs its slow PyTorch reference: {reason}", stacklevel=4)
    return False


def status() -> dict[str, str | None]:
    """Which implementation runs.

    Returns:
        ``implementation`` ("compiled" or "reference", for CPU tensors), ``instruction_set`` (of the
        compiled one), ``library`` (its path) and ``reason``.
    """
    handle = _State.handle
    return {
        "implementation": "reference" if handle is None else "compiled",
        "instruction_set": None if handle is None else handle.mmi_cpu_instruction_set().decode(),
        "library": _State.path,
        "reason": _State.reason,
    }


def set_device_tier(tier: int) -> None:
    """Choose the GPU's kernels, for tests and measurements: 0 by the rule of csrc/cuda/plan.h; 1 the first
    tier alone; 2 the second's matrices and 3 its windows wherever they can run.

    Raises:
        RuntimeError: the library holds no GPU kernels.
    """
    handle = _State.handle
    if handle is None or not hasattr(handle, "mmi_set_device_tier"):
        raise RuntimeError(f"no compiled operators for a GPU: {_State.reason}")
    handle.mmi_set_device_tier(tier)


def set_instruction_set(name: str) -> bool:
    """Run the kernels of one instruction set ("avx512", "avx2", "baseline"); for tests.

    Returns:
        False when the library or the processor lacks it; nothing changes then.
    """
    handle = _State.handle
    return handle is not None and handle.mmi_set_cpu_instruction_set(name.encode())
