"""The launcher: ranks that end, fail, hang and are killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mmi_megatron.errors import ConfigError
from mmi_megatron.settings import load_config
from mmi_megatron.train import faults, launch, pulse

STARTER = """
import signal, sys
from pathlib import Path
from mmi_megatron.settings import load_config
# A shell's background jobs, tests among them, start with Ctrl-C ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
from mmi_megatron.train.launch import launch
sys.exit(launch(load_config("quickstart"), Path(sys.argv[1]), module="tests.fake_rank", again="AGAIN"))
"""


def alive(folder: Path) -> list[int]:
    """Process ids of the fake ranks that still run."""
    running = []
    for file in folder.glob("pid_*"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(file.read_text()), 0)
            running.append(int(file.read_text()))
    return running


def wait_for(*files: Path, seconds: float = 40) -> None:
    """Wait until the ranks have written these files."""
    end = time.monotonic() + seconds
    while not all(file.exists() for file in files):
        assert time.monotonic() < end, f"not there after {seconds} s: {files}"
        time.sleep(0.05)


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Launch two fake ranks in this process: exit code, what went to stderr, and how long it took."""

    def run(capfd, what: str, overrides=(), **options):
        monkeypatch.setenv("FAKE", what)
        capfd.readouterr()
        began = time.monotonic()
        config = load_config("quickstart", ["train.rows=8", "train.micro_rows=4", *overrides])
        code = launch.launch(config, tmp_path, module="tests.fake_rank", again="AGAIN", **options)
        return code, capfd.readouterr(), time.monotonic() - began

    return run


def test_all_ranks_run_and_get_what_was_given(start, tmp_path, capfd):
    code, said, _ = start(capfd, "report", resume=True, stop_after=5)
    assert code == 0 and said.err == ""
    assert "hello from 0 of 2" in said.out and "hello from 1" not in said.out
    assert "hello from 1 of 2" in faults.log_path(tmp_path / "logs", 1).read_text()
    for rank in (0, 1):
        given = (tmp_path / f"given_{rank}").read_text()
        assert given == "tensor=2 resume=True stop_after=5"


def test_the_error_that_came_first_is_the_one_reported(start, tmp_path, capfd):
    code, said, _ = start(capfd, "raise")
    assert code == 1
    assert said.err.count("Training ended") == 1
    assert "rank 1 ended with exit code 1" in said.err
    assert "ValueError: the second rank's own error" in said.err and "connection closed" not in said.err
    assert str(faults.log_path(tmp_path / "logs", 1)) in said.err
    assert "AGAIN" in said.err and "no checkpoint yet" in said.err
    assert "Traceback" in faults.log_path(tmp_path / "logs", 1).read_text()


def test_ranks_that_ignore_the_end_are_killed(start, tmp_path, capfd):
    code, said, took = start(capfd, "stubborn")
    assert code == 7 and "rank 1 ended with exit code 7" in said.err and took < 20
    assert not alive(tmp_path)


