"""MMFS in the U-Net: against diffusers' own forward pass, with MMFS written out pixel by pixel."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmi_megatron.config import MMFSConfig, UNetConfig
from mmi_megatron.convert.released_unet import ReleasedUNetMMFS, unet_mmfs, unet_mmfs_table
from mmi_megatron.convert.rules import save
from mmi_megatron.model.positions import sincos_2d
from mmi_megatron.model.unet_mmfs import Looks, UNetMMFS, build_unet, mmfs_sites, position_embedding, run_unet
from tests.test_mmfs import literal

SHAPES = ((8, 8), (4, 4), (2, 2), (1, 1))
POSITIONS = sum(h * w for h, w in SHAPES)
WIDTH, TOKENS, SIDE = 12, 8, 8
PLACEMENTS = ("skip", "up", "down")
CONFIG = UNetConfig(
    channels=[8, 16, 16], attention=[False, True, True], layers_per_block=1, head_width=8, norm_groups=4
)
MMFS = MMFSConfig(heads=2, points=2, value_width=8, table_rows=3, levels=[0, 1, 2, 3], base=0)


def build(placement: str, dtype: torch.dtype = torch.float64, randomise: bool = True, config=MMFS):
    torch.manual_seed(0)
    unet = build_unet(CONFIG, SIDE, 3, TOKENS)
    mmfs = UNetMMFS(mmfs_sites(CONFIG, SIDE, placement), WIDTH, config, SHAPES)
    if randomise:
        for name, parameter in mmfs.named_parameters():
            # Small offsets, so that samples fall inside the maps.
            torch.nn.init.normal_(parameter, std=0.1 if "offsets" in name else 0.5)
    return unet.to(dtype).eval(), mmfs.to(dtype)


def inputs(dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(2, 3, SIDE, SIDE, generator=generator, dtype=dtype)
    tokens = torch.randn(2, 5, TOKENS, generator=generator, dtype=dtype)
    maps = torch.randn(4, POSITIONS, WIDTH, generator=generator, dtype=dtype)
    visible = torch.tensor([[0, 2], [1, 4]], dtype=torch.int32)  # of three images two are in reach
    return sample, torch.tensor([3, 700]), tokens, maps, visible


def ours(unet, mmfs, placement, sample, timestep, tokens, maps, visible) -> Tensor:
    return run_unet(unet, Looks(mmfs, placement, mmfs.project(maps), visible), sample, timestep, tokens)


def added(block, x: Tensor, maps: Tensor, visible: Tensor) -> Tensor:
    """What a block adds to x [J, C, h, w], pixel by pixel and image by image."""
    side = x.shape[2]
    maps = F.layer_norm(maps, maps.shape[-1:], block.maps_norm.weight, block.maps_norm.bias, 1e-6)
    index = torch.arange(side, dtype=x.dtype)
    centre = torch.stack([(index + 0.5).repeat(side), (index + 0.5).repeat_interleave(side)], 1) / side
    grid = sincos_2d(64, 64, x.shape[1]).view(64, 64, -1).permute(2, 0, 1)[None]
    place = F.interpolate(grid, (side, side), mode="bicubic", align_corners=False)[0].to(x.dtype)
    out = []
    for j, (first, last) in enumerate(visible.tolist()):
        query = x[j].permute(1, 2, 0)
        query = F.layer_norm(query, query.shape[-1:], block.query_norm.weight, block.query_norm.bias, 1e-6)
        query = (query + place.permute(1, 2, 0)).reshape(side * side, -1)
        mask = torch.zeros(side * side, len(maps), dtype=torch.bool)
        mask[:, first:last] = True
        found = literal(block.mmfs, query, maps, centre, mask).T.reshape(1, -1, side, side)
        out.append(F.conv2d(found, block.conv.weight[:, :, None, None], block.conv.bias))
    return torch.cat(out)


def theirs(unet, mmfs, placement, sample, timestep, tokens, maps, visible) -> Tensor:
    """diffusers' forward pass, with what MMFS adds put in from outside."""
    options, handles = {}, []
    if placement == "skip":
        skips, mid = captured(unet, sample, timestep, tokens)
        extra = [added(block, x, maps, visible) for block, x in zip(mmfs.blocks, [*skips, mid], strict=True)]
        options = {
            "down_block_additional_residuals": tuple(extra[:-1]),
            "mid_block_additional_residual": extra[-1],
        }
    for index, block in enumerate(unet.up_blocks if placement == "up" else unet.down_blocks):
        if placement == "skip":
            break

        def put(module, given, out, which=mmfs.blocks[index]):
            x = out if placement == "up" else out[0]
            x = x + added(which, x, maps, visible)
            return x if placement == "up" else (x, (*out[1][:-1], x))

        handles.append(block.register_forward_hook(put))
    out = unet(sample, timestep, encoder_hidden_states=tokens, **options).sample
    for handle in handles:
        handle.remove()
    return out


