"""Visual tokenizer, ViT-Adapter and position embeddings; the release's recording is in test_released."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from mmi_megatron.config import AdapterConfig, ResamplerConfig, VisionConfig
from mmi_megatron.convert.released import clip_table
from mmi_megatron.convert.rules import load
from mmi_megatron.model.positions import sincos_1d, sincos_2d
from mmi_megatron.model.visual_tokenizer import VisualTokenizer, build_vit
from mmi_megatron.model.vit_adapter import DeformableAttention, Levels, ViTAdapter, pyramid_shapes

SMALL = VisionConfig(
    image_size=32,
    patch_size=8,
    width=32,
    layers=4,
    heads=4,
    ffn=48,
    adapter=AdapterConfig(heads=4, points=2, stem=8, interactions=2, extra_extractors=1),
    resampler=ResamplerConfig(queries=5, width=24, layers=2, heads=4, ffn=40),
)


def build(randomise: bool = True, **settings) -> VisualTokenizer:
    """A small tokenizer; at random weights, for many parameters hide behind a zero at start."""
    torch.manual_seed(0)
    module = VisualTokenizer(replace(SMALL, **settings), 20).double()
    if randomise:
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return module


def images(count: int = 2, side: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 3, side, side, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("interactions", [1, 2, 3, 4])
def test_shapes_at_any_number_of_interactions(interactions):
    module = build(adapter=replace(SMALL.adapter, interactions=interactions))
    tokens, maps = module(images())
    assert tokens.shape == (2, 5, 20)
    assert module.shapes == ((16, 16), (8, 8), (4, 4), (2, 2))
    assert maps.shape == (2, 256 + 64 + 16 + 4, 32)
    bounds = module.adapter.bounds
    assert bounds[0] == 0 and bounds[-1] == 4 and len(bounds) == interactions + 1


def test_full_size_is_the_release():
    """Width, levels and parameter counts of the 13B model; timm's own ViT-L/14 fits name by name."""
    with torch.device("meta"):
        module = VisualTokenizer(VisionConfig(), 5120)
        timms = timm.create_model("vit_large_patch14_clip_quickgelu_224", num_classes=0)
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in module.named_children()}
    assert counts["vit"] == 303_179_776
    assert counts["adapter"] == 23_228_608
    assert counts["resampler"] == 101_652_480
    assert (counts["input_proj"], counts["output_proj"]) == (1_049_600, 3_937_280)
    assert module.shapes == ((64, 64), (32, 32), (16, 16), (8, 8))
    assert module.adapter.bounds == [0, 6, 12, 18, 24]
    ours = {name: tensor.shape for name, tensor in module.vit.state_dict().items()}
    assert ours == {name: tensor.shape for name, tensor in timms.state_dict().items()}
    assert type(module.vit.blocks[0].mlp.act) is type(timms.blocks[0].mlp.act)
    assert module.vit.blocks[0].norm1.eps == timms.blocks[0].norm1.eps


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_vit_equals_transformers(quick_gelu):
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        hidden_act="quick_gelu" if quick_gelu else "gelu",
    )
    torch.manual_seed(0)
    theirs = CLIPVisionModel(config).double().eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    vit = build_vit(replace(SMALL, layers=3, quick_gelu=quick_gelu)).double()
    state = {name.removeprefix("vision_model."): tensor for name, tensor in theirs.state_dict().items()}
    state.pop("embeddings.position_ids", None)
    load(vit, state, clip_table(3, final_norm=True), "CLIP")
    x = images()
    with torch.no_grad():
        torch.testing.assert_close(vit.forward_features(x)[:, 0], theirs(x).pooler_output, rtol=0, atol=1e-10)
        tokens = ViTAdapter(32, 3, 4, SMALL.adapter).double()(vit, x)[0]
        torch.testing.assert_close(tokens, theirs(x).last_hidden_state, rtol=0, atol=1e-10)


def test_at_start_the_vit_is_untouched():
    module = build(randomise=False)
    x = images()
    tokens, _ = module.adapter(module.vit, x)
    torch.testing.assert_close(module.vit.norm(tokens), module.vit.forward_features(x), rtol=0, atol=0)


@pytest.mark.parametrize("use_resampler", [True, False])
def test_every_trainable_parameter_has_a_gradient(use_resampler):
    """Also through the frozen ViT: the first injector is reached only through it."""
    module = build(use_resampler=use_resampler)
    module.vit.requires_grad_(False)
    tokens, maps = module(images())
    (tokens.pow(2).sum() + maps.pow(2).sum()).backward()
    still = {name for name, p in module.named_parameters() if p.requires_grad and not (p.grad != 0).any()}
    assert not still
    assert all(parameter.grad is None for parameter in module.vit.parameters())


