"""The CUDA kernels against the float64 oracle: run by the emulation, and natively on a GPU (`make gpu`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmi_kernels import library, mmfs_attention, ms_deform_attn
from tests import kernels_emulated, test_kernels_deform
from tests.test_kernels_mmfs import LEVELS, TOLERANCE, cases
from tests.test_kernels_oracle import Case, oracle_deform
from tests.test_kernels_recorded import run_module

WHERE = ["emulated", pytest.param("gpu", marks=pytest.mark.gpu)]
DTYPES = list(TOLERANCE)


def moved(tensor, device: str):
    """On a device, its strides kept: ``to`` alone closes gaps."""
    if not isinstance(tensor, Tensor):
        return tensor
    there = tensor.to(device)
    if there.stride() == tensor.stride():
        return there
    room = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    return room.copy_(there)


def on(device: str, function: Callable) -> Callable:
    """``function`` computing on a device, with tensors given and taken on the CPU."""

    def call(*arguments, **options):
        options = {name: moved(option, device) for name, option in options.items()}
        return function(*(moved(argument, device) for argument in arguments), **options).cpu()

    return call


@contextmanager
def operators(where: str, deterministic: bool = False, tier: int = 0) -> Iterator[tuple[Callable, Callable]]:
    """(mmfs_attention, ms_deform_attn) by the CUDA kernels.

    Tiers: 0 as the rule says, 1 the first alone, 2 the second's matrices and 3 its windows wherever they
    can run.
    """
    before = torch.are_deterministic_algorithms_enabled()
    set_tier = library.set_device_tier if where == "gpu" else kernels_emulated.loaded().mmi_set_device_tier
    torch.use_deterministic_algorithms(deterministic)
    set_tier(tier)
    try:
        if where == "gpu":
            yield on("cuda", mmfs_attention), on("cuda", ms_deform_attn)
        else:
            with kernels_emulated.emulated():
                yield mmfs_attention, ms_deform_attn
    finally:
        set_tier(0)
        torch.use_deterministic_algorithms(before)


def compare(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Largest error of each tensor, relative to its largest entry (at least 1/20 of all's largest).

    Where one sample has all the softmax, its logit's gradient is zero, but what the kernels and the
    oracle subtract from each other is as large as the other gradients, and so is its rounding.
    """
    assert set(expected) <= set(found)
    sizes = {name: float(want.abs().max()) if want.numel() else 0.0 for name, want in expected.items()}
    for name, want in expected.items():
        assert found[name].shape == want.shape, name
        scale = max(sizes[name], max(sizes.values()) / 20)
        error = float((found[name].double() - want).abs().max()) if want.numel() else 0.0
        assert error <= tolerance * scale, f"{name}: error {error:.2e}, scale {scale:.2e}"


def check(case: Case, where: str, deterministic: bool = False, tier: int = 0) -> None:
    with operators(where, deterministic, tier) as (mmfs, _):
        found = case.run(mmfs)
    compare(found, case.expected(), TOLERANCE[case.dtype])


@pytest.mark.parametrize("where", WHERE)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=cases(), deterministic=st.booleans())
def test_drawn_shapes(where, case, deterministic):
    check(case, where, deterministic)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 7, 20, 32, 64, 65, 208])
def test_channels(where, deterministic, dtype, channels):
    """All ways to load: 16 bytes, 8 bytes, one by one, and more channels than a warp's lanes hold."""
    check(Case(channels=channels, dtype=dtype, seed=channels).drawn(), where, deterministic)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shapes", [((4, 4),), ((6, 4), (3, 2)), ((8, 8), (4, 4), (2, 2)), ((6, 6), (4, 4), (3, 3), (2, 2))]
)
def test_kernels_for_a_number_of_levels(where, dtype, shapes):
    check(Case(channels=64, points=9, shapes=shapes, dtype=dtype, queries=4, groups=2).drawn(), where)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("images", [0, 1, 8])
@pytest.mark.parametrize("sink", [True, False])
def test_images(where, images, sink):
    check(Case(images=images, rows=10, sink=sink).drawn(), where)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("deterministic", [False, True])
def test_more_queries_than_a_block_and_a_chunk_take(where, deterministic):
    case = Case(queries=90, groups=3, heads=1, points=2, images=2, shapes=((3, 4),), channels=3)
    check(case.drawn(), where, deterministic)


@pytest.mark.parametrize("where", WHERE)
def test_maps_of_more_than_one_tile(where):
    """The deterministic mode cuts a level of many positions into tiles with an owner each."""
    case = Case(
        queries=40, groups=2, heads=1, channels=65, images=2, shapes=((17, 15), (4, 3)), dtype=torch.float32
    )
    check(case.drawn(), where, deterministic=True)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("name", ["A", "B", "D"])
