"""Fragments of presets: every family of models against the class that it is built as elsewhere."""

from __future__ import annotations

import functools
import re

import pytest
import timm
import torch
import yaml
from typer.testing import CliRunner

import mmi_megatron  # noqa: F401  prepares the platform before transformers and diffusers are imported
from mmi_megatron import params
from mmi_megatron.cli import app
from mmi_megatron.config import Config
from mmi_megatron.errors import ConfigError
from mmi_megatron.params import DECODER, IMAGE_ROWS, LANGUAGE, VISION
from mmi_megatron.settings import FRAGMENTS, fragments, load_config

LLAMA = {"hidden_act": "silu", "tie_word_embeddings": False}
"""The published config.json of each, as far as it shapes the model."""
LANGUAGE_MODELS = {
    "llm/vicuna-13b": ("Llama", {
        "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40,
        "num_key_value_heads": 40, "rms_norm_eps": 1e-6, "vocab_size": 32000}),
    "llm/llama-7b": ("Llama", {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "rms_norm_eps": 1e-6, "vocab_size": 32000}),
    "llm/openllama-3b": ("Llama", {
        "hidden_size": 3200, "intermediate_size": 8640, "num_hidden_layers": 26, "num_attention_heads": 32,
        "num_key_value_heads": 32, "rms_norm_eps": 1e-6, "vocab_size": 32000}),
    "llm/mistral-7b": ("Mistral", {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "vocab_size": 32768,
        "sliding_window": None}),
    "llm/qwen2-7b": ("Qwen2", {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "vocab_size": 152064}),
}  # fmt: skip
TOWERS = {
    "vision/clip-l14": "vit_large_patch14_clip_quickgelu_224",
    "vision/eva02-l14": "eva02_large_patch14_clip_224",
    "vision/siglip-l16-256": "vit_large_patch16_siglip_256",
    "vision/siglip-so400m-14": "vit_so400m_patch14_siglip_224",
}
SD1 = {"cross_attention_dim": 768, "attention_head_dim": 8}
SD2 = {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}
DECODERS = {
    "decoder/sd-1.5": dict(sample_size=64, **SD1),
    "decoder/minisd": dict(sample_size=32, **SD1),
    "decoder/sd-2.1-base": dict(sample_size=64, **SD2),
    "decoder/sd-2.1": dict(sample_size=96, **SD2),
}


REST = {  # what a fragment does not concern is left small or away: it only takes time to build
    "llm": ["model.loss.next_image=0"],
    "vision": ["model.loss.next_image=0", "model.language.layers=4"],
    "decoder": ["model.language.layers=4"],
}


@functools.cache
def counted(fragment: str) -> tuple[Config, params.MMInterleaved, dict[tuple[str, str], int]]:
    config = load_config("paper-13b", [f"use={fragment}", *REST[fragment.split("/")[0]]])
    model = params.build_on_meta(config.model)
    parts = params.tally(model, config.model.language)
    return config, model, {(part.group, part.part): part.parameters for part in parts}


def stated(fragment: str) -> list[int]:
    """Numbers of parameters in a fragment's first line."""
    top = (FRAGMENTS / f"{fragment}.yaml").read_text().splitlines()[0]
    return [int(number.replace(",", "")) for number in re.findall(r"\d{1,3}(?:,\d{3})+", top)]


def size(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_every_fragment_is_tested():
    assert set(fragments()) == {*LANGUAGE_MODELS, *TOWERS, *DECODERS}


@pytest.mark.parametrize("fragment", LANGUAGE_MODELS)
def test_language_models_are_those_of_transformers(fragment):
    import transformers

    kind, settings = LANGUAGE_MODELS[fragment]
    made = getattr(transformers, f"{kind}Config")(**settings, **LLAMA)
    with torch.device("meta"):
        theirs = getattr(transformers, f"{kind}ForCausalLM")(made)
    config, model, parts = counted(fragment)
    names = ("layers", "embeddings", "head", "final norm")
    assert [sum(parts[LANGUAGE, name] for name in names)] == stated(fragment) == [size(theirs)]
    shapes = {name: tensor.shape for name, tensor in theirs.model.state_dict().items() if "embed" not in name}
    ours = model.language_model.state_dict()
    assert {name: ours[name].shape for name in shapes} == shapes  # name by name
    language, rope = config.model.language, made.rope_parameters
    assert (language.norm_eps, language.rope_theta) == (made.rms_norm_eps, rope["rope_theta"])
    assert language.vocabulary == made.vocab_size + 2
    assert getattr(made, "sliding_window", None) is None
    assert parts[LANGUAGE, IMAGE_ROWS] > 0


@pytest.mark.parametrize("fragment", TOWERS)
def test_towers_are_timm_s(fragment):
    with torch.device("meta"):
        theirs = timm.create_model(TOWERS[fragment], num_classes=0, global_pool="")
    config, model, parts = counted(fragment)
    vision, vit = config.model.vision, model.visual_tokenizer.vit
    assert [parts[VISION, "ViT"]] == stated(fragment) == [size(theirs)]
    wanted = {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    assert {name: tensor.shape for name, tensor in vit.state_dict().items()} == wanted
    assert theirs.default_cfg["input_size"] == (3, vision.image_size, vision.image_size)
    assert {m.eps for m in vit.modules() if hasattr(m, "eps")} == {
        m.eps for m in theirs.modules() if hasattr(m, "eps")
    }
    assert repr(vit.blocks[0]) == repr(theirs.blocks[0])
    # timm counts on its own mean for weights of OpenCLIP; OpenAI's have CLIP's.
    kind = model.visual_tokenizer
    if vision.tower != "clip":
        assert kind.mean.shape == (3, 1, 1) and theirs.default_cfg["mean"] == means(vision.tower)
    assert model.visual_tokenizer.shapes[2] == (16, 16)


def means(tower: str) -> tuple[float, ...]:
    from mmi_megatron.model.vision_towers import KINDS

    return KINDS[tower].mean


@pytest.mark.parametrize("fragment", DECODERS)
def test_decoders_are_those_of_diffusers(fragment):
    from diffusers import AutoencoderKL, UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**DECODERS[fragment])
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
            scaling_factor=0.18215,
        )
    config, model, parts = counted(fragment)
    decoder, ours = config.model.decoder, model.image_decoder
    assert [parts[DECODER, "U-Net"], parts[DECODER, "VAE"]] == stated(fragment) == [size(unet), size(vae)]
    for mine, theirs in ((ours.unet, unet), (ours.vae, vae)):
        wanted = {name: tensor.shape for name, tensor in theirs.state_dict().items()}
        assert {name: tensor.shape for name, tensor in mine.state_dict().items()} == wanted
    assert ours.unet.config.sample_size == unet.config.sample_size == decoder.image_size // 8
    heads = [m.heads for m in unet.modules() if type(m).__name__ == "Attention"]
    assert [m.heads for m in ours.unet.modules() if type(m).__name__ == "Attention"] == heads
    assert decoder.target == ("v" if fragment == "decoder/sd-2.1" else "epsilon")
    assert config.data.drawn_size == decoder.image_size


