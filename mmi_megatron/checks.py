"""Settings that must agree with each other, checked before anything is built."""

from __future__ import annotations

from mmi_megatron.config import (
    Config,
    DecoderConfig,
    LanguageConfig,
    MMFSConfig,
    ResamplerConfig,
    VisionConfig,
)
from mmi_megatron.errors import ConfigError
from mmi_megatron.layout import stages

LEVELS = 4
"""Levels of an image's pyramid of maps."""

CHOICES = {
    "model.vision.tower": ("clip", "eva", "siglip"),
    "model.language.mmfs.kind": ("deformable", "dense", "none"),
    "model.decoder.mmfs.kind": ("deformable", "dense", "none"),
    "model.decoder.mmfs_placement": ("skip", "up", "down"),
    "model.decoder.references": ("all", "nearest"),
    "model.decoder.target": ("epsilon", "v"),
    "model.decoder.beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "parallel.mmfs": ("heads", "queries"),
    "optimizer.schedule": ("cosine", "linear", "constant"),
    "train.precision": ("fp32", "bf16"),
    "train.recompute.language": ("none", "selective", "full"),
    "train.recompute.vision": ("none", "selective", "full"),
    "train.recompute.decoder": ("none", "selective", "full"),
}

AT_LEAST = {
    "model.vision.layers": 1,
    "model.language.mmfs_every": 1,
    "model.language.vocabulary": 1,
    "model.language.vocabulary_multiple": 1,
    "model.decoder.timesteps": 1,
    "model.loss.next_token": 0,
    "model.loss.next_image": 0,
    "parallel.tensor": 1,
    "parallel.pipeline": 1,
    "parallel.virtual": 1,
    "parallel.bucket": 0,
    "parallel.optimizer_copies": 1,
    "parallel.context": 1,
    "optimizer.lr": 0,
    "optimizer.decoder_lr": 0,
    "optimizer.offsets_lr": 0,
    "optimizer.warmup_steps": 0,
    "optimizer.weight_decay": 0,
    "optimizer.clip": 0,
    "train.steps": 1,
    "train.rows": 1,
    "train.micro_rows": 1,
    "train.threads": 0,
    "train.timeout": 1,
    "train.setup_timeout": 1,
    "train.log_every": 1,
    "train.validate_every": 0,
    "train.validate_documents": 0,
    "train.sample_every": 0,
    "train.sample_documents": 0,
    "train.sample_steps": 1,
    "train.save_every": 0,
    "train.keep": 1,
    "train.keep_every": 0,
    "train.watch.skip_limit": 0,
    "train.watch.spike": 0,
    "train.watch.measure_every": 0,
    "train.watch.straggler": 0,
    "train.watch.trace_from": 0,
    "train.watch.trace_steps": 0,
}

FRACTIONS = (
    "model.decoder.guidance_drop",
    "model.decoder.ema",
    "optimizer.beta1",
    "optimizer.beta2",
    "data.holdout",
)
"""At least 0 and below 1."""


def check_config(config: Config) -> None:
    """Check what no single type can say.

    Raises:
        ConfigError: naming the first setting that does not fit, and what it must fit.
    """
    for name, choices in CHOICES.items():
        _require(value_at(config, name) in choices, name, config, f"must be one of {', '.join(choices)}")
    for name, least in AT_LEAST.items():
        _require(value_at(config, name) >= least, name, config, f"must be at least {least}")
    for name in FRACTIONS:
        _require(0 <= value_at(config, name) < 1, name, config, "must be at least 0 and below 1")
    model = config.model
    _check_vision(model.vision)
    _check_language(model.language)
    _check_decoder(model.decoder)
    _check_parallel(config)
    _check_data(config)
    if model.loss.next_token == 0 and model.loss.next_image == 0:
        raise ConfigError("model.loss: next_token and next_image are both 0, so there is nothing to train")
    if config.train.rows % config.train.micro_rows:
        raise ConfigError(
            f"train.rows: {config.train.rows} is no multiple of train.micro_rows, {config.train.micro_rows}"
        )


def value_at(config: object, name: str):
    """The value of a dotted setting."""
    for part in name.split("."):
        config = getattr(config, part)
    return config


