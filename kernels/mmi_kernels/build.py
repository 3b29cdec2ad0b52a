"""Builds the compiled operators: ``python -m mmi_kernels.build``.

One shared library holds the kernels for every instruction set of the processor's family; the one
to run is chosen when it is loaded, so a library built on one machine runs on an older one. It is
named after a fingerprint of the sources and the flags, lies inside the package (or in the user's
cache where the package is read-only), and is put there by one rename, so that any number of
processes may build or import at once. It links against libtorch's stable ABI: a library built with
one version of torch is used with all from 2.10 on, and on machines without a compiler.

The CUDA kernels are part of it where nvcc is found, whether or not there is a GPU; FORCE_CUDA=1 makes
a missing nvcc an error, FORCE_CUDA=0 leaves them out.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from mmi_kernels.library import (
    CUDA_TARGETS,
    FLAGS,
    INSTRUCTION_SETS,
    NVCC_FLAGS,
    SOURCES,
    STABLE_ABI,
    VALUE_TYPES,
    find,
    fingerprint,
    folders,
)


class BuildError(RuntimeError):
    """The compiler is missing or refused a source; the message holds its words."""


@dataclass(frozen=True)
class Unit:
    """One call of the compiler: a source and the flags that set it apart."""

    source: Path
    flags: tuple[str, ...]


def units() -> list[Unit]:
    """What is compiled on this machine's architecture."""
    names = list(INSTRUCTION_SETS) if platform.machine() in ("x86_64", "AMD64") else ["baseline"]
    kernels = [
        Unit(SOURCES / "cpu" / "deform.cpp", (*INSTRUCTION_SETS[name], f"-DMMI_KERNELS=kernels_{name}"))
        for name in names
    ]
    return [Unit(SOURCES / "cpu" / "register.cpp", torch_flags()), *kernels]


def torch_flags() -> tuple[str, ...]:
    """For sources that include libtorch's headers."""
    include = Path(torch.__file__).parent / "include"
    return (f"-DTORCH_TARGET_VERSION={STABLE_ABI}", "-isystem", str(include))


def cuda_units() -> list[Unit]:
    """What is compiled besides where nvcc is found: the registration, and the kernels a type of value."""
    targets = [f"-gencode=arch={virtual},code={real}" for real, virtual in CUDA_TARGETS.items()]
    source = SOURCES / "cuda" / "kernels.cu"
    kernels = [Unit(source, (*NVCC_FLAGS, *targets, f"-DMMI_TYPE={name}")) for name in VALUE_TYPES]
    return [*kernels, Unit(SOURCES / "cuda" / "register.cpp", torch_flags())]


def nvcc() -> str | None:
    """Path of nvcc (on the PATH or below CUDA_HOME) where the CUDA kernels are to be compiled.

    Raises:
        BuildError: FORCE_CUDA=1 and there is none.
    """
    force = os.environ.get("FORCE_CUDA")
    if force == "0":
        return None
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which("nvcc") or shutil.which(str(Path(home) / "bin" / "nvcc"))
    if found is None and force == "1":
        raise BuildError(f"FORCE_CUDA=1, but nvcc is neither on the PATH nor in {home}/bin; set CUDA_HOME")
    return found


def compiler() -> str:
    """Path of the C++ compiler: ``CXX`` or the first of g++, c++, clang++.

    Raises:
        BuildError: when there is none.
    """
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    for name in wanted:
        if path := shutil.which(name):
            return path
    raise BuildError(f"no C++ compiler: looked for {', '.join(wanted)}; install one or set CXX")


def build(*, force: bool = False) -> Path:
    """Compile the library unless one that fits exists already.

    One that exists is used as long as no source and no flag changed, unless it lacks the CUDA
    kernels and nvcc is there.

    Args:
        force: compile in any case.

    Returns:
        Path of the library.

    Raises:
        BuildError: no compiler, or it failed; nothing is left behind.
    """
    cuda = nvcc()
    existing = find()
    if existing and not force and (cuda is None or "nvcc" in _manifest(existing)):
        return existing
    tool = compiler()
    versions = {"compiler": _version(tool)} | ({"nvcc": _version(cuda)} if cuda else {})
    folder = _writable_folder()
    target = folder / f"mmi_kernels-{fingerprint()}.so"
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        library = Path(scratch) / target.name
        _compile(tool, cuda, Path(scratch), library)
        manifest = {**versions, "torch": torch.__version__, "flags": FLAGS, "sets": INSTRUCTION_SETS}
        described = library.with_suffix(".json")
        described.write_text(json.dumps(manifest, indent=1))
        os.replace(described, target.with_suffix(".json"))
        os.replace(library, target)
    return target


def _compile(tool: str, cuda: str | None, scratch: Path, library: Path) -> None:
    def one(numbered: tuple[int, Unit]) -> str:
        index, unit = numbered
        out = str(scratch / f"{index}.o")
        with_nvcc = cuda is not None and unit.source.suffix == ".cu"
        command = [cuda, "-ccbin", tool] if with_nvcc else [tool, *FLAGS]
        _run([*command, *unit.flags, "-c", str(unit.source), "-o", out])
        return out

    # The slowest first.
    everything = [*(cuda_units() if cuda else []), *units()]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(one, enumerate(everything)))
    torch_libraries = Path(torch.__file__).parent / "lib"
    linker = [cuda, "-ccbin", tool] if cuda else [tool]  # nvcc adds CUDA's runtime
    _run([*linker, "-shared", *objects, "-o", str(library), f"-L{torch_libraries}", "-ltorch_cpu", "-ldl"])


def _version(tool: str) -> str:
    """What tells a compiler's versions apart: g++ says it in its first line, nvcc in its last."""
    lines = _run([tool, "--version"]).splitlines()
    return lines[-1 if Path(tool).name == "nvcc" else 0]


def _manifest(library: Path) -> dict:
    described = library.with_suffix(".json")
    return json.loads(described.read_text()) if described.is_file() else {}


def _writable_folder() -> Path:
    tried = []
    for folder in folders():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            tried.append(str(error))
            continue
        if os.access(folder, os.W_OK):
            return folder
        tried.append(f"{folder} is not writable")
    raise BuildError(f"no folder to put the library in: {'; '.join(tried)}")


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    return done.stdout


if __name__ == "__main__":
    try:
        print(build(force="--force" in sys.argv[1:]))
    except BuildError as problem:
        sys.exit(f"mmi_kernels: {problem}")