@pytest.mark.parametrize("fragment", fragments())
def test_every_key_of_a_fragment_is_explained_where_it_stands(fragment):
    text = (FRAGMENTS / f"{fragment}.yaml").read_text()
    lines = [line for line in text.splitlines() if re.match(r"\s+\w+: .", line)]
    assert lines and all(re.match(r".*\s# \S", line) for line in lines)
    kind = {"llm": "language", "vision": "vision", "decoder": "decoder"}[fragment.split("/")[0]]
    assert list(yaml.safe_load(text)) == ["model"] and list(yaml.safe_load(text)["model"]) == [kind]


def test_fragments_combine_and_what_is_said_besides_counts_more():
    with_commas = load_config("paper-13b", ["model.language.layers=4", "use=llm/qwen2-7b,decoder/minisd"])
    assert with_commas == load_config(
        "paper-13b", ["use=[llm/qwen2-7b, decoder/minisd]"] + ["model.language.layers=4"]
    )
    assert with_commas.model.language.qkv_bias and with_commas.model.language.layers == 4
    assert with_commas.model.decoder.image_size == 256
    assert with_commas.model.vision == load_config("paper-13b").model.vision


def test_a_file_may_use_fragments(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("defaults: released-13b\nuse: [llm/mistral-7b]\nmodel: {language: {layers: 8}}\n")
    language = load_config(file).model.language
    assert (language.ffn, language.layers, language.document_attention) == (14336, 8, False)


def test_a_wrong_fragment_is_named_with_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match="no fragment 'llm/mistal-7b'; did you mean 'llm/mistral-7b'"):
        load_config("paper-13b", ["use=llm/mistal-7b"])
    (tmp_path / "mine.yaml").write_text("defaults: quickstart\nuse: {llm: 1}\n")
    with pytest.raises(ConfigError, match="mine.yaml: use: expected names of fragments"):
        load_config(tmp_path / "mine.yaml")


def test_params_takes_fragments():
    told = CliRunner().invoke(app, ["params", "paper-13b", "use=llm/openllama-3b,vision/siglip-l16-256"])
    assert told.exit_code == 0 and "303,361,024" in told.output


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.vision.tower=dino", "model.vision.tower"),
        ("model.vision.tower=siglip", "model.vision.quick_gelu: only CLIP has it"),
    ],
)
def test_a_tower_that_there_is_none_of(override, expected):
    with pytest.raises(ConfigError, match=expected):
        load_config("paper-13b", [override])


# ---------------------------------------------------------------- queries, keys and values with a bias


def test_logits_with_biases_are_those_of_qwen2():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from mmi_megatron.config import LanguageConfig, MMFSConfig
    from mmi_megatron.model.language_model import LanguageModel, Visibility

    sizes = dict(
        vocab_size=32, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, rms_norm_eps=1e-6, rope_theta=1e6, **LLAMA,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = Qwen2ForCausalLM(Qwen2Config(**sizes)).double().eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    config = LanguageConfig(
        width=48, layers=2, heads=6, kv_heads=2, ffn=80, rope_theta=1e6, qkv_bias=True, vocabulary=32,
        vocabulary_multiple=32, mmfs=MMFSConfig("none"), train_image_tokens=False,
    )  # fmt: skip
    ours = LanguageModel(config, 8, (), 30, 31).double()
    ours.load_state_dict({name.removeprefix("model."): t for name, t in theirs.state_dict().items()})
    tokens = torch.randint(0, 32, (9,))
    sees = Visibility(torch.arange(9), [0, 9], torch.zeros(9, 2, dtype=torch.int32))
    with torch.no_grad():
        found = ours.logits(ours(ours.embed(tokens), sees, None))
        wanted = theirs(tokens[None]).logits[0]
    torch.testing.assert_close(found, wanted.float(), rtol=1e-5, atol=1e-5)
