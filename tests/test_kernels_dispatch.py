"""How the operators sit in PyTorch: checks, autograd and compilation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import mmi_kernels
from mmi_kernels import intervals, library, mmfs_attention, ms_deform_attn
from mmi_kernels.autograd import OPS
from tests.test_kernels_deform import draw
from tests.test_kernels_oracle import DIFFERENTIABLE, Case, implementation, implementations

COMPILED = library.status()["implementation"] == "compiled"


def call(case: Case, **changed):
    """``mmfs_attention`` on a case's tensors, some of them replaced."""
    t = {**case.tensors, **changed}
    return mmfs_attention(
        t["value"], changed.get("shapes", case.shapes), *(t[n] for n in DIFFERENTIABLE[1:-1]), t["visible"],
        base=case.base, sink=case.sink, sink_value=t["sink_value"],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("value", lambda t: t[0], "4 axes"),
        ("value", lambda t: t.int(), "float32, float64, bfloat16 or float16"),
        ("offsets", lambda t: t[..., :1], r"\(6, 2, 3, 2\)"),
        ("offsets", lambda t: t[0], "4 axes"),
        ("offsets", lambda t: t[:, :, :0], "at least one point"),
        ("logits", lambda t: t[:, :, :1], r"\(6, 2, 2, 3\)"),
        ("logits", lambda t: t.long(), "floating"),
        ("table_offsets", lambda t: t[:, :1], r"\(5, 2, 3, 2\)"),
        ("table_logits", lambda t: t[1:], r"\(5, 2, 2, 3\)"),
        ("table_logits", lambda t: t.to("meta"), "lies on meta, value on cpu"),
        ("reference_points", lambda t: t[:2], r"\(6, 2\) or \(1, 2\)"),
        ("sink_value", lambda t: t[:, 1:], r"\(2, 7\)"),
        ("visible", lambda t: t.float(), r"int32 \[G, 2\]"),
        ("visible", lambda t: t.bool(), r"int32 \[G, 2\], got torch.bool .*mmi_kernels.intervals"),
        ("visible", lambda t: t[:, :1], r"int32 \[G, 2\]"),
        ("visible", lambda t: t[:4], "6 queries do not divide into 4 groups"),
        ("visible", lambda t: t.to("meta"), "lies on meta"),
    ],
)
def test_a_bad_argument_is_named(name, change, words):
    case = Case().drawn()
    with pytest.raises(ValueError, match=f"^{name}: .*{words}"):
        call(case, **{name: change(case.tensors[name])})


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        (((5, 7),), "hold 35 positions, value has 41"),
        (((-5, -7), (2, 3)), "at least 1 x 1"),
        ((), "at least 1 x 1"),
    ],
)
def test_levels_that_do_not_add_up_are_named(shapes, words):
    with pytest.raises(ValueError, match=f"^spatial_shapes: .*{words}"):
        call(Case().drawn(), shapes=shapes)


@pytest.mark.parametrize("name", implementations())
@pytest.mark.parametrize("interval", [[-1, 2], [0, 4], [2, 2**31 - 1]])
def test_images_that_do_not_exist_are_named(name, interval):
    case = Case().drawn()
    visible = case.tensors["visible"].clone()
    visible[3] = torch.tensor(interval)
    with (
        implementation(name) as (mmfs, _),
        pytest.raises(RuntimeError, match=f"visible: group 3 sees images {interval[0]}"),
    ):
        case.run(mmfs, visible=visible)


def test_the_general_operator_names_a_bad_argument():
    shapes = ((4, 6), (2, 3))
    t = draw(0, 2, 5, 2, 8, shapes, 3, torch.float32)
    value, locations, weights = t["value"], t["sampling_locations"], t["attention_weights"]
    with pytest.raises(ValueError, match="^spatial_shapes: "):
        ms_deform_attn(value, ((4, 6),), locations, weights)
    with pytest.raises(ValueError, match="^sampling_locations: "):
        ms_deform_attn(value, shapes, locations[:1], weights)
    with pytest.raises(ValueError, match="^attention_weights: "):
        ms_deform_attn(value, shapes, locations, weights[:, :, :1])
    with pytest.raises(ValueError, match="^attention_weights: .*floating"):
        ms_deform_attn(value, shapes, locations, weights.int())


