"""The set-up: which torch is asked for on which machine, and when nothing need be done."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TORCH = "torch==2.13.0"


@pytest.fixture
def bootstrap():
    spec = importlib.util.spec_from_file_location("bootstrap", ROOT / "bootstrap.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def asked(bootstrap, monkeypatch):
    """What pip was asked to install; it fails for what is in ``asked.missing``."""

    class Asked(list):
        missing: set[str] = set()

    calls = Asked()

    def run(command, **_):
        wanted = command[command.index("--constraint") + 2 :]
        calls.append(wanted)
        return subprocess.CompletedProcess(command, int(wanted[-1] in calls.missing))

    monkeypatch.setattr(bootstrap.subprocess, "run", run)
    monkeypatch.setattr(bootstrap, "environ", {})
    monkeypatch.setattr(bootstrap, "has_driver", lambda: False)
    return calls


def test_a_machine_without_a_driver_gets_a_cpu_build(bootstrap, asked, capsys):
    bootstrap.install_torch()
    assert asked == [[f"{TORCH}+cpu"]]
    assert capsys.readouterr().out == f"Installing {TORCH}\n"


def test_without_a_cpu_build_the_large_one_is_announced(bootstrap, asked, capsys, monkeypatch):
    asked.missing = {f"{TORCH}+cpu"}
    monkeypatch.setattr(bootstrap.sys, "platform", "linux")
    bootstrap.install_torch()
    assert asked == [[f"{TORCH}+cpu"], [TORCH]]
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 2 and "No CPU build" in told[1] and "TORCH_INDEX" in told[1]


def test_a_machine_with_a_driver_gets_the_ordinary_build(bootstrap, asked, monkeypatch):
    monkeypatch.setattr(bootstrap, "has_driver", lambda: True)
    bootstrap.install_torch()
    assert asked == [[TORCH]]


def test_an_index_of_one_s_own_is_used(bootstrap, asked):
    bootstrap.environ["TORCH_INDEX"] = "file:///wheels"
    bootstrap.install_torch()
    assert asked == [["--index-url", "file:///wheels", TORCH]]


def test_a_failing_installation_ends_the_set_up(bootstrap, asked):
    asked.missing = {TORCH, f"{TORCH}+cpu"}
    with pytest.raises(SystemExit, match=f"pip install {TORCH} failed"):
        bootstrap.install_torch()


def test_a_stamp_of_the_same_inputs_ends_at_once(bootstrap, asked, monkeypatch, tmp_path):
    monkeypatch.setattr(bootstrap, "VENV", tmp_path)
    monkeypatch.setattr(bootstrap, "environment_fits", lambda: True)
    bootstrap.main(["dev"])
    assert asked[-1][-1] == f"{ROOT}[dev]"
    done = len(asked)
    for extras in ([], ["dev"]):
        bootstrap.main(extras)
    assert len(asked) == done
    bootstrap.environ["TORCH_INDEX"] = "file:///wheels"
    bootstrap.main([])
    assert len(asked) > done, "another index is another environment"


def test_other_pythons_are_refused(bootstrap, monkeypatch):
    monkeypatch.setattr(bootstrap.sys, "version_info", (3, 13, 0))
    with pytest.raises(SystemExit, match=r"Python 3\.11 or 3\.12 is needed"):
        bootstrap.main([])
