"""``mmfs_attention``, every implementation, against the float64 oracle: outputs and all gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmi_kernels import library, mmfs_attention
from mmi_kernels.build import BuildError, compiler
from tests.test_kernels_oracle import DIFFERENTIABLE, Case, compare, implementation, implementations

IMPLEMENTATIONS = implementations()
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}
LEVELS = (((4, 4),), ((5, 7), (2, 3)), ((8, 8), (4, 4), (2, 2)), ((1, 9), (3, 1)), ((1, 1),))


@st.composite
def cases(draw, dtype=None) -> Case:
    queries_a_group = draw(st.sampled_from([0, 1, 1, 2, 5]))
    groups = draw(st.integers(1, 4))
    return Case(
        images=draw(st.sampled_from([0, 1, 2, 8])),
        shapes=draw(st.sampled_from(LEVELS)),
        queries=queries_a_group * groups,
        groups=groups,
        heads=draw(st.integers(1, 3)),
        channels=draw(st.sampled_from([1, 7, 32, 64, 65])),
        points=draw(st.integers(1, 4)),
        rows=draw(st.sampled_from([1, 2, 5, 9])),
        base=draw(st.sampled_from([2.0, 3.0, 16.0])),
        sink=draw(st.booleans()),
        with_sink_value=draw(st.booleans()),
        one_reference=draw(st.booleans()),
        spread=draw(st.sampled_from([0.5, 4.0, 40.0])),
        seed=draw(st.integers(0, 10**6)),
        dtype=dtype or draw(st.sampled_from(list(TOLERANCE))),
    ).drawn()


def check(case: Case, names: list[str] = IMPLEMENTATIONS) -> None:
    expected = case.expected()
    for name in names:
        with implementation(name) as (mmfs, _):
            compare(case.run(mmfs), expected, TOLERANCE[case.dtype])


@settings(max_examples=120, deadline=None, derandomize=True)
@given(cases())
def test_drawn_shapes(case):
    check(case)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("channels", [1, 7, 32, 64, 65, 208])
def test_channels(dtype, channels):
    check(Case(channels=channels, dtype=dtype, seed=channels).drawn())


@pytest.mark.parametrize("images", [0, 1, 8])
@pytest.mark.parametrize("sink", [True, False])
def test_images(images, sink):
    check(Case(images=images, rows=10, sink=sink).drawn())


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("sink", [True, False])
def test_queries_that_see_nothing_get_the_sink_value(name, sink):
    case = Case(sink=sink).drawn()
    case.tensors["visible"][:] = 2
    with implementation(name) as (mmfs, _):
        found = case.run(mmfs)
    assert torch.equal(found["out"], case.tensors["sink_value"].expand_as(found["out"]))
    assert torch.allclose(found["sink_value"], case.tensors["grad"].sum(0), atol=1e-14)
    for other in DIFFERENTIABLE[:-1]:
        assert not found[other].any(), other


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_copied_maps_and_the_maps_in_place(dtype):
    """Many samples go through a dense copy of the maps, a few are read where they lie."""
    few = Case(queries=2, groups=2, channels=32, shapes=((9, 9), (5, 4)), dtype=dtype)
    check(few.drawn())
    check(replace(few, queries=30, groups=3, points=4, heads=1, images=2, seed=1).drawn())


def test_chunks_add_up():
    """More queries than one task takes: shares of the table's gradients are added."""
    check(Case(queries=150, groups=3, heads=1, points=1, images=2, shapes=((3, 4),), channels=3).drawn())


def test_locations_far_outside_touch_nothing():
    case = Case(sink=False, with_sink_value=False).drawn()
    case.tensors["offsets"][:, :, 0] = torch.tensor([1e30, -1e30])
    case.tensors["offsets"][:, :, 1] = torch.tensor([-3e9, 7e12])
    check(case)