def _require(fits: bool, name: str, config: Config, rule: str) -> None:
    if not fits:
        raise ConfigError(f"{name}: {rule}, got {value_at(config, name)!r}")


def _divides(name: str, whole: int, by_name: str, by: int) -> None:
    """Require that setting ``by_name`` divides ``name``."""
    if by < 1 or whole < 1 or whole % by:
        raise ConfigError(f"{name}: {whole} does not divide by {by_name}, {by}")


def _check_vision(vision: VisionConfig) -> None:
    where, adapter = "model.vision", vision.adapter
    _divides(f"{where}.image_size", vision.image_size, f"{where}.patch_size", vision.patch_size)
    grid = vision.image_size // vision.patch_size
    if grid % 2:
        raise ConfigError(
            f"{where}.image_size: {vision.image_size} makes {grid} patches of {vision.patch_size} a side; "
            "an even number is needed, because the coarsest map has half as many"
        )
    _divides(f"{where}.width", vision.width, f"{where}.heads", vision.heads)
    if vision.tower == "eva":  # rotary positions: half of a head for rows, half for columns, in pairs
        _divides(
            f"{where}.width over heads", vision.width // vision.heads, "the pairs of rows and columns", 4
        )
    if vision.quick_gelu and vision.tower != "clip":
        raise ConfigError(f"{where}.quick_gelu: only CLIP has it; set it to false with tower {vision.tower}")
    _divides(f"{where}.layers", vision.layers, f"{where}.adapter.interactions", adapter.interactions)
    inner = int(vision.width * adapter.value_ratio)
    _divides(f"{where}.width times adapter.value_ratio", inner, f"{where}.adapter.heads", adapter.heads)
    _check_resampler(f"{where}.resampler", vision.resampler)


def _check_resampler(where: str, resampler: ResamplerConfig) -> None:
    _divides(f"{where}.width", resampler.width, f"{where}.heads", resampler.heads)
    for name in ("queries", "layers", "ffn", "cross_every"):
        if getattr(resampler, name) < 1:
            raise ConfigError(f"{where}.{name}: must be at least 1, got {getattr(resampler, name)}")


def _check_mmfs(where: str, mmfs: MMFSConfig) -> None:
    if mmfs.kind == "none":
        return
    _divides(f"{where}.value_width", mmfs.value_width, f"{where}.heads", mmfs.heads)
    if mmfs.table_rows < 2:
        raise ConfigError(f"{where}.table_rows: must be at least 2 (row 0 is unused), got {mmfs.table_rows}")
    reach = mmfs.table_rows - 1
    if mmfs.max_images is not None and not 1 <= mmfs.max_images <= reach:
        raise ConfigError(
            f"{where}.max_images: must be 1 to {reach}, what table_rows holds, or null, got {mmfs.max_images}"
        )
    levels = mmfs.levels
    if not levels or sorted(set(levels)) != levels or not set(levels) <= set(range(LEVELS)):
        raise ConfigError(f"{where}.levels: must be different levels from 0 to 3 in order, got {levels}")
    if mmfs.points < 1 or mmfs.base < 0:
        raise ConfigError(f"{where}: points must be at least 1 and base at least 0")


def _check_language(language: LanguageConfig) -> None:
    where = "model.language"
    _divides(f"{where}.width", language.width, f"{where}.heads", language.heads)
    _divides(f"{where}.heads", language.heads, f"{where}.kv_heads", language.kv_heads)
    if language.width // language.heads % 2:
        raise ConfigError(
            f"{where}.heads: {language.heads} heads of width {language.width // language.heads}; "
            "rotary positions need an even width"
        )
    if language.layers < 1:
        raise ConfigError(f"{where}.layers: must be at least 1, got {language.layers}")
    _check_mmfs(f"{where}.mmfs", language.mmfs)