def captured(unet, sample, timestep, tokens) -> tuple[list[Tensor], Tensor]:
    """The skip tensors and the mid block's output of diffusers' forward pass."""
    skips, mids = [], []
    handles = [unet.conv_in.register_forward_hook(lambda m, i, out: skips.append(out))]
    handles += [b.register_forward_hook(lambda m, i, out: skips.extend(out[1])) for b in unet.down_blocks]
    handles.append(unet.mid_block.register_forward_hook(lambda m, i, out: mids.append(out)))
    unet(sample, timestep, encoder_hidden_states=tokens)
    for handle in handles:
        handle.remove()
    return skips, mids[0]


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_output_and_all_gradients_equal_the_composition_written_out(placement):
    unet, mmfs = build(placement)
    arguments = inputs()
    leaves = [t.requires_grad_() for t in arguments if t.is_floating_point()]
    leaves += [p for module in (unet, mmfs) for p in module.parameters() if p.requires_grad]
    found, wanted = (run(unet, mmfs, placement, *arguments) for run in (ours, theirs))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    gradients = [torch.autograd.grad(out.square().sum(), leaves) for out in (found, wanted)]
    for ours_, theirs_ in zip(*gradients, strict=True):
        assert theirs_.abs().max() > 0
        torch.testing.assert_close(ours_, theirs_, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_new_mmfs_leaves_the_unet_as_it_is_to_the_bit(placement):
    unet, mmfs = build(placement, torch.float32, randomise=False)
    sample, timestep, tokens, maps, visible = inputs(torch.float32)
    plain = unet(sample, timestep, encoder_hidden_states=tokens).sample
    off = run_unet(unet, Looks(None, placement, [], visible), sample, timestep, tokens)
    assert torch.equal(off, plain)
    assert torch.equal(ours(unet, mmfs, placement, sample, timestep, tokens, maps, visible), plain)
    torch.nn.init.normal_(mmfs.blocks[0].conv.weight)
    assert not torch.equal(ours(unet, mmfs, placement, sample, timestep, tokens, maps, visible), plain)


def test_sites_of_stable_diffusion():
    config = UNetConfig()
    channels = [320] * 4 + [640] * 3 + [1280] * 6
    sides = [64] * 3 + [32] * 3 + [16] * 3 + [8] * 4
    assert mmfs_sites(config, 64, "skip") == list(zip(channels, sides, strict=True))
    assert mmfs_sites(config, 64, "down") == [(320, 32), (640, 16), (1280, 8), (1280, 8)]
    assert mmfs_sites(config, 64, "up") == [(1280, 16), (1280, 32), (640, 64), (320, 64)]
    with pytest.raises(ValueError, match="mmfs_placement: expected 'skip', 'up' or 'down', got 'middle'"):
        mmfs_sites(config, 64, "middle")


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("layers", [1, 2])
def test_sites_are_what_the_unet_makes(placement, layers):
    config = replace(CONFIG, layers_per_block=layers)
    unet = build_unet(config, SIDE, 3, TOKENS)
    made: list[Tensor] = []
    blocks = unet.up_blocks if placement == "up" else unet.down_blocks
    for block in blocks:
        block.register_forward_hook(lambda m, i, out: made.append(out if placement == "up" else out[0]))
    sample, timestep, tokens, *_ = inputs(torch.float32)
    skips, mid = captured(unet, sample, timestep, tokens)
    made = [*skips, mid] if placement == "skip" else made
    assert [(x.shape[1], x.shape[2]) for x in made] == mmfs_sites(config, SIDE, placement)


def test_an_image_that_is_not_visible_has_no_part():
    unet, mmfs = build("skip")
    *before, maps, visible = inputs()
    maps.requires_grad_()
    ours(unet, mmfs, "skip", *before, maps, visible)[0].sum().backward()
    assert maps.grad[:2].abs().amax((1, 2)).min() > 0
    assert torch.equal(maps.grad[2:], torch.zeros_like(maps.grad[2:]))


def test_without_any_image_the_maps_take_part_with_zero_gradients():
    unet, mmfs = build("skip")
    sample, timestep, tokens, maps, _ = inputs()
    nothing = torch.zeros(2, 2, dtype=torch.int32)
    out = ours(unet, mmfs, "skip", sample, timestep, tokens, maps[:0], nothing)
    out.sum().backward()
    for name, parameter in mmfs.named_parameters():
        assert parameter.grad is not None or not parameter.requires_grad, name
    torch.testing.assert_close(out, ours(unet, mmfs, "skip", sample, timestep, tokens, maps, nothing))


def test_dense_attention_runs_in_its_place():
    unet, mmfs = build("skip", config=replace(MMFS, kind="dense"))
    arguments = inputs()
    out = ours(unet, mmfs, "skip", *arguments)
    plain = unet(*arguments[:2], encoder_hidden_states=arguments[2]).sample
    assert out.isfinite().all() and not torch.allclose(out, plain)


def test_base_of_the_offsets_is_the_blocks_own_side_unless_set():
    sites = mmfs_sites(CONFIG, SIDE, "skip")
    assert [block.mmfs.base for block in build("skip")[1].blocks] == [side for _, side in sites]
    fixed = UNetMMFS(sites, WIDTH, replace(MMFS, base=5), SHAPES)
    assert {block.mmfs.base for block in fixed.blocks} == {5}


def test_pixel_centres_stay_exact_in_bfloat16():
    _, mmfs = build("skip", torch.bfloat16)
    assert not any(block.pixels.is_floating_point() for block in mmfs.blocks)
    assert mmfs.blocks[0].pixels[SIDE + 2].tolist() == [2, 1]  # (x, y), row-major


def test_a_feature_map_of_another_size_is_refused():
    _, mmfs = build("skip")
    with pytest.raises(ValueError, match=r"feature map of \(4, 4\) pixels where the block was built for 8"):
        mmfs.blocks[0](torch.zeros(1, 8, 4, 4), torch.zeros(0), torch.zeros(1, 2))


def test_positions_mean_the_same_place_at_every_resolution():
    assert torch.equal(position_embedding(64, 8), sincos_2d(64, 64, 8))
    fine, coarse = position_embedding(32, 8).view(32, 32, 8), position_embedding(16, 8).view(16, 16, 8)
    blocks = fine.view(16, 2, 16, 2, 8).mean((1, 3))
    slow = [1, 3, 5, 7]  # of each half, the slow sines and cosines
    torch.testing.assert_close(coarse[2:-2, 2:-2, slow], blocks[2:-2, 2:-2, slow], rtol=0, atol=0.02)


# ---------------------------------------------------------------- the release's names and arguments

RELEASED = {"input_channel": 12, "block_out_channels": [8, 16, 16, 16]}
CHANNELS = [8] * 4 + [16] * 9
SIDES = [8] * 3 + [4] * 3 + [2] * 3 + [1] * 4


def released_state(dtype: torch.dtype = torch.float64, positions: bool = False) -> dict[str, Tensor]:
    """Random tensors under every name of the release, at small width."""
    generator, state = torch.Generator().manual_seed(2), {}
    for index, width in enumerate(CHANNELS):
        block = "mmfs_mid_block." if index == 12 else f"mmfs_down_blocks.{index}."
        shapes = {
            "query_norm.weight": (width,), "query_norm.bias": (width,),
            "feat_norm.weight": (12,), "feat_norm.bias": (12,),
            "mmfs.ignore_token": (1, 1, 1, 32), "mmfs.query_relpos.weight": (10, width),
            "mmfs.sampling_offsets.weight": (256, width), "mmfs.sampling_offsets.bias": (256,),
            "mmfs.dynamic_offset_mask.weight": (width, width), "mmfs.dynamic_offset_mask.bias": (width,),
            "mmfs.attention_weights.weight": (576, width), "mmfs.attention_weights.bias": (576,),
            "mmfs.value_proj.weight": (32, 12), "mmfs.value_proj.bias": (32,),
            "mmfs.output_proj.weight": (width, 32), "mmfs.output_proj.bias": (width,),
            "conv.weight": (width, width, 1, 1), "conv.bias": (width,),
        }  # fmt: skip
        for name, shape in shapes.items():
            scale = 0.1 if "offsets" in name else 0.3
            state[block + name] = scale * torch.randn(shape, generator=generator, dtype=dtype)
        if positions:
            state[f"{block}pos_embed"] = sincos_2d(64, 64, width).to(dtype)
    return state


def released_inputs(scale: int = 1):
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    features = [normal(2, c, side * scale, side * scale) for c, side in zip(CHANNELS, SIDES, strict=True)]
    maps = [normal(2, 3, 12, h, w) for h, w in SHAPES]
    return features[:-1], features[-1], maps


@pytest.mark.parametrize("visibility", [[[1, 1, 1], [0, 1, 1]], [[1, 0, 1], [0, 0, 0]]])
@pytest.mark.parametrize("scale", [1, 2])
def test_the_releases_unet_mmfs_equals_its_definition(visibility, scale):
    state = released_state()
    module = unet_mmfs(state, RELEASED)
    skips, mid, maps = released_inputs(scale)
    found, found_mid = module(skips, mid, maps, torch.tensor(visibility))
    flat = torch.cat([level.flatten(3) for level in maps], 3).transpose(2, 3)
    for index in (0, 4, 12):  # the definition is slow
        x, block = [*skips, mid][index], module.core.blocks[index]
        for row in range(2):
            seen = flat[row][torch.tensor(visibility[row]).bool()]
            wanted = added(block, x[row : row + 1], seen, torch.tensor([[0, len(seen)]]))
            got = [*found, found_mid][index][row : row + 1] - x[row : row + 1]
            assert wanted.abs().max() > 1e-3
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)


