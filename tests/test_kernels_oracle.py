"""The yardstick of the kernels' tests: MMFS by loops over queries and images in float64.

It shares no code with the implementations. It is itself checked against tensors recorded from the
released model's own module (tests/data/mmfs_*.safetensors).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from mmi_kernels import library, mmfs_attention, ms_deform_attn, reference

DIFFERENTIABLE = (
    "value",
    "offsets",
    "logits",
    "table_offsets",
    "table_logits",
    "reference_points",
    "sink_value",
)


def bilinear(maps: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Samples [P, D] of maps [h, w, D] at locations x, y [P] in 0..1."""
    height, width, channels = maps.shape
    finite = torch.isfinite(x) & torch.isfinite(y)
    px = torch.where(finite, x, 0.0) * width - 0.5
    py = torch.where(finite, y, 0.0) * height - 0.5
    out = torch.zeros(len(x), channels, dtype=maps.dtype)
    for down in (0, 1):
        for right in (0, 1):
            column, row = px.detach().floor() + right, py.detach().floor() + down
            inside = finite & (column >= 0) & (column < width) & (row >= 0) & (row < height)
            fraction_x, fraction_y = px - px.detach().floor(), py - py.detach().floor()
            share = (fraction_x if right else 1 - fraction_x) * (fraction_y if down else 1 - fraction_y)
            at = maps[torch.where(inside, row, 0).long(), torch.where(inside, column, 0).long()]
            out = out + torch.where(inside, share, 0.0)[:, None] * torch.where(inside[:, None], at, 0.0)
    return out


def levels_of(value: Tensor, shapes) -> list[Tensor]:
    """Maps [h, w, D] of each level from positions [S, D]."""
    parts = value.split([h * w for h, w in shapes])
    return [part.unflatten(0, shape) for part, shape in zip(parts, shapes, strict=True)]


