"""What benchmarks/kernels.py runs: a shape's inputs, and three ways to compute it.

The composition of grid_sample is what PyTorch users write: locations and softmax as tensors, one
grid_sample a level over all images, a mask where a query does not see an image. The classic kernel
(benchmarks/classic.py) is given locations and weights ready-made. Ours computes everything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import classic
from benchmarks.kernel_shapes import Site
from mmi_kernels import mmfs_attention, ms_deform_attn

ARGUMENTS = ("offsets", "logits", "table_offsets", "table_logits", "reference_points")


@dataclass
class Case:
    """A site with numbers of rows, images and queries, and its tensors.

    Attributes:
        site: what samples what; ``site.queries`` of them a row (an image for the adapter).
        rows: rows of tokens or drawn images; for the adapter 1.
        images: that a row or drawn image may see; for the adapter the batch.
        share: of the (query, image) pairs, visible. Below 1, images appear one after the other.
        dtype: of the value.
        tensors: by the names of the operators' arguments; ``grad`` is the output's gradient.
    """

    site: Site
    rows: int
    images: int
    share: float
    dtype: torch.dtype
    device: str
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        site, total = self.site, self.rows * self.images

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator) * scale).to(self.device)

        positions = sum(height * width for height, width in site.shapes)
        levels, every = len(site.shapes), self.rows * site.queries
        t = {"value": normal(total, positions, site.heads, site.channels).to(self.dtype)}
        if self.fused:
            # As the release starts: scattered by 3 pixels of the base grid for tokens, by 1 in the U-Net.
            scattered = 3.0 if site.place == "language" else 1.0
            t["offsets"] = normal(every, site.heads, site.points, 2, scale=scattered)
            t["logits"] = normal(every, site.heads, levels, site.points)
            t["table_offsets"] = normal(site.rows, site.heads, site.points, 2, scale=scattered / 3)
            t["table_logits"] = normal(site.rows, site.heads, levels, site.points)
            t["reference_points"] = self.centres()
            t["visible"] = self.intervals().to(self.device)
            t["grad"] = normal(every, site.heads, site.channels).to(self.dtype)
        else:
            axes = (total, site.queries, site.heads, levels, site.points)
            t["sampling_locations"] = normal(*axes, 2, scale=0.2) + 0.5
            t["attention_weights"] = normal(*axes).abs()
            t["grad"] = normal(total, site.queries, site.heads * site.channels).to(self.dtype)
        fixed = ("reference_points", "visible", "grad")
        self.tensors = {name: tensor.requires_grad_(name not in fixed) for name, tensor in t.items()}

    @property
    def fused(self) -> bool:
        """Whether locations and softmax belong to the operator."""
        return self.site.place != "adapter"

    @property
    def leaves(self) -> list[Tensor]:
        return [tensor for tensor in self.tensors.values() if tensor.requires_grad]

    @property
    def samples(self) -> int:
        """Points at which the value is interpolated."""
        site = self.site
        per_pair = site.heads * len(site.shapes) * site.points
        if not self.fused:
            return self.images * site.queries * per_pair
        interval = self.tensors["visible"].long()
        seen = int((interval[:, 1] - interval[:, 0]).clamp_min(0).sum())
        return seen * (self.rows * site.queries // len(interval)) * per_pair

    def centres(self) -> Tensor:
        """Tokens look around the middle ([1, 2], as the model says it), a drawn image's pixels around their
        own place."""
        queries, side = self.site.queries, int(self.site.queries**0.5)
        if self.site.place == "language":
            return torch.full((1, 2), 0.5, device=self.device)
        index = torch.arange(queries, device=self.device)
        points = torch.stack([index % side, index // side], -1)
        return ((points + 0.5) / side).repeat(self.rows, 1)

    def intervals(self) -> Tensor:
        """int32 [G, 2]: an interval a token, or a drawn image."""
        first = torch.arange(self.rows) * self.images
        if self.site.place == "unet":
            return torch.stack([first, first + self.images], -1).int()
        count = torch.full((self.site.queries,), float(self.images))
        if self.share < 1:
            seen = torch.linspace(0, 1, self.site.queries) * self.images
            count = (seen / (2 * (1 - self.share)) + 0.5).floor().clamp(0, self.images)
        begin = first[:, None].expand(-1, self.site.queries)
        return torch.stack([begin, begin + count], -1).flatten(0, 1).int()

    def ours(self) -> Tensor:
        t, site = self.tensors, self.site
        if not self.fused:
            return ms_deform_attn(t["value"], site.shapes, t["sampling_locations"], t["attention_weights"])
        return mmfs_attention(
            t["value"], site.shapes, *(t[name] for name in ARGUMENTS), t["visible"], base=site.base
        )

    def composition(self) -> Tensor:
        """In float32 whatever the value's type: grid_sample wants one type for maps and grid."""
        value = self.tensors["value"].float()
        if not self.fused:
            t = self.tensors
            out = grid_sample_levels(value, self.site.shapes, t["sampling_locations"], t["attention_weights"])
            return out.flatten(2).to(self.dtype)
        locations, weights = self.materialised()
        out = grid_sample_levels(value, self.site.shapes, locations.flatten(0, 1), weights.flatten(0, 1))
        return out.unflatten(0, (self.rows, self.images)).sum(1).flatten(0, 1).to(self.dtype)

    def materialised(self) -> tuple[Tensor, Tensor]:
        """Locations [rows, images, queries, H, L, P, 2] and softmax weights of a fused operator."""
        t, site = self.tensors, self.site
        visible = t["visible"].long().repeat_interleave(self.rows * site.queries // len(t["visible"]), 0)
        image = torch.arange(self.images, device=visible.device)
        rows = (self.rows, site.queries)
        back = visible[:, 1:].view(*rows, 1) - (
            image + self.images * torch.arange(self.rows, device=image.device)[:, None, None]
        )
        back = back.clamp_min(0)  # 0: not visible

        shift = (t["offsets"].unflatten(0, rows)[:, :, None] + t["table_offsets"][back]) / site.base
        centres = t["reference_points"].expand(self.rows * site.queries, 2)
        locations = centres.view(*rows, 1, 1, 1, 2) + shift  # [rows, queries, images, H, P, 2]
        logits = t["logits"].unflatten(0, rows)[:, :, None] + t["table_logits"][back]
        logits = logits.masked_fill((back == 0)[..., None, None, None], -torch.inf)
        flat = logits.transpose(2, 3).flatten(3)  # [rows, queries, H, images L P]
        weights = torch.softmax(F.pad(flat, (0, 1)), -1)[..., :-1].view_as(logits.transpose(2, 3))
        locations = locations[:, :, :, :, None].expand(*locations.shape[:4], len(site.shapes), -1, -1)
        return locations.transpose(1, 2), weights.permute(0, 3, 1, 2, 4, 5)

    def classic(self) -> Classic:
        """The classic kernel's arguments: an image's levels, or those of all images of a row in turn."""
        t, site = self.tensors, self.site
        value = t["value"].detach()
        if not self.fused:
            levels = classic.level_table(site.shapes, value.device)
            locations, weights = t["sampling_locations"].detach(), t["attention_weights"].detach()
            return Classic(value, levels, locations, weights, t["grad"].view(*weights.shape[:3], -1))
        with torch.no_grad():
            locations, weights = self.materialised()
        # [rows, queries, H, images x L, P]
        locations = locations.permute(0, 2, 3, 1, 4, 5, 6).flatten(3, 4).contiguous()
        weights = weights.permute(0, 2, 3, 1, 4, 5).flatten(3, 4).contiguous()
        levels = classic.level_table(site.shapes * self.images, value.device)
        value = value.view(self.rows, -1, *value.shape[2:])
        return Classic(value, levels, locations, weights, t["grad"].view(*weights.shape[:3], -1))

    def moved_bytes(self, backward: bool) -> int:
        """What has to cross the memory bus: every argument and result once."""
        given = sum(tensor.nbytes for name, tensor in self.tensors.items() if name != "grad")
        grad = self.tensors["grad"].nbytes
        if not backward:
            return given + grad
        return given + grad + sum(leaf.nbytes for leaf in self.leaves)

    def gathered_bytes(self) -> int:
        """What the samples read of the value: four corners, all channels."""
        return self.samples * 4 * self.site.channels * self.tensors["value"].element_size()


@dataclass
class Classic:
    """Arguments of the classic kernel."""

    value: Tensor
    levels: Tensor
    locations: Tensor
    weights: Tensor
    grad: Tensor

    def forward(self) -> Tensor:
        return classic.forward(self.value, self.levels, self.locations, self.weights)

    def backward(self) -> tuple[Tensor, Tensor, Tensor]:
        return classic.backward(self.grad, self.value, self.levels, self.locations, self.weights)


def grid_sample_levels(value: Tensor, shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """The usual composition: one grid_sample a level over all images, then the weighted sum.

    value [N, S, H, D], locations [N, Q, H, L, P, 2], weights [N, Q, H, L, P] -> [N, Q, H, D].
    """
    batch, _, heads, channels = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    grid = 2 * locations - 1
    samples = []
    parts = value.split([height * width for height, width in shapes], 1)
    for level, (part, shape) in enumerate(zip(parts, shapes, strict=True)):
        maps = part.flatten(2).transpose(1, 2).reshape(batch * heads, channels, *shape)
        at = grid[:, :, :, level].transpose(1, 2).flatten(0, 1)
        samples.append(F.grid_sample(maps, at, padding_mode="zeros", align_corners=False))
    mixing = weights.transpose(1, 2).reshape(batch * heads, 1, queries, len(shapes) * points)
    out = (torch.stack(samples, -2).flatten(-2) * mixing).sum(-1)
    return out.view(batch, heads, channels, queries).permute(0, 3, 1, 2)


def gradients(function: Callable[[], Tensor], leaves: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    """Forward, then backward from ``grad``."""
    return torch.autograd.grad(function(), leaves, grad)


def check(case: Case, with_classic: bool) -> None:
    """All ways compute the same, gradients included.

    Raises:
        AssertionError: naming the case and the error.
    """
    grad = case.tensors["grad"]
    with torch.no_grad():
        pairs = [("output", case.composition(), case.ours())]
    expected = gradients(case.composition, case.leaves, grad)
    found = gradients(case.ours, case.leaves, grad)
    names = [name for name, tensor in case.tensors.items() if tensor.requires_grad]
    pairs += zip(names, expected, found, strict=True)
    if with_classic:
        baseline = case.classic()
        pairs.append(("classic output", pairs[0][1].flatten(), baseline.forward().flatten()))
        pairs.append(("classic value", expected[0].flatten(), baseline.backward()[0].flatten()))
    for name, want, got in pairs:
        # Of the many samples, a few lie so close to a pixel line that rounding puts them on either
        # side, where a location's derivative jumps: so norms, and a wider limit for what hangs on them.
        error = float((want.float() - got.float()).norm() / want.float().norm())
        exact = case.dtype == torch.float32
        limit = 2e-2 if not exact else 1e-4 if name.endswith(("output", "value")) else 1e-2
        assert error < limit, f"{case.site.title}: {name} differs by {error:.1e}"