def test_the_releases_tensors_go_where_their_names_say():
    state = released_state()
    block = unet_mmfs(state, RELEASED).core.blocks[4]
    theirs = {name.removeprefix("mmfs_down_blocks.4."): t for name, t in state.items() if "blocks.4." in name}
    assert torch.equal(block.conv.weight, theirs["conv.weight"][:, :, 0, 0])
    assert torch.equal(block.maps_norm.weight, theirs["feat_norm.weight"])
    live = theirs["mmfs.attention_weights.weight"].view(16, 4, 9, 16)[:, :, :8]
    assert torch.equal(block.mmfs.logits.weight, live.reshape(512, 16))
    assert block.mmfs.base == block.side and block.mmfs.logits.weight.dtype == torch.float64


def test_the_releases_names_save_what_they_loaded():
    state = released_state(torch.float32, positions=True)
    module = unet_mmfs(state, RELEASED)
    sites = [(width, 64) for width in CHANNELS]
    saved = save(module.core.state_dict(), unet_mmfs_table(sites, 16, 4, 8))
    assert saved.keys() == state.keys()
    for name, tensor in state.items():
        if "attention_weights" in name:  # dead rows come back as zeros
            tensor = tensor.unflatten(0, (16, 4, 9)).clone()
            tensor[:, :, 8] = 0
            tensor = tensor.flatten(0, 2)
        assert torch.equal(saved[name], tensor), name


