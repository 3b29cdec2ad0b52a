"""MMFS as a module: against its definition written out image by image, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmi_megatron.config import DecoderConfig, LanguageConfig, MMFSConfig
from mmi_megatron.model.mmfs import MMFS, select_levels

SHAPES = ((8, 8), (4, 4), (2, 3), (1, 1))
POSITIONS = sum(h * w for h, w in SHAPES)


def build(kind: str = "deformable", seed: int = 0, base: int | None = None, **settings) -> MMFS:
    """A small module in float64 whose every parameter is random."""
    config = {"heads": 4, "points": 3, "value_width": 24, "table_rows": 4, "levels": [1, 2, 3], "base": 5}
    torch.manual_seed(seed)
    module = MMFS(20, 16, 18, MMFSConfig(kind, **(config | settings)), SHAPES, base).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return module


def inputs(seed: int = 0, queries: int = 7, images: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    visible = [[0, 0], [0, 1], [0, 2], [1, 3], [0, 5], [4, 5], [2, 2]]
    points = torch.rand(queries, 2, generator=generator, dtype=torch.float64)
    return (
        normal(queries, 20).requires_grad_(),
        normal(images, POSITIONS, 16).requires_grad_(),
        points,
        torch.tensor(visible[:queries], dtype=torch.int32),
    )


def as_mask(visible: Tensor, images: int) -> Tensor:
    """Visibility [Q, M] of intervals [Q, 2]."""
    image = torch.arange(images)
    return (image >= visible[:, :1]) & (image < visible[:, 1:])


def literal(module: MMFS, query: Tensor, maps: Tensor, points: Tensor, mask: Tensor) -> Tensor:
    """Deformable MMFS as it is defined: query by query, image by image, level by level.

    ``mask`` [Q, M] may have gaps. Queries are shifted by the table and projected anew per image.
    """
    config, rows = module.config, module.reach
    heads, count = config.heads, config.points
    maps = select_levels(maps, module.shapes, config.levels)
    value = module.value_proj(maps).unflatten(-1, (heads, -1))
    sizes = [h * w for h, w in module.sampled]
    outputs = []
    for q in range(len(query)):
        logits, samples = [], []
        seen = mask[q].nonzero()[:, 0].tolist()
        for back, m in enumerate(reversed(seen), start=1):
            if back >= rows:
                break
            shifted = module.query_proj(query[q]) + module.table.weight[back]
            offset = module.offsets(shifted).view(heads, count, 2)
            logit = module.logits(shifted).view(heads, len(sizes), count)
            grid = 2 * (points[q] + offset / module.base) - 1
            for level, (plane, (h, w)) in enumerate(zip(value[m].split(sizes), module.sampled, strict=True)):
                plane = plane.view(h, w, heads, -1).permute(2, 3, 0, 1)
                found = F.grid_sample(plane, grid[:, None], align_corners=False)[:, :, 0]
                samples.append(found.transpose(1, 2))
                logits.append(logit[:, level])
        sink = module.sink_value.view(heads, 1, -1)
        if config.sink or not samples:
            samples.append(sink)
            logits.append(query.new_zeros(heads, 1))
        weight = torch.cat(logits, 1).softmax(1)
        outputs.append((weight[..., None] * torch.cat(samples, 1)).sum(1).flatten())
    return module.output_proj(torch.stack(outputs))


def literal_dense(module: MMFS, query: Tensor, maps: Tensor, mask: Tensor) -> Tensor:
    """Dense attention as it is defined: the table's row is added to an image's keys."""
    heads = module.config.heads
    maps = select_levels(maps, module.shapes, module.config.levels)
    outputs = []
    for q in range(len(query)):
        asked = module.query_proj(query[q]).view(heads, -1)
        keys, values = [], []
        for back, m in enumerate(reversed(mask[q].nonzero()[:, 0].tolist()), start=1):
            if back >= module.reach:
                break
            keys.append((module.key_proj(maps[m]) + module.table.weight[back]).unflatten(1, (heads, -1)))
            values.append(module.value_proj(maps[m]).unflatten(1, (heads, -1)))
        if module.config.sink or not keys:
            keys.append(torch.zeros(1, *asked.shape, dtype=query.dtype))
            values.append(module.sink_value.view(1, heads, -1))
        logit = torch.einsum("hd,shd->hs", asked, torch.cat(keys)) / asked.shape[1] ** 0.5
        outputs.append(torch.einsum("hs,shd->hd", logit.softmax(1), torch.cat(values)).flatten())
    return module.output_proj(torch.stack(outputs))


def assert_same(module: MMFS, found: Tensor, wanted: Tensor, leaves: list[Tensor]) -> None:
    """Same output, and same gradient of every parameter and input that takes part."""
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=found.dtype)
    every = [*module.parameters(), *leaves]
    ours = torch.autograd.grad(found, every, upstream, allow_unused=True, materialize_grads=True)
    theirs = torch.autograd.grad(wanted, every, upstream, allow_unused=True, materialize_grads=True)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"sink": False},
        {"max_images": 1},
        {"levels": [0, 2]},
        {"levels": [1], "base": 0},
        {"table_rows": 12, "levels": [0, 1, 2, 3]},
    ],
    ids=str,
)
def test_deformable_equals_its_definition(settings):
    module = build(**settings)
    query, maps, points, visible = inputs()
    found = module(query, maps, points, visible)
    assert_same(module, found, literal(module, query, maps, points, as_mask(visible, 5)), [query, maps])


@pytest.mark.parametrize("settings", [{}, {"sink": False}, {"max_images": 2}, {"levels": [0, 3]}], ids=str)
def test_dense_equals_its_definition(settings):
    module = build("dense", **settings)
    query, maps, points, visible = inputs()
    found = module(query, maps, points, visible)
    assert_same(module, found, literal_dense(module, query, maps, as_mask(visible, 5)), [query, maps])


@pytest.mark.parametrize("kind", ["deformable", "dense"])
def test_runs_of_queries_share_an_interval(kind):
    module = build(kind)
    query, maps, _, _ = inputs(queries=6)
    centre, shared = torch.full((1, 2), 0.5).double(), torch.tensor([[0, 2], [1, 4]], dtype=torch.int32)
    found = module(query, maps, centre, shared)
    torch.testing.assert_close(found, module(query, maps, centre, shared.repeat_interleave(3, 0)))


@pytest.mark.parametrize("kind", ["deformable", "dense"])
def test_nothing_is_taken_from_images_out_of_sight(kind):
    """The gradient of an image that no query reaches is zero: outside all intervals, or too far back."""
    module = build(kind, table_rows=3)
    query, maps, points, _ = inputs()
    visible = torch.tensor([[0, 4]], dtype=torch.int32)
    (gradient,) = torch.autograd.grad(module(query, maps, points, visible).sum(), maps)
    reached = gradient.abs().amax((1, 2)) > 0
    assert reached.tolist() == [False, False, True, True, False]


@pytest.mark.parametrize("kind", ["deformable", "dense"])
def test_without_images_the_sink_is_all_there_is(kind):
    module = build(kind)
    query, maps, points, _ = inputs(queries=3)
    out = module(query, maps[:0], points, torch.zeros(3, 2, dtype=torch.int32))
    torch.testing.assert_close(out, module.output_proj(module.sink_value).expand(3, -1))
    out.sum().backward()
    assert module.sink_value.grad.abs().min() > 0
    assert module(query[:0], maps, points[:0], torch.zeros(0, 2, dtype=torch.int32)).shape == (0, 18)


@pytest.mark.parametrize("levels", [[0], [1, 2], [0, 2], [0, 1, 3], [0, 1, 2, 3]], ids=str)
def test_levels_are_picked_in_order(levels):
    """Maps whose every position holds its level's number."""
    sizes = torch.tensor([h * w for h, w in SHAPES])
    maps = torch.arange(4).repeat_interleave(sizes)[None, :, None]
    picked = select_levels(maps, SHAPES, levels)[0, :, 0]
    assert picked.tolist() == torch.tensor(levels).repeat_interleave(sizes[levels]).tolist()


