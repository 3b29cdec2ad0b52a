"""Stable Diffusion in the forms in which it is published: version 1's layers, a VAE's names of old, and
the text encoder that the negatives of guidance come from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmi_megatron.convert import export
from mmi_megatron.convert.conversion import write
from mmi_megatron.convert.families import conversion
from mmi_megatron.convert.rules import ConvertError
from mmi_megatron.convert.sharded import Layout
from mmi_megatron.convert.stable_diffusion import DEPRECATED
from tests import convert_models as models

SD1 = {"attention_head_dim": 2, "use_linear_projection": False}
"""Version 1: as many heads at every width, and convolutions around attention."""


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


@torch.no_grad()
def test_version_1(tmp_path):
    """In, run by the U-Net that the decoder builds, and out."""
    from diffusers import UNet2DConditionModel

    from mmi_megatron.model.unet_mmfs import build_unet

    theirs, _ = models.save_diffusion(tmp_path / "in", **SD1)
    write(conversion("sd", tmp_path / "in"), tmp_path / "out", Layout(2, 1))
    opened = export.open_checkpoint(str(tmp_path / "out"))
    settings = opened.model.decoder.unet
    assert (settings.heads, settings.linear_projection) == (2, False)
    ours = build_unet(settings, 8, models.CHANNELS, models.WIDTH).eval()
    prefix = "image_decoder.unet."
    ours.load_state_dict({name: opened.stored[prefix + name] for name in ours.state_dict()})
    given = torch.randn(2, models.CHANNELS, 8, 8), torch.tensor([3, 700]), torch.randn(2, 4, models.WIDTH)
    assert torch.equal(ours(*given).sample, theirs(*given).sample)
    export.export_decoder(opened, tmp_path / "back")
    back = UNet2DConditionModel.from_pretrained(tmp_path / "back", subfolder="unet")
    same(back.state_dict(), theirs.state_dict())


def with_old_names(folder: Path) -> dict[str, Tensor]:
    """Give the VAE's attention the names of diffusers before 0.18; the tensors under their new names."""
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    state, old = load_file(file), {new: old for old, new in DEPRECATED.items()}
    renamed = {}
    for name, tensor in state.items():
        for part, before in old.items():
            if f".attentions.0.{part}." in name:
                name = name.replace(part, before)
        renamed[name] = tensor
    assert sum(name not in state for name in renamed) == 16  # four parts with biases, in each half
    save_file(renamed, file)
    return state


def test_a_vae_with_names_of_old(tmp_path):
    from diffusers import AutoencoderKL

    models.save_diffusion(tmp_path / "in")
    wanted = with_old_names(tmp_path / "in")
    report = write(conversion("sd", tmp_path / "in"), tmp_path / "out", Layout())
    names = {name for row in report.rows for name in row.theirs}
    assert "vae.decoder.mid_block.attentions.0.proj_attn.weight" in names  # as the file has it
    export.export_decoder(export.open_checkpoint(str(tmp_path / "out")), tmp_path / "back")
    back = AutoencoderKL.from_pretrained(tmp_path / "back", subfolder="vae")
    same(back.state_dict(), wanted)
    old = AutoencoderKL.from_pretrained(tmp_path / "in", subfolder="vae")  # diffusers knows them too
    same(old.state_dict(), wanted)


def test_a_vae_with_a_name_of_old_and_its_new_one_is_refused(tmp_path):
    models.save_diffusion(tmp_path / "in")
    file = tmp_path / "in" / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    name = "encoder.mid_block.attentions.0.query.weight"
    save_file(state | {name: state[name.replace("query", "to_q")].clone()}, file)
    with pytest.raises(ConvertError, match="attentions.0.* is there twice"):
        conversion("sd", tmp_path / "in")


def save_text_encoder(folder: Path, width: int = models.WIDTH) -> tuple[torch.nn.Module, list[int]]:
    """A small text encoder and its tokenizer beside a U-Net; the encoder, and the ids of "" in 77 tokens."""
    from transformers import CLIPTextConfig, CLIPTextModel

    words = {"!": 0, "a</w>": 1, "<|startoftext|>": 2, "<|endoftext|>": 3}
    tokens = folder / "tokenizer"
    tokens.mkdir()
    (tokens / "vocab.json").write_text(json.dumps(words))
    (tokens / "merges.txt").write_text("#version: 0.2\n")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    special |= {"pad_token": "!", "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
    (tokens / "tokenizer_config.json").write_text(json.dumps(special))
    torch.manual_seed(8)
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=2,
        eos_token_id=3,
    )
    encoder = models.shaken(CLIPTextModel(config))
    encoder.save_pretrained(folder / "text_encoder")
    return encoder, [2, 3, *[0] * 75]


@torch.no_grad()
def test_the_negatives_are_the_text_encoder_s_empty_prompt(tmp_path):
    models.save_diffusion(tmp_path / "in")
    without = conversion("sd", tmp_path / "in")
    assert not without.computed and "no text encoder beside it" in " ".join(without.notes)
    encoder, ids = save_text_encoder(tmp_path / "in")
    report = write(conversion("sd", tmp_path / "in"), tmp_path / "out", Layout())
    (row,) = [row for row in report.rows if row.ours == "image_decoder.negatives"]
    assert not row.theirs and row.shape == (77, models.WIDTH) and "empty prompt" in row.how
    opened = export.open_checkpoint(str(tmp_path / "out"))
    wanted = encoder(torch.tensor([ids])).last_hidden_state[0]
    torch.testing.assert_close(opened.stored["image_decoder.negatives"], wanted, rtol=0, atol=1e-6)
    assert (wanted[0] - wanted[1]).abs().max() > 1e-2
    assert opened.model.decoder.resampler.queries == 77


def test_a_text_encoder_of_another_model_is_refused(tmp_path):
    models.save_diffusion(tmp_path / "in")
    save_text_encoder(tmp_path / "in", width=16)
    with pytest.raises(ConvertError, match=r"text_encoder: gives \(77, 16\), the U-Net reads \(77, 32\)"):
        conversion("sd", tmp_path / "in")
    (tmp_path / "in" / "text_encoder" / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ConvertError, match="text_encoder: transformers cannot load it"):
        conversion("sd", tmp_path / "in")