def test_the_released_module_is_reproduced(where, name):
    with operators(where) as (mmfs, _):
        found, expected = run_module(mmfs, name)
    for key, want in expected.items():
        error = float((found[key] - want).abs().max())
        assert error < 1e-10, f"{key}: {error:.2e}"


@pytest.mark.parametrize("where", WHERE)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    batch=st.integers(0, 3),
    queries=st.sampled_from([0, 1, 4, 30]),
    heads=st.integers(1, 3),
    channels=st.sampled_from([1, 7, 32, 64, 65]),
    shapes=st.sampled_from(LEVELS),
    points=st.integers(1, 5),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 10**6),
    deterministic=st.booleans(),
)
def test_the_general_operator(where, shapes, dtype, deterministic, **sizes):
    tensors = test_kernels_deform.draw(shapes=shapes, dtype=dtype, **sizes)
    widened = {name: tensor.double() for name, tensor in tensors.items()}
    expected = test_kernels_deform.run(oracle_deform, widened, shapes)
    with operators(where, deterministic) as (_, deform):
        found = test_kernels_deform.run(deform, tensors, shapes)
    compare(found, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 1e30])
def test_locations_that_are_not_finite_are_zero_samples(where, deterministic, bad):
    case = Case(dtype=torch.float32, queries=4, groups=2).drawn()
    case.tensors["visible"] = torch.tensor([[0, 3], [1, 2]]).int()
    case.tensors["offsets"][1, :, 1, 0] = bad
    case.tensors["table_offsets"][2, 1, 0] = bad
    far = {n: case.tensors[n].nan_to_num(1e9, 1e9, 1e9) for n in ("offsets", "table_offsets")}
    expected = case.run(mmfs_attention, **far)
    with operators(where, deterministic) as (mmfs, _):
        found = case.run(mmfs)
    compare(found, {name: tensor.double() for name, tensor in expected.items()}, 1e-5)


@pytest.mark.parametrize("where", WHERE)
def test_a_logit_that_is_nan_spoils_its_query_and_head_alone(where):
    case = Case(queries=3, groups=1, channels=32, dtype=torch.float32).drawn()
    case.tensors["visible"] = torch.tensor([[0, 2]]).int()
    case.tensors["logits"][1, 0, 0, 0] = float("nan")
    with operators(where) as (mmfs, _):
        out = case.run(mmfs)["out"]
    assert out[1, 0].isnan().all()
    assert torch.isfinite(out[[0, 2]]).all() and torch.isfinite(out[1, 1]).all()


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("tier", "dtype"), [(1, torch.float32), (2, torch.bfloat16)])
def test_what_lies_under_no_sample_does_not_matter(where, deterministic, tier, dtype):
    """Nor does the gradient of a query that touches no pixel; tensor cores multiply both by zero."""
    case = Case(
        shapes=((16, 16),), base=64.0, images=1, groups=1, channels=8, one_reference=True, dtype=dtype
    )
    case = case.drawn()
    case.tensors["reference_points"][:] = 0.5
    case.tensors["visible"] = torch.tensor([[0, 1]]).int()
    case.tensors["value"][:, 0] = float("nan")
    case.tensors["offsets"][1] = 1e6
    finite = case.run(mmfs_attention)
    case.tensors["grad"][1] = float("inf")
    with operators(where, deterministic, tier) as (mmfs, _):
        found = case.run(mmfs)
    expected = {name: finite[name].double() for name in ("out", "value")}
    assert all(torch.isfinite(found[name]).all() for name in expected)
    compare(found, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(("tier", "dtype"), [(1, torch.float32), (2, torch.bfloat16)])
def test_what_lies_under_a_sample_spoils_it(where, tier, dtype):
    case = Case(shapes=((2, 2),), images=1, groups=1, queries=2, channels=8, spread=0.1, dtype=dtype).drawn()
    case.tensors["reference_points"][:] = 0.5
    case.tensors["visible"] = torch.tensor([[0, 1]]).int()
    case.tensors["value"][0, 1, 0, 3] = float("nan")
    with operators(where, tier=tier) as (mmfs, _):
        out = case.run(mmfs)["out"]
    assert out[:, 0, 3].isnan().all() and out[:, 0].isnan().sum() == 2 and torch.isfinite(out[:, 1]).all()


@pytest.mark.parametrize("where", WHERE)
def test_strides_do_not_matter(where):
    case = Case(channels=32, dtype=torch.bfloat16).drawn()
    apart = {
        "value": case.tensors["value"].permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3),
        "grad": case.tensors["grad"].mT.contiguous().mT,
    }
    # An odd distance between positions: 16-byte loads would not be aligned.
    odd = torch.zeros(*case.tensors["value"].shape[:3], 33, dtype=torch.bfloat16)
    odd[..., :32] = case.tensors["value"]
    with operators(where, deterministic=True) as (mmfs, _):
        expected = case.run(mmfs)
        for changed in (apart, {"value": odd[..., :32]}):
            found = case.run(mmfs, **changed)
            # (On a GPU other loads are another kernel, whose sums nvcc may contract otherwise.)
            compare(found, {key: tensor.double() for key, tensor in expected.items()}, 1e-2)
            if where == "emulated":
                assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def test_a_tensor_that_moves_keeps_its_strides(monkeypatch):
    """Or the odd distance of the test above would be gone where it matters."""
    odd = torch.arange(12.0).view(2, 6)[:, :3]
    monkeypatch.setattr(Tensor, "to", lambda self, device: self.clone(memory_format=torch.contiguous_format))
    there = moved(odd, "cpu")
    assert there.stride() == (6, 1) and there.data_ptr() != odd.data_ptr() and torch.equal(there, odd)


