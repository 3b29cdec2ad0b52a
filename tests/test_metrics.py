"""The log, TensorBoard and the lines of a run; and the seeds of what is random in it."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from rich.console import Console

from mmi_megatron.config import Config
from mmi_megatron.train import metrics
from mmi_megatron.train.metrics import FIELDS, Meter
from mmi_megatron.train.rng import keyed_seed


def record(loss: float = 2.0, **changes) -> dict[str, float]:
    """A step's record."""
    values = dict.fromkeys(FIELDS, 1.0) | {"next_token_loss": loss, "skipped": 0.0, "quarantined": 0}
    return values | changes


def meter(out, terminal: bool = False, writes: bool = True, log_every: int = 1) -> Meter:
    """A meter of a run of 10 steps that prints into memory."""
    config = Config()
    config.train.steps, config.train.log_every = 10, log_every
    return Meter(out, config, writes, Console(file=io.StringIO(), force_terminal=terminal, width=200))


def printed(run: Meter) -> str:
    """What the meter has shown."""
    assert isinstance(run.console.file, io.StringIO)
    return run.console.file.getvalue()


def scalars(out, name: str) -> dict[int, float]:
    """What TensorBoard would show."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(name)}


def test_steps_and_validations_are_logged_where_they_belong(tmp_path):
    run = meter(tmp_path)
    run.step(1, record(3.5))
    run.validation(1, {"story/next_token_loss": 4.0})
    run.step(2, record(2.5))
    run.close()
    first, held_out, second = metrics.read(tmp_path)
    assert first == {"kind": "train", "step": 1, **record(3.5)}
    assert held_out == {"kind": "validation", "step": 1, "story/next_token_loss": 4.0}
    assert second["step"] == 2 and second["next_token_loss"] == 2.5
    assert scalars(tmp_path, "train/next_token_loss") == {1: 3.5, 2: 2.5}
    assert scalars(tmp_path, "validation/story/next_token_loss") == {1: 4.0}
    said = printed(run)
    assert "step 1/10  text 3.5" in said and "held out: story/next token loss 4" in said


def test_a_resumed_run_doubles_nothing(tmp_path):
    first = meter(tmp_path)
    for step in range(1, 6):
        first.step(step, record(step))
    first.validation(4, {"story/next_token_loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as log:
        log.write('{"kind": "train", "step": 6, "next_tok')  # killed while it wrote
    second = meter(tmp_path)
    second.resume(3)
    for step in range(4, 7):
        second.step(step, record(10 * step))
    second.close()
    records = metrics.read(tmp_path)
    assert [entry["step"] for entry in records] == [1, 2, 3, 4, 5, 6]
    assert [entry["next_token_loss"] for entry in records] == [1, 2, 3, 40, 50, 60]
    assert scalars(tmp_path, "train/next_token_loss") == {1: 1, 2: 2, 3: 3, 4: 40, 5: 50, 6: 60}


def test_a_run_from_the_start_begins_a_new_log(tmp_path):
    for loss in (1.0, 2.0):
        run = meter(tmp_path)
        run.step(1, record(loss))
        run.close()
    assert [entry["next_token_loss"] for entry in metrics.read(tmp_path)] == [2.0]


def test_what_is_not_finite_or_not_measured_is_null(tmp_path):
    run = meter(tmp_path)
    run.step(1, record(float("nan"), grad_norm=float("inf"), skipped=1.0, images=0))
    run.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    entry = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert entry["next_token_loss"] is entry["grad_norm"] is entry["next_image_loss"] is None
    assert "SKIPPED" in printed(run)


def test_keys_are_checked(tmp_path):
    with pytest.raises(ValueError, match="'next_token_los' is no value.*'next_token_loss'"):
        meter(tmp_path).step(1, record() | {"next_token_los": 1.0})
    wrong = record()
    del wrong["lr"]
    with pytest.raises(ValueError, match=r"lacks \['lr'\]"):
        meter(tmp_path).step(1, wrong)


def test_a_damaged_log_is_an_error_that_names_the_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(ValueError, match="metrics.jsonl, line 2"):
        metrics.read(tmp_path)


def test_plain_lines_average_what_lies_between(tmp_path):
    run = meter(tmp_path, log_every=2)
    for step in range(1, 5):
        run.step(step, record(float(step), quarantined=step // 4))
    run.close()
    lines = printed(run).splitlines()
    assert len(lines) == 2 and "step 2/10  text 1.5 " in lines[0] and "step 4/10  text 3.5 " in lines[1]
    assert "left 0:00:06" in lines[1] and "quarantined" in lines[1] and "quarantined" not in lines[0]


def test_a_terminal_shows_a_bar(tmp_path):
    run = meter(tmp_path, terminal=True)
    run.step(1, record())
    run.step(2, record(1.25))
    run.close()
    said = printed(run)
    assert "2/10" in said and "text 1.25" in said


def test_other_ranks_are_silent(tmp_path):
    run = meter(tmp_path, writes=False)
    run.resume(3)
    run.step(4, {})
    run.validation(4, {})
    run.close()
    assert printed(run) == "" and not list(tmp_path.iterdir())


def test_seeds_are_the_same_on_every_machine():
    # coreutils' b2sum -l 64 over the key's bytes: b'\x06' + 7 * b'\0' + b'snoise' + b'\x02' + ...
    assert keyed_seed(0, 0, purpose="noise").to_bytes(8, "little").hex() == "867d8e4b08b865a4"
    known = keyed_seed(7, 3, "story-12", 2, purpose="dropout")
    assert known.to_bytes(8, "little").hex() == "4df4fb70fcc67047"


def test_seeds_differ_with_every_part_of_the_key():
    keys = [
        keyed_seed(seed, step, sample, image, purpose=purpose)
        for seed in (0, 1, -1)
        for step in (0, 1, 2**40)
        for sample in (1, "1", "11", 11)
        for image in (0, 1, 10)
        for purpose in ("noise", "drop")
    ]
    keys += [keyed_seed(0, 1, 11, purpose="noise"), keyed_seed(0, 11, 1, purpose="noise")]
    assert len(set(keys)) == len(keys) and all(0 <= key < 2**64 for key in keys)


def test_seeds_are_well_mixed():
    bits = np.array(
        [[keyed_seed(0, step, purpose="noise") >> b & 1 for b in range(64)] for step in range(4096)]
    )
    assert np.abs(bits.mean(0) - 0.5).max() < 0.05
    correlation = np.corrcoef(bits.T) - np.eye(64)
    assert np.abs(correlation).max() < 0.1
