"""The whole released checkpoint: its flat names against those of our whole plain model."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mmi_megatron.config import LanguageConfig, ModelConfig
from mmi_megatron.convert.llama import IMAGE_TOKENS
from mmi_megatron.convert.released_language import language_layers_table
from mmi_megatron.convert.released_tokenizer import perceiver_table, tokenizer_names
from mmi_megatron.convert.released_unet import unet_mmfs_table
from mmi_megatron.convert.rules import ConvertError, Rule, Table, grown, rename, renames, unsqueezed
from mmi_megatron.model.language_model import padded_vocabulary
from mmi_megatron.model.unet_mmfs import mmfs_sites

IMAGE_BIAS = -100.0
"""Bias of the two image tokens in the frozen head; what is trained is added to it."""


def check_settings(config: ModelConfig) -> None:
    """Refuse settings that the release's weights cannot fill.

    Raises:
        ConvertError: naming the setting.
    """
    language, decoder = config.language, config.decoder
    wanted = {
        "model.vision.tower": (config.vision.tower, "clip"),
        "model.language.qkv_bias": (language.qkv_bias, False),
        "model.language.train_image_tokens": (language.train_image_tokens, True),
        "model.language.mmfs.kind": (language.mmfs.kind, "deformable"),
        "model.vision.use_resampler": (config.vision.use_resampler, True),
        "model.decoder.mmfs.kind": (decoder.mmfs.kind, "deformable"),
        "model.decoder.mmfs_placement": (decoder.mmfs_placement, "skip"),
        "model.decoder.unet.pooled_tokens": (decoder.unet.pooled_tokens, False),
    }
    for name, (value, needed) in wanted.items():
        if value != needed:
            raise ConvertError(
                f"{name}: the released checkpoint is of a model with {needed!r}, got {value!r}"
            )
    if decoder.vae is None or config.loss.next_image == 0:
        raise ConvertError("model.decoder: the released checkpoint holds a VAE and an image decoder")


def released_table(config: ModelConfig, names: list[str]) -> Table:
    """Names of the whole release against those of our plain model, ``MMInterleaved``.

    Args:
        config: of the model.
        names: of every tensor of ours; those of the U-Net and the VAE are diffusers' on both sides.
    """
    language, decoder = config.language, config.decoder
    side = decoder.image_size // 2 ** (len(decoder.vae.channels) - 1) if decoder.vae else decoder.image_size
    mmfs = decoder.mmfs
    sites = mmfs_sites(decoder.unet, side, "skip")
    ours, theirs = "image_decoder.", "image_decoder.decoder."
    table = tokenizer_names(config.vision).under("visual_tokenizer.", "visual_tokenizer.")
    table += language_table(language)
    table += perceiver_table(decoder.resampler).under(f"{ours}resampler.", f"{ours}perceiver_resampler.")
    table += unet_mmfs_table(sites, mmfs.heads, len(mmfs.levels), mmfs.points).under(
        f"{ours}unet_mmfs.", f"{theirs}mmfs_module."
    )
    rules = [unsqueezed(f"{ours}negatives", f"{ours}neg_prompt_embeds", 1)]
    rules += renames({f"{ours}context_proj": "context_feat_proj"})
    for part in ("unet.", "vae."):
        below = [name.removeprefix(ours) for name in names if name.startswith(ours + part)]
        rules += [rename(ours + name, theirs + name) for name in below]
    return table + Table(rules)


def language_table(language: LanguageConfig) -> Table:
    """Names of the language model with its MMFS, tables and image tokens."""
    ours, theirs, head = "language_model.", "mm_decoder.", "text_decoder.head"
    rows, vocabulary = padded_vocabulary(language), language.vocabulary
    table = language_layers_table(language).under(ours, theirs)
    bias = torch.zeros(vocabulary)
    bias[-IMAGE_TOKENS:] = IMAGE_BIAS
    tokens = f"{ours}image_tokens."
    rules = [
        grown(f"{ours}embed_tokens.weight", f"{theirs}embed_tokens.weight", rows, vocabulary),
        _head(f"{ours}lm_head.weight", f"{head}.weight", rows, vocabulary),
        unsqueezed(f"{tokens}embedding", "soi_token", 1),
        rename(f"{tokens}head.weight", f"{head}_new.weight"),
        _image_bias(f"{tokens}head.bias", f"{head}_new.bias"),
    ]
    return table + Table(rules, constants={f"{head}.bias": bias})


def _head(ours: str, theirs: str, rows: int, vocabulary: int) -> Rule:
    """The frozen head; its rows of the image tokens are zero, as the trained ones are added to them."""
    rule = grown(ours, theirs, rows, vocabulary)

    def load(tensors: list[Tensor]) -> Tensor:
        if bool(tensors[0][-IMAGE_TOKENS:].any()):
            raise ConvertError(f"{theirs}: the rows of the {IMAGE_TOKENS} image tokens are not zero")
        return rule.load(tensors)

    return replace(rule, load=load)


def _image_bias(ours: str, theirs: str) -> Rule:
    """Frozen and trained bias are one with us. Exact both ways near the start value, 95 there and -5
    here: the difference of numbers within a factor of two is."""
    return Rule(
        ours,
        (theirs,),
        lambda tensors: tensors[0] + IMAGE_BIAS,
        lambda tensor: [tensor - IMAGE_BIAS],
        f"{IMAGE_BIAS:g} added",
    )