@st.composite
def second_tier_cases(draw) -> Case:
    """Channels in eights, queries around a tile's 64, levels around a piece's 64 pixels."""
    queries_a_group = draw(st.sampled_from([0, 1, 3, 16, 64, 65]))
    groups = draw(st.integers(1, 3)) if queries_a_group > 3 else draw(st.sampled_from([1, 5, 70]))
    return Case(
        images=draw(st.sampled_from([0, 1, 3])),
        shapes=draw(
            st.sampled_from([((4, 4),), ((9, 8), (3, 4)), ((8, 8), (1, 5)), ((17, 13), (4, 4), (2, 2))])
        ),
        queries=queries_a_group * groups,
        groups=groups,
        heads=draw(st.integers(1, 2)),
        channels=draw(st.sampled_from([8, 24, 64])),
        points=draw(st.sampled_from([1, 3, 8, 9])),
        rows=draw(st.sampled_from([1, 3, 5])),
        base=draw(st.sampled_from([3.0, 16.0])),
        sink=draw(st.booleans()),
        with_sink_value=draw(st.booleans()),
        one_reference=draw(st.booleans()),
        spread=draw(st.sampled_from([0.5, 4.0, 40.0])),
        seed=draw(st.integers(0, 10**6)),
        dtype=draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32])),
    ).drawn()


@pytest.mark.parametrize("where", WHERE)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(case=second_tier_cases(), deterministic=st.booleans())
def test_matrices(where, case, deterministic):
    check(case, where, deterministic, tier=2)


@pytest.mark.parametrize("where", WHERE)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(case=second_tier_cases())
def test_windows(where, case):
    check(case, where, tier=3)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spread", [0.3, 30.0])
