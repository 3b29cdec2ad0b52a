"""Image decoder: draws an image from the language model's hidden states before it.

MM-Interleaved, section 3.2: a resampler turns the context's hidden states into the tokens that a
diffusion U-Net attends to; MMFS lets the U-Net look into the maps of earlier images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from mmi_megatron.config import DecoderConfig, VAEConfig
from mmi_megatron.model.diffusion import Diffusion, DrawKeys, draw_keys, guided
from mmi_megatron.model.ema import Average
from mmi_megatron.model.mmfs import Shapes
from mmi_megatron.model.perceiver import Resampler
from mmi_megatron.model.positions import sincos_1d
from mmi_megatron.model.unet_mmfs import Looks, UNetMMFS, build_unet, mmfs_sites, run_unet


class ImageDecoder(nn.Module):
    """Latent (or pixel) diffusion conditioned on context and earlier images.

    Args:
        config: of the decoder.
        context_width: of the language model's hidden states.
        maps_width: channels of the images' maps.
        shapes: (height, width) of the maps' levels.

    Attributes:
        unet: diffusers' UNet2DConditionModel.
        unet_mmfs: its MMFS, None when off.
        vae: diffusers' AutoencoderKL, frozen; None in pixel space.
        negatives: [queries, width], learned tokens that stand for no context.
    """

    positions: Tensor

    def __init__(self, config: DecoderConfig, context_width: int, maps_width: int, shapes: Shapes):
        super().__init__()
        self.config = config
        tokens = config.resampler
        self.context_proj = nn.Linear(context_width, context_width)
        nn.init.xavier_uniform_(self.context_proj.weight)
        nn.init.zeros_(self.context_proj.bias)
        self.resampler = Resampler(context_width, tokens)
        self.negatives = nn.Parameter(torch.empty(tokens.queries, tokens.width))
        nn.init.normal_(self.negatives)  # about as large as the resampler's tokens, which are normed
        self.vae = None if config.vae is None else build_vae(config.vae, config.image_size)
        shrinks = 1 if config.vae is None else 2 ** (len(config.vae.channels) - 1)
        side = config.image_size // shrinks
        channels = 3 if config.vae is None else config.vae.latent_channels
        self.latent_shape = (channels, side, side)
        self.unet = build_unet(config.unet, side, channels, tokens.width)
        self.unet_mmfs = None
        if config.mmfs.kind != "none":
            sites = mmfs_sites(config.unet, side, config.mmfs_placement)
            self.unet_mmfs = UNetMMFS(sites, maps_width, config.mmfs, shapes)
        self.diffusion = Diffusion(config)
        self.register_buffer("positions", torch.empty(0, context_width), persistent=False)
        self.average = Average(self, config.ema) if config.ema and not config.frozen else None

    def loss(
        self,
        pixels: Tensor,
        context: Tensor,
        context_mask: Tensor,
        maps: Tensor,
        references: Tensor,
        keys: DrawKeys,
    ) -> Tensor:
        """Next-image loss (equation 3): mean squared error of the prediction, over an image's elements.

        Args:
            pixels: uint8 [J, 3, image_size, image_size].
            context: [J, longest, context_width], hidden states from each image's BoI back to its BOS.
            context_mask: bool [J, longest], true where there is context.
            maps: [I, S, maps_width].
            references: int32 [J, 2], half-open interval of the images each may look at. On the CPU
                for preference: it is read there.
            keys: of ``draw_keys`` for these images.

        Returns:
            float32 [J].

        Raises:
            ValueError: on pixels or references that do not fit.
        """
        side = self.config.image_size
        if tuple(pixels.shape[1:]) != (3, side, side) or pixels.dtype != torch.uint8:
            raise ValueError(
                f"pixels: expected uint8 [J, 3, {side}, {side}], got {pixels.dtype} {tuple(pixels.shape)}"
            )
        if not len(pixels):
            return context.new_zeros(0, dtype=torch.float32)
        keys = keys.to(context.device)
        clean = self.encode(pixels.to(context.device), keys.latent_noise)
        noisy = self.diffusion.noisy(clean, keys.noise, keys.timestep)
        tokens = self.tokens(context, context_mask)
        tokens = torch.where(keys.drop[:, None, None], self.negatives, tokens)
        predicted = run_unet(
            self.unet, self._looks(maps, references), noisy.to(tokens.dtype), keys.timestep, tokens
        )
        target = self.diffusion.target(clean, keys.noise, keys.timestep)
        return (predicted.float() - target).square().flatten(1).mean(1)

    def draw_keys(self, image_ids: Sequence[int], seed: int, step: int) -> DrawKeys:
        """Noise, timestep and guidance drop of images, a function of (seed, step, image id) alone."""
        return draw_keys(
            image_ids,
            seed,
            step,
            shape=self.latent_shape,
            timesteps=self.config.timesteps,
            drop=self.config.guidance_drop,
            latent=self.vae is not None,
        )

    @torch.no_grad()
    def sample(
        self,
        context: Tensor,
        context_mask: Tensor,
        maps: Tensor,
        references: Tensor,
        *,
        steps: int,
        guidance: float,
        generator_seeds: Sequence[int],
        scheduler: str = "ddim",
    ) -> Tensor:
        """Draw images. Each depends on its own context, references and seed, not on the others.

        Args:
            context, context_mask, maps, references: as of ``loss``.
            steps: of the sampler.
            guidance: scale of classifier-free guidance; 1 is none, and half the work.
            generator_seeds: one an image.
            scheduler: ``ddim`` or ``ddpm``.

        Returns:
            uint8 [J, 3, image_size, image_size].

        Raises:
            ValueError: on arguments that do not fit.
        """
        count = len(context)
        if len(generator_seeds) != count:
            raise ValueError(
                f"generator_seeds: expected one for each of {count} images, got {len(generator_seeds)}"
            )
        if not count:
            side = self.config.image_size
            return torch.zeros(0, 3, side, side, dtype=torch.uint8, device=context.device)
        tokens = self.tokens(context, context_mask)
        guide = guidance != 1
        if guide:
            tokens = torch.cat([self.negatives.to(tokens.dtype).expand_as(tokens), tokens])
            references = references.repeat(2, 1)
        looks = self._looks(maps, references)

        def predict(x: Tensor, timestep: Tensor) -> Tensor:
            x = x.to(tokens.dtype)
            if not guide:
                return run_unet(self.unet, looks, x, timestep, tokens)
            both = run_unet(self.unet, looks, x.repeat(2, 1, 1, 1), timestep.repeat(2), tokens).float()
            without, with_context = both.chunk(2)
            return guided(without, with_context, guidance)

        latents = self.diffusion.sample(
            predict,
            self.latent_shape,
            generator_seeds,
            steps=steps,
            scheduler=scheduler,
            device=context.device,
        )
        return self.decode(latents)

    def tokens(self, context: Tensor, mask: Tensor) -> Tensor:
        """The U-Net's tokens [J, queries, width] from a context [J, longest, context_width] that
        counts where mask, bool [J, longest], is true; position 0 is the image's BoI."""
        context = self.context_proj(context)
        return self.resampler(context + self._positions(context), mask)

    @torch.no_grad()
    def encode(self, pixels: Tensor, latent_noise: Tensor | None) -> Tensor:
        """Latents float32 [J, c, h, w] of pixels uint8: a sample of the VAE's posterior times its
        scaling factor; in pixel space, the pixels in -1..1."""
        pixels = pixels.float() / 127.5 - 1
        if self.vae is None:
            return pixels
        posterior = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist
        latents = posterior.mean.float() + posterior.std.float() * latent_noise
        return latents * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels uint8 [J, 3, H, W] of latents [J, c, h, w]; the inverse of ``encode``."""
        if self.vae is not None:
            latents = self.vae.decode((latents / self.vae.config.scaling_factor).to(self.vae.dtype)).sample
        return ((latents.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)

    def zero_term(self) -> Tensor:
        """A zero through which every trainable parameter takes part in the backward pass."""
        entries = [p[(0,) * p.ndim].float() for p in self.parameters() if p.requires_grad]
        return (
            0 * torch.stack(entries).sum() if entries else self.negatives.new_zeros((), dtype=torch.float32)
        )

    def update_average(self) -> None:
        """Take this step's weights into their average, where there is one."""
        if self.average is not None:
            self.average.update(self)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the averaged weights are in use, where there are such."""
        if self.average is None:
            yield
            return
        with self.average.swapped(self):
            yield

    def _looks(self, maps: Tensor, references: Tensor) -> Looks:
        projected: list[Tensor] = []
        if self.unet_mmfs is not None:
            maps, references = referenced(maps, references)
            projected = self.unet_mmfs.project(maps)
        return Looks(
            self.unet_mmfs, self.config.mmfs_placement, projected, references.to(maps.device, torch.int32)
        )

    def _positions(self, context: Tensor) -> Tensor:
        """Embeddings of the context's positions; kept, and grown by doubling."""
        length = context.shape[1]
        if len(self.positions) < length:
            self.positions = sincos_1d(1 << (length - 1).bit_length(), context.shape[2]).to(context)
        return self.positions[:length].to(context)