def oracle_mmfs(
    value, spatial_shapes, offsets, logits, table_offsets, table_logits, reference_points, visible,
    *, base, sink_value=None, sink=True,
):  # fmt: skip
    """``mmfs_attention`` in the words of its docstring."""
    queries, heads = offsets.shape[:2]
    out = []
    for q in range(queries):
        first, last = visible[q // (queries // len(visible))].tolist()
        centre = reference_points[q if len(reference_points) > 1 else 0]
        for head in range(heads):
            scores, samples = [], []
            for image in range(first, last):
                rel = last - image
                if rel >= len(table_offsets):
                    continue
                location = centre + (offsets[q, head] + table_offsets[rel, head]) / base
                for level, maps in enumerate(levels_of(value[image, :, head], spatial_shapes)):
                    samples.append(bilinear(maps, location[:, 0], location[:, 1]))
                    scores.append(logits[q, head, level] + table_logits[rel, head, level])
            if sink or not scores:
                extra = value.new_zeros(value.shape[-1]) if sink_value is None else sink_value[head]
                scores.append(value.new_zeros(1))
                samples.append(extra[None])
            out.append(torch.softmax(torch.cat(scores), 0) @ torch.cat(samples))
    return (
        torch.stack(out).unflatten(0, (queries, heads))
        if out
        else value.new_zeros(offsets.shape[0], *value.shape[2:])
    )


def oracle_deform(value, spatial_shapes, sampling_locations, attention_weights):
    """``ms_deform_attn`` in the words of its docstring."""
    batch, queries, heads = attention_weights.shape[:3]
    out = value.new_zeros(batch, queries, heads, value.shape[-1])
    for n in range(batch):
        for head in range(heads):
            for level, maps in enumerate(levels_of(value[n, :, head], spatial_shapes)):
                at = sampling_locations[n, :, head, level].flatten(0, 1)
                samples = bilinear(maps, at[:, 0], at[:, 1]).unflatten(
                    0, (queries, attention_weights.shape[4])
                )
                weight = attention_weights[n, :, head, level]
                share = torch.zeros_like(out)
                share[n, :, head] = (weight[..., None] * samples).sum(1)
                out = out + share
    return out.flatten(2)


@dataclass(frozen=True)
class Case:
    """One call of ``mmfs_attention``: sizes as in its docstring."""

    images: int = 3
    shapes: tuple[tuple[int, int], ...] = ((5, 7), (2, 3))
    queries: int = 6
    groups: int = 6
    heads: int = 2
    channels: int = 7
    points: int = 3
    rows: int = 5
    base: float = 4.0
    sink: bool = True
    with_sink_value: bool = True
    one_reference: bool = False
    spread: float = 2.0
    seed: int = 0
    dtype: torch.dtype = torch.float64
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def exact(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def drawn(self, margin: float = 1e-5) -> Case:
        """With tensors of random numbers, no sample closer to a pixel line than ``margin`` (in pixels): than
        rounding reaches, unless it does not matter."""
        generator = torch.Generator().manual_seed(self.seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        positions = sum(h * w for h, w in self.shapes)
        first = torch.randint(0, self.images + 1, (self.groups,), generator=generator)
        count = torch.randint(-1, self.images + 1, (self.groups,), generator=generator)
        visible = torch.stack([first, (first + count).clamp_max(self.images)], -1).int()
        while True:
            tensors = {
                "value": draw(self.images, positions, self.heads, self.channels).to(self.dtype),
                "offsets": draw(self.queries, self.heads, self.points, 2) * self.spread,
                "logits": draw(self.queries, self.heads, len(self.shapes), self.points),
                "table_offsets": draw(self.rows, self.heads, self.points, 2),
                "table_logits": draw(self.rows, self.heads, len(self.shapes), self.points),
                "reference_points": torch.rand(
                    1 if self.one_reference else self.queries, 2, generator=generator, dtype=torch.float64
                ),
                "sink_value": draw(self.heads, self.channels) if self.with_sink_value else None,
                "grad": draw(self.queries, self.heads, self.channels).to(self.dtype),
                "visible": visible,
            }
            for name in (*DIFFERENTIABLE[1:],):
                if tensors[name] is not None:
                    tensors[name] = tensors[name].to(self.exact)
            case = replace(self, tensors=tensors)
            if margin == 0 or self.dtype == torch.float64 or case.margin() > margin:
                return case

    def margin(self) -> float:
        """Distance in pixels of the closest sample to a line between pixels' centres."""
        t = {name: tensor.detach().double() for name, tensor in self.tensors.items() if tensor is not None}
        shift = t["offsets"][:, None] + t["table_offsets"]
        location = t["reference_points"][:, None, None, None] + shift / self.base
        least = 1.0
        for height, width in self.shapes:
            pixel = location * torch.tensor([width, height]) - 0.5
            if pixel.numel():
                least = min(least, float((pixel - pixel.round()).abs().min()))
        return least

    def run(self, function: Callable, **changed: Tensor) -> dict[str, Tensor]:
        """Output and every gradient, under the names of the arguments."""
        t = {**self.tensors, **changed}
        leaves = {n: t[n].detach().requires_grad_() for n in DIFFERENTIABLE if t[n] is not None}
        call = {"sink_value": None, **leaves}
        sink_value = call.pop("sink_value")
        value = call.pop("value")
        out = function(
            value, self.shapes, *call.values(), t["visible"],
            base=self.base, sink=self.sink, sink_value=sink_value,
        )  # fmt: skip
        if not out.requires_grad:
            return {"out": out}
        grads = torch.autograd.grad(out, list(leaves.values()), t["grad"].to(out.dtype), allow_unused=True)
        found = {
            n: torch.zeros_like(leaves[n]) if g is None else g for n, g in zip(leaves, grads, strict=True)
        }
        return {"out": out.detach(), **found}

    def expected(self) -> dict[str, Tensor]:
        """Output and gradients by the oracle, from the same numbers widened to float64."""
        floating = {n: t.double() for n, t in self.tensors.items() if t is not None and t.is_floating_point()}
        return self.run(oracle_mmfs, **floating)


def compare(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Largest error of each tensor, relative to its largest entry (at least 1e-3 of all's largest)."""
    assert set(expected) <= set(found)
    for name, want in expected.items():
        got = found[name]
        assert got.shape == want.shape, name
        if not want.numel():
            continue
        error = float((got.double() - want).abs().max())
        scale = max(float(want.abs().max()), 1e-3)
        assert error <= tolerance * scale, f"{name}: error {error:.2e}, largest entry {scale:.2e}"


def implementations() -> list[str]:
    """The reference, and the compiled kernels for each instruction set this processor has."""
    before = library.status()["instruction_set"]
    found = [name for name in ("avx512", "avx2", "baseline") if library.set_instruction_set(name)]
    if before is not None:
        library.set_instruction_set(before)
    return ["reference", *found]


@contextmanager
def implementation(name: str) -> Iterator[tuple[Callable, Callable]]:
    """(mmfs_attention, ms_deform_attn) of an implementation."""
    if name == "reference":
        yield reference.mmfs_attention, reference.ms_deform_attn
        return
    before = library.status()["instruction_set"]
    assert library.set_instruction_set(name)
    try:
        yield mmfs_attention, ms_deform_attn
    finally:
        library.set_instruction_set(before)


@pytest.mark.parametrize("sink", [True, False])
def test_oracle_agrees_with_itself_on_one_pixel(sink):
    """A sample at a pixel's centre is that pixel; its softmax share is known in closed form."""
    value = torch.arange(12.0, dtype=torch.float64).view(1, 6, 1, 2)
    zeros = torch.zeros(2, 1, 1, 2, dtype=torch.float64)
    out = oracle_mmfs(
        value, ((2, 3),), zeros[:1], zeros[:1, ..., :1], zeros, zeros[..., :1],
        torch.tensor([[0.5, 0.75]], dtype=torch.float64), torch.tensor([[0, 1]]), base=4.0, sink=sink,
    )  # fmt: skip
    assert out.flatten().tolist() == ([4.0, 4.5] if sink else [8.0, 9.0])
