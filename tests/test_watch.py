"""What a run says of its faults: each is brought about, and the right rank, step and part are named."""

from __future__ import annotations

import gzip
import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mmi_megatron.train import anatomy
from mmi_megatron.train.anatomy import COMMUNICATION, DATA, DECODER, LANGUAGE, TOKENIZER, Anatomy
from tests.samples import random_batch


def watch_of(run, out: Path, **settings):
    """A watch over a tiny run on this rank, and what its meter was told."""
    from mmi_megatron.train.watch import Watch

    events = []

    class Told:
        def event(self, kind, step, values):
            events.append((kind, step, values))

    for key, value in settings.items():
        setattr(run.config.train.watch, key, value)
    return Watch(run.config, run.layout, out, Told()), events


# Gradients that are not finite


def nan_gradient(out: Path, again: bool) -> list:
    """On a rank: three steps, of which rank 1 spoils the second's gradient of the image decoder."""
    from mmi_megatron.train.optimizer import finish
    from tests.tiny import Run, tiny_config

    with Run(tiny_config(1)) as run:
        watch, _ = watch_of(run, out, skip_limit=1)
        spoils, weight = [False], run.model.module.image_decoder.weight
        weight.register_hook(lambda grad: grad * (math.nan if spoils[0] else 1.0))
        told = []
        run.scheduler.step(increment=1)  # the first step of a warm-up moves nothing
        for step in range(4):
            with watch.watching(step):
                watch.batches = [random_batch(step)]
                spoils[0] = run.layout.rank == 1 and step in (1, 2)
                before = run.parameters()
                run.backward()
                norm, skipped = finish(run.model, run.optimizer)
                spoils[0] = spoils[0] and again
                try:
                    watch.made(skipped, norm, run.model, run.backward)
                except RuntimeError as error:
                    told.append(str(error))
                    break
                same = all(torch.equal(before[name], value) for name, value in run.parameters().items())
                told.append((skipped, same, watch.skipped, watch.skipped_in_a_row))
        return told


def test_a_gradient_that_is_not_finite_is_skipped_by_all_and_its_rank_and_part_are_named(ranks, tmp_path):
    first, second = ranks.run(2, nan_gradient, tmp_path, True)
    assert first[:-1] == second[:-1] == [(False, False, 0, 0), (True, True, 1, 1)]
    for end in (first[-1], second[-1]):
        assert "step 2 skipped" in end and "rank 1: image decoder (1 parameters: image_decoder.weight)" in end
        assert "rank 0" not in end and "2 steps in a row" in end and "skip_limit=1" in end
    reports = sorted((tmp_path / "reports").iterdir())
    assert [path.name for path in reports] == [
        f"skipped_step_000000{step}_rank_{rank}.json" for step in (1, 2) for rank in (0, 1)
    ]
    report = json.loads(reports[1].read_text())
    assert report["parameters"] == ["image_decoder.weight"] and report["step"] == 1 and report["rank"] == 1
    batch = random_batch(1)
    assert report["batches"][0]["images"] == batch.image_ids.tolist()
    assert report["batches"][0]["samples"] == batch.sample_ids[batch.source >= 0].tolist()
    assert json.loads(reports[0].read_text())["parameters"] == []


def test_a_gradient_that_is_finite_when_computed_again_is_said_to_be_so(ranks, tmp_path):
    end = ranks.run(2, nan_gradient, tmp_path, False)[0][-1]
    assert "computed again it is finite on every rank" in end


# Memory


def ask_a_gpu() -> None:
    raise torch.OutOfMemoryError("tried to allocate 20.00 GiB\nand so on")


def ask_the_machine() -> None:
    torch.empty(1 << 55)  # torch's allocator for CPUs refuses it, with a RuntimeError


