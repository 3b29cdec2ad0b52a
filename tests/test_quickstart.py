"""The quickstart from end to end, at a size where it takes seconds; and started a second time."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from data_pipeline.formats import read_document
from mmi_megatron.errors import ConfigError
from mmi_megatron.quickstart import _Tour, main
from mmi_megatron.train import metrics

SMALL = [
    "train.steps=4",
    "optimizer.warmup_steps=0",
    "train.rows=2",
    "train.micro_rows=2",
    "train.threads=1",
    "train.validate_documents=2",
    "train.sample_documents=1",
    "train.sample_steps=2",
    "parallel.tensor=1",
    "model.language.layers=2",
    "data.holdout=0.5",
    "data.window=8",
]


def test_from_nothing_to_a_page_and_again(tmp_path, capfd):
    out = tmp_path / "a run"
    assert main(out, SMALL, stories=24, documents=3) == 0
    printed = capfd.readouterr().out
    assert "Training to step 2" in printed and "step_0000002" in printed and "Resuming to step 4" in printed
    assert printed.rstrip().endswith("page.html") and (out / "page.html").is_file()
    for words in (
        "next-token",
        "next-image",
        "colour",
        "kind",
        "position",
        "by chance",
        "seed 0",
        "wall time",
    ):
        assert words in printed
    result = json.loads((out / "stories.json").read_text())
    assert (result["step"], result["documents"]) == (4, 3)
    steps = [record["step"] for record in metrics.read(out) if record["kind"] == "train"]
    assert steps == [1, 2, 3, 4], "stopped and resumed without a step lost or made twice"
    page = read_document(out / "page.json")
    assert page.content[0] == read_document(out / "prompt.json").content[0] and page.images

    assert main(out, SMALL, stories=24, documents=3) == 0
    printed = capfd.readouterr().out
    assert "used again" in printed and "already trained to step 4" in printed
    assert json.loads((out / "stories.json").read_text()) == result


def test_other_settings_start_anew(tmp_path, capsys):
    def prepare(overrides, stories):
        _Tour(tmp_path / "run", overrides, Console()).prepare(stories)
        return capsys.readouterr().out

    assert prepare([], 10) == ""
    (tmp_path / "run" / "shard").write_text("")
    assert "used again" in prepare([], 10) and (tmp_path / "run" / "shard").exists()
    for overrides, stories in (([], 11), (["train.seed=1"], 11)):
        (tmp_path / "run" / "shard").write_text("")
        assert "starting anew" in prepare(overrides, stories) and not (tmp_path / "run" / "shard").exists()
    assert "used again" in prepare(["train.seed=1"], 11)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="holds something else"):
        main(tmp_path, SMALL)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
