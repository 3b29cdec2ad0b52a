"""Parameter counts against the published ones: the paper's parts, CLIP, LLaMA and Stable Diffusion."""

from __future__ import annotations

import functools
import io
import json

import pytest
from rich.console import Console
from typer.testing import CliRunner

from mmi_megatron import params
from mmi_megatron.cli import app
from mmi_megatron.model.mm_interleaved import MMInterleaved
from mmi_megatron.params import DECODER, IMAGE_ROWS, LANGUAGE, MMFS, VISION
from mmi_megatron.settings import load_config, presets

VIT_L_14 = 303_179_776
"""openai/clip-vit-large-patch14, its vision model without the projection."""
LLAMA_13B = 13_015_864_320
OPEN_LLAMA_3B = 3_426_473_600
STABLE_DIFFUSION_2_1 = 865_910_724
STABLE_DIFFUSION_1 = 859_520_964
STABLE_DIFFUSION_VAE = 83_653_863


@functools.cache
def built(name: str) -> MMInterleaved:
    return params.build_on_meta(load_config(name).model)


@functools.cache
def counted(name: str) -> dict[tuple[str, str], params.Part]:
    parts = params.tally(built(name), load_config(name).model.language)
    return {(part.group, part.part): part for part in parts}


@pytest.fixture
def paper() -> dict[tuple[str, str], params.Part]:
    return counted("paper-13b")


def millions(part: params.Part) -> float:
    return part.parameters / 1e6


def test_paper_shows_the_published_figures(paper):
    mmfs = paper[MMFS, "MMFS"]
    assert (mmfs.layers, mmfs.parameters) == (10, 10 * 36_051_584)
    dead_logits = 16 * 3 * (5120 + 1)
    assert (36_051_584 + dead_logits) / 1e6 == pytest.approx(36.30, abs=0.005)
    assert millions(paper[VISION, "ViT-Adapter"]) == pytest.approx(23.2, abs=0.05)
    assert millions(paper[VISION, "resampler"]) == pytest.approx(101.6, abs=0.06)
    assert millions(paper[VISION, "resampler, input"]) == pytest.approx(1.05, abs=0.005)
    assert millions(paper[VISION, "resampler, output"]) == pytest.approx(3.94, abs=0.005)
    assert millions(paper[DECODER, "resampler"]) == pytest.approx(23.2, abs=0.05)
    assert millions(paper[DECODER, "context projection"]) == pytest.approx(26.2, abs=0.05)
    assert paper[VISION, "ViT"].parameters == VIT_L_14
    assert paper[DECODER, "U-Net"].parameters == STABLE_DIFFUSION_2_1
    assert paper[DECODER, "VAE"].parameters == STABLE_DIFFUSION_VAE


def test_paper_s_language_model_is_llama(paper):
    llama = sum(
        part.parameters for (group, name), part in paper.items() if group == LANGUAGE and name != IMAGE_ROWS
    )
    assert llama == LLAMA_13B
    assert paper[LANGUAGE, IMAGE_ROWS].parameters == 2 * 128 * 5120


def test_paper_trains_what_the_paper_trains(paper):
    frozen = {key for key, part in paper.items() if part.trainable == 0}
    language = {(LANGUAGE, name) for name in ("layers", "embeddings", "head", "final norm", IMAGE_ROWS)}
    assert frozen == language | {(VISION, "ViT"), (DECODER, "VAE")}


def test_released_checkpoint_trains_1_46_billion():
    parts = list(counted("released-13b").values())
    whole = params.totals(parts)["all"]
    assert whole.trainable / 1e9 == pytest.approx(1.46, abs=0.005)
    mmfs = next(part for part in parts if (part.group, part.part) == (DECODER, "MMFS"))
    assert millions(mmfs) == pytest.approx(57, abs=1)


def test_full_trains_all_but_the_vae():
    frozen = {key: part.frozen for key, part in counted("full-13b").items() if part.frozen}
    norm_behind_the_vit, sinks_of_the_unet = 2 * 1024, 4 * 1024
    assert frozen == {
        (DECODER, "VAE"): STABLE_DIFFUSION_VAE,
        (VISION, "ViT"): norm_behind_the_vit,
        (DECODER, "MMFS"): sinks_of_the_unet,
    }


def test_ablation_is_open_llama_3b_and_stable_diffusion_1():
    parts = counted("ablation-3b")
    names = ("layers", "embeddings", "head", "final norm")
    assert sum(parts[LANGUAGE, name].parameters for name in names) == OPEN_LLAMA_3B
    assert parts[DECODER, "U-Net"].parameters == STABLE_DIFFUSION_1
    unet = built("ablation-3b").image_decoder.unet
    blocks = [*unet.down_blocks[:3], unet.mid_block, *unet.up_blocks[1:]]
    assert {block.attentions[0].transformer_blocks[0].attn1.heads for block in blocks} == {8}


@pytest.mark.parametrize("name", presets())
def test_every_parameter_is_counted_once_and_in_a_named_part(name):
    model, parts = built(name), counted(name)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert sum(part.parameters for part in parts.values()) == sum(p.numel() for p in model.parameters())
    known = {(group, part) for _, group, part in params.PARTS} | {(LANGUAGE, IMAGE_ROWS)}
    assert set(parts) <= known


def test_parts_that_are_switched_off_are_gone():
    config = load_config("quickstart", ["model.loss.next_image=0", "model.language.mmfs.kind=none"])
    assert not any(part.group in (DECODER, MMFS) for part in params.count(config.model))


def test_table_shows_whole_numbers_on_a_narrow_terminal(paper):
    console = Console(width=80, file=io.StringIO())
    console.print(params.as_table(list(paper.values()), "paper-13b"))
    text = console.file.getvalue()
    assert "MMFS: 10 x 36,051,584" in text and "13,017,175,040" in text and "…" not in text


def test_command_prints_one_json_object():
    told = json.loads(CliRunner().invoke(app, ["params", "quickstart", "--json"]).output)
    assert sum(part["parameters"] for part in told["parts"]) == told["totals"]["all"]["parameters"]