def test_gradient_of_the_last_tokens_passes_the_frozen_vit():
    module = build()
    module.vit.requires_grad_(False)
    tokens, _ = module(images())
    tokens.pow(2).sum().backward()
    assert (module.adapter.injectors[0].gamma.grad != 0).all()
    assert (module.adapter.stem.stages[0][0][0].weight.grad != 0).any()


def test_unfrozen_vit_trains_all_but_its_unused_norm():
    module = build(frozen=False)
    tokens, maps = module(images())
    (tokens.pow(2).sum() + maps.pow(2).sum()).backward()
    without = {name for name, p in module.vit.named_parameters() if p.grad is None}
    assert without == {"norm.weight", "norm.bias"}
    assert not any(p.requires_grad for p in module.vit.norm.parameters())


def test_images_do_not_see_each_other():
    module, x = build(), images(3)
    tokens, maps = module(x)
    one_tokens, one_maps = module(x[1:2])
    torch.testing.assert_close(tokens[1:2], one_tokens)
    torch.testing.assert_close(maps[1:2], one_maps)


def test_bfloat16_stays_close():
    module = build(randomise=False).float()
    tokens, maps = module(images().float())
    low_tokens, low_maps = module.bfloat16()(images().bfloat16())
    assert low_tokens.dtype == low_maps.dtype == torch.bfloat16
    assert (low_maps - maps).abs().max() < 0.05 * maps.abs().max()
    assert (low_tokens - tokens).abs().max() < 0.05 * tokens.abs().max()


def test_without_resampler_tokens_are_learned_and_maps_remain():
    module = build(use_resampler=False)
    tokens, maps = module(images())
    assert torch.equal(tokens[0], module.learned_tokens) and torch.equal(tokens[0], tokens[1])
    assert not torch.equal(maps[0], maps[1])


@pytest.mark.parametrize("part", [0, 1], ids=["tokens", "maps"])
def test_gradient_is_that_of_finite_differences(part):
    """Along a random direction in all parameters and pixels at once: no path may be cut."""
    module, x = build(), images(1)
    leaves = [x, *(p for p in module.parameters() if p.requires_grad)]
    generator = torch.Generator().manual_seed(2)
    direction = [torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype) for leaf in leaves]
    upstream = torch.randn(module(x)[part].shape, generator=generator, dtype=x.dtype)
    loss = (module(x.requires_grad_())[part] * upstream).sum()
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    slope = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True))

    def moved(step: float) -> Tensor:
        with torch.no_grad():
            for leaf, way in zip(leaves, direction, strict=True):
                leaf.add_(way, alpha=step)
            return (module(x)[part] * upstream).sum()

    step = 1e-7
    above, below = moved(step), moved(-2 * step)
    torch.testing.assert_close(slope, (above - below) / (2 * step), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("groups", "taken"),
    [(1, [1, 1, 1, 1]), (2, [1, 1, 2, 2]), (3, [1, 2, 3, 3]), (4, [1, 2, 3, 4]), (8, [2, 4, 6, 8])],
)
def test_earlier_layers_go_to_finer_maps(groups, taken):
    """The ViT's maps after its groups of layers are shared out evenly; the last goes to the coarsest."""
    module = build()
    features = [torch.full((1, 32, 4, 4), 1.0 + group).double() for group in range(groups)]
    with torch.no_grad():
        module.adapter.up.weight.zero_()
        module.adapter.up.bias.zero_()
    coarse = torch.zeros(1, 64 + 16 + 4, 32).double()
    maps = module.adapter._merge(torch.zeros(1, 32, 16, 16).double(), coarse, features)
    assert [level.unique().tolist() for level in maps] == [[number] for number in taken]


def test_points_of_a_head_start_on_a_ray_and_heads_on_a_ring():
    attention = DeformableAttention(32, 3, replace(SMALL.adapter, heads=8, points=4, value_ratio=1.0))
    bias = attention.offsets.bias.detach().view(8, 3, 4, 2)
    steps = torch.arange(1.0, 5.0)
    torch.testing.assert_close(bias.abs().amax(-1), steps.expand(8, 3, -1))
    assert torch.equal(bias[:, 0], bias[:, 2])
    torch.testing.assert_close(bias[0, 0], torch.stack([steps, 0 * steps], 1))
    torch.testing.assert_close(bias[1, 0, 0], torch.ones(2))
    assert len(bias[:, 0, 0].round(decimals=3).unique(dim=0)) == 8
    assert not attention.offsets.weight.any()
    zero = DeformableAttention(32, 3, replace(SMALL.adapter, zero_offset_bias=True))
    assert not zero.offsets.bias.any()


