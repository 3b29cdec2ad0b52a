"""``mmi checkpoint`` on folders made by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mmi_megatron.train import checkpoint_folder
from mmi_megatron.train.storage import Folder


@pytest.fixture
def run_folder(tmp_path) -> Path:
    """A run with two checkpoints and the frozen weights that both have."""
    for name in ("frozen_abc", "step_0000002", "step_0000004"):
        final = Folder(tmp_path / "checkpoints") / name
        draft = checkpoint_folder.draft_of(final)
        checkpoint_folder.begin(draft)
        draft.write("__0_0.distcp", name.encode() * 1000)
        if name.startswith("step"):
            draft.write("run.json", json.dumps({"frozen": "abc", "layout": {"ranks": 2}}).encode())
        files = draft.files()
        hashes = {
            n: {"bytes": size, "sha256": checkpoint_folder.sha256(draft, n, size)}
            for n, size in files.items()
        }
        checkpoint_folder.complete(draft, final, hashes)
    return tmp_path


def invoke(*words: str):
    """Run the command in this process."""
    from mmi_megatron.checkpoint_cli import app

    return CliRunner().invoke(app, words, env={"COLUMNS": "200"})


def test_checkpoints_are_listed_whole_and_broken(run_folder):
    (run_folder / "checkpoints" / "step_0000004" / "complete.json").unlink()
    said = invoke("ls", str(run_folder))
    assert said.exit_code == 0, said.output
    first, second = [line for line in said.output.splitlines() if "step_" in line and "000" in line][:2]
    assert "step_0000002" in first and "ranks 2" in first and "whole" in first
    assert "step_0000004" in second and "never finished" in second


def test_every_byte_is_checked(run_folder):
    assert invoke("verify", str(run_folder)).exit_code == 0
    file = run_folder / "checkpoints" / "frozen_abc" / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    said = invoke("verify", str(run_folder / "checkpoints"), "--step", "4")
    assert said.exit_code == 1 and "frozen_abc/__0_0.distcp is damaged" in said.output
    assert "step_0000002" not in said.output


def test_what_is_not_there_is_a_clear_error(run_folder):
    said = invoke("verify", str(run_folder), "--step", "3")
    assert said.exit_code == 1 and "no such checkpoint" in said.output
