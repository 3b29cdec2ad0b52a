"""The ``mmi`` command: its surface, what it passes on, and what a user sees when something is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

from data_pipeline.cli import app as data_app
from mmi_megatron import cli, doctor
from mmi_megatron import quickstart as tour
from mmi_megatron.settings import load_config
from mmi_megatron.train import launch

COMMANDS = {
    "mmi train": "preset overrides --out --resume --ranks --stop-after",
    "mmi generate": "run --prompt --out --max-tokens --min-tokens --max-images --picture-first --temperature "
    "--top-k --top-p --beams --length-penalty --steps --guidance --scheduler --seed --tokenizer",
    "mmi quickstart": "overrides --out",
    "mmi config": "preset overrides",
    "mmi params": "preset overrides --json",
    "mmi doctor": "",
    "mmi convert": "kind source --out overrides --layout --dtype --image-size --vocabulary-multiple --preset "
    "--json",
    "mmi export": "checkpoint --llm --vision --decoder --released --vision-format --config --dtype --average "
    "--json",
    "mmi checkpoint": "",
    "mmi data": "",
    "mmi data import-html": "folder --out --json",
    "mmi data import-mmc4": "folder --out --similarity --max-images --drop-single --json",
    "mmi data import-obelics": "folder --out --json",
    "mmi data import-pairs": "folder --out --min-tokens --tokenizer --json",
    "mmi data storybook": "--out --stories --seed --size --json",
    "mmi data tokenizer": "shards --out --vocab --json",
    "mmi data download": "lists --out --connections --per-host --timeout --retries --max-bytes --smallest "
    "--recipe --aesthetic --min-tokens --tokenizer --unsafe --watermark --similarity --license "
    "--ignore-opt-out --allow --documents-per-shard --json",
    "mmi data index": "shards --tokenizer --holdout --workers --ray --json",
    "mmi data inspect": "shards --tokenizer --out --kind --rows --context-length --image-tokens --json",
    "mmi data bench": "--executors --images --workers --decoder --rounds --folder --json",
    "mmi data serve": "--address --workers --port",
    "mmi data filter": "source --out --function --workers --ray --json",
    "mmi data recaption": "source --out --function --batch --workers --ray --json",
    "mmi data dedup": "source --out --distance --workers --ray --json",
}
"""Every command with its arguments and options: a change here breaks somebody's script."""


def run(*arguments: str):
    return CliRunner().invoke(cli.app, list(arguments))


def surface(app: typer.Typer, prefix: str) -> dict[str, str]:
    commands = typer.main.get_group(app).commands
    return {
        f"{prefix} {name}": " ".join(
            parameter.opts[0] for parameter in command.params if parameter.name != "help"
        )
        for name, command in commands.items()
    }


def test_the_surface_is_frozen():
    assert surface(cli.app, "mmi") | surface(data_app, "mmi data") == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command):
    result = run(*command.split()[1:], "--help")
    assert result.exit_code == 0
    assert "Usage" in result.output


# What is passed on


@pytest.fixture
def launched(monkeypatch):
    """What the launcher was called with; it returns 3 and starts nothing."""
    calls = []
    monkeypatch.setattr(
        launch, "launch", lambda config, out, **options: calls.append((config, out, options)) or 3
    )
    return calls


def test_train_hands_everything_over(launched, tmp_path):
    options = ["--out", str(tmp_path), "--resume", "--ranks", "4", "--stop-after", "2"]
    result = run("train", "quickstart", "train.steps=5", "optimizer.lr=1e-4", *options)
    assert result.exit_code == 3, "the launcher's exit code is the command's"
    expected = load_config("quickstart", ["train.steps=5", "optimizer.lr=1e-4"])
    assert launched == [(expected, tmp_path, {"resume": True, "ranks": 4, "stop_after": 2})]


def test_train_writes_under_runs_unless_told(launched):
    run("train", "quickstart")
    _, out, options = launched[0]
    assert out == Path("runs/quickstart")
    assert options == {"resume": False, "ranks": None, "stop_after": None}


def test_quickstart_hands_everything_over(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(tour, "main", lambda *arguments: calls.append(arguments) or 4)
    result = run("quickstart", "train.seed=2", "--out", str(tmp_path))
    assert (result.exit_code, calls) == (4, [(tmp_path, ["train.seed=2"])])


def test_config_prints_what_is_loaded():
    result = run("config", "paper-13b", "train.steps=5")
    assert result.exit_code == 0
    tree = yaml.safe_load(result.output)
    assert tree["train"]["steps"] == 5
    assert tree["data"]["image_size"] == 224


# What is wrong


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["config", "quickstart", "train.stpes=5"], "'train.stpes'; did you mean 'train.steps'"),
        (["config", "quickstrat"], "did you mean 'quickstart'"),
        (["train", "quickstart", "parallel.tensor=3"], "model.language.heads: 4 does not divide"),
        (["params", "quickstart", "train.steps=many"], "train.steps: expected a whole number"),
        (["generate", "nowhere", "--prompt", "nothing.json", "--out", "x.html"], "nothing.json"),
        (
            ["generate", "nowhere", "--prompt", "x", "--out", "x", "--top-p", "2"],
            "--top-p: 2.0 makes no sense",
        ),
        (
            ["generate", "nowhere", "--prompt", "x", "--out", "x", "--scheduler", "dd"],
            "--scheduler: must be ddim",
        ),
    ],
)
def test_errors_are_one_line_and_exit_code_1(arguments, expected):
    result = run(*arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert expected in result.stderr


def test_other_errors_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(doctor, "examine", lambda: 1 / 0)
    assert isinstance(run("doctor").exception, ZeroDivisionError)


# Without torch


def test_data_and_config_work_without_torch(tmp_path):
    code = (
        "import sys\nfor name in ('torch', 'megatron', 'transformers', 'timm'): sys.modules[name] = None\n"
        "from mmi_megatron.cli import main\nmain()"
    )

    def mmi(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)

    made = mmi("data", "storybook", "--out", str(tmp_path), "--stories", "3", "--json")
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout)["documents"] == 3
    assert mmi("config", "quickstart").returncode == 0
    refused = mmi("params", "quickstart")
    assert refused.returncode == 1
    assert refused.stderr == "error: this command needs torch, which is not installed here\n"


def test_doctor_examines_a_machine_without_torch(monkeypatch):
    monkeypatch.setattr(doctor, "installed", lambda name: None)
    result = run("doctor")
    assert result.exit_code == 0 and "not installed" in result.output


# Doctor


def test_doctor_names_devices_versions_and_fast_paths():
    result = run("doctor")
    assert result.exit_code == 0
    for name in (*doctor.PACKAGES, "python", "TransformerEngine", "NVIDIA Apex", "FlashAttention", "kernels"):
        assert name in result.output
    assert "in use" in result.output or "falls back" in result.output


def test_doctor_tells_the_other_apex_from_nvidia_s(monkeypatch):
    def having(*names: str):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name in names else None)
        return doctor.apex()

    assert having().state == "falls back"
    assert "is not NVIDIA's" in having("apex").detail
    assert having("apex", "amp_C").state == "in use"


def test_doctor_reports_the_compiled_kernels(monkeypatch):
    import mmi_kernels

    def with_status(**found: str | None):
        monkeypatch.setattr(mmi_kernels, "status", lambda: found)
        return doctor.kernels()

    there = with_status(implementation="compiled", instruction_set="avx2", reason=None)
    assert (there.state, there.detail) == ("in use", "CPU, avx2")
    absent = with_status(implementation="reference", instruction_set=None, reason="no compiler")
    assert (absent.state, absent.detail) == ("falls back", "no compiler")