@pytest.mark.parametrize(("group_size", "channels"), [(256, 24), (100, 8)])
def test_windows_of_a_grid_of_queries(where, dtype, spread, group_size, channels):
    """8 x 8 tiles of a square grid, and runs of queries where there is none; samples inside and outside."""
    case = Case(
        queries=2 * group_size, groups=2, heads=1, channels=channels, points=2, images=2, shapes=((20, 18),),
        base=20.0, spread=spread, dtype=dtype,
    ).drawn()  # fmt: skip
    case.tensors["visible"] = torch.tensor([[0, 2], [1, 2]]).int()
    expected = case.run(mmfs_attention)  # the CPU's kernels: the oracle's loops take too long here
    with operators(where, tier=3) as (mmfs, _):
        found = case.run(mmfs)
    compare(found, {name: tensor.double() for name, tensor in expected.items()}, TOLERANCE[dtype])


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("queries", [5, 66])
def test_second_tier_of_the_general_operator(where, deterministic, queries):
    shapes = ((9, 8), (3, 4))
    tensors = test_kernels_deform.draw(1, 2, queries, 2, 32, shapes, 3, torch.bfloat16)
    widened = {name: tensor.double() for name, tensor in tensors.items()}
    expected = test_kernels_deform.run(oracle_deform, widened, shapes)
    with operators(where, deterministic, tier=2) as (_, deform):
        found = test_kernels_deform.run(deform, tensors, shapes)
    compare(found, expected, TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("where", WHERE)
def test_tensor_cores_are_exact_where_the_numbers_are(where):
    """Samples on quarters of pixels, weights powers of two, small integers: no rounding anywhere."""
    generator = torch.Generator().manual_seed(0)

    def integers(*shape: int, low: int = -4, high: int = 5) -> Tensor:
        return torch.randint(low, high, shape, generator=generator).double()

    shapes = ((8, 8), (4, 16))
    locations = integers(1, 70, 1, 2, 2, 2, low=-4, high=36) / 32
    locations[:, :, :, 1] = integers(1, 70, 1, 2, 2, low=-8, high=72) / 64
    tensors = {
        "value": integers(1, 128, 1, 16).bfloat16(),
        "sampling_locations": locations.float(),
        "attention_weights": 2.0 ** -integers(1, 70, 1, 2, 2, low=0, high=2).float(),
        "grad": integers(1, 70, 16, low=-1, high=2).bfloat16(),
    }
    with operators(where, tier=2) as (_, deform):
        second = test_kernels_deform.run(deform, tensors, shapes)
    with operators(where, tier=1) as (_, deform):
        first = test_kernels_deform.run(deform, tensors, shapes)
    for name, tensor in first.items():
        assert torch.equal(second[name], tensor), name


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(("tier", "dtype"), [(1, torch.float32), (2, torch.bfloat16)])
def test_deterministic_algorithms_give_the_same_bits(where, tier, dtype):
    """Threads run in another order each time; without the mode, sums of atomics show it. (On a GPU it
    takes many blocks for that.)"""
    queries = 70 if where == "emulated" else 70_000
    case = Case(queries=queries, groups=2, heads=1, channels=16, images=2, shapes=((2, 2),), dtype=dtype)
    case = case.drawn() if where == "emulated" else case.drawn(margin=0)
    case.tensors["visible"] = torch.tensor([[0, 2], [0, 2]]).int()

    def runs(deterministic: bool, tier: int) -> list[dict[str, Tensor]]:
        with operators(where, deterministic, tier) as (mmfs, _):
            return [case.run(mmfs) for _ in range(4)]

    first, *others = runs(True, tier)
    assert all(torch.equal(other[name], tensor) for other in others for name, tensor in first.items())
    if dtype == torch.float32:
        first, *others = runs(False, 1)
        assert any(not torch.equal(other["value"], first["value"]) for other in others)


def test_the_kernels_check_what_they_are_given():
    case = Case(dtype=torch.float32).drawn()
    t = case.tensors
    kernels_emulated.loaded()
    flat = [size for shape in case.shapes for size in shape]
    names = (
        "offsets",
        "logits",
        "table_offsets",
        "table_logits",
        "reference_points",
        "visible",
        "sink_value",
    )
    for wrong in names:
        given = [t[name].double() if name == wrong else t[name] for name in names]
        with pytest.raises(RuntimeError, match=wrong):
            torch.ops.mmi_kernels_emulated.mmfs_forward(t["value"], flat, *given, case.base, True)
    given = [t[name] for name in names]
    with pytest.raises(RuntimeError, match="spatial_shapes"):
        torch.ops.mmi_kernels_emulated.mmfs_forward(t["value"], flat[:2], *given, case.base, True)


COMPLETE = "__syncthreads();  // what the batch holds is complete"
CHANGES = {
    "a barrier": ("f32", 1, "owner.cuh", COMPLETE, "", "race"),
    "agreement on a barrier": (
        "f32",
        1,
        "owner.cuh",
        COMPLETE,
        f"if (owned[0] >= 0) {COMPLETE}",
        "barrier|stuck",
    ),
    "a bounds mask": ("f32", 1, "sampling.cuh", "if (channel + i < channels) loaded", "loaded", "index"),
    "an atomic": (
        "f32",
        1,
        "gather.cuh",
        "atomic_add_vector<UNIT>(p.added_value, to + i, part);",
        "for (int j = 0; j < UNIT; ++j) p.added_value[to + i + j] += part[j];",
        "race",
    ),
    "a barrier of a window": (
        "bf16",
        3,
        "window.cuh",
        "__syncthreads();  // the window's weights are complete",
        "",
        "race",
    ),
    "a barrier between matrices": (
        "bf16",
        2,
        "matrix.cuh",
        "__syncthreads();  // dW is complete, the values have been read",
        "",
        "race",
    ),
}


@pytest.mark.parametrize("what", list(CHANGES))
def test_the_emulation_misses(what, tmp_path):
    """A kernel without one of the things that keep it correct fails the comparison."""
    value_type, tier, file, old, new, words = CHANGES[what]
    dtype, channels = (torch.float32, 7) if value_type == "f32" else (torch.bfloat16, 8)
    case = Case(channels=channels, queries=8, groups=2, dtype=dtype).drawn()
    case.tensors["visible"] = torch.tensor([[0, 3], [0, 2]]).int()
    deterministic = file == "owner.cuh"
    check(case, "emulated", deterministic, tier)
    with (
        kernels_emulated.changed_kernels(tmp_path, value_type, file, old, new),
        pytest.raises(RuntimeError, match=words),
    ):
        check(case, "emulated", deterministic, tier)
    check(case, "emulated", deterministic, tier)


def test_a_change_must_fit_the_source(tmp_path):
    with (
        pytest.raises(ValueError, match="0 places"),
        kernels_emulated.changed_kernels(tmp_path, "f32", "owner.cuh", "?!", ""),
    ):
        pass
