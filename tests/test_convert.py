"""Weights in and out: models of other libraries converted, run by our modules, exported and reloaded."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mmi_megatron.config import Config
from mmi_megatron.convert import export
from mmi_megatron.convert.conversion import REPORT, SETTINGS, write
from mmi_megatron.convert.families import Options, conversion
from mmi_megatron.convert.rules import ConvertError
from mmi_megatron.convert.sharded import Layout
from mmi_megatron.train import checkpoint_folder
from tests import convert_models as models

MULTIPLE = Options(vocabulary_multiple=32)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """A folder with one model of each kind."""
    folder = tmp_path_factory.mktemp("sources")
    models.llama(2).save_pretrained(folder / "llama_2", max_shard_size="60KB")
    models.llama(4).save_pretrained(folder / "llama_4")
    models.clip().save_pretrained(folder / "clip")
    models.save_timm(models.timm_clip(), folder / "timm", safe=False)
    models.save_diffusion(folder / "sd")
    return folder


def converted(
    kind: str, source: Path, out: Path, layout: str = "tp=1,pp=1", options: Options = MULTIPLE
) -> Path:
    write(conversion(kind, source, options), out, Layout.parse(layout))
    assert not checkpoint_folder.verify(out)
    return out


@pytest.fixture(scope="module")
def checkpoints(sources) -> Path:
    """The same converted, at several layouts."""
    layouts = {
        "llama_2": "tp=2,pp=2",
        "llama_4": "tp=1,pp=1",
        "clip": "tp=2",
        "timm": "pp=2",
        "sd": "tp=2,pp=2",
    }
    kinds = {"llama_2": "hf-llama", "llama_4": "hf-llama", "clip": "hf-clip", "timm": "timm-clip", "sd": "sd"}
    for name, kind in kinds.items():
        converted(kind, sources / name, sources / "converted" / name, layouts[name])
    return sources / "converted"


# Run by our modules


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "tokens": torch.randint(3, models.TOKENS, (17,), generator=generator),
        "images": torch.randn(2, 3, models.SIDE, models.SIDE, generator=generator),
        "latents": torch.randn(2, models.CHANNELS, 8, 8, generator=generator),
        "timestep": torch.tensor([3, 700]),
        "context": torch.randn(2, 4, models.WIDTH, generator=generator),
    }


@torch.no_grad()
def outputs_of_originals(kv_heads: int, tower: str) -> dict[str, torch.Tensor]:
    given = inputs()
    unet, vae = models.unet(), models.vae()
    if tower == "clip":
        tokens = models.clip()(given["images"]).last_hidden_state
    else:
        vit = models.timm_clip()
        tokens = vit.norm_pre(vit._pos_embed(vit.patch_embed(given["images"])))
        for block in vit.blocks:
            tokens = block(tokens)
    return {
        "logits": models.llama(kv_heads)(given["tokens"][None]).logits[0],
        "tokens": tokens,
        "noise": unet(given["latents"], given["timestep"], given["context"]).sample,
        "encoded": vae.encode(given["images"]).latent_dist.mean,
        "decoded": vae.decode(given["latents"]).sample,
    }


def outputs_of_ours(tensor: int, kv_heads: int, init_from: list[str], out: str) -> dict[str, torch.Tensor]:
    """On one rank: the model of the trainer, started from the checkpoints, and what it computes."""
    from mmi_megatron.convert.start import load_start
    from mmi_megatron.model.language_model import Visibility
    from mmi_megatron.model.unet_mmfs import run_unet
    from mmi_megatron.parallel import groups
    from mmi_megatron.parallel.model import build_model

    config = models.settings(tensor, kv_heads)
    config.train.init_from = init_from
    groups.initialize(config)
    try:
        model = build_model(config, models.SPECIAL)
        load_start([model], config, Path(out))
        given = inputs()
        length = len(given["tokens"])
        sees = Visibility(torch.arange(length), [0, length], torch.zeros(length, 2, dtype=torch.int32))
        maps = torch.zeros(1, sum(h * w for h, w in model.visual_tokenizer.shapes), models.WIDTH)
        with torch.no_grad():
            language = model.language_model
            hidden = language(language.embed(given["tokens"]), sees, maps)
            vision, decoder = model.visual_tokenizer, model.image_decoder
            looks = decoder._looks(maps, torch.tensor([[0, 1], [0, 1]]))
            return {
                "logits": language.logits(hidden)[:, : models.TOKENS],
                "tokens": vision.adapter(vision.vit, given["images"])[0],
                "noise": run_unet(decoder.unet, looks, given["latents"], given["timestep"], given["context"]),
                "encoded": decoder.vae.encode(given["images"]).latent_dist.mean,
                "decoded": decoder.vae.decode(given["latents"]).sample,
            }
    finally:
        groups.destroy()


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize(("kv_heads", "tower"), [(2, "clip"), (4, "timm")])
def test_our_modules_give_the_outputs_of_the_originals(ranks, checkpoints, tmp_path, tensor, kv_heads, tower):
    wanted = outputs_of_originals(kv_heads, tower)
    init_from = [str(checkpoints / name) for name in (f"llama_{kv_heads}", tower, "sd")]
    for found in ranks.run(tensor, outputs_of_ours, tensor, kv_heads, init_from, str(tmp_path)):
        for name, expected in wanted.items():
            error = float((found[name] - expected).abs().max() / expected.abs().max())
            assert error < 1e-5, f"{name}: {error:.1e}"
    record = json.loads((tmp_path / "start_weights.json").read_text())
    assert not any(record["unused"].values())
    assert {name.split(".")[1] for name in record["start_values"] if name.startswith("visual_tokenizer")} == {
        "adapter",
        "input_proj",
        "input_norm",
        "position_norm",
        "resampler",
        "output_proj",
    }


def weights_of_ours(tensor: int, pipeline: int, init_from: list[str], out: str, like: Config | None = None):
    """On one rank: the plain tensors that its stage holds after the start, and bytes read by file."""
    from mmi_megatron.convert.start import load_start
    from mmi_megatron.parallel import groups
    from mmi_megatron.parallel.model import build_stages
    from mmi_megatron.parallel.plain import gather_plain
    from mmi_megatron.train.storage import Folder

    read: dict[str, int] = {}

    def counted(self, name, start=None, end=None, original=Folder.read):
        data = original(self, name, start, end)
        read[f"{self.name}/{name}"] = read.get(f"{self.name}/{name}", 0) + len(data)
        return data

    config = like or models.settings(tensor)
    config.parallel.tensor, config.parallel.pipeline = tensor, pipeline
    config.train.init_from = init_from
    groups.initialize(config)
    original, Folder.read = Folder.read, counted
    try:
        stages = build_stages(config, models.SPECIAL)
        load_start(stages, config, Path(out))
        held = {}
        for stage in stages:
            held |= {f"language.{name}": value for name, value in gather_plain(stage.language_model).items()}
            for part in ("visual_tokenizer", "image_decoder"):
                if (module := getattr(stage, part)) is not None:
                    held |= {f"{part}.{name}": value for name, value in module.state_dict().items()}
        return held, read
    finally:
        Folder.read = original
        groups.destroy()


def chosen(there: bool) -> str:
    """On a rank: the checkpoint that all start from, while each would find another one the newest."""
    from unittest import mock

    import torch.distributed as dist

    from mmi_megatron.convert import start
    from mmi_megatron.parallel import groups
    from mmi_megatron.train.storage import Folder

    def resolve(address: str) -> Folder:
        if not there and dist.get_rank() == 0:
            raise ConvertError(f"{address}: nothing there")
        return Folder(f"{address}/step_{dist.get_rank()}")

    groups.initialize(models.settings(2))
    try:
        with mock.patch.object(start, "resolve", resolve):
            return start._resolve_once("run").address
    except ConvertError as error:
        return str(error)
    finally:
        groups.destroy()


def test_all_ranks_start_from_the_checkpoint_that_one_has_found(ranks):
    assert ranks.run(2, chosen, True) == ["run/step_0"] * 2
    assert ranks.run(2, chosen, False) == ["run: nothing there"] * 2


def files_of(read: dict[str, int], name: str) -> dict[int, int]:
    """Bytes of a checkpoint's files of tensors, by their number."""
    pattern = re.compile(rf"(?:.*/)?{name}/__(\d+)_0\.distcp$")
    return {int(found[1]): count for path, count in read.items() if (found := pattern.match(path))}


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2)])
def test_a_rank_reads_its_own_slices_and_nothing_else(ranks, sources, tmp_path, tensor, pipeline):
    wanted = {f"language.{name.removeprefix('model.')}": t for name, t in models.llama().state_dict().items()}
    layout = f"tp={tensor},pp={pipeline}"
    out = {}
    for kind, name in (("hf-llama", "llama_2"), ("hf-clip", "clip"), ("sd", "sd")):
        out[name] = converted(kind, sources / name, tmp_path / name, layout)
    results = ranks.run(
        2, weights_of_ours, tensor, pipeline, [str(path) for path in out.values()], str(tmp_path / "run")
    )
    seen: set[str] = set()
    for rank, (held, read) in enumerate(results):
        for name, tensor_ in wanted.items():
            if name in held:
                assert torch.equal(held[name][: len(tensor_)], tensor_), name
        unet = {name: t for name, t in held.items() if name.startswith("image_decoder.unet.")}
        assert all(torch.equal(t, models.unet().state_dict()[name[19:]]) for name, t in unet.items())
        seen |= held.keys()
        mine = files_of(read, "llama_2")
        sizes = {number: (out["llama_2"] / f"__{number}_0.distcp").stat().st_size for number in range(2)}
        assert mine[rank] <= sizes[rank]
        assert mine[rank] > 0.7 * sizes[rank]
        other = mine.get(1 - rank, 0)
        # Of tensor-parallel slices the norms, which all ranks hold, are in the first rank's file.
        assert other < 0.25 * sizes[1 - rank] if tensor == 2 else other == 0
        if pipeline == 2:
            assert bool(files_of(read, "clip")) == (rank == 0) and bool(files_of(read, "sd")) == (rank == 1)
            assert bool(unet) == (rank == 1)
    assert wanted.keys() <= seen


