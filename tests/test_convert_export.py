"""What leaves: from any address, tied tables and averaged weights among it, whole or not at all; and
position embeddings that were resized on their way in."""

from __future__ import annotations

import json
from pathlib import Path

import fsspec
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from typer.testing import CliRunner

from mmi_megatron.cli import app
from mmi_megatron.convert import export, target
from mmi_megatron.convert.conversion import write
from mmi_megatron.convert.families import Options, conversion
from mmi_megatron.convert.sharded import Layout
from tests import convert_models as models

ONE = Layout()


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def converted(kind: str, model, folder: Path, layout: Layout = ONE, **options) -> Path:
    if kind == "timm-clip":
        models.save_timm(model, folder / "in")
    else:
        model.save_pretrained(folder / "in")
    write(conversion(kind, folder / "in", Options(**options)), folder / "checkpoint", layout)
    return folder / "checkpoint"


def test_tied_tables_leave_as_two(tmp_path):
    from safetensors.torch import load_file
    from transformers import LlamaForCausalLM

    tied = models.llama(tie_word_embeddings=True)
    checkpoint = converted("hf-llama", tied, tmp_path, Layout(2, 2), vocabulary_multiple=32)
    assert "lm_head.weight" not in load_file(tmp_path / "in" / "model.safetensors")
    stored = export.open_checkpoint(str(checkpoint)).stored
    table = tied.model.embed_tokens.weight
    for name, rest in (("lm_head", torch.zeros(48)), ("embed_tokens", table.mean(0))):
        held = stored[f"language_model.{name}.weight"]
        assert len(held) == 64 and torch.equal(held[: models.TOKENS], table)
        torch.testing.assert_close(held[models.TOKENS :], rest.expand(5, -1))
    export.export_llm(export.open_checkpoint(str(checkpoint)), tmp_path / "back")
    back = LlamaForCausalLM.from_pretrained(tmp_path / "back")
    same(back.state_dict(), tied.state_dict())


@pytest.mark.parametrize("protocol", ["memory", "file"])
def test_from_an_address_that_is_no_path(tmp_path, protocol):
    from transformers import LlamaForCausalLM

    model = models.llama()
    checkpoint = converted("hf-llama", model, tmp_path, Layout(2, 1))
    address = f"file://{checkpoint}"
    if protocol == "memory":
        address = "memory://weights/llama"
        fsspec.filesystem("memory").put(f"{checkpoint}/", "/weights/llama/", recursive=True)
    result = CliRunner().invoke(app, ["export", address, "--llm", str(tmp_path / "back")])
    assert result.exit_code == 0, result.output
    same(LlamaForCausalLM.from_pretrained(tmp_path / "back").state_dict(), model.state_dict())
    result = CliRunner().invoke(app, ["export", f"{address}s", "--llm", str(tmp_path / "more")])
    assert result.exit_code == 1 and "neither a checkpoint nor" in result.output


@pytest.mark.parametrize("average", [True, False])
def test_averaged_weights_stand_for_the_decoder_s_own(tmp_path, average):
    """Of a checkpoint that holds both; averages are float32 and leave in the type of what they average."""
    from diffusers import UNet2DConditionModel

    from mmi_megatron.convert import sharded

    unet, vae = models.save_diffusion(tmp_path / "in")
    plan = conversion("sd", tmp_path / "in")
    prefix, own = "image_decoder.unet.", {name: t.bfloat16() for name, t in unet.state_dict().items()}
    averages = {name: torch.rand_like(t.float()) for name, t in own.items() if not name.startswith("conv_in")}
    tensors = {f"{prefix}{name}": t for name, t in own.items()}
    tensors |= {f"image_decoder.average.unet.{name}": t for name, t in averages.items()}
    tensors |= {f"image_decoder.vae.{name}": t for name, t in vae.state_dict().items()}
    tensors["image_decoder.average.updates"] = torch.tensor([7])
    entries = sharded.entries(tensors, None)
    extra = {"converted": "both", "settings": plan.settings}
    sharded.write(tmp_path / "out", entries, tensors, tensors.__getitem__, Layout(2, 2), extra, {})
    command = ["export", str(tmp_path / "out"), "--decoder", str(tmp_path / "back")]
    result = CliRunner().invoke(app, [*command, "--json", "--average" if average else "--no-average"])
    assert result.exit_code == 0, result.output
    said = {row["ours"] for row in json.loads(result.output)["tensors"] if row["how"] == "averaged"}
    assert said == ({prefix + name for name in averages} if average else set())
    back = UNet2DConditionModel.from_pretrained(tmp_path / "back", subfolder="unet", torch_dtype="auto")
    wanted = own | {name: t.bfloat16() for name, t in averages.items()} if average else own
    same(back.state_dict(), wanted)


