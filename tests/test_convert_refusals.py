"""What cannot be converted is refused by name, and nothing is written."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmi_megatron.cli import app
from mmi_megatron.convert import export
from mmi_megatron.convert.conversion import write
from mmi_megatron.convert.families import Options, conversion
from mmi_megatron.convert.rules import ConvertError
from mmi_megatron.convert.sharded import Layout
from mmi_megatron.convert.source import Source
from tests import convert_models as models

KEY = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def llama(tmp_path) -> Path:
    models.llama().save_pretrained(tmp_path / "in")
    return tmp_path / "in"


def change(folder: Path, edit) -> None:
    """Rewrite the only weight file with ``edit`` applied to its tensors."""
    file = folder / "model.safetensors"
    state = load_file(file)
    edit(state)
    save_file(state, file, {"format": "pt"})


def convert(folder: Path, kind: str = "hf-llama", layout: str = "tp=1", **options) -> None:
    write(conversion(kind, folder, Options(**options)), folder.parent / "out", Layout.parse(layout))


def refused(folder: Path, words: str, kind: str = "hf-llama", **more) -> None:
    """Refused with these words in the message; beside the source there is nothing."""
    with pytest.raises(ConvertError, match=words):
        convert(folder, kind, **more)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_missing_key(llama):
    change(llama, lambda state: state.pop(KEY))
    refused(llama, f"1 tensors missing .{KEY}.")


def test_extra_key(llama):
    change(llama, lambda state: state.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(48)}))
    refused(llama, r"1 left over .model.layers.0.self_attn.q_proj.bias.")


def test_transposed_shape(llama):
    change(llama, lambda state: state.update({KEY: state[KEY].T.contiguous()}))
    refused(llama, rf"{KEY} has shape .48, 96., expected .96, 48. .transposed")


def test_integers_where_weights_belong(llama):
    change(llama, lambda state: state.update({KEY: state[KEY].to(torch.int32)}))
    refused(llama, f"{KEY} is int32")


def test_different_types_that_are_joined(llama, tmp_path):
    models.clip().save_pretrained(tmp_path / "clip")
    key = "encoder.layers.0.self_attn.q_proj.weight"
    change(tmp_path / "clip", lambda state: state.update({key: state[key].half()}))
    with pytest.raises(ConvertError, match=f"{key}.*float16"):
        convert(tmp_path / "clip", "hf-clip")


def test_a_constant_with_another_value(llama):
    name = "model.layers.2.self_attn.rotary_emb.inv_freq"
    width = 12
    right = 5e4 ** -(torch.arange(0, width, 2) / width)
    change(llama, lambda state: state.update({name: right}))
    convert(llama)
    (llama.parent / "out").rename(llama.parent.parent / f"{llama.parent.name}_out")
    change(llama, lambda state: state.update({name: right * 2}))
    refused(llama, f"{name} is a constant")


@pytest.mark.parametrize("cut", [4, 1000, -1])
def test_truncated_safetensors(llama, cut):
    file = llama / "model.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    refused(llama, "model.safetensors: truncated")


@pytest.mark.parametrize("cut", [0, 1000, -100])
def test_truncated_bin(llama, cut):
    state = load_file(llama / "model.safetensors")
    (llama / "model.safetensors").unlink()
    file = llama / "pytorch_model.bin"
    torch.save(state, file)
    file.write_bytes(file.read_bytes()[:cut])
    refused(llama, "pytorch_model.bin: truncated")


class Bomb:
    """Unpickled by a careless loader, this would leave a file behind."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_a_pickle_with_code_in_it(llama, tmp_path, how):
    state = load_file(llama / "model.safetensors")
    (llama / "model.safetensors").unlink()
    trace = tmp_path / "trace"
    bad = state | {"model.norm.weight": Bomb(str(trace))}
    file = llama / "pytorch_model.bin"
    if how == "torch":
        torch.save(bad, file)
    else:
        file.write_bytes(pickle.dumps(bad["model.norm.weight"], protocol=2))
    refused(llama, "pytorch_model.bin: holds more than tensors.*it asks for io.open")
    assert not trace.exists()


def test_other_things_in_a_bin(llama):
    state = load_file(llama / "model.safetensors")
    (llama / "model.safetensors").unlink()
    torch.save(state | {"epoch": 3}, llama / "pytorch_model.bin")
    refused(llama, "expected a flat dict of tensors; others under ..epoch")
    torch.save(list(state.values()), llama / "pytorch_model.bin")
    refused(llama, "expected a dict of tensors, found list")


