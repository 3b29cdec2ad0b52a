"""Configurations as they were published: ``mmi convert`` reads the fragment of that name from them."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmi_megatron.convert import llama, vision
from mmi_megatron.convert import stable_diffusion as diffusion
from mmi_megatron.convert.families import LANGUAGE_KEYS, VISION_KEYS
from mmi_megatron.settings import load_config
from tests.test_families import TOWERS

WHERE = Path("config.json")
OLD_LLAMA = {
    "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "initializer_range": 0.02, "max_position_embeddings": 2048, "model_type": "llama", "pad_token_id": 0,
    "rms_norm_eps": 1e-06, "tie_word_embeddings": False, "torch_dtype": "float16", "use_cache": True,
    "transformers_version": "4.28.1", "vocab_size": 32000,
}  # fmt: skip
LANGUAGE_MODELS = {
    "llm/vicuna-13b": OLD_LLAMA | {
        "hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40, "num_hidden_layers": 40},
    "llm/llama-7b": OLD_LLAMA | {
        "hidden_size": 4096, "intermediate_size": 11008, "max_sequence_length": 2048,
        "num_attention_heads": 32, "num_hidden_layers": 32},
    "llm/openllama-3b": OLD_LLAMA | {
        "hidden_size": 3200, "intermediate_size": 8640, "num_attention_heads": 32, "num_hidden_layers": 26},
    "llm/mistral-7b": {
        "architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1,
        "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
        "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": None,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 32768},
    "llm/qwen2-7b": {
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 3584, "initializer_range": 0.02,
        "intermediate_size": 18944, "max_position_embeddings": 131072, "max_window_layers": 28,
        "model_type": "qwen2", "num_attention_heads": 28, "num_hidden_layers": 28,
        "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
        "sliding_window": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "use_cache": True, "use_sliding_window": False, "vocab_size": 152064},
}  # fmt: skip

CLIP = {
    "architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": 768, "torch_dtype": "float32",
    "text_config": {"model_type": "clip_text_model", "hidden_size": 768, "projection_dim": 768},
    "vision_config": {
        "hidden_act": "quick_gelu", "hidden_size": 1024, "image_size": 224, "intermediate_size": 4096,
        "layer_norm_eps": 1e-05, "model_type": "clip_vision_model", "num_attention_heads": 16,
        "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768},
    "vision_config_dict": {"hidden_size": 1024, "num_hidden_layers": 24, "patch_size": 14},
}  # fmt: skip

UNET = {
    "_class_name": "UNet2DConditionModel", "act_fn": "silu", "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False, "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], "in_channels": 4,
    "layers_per_block": 2, "mid_block_scale_factor": 1, "norm_eps": 1e-05, "norm_num_groups": 32,
    "out_channels": 4, "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}  # fmt: skip
OLD_UNET = {"_diffusers_version": "0.6.0", "attention_head_dim": 8, "cross_attention_dim": 768}
NEW_UNET = {
    "_diffusers_version": "0.10.0.dev0", "attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024,
    "dual_cross_attention": False, "num_class_embeds": None, "only_cross_attention": False,
    "use_linear_projection": True,
}  # fmt: skip
VAE = {
    "_class_name": "AutoencoderKL", "_diffusers_version": "0.6.0", "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3, "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 32,
    "out_channels": 3, "sample_size": 512, "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip
SCHEDULER = {
    "_class_name": "PNDMScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "beta_start": 0.00085, "num_train_timesteps": 1000, "set_alpha_to_one": False,
    "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None, "clip_sample": False,
}  # fmt: skip
DECODERS = {
    "decoder/sd-1.5": (OLD_UNET | {"sample_size": 64}, {}),
    "decoder/minisd": (OLD_UNET | {"sample_size": 32}, {}),
    "decoder/sd-2.1-base": (NEW_UNET | {"sample_size": 64}, {"prediction_type": "epsilon"}),
    "decoder/sd-2.1": (
        NEW_UNET | {"sample_size": 96, "upcast_attention": True},
        {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"},
    ),
}


@pytest.mark.parametrize("fragment", LANGUAGE_MODELS)
def test_language_models(fragment):
    found = llama.language_settings(LANGUAGE_MODELS[fragment], WHERE)
    wanted = load_config("paper-13b", [f"use={fragment}"]).model.language
    for key in (*LANGUAGE_KEYS, "vocabulary_multiple"):
        assert getattr(found, key) == getattr(wanted, key), key


def test_clip():
    found = vision.hf_clip_settings(CLIP, WHERE)
    wanted = load_config("paper-13b", ["use=vision/clip-l14"]).model.vision
    assert [getattr(found, key) for key in VISION_KEYS] == [getattr(wanted, key) for key in VISION_KEYS]


@pytest.mark.parametrize("fragment", TOWERS)
def test_towers_of_timm(fragment):
    wanted = load_config("paper-13b", [f"use={fragment}"]).model.vision
    side = wanted.image_size
    config = {"architecture": TOWERS[fragment], "num_classes": 768, "num_features": wanted.width}
    config |= {"pretrained_cfg": {"input_size": [3, side, side], "classifier": "head", "first_conv": "x"}}
    found = vision.timm_settings(config, WHERE)
    assert [getattr(found, key) for key in VISION_KEYS] == [getattr(wanted, key) for key in VISION_KEYS]


@pytest.mark.parametrize("fragment", DECODERS)
def test_decoders(fragment):
    theirs, schedule = DECODERS[fragment]
    wanted = load_config("paper-13b", [f"use={fragment}"]).model.decoder
    unet, channels, width = diffusion.unet_settings(UNET | theirs, WHERE)
    assert (unet, channels, width) == (wanted.unet, 4, wanted.resampler.width)
    assert diffusion.vae_settings(VAE, WHERE) == wanted.vae
    for key, value in diffusion.schedule_settings(SCHEDULER | schedule, WHERE).items():
        assert getattr(wanted, key) == value, key
