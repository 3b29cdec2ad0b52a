"""What ``mmi convert`` knows to read: a conversion from each kind of folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmi_megatron.config import LanguageConfig, ModelConfig, VisionConfig
from mmi_megatron.convert import llama, released_model, vision
from mmi_megatron.convert import stable_diffusion as diffusion
from mmi_megatron.convert.conversion import Conversion, Sources
from mmi_megatron.convert.rules import ConvertError, Table, rename
from mmi_megatron.convert.source import Source
from mmi_megatron.model.image_decoder import build_vae
from mmi_megatron.model.language_model import LanguageModel
from mmi_megatron.model.unet_mmfs import build_unet
from mmi_megatron.model.vision_towers import build_vit
from mmi_megatron.params import build_on_meta
from mmi_megatron.settings import load_config

LANGUAGE_KEYS = (
    "width",
    "layers",
    "heads",
    "kv_heads",
    "ffn",
    "norm_eps",
    "rope_theta",
    "qkv_bias",
    "vocabulary",
)
VISION_KEYS = ("tower", "image_size", "patch_size", "width", "layers", "heads", "ffn", "quick_gelu")
VIT, LANGUAGE, DECODER = "visual_tokenizer.vit.", "language_model.", "image_decoder."


@dataclass(frozen=True)
class Options:
    """What the command line adds.

    Attributes:
        image_size: pixels a side of an input image; position embeddings are resized to it. None keeps it.
        vocabulary_multiple: tables over the vocabulary are padded to a multiple of this.
        preset, overrides: settings of the released model.
    """

    image_size: int | None = None
    vocabulary_multiple: int = 128
    preset: str = "released-13b"
    overrides: Sequence[str] = ()


def conversion(kind: str, path: Path, options: Options | None = None) -> Conversion:
    """A conversion of what lies at a path.

    Args:
        kind: one of ``KINDS``.
        path: a folder as transformers, diffusers or timm save it, or the release's.

    Raises:
        ConvertError: when it cannot be read, or is a model that cannot be built here.
    """
    if kind not in KINDS:
        raise ConvertError(f"{kind!r}: expected one of {', '.join(KINDS)}")
    return KINDS[kind](Path(path), options or Options())


def _config(file: Path) -> dict[str, Any]:
    try:
        read = json.loads(file.read_text())
    except OSError as error:
        raise ConvertError(f"{file}: {error.strerror}") from None
    except ValueError as error:
        raise ConvertError(f"{file}: no JSON ({error})") from None
    if not isinstance(read, dict):
        raise ConvertError(f"{file}: expected a configuration")
    return read


def _shapes(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in module.state_dict().items()}


def _picked(config: Any, keys: Sequence[str]) -> dict[str, Any]:
    return {key: getattr(config, key) for key in keys}


def hf_llama(path: Path, options: Options) -> Conversion:
    """A LlamaForCausalLM, or another that is one in all but its name."""
    config = _config(path / "config.json")
    language = llama.language_settings(config, path / "config.json", options.vocabulary_multiple)
    added, checked = llama.check_tokens(path, config)
    text_rows = config["vocab_size"]
    language = replace(language, vocabulary=text_rows + added)
    source = Sources({"": Source(path)})
    tied = bool(config.get("tie_word_embeddings")) and "lm_head.weight" not in source
    settings = _picked(language, LANGUAGE_KEYS) | {"vocabulary_multiple": language.vocabulary_multiple}
    notes = [checked]
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        notes.append(f"attends to the last {config['sliding_window']} tokens there, to all of them here")
    return Conversion(
        f"hf-llama {path}",
        source,
        llama.llama_table(language, text_rows, tied).under(LANGUAGE, ""),
        language_shapes(language),
        {"language": settings},
        language,
        notes=notes,
        extra={"text_rows": text_rows, "kept": {key: config[key] for key in llama.KEPT if key in config}},
    )


def language_shapes(language: LanguageConfig) -> dict[str, Tensor]:
    """Tensors of the plain language model, with its prefix."""
    with torch.device("meta"):
        return _shapes(LanguageModel(language, 0, (), 0, 0), LANGUAGE)


def hf_clip(path: Path, options: Options) -> Conversion:
    """A CLIPVisionModel, or the image tower of a CLIPModel."""
    source = Sources({"": Source(path)})
    config = vision.hf_clip_settings(_config(path / "config.json"), path / "config.json")
    table = vision.hf_clip_table(config.layers, vision.hf_clip_prefix(source))
    return _tower(f"hf-clip {path}", source, config, table, options, vision.HF_LEFT_OUT)


def timm_clip(path: Path, options: Options) -> Conversion:
    """An image tower that timm saved."""
    source = Sources({"": Source(path)})
    config = vision.timm_settings(_config(path / "config.json"), path / "config.json")
    with torch.device("meta"):
        tower: Any = build_vit(config)
        table = vision.timm_table(list(tower.state_dict()))
    return _tower(f"timm-clip {path}", source, config, table, options, vision.TIMM_LEFT_OUT)


def _tower(
    what: str, source: Sources, config: VisionConfig, table: Table, options: Options, left_out: dict[str, str]
) -> Conversion:
    wanted = vision.at_size(config, options.image_size)
    with torch.device("meta"):
        tower: Any = build_vit(config)
        resized: Any = build_vit(wanted)
        stored, targets = _shapes(tower), _shapes(resized, VIT)
    position, prefix = vision.POSITIONS, tower.num_prefix_tokens
    table = vision.resized(table, position, stored[position], targets[VIT + position], prefix).under(VIT, "")
    return Conversion(
        what, source, table, targets, {"vision": _picked(wanted, VISION_KEYS)}, left_out=left_out
    )


def sd(path: Path, options: Options) -> Conversion:
    """Stable Diffusion as diffusers saves it: folders unet, vae and scheduler."""
    unet_folder, vae_folder = path / "unet", path / "vae"
    unet, channels, width = diffusion.unet_settings(
        _config(unet_folder / "config.json"), unet_folder / "config.json"
    )
    vae = diffusion.vae_settings(_config(vae_folder / "config.json"), vae_folder / "config.json")
    if channels != vae.latent_channels:
        raise ConvertError(f"{path}: the U-Net reads {channels} channels, the VAE has {vae.latent_channels}")
    with torch.device("meta"):
        targets = _shapes(build_unet(unet, 8, channels, width), f"{DECODER}unet.")
        targets |= _shapes(build_vae(vae, 8), f"{DECODER}vae.")
    source = Sources({"unet.": Source(unet_folder), "vae.": Source(vae_folder)}, diffusion.vae_name)
    table = Table([rename(name, name.removeprefix(DECODER)) for name in targets])
    settings: dict[str, Any] = {"unet": asdict(unet), "vae": asdict(vae)}
    notes = []
    schedule = path / "scheduler" / "scheduler_config.json"
    if schedule.is_file():
        settings |= diffusion.schedule_settings(_config(schedule), schedule)
    else:
        notes.append("no scheduler beside it: model.decoder.target and the betas are yours to set")
    queries = 77
    computed = {}
    if (tokens := diffusion.negatives(path, queries, width)) is not None:
        targets[f"{DECODER}negatives"] = tokens.to("meta")
        computed[f"{DECODER}negatives"] = tokens, "the text encoder's tokens of the empty prompt"
        settings["resampler"] = {"queries": queries, "width": width}
    else:
        notes.append("no text encoder beside it: the negatives of guidance start at random")
        settings["resampler"] = {"width": width}
    return Conversion(
        f"sd {path}", source, table, targets, {"decoder": settings}, computed=computed, notes=notes
    )


def released(path: Path, options: Options) -> Conversion:
    """The public checkpoint of MM-Interleaved."""
    config = load_config(options.preset, options.overrides).model
    released_model.check_settings(config)
    config.decoder.ema = 0.0
    source = Sources({"": Source(path)}, diffusion.vae_name)
    notes = [_release_tokens(path, config.language)]
    stored = whole_shapes(config)
    table = released_model.released_table(config, list(stored))
    targets, wanted = stored, config
    if options.image_size is not None:
        wanted = replace(config, vision=vision.at_size(config.vision, options.image_size))
        targets = whole_shapes(wanted)
        position = VIT + vision.POSITIONS
        table = vision.resized(table, position, stored[position], targets[position])
    # The release drops the ViT's final norm and nothing reads ours: written so that the checkpoint is whole.
    width = config.vision.width
    norm = {f"{VIT}norm.weight": torch.ones(width), f"{VIT}norm.bias": torch.zeros(width)}
    computed = {
        name: (value, "start value; not in the release, nothing reads it") for name, value in norm.items()
    }
    table = replace(table, ours_only=table.ours_only - norm.keys())
    return Conversion(
        f"released {path}",
        source,
        table,
        targets,
        asdict(wanted),
        config.language,
        computed=computed,
        notes=notes,
    )


def _release_tokens(path: Path, language: LanguageConfig) -> str:
    """What was checked about the tokenizer beside the weights, which must leave the last two ids to the
    image tokens."""
    folder = path if path.is_dir() else path.parent
    rows = language.vocabulary - llama.IMAGE_TOKENS
    added, checked = llama.check_tokens(folder, {"vocab_size": rows})
    if added != llama.IMAGE_TOKENS:
        raise ConvertError(
            f"{folder}: tokenizer.json with the image tokens has {rows + added} tokens, the weights' table "
            f"{language.vocabulary} rows"
        )
    return checked


def whole_shapes(config: ModelConfig) -> dict[str, Tensor]:
    """Tensors of the whole plain model."""
    return _shapes(build_on_meta(config))


KINDS: dict[str, Callable[[Path, Options], Conversion]] = {
    "hf-llama": hf_llama,
    "hf-clip": hf_clip,
    "timm-clip": timm_clip,
    "sd": sd,
    "released": released,
}
