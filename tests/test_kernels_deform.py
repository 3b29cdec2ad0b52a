"""``ms_deform_attn``, every implementation, against the float64 oracle: outputs and all gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.test_kernels_oracle import compare, implementation, implementations, oracle_deform

IMPLEMENTATIONS = implementations()
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}
LEVELS = (((4, 4),), ((5, 7), (2, 3)), ((8, 8), (4, 4), (2, 2)), ((1, 9), (3, 1)))


def draw(seed, batch, queries, heads, channels, shapes, points, dtype) -> dict[str, Tensor]:
    """Arguments and the output's gradient, no sample within rounding's reach of a pixel line."""
    generator = torch.Generator().manual_seed(seed)
    exact = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    axes = (batch, queries, heads, len(shapes), points)
    locations = (normal(*axes, 2) * 0.4 + 0.5).to(exact)
    for level, (height, width) in enumerate(shapes):
        size = torch.tensor([width, height])
        pixel = locations[:, :, :, level].double() * size - 0.5
        near = (pixel - pixel.round()).abs() < 1e-4
        locations[:, :, :, level] += (near * 1e-2 / size).to(exact)
    return {
        "value": normal(batch, sum(h * w for h, w in shapes), heads, channels).to(dtype),
        "sampling_locations": locations,
        "attention_weights": normal(*axes).to(exact),
        "grad": normal(batch, queries, heads * channels).to(dtype),
    }


def run(function, tensors: dict[str, Tensor], shapes) -> dict[str, Tensor]:
    leaves = {n: t.detach().requires_grad_() for n, t in tensors.items() if n != "grad"}
    value, *rest = leaves.values()
    out = function(value, shapes, *rest)
    if not out.requires_grad:
        return {"out": out}
    grads = torch.autograd.grad(out, list(leaves.values()), tensors["grad"].to(out.dtype))
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def check(shapes, dtype, **sizes) -> None:
    tensors = draw(shapes=shapes, dtype=dtype, **sizes)
    expected = run(oracle_deform, {n: t.double() for n, t in tensors.items()}, shapes)
    for name in IMPLEMENTATIONS:
        with implementation(name) as (_, deform):
            compare(run(deform, tensors, shapes), expected, TOLERANCE[dtype])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    batch=st.integers(0, 3),
    queries=st.sampled_from([0, 1, 4, 30]),
    heads=st.integers(1, 3),
    channels=st.sampled_from([1, 7, 32, 64, 65]),
    shapes=st.sampled_from(LEVELS),
    points=st.integers(1, 4),
    dtype=st.sampled_from(list(TOLERANCE)),
    seed=st.integers(0, 10**6),
)
def test_drawn_shapes(**case):
    check(**case)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_a_batch_boundary_inside_a_task(dtype):
    check(((3, 5),), dtype, seed=0, batch=5, queries=40, heads=2, channels=16, points=2)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 1e38])
def test_locations_that_are_not_finite_or_far_away_are_zero_samples(name, bad):
    tensors = draw(0, 2, 5, 2, 8, ((4, 6), (2, 3)), 3, torch.float32)
    tensors["sampling_locations"][1, 2, 0, 1, :, 0] = bad
    expected_tensors = {**tensors, "attention_weights": tensors["attention_weights"].clone()}
    expected_tensors["attention_weights"][1, 2, 0, 1] = 0
    with implementation(name) as (_, deform):
        found, expected = (run(deform, t, ((4, 6), (2, 3))) for t in (tensors, expected_tensors))
    assert torch.allclose(found["out"], expected["out"], atol=1e-6)
    assert not found["sampling_locations"][1, 2, 0, 1].any()
    assert not found["attention_weights"][1, 2, 0, 1].any()
    assert torch.allclose(found["value"], expected["value"], atol=1e-6)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_strides_and_a_tensor_of_shapes(name):
    shapes = ((4, 6), (2, 3))
    tensors = draw(0, 2, 5, 2, 16, shapes, 3, torch.float32)
    apart = {
        "value": tensors["value"].transpose(1, 2).contiguous().transpose(1, 2),
        "sampling_locations": tensors["sampling_locations"].flip(-1).contiguous().flip(-1).mT.contiguous().mT,
        "attention_weights": tensors["attention_weights"].mT.contiguous().mT,
        "grad": tensors["grad"].mT.contiguous().mT,
    }
    with implementation(name) as (_, deform):
        expected = run(deform, tensors, shapes)
        found = run(deform, apart, shapes)
    compare(found, {key: tensor.double() for key, tensor in expected.items()}, 1e-6)