@pytest.mark.parametrize("ending", ["--llm", "--vision", "--decoder"])
def test_a_failure_while_writing_leaves_nothing(tmp_path, monkeypatch, ending):
    kinds = {"--llm": ("hf-llama", models.llama), "--vision": ("hf-clip", models.clip)}
    if ending == "--decoder":
        models.save_diffusion(tmp_path / "in")
        checkpoint = tmp_path / "checkpoint"
        write(conversion("sd", tmp_path / "in"), checkpoint, Layout())
    else:
        kind, make = kinds[ending]
        checkpoint = converted(kind, make(), tmp_path)
    written = []

    def full(name, like, tensor, original=target._bytes):
        written.append(name)
        if len(written) == 12:
            raise OSError(28, "No space left on device")
        return original(name, like, tensor)

    monkeypatch.setattr(target, "_bytes", full)
    opened = export.open_checkpoint(str(checkpoint))
    exports = {
        "--llm": export.export_llm,
        "--vision": export.export_vision,
        "--decoder": export.export_decoder,
    }
    with pytest.raises(OSError, match="No space left"):
        exports[ending](opened, tmp_path / "out")
    assert len(written) == 12 and {path.name for path in tmp_path.iterdir()} == {"in", "checkpoint"}


# Positions for images of another size


def ramp(tower: torch.nn.Module, name: str, prefix: int) -> Tensor:
    """Make the tower's positions a plane that rises by row and column; those before the patches."""
    positions = dict(tower.named_parameters())[name].data
    flat = positions.view(-1, models.WIDTH)
    row, column = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    slopes = torch.arange(models.WIDTH) / models.WIDTH
    flat[prefix:] = (row[..., None] * slopes + column[..., None] * (1 - slopes)).view(16, -1)
    return flat[:prefix].clone()


@pytest.mark.parametrize("kind", ["hf-clip", "timm-clip", "eva", "siglip"])
def test_positions_resized_to_twice_the_side(tmp_path, kind):
    """A plane stays the plane that it was, away from the edges; what stands before the patches stays."""
    from mmi_megatron.model.vision_towers import build_vit

    make = {"hf-clip": models.clip, "timm-clip": models.timm_clip}.get(kind) or (lambda: models.tower(kind))
    tower, prefix = make(), 0 if kind == "siglip" else 1
    name = "pos_embed"
    if kind == "hf-clip":
        name = next(name for name, _ in tower.named_parameters() if "position_embedding" in name)
    first = ramp(tower, name, prefix)
    checkpoint = converted(
        kind if kind == "hf-clip" else "timm-clip", tower, tmp_path, image_size=2 * models.SIDE
    )
    opened = export.open_checkpoint(str(checkpoint))
    vision = opened.model.vision
    assert vision.image_size == 2 * models.SIDE
    found = opened.stored["visual_tokenizer.vit.pos_embed"][0]
    assert torch.equal(found[:prefix], first) and len(found) == prefix + 64
    where = (torch.arange(8) + 0.5) / 2 - 0.5  # the new patches' centres in the old grid
    slopes = torch.arange(models.WIDTH) / models.WIDTH
    plane = where[:, None, None] * slopes + where[None, :, None] * (1 - slopes)
    grid = found[prefix:].view(8, 8, -1)
    torch.testing.assert_close(grid[3:5, 3:5], plane[3:5, 3:5], rtol=0, atol=1e-5)
    assert (grid - plane).abs().max() < 0.5
    ours = build_vit(vision)
    ours.load_state_dict({name: opened.stored[f"visual_tokenizer.vit.{name}"] for name in ours.state_dict()})
    assert ours.forward_features(torch.zeros(1, 3, 32, 32)).shape == (1, prefix + 64, models.WIDTH)
    export.export_vision(opened, tmp_path / "back", "hf" if kind == "hf-clip" else "timm")


def test_positions_of_the_same_size_are_left_alone(tmp_path):
    checkpoint = converted("hf-clip", models.clip(), tmp_path, image_size=models.SIDE)
    stored = export.open_checkpoint(str(checkpoint)).stored["visual_tokenizer.vit.pos_embed"]
    weights = dict(models.clip().named_parameters())
    (wanted,) = [t for name, t in weights.items() if "position_embedding" in name]
    assert torch.equal(stored[0], wanted)
    assert F.mse_loss(stored[0], torch.zeros_like(wanted)) > 0
