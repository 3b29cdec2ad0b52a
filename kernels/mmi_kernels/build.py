"""Builds the compiled operators: ``python -m mmi_kernels.build``.

One shared library holds the kernels for every instruction set of the processor's family; the one
to run is chosen when it is loaded, so a library built on one machine runs on an older one. It is
named after a fingerprint of the sources, the flags and the torch version, lies inside the package
(or in the user's cache where the package is read-only), and is put there by one rename, so that
any number of processes may build or import at once. It links against libtorch's stable ABI.
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

from mmi_kernels.library import FLAGS, INSTRUCTION_SETS, SOURCES, STABLE_ABI, find, fingerprint, folders


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
    include = Path(torch.__file__).parent / "include"
    register = (f"-DTORCH_TARGET_VERSION={STABLE_ABI}", "-isystem", str(include))
    return [Unit(SOURCES / "cpu" / "register.cpp", register), *kernels]


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

    A library is rebuilt when a source, a flag, the torch version or the compiler's version changed.

    Args:
        force: compile in any case.

    Returns:
        Path of the library.

    Raises:
        BuildError: no compiler, or it failed; nothing is left behind.
    """
    tool = compiler()
    version = _run([tool, "--version"]).splitlines()[0]
    existing = find()
    if existing and not force and _manifest(existing).get("compiler") == version:
        return existing
    folder = _writable_folder()
    target = folder / f"mmi_kernels-{fingerprint()}.so"
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        library = Path(scratch) / target.name
        _compile(tool, Path(scratch), library)
        manifest = {"compiler": version, "torch": torch.__version__, "flags": FLAGS, "sets": INSTRUCTION_SETS}
        described = library.with_suffix(".json")
        described.write_text(json.dumps(manifest, indent=1))
        os.replace(described, target.with_suffix(".json"))
        os.replace(library, target)
    return target


def _compile(tool: str, scratch: Path, library: Path) -> None:
    def one(numbered: tuple[int, Unit]) -> str:
        index, unit = numbered
        out = str(scratch / f"{index}.o")
        _run([tool, *FLAGS, *unit.flags, "-c", str(unit.source), "-o", out])
        return out

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(one, enumerate(units())))
    torch_libraries = Path(torch.__file__).parent / "lib"
    _run([tool, "-shared", *objects, "-o", str(library), f"-L{torch_libraries}", "-ltorch_cpu"])


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
    print(build(force="--force" in sys.argv[1:]))