def test_bin_equals_safetensors(llama, tmp_path):
    state = load_file(llama / "model.safetensors")
    for name, old in (("new", False), ("old", True)):
        torch.save(state, tmp_path / f"{name}.bin", _use_new_zipfile_serialization=not old)
        read = Source(tmp_path / f"{name}.bin")
        assert list(read) == list(state)
        assert all(torch.equal(read[key], tensor) for key, tensor in state.items())


PLACES = {
    "hf-clip": ("model.safetensors", "encoder.layers.2.mlp.fc1.weight"),
    "timm-clip": ("model.safetensors", "blocks.2.mlp.fc1.weight"),
    "sd unet": ("unet/diffusion_pytorch_model.safetensors", "time_embedding.linear_1.weight"),
    "sd vae": ("vae/diffusion_pytorch_model.safetensors", "decoder.conv_in.weight"),
}
"""A weight file of each kind, and a tensor in it that is not square."""


@pytest.mark.parametrize("place", PLACES)
def test_every_kind_refuses_what_is_missing_left_over_or_transposed(tmp_path, place):
    kind, file, key = place.split()[0], *PLACES[place]
    if kind == "hf-clip":
        models.clip().save_pretrained(tmp_path / "in")
    elif kind == "timm-clip":
        models.save_timm(models.timm_clip(), tmp_path / "in")
    else:
        models.save_diffusion(tmp_path / "in")
    right = load_file(tmp_path / "in" / file)
    wrong = {
        f"1 tensors missing .*{key}": {name: t for name, t in right.items() if name != key},
        "1 left over .*surplus.weight": right | {"surplus.weight": torch.zeros(2)},
        f"{key} has shape .*transposed": right
        | {key: right[key].permute(*range(right[key].ndim)[::-1]).clone()},
        f"{key} is int8": right | {key: right[key].to(torch.int8)},
    }
    for words, state in wrong.items():
        save_file({name: t.contiguous() for name, t in state.items()}, tmp_path / "in" / file)
        refused(tmp_path / "in", words, kind)


def test_images_that_do_not_divide_into_patches(tmp_path):
    models.clip().save_pretrained(tmp_path / "in")
    for side in (30, 20, 0, -8):
        refused(
            tmp_path / "in",
            f"--image-size {side}: must be an even number of patches of 4 pixels",
            "hf-clip",
            image_size=side,
        )


# Several files


