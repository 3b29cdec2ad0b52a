"""Small random models of the real classes, saved as transformers, timm and diffusers save them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from data_pipeline.rows import SpecialTokens
from mmi_megatron.config import Config
from tests.samples import small_config

TOKENS = 59
"""Of the small language models, without those for images."""

SPECIAL = SpecialTokens(bos=1, eos=2, pad=0, boi=TOKENS, image=TOKENS + 1)
SIDE, GRID, WIDTH, CHANNELS = 16, 4, 32, 4


@torch.no_grad()
def shaken(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with every parameter moved, so that no zero or one hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def llama(kv_heads: int = 2, **changes: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "vocab_size": TOKENS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e4,
        "initializer_range": 0.1,
    }
    torch.manual_seed(1)
    return shaken(LlamaForCausalLM(LlamaConfig(**(settings | changes))))


def clip(act: str = "quick_gelu") -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(2)
    settings = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=SIDE // GRID,
        hidden_act=act,
    )
    return shaken(CLIPVisionModel(settings))


def timm_clip(**changes: Any) -> nn.Module:
    import timm

    torch.manual_seed(3)
    settings: dict[str, Any] = {
        "img_size": SIDE,
        "patch_size": SIDE // GRID,
        "embed_dim": WIDTH,
        "depth": 4,
        "num_heads": 4,
        "mlp_ratio": 2.0,
    }
    return shaken(timm.create_model("vit_large_patch14_clip_quickgelu_224", **(settings | changes)))


def relative(kind: str) -> nn.Module:
    """A small ``Qwen2`` or ``Mistral`` of transformers."""
    import transformers

    torch.manual_seed(6)
    settings = getattr(transformers, f"{kind}Config")(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=TOKENS,
        bos_token_id=41,
        eos_token_id=42,
        max_position_embeddings=512,
        rope_theta=1e6,
        sliding_window=None,
        initializer_range=0.1,
    )
    return shaken(getattr(transformers, f"{kind}ForCausalLM")(settings))


TOWERS = {
    "eva": ("eva02_large_patch14_clip_224", {"mlp_ratio": 2.0}),
    "siglip": ("vit_large_patch16_siglip_256", {"mlp_ratio": 2.0}),
}


def tower(kind: str) -> nn.Module:
    """A small EVA-02-CLIP or SigLIP tower of timm, with its pooling."""
    import timm

    torch.manual_seed(7)
    name, more = TOWERS[kind]
    sizes = {"img_size": SIDE, "patch_size": SIDE // GRID, "embed_dim": WIDTH, "depth": 2, "num_heads": 4}
    return shaken(timm.create_model(name, num_classes=0, **sizes, **more))


def save_timm(model: nn.Module, folder: Path, safe: bool = True) -> None:
    from timm.models import save_for_hf

    save_for_hf(model, str(folder), safe_serialization=safe)


def unet(**changes: Any) -> nn.Module:
    from diffusers import UNet2DConditionModel

    settings: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "block_out_channels": (16, 32),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "attention_head_dim": (2, 4),
        "cross_attention_dim": WIDTH,
        "norm_num_groups": 4,
        "use_linear_projection": True,
    }
    torch.manual_seed(4)
    return shaken(UNet2DConditionModel(**(settings | changes)))


def vae() -> nn.Module:
    from diffusers import AutoencoderKL

    torch.manual_seed(5)
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=4,
        sample_size=SIDE,
        scaling_factor=0.2,
    )
    return shaken(model)


def save_diffusion(folder: Path, safe: bool = True, **changes: Any) -> tuple[nn.Module, nn.Module]:
    from diffusers import DDPMScheduler

    models: tuple[Any, Any] = unet(**changes), vae()
    for name, model in zip(("unet", "vae"), models, strict=True):
        model.save_pretrained(folder / name, safe_serialization=safe)
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.001, prediction_type="v_prediction")
    scheduler.save_pretrained(folder / "scheduler")
    return models


def settings(tensor: int = 1, kv_heads: int = 2) -> Config:
    """The whole model that these three fit into."""
    config = small_config(tensor, frozen=True)
    model = config.model
    language, decoder = model.language, model.decoder
    language.vocabulary, language.kv_heads = TOKENS + 2, kv_heads
    language.norm_eps, language.rope_theta = 1e-5, 5e4
    from mmi_megatron.config import VAEConfig

    decoder.vae = VAEConfig(
        channels=[8, 16], layers_per_block=1, latent_channels=CHANNELS, norm_groups=4, scaling_factor=0.2
    )
    decoder.beta_schedule, decoder.beta_start, decoder.beta_end = "scaled_linear", 0.001, 0.02
    return config
