"""FLOPs of Stable Diffusion's U-Net and of its VAE's encoder, operation by operation as diffusers'
UNet2DConditionModel and AutoencoderKL run them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from mmi_megatron.config import DecoderConfig, VAEConfig

if TYPE_CHECKING:
    from mmi_megatron.train.flops import Tally

Looks = Callable[[int, int, bool], bool] | None
"""Counts MMFS on a feature map: pixels of all images, channels, whether it needs a gradient."""


def count_unet(
    tally: Tally, decoder: DecoderConfig, batch: int, side: int, channels: int, looks: Looks
) -> None:
    """The U-Net's forward and backward pass.

    Args:
        tally: at the U-Net.
        decoder: widths, and where MMFS sits.
        batch: images drawn.
        side, channels: of its input.
        looks: MMFS, None for none.
    """
    unet, tokens = decoder.unet, decoder.resampler
    widths, layers, place = unet.channels, unet.layers_per_block, decoder.mmfs_placement
    embedding = 4 * widths[0]
    timed = tally.linear(batch, embedding, embedding, tally.linear(batch, widths[0], embedding, False))
    if unet.pooled_tokens:
        _count_pool(tally, batch, tokens.queries, tokens.width)
        timed = tally.linear(batch, tokens.width, embedding) or timed

    def attention(pixels: int, width: int, seen: bool) -> bool:
        return _count_transformer(tally, batch, pixels, width, tokens.queries, tokens.width, seen)

    def resnet(pixels: int, width: int, out: int, seen: bool) -> bool:
        return _count_resnet(tally, batch, pixels, width, out, seen, embedding, timed)

    def looked(kind: str, pixels: int, width: int, seen: bool) -> bool:
        return looks(batch * pixels, width, seen) or seen if looks and place == kind else seen

    seen = tally.conv(batch * side**2, 9, channels, widths[0], False)
    skips = [(widths[0], seen, side)]
    width = widths[0]
    for level, out in enumerate(widths):
        for _ in range(layers):
            seen = resnet(side**2, width, out, seen)
            if unet.attention[level]:
                seen = attention(side**2, out, seen)
            width = out
            skips.append((out, seen, side))
        if level < len(widths) - 1:
            side //= 2
            seen = tally.conv(batch * side**2, 9, out, out, seen)
            skips.append((out, seen, side))
        seen = looked("down", side**2, out, seen)
        skips[-1] = (out, seen, side)
    seen = resnet(side**2, width, width, seen)
    seen = attention(side**2, width, seen)
    seen = resnet(side**2, width, width, seen)
    skips = [(out, looked("skip", across**2, out, held), across) for out, held, across in skips]
    seen = looked("skip", side**2, width, seen)
    for level in reversed(range(len(widths))):
        out = widths[level]
        for _ in range(layers + 1):
            skip, held, _ = skips.pop()
            seen = resnet(side**2, width + skip, out, seen or held)
            if unet.attention[level]:
                seen = attention(side**2, out, seen)
            width = out
        if level:
            side *= 2
            seen = tally.conv(batch * side**2, 9, out, out, seen)
        seen = looked("up", side**2, out, seen)
    tally.conv(batch * side**2, 9, width, channels, seen)


def _count_resnet(
    tally: Tally, batch: int, pixels: int, width: int, out: int, seen: bool, embedding: int, timed: bool
) -> bool:
    """ResnetBlock2D; ``seen``: whether its input needs a gradient, ``timed``: whether the time embedding
    does; ``embedding`` 0: it has none."""
    # The norm before the first convolution has weights of its own.
    inner = tally.conv(batch * pixels, 9, width, out, seen or tally.trained)
    if embedding:
        inner = tally.linear(batch, embedding, out, timed) or inner
    made = tally.conv(batch * pixels, 9, out, out, inner)
    if width != out:
        made = tally.conv(batch * pixels, 1, width, out, seen) or made
    return made or seen


def _count_transformer(
    tally: Tally, batch: int, pixels: int, width: int, tokens: int, token_width: int, seen: bool
) -> bool:
    """Transformer2DModel of one layer: self-attention, cross-attention to the tokens (which need a
    gradient), gated feed-forward."""
    rows = batch * pixels
    seen = tally.linear(rows, width, width, seen or tally.trained)
    for _ in range(3):
        tally.linear(rows, width, width, seen)
    tally.attend(batch * pixels**2, width, seen, seen)
    seen = tally.linear(rows, width, width, seen) or seen
    query = tally.linear(rows, width, width, seen)
    for _ in range(2):
        tally.linear(batch * tokens, token_width, width)
    tally.attend(batch * pixels * tokens, width, query)
    seen = tally.linear(rows, width, width)
    tally.linear(rows, width, 8 * width, seen)
    tally.linear(rows, 4 * width, width, seen)
    return tally.linear(rows, width, width, seen)


def _count_pool(tally: Tally, batch: int, tokens: int, width: int) -> None:
    """AttentionPooling: the mean of the tokens asks all of them and itself."""
    tally.linear(batch, width, width)
    for _ in range(2):
        tally.linear(batch * (tokens + 1), width, width)
    tally.attend(batch * (tokens + 1), width)


def count_vae(tally: Tally, vae: VAEConfig, side: int, batch: int) -> None:
    """AutoencoderKL's encoder, forward alone.

    Args:
        tally: at the VAE, not trained, without a backward pass.
        vae: widths.
        side: pixels a side of the images.
        batch: how many.
    """
    widths = vae.channels
    tally.conv(batch * side**2, 9, 3, widths[0], False)
    width = widths[0]
    for level, out in enumerate(widths):
        for _ in range(vae.layers_per_block):
            _count_resnet(tally, batch, side**2, width, out, False, 0, False)
            width = out
        if level < len(widths) - 1:
            side //= 2
            tally.conv(batch * side**2, 9, out, out, False)
    pixels = side**2
    _count_resnet(tally, batch, pixels, width, width, False, 0, False)
    for _ in range(4):
        tally.linear(batch * pixels, width, width, False)
    tally.attend(batch * pixels**2, width, False, False)
    _count_resnet(tally, batch, pixels, width, width, False, 0, False)
    latents = 2 * vae.latent_channels
    tally.conv(batch * pixels, 9, width, latents, False)
    tally.conv(batch * pixels, 1, latents, latents, False)
