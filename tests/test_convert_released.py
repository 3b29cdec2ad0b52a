"""The release's whole naming, in and out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mmi_megatron.convert import export
from mmi_megatron.convert.conversion import Conversion, Sources, matched, write
from mmi_megatron.convert.families import Options, conversion
from mmi_megatron.convert.released import language_layers, perceiver, unet_mmfs, visual_tokenizer
from mmi_megatron.convert.rules import ConvertError
from mmi_megatron.convert.sharded import Layout, Stored
from mmi_megatron.convert.source import Source
from mmi_megatron.train.storage import Folder
from tests import released_checkpoint
from tests.released_checkpoint import CLIP, LLAMA, RESAMPLER, renamed, under

CONSTANTS = ("pos_embed", "clip_mean", "clip_std", "position_ids", "head.bias")


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> tuple[Path, dict[str, Tensor], Options]:
    """Its folder, its tensors, and the options that describe it."""
    folder = tmp_path_factory.mktemp("release")
    (folder / "small.yaml").write_text(released_checkpoint.SETTINGS)
    state = released_checkpoint.save(folder / "in")
    return folder / "in", state, Options(preset=str(folder / "small.yaml"))


@pytest.fixture(scope="module")
def plan(release) -> Conversion:
    folder, _, options = release
    return conversion("released", folder, options)


@pytest.fixture(scope="module")
def checkpoint(plan, tmp_path_factory) -> tuple[Path, list]:
    """The same converted, and the report's rows."""
    out = tmp_path_factory.mktemp("checkpoint") / "out"
    return out, write(plan, out, Layout(2, 2)).rows


def test_every_key_has_its_place(release, checkpoint):
    _, state, _ = release
    rows = checkpoint[1]
    assert sorted(name for row in rows for name in row.theirs) == sorted(state)
    unmapped = [row for row in rows if not row.ours]
    assert all(row.how == "a constant, checked" for row in unmapped)
    assert len(unmapped) == 4 + 13 + 1
    assert len(state) > 2000


@pytest.mark.parametrize("ending", ["bin", "safetensors"])
def test_it_comes_back_equal(release, checkpoint, tmp_path, ending):
    _, state, _ = release
    file = tmp_path / f"back.{ending}"
    report = export.export_released(export.open_checkpoint(str(checkpoint[0])), file)
    back = load_file(file) if ending == "safetensors" else torch.load(file, weights_only=True)
    assert back.keys() == state.keys()
    for name, tensor in back.items():
        assert tensor.dtype == state[name].dtype, name
        if name.endswith(CONSTANTS):
            torch.testing.assert_close(tensor, state[name], rtol=0, atol=1e-6, msg=name)
        else:
            assert torch.equal(tensor, state[name]), name
    left = [row.ours for row in report.rows if not row.theirs]
    assert left == []


def test_parts_of_it_go_to_other_programs(release, checkpoint, tmp_path):
    from diffusers import UNet2DConditionModel
    from transformers import LlamaForCausalLM

    _, state, _ = release
    opened = export.open_checkpoint(str(checkpoint[0]), dtype=torch.bfloat16)
    report = export.export_llm(opened, tmp_path / "llm")
    assert any("cross_attn" not in row.ours and ".mmfs." in row.ours for row in report.rows if not row.theirs)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "llm")
    assert model.dtype == torch.bfloat16 and len(model.model.layers) == 40
    found = model.model.layers[7].mlp.up_proj.weight
    assert torch.equal(found, state["mm_decoder.layers.7.mlp.up_proj.weight"].bfloat16())
    assert model.get_input_embeddings().num_embeddings == released_checkpoint.VOCABULARY - 2
    export.export_decoder(opened, tmp_path / "sd")
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "sd", subfolder="unet")
    for name, tensor in unet.state_dict().items():
        assert torch.equal(tensor.bfloat16(), state[f"image_decoder.decoder.unet.{name}"].bfloat16()), name


