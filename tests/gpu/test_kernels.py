"""What only a GPU can show of the kernels: streams, graphs, devices, large tensors, bits that repeat.

That they compute the right thing is tests/test_kernels_cuda.py, which runs natively here too.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from mmi_kernels import library, mmfs_attention, ms_deform_attn
from tests.test_kernels_deform import draw
from tests.test_kernels_oracle import DIFFERENTIABLE, Case

pytestmark = pytest.mark.gpu
SHAPES = ((4, 6), (2, 3))


def on(device: torch.device | str, case: Case) -> Case:
    """The case's tensors on a device, its leaves with gradients."""
    moved = {
        name: tensor if tensor is None else tensor.to(device).requires_grad_(name in DIFFERENTIABLE)
        for name, tensor in case.drawn().tensors.items()
    }
    return Case(**{**vars(case), "tensors": moved})


def call(case: Case, **changed: torch.Tensor) -> torch.Tensor:
    t = {**case.tensors, **changed}
    return mmfs_attention(
        t["value"], case.shapes, *(t[n] for n in DIFFERENTIABLE[1:-1]), t["visible"],
        base=case.base, sink_value=t["sink_value"],
    )  # fmt: skip


def gradients(case: Case, **changed: torch.Tensor) -> list[torch.Tensor]:
    out = call(case, **changed)
    leaves = [changed.get(name, case.tensors[name]) for name in DIFFERENTIABLE]
    return [out.detach(), *torch.autograd.grad(out, leaves, case.tensors["grad"].to(out.dtype))]


def close(found, expected, tolerance: float = 1e-4) -> None:
    for got, want in zip(found, expected, strict=True):
        got, want = got.detach().cpu().double(), want.detach().cpu().double()
        assert float((got - want).abs().max()) <= tolerance * max(1.0, float(want.abs().max()))


@pytest.fixture(autouse=True)
def automatic_tier() -> Iterator[None]:
    yield
    library.set_device_tier(0)


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_the_compiled_kernels_run_here():
    assert library.compiled(torch.device("cuda")), library.status()["reason"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_side_stream_waits_for_what_is_on_it(dtype):
    """Kernels launched on another stream would read the value before it is written."""
    case = on("cuda", Case(dtype=dtype, channels=64))
    expected = gradients(case)
    late = torch.zeros_like(case.tensors["value"])
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        late.copy_(case.tensors["value"].detach())
        found = gradients(case, value=late.requires_grad_())
    stream.synchronize()
    close(found, expected, 1e-4 if dtype == torch.float32 else 1e-2)  # atomics add in any order, then round


@pytest.mark.parametrize("tier", [1, 2, 3])
def test_a_cuda_graph_replays_forward_and_backward(tier):
    """Each tier's kernels: nothing waits for the device, nothing is allocated outside the graph's pool."""
    library.set_device_tier(tier)
    case = on("cuda", Case(dtype=torch.float32 if tier == 1 else torch.bfloat16, channels=64, queries=96))
    fresh = torch.randn_like(case.tensors["value"])
    expected = gradients(case, value=fresh.clone().requires_grad_())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        gradients(case)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = gradients(case)
    with torch.no_grad():
        case.tensors["value"].copy_(fresh)
    graph.replay()
    torch.cuda.synchronize()
    close(found, expected, 1e-4 if tier == 1 else 1e-2)


def test_every_device_computes_the_same():
    """With another device current: the kernels follow their tensors."""
    first = gradients(on("cuda:0", Case(dtype=torch.float32)))
    torch.cuda.set_device(0)
    for index in range(torch.cuda.device_count()):
        close(gradients(on(f"cuda:{index}", Case(dtype=torch.float32))), first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_deterministic_mode_repeats_its_bits(deterministic, dtype):
    case = on("cuda", Case(queries=512, groups=2, images=3, channels=64, dtype=dtype))
    case.tensors["visible"] = torch.tensor([[0, 3], [1, 3]], dtype=torch.int32, device="cuda")
    first = gradients(case)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(gradients(case), first, strict=True))
    t = draw(0, 2, 300, 2, 32, SHAPES, 3, torch.float32)
    leaves = [t[n].cuda().requires_grad_() for n in ("value", "sampling_locations", "attention_weights")]

    def general() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(ms_deform_attn(leaves[0], SHAPES, *leaves[1:]).sum(), leaves)

    first = general()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(general(), first, strict=True))


def test_autocast_and_torch_compile():
    case = on("cuda", Case(dtype=torch.float32, channels=64))
    expected = call(case)
    with torch.autocast("cuda", torch.bfloat16):
        close([call(case)], [expected])
        mixed = call(case, value=case.tensors["value"].bfloat16(), offsets=case.tensors["offsets"].half())
    assert mixed.dtype == torch.bfloat16
    close([mixed], [expected], 5e-2)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    close([compiled(case)], [expected])


def test_elements_beyond_two_to_the_31():
    """8.6 GB of value's gradient in float32: the last image lies beyond 32-bit indices in it too."""
    heads, channels, side = 16, 64, 64
    images = 2**31 // (heads * channels * side * side) + 2
    value = torch.zeros(images, side * side, heads, channels, dtype=torch.bfloat16, device="cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    value[-1].normal_(generator=generator)
    queries, points = 8, 2
    offsets = torch.randn(queries, heads, points, 2, device="cuda", generator=generator)
    logits = torch.randn(queries, heads, 1, points, device="cuda", generator=generator)
    tables = torch.zeros(2, heads, points, 2, device="cuda"), torch.zeros(2, heads, 1, points, device="cuda")
    centre = torch.full((1, 2), 0.5, device="cuda")

    def run(maps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        maps = maps.requires_grad_()
        seen = torch.tensor([[len(maps) - 1, len(maps)]], dtype=torch.int32, device="cuda")
        out = mmfs_attention(maps, ((side, side),), offsets, logits, *tables, centre, seen, base=side)
        (grad,) = torch.autograd.grad(out, maps, torch.ones_like(out))
        return out.detach(), grad[-1].clone()

    expected = run(value[-1:].clone())
    found = run(value)
    assert found[1].any()
    close(found, expected, 1e-2)


@pytest.mark.parametrize("name", [*DIFFERENTIABLE[1:], "visible"])
def test_a_tensor_left_on_the_cpu_is_named(name):
    case = on("cuda", Case(dtype=torch.float32))
    with pytest.raises(ValueError, match=f"^{name}: lies on cpu, value on cuda:0"):
        call(case, **{name: case.tensors[name].cpu()})


@pytest.mark.parametrize("tier", [1, 2, 3])
def test_intervals_beyond_the_images_are_cut(tier):
    """As documented: no kernel reads there, and none waits for the device to refuse them."""
    library.set_device_tier(tier)
    case = on("cuda", Case(dtype=torch.bfloat16, channels=64))
    beyond = torch.tensor([[1, 5], [-2, 2], [3, 9], [-4, -1], [0, 2**31 - 1], [2, 3]], dtype=torch.int32)
    within = torch.tensor([[1, 3], [0, 2], [3, 3], [0, 0], [0, 3], [2, 3]], dtype=torch.int32)
    found, expected = (gradients(case, visible=visible.cuda()) for visible in (beyond, within))
    close(found, expected, 1e-2)
