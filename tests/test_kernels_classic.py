"""What benchmarks/kernels.py compares computes the same; the classic kernel is run by the emulation."""

from __future__ import annotations

import ctypes
import os
import shutil

import pytest
import torch

from benchmarks import classic, kernel_shapes
from benchmarks import kernels as benchmark
from benchmarks.kernel_cases import Case, check
from mmi_kernels import build, reference
from mmi_kernels.library import CUDA_TARGETS, NVCC_FLAGS
from tests.kernels_emulated import FLAGS
from tests.test_kernels_deform import draw

SHAPES = ((5, 7), (2, 3))
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture(scope="module", name="kernels")
def emulated_kernels(tmp_path_factory) -> ctypes.CDLL:
    out = tmp_path_factory.mktemp("classic") / "classic.so"
    build._run([build.compiler(), *FLAGS, "-shared", "-x", "c++", str(classic.SOURCE), "-o", str(out)])
    return classic.load(out)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("channels", [1, 7, 33])
def test_it_computes_deformable_attention(kernels, dtype, channels):
    t = draw(1, 2, 5, 2, channels, SHAPES, 3, dtype)
    leaves = [t[name] for name in ("value", "sampling_locations", "attention_weights")]
    wide = [leaf.double().requires_grad_() for leaf in leaves]
    expected = reference.ms_deform_attn(wide[0], SHAPES, *wide[1:])
    wanted = torch.autograd.grad(expected, wide, t["grad"].double())

    value, locations, weights = leaves
    levels = classic.level_table(SHAPES, value.device)
    out = classic.forward(value, levels, locations, weights, kernels)
    grad = t["grad"].view_as(out).contiguous()
    found = classic.backward(grad, value, levels, locations, weights, kernels)
    for got, want in zip((out.flatten(2), *found), (expected, *wanted), strict=True):
        error = float((got.double() - want).abs().max() / want.abs().max())
        assert error < TOLERANCE[dtype], error


def test_it_names_what_it_does_not_take(kernels):
    value = torch.zeros(1, 12, 1, 2)[:, ::2]
    levels = classic.level_table(((2, 3),), value.device)
    locations, weights = torch.zeros(1, 1, 1, 1, 1, 2), torch.zeros(1, 1, 1, 1, 1)
    with pytest.raises(ValueError, match="value: .*contiguous"):
        classic.forward(value, levels, locations, weights, kernels)
    with pytest.raises(ValueError, match="up to 1024 channels, got 1025"):
        classic.forward(torch.zeros(1, 6, 1, 1025), levels, locations, weights, kernels)


def test_nvcc_compiles_it(tmp_path):
    """For the oldest and the newest target; where there is no nvcc the emulation alone stands."""
    tool = build.nvcc()
    if tool is None:
        assert shutil.which("nvcc") is None or os.environ.get("FORCE_CUDA") == "0"
        return
    for real in ("sm_80", "sm_90"):
        target = f"-gencode=arch={CUDA_TARGETS[real]},code={real}"
        build._run(
            [tool, *NVCC_FLAGS, target, "-cubin", str(classic.SOURCE), "-o", str(tmp_path / "out.cubin")]
        )


def test_the_shapes_are_those_of_the_presets():
    assert set(kernel_shapes.load()) == set(kernel_shapes.of_presets()), (
        "a preset samples other shapes: python -m benchmarks.kernel_shapes"
    )


@pytest.mark.parametrize("place", ["language", "unet", "adapter"])
def test_all_ways_to_compute_a_case_agree(kernels, monkeypatch, place):
    monkeypatch.setattr(classic, "compiled", lambda: kernels)
    rows = 0 if place == "adapter" else 5
    site = kernel_shapes.Site(place, ("test",), 16, SHAPES, 2, 8, 3, rows, 4)
    check(Case(site, 1 if rows == 0 else 2, 3, 0.6, torch.float32, "cpu"), with_classic=True)


def test_a_wrong_result_is_not_timed(monkeypatch):
    site = kernel_shapes.Site("language", ("test",), 16, SHAPES, 2, 8, 3, 5, 4)
    case = Case(site, 1, 2, 1.0, torch.float32, "cpu")
    monkeypatch.setattr(Case, "ours", lambda self: 1.001 * Case.composition(self))
    with pytest.raises(AssertionError, match="output differs"):
        check(case, with_classic=False)


def test_the_table_has_a_line_a_pass(monkeypatch):
    monkeypatch.setattr(benchmark.CpuMeter, "copy_rate", lambda self: 1e10)
    *_, lines = benchmark.measure("cpu", 1, "quickstart: adapter, 84 queries")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    assert [line[1] for line in cells[2:]] == ["forward", "forward + backward"]
    assert {len(line) for line in cells} == {8}


class Stopwatch(benchmark.GpuMeter):
    """Runs on the CPU what the GPU's meter times."""

    def __init__(self) -> None:
        pass

    def time(self, function) -> tuple[float, ...]:
        function()
        return (1.0,)

    def peak(self, function) -> int:
        function()
        return 0


@pytest.mark.parametrize("place", ["language", "adapter"])
def test_the_gpu_table_measures_every_tier(kernels, monkeypatch, place):
    monkeypatch.setattr(classic, "compiled", lambda: kernels)
    monkeypatch.setattr(benchmark, "l1_floor", lambda case: 1e-3)
    chosen: list[int] = []
    monkeypatch.setattr(benchmark.library, "set_device_tier", chosen.append)
    rows = 0 if place == "adapter" else 5
    case = Case(
        kernel_shapes.Site(place, ("test",), 16, SHAPES, 2, 8, 3, rows, 4), 1, 2, 0.6, torch.float32, "cpu"
    )
    case.device = "cuda"
    lines = [benchmark.line(run, Stopwatch(), 1, 1e9) for run in benchmark.passes(case, "case")]
    assert [line.split("|")[2].strip() for line in lines] == ["forward", "backward"]
    assert {line.count("|") for line in [*lines, *benchmark.header(Stopwatch())]} == {13}
    assert chosen == 2 * 2 * [1, 0, 2, 0, 3, 0]