# And back


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_llama_comes_back_equal(checkpoints, sources, tmp_path, kv_heads):
    from transformers import LlamaForCausalLM

    opened = export.open_checkpoint(str(checkpoints / f"llama_{kv_heads}"))
    export.export_llm(opened, tmp_path / "out")
    back = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    wanted = models.llama(kv_heads)
    same(back.state_dict(), wanted.state_dict())
    with torch.no_grad():
        tokens = inputs()["tokens"][None]
        assert torch.equal(back(tokens).logits, wanted(tokens).logits)


def test_clip_comes_back_equal(checkpoints, tmp_path):
    from transformers import CLIPVisionModel

    opened = export.open_checkpoint(str(checkpoints / "clip"))
    export.export_vision(opened, tmp_path / "out")
    back, wanted = CLIPVisionModel.from_pretrained(tmp_path / "out"), models.clip()
    same(back.state_dict(), wanted.state_dict())
    with torch.no_grad():
        images = inputs()["images"]
        assert torch.equal(back(images).pooler_output, wanted(images).pooler_output)


def test_timm_comes_back_equal(checkpoints, tmp_path):
    import timm

    opened = export.open_checkpoint(str(checkpoints / "timm"))
    export.export_vision(opened, tmp_path / "out", "timm")
    back, wanted = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True), models.timm_clip()
    same(back.state_dict(), {k: v for k, v in wanted.state_dict().items() if not k.startswith("head.")})
    with torch.no_grad():
        images = inputs()["images"]
        assert torch.equal(back.eval().forward_features(images), wanted.forward_features(images))


