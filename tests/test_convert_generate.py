"""The converted release, ready to write on: its next token is that of the release's own parts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor
from typer.testing import CliRunner

from data_pipeline.decode import crop
from data_pipeline.formats import Document
from data_pipeline.storybook import to_png
from mmi_megatron.cli import app
from mmi_megatron.convert.conversion import write
from mmi_megatron.convert.families import Options, conversion
from mmi_megatron.convert.released import language_layers, visual_tokenizer
from mmi_megatron.convert.sharded import Layout
from mmi_megatron.errors import ConfigError
from mmi_megatron.generate.interleaved import Reader
from mmi_megatron.generate.load import load_run
from mmi_megatron.model.rows import describe_rows
from tests import convert_models, released_checkpoint
from tests.released_checkpoint import CLIP, LLAMA, RESAMPLER, renamed, under

TEXT = released_checkpoint.VOCABULARY - 2
BOS, EOS, PAD, BOI, IMAGE = 1, 2, 3, TEXT, TEXT + 1
CPU = torch.device("cpu")


def words(file: Path, count: int = TEXT) -> Path:
    """A tokenizer of so many tokens, without those for images."""
    names = ["<unk>", "<s>", "</s>", "<pad>", *(f"w{number}" for number in range(4, count))]
    backend = Tokenizer(WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.save(str(file))
    return file


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> tuple[Path, dict[str, Tensor]]:
    """The release, converted to draw small pictures, beside its tokenizer; and its tensors."""
    folder = tmp_path_factory.mktemp("release")
    (folder / "small.yaml").write_text(released_checkpoint.SETTINGS)
    state = released_checkpoint.whole()
    for name, tensor in state.items():
        if name.startswith("mm_decoder.layers.") and tensor.ndim == 2:
            tensor *= tensor.shape[1] ** -0.5  # else 40 layers make something large of every rounding error
    (folder / "in").mkdir()
    torch.save(state, folder / "in" / "pytorch_model.bin")
    words(folder / "in" / "tokenizer.json")
    options = Options(preset=str(folder / "small.yaml"), overrides=["model.decoder.image_size=64"])
    report = write(conversion("released", folder / "in", options), folder / "weights", Layout(2, 1))
    assert f"bos 1, eos 2, BoI {TEXT}" in report.notes
    return folder, state


def picture() -> np.ndarray:
    ramp = np.arange(40)[:, None] * 6
    return np.stack([ramp + 0 * ramp.T, ramp.T + 0 * ramp, (ramp + ramp.T) // 2], -1).astype(np.uint8)


@torch.no_grad()
def next_token(state: dict[str, Tensor], tokens: list[int], pixels: Tensor) -> Tensor:
    """Logits [B, vocabulary] of the release after tokens with one image, of pixels [B, 3, H, W] in 0..1."""
    seen, maps = visual_tokenizer(under(state, "visual_tokenizer."), CLIP, RESAMPLER)(pixels)
    ids = torch.tensor([tokens] * len(pixels))
    embedded = state["mm_decoder.embed_tokens.weight"][ids]
    embedded[ids == BOI] += state["soi_token"]
    embedded[ids == IMAGE] = seen.flatten(0, 1)
    rows = describe_rows(ids, bos=BOS, eos=EOS, pad=PAD, boi=BOI, image_token=IMAGE, release=True)
    visibility = (rows.visible_last > rows.visible_first).float()[..., None]
    features = torch.cat([level.flatten(2) for level in maps[1:]], 2).transpose(1, 2)[:, None]
    hidden = language_layers(renamed(state), LLAMA)(embedded, features, visibility)[:, -1]
    head = under(state, "text_decoder.")
    logits = hidden @ head["head.weight"].T + head["head.bias"]
    logits[:, -2:] += hidden @ head["head_new.weight"].T + head["head_new.bias"]
    return logits


def test_the_next_token_is_that_of_the_release(release):
    folder, state = release
    run = load_run(folder / "weights", CPU, folder / "in")
    prompt = Document("x", ["w5 w6", to_png(picture()), "w7 w90 w8"], {})
    reading = Reader(run).start(prompt)
    assert reading.tokens == [BOS, 5, 6, BOI, *[IMAGE] * 6, 7, 90, 8]
    pixels = torch.from_numpy(crop(Image.fromarray(picture()), 224)).permute(2, 0, 1).double() / 255
    exact = {
        name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in state.items()
    }
    # In float64: these layers amplify rounding, and the release's own in float32 are 2e-4 off on some CPUs.
    torch.set_default_dtype(torch.float64)
    try:
        wanted, blank = next_token(exact, reading.tokens, torch.stack([pixels, torch.zeros_like(pixels)]))
    finally:
        torch.set_default_dtype(torch.float32)
    chosen = reading.logits > -torch.inf
    assert (~chosen).nonzero()[:, 0].tolist() == [BOS, PAD, IMAGE]
    error = (reading.logits - wanted)[chosen].abs().max()
    assert error < 5e-4 * wanted[chosen].abs().max()
    assert (blank - wanted)[chosen].abs().max() > 1000 * error


def test_the_command_writes_a_page_from_it(release, tmp_path):
    folder, _ = release
    (tmp_path / "prompt.json").write_text(json.dumps({"content": [{"text": "w5 w6 w7"}]}))
    arguments = ["generate", str(folder / "weights"), "--prompt", str(tmp_path / "prompt.json")]
    arguments += ["--out", str(tmp_path / "page.html"), "--picture-first", "--steps", "1"]
    arguments += ["--max-tokens", "3", "--max-images", "1"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1 and "name theirs with --tokenizer" in result.output
    result = CliRunner().invoke(app, [*arguments, "--tokenizer", str(folder / "in")])
    assert result.exit_code == 0, result.output
    assert "data:image/png" in (tmp_path / "page.html").read_text()


def test_what_cannot_be_written_on_is_refused(release, tmp_path):
    folder, _ = release
    other = words(tmp_path / "tokenizer.json", TEXT - 1)
    with pytest.raises(ConfigError, match=rf"BoI is {TEXT - 1} .* are {TEXT} and {TEXT + 1}"):
        load_run(folder / "weights", CPU, other)
    convert_models.clip().save_pretrained(tmp_path / "in")
    write(conversion("hf-clip", tmp_path / "in"), tmp_path / "part", Layout())
    with pytest.raises(ConfigError, match="a part of a model, without language, decoder"):
        load_run(tmp_path / "part", CPU, other)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "run.json").write_text((folder / "weights" / "run.json").read_text())
    with pytest.raises(RuntimeError, match="complete.json is missing"):
        load_run(broken, CPU, folder / "in")