def small(dtype=torch.float64) -> tuple[Case, list[torch.Tensor]]:
    case = Case(
        queries=3, groups=3, heads=2, channels=3, points=2, shapes=((3, 4), (2, 2)), dtype=dtype, seed=3
    ).drawn()
    case.tensors["visible"] = torch.tensor([[0, 2], [1, 3], [1, 1]]).int()
    return case, [case.tensors[n].requires_grad_() for n in DIFFERENTIABLE]


def test_gradcheck():
    case, leaves = small()
    assert case.margin() > 1e-3
    assert torch.autograd.gradcheck(
        lambda *t: call(case, **dict(zip(DIFFERENTIABLE, t, strict=True))), leaves
    )


def raw_arguments(dtype) -> list:
    case, _ = small(dtype)
    tensors = [case.tensors[n] for n in DIFFERENTIABLE]
    flat = [size for shape in case.shapes for size in shape]
    return [tensors[0], flat, *tensors[1:6], case.tensors["visible"], tensors[6], case.base, True]


if COMPILED:

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_opcheck(dtype):
        arguments = raw_arguments(dtype)
        torch.library.opcheck(OPS.mmfs_forward, arguments)
        detached = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
        out, stats = OPS.mmfs_forward(*detached)
        backward = [torch.ones_like(out), out, stats, *detached[:8], *detached[9:]]
        for for_value, for_query in ((True, True), (False, True), (True, False)):
            torch.library.opcheck(OPS.mmfs_backward, [*backward, for_value, for_query])

    def test_opcheck_of_the_general_operator():
        t = draw(0, 2, 5, 2, 8, ((4, 6), (2, 3)), 3, torch.float64)
        leaves = [t[n].requires_grad_() for n in ("value", "sampling_locations", "attention_weights")]
        torch.library.opcheck(OPS.deform_forward, [leaves[0], [4, 6, 2, 3], *leaves[1:]])
        value, locations, weights = (leaf.detach() for leaf in leaves)
        torch.library.opcheck(
            OPS.deform_backward, [t["grad"], value, [4, 6, 2, 3], locations, weights, True, True]
        )

    @pytest.mark.parametrize("dynamic", [False, True])
    def test_torch_compile_takes_the_whole_graph(dynamic):
        torch._dynamo.reset()
        compiled = torch.compile(mmfs_attention, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        general = torch.compile(ms_deform_attn, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        for queries in (6, 9):
            case = Case(queries=queries, groups=3, dtype=torch.float32).drawn()
            found, expected = case.run(compiled), case.run(mmfs_attention)
            assert all(torch.allclose(found[key], expected[key]) for key in expected)
            t = draw(0, 2, queries, 2, 8, ((4, 6), (2, 3)), 3, torch.float32)
            t.pop("grad")
            value, *rest = (tensor.requires_grad_() for tensor in t.values())
            shapes = ((4, 6), (2, 3))
            out = general(value, shapes, *rest)
            assert torch.equal(out, ms_deform_attn(value, shapes, *rest))
            out.sum().backward()
            assert value.grad.any()

    def test_the_kernels_check_what_they_are_given():
        arguments = raw_arguments(torch.float32)
        for index, words in ((2, "offsets"), (3, "logits"), (7, "visible"), (8, "sink_value")):
            changed = list(arguments)
            changed[index] = changed[index][:1].half() if index != 7 else changed[index].long()
            with pytest.raises(RuntimeError, match=words):
                OPS.mmfs_forward(*changed)


@pytest.mark.parametrize("name", implementations())
def test_autocast_keeps_the_arithmetic_in_float32(name):
    case = Case(dtype=torch.float32).drawn()
    with implementation(name) as (mmfs, _):
        with torch.autocast("cpu", torch.bfloat16):
            inside = case.run(mmfs)
        outside = case.run(mmfs)
    assert inside["out"].dtype == torch.float32
    assert all(torch.equal(inside[key], tensor) for key, tensor in outside.items())


class Projected(torch.nn.Module):
    """Both operators after linear layers, as in the model."""

    def __init__(self, case: Case):
        super().__init__()
        self.case = case
        self.value = torch.nn.Linear(5, case.heads * case.channels)
        self.offsets = torch.nn.Linear(5, case.heads * case.points * 2)

    def forward(self, maps: torch.Tensor, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        case = self.case
        value = self.value(maps).unflatten(-1, (case.heads, case.channels))
        offsets = self.offsets(query).unflatten(-1, (case.heads, case.points, 2))
        fused = call(case, value=value, offsets=offsets)
        levels = len(case.shapes)
        # [N, Q, H, L, P, 2], the queries cut into as many parts as there are images
        locations = offsets.unflatten(0, (case.images, -1))[:, :, :, None].expand(-1, -1, -1, levels, -1, -1)
        general = ms_deform_attn(value, case.shapes, locations.sigmoid(), locations[..., 0].softmax(-1))
        return fused, general


def test_autocast_projects_in_bfloat16_and_samples_in_float32():
    case = Case(dtype=torch.float32).drawn()
    torch.manual_seed(0)
    module = Projected(case)
    maps = torch.randn(case.images, 41, 5)
    query = torch.randn(case.queries, 5)
    exact = module(maps, query)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = module(maps, query)
    for wide, narrow in zip(exact, mixed, strict=True):
        assert narrow.dtype == torch.bfloat16  # that of the projected value
        assert float((wide - narrow.float()).abs().max()) < 0.05 * float(wide.abs().max())
    sum(out.float().sum() for out in mixed).backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in module.parameters())


def scattered(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers with every other element in between and the axes stored the other way round."""
    store = torch.full((*reversed(tensor.shape), 2), float("nan")).to(tensor.dtype)
    store[..., 0] = tensor.permute(*reversed(range(tensor.ndim)))
    return store[..., 0].permute(*reversed(range(tensor.ndim)))


def test_strides_do_not_matter():
    case = Case(dtype=torch.float32).drawn()
    expected = call(case)
    for name in (*DIFFERENTIABLE, "visible"):
        assert torch.equal(call(case, **{name: scattered(case.tensors[name])}), expected), name
    shapes = ((4, 6), (2, 3))
    t = draw(0, 2, 5, 2, 8, shapes, 3, torch.float32)
    arguments = [t[name] for name in ("value", "sampling_locations", "attention_weights")]
    for index in range(3):
        changed = list(arguments)
        changed[index] = scattered(arguments[index])
        found, want = (ms_deform_attn(a[0], shapes, *a[1:]) for a in (changed, arguments))
        assert torch.equal(found, want), index


@pytest.mark.parametrize("name", implementations())
def test_elements_beyond_two_to_the_31(name, tmp_path):
    """The second image lies further than 32-bit indices reach; the file behind it is sparse."""
    case = Case(images=2, groups=1, channels=32, dtype=torch.float16, seed=2).drawn()
    case.tensors["visible"] = torch.tensor([[0, 2]]).int()
    value = case.tensors["value"]
    apart = 2**31 + 40
    elements = apart + value[0].numel()
    store = torch.from_file(str(tmp_path / "value"), shared=True, size=elements, dtype=torch.float16)
    far = store.as_strided(value.shape, (apart, *value.stride()[1:]))
    far.copy_(value)
    with implementation(name) as (mmfs, _):
        expected, found = case.run(mmfs), case.run(mmfs, value=far)
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def test_a_mask_becomes_intervals_unless_it_has_gaps():
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 1]]).bool()
    assert intervals(mask).tolist() == [[1, 3], [0, 0], [0, 4], [3, 4]]
    assert intervals(mask).dtype == torch.int32
    assert intervals(mask[:, :0]).tolist() == [[0, 0]] * 4
    mask[2, 1] = False
    with pytest.raises(ValueError, match=r"^mask: group 2 sees images \[0, 2, 3\], which has a gap"):
        intervals(mask)
    with pytest.raises(ValueError, match=r"^mask: expected bool \[G, I\]"):
        intervals(mask.int())


def test_the_model_samples_through_the_operators_alone():
    """grid_sample is for references; who else calls it samples beside the kernels."""
    model = Path(__file__).parent.parent / "mmi_megatron"
    assert [path for path in model.rglob("*.py") if "grid_sample" in path.read_text()] == []


def test_status_tells_what_runs():
    status = mmi_kernels.status()
    assert set(status) == {"implementation", "instruction_set", "library", "reason"}
    assert (status["instruction_set"] is not None) == (status["library"] is not None) == COMPILED
