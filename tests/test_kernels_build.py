"""How the compiled library is built, found and loaded, and what happens without one."""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from mmi_kernels import build, library

KERNELS = library.PACKAGE.parent
ROOT = KERNELS.parent


def stand_in(path: Path, version: str) -> Path:
    """A compiler that compiles nothing and logs its calls beside itself."""
    path.write_text(
        f'#!/bin/sh\nif [ "$1" = --version ]; then echo "{version}"; exit 0; fi\n'
        f'echo "{path.name} $@" >> {path.parent}/calls\n'
        'while [ "$1" != -o ]; do shift; done\necho binary > "$2"\n'
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def installation(tmp_path, monkeypatch) -> Path:
    """A copy of the package and its sources that this process builds, with a stand-in compiler."""
    home = tmp_path / "kernels"
    shutil.copytree(KERNELS, home, ignore=shutil.ignore_patterns("_lib", "__pycache__"))
    monkeypatch.setattr(library, "PACKAGE", home / "mmi_kernels")
    for module in (library, build):
        monkeypatch.setattr(module, "SOURCES", home / "csrc")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(stand_in(tmp_path / "c++", "stand-in")))
    monkeypatch.setenv("FORCE_CUDA", "0")
    monkeypatch.setenv("PYTHONPATH", str(home))
    return home


def calls(tmp_path: Path) -> list[str]:
    """What the stand-in compilers were called with."""
    log = tmp_path / "calls"
    return log.read_text().splitlines() if log.exists() else []


def python(code: str) -> str:
    """What a new process that runs ``code`` says."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


ONE_CALL = """
import json, runpy, torch, mmi_kernels
for _ in range(2):
    weights = torch.zeros(1, 1, 1, 1, 1)
    mmi_kernels.ms_deform_attn(torch.zeros(1, 4, 1, 2), ((2, 2),), torch.zeros(1, 1, 1, 1, 1, 2), weights)
print(json.dumps(mmi_kernels.status()))
"""


def test_without_compilers_building_says_so_and_the_reference_runs(installation, tmp_path, monkeypatch):
    """As on a login node: nothing on the PATH, no CXX, no CUDA."""
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    for name in ("CXX", "FORCE_CUDA"):
        monkeypatch.delenv(name)
    said = python(
        ONE_CALL
        + """
try:
    runpy.run_module("mmi_kernels.build", run_name="__main__")
except SystemExit as stop:
    print(stop)