def build_vae(config: VAEConfig, image_size: int) -> AutoencoderKL:
    """Stable Diffusion's VAE, frozen, with random weights."""
    blocks = len(config.channels)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=tuple(config.channels),
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
        norm_num_groups=config.norm_groups,
        sample_size=image_size,
        scaling_factor=config.scaling_factor,
    )
    return vae.requires_grad_(False).eval()


def referenced(maps: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    """Leave out the images that nothing refers to, so that they are not projected.

    Args:
        maps: [I, S, C].
        references: int [J, 2], half-open intervals into I.

    Returns:
        maps [i, S, C] in their order, and the intervals into these, int32 [J, 2] on the CPU.

    Raises:
        ValueError: when an interval is no part of the images.
    """
    references, count = references.cpu().long(), len(maps)
    first, last = references.unbind(1)
    if bool(((first < 0) | (first > last) | (last > count)).any()):
        raise ValueError(f"references: expected intervals within {count} images, got {references.tolist()}")
    ends = torch.zeros(count + 1, dtype=torch.int64)
    one = torch.ones_like(first)
    ends.index_add_(0, first, one).index_add_(0, last, -one)
    used = ends.cumsum(0)[:-1] > 0
    if bool(used.all()):
        return maps, references.int()
    before = torch.cat([torch.zeros(1, dtype=torch.int64), used.cumsum(0)])
    return maps[used.nonzero()[:, 0].to(maps.device)], before[references].int()
