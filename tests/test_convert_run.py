"""A run from converted weights: it trains, is resumed without them, and its frozen parts leave unchanged."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from typer.testing import CliRunner

from data_pipeline.settings import SourceSettings
from data_pipeline.storybook import write_stories
from mmi_megatron.cli import app
from mmi_megatron.config import Config
from mmi_megatron.convert.rules import ConvertError
from mmi_megatron.convert.start import RECORD, load_start, resolve
from mmi_megatron.settings import save_config
from tests import convert_models as models

ROWS = 300


def plain_tokenizer(file: Path) -> None:
    """A tokenizer like LLaMA's: beginning and end, and no image tokens."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=ROWS,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(
        ["once upon a time there was a red ball and a blue box in the green garden"] * 9
    )
    backend.train_from_iterator(
        ["the blue box was in the red garden, once upon a time; a green ball"], trainer
    )
    backend.save(str(file))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> tuple[Config, Path]:
    return prepare(tmp_path_factory.mktemp("run"), "tp=1")


def prepare(folder: Path, layout: str) -> tuple[Config, Path]:
    """A configuration that starts from three conversions, and the folder where all of it lies."""
    tokens = folder / "llama" / "tokenizer.json"
    tokens.parent.mkdir()
    plain_tokenizer(tokens)
    rows = Tokenizer.from_file(str(tokens)).get_vocab_size()
    models.llama(vocab_size=rows).save_pretrained(folder / "llama")
    models.clip().save_pretrained(folder / "clip")
    models.save_diffusion(folder / "sd")
    for kind, name in (("hf-llama", "llama"), ("hf-clip", "clip"), ("sd", "sd")):
        out = str(folder / f"{name}_checkpoint")
        result = CliRunner().invoke(
            app, ["convert", kind, str(folder / name), "--out", out, "--layout", layout, "--json"]
        )
        assert result.exit_code == 0, result.output
        report = json.loads(result.output)
        assert name != "llama" or report["notes"] == [f"bos 1, eos 2, BoI {rows}"]
    write_stories(folder / "shards", 20, seed=3, size=16)
    config = models.settings()
    config.model.language.vocabulary = rows + 2
    config.model.language.vocabulary_multiple = 128
    config.data = replace(
        config.data,
        sources=[SourceSettings("stories", str(folder / "shards"))],
        tokenizer=str(tokens),
        context_length=160,
        holdout=0.3,
    )
    train = config.train
    train.steps, train.rows, train.micro_rows, train.validate_every, train.sample_every = 2, 1, 1, 0, 0
    train.save_every, config.optimizer.warmup_steps = 1, 1
    train.init_from = [str(folder / f"{name}_checkpoint") for name in ("llama", "clip", "sd")]
    return config, folder


def steps(config: Config, out: str, stop_after: int, resume: bool) -> None:
    from mmi_megatron.train.loop import train

    train(config, Path(out), resume=resume, stop_after=stop_after)


def test_train_resume_export(prepared, ranks, tmp_path):
    from transformers import CLIPVisionModel, LlamaForCausalLM

    config, folder = prepared
    out = tmp_path / "out"
    ranks.run(1, steps, config, str(out), 1, False)
    record = json.loads((out / RECORD).read_text())
    assert not any(record["unused"].values()) and set(record["from"].values()) == set(config.train.init_from)
    (out / RECORD).unlink()
    gone = replace(config, train=replace(config.train, init_from=["/nowhere"]))
    ranks.run(1, steps, gone, str(out), 2, True)
    assert not (out / RECORD).exists()
    save_config(config, out / "config.yaml")
    result = CliRunner().invoke(
        app,
        ["export", str(out), "--llm", str(tmp_path / "llm"), "--vision", str(tmp_path / "vision")]
        + ["--decoder", str(tmp_path / "decoder"), "--json"],
    )
    assert result.exit_code == 0, result.output
    reports = [json.loads(line) for line in result.output.splitlines()]
    assert len(reports) == 3 and "without its MMFS" in reports[0]["notes"][0]
    rows = config.model.language.vocabulary - 2
    wanted = models.llama(vocab_size=rows).state_dict()
    back = LlamaForCausalLM.from_pretrained(tmp_path / "llm").state_dict()
    assert back.keys() == wanted.keys() and all(torch.equal(back[name], wanted[name]) for name in wanted)
    tower, original = CLIPVisionModel.from_pretrained(tmp_path / "vision").state_dict(), models.clip()
    assert all(torch.equal(tower[name], tensor) for name, tensor in original.state_dict().items())
    from diffusers import AutoencoderKL, UNet2DConditionModel

    vae = AutoencoderKL.from_pretrained(tmp_path / "decoder", subfolder="vae").state_dict()
    assert all(torch.equal(vae[name], tensor) for name, tensor in models.vae().state_dict().items())
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "decoder", subfolder="unet").state_dict()
    moved = [
        name for name, tensor in models.unet().state_dict().items() if not torch.equal(unet[name], tensor)
    ]
    assert len(moved) > 0.9 * len(unet)  # it was trained for two steps


def start_one(config: Config, out: str) -> str:
    """What ``load_start`` says on one rank."""
    from mmi_megatron.parallel import groups
    from mmi_megatron.parallel.model import build_stages
    from mmi_megatron.train.checkpoint_reader import CheckpointError

    groups.initialize(config)
    try:
        load_start(build_stages(config, models.SPECIAL), config, Path(out))
    except (ConvertError, CheckpointError) as error:
        return str(error)
    finally:
        groups.destroy()
    return ""


def test_starts_that_are_refused(prepared, ranks, tmp_path):
    """The same tensors twice, settings or shapes of another model, a checkpoint that is not whole."""
    config, folder = prepared
    first = config.train.init_from[0]
    broken = tmp_path / "broken"
    shutil.copytree(first, broken)
    (broken / "__0_0.distcp").write_bytes(b"short")

    def changed(init_from: list[str], **language) -> Config:
        model = replace(config.model, language=replace(config.model.language, **language))
        return replace(config, model=model, train=replace(config.train, init_from=init_from))

    cases = [
        (changed([first, first]), "more are in .*llama_checkpoint and in .*; name one of them only"),
        (changed([first], rope_theta=1e4), "model.language.rope_theta=50000.0, this run has 10000.0"),
        (changed([first], layers=2), "model.language.layers=4, this run has 2"),
        (changed([str(broken)]), "__0_0.distcp has 5 bytes of"),
        (changed([str(tmp_path)]), "neither a checkpoint nor the folder of a run"),
    ]
    for case, words in cases:
        (said,) = ranks.run(1, start_one, case, str(tmp_path / "out"))
        pytest.raises(ConvertError, _raise, said).match(words)


def _raise(said: str) -> None:
    raise ConvertError(said)


def test_the_newest_of_a_run_is_found(prepared):
    config, folder = prepared
    assert resolve(config.train.init_from[0]).name == "llama_checkpoint"
    with pytest.raises(ConvertError, match="neither a checkpoint"):
        resolve(str(folder / "nowhere"))