@pytest.mark.parametrize("shapes", [((4, 4),), ((8, 2), (2, 4))])
def test_locations_on_pixel_lines_and_borders(shapes):
    """The derivative there is the one to the right and below; sizes are powers of two, so exact."""
    case = Case(shapes=shapes, base=4.0, queries=5, groups=1, images=2).drawn()
    grid = torch.arange(-2, 3, dtype=torch.float64) / 2
    case.tensors["offsets"] = torch.stack(torch.meshgrid(grid, grid, indexing="ij"), -1)[:, None, :3].repeat(
        1, 2, 1, 1
    )
    case.tensors["table_offsets"] = torch.zeros_like(case.tensors["table_offsets"])
    case.tensors["reference_points"] = torch.tensor(
        [[0.5, 0.5], [0, 0], [1, 1], [0.125, 0.875], [1.125, -0.125]]
    ).double()
    case.tensors["visible"] = torch.tensor([[0, 2]]).int()
    check(case)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_locations_that_are_not_finite_are_zero_samples(name, bad, dtype):
    """Value zero, no gradient, the softmax's share kept: as if the sample lay far outside."""
    case = Case(dtype=dtype, queries=4, groups=2).drawn()
    case.tensors["visible"] = torch.tensor([[0, 3], [1, 2]]).int()
    case.tensors["offsets"][1, :, 1, 0] = bad
    case.tensors["offsets"][2, 0, :, 1] = bad
    case.tensors["table_offsets"][2, 1, 0] = bad
    outside = {n: case.tensors[n].nan_to_num(1e9, 1e9, 1e9) for n in ("offsets", "table_offsets")}
    with implementation(name) as (mmfs, _):
        found, expected = case.run(mmfs), case.run(mmfs, **outside)
    for key, want in expected.items():
        assert torch.isfinite(found[key]).all(), key
        assert torch.equal(found[key], want), key


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_logit_that_is_nan_spoils_its_query_and_head_alone(name):
    case = Case(queries=3, groups=1).drawn()
    case.tensors["visible"] = torch.tensor([[0, 2]]).int()
    case.tensors["logits"][1, 0, 0, 0] = float("nan")
    with implementation(name) as (mmfs, _):
        out = case.run(mmfs)["out"]
    assert out[1, 0].isnan().all()
    assert torch.isfinite(out[[0, 2]]).all() and torch.isfinite(out[1, 1]).all()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_what_lies_under_no_sample_does_not_matter(name):
    """NaN in a pixel that no sample touches stays there."""
    case = Case(shapes=((16, 16),), base=64.0, images=1, groups=1, one_reference=True).drawn()
    case.tensors["reference_points"][:] = 0.5
    case.tensors["visible"] = torch.tensor([[0, 1]]).int()
    case.tensors["value"][:, 0] = float("nan")
    with implementation(name) as (mmfs, _):
        assert all(torch.isfinite(tensor).all() for tensor in case.run(mmfs).values())


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_large_logits_do_not_overflow(name):
    case = Case(dtype=torch.float32).drawn()
    case.tensors["logits"] *= 1000
    with implementation(name) as (mmfs, _):
        found = case.run(mmfs)
    compare(found, {"out": case.expected()["out"]}, 1e-4)
    assert all(torch.isfinite(tensor).all() for tensor in found.values())


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_do_not_matter(name, dtype):
    case = Case(channels=32, dtype=dtype).drawn()
    spread_out = {
        "value": case.tensors["value"].permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3),
        "offsets": case.tensors["offsets"].mT.contiguous().mT,
        "logits": torch.stack([case.tensors["logits"]] * 2, -1)[..., 0],
        "grad": case.tensors["grad"].mT.contiguous().mT,
        "visible": case.tensors["visible"].T.contiguous().T,
    }
    channels_apart = {"value": case.tensors["value"].mT.contiguous().mT}
    with implementation(name) as (mmfs, _):
        expected = case.run(mmfs)
        for changed in (spread_out, channels_apart):
            found = case.run(mmfs, **changed)
            compare(found, {key: tensor.double() for key, tensor in expected.items()}, TOLERANCE[dtype])
            if name != "reference":
                assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_projections_may_have_another_dtype_than_the_value(name):
    """As under autocast: a bf16 value with fp32 or bf16 projections; gradients keep their dtypes."""
    case = Case(dtype=torch.bfloat16).drawn()
    low = {n: case.tensors[n].bfloat16() for n in DIFFERENTIABLE}
    widened = {n: t.float() for n, t in low.items() if n != "value"}
    with implementation(name) as (mmfs, _):
        found, expected = case.run(mmfs, **low), case.run(mmfs, **widened)
    for key in DIFFERENTIABLE:
        assert found[key].dtype == torch.bfloat16
    assert torch.equal(found["out"], expected["out"])
    compare(found, {key: tensor.double() for key, tensor in expected.items()}, 1e-2)


@pytest.mark.parametrize("name", [n for n in IMPLEMENTATIONS if n != "reference"])
def test_the_same_bits_at_any_number_of_threads(name):
    case = Case(queries=400, groups=40, heads=3, channels=24, dtype=torch.float32).drawn()
    threads = torch.get_num_threads()
    try:
        with implementation(name) as (mmfs, _):
            runs = []
            for count in (1, 2, 3, 1):
                torch.set_num_threads(count)
                runs.append(case.run(mmfs))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(run[key], tensor) for key, tensor in runs[0].items())


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("images", [0, 2])
def test_only_what_is_asked_for_gets_a_gradient(name, images):
    """And gets one, zeros, where there is no image: Megatron asks for a gradient of every parameter."""
    case = Case(images=images).drawn()
    everything = case.run(mmfs_attention)
    for wanted in DIFFERENTIABLE:
        tensors = dict(case.tensors)
        leaf = tensors[wanted] = tensors[wanted].clone().requires_grad_()
        with implementation(name) as (mmfs, _):
            call = [tensors[n] for n in DIFFERENTIABLE[1:-1]]
            out = mmfs(
                tensors["value"], case.shapes, *call, tensors["visible"],
                base=case.base, sink_value=tensors["sink_value"],
            )  # fmt: skip
            (grad,) = torch.autograd.grad(out, leaf, tensors["grad"])
        assert torch.allclose(grad, everything[wanted], atol=1e-12), wanted


def test_the_library_is_loaded_where_there_is_a_compiler():
    try:
        compiler()
    except BuildError:
        return
    assert library.status()["implementation"] == "compiled", library.status()["reason"]