def test_timm_and_transformers_read_the_same_tower(checkpoints, sources, tmp_path):
    """One tower, out as timm and in again as timm, out as CLIP: all its tensors are where they were."""
    opened = export.open_checkpoint(str(checkpoints / "clip"))
    export.export_vision(opened, tmp_path / "timm", "timm")
    converted("timm-clip", tmp_path / "timm", tmp_path / "again")
    export.export_vision(export.open_checkpoint(str(tmp_path / "again")), tmp_path / "clip")
    there = load_file(sources / "clip" / "model.safetensors")
    back = load_file(tmp_path / "clip" / "model.safetensors")
    same({name.removeprefix("vision_model."): tensor for name, tensor in back.items()}, there)


def test_stable_diffusion_comes_back_equal(checkpoints, tmp_path):
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

    opened = export.open_checkpoint(str(checkpoints / "sd"))
    export.export_decoder(opened, tmp_path / "out")
    for kind, name, wanted in (
        (UNet2DConditionModel, "unet", models.unet()),
        (AutoencoderKL, "vae", models.vae()),
    ):
        back = kind.from_pretrained(tmp_path / "out", subfolder=name)
        same(back.state_dict(), wanted.state_dict())
    scheduler = DDIMScheduler.from_pretrained(tmp_path / "out", subfolder="scheduler")
    assert scheduler.config.prediction_type == "v_prediction" and scheduler.config.beta_start == 0.001