def _check_decoder(decoder: DecoderConfig) -> None:
    where, unet, vae = "model.decoder", decoder.unet, decoder.vae
    if not unet.channels or len(unet.channels) != len(unet.attention):
        raise ConfigError(
            f"{where}.unet.attention: one entry a block of unet.channels is needed, got "
            f"{len(unet.attention)} for {len(unet.channels)}"
        )
    for index, (channels, attends) in enumerate(zip(unet.channels, unet.attention, strict=True)):
        name = f"{where}.unet.channels.{index}"
        _divides(name, channels, f"{where}.unet.norm_groups", unet.norm_groups)
        if attends or index == len(unet.channels) - 1:  # the middle block attends and is as wide as the last
            by = "head_width" if unet.heads is None else "heads"
            _divides(name, channels, f"{where}.unet.{by}", getattr(unet, by))
    shrinks = 2 ** (len(unet.channels) - 1)
    if vae is None:
        _divides(f"{where}.image_size", decoder.image_size, "the U-Net's down-sampling", shrinks)
    else:
        shrinks *= 2 ** (len(vae.channels) - 1)
        _divides(
            f"{where}.image_size", decoder.image_size, "the VAE's times the U-Net's down-sampling", shrinks
        )
        for index, channels in enumerate(vae.channels):
            name = f"{where}.vae.channels.{index}"
            _divides(name, channels, f"{where}.vae.norm_groups", vae.norm_groups)
    _check_resampler(f"{where}.resampler", decoder.resampler)
    _check_mmfs(f"{where}.mmfs", decoder.mmfs)


def _check_parallel(config: Config) -> None:
    parallel, language = config.parallel, config.model.language
    if parallel.sequence and parallel.tensor == 1:
        raise ConfigError(
            "parallel.sequence: there is nothing to divide over at parallel.tensor=1; set it to false"
        )
    _check_context(config)
    if parallel.mmfs == "queries" and not parallel.sequence:
        raise ConfigError(
            "parallel.mmfs: queries can be left in place only where they are divided; set "
            "parallel.sequence=true, or parallel.mmfs=heads"
        )
    if parallel.vision_ahead and (parallel.pipeline == 1 or parallel.virtual > 1):
        raise ConfigError(
            "parallel.vision_ahead: only the first stage of a pipeline with one stage a rank waits at a "
            f"known place; got parallel.pipeline={parallel.pipeline}, parallel.virtual={parallel.virtual}"
        )
    divided = ["heads", "kv_heads", "ffn", "vocabulary_multiple"]
    if language.mmfs.kind != "none":
        divided.append("mmfs.heads")
    for name in divided:
        name = f"model.language.{name}"
        _divides(
            name, value_at(language, name.removeprefix("model.language.")), "parallel.tensor", parallel.tensor
        )
    stages(config)


def _check_context(config: Config) -> None:
    """Rows have to divide over context and sequence parallelism, heads over context and tensor
    parallelism."""
    parallel, language, length = config.parallel, config.model.language, config.data.context_length
    if parallel.sequence:
        both = "parallel.tensor times parallel.context" if parallel.context > 1 else "parallel.tensor"
        _divides("data.context_length", length, both, parallel.tensor * parallel.context)
    if parallel.context == 1:
        return
    _divides("data.context_length", length, "parallel.context", parallel.context)
    ranks = parallel.tensor * parallel.context
    _divides("model.language.heads", language.heads, "parallel.tensor times parallel.context", ranks)
    few, many = sorted((language.kv_heads, ranks))
    if many % few:
        raise ConfigError(
            f"model.language.kv_heads: {language.kv_heads} neither divides by parallel.tensor times "
            f"parallel.context, {ranks}, nor divides it, so that ranks could share them"
        )
    if not parallel.shard_images:
        raise ConfigError(
            f"parallel.shard_images: false leaves every rank all images, and parallel.context="
            f"{parallel.context} would count their gradients so many times; set one of the two to its default"
        )


def _check_data(config: Config) -> None:
    data, model = config.data, config.model
    for name, other, wanted in (
        ("image_tokens", "model.vision.resampler.queries", model.vision.resampler.queries),
        ("image_size", "model.vision.image_size", model.vision.image_size),
        ("drawn_size", "model.decoder.image_size", model.decoder.image_size),
    ):
        if getattr(data, name) != wanted:
            raise ConfigError(
                f"data.{name}: {getattr(data, name)} differs from {other}, {wanted}; "
                f"write ${{{other}}} to follow it"
            )
    least = data.image_tokens + 3
    if data.context_length < least:
        raise ConfigError(
            f"data.context_length: {data.context_length} does not hold one image of {data.image_tokens} "
            f"tokens (data.image_tokens) with BOS, BoI and EOS; at least {least} is needed"
        )
