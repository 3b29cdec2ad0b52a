"""The house rules, read off the source: which room may import which, and who may speak of CUDA."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"mmi_megatron": ROOT, "data_pipeline": ROOT, "mmi_kernels": ROOT / "kernels"}

NAMES = {"cv2": "opencv-python-headless"}
"""Packages of extras, that may not be installed, whose name is not that of their import."""

FLOORS = [
    {"", "config", "settings", "checks", "errors", "layout", "platform"},
    {"model"},
    {"parallel"},
    {"train", "generate", "evaluate", "sizing", "convert", "params", "doctor"},
    {"cli", "checkpoint_cli", "quickstart"},
]
"""Rooms of mmi_megatron from the ground up: each imports from its own floor and from those below."""

OUTSIDE = {
    "data_pipeline": {"torch", "torchvision", "megatron", "mmi_megatron", "mmi_kernels", "timm", "diffusers"},
    "mmi_kernels": {"megatron", "mmi_megatron", "data_pipeline", "timm", "diffusers"},
    "mmi_megatron.model": {"megatron", "torch.distributed", "mmi_megatron.platform", "mmi_megatron.settings"},
}
"""What a room must not import from outside it."""


def sources(package: str) -> list[Path]:
    return sorted((PACKAGES[package] / package).rglob("*.py"))


def module_name(path: Path, package: str) -> str:
    parts = path.relative_to(PACKAGES[package]).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST, module: str = "") -> Iterator[str]:
    """Full names of everything imported anywhere in a module, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def all_modules() -> Iterator[tuple[str, Path, ast.Module]]:
    for package in PACKAGES:
        for path in sources(package):
            yield module_name(path, package), path, ast.parse(path.read_text())


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def floor(module: str) -> int:
    room = (module.split(".") + [""])[1]
    found = [number for number, rooms in enumerate(FLOORS) if room in rooms]
    assert found, f"{module}: on no floor of FLOORS"
    return found[0]


def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def climbing(modules) -> list[str]:
    """Imports inside mmi_megatron that point upwards."""
    wrong = []
    for module, _, tree in modules:
        if not within(module, "mmi_megatron"):
            continue
        for name in imports(tree, module):
            if not within(name, "mmi_megatron"):
                continue
            target = name if is_module(name) else name.rpartition(".")[0]
            if floor(target) > floor(module):
                wrong.append(f"{module} imports {target}")
    return wrong


def test_arrows_point_one_way():
    assert not climbing(all_modules())


def test_rooms_do_not_import_what_is_outside_them():
    wrong = [
        f"{module} imports {name}"
        for module, _, tree in all_modules()
        for room, forbidden in OUTSIDE.items()
        if within(module, room)
        for name in imports(tree, module)
        if any(within(name, outside) for outside in forbidden)
    ]
    assert not wrong


def speaks_of_cuda(tree: ast.Module) -> list[int]:
    """Lines that name the device ``cuda``, in code or in a text that is not a docstring."""
    docstrings = {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    lines = []
    for node in ast.walk(tree):
        text = isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docstrings
        named = (isinstance(node, ast.Attribute) and node.attr == "cuda") or (
            isinstance(node, ast.Name) and node.id == "cuda"
        )
        if named or (text and re.search(r"\bcuda\b", node.value)):
            lines.append(node.lineno)
    return lines


def test_only_the_platform_speaks_of_cuda():
    wrong = {
        str(path.relative_to(ROOT)): lines
        for module, path, tree in all_modules()
        if not within(module, "mmi_kernels") and module != "mmi_megatron.platform"
        for lines in [speaks_of_cuda(tree)]
        if lines
    }
    assert not wrong


@pytest.mark.parametrize(
    "code", ["x.cuda()", "torch.cuda.synchronize()", "torch.zeros(1, device='cuda')", "f'cuda:{rank}'"]
)
def test_the_search_for_cuda_finds_it(code):
    assert speaks_of_cuda(ast.parse(code)) == [1]
    assert not speaks_of_cuda(ast.parse('"""Runs on cuda."""\nmodel_parallel_cuda_manual_seed(1)'))


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("mmi_megatron.model.x", "from mmi_megatron.parallel import groups"),
        ("mmi_megatron.parallel.x", "def f():\n    import mmi_megatron.train.loop"),
        ("mmi_megatron.config", "from mmi_megatron import cli"),
        ("mmi_megatron.train.x", "from mmi_megatron.cli import app"),
    ],
)
def test_the_search_for_arrows_finds_them(module, code):
    assert climbing([(module, Path(), ast.parse(code))])


def test_every_package_imported_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = [name for names in project["optional-dependencies"].values() for name in names]
    declared = {canonical(re.split(r"[<>=\[;~! ]", entry)[0]) for entry in project["dependencies"] + optional}
    owners = metadata.packages_distributions()
    wrong = set()
    for module, _, tree in all_modules():
        for name in imports(tree, module):
            top = name.partition(".")[0]
            if top in sys.stdlib_module_names or top in PACKAGES:
                continue
            if not {canonical(owner) for owner in owners.get(top, [NAMES.get(top, top)])} & declared:
                wrong.add(f"{module} imports {top}")
    assert not wrong


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_constraints_pin_what_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {canonical(line.partition("==")[0]) for line in lines if "==" in line}
    declared = {canonical(re.split(r"[<>=\[;~! ]", entry)[0]) for entry in project["dependencies"]}
    assert declared <= pinned
