"""What the CUDA kernels use of a GPU, as ptxas counts it: ``python -m mmi_kernels.resources [file]``.

Writes a table of every kernel on every real architecture: registers a thread, bytes spilled, stack
and static shared memory. Needs nvcc and c++filt, but no GPU.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mmi_kernels.build import BuildError, nvcc
from mmi_kernels.library import CUDA_TARGETS, NVCC_FLAGS, SOURCES, VALUE_TYPES


@dataclass(frozen=True)
class Usage:
    """One kernel on one architecture; ``shared`` is static shared memory, bytes throughout."""

    kernel: str
    architecture: str
    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    shared: int


def usages(architecture: str, value_type: str) -> list[Usage]:
    """Compile the kernels of one type of value and read what ptxas says.

    Raises:
        BuildError: no nvcc, it refused the source, or ptxas' words are not understood.
    """
    tool = nvcc()
    if tool is None:
        raise BuildError("no nvcc: put it on the PATH or set CUDA_HOME (and not FORCE_CUDA=0)")
    with tempfile.TemporaryDirectory() as folder:
        target = f"-gencode=arch={CUDA_TARGETS[architecture]},code={architecture}"
        command = [tool, *NVCC_FLAGS, target, f"-DMMI_TYPE={value_type}", "-Xptxas", "-v", "-cubin"]
        source = str(SOURCES / "cuda" / "kernels.cu")
        done = subprocess.run(
            [*command, source, "-o", f"{folder}/kernels.cubin"], capture_output=True, text=True
        )
    if done.returncode:
        raise BuildError(f"nvcc failed for {architecture}, {value_type}:\n{done.stderr[-4000:]}")
    return parse(done.stdout + done.stderr, architecture)


def parse(text: str, architecture: str) -> list[Usage]:
    """Usages in what ``ptxas -v`` printed."""
    found = []
    for part in re.split(r"Compiling entry function '", text)[1:]:
        mangled = part[: part.index("'")]
        memory = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
        )
        registers = re.search(r"Used (\d+) registers", part)
        shared = re.search(r"(\d+) bytes smem", part)
        if memory is None or registers is None:
            raise BuildError(f"ptxas says nothing of {mangled}: {part[:400]}")
        stack, stores, loads = map(int, memory.groups())
        count = int(registers.group(1))
        size = int(shared.group(1)) if shared else 0
        found.append(Usage(readable(mangled), architecture, count, stores, loads, stack, size))
    return sorted(found, key=lambda usage: usage.kernel)


def readable(mangled: str) -> str:
    """``gather_forward<bf16, 8, 3, fused>`` from a mangled name, its arithmetic type left out."""
    done = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True)
    name = re.sub(r"\(anonymous namespace\)::|mmi::", "", done.stdout.strip())
    found = re.match(r"void (\w+)<(.*?)>\(", name)
    if found is None:
        return name
    kernel, arguments = found.group(1), found.group(2).split(", ")
    types = {"BFloat16": "bf16", "Float16": "f16", "float": "f32", "double": "f64"}
    rest = arguments[2:] if arguments[1:2] in (["float"], ["double"]) else arguments[1:]
    parameters = [types[arguments[0]], *rest]
    return f"{kernel}<{', '.join(parameters)}>".replace("true", "fused").replace("false", "general")


def table() -> str:
    """The Markdown table."""
    jobs = [(arch, value) for arch in CUDA_TARGETS if arch.startswith("sm_") for value in VALUE_TYPES]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = [usage for found in pool.map(lambda job: usages(*job), jobs) for usage in found]
    spilling = [f"{row.kernel} on {row.architecture}" for row in rows if row.spill_stores or row.spill_loads]
    version = subprocess.run([str(nvcc()), "--version"], capture_output=True, text=True, check=True)
    lines = [
        "# What the CUDA kernels use of a GPU",
        "",
        f"{datetime.date.today()}, {version.stdout.splitlines()[-1]}; by `python -m mmi_kernels.resources`.",
        "Template arguments: type of the value, channels a load and levels (0: any) where they are fixed,",
        "and which operator. Blocks have 128 threads; shared memory beyond the static one is set at launch.",
        f"Spilling: {'; '.join(spilling) or 'none'}.",
        "",
        "| kernel | architecture | registers | spill stores, bytes | spill loads, bytes | stack, bytes "
        "| static shared, bytes |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        numbers = (row.registers, row.spill_stores, row.spill_loads, row.stack, row.shared)
        lines.append(f"| {row.kernel} | {row.architecture} | " + " | ".join(map(str, numbers)) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, help="where the table goes (default: to the terminal)")
    given = parser.parse_args()
    written = table()
    if given.file:
        given.file.write_text(written)
    else:
        print(written, end="")


if __name__ == "__main__":
    main()