def test_the_checkpoint_holds_what_the_builders_build(release, plan, checkpoint):
    """Against the modules that are built from the release's state dicts one by one."""
    _, state, _ = release
    stored = Stored(Folder(str(checkpoint[0])), plan.language)
    prefix = "visual_tokenizer."
    tokenizer = visual_tokenizer(under(state, prefix), CLIP, RESAMPLER).core
    layers = language_layers(renamed(state), LLAMA)
    drawn = {"num_queries": 77, "hidden_size": 32, "encoder_hidden_size": 80, "num_hidden_layers": 1}
    drawn |= {"cross_attention_frequency": 1, "num_attention_heads": 4, "intermediate_size": 64}
    resampler = perceiver(under(state, "image_decoder.perceiver_resampler."), drawn).core
    looks = under(state, "image_decoder.decoder.mmfs_module.")
    blocks = unet_mmfs(looks, {"input_channel": 64, "block_out_channels": released_checkpoint.CHANNELS}).core
    count = 0
    for module, name in (
        (tokenizer, prefix),
        (layers, "language_model."),
        (resampler, "image_decoder.resampler."),
        (blocks, "image_decoder.unet_mmfs."),
    ):
        for key, tensor in module.state_dict().items():
            if not key.startswith("vit.norm."):
                assert torch.equal(stored[name + key], tensor), key
                count += 1
    assert count > 1000


def test_another_image_size(release):
    folder, state, options = release
    wide = Options(preset=options.preset, image_size=448)
    plan = conversion("released", folder, wide)
    assert plan.settings["vision"]["image_size"] == 448
    (row,) = [row for row in matched(plan).rows if row.ours.endswith("vit.pos_embed")]
    assert row.how == "16 x 16 positions resized to 32 x 32"
    (rule,) = [rule for rule in plan.table.rules if rule.ours == row.ours]
    stored = rule.load([state[name] for name in rule.theirs])
    there = state["visual_tokenizer.encoder.vision_model.embeddings.position_embedding.weight"]
    assert stored.shape == (1, 1 + 32 * 32, 64)
    assert torch.equal(stored[0, 0], there[0])
    grid = stored[0, 1:].unflatten(0, (32, 32))
    coarse = grid.unflatten(1, (16, 2)).unflatten(0, (16, 2)).mean((1, 3))
    error = (coarse - there[1:].unflatten(0, (16, 16))).abs().mean()
    assert error < 0.5 * there.abs().mean()


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda s: s.pop("soi_token"), "1 tensors missing .soi_token"),
        (lambda s: s.update({"text_decoder.head.bias": torch.zeros(100)}), "head.bias is a constant"),
        (
            lambda s: s.update({"mm_decoder.layers.1.llama_cross_attn.gate": torch.zeros(1)}),
            "left over .mm_decoder.layers.1.llama_cross_attn.gate",
        ),
        (lambda s: s["text_decoder.head.weight"][-1].add_(1), "rows of the 2 image tokens are not zero"),
    ],
)
def test_what_is_not_the_release_is_refused(release, plan, tmp_path, edit, words):
    _, state, _ = release
    changed = {name: tensor.clone() for name, tensor in state.items()}
    edit(changed)
    torch.save(changed, tmp_path / "in.bin")
    with pytest.raises(ConvertError, match=words):
        changed_plan = replace(plan, source=Sources({"": Source(tmp_path / "in.bin")}))
        write(changed_plan, tmp_path / "out", Layout())
    assert [path.name for path in tmp_path.iterdir()] == ["in.bin"]


def test_settings_of_another_model_are_refused(release):
    folder, _, options = release
    for setting, words in (
        ("model.decoder.mmfs_placement=up", "model.decoder.mmfs_placement"),
        ("model.language.train_image_tokens=false", "model.language.train_image_tokens"),
        ("model.decoder.vae=null", "holds a VAE"),
        ("model.language.layers=44", "missing .mm_decoder.layers.40"),
        ("model.language.mmfs.table_rows=40", r"query_relpos.weight has shape .50, 80., expected .40, 80."),
    ):
        bad = Options(preset=options.preset, overrides=[setting])
        with pytest.raises(ConvertError, match=words):
            write(conversion("released", folder, bad), folder.parent / "out", Layout())
