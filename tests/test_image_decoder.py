"""The image decoder: loss, guidance, sampling, VAE, averages; sizes of the full model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from mmi_megatron.config import DecoderConfig, MMFSConfig, ResamplerConfig, UNetConfig, VAEConfig
from mmi_megatron.model.ema import Average
from mmi_megatron.model.image_decoder import ImageDecoder, referenced
from mmi_megatron.model.positions import sincos_1d
from mmi_megatron.model.unet_mmfs import Looks, run_unet

SHAPES = ((4, 4), (2, 2), (1, 1), (1, 1))
POSITIONS = sum(h * w for h, w in SHAPES)
CONTEXT, WIDTH = 12, 8
CONFIG = DecoderConfig(
    image_size=8,
    unet=UNetConfig(
        channels=[16, 32], attention=[False, True], layers_per_block=1, head_width=8, norm_groups=4
    ),
    vae=None,
    resampler=ResamplerConfig(queries=3, width=16, layers=1, heads=2, ffn=32, cross_every=1, qk_norm=False),
    mmfs=MMFSConfig(heads=2, points=2, value_width=8, table_rows=3, levels=[0, 1, 2, 3], base=0),
)
LATENT = replace(
    CONFIG,
    image_size=16,
    vae=VAEConfig(channels=[8, 16], layers_per_block=1, latent_channels=4, norm_groups=4),
)


def build(config: DecoderConfig = CONFIG, randomise: bool = True) -> ImageDecoder:
    torch.manual_seed(0)
    decoder = ImageDecoder(config, CONTEXT, WIDTH, SHAPES)
    if randomise:  # so that what goes in makes a difference from the start
        for name, parameter in decoder.named_parameters():
            if "resampler" in name and parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.4)
        for block in decoder.unet_mmfs.blocks if decoder.unet_mmfs else ():
            torch.nn.init.normal_(block.conv.weight, std=0.5)
    return decoder


def inputs(count: int = 3, side: int = 8, seed: int = 0) -> dict[str, Tensor]:
    """Arguments of ``loss`` without its keys; image j refers to the images before it."""
    generator = torch.Generator().manual_seed(seed)
    length = torch.arange(2, 2 + count)
    return {
        "pixels": torch.randint(0, 256, (count, 3, side, side), generator=generator, dtype=torch.uint8),
        "context": torch.randn(count, 1 + count, CONTEXT, generator=generator),
        "context_mask": torch.arange(1 + count) < length[:, None],
        "maps": torch.randn(count, POSITIONS, WIDTH, generator=generator),
        "references": torch.tensor([[max(j - 2, 0), j] for j in range(count)], dtype=torch.int32),
    }


def of_image(arguments: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    """One image's arguments, without the others' padding and maps."""
    first, last = arguments["references"][index].tolist()
    alone = {name: t[index : index + 1] for name, t in arguments.items() if name != "maps"}
    length = int(alone["context_mask"].sum())
    alone |= {name: alone[name][:, :length] for name in ("context", "context_mask")}
    references = torch.tensor([[0, last - first]], dtype=torch.int32)
    return alone | {"maps": arguments["maps"][first:last], "references": references}


def without_pixels(arguments: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in arguments.items() if name != "pixels"}


# ---------------------------------------------------------------- loss


@pytest.mark.parametrize("target", ["epsilon", "v"])
def test_loss_is_the_mean_squared_error_of_the_prediction(target):
    decoder, given = build(replace(CONFIG, target=target, guidance_drop=0.0)), inputs()
    keys = decoder.draw_keys([4, 5, 6], seed=1, step=2)
    clean = given["pixels"].double() / 255 * 2 - 1
    alpha = decoder.diffusion.schedule.alphas_cumprod[keys.timestep].double().view(-1, 1, 1, 1)
    noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * keys.noise
    wanted = keys.noise if target == "epsilon" else alpha.sqrt() * keys.noise - (1 - alpha).sqrt() * clean
    context = decoder.context_proj(given["context"]) + sincos_1d(4, CONTEXT)
    tokens = decoder.resampler(context, given["context_mask"])
    looks = Looks(decoder.unet_mmfs, "skip", decoder.unet_mmfs.project(given["maps"]), given["references"])
    predicted = run_unet(decoder.unet, looks, noisy.float(), keys.timestep, tokens)
    loss = decoder.loss(**given, keys=keys)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(
        loss.double(), (predicted.double() - wanted).square().mean((1, 2, 3)), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("config", [CONFIG, LATENT], ids=["pixels", "latents"])
def test_loss_of_an_image_does_not_depend_on_its_batch(config):
    decoder, given = build(config), inputs(4, config.image_size)
    whole = decoder.loss(**given, keys=decoder.draw_keys([7, 8, 9, 10], 0, 0))
    for index in range(4):
        alone = decoder.loss(**of_image(given, index), keys=decoder.draw_keys([7 + index], 0, 0))
        torch.testing.assert_close(alone[0], whole[index], rtol=1e-5, atol=1e-6)


def test_context_references_and_their_order_count():
    decoder, given = build(replace(CONFIG, guidance_drop=0.0)), inputs()
    keys = decoder.draw_keys([1, 2, 3], 0, 0)
    loss = decoder.loss(**given, keys=keys)
    padded = given["context"] + 100 * ~given["context_mask"][..., None]
    torch.testing.assert_close(decoder.loss(**given | {"context": padded}, keys=keys), loss)
    back = {"context": given["context"].flip(1), "context_mask": given["context_mask"].flip(1)}
    assert (decoder.loss(**given | back, keys=keys) - loss).abs().min() > 1e-6
    other = decoder.loss(**given | {"maps": given["maps"].flip(0)}, keys=keys)
    assert torch.equal(other[0], loss[0])  # the first refers to no image
    assert (other[1:] - loss[1:]).abs().min() > 1e-6


def test_dropped_images_see_the_negatives_and_still_their_references():
    decoder, given = build(), inputs()
    keys = decoder.draw_keys([1, 2, 3], 0, 0)
    keys.drop = torch.tensor([True, False, True])
    loss = decoder.loss(**given, keys=keys)
    loss.sum().backward()
    assert decoder.negatives.grad.abs().max() > 0
    other = decoder.loss(**given | {"context": given["context"] + 1}, keys=keys)
    assert torch.equal(loss[[0, 2]], other[[0, 2]]) and loss[1] != other[1]
    other = decoder.loss(**given | {"maps": given["maps"] + torch.randn(3, POSITIONS, WIDTH)}, keys=keys)
    assert loss[2] != other[2]


@pytest.mark.parametrize("placement", ["skip", "up", "down"])
@pytest.mark.parametrize("kind", ["deformable", "dense", "none"])
def test_every_placement_and_kind_trains_all_its_parameters(placement, kind):
    mmfs = replace(CONFIG.mmfs, kind=kind)
    decoder = build(replace(CONFIG, mmfs=mmfs, mmfs_placement=placement, guidance_drop=0.5))
    given = inputs()
    given["maps"].requires_grad_()
    keys = decoder.draw_keys([1, 2, 3], 0, 0)
    keys.drop = torch.tensor([True, False, False])
    decoder.loss(**given, keys=keys).sum().backward()
    assert (given["maps"].grad is not None) == (kind != "none")
    for name, parameter in decoder.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    frozen = [name for name, parameter in decoder.named_parameters() if not parameter.requires_grad]
    assert all(name.endswith("mmfs.sink_value") for name in frozen)


@pytest.mark.parametrize("target, steps", [("epsilon", 60), ("v", 100)])
def test_both_targets_learn_what_the_context_says(target, steps):
    """Two plain images, told apart by the context alone, on 8 x 8 pixels."""
    unet = replace(CONFIG.unet, channels=[16], attention=[True])
    decoder = build(replace(CONFIG, target=target, unet=unet, mmfs_placement="up"), randomise=False)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=5e-3)
    colours = torch.tensor([[230, 30, 30], [30, 30, 230]], dtype=torch.uint8)
    states, which = torch.randn(2, CONTEXT), torch.arange(16) % 2
    given = inputs(16) | {"pixels": colours[which][..., None, None].expand(-1, -1, 8, 8)}
    given["context"] = states[which, None].expand(-1, 17, -1)
    losses = []
    for step in range(steps):
        loss = decoder.loss(**given, keys=decoder.draw_keys(range(16), 0, step)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) / 10 < 0.25 * losses[0], losses[::10]
    if target == "v":  # the noise says little about plain colours while it is strong
        given = without_pixels(inputs(2)) | {"context": states[:, None].expand(-1, 3, -1)}
        drawn = decoder.sample(**given, steps=10, guidance=2.0, generator_seeds=[1, 2])
        assert (drawn.float().mean((2, 3)) - colours).abs().max() < 60, drawn.float().mean((2, 3))


def test_bfloat16_keeps_schedule_noise_and_loss_in_float32():
    decoder, given = build(), inputs()
    keys = decoder.draw_keys([1, 2, 3], 0, 0)
    wanted = decoder.loss(**given, keys=keys)
    decoder.bfloat16()
    given = {name: t.bfloat16() if t.is_floating_point() else t for name, t in given.items()}
    loss = decoder.loss(**given, keys=keys)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, wanted, rtol=0.03, atol=0)
    loss.sum().backward()
    drawn = decoder.sample(**without_pixels(given), steps=3, guidance=2.0, generator_seeds=[1, 2, 3])
    assert drawn.dtype == torch.uint8


def test_no_image_costs_nothing_and_every_parameter_can_still_take_part():
    decoder, given = build(LATENT), inputs(1, 16)
    nothing = {name: tensor[:0] for name, tensor in given.items()}
    assert decoder.loss(**nothing, keys=decoder.draw_keys([], 0, 0)).shape == (0,)
    options = {"steps": 2, "guidance": 2.0, "generator_seeds": []}
    assert decoder.sample(**without_pixels(nothing), **options).shape == (0, 3, 16, 16)
    zero = decoder.zero_term()
    assert zero == 0
    zero.backward()
    for name, parameter in decoder.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, torch.zeros_like(parameter)), name
        else:
            assert name.startswith("vae.") or name.endswith("sink_value")
    assert decoder.requires_grad_(False).zero_term() == 0


def test_what_does_not_fit_is_refused():
    decoder, given = build(), inputs()
    keys = decoder.draw_keys([1, 2, 3], 0, 0)
    with pytest.raises(ValueError, match=r"pixels: expected uint8 \[J, 3, 8, 8\], got torch.float32"):
        decoder.loss(**given | {"pixels": given["pixels"].float()}, keys=keys)
    with pytest.raises(
        ValueError, match=r"pixels: expected uint8 \[J, 3, 8, 8\], got torch.uint8 \(3, 3, 4, 8\)"
    ):
        decoder.loss(**given | {"pixels": given["pixels"][:, :, :4]}, keys=keys)
    with pytest.raises(ValueError, match="references: expected intervals within 2 images"):
        decoder.loss(**given | {"maps": given["maps"][:2], "references": given["references"] + 1}, keys=keys)
    with pytest.raises(ValueError, match="generator_seeds: expected one for each of 3 images, got 1"):
        decoder.sample(**without_pixels(given), steps=1, guidance=1.0, generator_seeds=[1])


def test_only_images_that_are_referred_to_are_projected():
    maps = torch.arange(6.0)[:, None, None].expand(6, POSITIONS, WIDTH)
    kept, intervals = referenced(maps, torch.tensor([[1, 3], [2, 3], [4, 4], [5, 6]], dtype=torch.int32))
    assert kept[:, 0, 0].tolist() == [1, 2, 5]
    assert intervals.tolist() == [[0, 2], [1, 2], [2, 2], [2, 3]] and intervals.dtype == torch.int32
    kept, intervals = referenced(maps[:2], torch.tensor([[0, 1], [1, 2]], dtype=torch.int32))
    assert kept is not None and len(kept) == 2 and intervals.tolist() == [[0, 1], [1, 2]]
    kept, intervals = referenced(maps, torch.tensor([[0, 0], [6, 6]], dtype=torch.int32))
    assert len(kept) == 0 and intervals.tolist() == [[0, 0], [0, 0]]
    for wrong in ([[0, 7]], [[-1, 2]], [[3, 2]]):
        with pytest.raises(ValueError, match="within 6 images"):
            referenced(maps, torch.tensor(wrong))


# ---------------------------------------------------------------- sampling


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm"])
@pytest.mark.parametrize("config", [CONFIG, LATENT], ids=["pixels", "latents"])
def test_a_drawn_image_does_not_depend_on_its_batch(config, scheduler):
    decoder, given = build(config), without_pixels(inputs(3, config.image_size))
    options = {"steps": 4, "guidance": 2.5, "scheduler": scheduler}
    whole = decoder.sample(**given, **options, generator_seeds=[5, 6, 7])
    assert whole.dtype == torch.uint8 and whole.shape == (3, 3, config.image_size, config.image_size)
    for index in range(3):
        alone = decoder.sample(**of_image(given, index), **options, generator_seeds=[5 + index])
        assert (alone[0].int() - whole[index].int()).abs().max() <= 1  # rounding
    other = decoder.sample(**given, **options, generator_seeds=[6, 6, 7])
    assert not torch.equal(other[0], whole[0])


def test_one_step_of_guided_sampling_written_out():
    decoder, given = build(), without_pixels(inputs(2))
    noise = torch.stack([torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(s)) for s in (3, 4)])
    looks = Looks(decoder.unet_mmfs, "skip", decoder.unet_mmfs.project(given["maps"]), given["references"])
    tokens = decoder.tokens(given["context"], given["context_mask"])
    time = torch.ones(2, dtype=torch.int64)  # a single step visits timestep 1
    with torch.no_grad():
        with_context = run_unet(decoder.unet, looks, noise, time, tokens)
        without = run_unet(decoder.unet, looks, noise, time, decoder.negatives.expand_as(tokens))
    alpha = decoder.diffusion.schedule.alphas_cumprod
    for guidance in (1.0, 0.0, 3.5):
        predicted = without + guidance * (with_context - without)
        clean = ((noise - (1 - alpha[1]).sqrt() * predicted) / alpha[1].sqrt()).clamp(-1, 1)
        implied = (noise - alpha[1].sqrt() * clean) / (1 - alpha[1]).sqrt()
        wanted = alpha[0].sqrt() * clean + (1 - alpha[0]).sqrt() * implied
        wanted = ((wanted.clamp(-1, 1) + 1) / 2 * 255).round()
        found = decoder.sample(**given, steps=1, guidance=guidance, generator_seeds=[3, 4])
        assert (found.float() - wanted).abs().max() <= 1


# ---------------------------------------------------------------- VAE


def test_latents_are_a_sample_of_the_vaes_posterior_times_its_factor():
    decoder, given = build(LATENT), inputs(2, 16)
    vae: AutoencoderKL = decoder.vae
    keys = decoder.draw_keys([1, 2], 0, 0)
    latents = decoder.encode(given["pixels"], keys.latent_noise)
    posterior = vae.encode(given["pixels"] / 127.5 - 1).latent_dist
    wanted = (posterior.mean + torch.exp(0.5 * posterior.logvar) * keys.latent_noise) * 0.18215
    torch.testing.assert_close(latents, wanted)
    drawn = decoder.decode(latents)
    exact = ((vae.decode(latents / 0.18215).sample + 1) * 127.5).clamp(0, 255).round()
    assert (drawn.float() - exact).abs().max() <= 1
    assert latents.shape == (2, *decoder.latent_shape) == (2, 4, 8, 8)


def test_the_vae_is_frozen():
    decoder, given = build(LATENT), inputs(2, 16)
    decoder.loss(**given, keys=decoder.draw_keys([1, 2], 0, 0)).sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in decoder.vae.parameters())
    assert decoder.unet.conv_in.weight.grad.abs().max() > 0


def test_pixels_survive_pixel_space():
    decoder, pixels = build(), inputs()["pixels"]
    assert torch.equal(decoder.decode(decoder.encode(pixels, None)), pixels)


# ---------------------------------------------------------------- averages


def test_the_average_follows_its_formula_and_is_used_inside_only():
    decoder = build(replace(CONFIG, ema=0.5))
    weight = decoder.unet.conv_in.weight
    with decoder.averaged():  # before the first update there is no average
        assert decoder.unet.conv_in.weight is weight
    wanted = None
    for step in range(12):
        with torch.no_grad():
            weight.add_(torch.randn_like(weight))
        decoder.update_average()
        decay = min(0.5, (1 + step) / (10 + step))
        wanted = weight.detach().clone() if step == 0 else decay * wanted + (1 - decay) * weight.detach()
        torch.testing.assert_close(decoder.average.get_buffer("unet.conv_in.weight"), wanted)
    now = weight.detach().clone()
    with decoder.averaged():
        torch.testing.assert_close(decoder.unet.conv_in.weight.detach(), wanted)
    assert torch.equal(decoder.unet.conv_in.weight, now) and decoder.unet.conv_in.weight is weight
    with pytest.raises(RuntimeError, match="inside"), decoder.averaged():
        raise RuntimeError("inside")
    assert torch.equal(decoder.unet.conv_in.weight, now)


def test_the_average_is_saved_covers_what_is_trained_and_stays_float32():
    decoder = build(replace(LATENT, ema=0.999))
    decoder.update_average()
    trained = {name for name, parameter in decoder.named_parameters() if parameter.requires_grad}
    state = decoder.state_dict()
    kept = {name.removeprefix("average.") for name in state if name.startswith("average.")}
    assert kept == trained | {"updates"}
    other = build(replace(LATENT, ema=0.999))
    with torch.no_grad():
        other.unet.conv_in.weight.add_(1)
    other.load_state_dict(state)
    assert torch.equal(other.average.get_buffer("unet.conv_in.weight"), state["average.unet.conv_in.weight"])
    decoder.bfloat16()
    assert decoder.average.get_buffer("unet.conv_in.weight").dtype == torch.float32
    with decoder.averaged():
        assert decoder.unet.conv_in.weight.dtype == torch.bfloat16
    before = decoder.average.get_buffer("negatives").clone()
    with torch.no_grad():
        decoder.negatives.mul_(1.01)
    decoder.update_average()
    assert (decoder.average.get_buffer("negatives") != before).float().mean() > 0.9


def test_no_average_when_off_or_when_nothing_is_trained():
    for config in (CONFIG, replace(CONFIG, ema=0.9, frozen=True)):
        decoder = build(config)
        assert decoder.average is None
        decoder.update_average()
        with decoder.averaged():
            pass


def test_an_average_moves_without_losing_precision():
    module = torch.nn.Linear(2, 2)
    average = Average(module, 0.9)
    value = average.get_buffer("weight").clone()
    average.half()
    assert torch.equal(average.get_buffer("weight"), value)


# ---------------------------------------------------------------- the full model


def count(module: torch.nn.Module, trained: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


@pytest.fixture(scope="module")
def full() -> ImageDecoder:
    with torch.device("meta"):
        return ImageDecoder(DecoderConfig(), 5120, 1024, ((64, 64), (32, 32), (16, 16), (8, 8)))


def test_the_full_model_has_the_known_sizes(full):
    assert count(full.unet) == 865_910_724  # Stable Diffusion 2.1
    assert count(full.vae) == 83_653_863 and count(full.vae, trained=True) == 0
    assert round(count(full.resampler) / 1e6, 1) == 23.2
    assert round(count(full.context_proj) / 1e6, 1) == 26.2
    # The release's 57 M hold a ninth dead row of logits for every eight.
    dead = sum(64 * (block.conv.in_features + 1) for block in full.unet_mmfs.blocks)
    assert count(full.unet_mmfs) == 56_292_480 and round((56_292_480 + dead) / 1e6) == 57
    assert full.latent_shape == (4, 64, 64)


def test_the_full_unet_has_stable_diffusions_configuration(full):
    config = full.unet.config
    assert list(config.attention_head_dim) == [5, 10, 20, 20] and config.cross_attention_dim == 1024
    assert config.use_linear_projection and config.sample_size == 64 and config.layers_per_block == 2
    assert full.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.heads == 5
    assert "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight" in full.unet.state_dict()
    older = UNetConfig(heads=8, linear_projection=False)  # Stable Diffusion 1.5
    with torch.device("meta"):
        unet = ImageDecoder(
            replace(DecoderConfig(), unet=older, resampler=replace(CONFIG.resampler, width=768)), 8, 8, SHAPES
        ).unet
    assert count(unet) == 859_520_964