def out_of_memory(out: Path, ask) -> list[str]:
    """On a rank: memory runs out on rank 1 in the backward pass of the image decoder, at step 3."""
    from tests.tiny import Run, tiny_config

    class Parts(nn.Module):
        def __init__(self, run):
            super().__init__()
            self.visual_tokenizer, self.image_decoder = nn.Linear(3, 3), Decoder()

    class Decoder(nn.Linear):
        def __init__(self):
            super().__init__(3, 3)

        def loss(self, x):
            made = self(x)
            made.register_hook(self.burst)
            return made.sum()

        def burst(self, _):
            if self.bursts:
                ask()

    with Run(tiny_config(1)) as run:
        watch, _ = watch_of(run, out)
        model = Parts(run)
        watch.anatomy.attach(model)
        for step in range(5):
            model.image_decoder.bursts = run.layout.rank == 1 and step == 3
            try:
                with watch.watching(step):
                    watch.batches = [random_batch(step)]
                    model.image_decoder.loss(model.visual_tokenizer(torch.ones(2, 3))).backward()
            except RuntimeError as error:
                return [str(error), type(error.__cause__).__name__]
        return ["fine"]


@pytest.mark.parametrize(
    ("ask", "kind", "reason"),
    [
        (ask_a_gpu, "OutOfMemoryError", "tried to allocate 20.00 GiB"),
        (ask_the_machine, "RuntimeError", "DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_memory_that_runs_out_is_reported_with_rank_step_and_part(ranks, tmp_path, ask, kind, reason):
    fine, (said, cause) = ranks.run(2, out_of_memory, tmp_path, ask)
    assert fine == ["fine"] and cause == kind
    assert "out of memory at step 3 in image decoder backward on rank 1: " in said and reason in said
    assert "train.micro_rows" in said and "and so on" not in said
    report = json.loads((tmp_path / "reports" / "out_of_memory_step_0000003_rank_1.json").read_text())
    assert report["part"] == "image decoder backward" and report["memory"]["process_resident"] > 1e6
    assert report["batches"][0]["images"] == random_batch(3).image_ids.tolist()


# Slow ranks and the parts of a step


def slow_rank(out: Path) -> tuple:
    """On a rank: four measured steps; rank 1's forward pass of the language model takes three times as
    long."""
    import logging

    import torch.distributed as dist

    from tests.tiny import Run, tiny_config

    class Parts(nn.Module):
        def __init__(self, seconds):
            super().__init__()
            self.visual_tokenizer, self.language_model = nn.Linear(3, 3), Slow(seconds)

    class Slow(nn.Linear):
        def __init__(self, seconds):
            super().__init__(3, 3)
            self.seconds = seconds

        def forward(self, x):
            time.sleep(self.seconds)
            return super().forward(x)

    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("mmi_megatron.train.watch").addHandler(handler)
    with Run(tiny_config(1)) as run:
        watch, events = watch_of(run, out, measure_every=2, straggler=1.5)
        model = Parts(1.5 if run.layout.rank == 1 else 0.5)
        watch.anatomy.attach(model)
        for step in range(2):
            with watch.watching(step):
                with watch.part(DATA):
                    time.sleep(0.1)
                model.language_model(model.visual_tokenizer(torch.ones(2, 3))).sum().backward()
                dist.all_reduce(torch.ones(3))
        return said, events, watch.anatomy.seconds


def test_a_rank_slowed_threefold_is_named_with_its_step_and_part(ranks, tmp_path):
    (said, events, fast), (_, _, slow) = ranks.run(2, slow_rank, tmp_path)
    (line,) = said
    assert "step 1: rank 1 is slow" in line and "most of it in language model forward" in line
    ((kind, step, values),) = events
    assert (kind, step) == ("anatomy", 2)
    assert values[f"{LANGUAGE} forward/slowest_rank"] == 1
    assert 1.5 <= values[f"{LANGUAGE} forward/most"] < 2.5 and values[f"{DATA}/mean"] >= 0.1
    # The fast rank waits in communication; that is not counted as its own time.
    assert fast[COMMUNICATION] > 0.7 and slow[COMMUNICATION] < 0.7
    assert {f"{TOKENIZER} forward", f"{LANGUAGE} forward", DATA, COMMUNICATION} <= fast.keys()
    text = (tmp_path / "reports" / "anatomy_step_0000001.txt").read_text()
    assert "language model forward" in text and "memory MiB" in text


def test_no_rank_is_slow_where_all_are_alike():
    parts = [{"a": 1.0, COMMUNICATION: 0.1 * rank} for rank in range(4)]
    assert anatomy.straggler(parts, 1.5) is None
    assert anatomy.straggler([*parts, {"a": 3.0}], 0) is None
    assert "rank 4 is slow" in anatomy.straggler([*parts, {"a": 3.0}], 1.5)


def test_parts_of_forward_and_backward_are_told_apart():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.visual_tokenizer, self.image_decoder = nn.Linear(3, 3), Decoder(3, 3)

    class Decoder(nn.Linear):
        def loss(self, x):
            return self(x).sum()

    seen, model = [], Model()
    parts = Anatomy()
    parts.attach(model)
    enter = parts.enter

    def noted(part):
        seen.append(part)
        enter(part)

    parts.enter = noted
    hidden = model.visual_tokenizer(torch.ones(2, 3))
    model.image_decoder.loss(hidden).backward()
    order = [part for index, part in enumerate(seen) if index == 0 or seen[index - 1] != part]
    assert order[:4] == [f"{TOKENIZER} forward", "other", f"{DECODER} forward", "other"]
    assert order.index(f"{DECODER} backward") < order.index(f"{TOKENIZER} backward")


# Losses


def spikes(out: Path) -> list:
    """On a rank: forty steps, the loss of the thirtieth far above the others."""
    from tests.tiny import Run, tiny_config

    random = np.random.default_rng(0)
    with Run(tiny_config(1)) as run:
        watch, _ = watch_of(run, out)
        for step in range(40):
            with watch.watching(step):
                watch.batches = [random_batch(step)]
            loss = 3.0 + 0.1 * random.standard_normal() + 6.0 * (step == 30)
            watch.losses({"next_token_loss": loss, "next_image_loss": math.nan if step == 3 else 0.5})
        return sorted(path.name for path in (out / "reports").iterdir())


def test_a_loss_spike_is_reported_with_its_samples(ranks, tmp_path):
    assert ranks.run(1, spikes, tmp_path)[0] == ["spike_step_0000030_rank_0.json"]
    report = json.loads((tmp_path / "reports" / "spike_step_0000030_rank_0.json").read_text())
    assert report["loss"] == "next_token_loss" and report["value"] > 8 and 2.8 < report["median"] < 3.2
    assert report["batches"][0]["images"] == random_batch(30).image_ids.tolist()


# Traces


def traced(out: Path, begin: int) -> list[str]:
    """On a rank: the steps up to 5, of which 2 and 3 are to be recorded."""
    from tests.tiny import Run, tiny_config

    with Run(tiny_config(1)) as run:
        watch, _ = watch_of(run, out, trace_from=2, trace_steps=2)
        with watch.running():
            for step in range(begin, 6):
                with watch.watching(step):
                    torch.ones(3, 3) @ torch.full((3, 3), float(step))
        return sorted(path.name for path in watch.traces.iterdir())


@pytest.mark.parametrize(("begin", "steps"), [(0, "2_to_3"), (3, "3_to_3")])
def test_the_steps_asked_for_are_traced(ranks, tmp_path, begin, steps):
    names = ranks.run(1, traced, tmp_path, begin)[0]
    assert names == [f"steps_{steps}_rank_0.json.gz"]
    events = json.loads(gzip.decompress((tmp_path / "traces" / names[0]).read_bytes()))["traceEvents"]
    assert [event["name"] for event in events].count("aten::mm") == 1 + int(steps[-1]) - int(steps[0])