"""
    )
    status, problem = said.splitlines()[:2]
    assert json.loads(status)["implementation"] == "reference"
    assert problem.startswith("mmi_kernels: no C++ compiler: looked for g++, c++, clang++")
    assert said.count("slow PyTorch reference") == 1
    assert "run `python -m mmi_kernels.build`" in said


def test_a_library_is_built_once_and_again_when_a_source_changes(installation, tmp_path, monkeypatch):
    def built() -> int:
        before = len(calls(tmp_path))
        build.build()
        return len(calls(tmp_path)) - before

    complete = len(build.units()) + 1
    assert built() == complete
    assert built() == 0
    with monkeypatch.context() as elsewhere:  # what was built on another machine
        elsewhere.setenv("CXX", "no-such-compiler")
        assert built() == 0
        monkeypatch.setattr(torch, "__version__", "2.12.0")
        assert built() == 0
    source = installation / "csrc" / "common" / "bilinear.h"
    source.write_text(source.read_text() + "\n// changed\n")
    assert built() == complete
    (installation / "csrc" / "emulation" / "emulation.h").write_text("// no part of the library\n")
    assert built() == 0
    left = sorted(path.name for path in (installation / "mmi_kernels" / "_lib").iterdir())
    assert [Path(name).suffix for name in left] == [".json", ".so"] * 2


def test_cuda_is_built_where_nvcc_is_and_added_to_a_library_without(installation, tmp_path, monkeypatch):
    toolkit = tmp_path / "toolkit" / "bin"
    toolkit.mkdir(parents=True)
    stand_in(toolkit / "nvcc", "stand-in nvcc")
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nothing"))
    monkeypatch.delenv("FORCE_CUDA")
    build.build()
    assert calls(toolkit) == []

    monkeypatch.setenv("CUDA_HOME", str(toolkit.parent))
    build.build()
    commands = calls(toolkit)
    kernels = [line for line in commands if "kernels.cu" in line]
    assert len(kernels) == len(library.VALUE_TYPES) and "-shared" in commands[-1]
    for target in ("arch=compute_80,code=sm_80", "arch=compute_90,code=sm_90", "code=compute_90"):
        assert all(target in line for line in kernels)

    # The library is complete now: no compiler is called again, with nvcc or without.
    before = len(calls(tmp_path))
    build.build()
    monkeypatch.setenv("FORCE_CUDA", "0")
    build.build()
    assert (len(calls(tmp_path)), len(calls(toolkit))) == (before, len(commands))


def test_force_cuda_without_nvcc_is_refused(installation, tmp_path, monkeypatch):
    monkeypatch.setenv("FORCE_CUDA", "1")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(build.BuildError, match="FORCE_CUDA=1, but nvcc is neither on the PATH nor in"):
        build.build()


def test_a_wheel_holds_what_building_needs(installation, tmp_path, monkeypatch):
    """Made from this repository, unpacked elsewhere: the library is built from the wheel's sources."""
    project, installed = tmp_path / "project", tmp_path / "site"
    for folder in ("kernels", "mmi_megatron", "data_pipeline"):
        ignored = shutil.ignore_patterns("_lib", "__pycache__")
        shutil.copytree(ROOT / folder, project / folder, ignore=ignored)
    for file in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / file, project)
    command = [sys.executable, "setup.py", "-q", "bdist_wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=project, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    shutil.rmtree(project)
    here = {path.relative_to(KERNELS) for path in (KERNELS / "csrc").rglob("*.*")}
    there = {path.relative_to(installed / "mmi_kernels") for path in installed.rglob("csrc/*/*.*")}
    assert there == here

    before = len(calls(tmp_path))  # those of the wheel's own extension
    monkeypatch.setenv("PYTHONPATH", str(installed))
    said = python("import mmi_kernels.build; print(mmi_kernels.build.build())")
    assert Path(said.strip().splitlines()[-1]).parent == installed / "mmi_kernels" / "_lib"
    assert all(str(installed / "mmi_kernels" / "csrc") in line for line in calls(tmp_path)[before:-1])


def test_processes_may_build_at_once(installation):
    code = "import mmi_kernels.build; print(mmi_kernels.build.build(force=True))"
    builders = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [builder.wait() for builder in builders] == [0, 0, 0]
    left = sorted(path.suffix for path in (installation / "mmi_kernels" / "_lib").iterdir())
    assert left == [".json", ".so"]


def test_a_library_that_does_not_load_is_reported(installation):
    build.build()
    assert "does not load" in python(ONE_CALL)


def test_a_missing_compiler_is_named(installation, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.BuildError, match="no C\\+\\+ compiler: looked for no-such-compiler"):
        build.build()


def test_no_instruction_set_leaks_into_the_rest(tmp_path):
    """The kernels' objects define one symbol each: shared ones could be linked in for all processors."""
    if not (shutil.which("nm") and shutil.which("g++")):
        return
    for unit in build.units()[2:]:
        out = tmp_path / "kernels.o"
        flags = ["-O1" if flag == "-O3" else flag for flag in library.FLAGS]
        subprocess.run(["g++", *flags, *unit.flags, "-c", str(unit.source), "-o", str(out)], check=True)
        listed = subprocess.run(
            ["nm", "--defined-only", "--extern-only", str(out)], capture_output=True, text=True
        )
        symbols = [line.split()[1:] for line in listed.stdout.splitlines()]
        assert len(symbols) == 1 and symbols[0][0] == "T", symbols
