"""Sets up the environment in .venv: ``python bootstrap.py [EXTRA...]``, called by the Makefile.

Needs Python 3.11 or 3.12 and nothing else. torch is installed first, as a CPU build where there is
no NVIDIA driver: left to the resolver it would bring gigabytes of CUDA packages to a laptop. A stamp
of everything the environment is made from makes the next call return at once.

Environment variables: TORCH_INDEX, a package index to take torch from; pip's own are heeded.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import venv
from os import environ
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
CONSTRAINTS = ROOT / "constraints.txt"
JPEG_HEADER = Path("/usr/include/jpeglib.h")
"""Where it usually is: once it is installed, the decoder of JPEGs can be compiled."""
SOURCES = [CONSTRAINTS, ROOT / "pyproject.toml", ROOT / "setup.py", Path(__file__)]
SOURCES += sorted((ROOT / "data_pipeline" / "csrc").iterdir())


def main(extras: list[str]) -> None:
    """Make the environment hold the project with these extras, unless it does already."""
    if sys.version_info[:2] not in ((3, 11), (3, 12)):
        sys.exit(
            f"Python 3.11 or 3.12 is needed, not {sys.version.split()[0]}: make PYTHON=/path/to/python3.11"
        )
    stamp = VENV / f".stamp-{'-'.join(['run', *extras])}"
    wanted = fingerprint()
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    if not environment_fits():
        print(f"Creating .venv with Python {sys.version.split()[0]}", flush=True)
        venv.create(VENV, with_pip=True, clear=VENV.exists())
    pip("setuptools", "wheel")
    install_torch()
    print("Installing the other packages", flush=True)
    names = f"[{','.join(extras)}]" if extras else ""
    pip("--no-build-isolation", "--editable", f"{ROOT}{names}")
    for name in ("run", stamp.name.removeprefix(".stamp-")):
        (VENV / f".stamp-{name}").write_text(wanted)


def fingerprint() -> str:
    """Of all that decides what is installed."""
    machine = sys.version, has_driver(), JPEG_HEADER.exists(), environ.get("TORCH_INDEX")
    digest = hashlib.sha256(str(machine).encode())
    for path in SOURCES:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def environment_fits() -> bool:
    """Whether .venv works and is of this Python version."""
    ask = "import pip, sys; print(sys.version_info[:2])"
    if not PYTHON.exists():
        return False
    answer = subprocess.run([PYTHON, "-c", ask], capture_output=True, text=True)
    return answer.stdout.strip() == str(sys.version_info[:2])


def has_driver() -> bool:
    """Whether this machine has an NVIDIA driver."""
    return bool(shutil.which("nvidia-smi")) or Path("/proc/driver/nvidia/version").exists()


def install_torch() -> None:
    """Install the pinned torch: with CUDA where there is a driver, else a CPU build if one can be had."""
    lines = CONSTRAINTS.read_text().splitlines()
    torch = next(line for line in lines if line.startswith("torch=="))
    print(f"Installing {torch}", flush=True)
    if index := environ.get("TORCH_INDEX"):
        pip("--index-url", index, torch)
    elif has_driver():
        pip(torch)
    elif pip(f"{torch}+cpu", quiet=True):
        # On Linux the ordinary build cannot even be imported without its CUDA libraries; elsewhere
        # it is a CPU build.
        if sys.platform == "linux":
            print(
                f"No CPU build of {torch} for Python {sys.version.split()[0]} in pip's index: installing the "
                "CUDA build, several GB. Set TORCH_INDEX to an index with CPU builds to avoid this.",
                flush=True,
            )
        pip(torch)


def pip(*arguments: str, quiet: bool = False) -> int:
    """Run ``pip install`` under the constraints; with ``quiet`` a failure is not shown and returned."""
    command = [str(PYTHON), "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    done = subprocess.run([*command, "--constraint", str(CONSTRAINTS), *arguments], capture_output=quiet)
    if done.returncode and not quiet:
        sys.exit(f"pip install {' '.join(arguments)} failed; see above")
    return done.returncode


if __name__ == "__main__":
    main(sys.argv[1:])