def test_a_rank_killed_in_a_collective_ends_the_job(start, tmp_path, capfd):
    killed = []

    def kill():
        wait_for(tmp_path / "ready_0", tmp_path / "ready_1")
        time.sleep(0.5)
        killed.append(time.monotonic())
        os.kill(int((tmp_path / "pid_1").read_text()), signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    code, said, _ = start(capfd, "collective")
    thread.join()
    assert time.monotonic() - killed[0] < 20  # the goal is 60 s
    assert code == 128 + signal.SIGKILL
    assert said.err.count("Training ended") == 1 and len(said.err.strip().splitlines()) == 4
    assert "rank 1 was killed by signal 9 (SIGKILL" in said.err
    assert not alive(tmp_path)


def test_a_hung_collective_ends_by_its_timeout(start, tmp_path, capfd):
    code, said, took = start(capfd, "hang")
    assert code == 1 and took < 40
    assert "rank 0 ended with exit code 1" in said.err and "imed out" in said.err
    assert not alive(tmp_path)


def test_a_rank_that_hangs_is_named_with_its_step_part_and_stack(start, tmp_path, capfd):
    code, said, took = start(capfd, "stuck", ["train.timeout=4"])
    assert code == pulse.HUNG and took < 60
    assert "rank 1 hung" in said.err and "hung at step 2, language model forward: no progress" in said.err
    assert "in wait_for_nobody" in said.err and "fake_rank.py" in said.err
    assert "wait_for_nobody" in pulse.stacks_path(tmp_path / "logs", 1).read_text()
    assert not alive(tmp_path)


def test_a_rank_that_cannot_even_say_so_is_named(start, tmp_path, capfd):
    code, said, took = start(capfd, "frozen", ["train.timeout=8"])
    assert code == pulse.HUNG and took < 60
    assert "rank 1 hung" in said.err and "step 2, language model forward" in said.err
    assert not alive(tmp_path)


def test_all_ranks_that_hang_in_set_up_are_named_with_phase_and_stack(start, tmp_path, capfd):
    overrides = ["train.setup_timeout=8", "parallel.tensor=1", "train.rows=12"]
    code, said, took = start(capfd, "behind", overrides, ranks=3)
    assert code == pulse.HUNG and took < 60
    assert "Training ended: ranks 1 and 2 hung." in said.err and said.err.count("Training ended") == 1
    for rank in (1, 2):
        _, about = said.err.split(f"  rank {rank}:\n")
        assert about.lstrip().startswith("last said: hung at set-up, opening the corpus: no progress for")
        assert "in wait_for_nobody" in about and str(pulse.stacks_path(tmp_path / "logs", rank)) in about
    assert "rank 0" not in said.err and not alive(tmp_path)
    # Where no launcher reads what it wrote down, it has said so itself.
    log = faults.log_path(tmp_path / "logs", 2).read_text()
    assert "rank 2 hung at set-up, opening the corpus" in log and "in wait_for_nobody" in log


def test_a_rank_that_never_starts_is_named(start, tmp_path, capfd):
    code, said, took = start(capfd, "absent", ["train.setup_timeout=8"])
    assert code == pulse.HUNG and took < 60
    assert "Training ended: rank 1 hung." in said.err and "hung at set-up, starting: no progress" in said.err
    log = faults.log_path(tmp_path / "logs", 0).read_text()  # what a job without our launcher shows
    assert "rank 1 of 2 did not finish importing within 8 s (train.setup_timeout)" in log
    assert "rank 1 has given no sign of life" in log and not alive(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_passed_on_and_ranks_save_and_stop(tmp_path, number):
    process = subprocess.Popen(
        [sys.executable, "-c", STARTER, str(tmp_path)],
        env=os.environ | {"FAKE": "saves"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for(tmp_path / "ready_0", tmp_path / "ready_1")
    os.kill(process.pid, number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 75
    assert "Saved and stopped. to go on:  AGAIN" in said and "Traceback" not in said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_ranks_do_not_outlive_the_launcher(tmp_path, number):
    environment = os.environ | {"FAKE": "wait"}
    process = subprocess.Popen(
        [sys.executable, "-c", STARTER, str(tmp_path)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for(tmp_path / "pid_0", tmp_path / "pid_1")
    time.sleep(0.2)
    os.kill(process.pid, number)
    _, said = process.communicate(timeout=120)
    expected = -signal.SIGKILL if number == signal.SIGKILL else 128 + number
    assert process.returncode == expected
    assert "Traceback" not in said
    if number == signal.SIGINT:
        assert said.strip() == "Stopped. To go on: AGAIN"
    end = time.monotonic() + 5
    while alive(tmp_path):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_ranks_that_do_not_fit_are_refused(start, capfd):
    with pytest.raises(ConfigError, match="parallel.tensor: a replica of the model takes 2 ranks"):
        start(capfd, "report", ranks=3)
    with pytest.raises(ConfigError, match="train.rows: 8 is no multiple"):
        start(capfd, "report", ["train.micro_rows=8"], ranks=4)
    with pytest.raises(ConfigError, match="parallel.optimizer_copies: 2 copies .* 1 replicas that 2 ranks"):
        start(capfd, "report", ["parallel.optimizer_copies=2"], ranks=2)


def test_a_folder_with_a_run_is_not_overwritten(start, tmp_path, capfd):
    whole = tmp_path / "checkpoints" / "step_0000007"
    whole.mkdir(parents=True)
    (whole / "complete.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds a run at step_0000007; add --resume"):
        start(capfd, "report")
    code, said, _ = start(capfd, "raise", resume=True)
    assert code == 1 and "continues after step_0000007" in said.err


def test_under_torchrun_this_process_is_the_rank(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    calls = []
    monkeypatch.setattr(launch.worker, "run", lambda *given: calls.append(given) or 0)
    config = load_config("quickstart")
    assert launch.launch(config, tmp_path, stop_after=3) == 0
    assert calls == [(config, tmp_path, False, 3)]


def test_the_last_line_of_a_log_is_of_this_run_and_no_warning(tmp_path):
    log = faults.log_path(tmp_path, 0)
    log.write_text("old\n")
    start = log.stat().st_size
    assert faults.failures(tmp_path, {0: -9}, {0: start})[0].error == "nothing"
    with log.open("a") as file:
        file.write("useful\n/lib/a.py:3: UserWarning: some\n  warnings.warn(\n\n")
    assert faults.failures(tmp_path, {0: -9}, {0: start})[0].error == "useful"


def test_signals_are_named():
    assert "SIGSEGV" in faults.Failure(0, -signal.SIGSEGV, "").reason
    assert "out of memory" in faults.Failure(0, -signal.SIGKILL, "").reason