def in_two(folder: Path) -> dict[str, Tensor]:
    """Divide the only weight file in two, with an index."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    where = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(state))}
    for file in set(where.values()):
        save_file({name: state[name] for name in state if where[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return state


def test_an_index_and_its_files(llama):
    state = in_two(llama)
    source = Source(llama)
    assert source.keys() == state.keys()
    assert all(torch.equal(source[name], tensor) for name, tensor in state.items())
    index = llama / "model.safetensors.index.json"
    tree = json.loads(index.read_text())
    name = sorted(state)[3]
    right = tree["weight_map"][name]
    tree["weight_map"][name] = tree["weight_map"][sorted(state)[4]]
    index.write_text(json.dumps(tree))
    refused(llama, f"1 tensors are not where it says, the first: {name}")
    tree["weight_map"][name] = right
    tree["weight_map"]["surplus"] = right
    index.write_text(json.dumps(tree))
    refused(llama, "the first: surplus.*found in None")
    (llama / right).unlink()
    refused(llama, f"names ..{right}.*not beside it")
    index.write_text("{}")
    refused(llama, "no index of weights")


def test_a_tensor_in_two_files(llama):
    state = load_file(llama / "model.safetensors")
    (llama / "model.safetensors").rename(llama / "a.safetensors")
    save_file({KEY: state[KEY]}, llama / "b.safetensors")
    refused(llama, f"b.safetensors: {KEY} is in a.safetensors too")


# Models that are none of ours


@pytest.mark.parametrize(
    ("change_", "words"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_bias": True}, "attention_bias True"),
        ({"model_type": "gpt2"}, "model_type 'gpt2'"),
        ({"head_dim": 16}, "head_dim 16"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_type 'llama3'"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling"),
        ({"bos_token_id": 59}, "bos_token_id 59 is outside"),
        ({"num_hidden_layers": 5}, "9 tensors missing .model.layers.4"),
        ({"vocab_size": 60}, r"embed_tokens.weight has shape .59, 48., expected .60, 48."),
    ],
)
def test_language_models(llama, change_, words):
    file = llama / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change_))
    refused(llama, words)


def test_a_config_without_its_keys(llama):
    (llama / "config.json").write_text("{}")
    refused(llama, "config.json: no 'hidden_size'")
    (llama / "config.json").write_text("{")
    refused(llama, "config.json: no JSON")
    (llama / "config.json").unlink()
    refused(llama, "config.json: No such file")


@pytest.mark.parametrize(
    ("part", "change_", "words"),
    [
        ("unet", {"transformer_layers_per_block": 2}, "transformer_layers_per_block 2"),
        ("unet", {"attention_head_dim": [2, 2, 2]}, "diffusers cannot build"),
        ("unet", {"attention_head_dim": [1, 4]}, "neither the same nor in step"),
        ("unet", {"time_cond_proj_dim": 8}, "time_cond_proj_dim 8"),
        ("unet", {"in_channels": 9}, "in_channels|reads 9 channels|out_channels"),
        ("vae", {"latent_channels": 8}, "the U-Net reads 4 channels, the VAE has 8"),
        ("vae", {"use_quant_conv": False}, "use_quant_conv False"),
        ("scheduler", {"prediction_type": "sample"}, "prediction_type 'sample'"),
        ("scheduler", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
    ],
)
def test_decoders(tmp_path, part, change_, words):
    models.save_diffusion(tmp_path / "in")
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    file = tmp_path / "in" / part / name
    file.write_text(json.dumps(json.loads(file.read_text()) | change_))
    refused(tmp_path / "in", words, "sd")


def test_towers(tmp_path):
    models.save_timm(models.timm_clip(num_classes=0), tmp_path / "in", safe=True)
    file = tmp_path / "in" / "config.json"
    right = json.loads(file.read_text())
    file.write_text(json.dumps(right | {"architecture": "vit_nowhere"}))
    refused(tmp_path / "in", "timm cannot build 'vit_nowhere'", "timm-clip")
    file.write_text(json.dumps(right | {"architecture": "resnet18", "model_args": {}}))
    refused(tmp_path / "in", "resnet18", "timm-clip")
    file.write_text(json.dumps(right | {"architecture": "vit_tiny_patch16_224", "model_args": {}}))
    refused(tmp_path / "in", "'vit_tiny_patch16_224' is no image tower of CLIP", "timm-clip")


# The place that is written to


def test_a_layout_that_does_not_divide(llama):
    refused(llama, "does not divide over tp=5", layout="tp=5")


def test_an_address_that_is_no_local_path(llama):
    with pytest.raises(ConvertError, match="s3:/bucket/out: written to local paths only"):
        write(conversion("hf-llama", llama), Path("s3://bucket/out"), Layout())


def test_a_type_that_is_too_small(llama):
    change(llama, lambda state: state[KEY].view(-1)[7].fill_(1e5))
    with pytest.raises(ConvertError, match=f"{KEY}: 100000 in it is beyond float16"):
        write(conversion("hf-llama", llama), llama.parent / "out", Layout(), torch.float16)
    assert [path.name for path in llama.parent.iterdir()] == ["in"]
    write(conversion("hf-llama", llama), llama.parent / "out", Layout(), torch.bfloat16)
    opened = export.open_checkpoint(str(llama.parent / "out"), dtype=torch.float16)
    with pytest.raises(ConvertError, match="beyond float16"):
        export.export_llm(opened, llama.parent / "back")
    assert {path.name for path in llama.parent.iterdir()} == {"in", "out"}


def test_what_is_there_is_not_overwritten(llama):
    convert(llama)
    before = sorted(path.stat().st_mtime_ns for path in (llama.parent / "out").iterdir())
    with pytest.raises(ConvertError, match="out exists"):
        convert(llama)
    assert before == sorted(path.stat().st_mtime_ns for path in (llama.parent / "out").iterdir())


def test_a_failure_while_writing_leaves_nothing(llama, monkeypatch):
    from mmi_megatron.convert import sharded

    written = []

    def full(self, tensor, original=sharded._File.write):
        written.append(tensor)
        if len(written) == 20:
            raise OSError(28, "No space left on device")
        return original(self, tensor)

    monkeypatch.setattr(sharded._File, "write", full)
    with pytest.raises(OSError, match="No space left"):
        convert(llama)
    assert len(written) == 20 and [path.name for path in llama.parent.iterdir()] == ["in"]


def test_the_command_says_it_in_one_line(llama):
    from typer.testing import CliRunner

    change(llama, lambda state: state.pop(KEY))
    result = CliRunner().invoke(app, ["convert", "hf-llama", str(llama), "--out", str(llama.parent / "out")])
    assert result.exit_code == 1 and KEY in result.output and result.output.startswith("error: ")
    assert len(result.output.strip().splitlines()) == 1
    result = CliRunner().invoke(app, ["convert", "hf-gpt", str(llama), "--out", str(llama.parent / "out")])
    assert result.exit_code == 1 and "expected one of hf-llama, hf-clip" in result.output
    result = CliRunner().invoke(app, ["export", str(llama.parent / "nowhere"), "--llm", "x"])
    assert result.exit_code == 1 and "neither a checkpoint nor" in result.output
