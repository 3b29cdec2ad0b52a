"""LLaMA-type language models of transformers: settings, names, and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from data_pipeline.errors import DataError
from data_pipeline.tokens import load_tokenizer
from mmi_megatron.config import LanguageConfig, MMFSConfig
from mmi_megatron.convert.rules import ConvertError, Rule, Table, grown, rename
from mmi_megatron.model.language_model import padded_vocabulary

FAMILIES = ("llama", "mistral", "qwen2")
"""``model_type`` of the models that are LLaMA's in everything that their configuration can say here."""

REFUSED = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "hidden_act": ("silu",),
    "rope_scaling": (None,),
    "pretraining_tp": (1, None),
}
"""Keys of a configuration that mean another model unless they have one of these values (or none)."""

IMAGE_TOKENS = 2

KEPT = {"bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 2048}
"""What a ``config.json`` says and our settings do not, with the release's values."""


def language_settings(config: Mapping[str, Any], where: Path, multiple: int = 128) -> LanguageConfig:
    """Our settings from a ``config.json``; MMFS is not there and not set.

    Args:
        config: of transformers, any version.
        where: it stands, for errors.
        multiple: ``vocabulary_multiple``.

    Raises:
        ConvertError: naming what this language model cannot be.
    """
    family = config.get("model_type", "llama")
    if family not in FAMILIES:
        raise ConvertError(f"{where}: model_type {family!r}; expected one of {', '.join(FAMILIES)}")
    for key, allowed in REFUSED.items():
        if config.get(key, allowed[0]) not in allowed:
            raise ConvertError(f"{where}: {key} {config[key]!r} is not built here, only {allowed[0]!r}")
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        raise ConvertError(f"{where}: rope_type {rope['rope_type']!r} is not built here, only 'default'")
    try:
        width, heads = config["hidden_size"], config["num_attention_heads"]
        language = LanguageConfig(
            width=width,
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            ffn=config["intermediate_size"],
            norm_eps=config["rms_norm_eps"],
            rope_theta=float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
            vocabulary=config["vocab_size"] + IMAGE_TOKENS,
            vocabulary_multiple=multiple,
            qkv_bias=family == "qwen2",
            mmfs=MMFSConfig(kind="none"),
            train_image_tokens=False,
        )
    except KeyError as error:
        raise ConvertError(f"{where}: no {error.args[0]!r} in it") from None
    head = config.get("head_dim")
    if head is not None and head * heads != width:
        raise ConvertError(f"{where}: head_dim {head} times {heads} heads is not hidden_size {width}")
    return language


def check_tokens(folder: Path, config: Mapping[str, Any]) -> tuple[int, str]:
    """Tokens that come on top of a model's own, and what was checked about them, in words.

    Raises:
        ConvertError: when the tokenizer beside the weights is not that of the weights, or its special
            tokens are not those of ``config.json``.
    """
    rows = config["vocab_size"]
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = config.get(key)
        if isinstance(value, int) and not -1 <= value < rows:
            raise ConvertError(f"{folder / 'config.json'}: {key} {value} is outside of {rows} tokens")
    if not (folder / "tokenizer.json").is_file():
        return IMAGE_TOKENS, f"no tokenizer.json beside the weights: BoI taken to be {rows}"
    try:
        tokenizer = load_tokenizer(folder)
    except DataError as error:  # of another kind; a run asks for one that fits
        return IMAGE_TOKENS, f"{error}: BoI taken to be {rows}"
    special = tokenizer.special
    for key, found in (("bos_token_id", special.bos), ("eos_token_id", special.eos)):
        if isinstance(config.get(key), int) and config[key] != found:
            raise ConvertError(f"{folder}: {key} is {config[key]} in config.json, {found} in tokenizer.json")
    if special.boi < rows or special.image < rows or tokenizer.size < rows + IMAGE_TOKENS:
        raise ConvertError(
            f"{folder}: tokenizer.json with the image tokens has {tokenizer.size} tokens, BoI {special.boi}, "
            f"but the weights' table has {rows} rows; the image tokens must come after them"
        )
    return tokenizer.size - rows, f"bos {special.bos}, eos {special.eos}, BoI {special.boi}"


def layers_table(config: LanguageConfig) -> Table:
    """Names of the layers and the final norm, which are the same on both sides."""
    rules: list[Rule] = [rename("norm.weight", "norm.weight")]
    parts = ["input_layernorm", "post_attention_layernorm"]
    parts += [f"self_attn.{projection}_proj" for projection in "qkvo"]
    parts += [f"mlp.{projection}_proj" for projection in ("gate", "up", "down")]
    tensors = [f"{part}.weight" for part in parts]
    if config.qkv_bias:
        tensors += [f"self_attn.{projection}_proj.bias" for projection in "qkv"]
    for layer in range(config.layers):
        rules += [rename(name, name) for name in (f"layers.{layer}.{tensor}" for tensor in tensors)]
    return Table(rules, legacy=rotary_table(config))


def rotary_table(config: LanguageConfig) -> dict[str, torch.Tensor]:
    """Frequencies of the rotary positions, which files of older versions hold for every layer."""
    width = config.width // config.heads
    frequencies = config.rope_theta ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    return {
        f"layers.{layer}.self_attn.rotary_emb.inv_freq": frequencies.float() for layer in range(config.layers)
    }


def llama_table(config: LanguageConfig, text_rows: int, tied: bool = False) -> Table:
    """Names of LlamaForCausalLM against those below ``language_model.``.

    Args:
        config: ours.
        text_rows: tokens of theirs.
        tied: the output rows are the embeddings, stored once.
    """
    rows = padded_vocabulary(config)
    embeddings = "model.embed_tokens.weight"
    rules = [grown("embed_tokens.weight", embeddings, rows, text_rows, mean=True)]
    if tied:
        head = grown("lm_head.weight", embeddings, rows, text_rows)
        # Saved once, with the embeddings.
        rules.append(Rule(head.ours, head.theirs, head.load, head.save, f"tied; {head.how}"))
    else:
        rules.append(grown("lm_head.weight", "lm_head.weight", rows, text_rows))
    return Table(rules) + layers_table(config).under("", "model.")


def llama_config(
    config: LanguageConfig, text_rows: int, kept: Mapping[str, Any], dtype: str
) -> dict[str, Any]:
    """A ``config.json`` for transformers' LlamaForCausalLM, or, with biases, Qwen2ForCausalLM.

    Args:
        config: ours.
        text_rows: tokens of theirs.
        kept: ``KEPT`` keys with their values.
        dtype: of the tensors, by its name in torch.
    """
    from transformers import LlamaConfig, Qwen2Config

    kind = Qwen2Config if config.qkv_bias else LlamaConfig
    made = kind(
        architectures=["Qwen2ForCausalLM" if config.qkv_bias else "LlamaForCausalLM"],
        hidden_size=config.width,
        intermediate_size=config.ffn,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        rms_norm_eps=config.norm_eps,
        rope_theta=config.rope_theta,
        vocab_size=text_rows,
        tie_word_embeddings=False,
        dtype=dtype,
        **kept,
    )
    return made.to_dict() | {"rope_theta": config.rope_theta}  # where versions before 5 look for it