# Relatives


@torch.no_grad()
@pytest.mark.parametrize(("kind", "leaves_as"), [("Qwen2", "Qwen2"), ("Mistral", "Llama")])
def test_relatives(tmp_path, kind, leaves_as):
    """Qwen2's biases of queries, keys and values among it; run by the plain language model."""
    import transformers

    from mmi_megatron.model.language_model import LanguageModel, Visibility

    wanted = models.relative(kind)
    wanted.save_pretrained(tmp_path / "in")
    plan = conversion("hf-llama", tmp_path / "in", MULTIPLE)
    write(plan, tmp_path / "out", Layout(2, 2))
    opened = export.open_checkpoint(str(tmp_path / "out"))
    ours = LanguageModel(plan.language, 0, (), 0, 0)
    ours.load_state_dict({name: opened.stored[f"language_model.{name}"] for name in ours.state_dict()})
    tokens = inputs()["tokens"]
    sees = Visibility(torch.arange(17), [0, 17], torch.zeros(17, 2, dtype=torch.int32))
    logits = ours.logits(ours(ours.embed(tokens), sees, None))[:, : models.TOKENS]
    expected = wanted(tokens[None]).logits[0]
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()
    export.export_llm(opened, tmp_path / "back")
    back = getattr(transformers, f"{leaves_as}ForCausalLM").from_pretrained(tmp_path / "back")
    same(back.state_dict(), wanted.state_dict())
    for key in ("bos_token_id", "eos_token_id", "max_position_embeddings"):
        assert getattr(back.config, key) == getattr(wanted.config, key), key


@torch.no_grad()
@pytest.mark.parametrize("kind", ["eva", "siglip"])
def test_other_towers(tmp_path, kind):
    """Run by the tower that the visual tokenizer builds, and back to timm, without its pooling."""
    import timm

    from mmi_megatron.model.vision_towers import build_vit

    wanted = models.tower(kind)
    models.save_timm(wanted, tmp_path / "in")
    report = write(conversion("timm-clip", tmp_path / "in"), tmp_path / "out", Layout())
    left = [name for row in report.rows if not row.ours for name in row.theirs]
    assert bool(left) == (kind == "siglip") and all(name.startswith("attn_pool.") for name in left)
    opened = export.open_checkpoint(str(tmp_path / "out"))
    assert opened.model.vision.tower == kind
    ours = build_vit(opened.model.vision).eval()
    ours.load_state_dict({name: opened.stored[f"visual_tokenizer.vit.{name}"] for name in ours.state_dict()})
    images = inputs()["images"]
    assert torch.equal(ours.forward_features(images), wanted.forward_features(images))
    export.export_vision(opened, tmp_path / "back", "timm")
    back = timm.create_model(f"local-dir:{tmp_path / 'back'}", pretrained=True).eval()
    assert torch.equal(back.forward_features(images), wanted.forward_features(images))
    with pytest.raises(ConvertError, match="only CLIP's tower"):
        export.export_vision(opened, tmp_path / "hf")


# What the command line says and writes


def test_settings_and_report_lie_beside_the_weights(checkpoints):
    """The settings are those that the model needs; every source tensor is in the report."""
    config = models.settings()
    for name, room in (("llama_2", "language"), ("clip", "vision"), ("sd", "decoder")):
        tree = yaml.safe_load((checkpoints / name / SETTINGS).read_text())["model"]
        assert list(tree) == [room]
        ours = asdict(getattr(config.model, room))
        for key, value in tree[room].items():
            for inner, entry in value.items() if isinstance(value, dict) else [(None, value)]:
                assert (ours[key] if inner is None else ours[key][inner]) == entry, f"{room}.{key}"
    report = json.loads((checkpoints / "llama_2" / REPORT).read_text())
    theirs = [name for row in report["tensors"] for name in row["theirs"]]
    assert sorted(theirs) == sorted(models.llama().state_dict())
    assert all(row["ours"] for row in report["tensors"])


def test_names_of_other_layouts_are_refused():
    for text in ("tp=2;pp=2", "tp", "dp=2", "tp=0", ""):
        with pytest.raises(ConvertError, match="--layout"):
            Layout.parse(text)
    assert Layout.parse("pp=2,tp=4") == Layout(4, 2)
