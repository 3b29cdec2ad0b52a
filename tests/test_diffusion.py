"""Schedule, keyed noise and samplers: against their formulas, written out in float64."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from mmi_megatron.config import DecoderConfig, VAEConfig
from mmi_megatron.model.diffusion import Diffusion, draw_keys, guided

SHAPE = (2, 4, 4)
CPU = torch.device("cpu")


def diffusion(target: str = "epsilon", latent: bool = True, **settings) -> Diffusion:
    return Diffusion(DecoderConfig(target=target, vae=VAEConfig() if latent else None, **settings))


def alphas() -> torch.Tensor:
    """Stable Diffusion's cumulative products, from the definition of its schedule."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    return torch.from_numpy(np.cumprod(1 - betas))


def keys(ids, seed=0, step=0, **changes):
    options = {"shape": SHAPE, "timesteps": 1000, "drop": 0.1, "latent": True}
    return draw_keys(ids, seed, step, **(options | changes))


def denoiser(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """A prediction that depends on all it may depend on, image by image."""
    return torch.tanh(x) * 0.5 + (timestep.float() / 1000).view(-1, 1, 1, 1)


# ---------------------------------------------------------------- training


def test_noisy_images_and_targets_follow_their_formulas():
    clean, noise = torch.randn(2, 5, *SHAPE).unbind()
    timestep = torch.tensor([0, 1, 400, 998, 999])
    signal = alphas()[timestep].sqrt().view(-1, 1, 1, 1)
    sigma = (1 - alphas()[timestep]).sqrt().view(-1, 1, 1, 1)
    for target in ("epsilon", "v"):
        process = diffusion(target)
        wanted = noise if target == "epsilon" else signal * noise - sigma * clean
        noisy = process.noisy(clean, noise, timestep)
        torch.testing.assert_close(noisy, (signal * clean + sigma * noise).float(), atol=2e-6, rtol=1e-5)
        found = process.target(clean, noise, timestep)
        torch.testing.assert_close(found, wanted.float(), atol=2e-6, rtol=1e-5)


def test_keys_of_an_image_do_not_depend_on_its_batch():
    whole = keys([5, 9, 2**40, -3], seed=7, step=11)
    for index, image in enumerate([5, 9, 2**40, -3]):
        alone = keys([image], seed=7, step=11)
        for name in ("noise", "timestep", "drop", "latent_noise"):
            assert torch.equal(getattr(whole, name)[index], getattr(alone, name)[0])
    back = keys([-3, 2**40, 9, 5], seed=7, step=11)
    assert torch.equal(back.noise, whole.noise.flip(0)) and torch.equal(back.timestep, whole.timestep.flip(0))


def test_keys_are_the_same_numbers_for_good():
    """A run that resumes under a later version must not get other noise."""
    drawn = keys([0, 1, 2], seed=3, step=4)
    assert drawn.timestep.tolist() == [902, 531, 111]
    for found, wanted in (
        (drawn.noise[:, 0, 0, 0], [1.194332, -0.54483, 0.372557]),
        (drawn.latent_noise[:, 1, 3, 3], [-0.727621, 2.37761, 0.812167]),
    ):
        torch.testing.assert_close(found, torch.tensor(wanted), rtol=0, atol=2e-6)
    assert keys(range(8), seed=3, step=4, drop=0.5).drop.tolist() == [
        False,
        False,
        False,
        False,
        True,
        True,
        True,
        False,
    ]


def test_any_other_key_gives_unrelated_noise():
    cases = [
        keys([i], s, t) for s, t, i in [(0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0, 11), (0, 1, 1), (1, 1, 0)]
    ]
    noise = torch.stack([torch.cat([case.noise, case.latent_noise]).flatten() for case in cases])
    assert torch.corrcoef(noise).triu(1).abs().max() < 0.5  # 64 numbers each: six standard deviations of 1/8
    assert (
        abs(float(torch.corrcoef(torch.stack([noise[:, :32].flatten(), noise[:, 32:].flatten()]))[0, 1]))
        < 0.4
    )


def test_keys_have_the_right_distribution():
    drawn = keys(range(20000))
    timestep = drawn.timestep.float()
    assert timestep.min() < 5 and timestep.max() > 994 and timestep.max() < 1000
    assert abs(timestep.mean() - 499.5) < 8 and abs(timestep.std() - 288.7) < 6
    assert abs(drawn.drop.float().mean() - 0.1) < 0.01
    assert abs(torch.corrcoef(torch.stack([timestep, drawn.drop.float()]))[0, 1]) < 0.03
    for noise in (drawn.noise, drawn.latent_noise):
        assert noise.dtype == torch.float32 and noise.shape == (20000, *SHAPE)
        assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    # Consecutive images are not related either.
    neighbours = torch.stack([drawn.noise[:-1].flatten(), drawn.noise[1:].flatten()])
    assert abs(torch.corrcoef(neighbours)[0, 1]) < 0.01


def test_pixel_space_needs_no_latent_noise_and_has_the_same_noise():
    assert keys([1], latent=False).latent_noise is None
    assert torch.equal(keys([1], latent=False).noise, keys([1]).noise)
    assert keys([]).noise.shape == (0, *SHAPE)


# ---------------------------------------------------------------- sampling


def clean_and_noise(predicted, x, alpha, target):
    """The clean image and the noise that a prediction implies."""
    if target == "epsilon":
        return (x - (1 - alpha).sqrt() * predicted) / alpha.sqrt(), predicted
    return (
        alpha.sqrt() * x - (1 - alpha).sqrt() * predicted,
        alpha.sqrt() * predicted + (1 - alpha).sqrt() * x,
    )


@pytest.mark.parametrize("latent", [True, False])
@pytest.mark.parametrize("target", ["epsilon", "v"])
def test_ddim_follows_its_formula(target, latent):
    steps, alpha = 8, alphas()
    start = torch.Generator().manual_seed(5)
    x = torch.randn(SHAPE, generator=start)[None].double()
    for t in reversed(range(1, 1000, 1000 // steps)):
        before = alpha[max(t - 1000 // steps, 0)]
        clean, noise = clean_and_noise(denoiser(x, torch.tensor([t])), x, alpha[t], target)
        if not latent:
            clean = clean.clamp(-1, 1)
            noise = (x - alpha[t].sqrt() * clean) / (1 - alpha[t]).sqrt()
        x = before.sqrt() * clean + (1 - before).sqrt() * noise
    found = diffusion(target, latent).sample(denoiser, SHAPE, [5], steps=steps, scheduler="ddim", device=CPU)
    torch.testing.assert_close(found, x.float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("target", ["epsilon", "v"])
def test_ddpm_follows_its_formula(target):
    steps, alpha = 8, alphas()
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(SHAPE, generator=generator)[None].double()
    for t in reversed(range(1, 1000, 1000 // steps)):
        before = alpha[t - 1000 // steps] if t > 1000 // steps else torch.ones((), dtype=torch.float64)
        ratio = alpha[t] / before
        clean, _ = clean_and_noise(denoiser(x, torch.tensor([t])), x, alpha[t], target)
        mean = before.sqrt() * (1 - ratio) * clean + ratio.sqrt() * (1 - before) * x
        x = mean / (1 - alpha[t])
        if t > 1:
            spread = (1 - before) / (1 - alpha[t]) * (1 - ratio)
            x = x + spread.sqrt() * torch.randn(1, *SHAPE, generator=generator)
    found = diffusion(target).sample(denoiser, SHAPE, [5], steps=steps, scheduler="ddpm", device=CPU)
    torch.testing.assert_close(found, x.float(), atol=1e-4, rtol=1e-4)


def test_ddim_equals_a_pipeline_with_stable_diffusions_scheduler_file():
    """stabilityai/stable-diffusion-2-1-base, scheduler/scheduler_config.json, in DDIM."""
    file = json.loads(
        '{"beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "clip_sample": false,'
        ' "num_train_timesteps": 1000, "prediction_type": "epsilon", "set_alpha_to_one": false,'
        ' "skip_prk_steps": true, "steps_offset": 1, "trained_betas": null}'
    )
    for steps in (1, 7, 50):
        scheduler = DDIMScheduler.from_config(file)
        scheduler.set_timesteps(steps)
        x = torch.stack([torch.randn(SHAPE, generator=torch.Generator().manual_seed(s)) for s in (1, 2)])
        for t in scheduler.timesteps:
            x = scheduler.step(denoiser(x, t.expand(2)), t, x).prev_sample
        found = diffusion().sample(denoiser, SHAPE, [1, 2], steps=steps, scheduler="ddim", device=CPU)
        assert torch.equal(found, x)


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm"])
def test_an_image_depends_on_its_own_seed_only(scheduler):
    def draw(seeds):
        return diffusion().sample(denoiser, SHAPE, seeds, steps=5, scheduler=scheduler, device=CPU)

    whole = draw([3, 4, 5])
    torch.testing.assert_close(draw([5, 3]), whole[[2, 0]], rtol=0, atol=1e-6)
    torch.testing.assert_close(draw([4]), whole[1:2], rtol=0, atol=1e-6)
    assert not torch.allclose(whole[0], whole[1])


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm"])
def test_a_perfect_denoiser_finds_the_image(scheduler):
    image = torch.rand(1, *SHAPE) * 2 - 1
    alpha = alphas().float()

    def perfect(x, timestep):
        a = alpha[timestep].view(-1, 1, 1, 1)
        return (x - a.sqrt() * image) / (1 - a).sqrt()

    found = diffusion().sample(perfect, SHAPE, [1], steps=100, scheduler=scheduler, device=CPU)
    torch.testing.assert_close(found, image, rtol=0, atol=0.1)


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm"])
def test_every_number_of_steps_up_to_the_schedules_own_works(scheduler):
    process = diffusion(timesteps=20)
    for steps in range(1, 21):
        timesteps = process.sampler(scheduler, steps).timesteps
        assert len(timesteps) == steps and timesteps.min() >= 0 and timesteps.max() < 20
        process.sample(denoiser, SHAPE, [1], steps=steps, scheduler=scheduler, device=CPU)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="steps: expected 1 to 1000, the schedule's timesteps, got 1001"):
        diffusion().sampler("ddim", 1001)
    with pytest.raises(ValueError, match="scheduler: expected one of ddim, ddpm, got 'euler'"):
        diffusion().sampler("euler", 10)


def test_guidance_goes_from_the_prediction_without_context_through_the_one_with_it():
    without, with_context = torch.tensor([1.0]), torch.tensor([3.0])
    assert [float(guided(without, with_context, g)) for g in (0, 1, 3.5)] == [1, 3, 8]