def test_levels_are_x_then_y():
    levels = Levels.of(((1, 2), (2, 1)), torch.device("cpu"), torch.float64)
    assert levels.centres.tolist() == [[0.25, 0.5], [0.75, 0.5], [0.5, 0.25], [0.5, 0.75]]
    assert levels.sizes.tolist() == [[2, 1], [1, 2]]


def test_positions():
    """sin and cos of 10000^(-k/n) in two halves; rows in the first half of a grid's channels."""
    line = sincos_1d(7, 6)
    for position in range(7):
        for k in range(3):
            angle = torch.tensor(position * 10000 ** (-k / 3))
            torch.testing.assert_close(line[position, k], angle.sin())
            torch.testing.assert_close(line[position, 3 + k], angle.cos())
    grid = sincos_2d(2, 3, 8).view(2, 3, 8)
    assert torch.equal(grid[1, 2], torch.cat([sincos_1d(2, 4)[1], sincos_1d(3, 4)[2]]))
    with pytest.raises(ValueError, match="divides by 4"):
        sincos_2d(2, 2, 6)
    with pytest.raises(ValueError, match="even width"):
        sincos_1d(2, 5)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"image_size": 30}, "vision.image_size"),
        ({"image_size": 24}, "even"),
        ({"heads": 5}, "vision.heads"),
        ({"adapter": replace(SMALL.adapter, interactions=5)}, "interactions"),
        ({"adapter": replace(SMALL.adapter, heads=3)}, "value_ratio"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_named(settings, word):
    with pytest.raises(ValueError, match=word):
        build(**settings)


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match="expected \\[I, 3, 32, 32\\]"):
        build()(images(side=40))


def test_pyramid_of_an_odd_grid_is_refused():
    with pytest.raises(ValueError, match="even"):
        pyramid_shapes(7)


# ---------------------------------------------------------------- towers

EVA = {"tower": "eva", "quick_gelu": False, "width": 48, "ffn": 40}
SIGLIP = {"tower": "siglip", "quick_gelu": False}


def timm_tower(config: VisionConfig) -> torch.nn.Module:
    """A published tower of timm, at the sizes of a configuration, with random weights."""
    name = {"eva": "eva02_large_patch14_clip_224", "siglip": "vit_large_patch16_siglip_256"}[config.tower]
    torch.manual_seed(1)
    tower = timm.create_model(
        name,
        num_classes=0,
        global_pool="",
        img_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=config.width,
        depth=config.layers,
        num_heads=config.heads,
        mlp_ratio=(config.ffn + 0.5) / config.width,
    )
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return tower.double().eval()


@pytest.mark.parametrize("settings", [EVA, SIGLIP], ids=["eva", "siglip"])
def test_towers_equal_timm_with_its_weights(settings):
    """With the injectors' gammas at their start the adapter leaves the ViT as it is."""
    module = build(**settings).eval()
    theirs = timm_tower(module.config)
    module.vit.load_state_dict(theirs.state_dict())
    for injector in module.adapter.injectors:
        torch.nn.init.zeros_(injector.gamma)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        tokens, _ = module.adapter(module.vit, x)
        wanted = theirs.forward_features(x)
    assert tokens.shape[1] == {"eva": 17, "siglip": 16}[settings["tower"]]
    torch.testing.assert_close(module.vit.norm(tokens), wanted, rtol=0, atol=1e-9)
    changed = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert (theirs.forward_features(changed) - wanted).abs().max() > 1e-2


@pytest.mark.parametrize("settings", [EVA, SIGLIP], ids=["eva", "siglip"])
def test_tokenizers_of_other_towers_make_tokens_and_maps(settings):
    module = build(**settings)
    tokens, maps = module(images())
    assert tokens.shape == (2, 5, 20) and maps.shape == (2, 340, module.config.width)
    (tokens.square().sum() + maps.square().sum()).backward()
    without = {name for name, p in module.named_parameters() if p.requires_grad and p.grad is None}
    assert not without and not module.vit.norm.weight.requires_grad
    assert module.token_positions.shape[0] == {"eva": 17, "siglip": 16}[settings["tower"]]


@pytest.mark.parametrize("settings", [{}, EVA, SIGLIP], ids=["clip", "eva", "siglip"])
def test_recomputing_a_tower_changes_no_gradient(settings):
    module = build(**settings)
    gradients = []
    for again in (False, True):
        module.zero_grad()
        module.vit.set_grad_checkpointing(again)
        tokens, maps = module(images())
        (tokens.square().sum() + maps.square().sum()).backward()
        gradients.append({name: p.grad for name, p in module.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-12, atol=1e-12)


def test_siglip_s_pixels_run_from_minus_one_to_one():
    assert build(**SIGLIP).mean.flatten().tolist() == build(**SIGLIP).std.flatten().tolist() == [0.5] * 3
    assert build(**EVA).mean.equal(build().mean)
