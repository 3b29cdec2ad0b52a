"""Denoising diffusion: the schedule, training targets, keyed noise and samplers.

DDPM (Ho et al. 2020), DDIM (Song et al. 2020), v targets (Salimans and Ho 2022), with diffusers'
schedulers doing the arithmetic.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

from mmi_megatron.config import DecoderConfig

PREDICTION = {"epsilon": "epsilon", "v": "v_prediction"}
SAMPLERS = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler}


@dataclass
class DrawKeys:
    """The random part of drawing J images in training; on the CPU as drawn.

    Attributes:
        noise: float32 [J, c, h, w], standard normal, added to the latents.
        timestep: int64 [J], uniform in 0 .. timesteps - 1.
        drop: bool [J], whether the learned negatives replace the context.
        latent_noise: float32 [J, c, h, w], for the sample of the VAE's posterior; None in pixel space.
    """

    noise: Tensor
    timestep: Tensor
    drop: Tensor
    latent_noise: Tensor | None = None

    def to(self, device: torch.device) -> DrawKeys:
        """The same on a device."""
        latent = None if self.latent_noise is None else self.latent_noise.to(device, non_blocking=True)
        return DrawKeys(
            self.noise.to(device, non_blocking=True),
            self.timestep.to(device, non_blocking=True),
            self.drop.to(device, non_blocking=True),
            latent,
        )


def draw_keys(
    image_ids: Sequence[int],
    seed: int,
    step: int,
    *,
    shape: tuple[int, int, int],
    timesteps: int,
    drop: float,
    latent: bool,
) -> DrawKeys:
    """Draw the keys of images, each from its own generator.

    The generator is NumPy's Philox, keyed by the BLAKE2b digest of (seed, step, image id): the same
    numbers for an image on any layout and platform, unrelated for any other key.

    Args:
        image_ids: of the J images.
        seed, step: of the run.
        shape: (c, h, w) of the noise.
        timesteps: of the schedule.
        drop: probability of ``DrawKeys.drop``.
        latent: whether to draw ``latent_noise`` too.
    """
    count = len(image_ids)
    noise = np.empty((count, 1 + latent, *shape), np.float32)
    timestep, dropped = np.empty(count, np.int64), np.empty(count, bool)
    for index, image in enumerate(image_ids):
        key = hashlib.blake2b(f"drawn image:{seed}:{step}:{image}".encode(), digest_size=16).digest()
        random = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
        timestep[index] = random.integers(timesteps)
        dropped[index] = random.random() < drop
        random.standard_normal(dtype=np.float32, out=noise[index])
    drawn = torch.from_numpy(noise)
    return DrawKeys(
        drawn[:, 0], torch.from_numpy(timestep), torch.from_numpy(dropped), drawn[:, 1] if latent else None
    )


class Diffusion:
    """The schedule of a decoder. Holds no tensors of the model's device or dtype."""

    def __init__(self, config: DecoderConfig):
        self.timesteps, self.target_kind = config.timesteps, config.target
        self.options = {
            "num_train_timesteps": config.timesteps,
            "beta_schedule": config.beta_schedule,
            "beta_start": config.beta_start,
            "beta_end": config.beta_end,
            "prediction_type": PREDICTION[config.target],
            # The clean image is known to lie within -1..1 in pixel space only.
            "clip_sample": config.vae is None,
        }
        with torch.device("cpu"):
            self.schedule = DDPMScheduler(**self.options)

    def noisy(self, clean: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """sqrt(a_t) clean + sqrt(1 - a_t) noise, with a_t the cumulative product of alphas; all
        [J, c, h, w], timestep int64 [J]."""
        return self.schedule.add_noise(clean, noise, timestep)

    def target(self, clean: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """What the U-Net is to predict: the noise, or v = sqrt(a_t) noise - sqrt(1 - a_t) clean."""
        if self.target_kind == "epsilon":
            return noise
        return self.schedule.get_velocity(clean, noise, timestep)

    @torch.no_grad()
    def sample(
        self,
        predict: Callable[[Tensor, Tensor], Tensor],
        shape: tuple[int, int, int],
        seeds: Sequence[int],
        *,
        steps: int,
        scheduler: str,
        device: torch.device,
    ) -> Tensor:
        """Draw from noise.

        Args:
            predict: the prediction for x [J, c, h, w] and timestep int64 [J], of the target's kind.
            shape: (c, h, w).
            seeds: one for each of the J images, of its start and, in DDPM, of the noise of its steps.
            steps: how many of the schedule's timesteps are visited.
            scheduler: ``ddim`` (deterministic after the start) or ``ddpm``.
            device: where to draw.

        Returns:
            float32 [J, c, h, w].

        Raises:
            ValueError: for an unknown scheduler, or more steps than the schedule has.
        """
        stepper = self.sampler(scheduler, steps)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        x = torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device)
        if scheduler == "ddpm":
            options: dict = {"generator": generators}
        else:
            # Where the clean image is clipped, the noise follows from the clipped one.
            options = {"use_clipped_model_output": self.options["clip_sample"]}
        for t in stepper.timesteps:
            predicted = predict(x, t.to(device).expand(len(x)))
            x = stepper.step(predicted.float(), t, x, **options).prev_sample
        return x

    def sampler(self, kind: str, steps: int) -> DDIMScheduler | DDPMScheduler:
        """diffusers' scheduler as Stable Diffusion sets it up, at its timesteps."""
        if kind not in SAMPLERS:
            raise ValueError(f"scheduler: expected one of {', '.join(SAMPLERS)}, got {kind!r}")
        if not 1 <= steps <= self.timesteps:
            raise ValueError(f"steps: expected 1 to {self.timesteps}, the schedule's timesteps, got {steps}")
        # The offset of 1 is Stable Diffusion's; at all steps it would run past the last.
        options = self.options | {"steps_offset": int(steps < self.timesteps), "timestep_spacing": "leading"}
        if kind == "ddim":
            options["set_alpha_to_one"] = False
        with torch.device("cpu"):
            sampler = SAMPLERS[kind](**options)
            sampler.set_timesteps(steps)
        return sampler


def guided(without: Tensor, with_context: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance (Ho and Salimans 2022): away from the prediction without context."""
    return without + guidance * (with_context - without)