def test_projections_see_each_query_once():
    """Neither the number of images nor that of the table's rows multiplies the queries."""
    module, rows = build(), []
    for projection in (module.query_proj, module.offsets, module.logits):
        projection.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    query, maps, points, visible = inputs()
    module(query, maps, points, visible)
    assert rows == [7, 7, 7]


@pytest.mark.parametrize("kind", ["deformable", "dense"])
def test_bfloat16_is_close_and_locations_stay_exact(kind):
    module = build(kind).float()
    query, maps, points, visible = inputs()
    query, maps, points = query.float() / 4, maps.float(), points.float()
    exact = module(query, maps, points, visible)
    rounded = module.bfloat16()(query.bfloat16(), maps.bfloat16(), points, visible)
    assert rounded.dtype == torch.bfloat16
    assert (rounded - exact).abs().max() < 0.05 * exact.abs().max()


def test_start_values():
    torch.manual_seed(0)
    module = MMFS(64, 32, 64, MMFSConfig(offset_init=3.0, value_width=64), SHAPES)
    assert not module.offsets.weight.any()
    assert not module.logits.bias.any()
    assert not module.sink_value.any()
    assert not module.value_proj.bias.any()
    bias = module.offsets.bias
    assert bias.min() < -2.5 and bias.max() > 2.5 and bias.abs().max() <= 3
    assert 0.015 < module.table.weight.std() < 0.025


def test_parameters_at_full_size():
    """36.05 M in a layer of the 13B model; the release's 36.30 M hold dead logit rows besides."""
    shapes = ((64, 64), (32, 32), (16, 16), (8, 8))
    with torch.device("meta"):
        language = MMFS(5120, 1024, 5120, LanguageConfig().mmfs, shapes)
        unet = MMFS(1280, 1024, 1280, DecoderConfig().mmfs, shapes, base=8)
    assert sum(p.numel() for p in language.parameters()) == 36_051_584
    assert language.base == 16 and unet.base == 8
    assert unet.logits.weight.shape == (16 * 4 * 8, 1280)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"kind": "none"}, "mmfs.kind"),
        ({"value_width": 25}, "mmfs.value_width"),
        ({"levels": [2, 1]}, "mmfs.levels"),
        ({"levels": [1, 4]}, "mmfs.levels"),
        ({"levels": []}, "mmfs.levels"),
        ({"table_rows": 1}, "mmfs.table_rows"),
        ({"max_images": 0}, "mmfs.max_images"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_named(settings, word):
    with pytest.raises(ValueError, match=word):
        build(**settings)


def test_maps_of_another_pyramid_are_refused():
    module = build()
    query, maps, points, visible = inputs()
    with pytest.raises(ValueError, match="positions an image"):
        module(query, maps[:, 1:], points, visible)