def test_parameters_of_the_release_stay_the_same_ones_at_another_size():
    module = unet_mmfs(released_state(), RELEASED)
    before = dict(module.named_parameters())
    skips, mid, maps = released_inputs()
    module(skips, mid, maps, torch.ones(2, 3))[1].sum().backward()
    after = dict(module.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert after["core.blocks.12.conv.weight"].grad is not None


def test_a_state_dict_that_does_not_fit_is_refused():
    def message(**changes) -> str:
        state = {name: t for name, t in (released_state() | changes).items() if t is not None}
        with pytest.raises(ValueError) as error:
            unet_mmfs(state, RELEASED)
        return str(error.value)

    conv, positions = "mmfs_down_blocks.3.conv.weight", "mmfs_mid_block.pos_embed"
    assert f"missing ['{conv}']" in message(**{conv: None})
    assert "missing mmfs_mid_block.mmfs.value_proj.weight" in message(
        **{"mmfs_mid_block.mmfs.value_proj.weight": None}
    )
    assert "left over ['other']" in message(other=torch.zeros(1))
    assert f"{conv} has shape (8, 8), expected (8, 8, 1, 1)" in message(**{conv: torch.zeros(8, 8)})
    wrong = torch.zeros(4096, 16)
    assert f"{positions} is a constant of the model and has another value" in message(**{positions: wrong})


def test_features_and_maps_that_do_not_fit_are_refused():
    module: ReleasedUNetMMFS = unet_mmfs(released_state(), RELEASED)
    skips, mid, maps = released_inputs()
    with pytest.raises(ValueError, match="maps: expected 4 of"):
        module(skips, mid, maps[:3], torch.ones(2, 3))
    with pytest.raises(ValueError, match="features: expected batch 2 and channels"):
        module(skips[:11], mid, maps, torch.ones(2, 3))
