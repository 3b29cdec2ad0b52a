"""The training loop: one step after the other, the same on a laptop and on a cluster."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from data_pipeline.batch import IGNORED, Batch
from data_pipeline.state import step_checksum
from data_pipeline.tokens import load_tokenizer
from mmi_megatron.config import Config
from mmi_megatron.convert.start import load_start
from mmi_megatron.model.image_decoder import ImageDecoder
from mmi_megatron.model.mm_interleaved import Inputs
from mmi_megatron.parallel import groups, schedule
from mmi_megatron.parallel.model import build_stages
from mmi_megatron.platform import device
from mmi_megatron.settings import save_config
from mmi_megatron.train import checkpoint
from mmi_megatron.train.anatomy import DATA, OPTIMIZER
from mmi_megatron.train.checkpoint import Checkpoints, Saved
from mmi_megatron.train.delivery import Delivered, Delivery
from mmi_megatron.train.metrics import Meter
from mmi_megatron.train.optimizer import (
    build_optimizer,
    finish,
    gather_parameters,
    wrap_stages,
)
from mmi_megatron.train.pictures import save_strip
from mmi_megatron.train.pulse import Pulse
from mmi_megatron.train.setup import SetUp
from mmi_megatron.train.signals import Stopped, StopSignals
from mmi_megatron.train.watch import Watch

VALIDATION_SEED = 20_231_018
"""Seed of the noise of validation: the same at every step, so that losses can be compared."""


@dataclass
class Counts:
    """What a step's losses are divided by, summed over all ranks and micro-batches."""

    tokens: int
    images: int


class Trainer:
    """One run on this rank. Process groups must be up.

    Args:
        config: the run.
        layout: this rank's place.
        out: folder of the run: ``config.yaml``, ``metrics.jsonl``, ``checkpoints/``, ``samples/``.
        setup: told of every phase.
        fresh: whether the weights start from ``train.init_from``; false for a run about to be resumed.
    """

    def __init__(self, config: Config, layout: groups.Layout, out: Path, setup: SetUp, fresh: bool = True):
        self.config, self.layout, self.out = config, layout, out
        setup.phase("opening the corpus")
        self.tokenizer = load_tokenizer(config.data.tokenizer)
        check_tokenizer(config, self.tokenizer.size)
        self.data = Delivery(config, layout.dp_rank, layout.dp_size, out)
        setup.phase("building the model")
        stages = build_stages(config, self.tokenizer.special)
        if fresh and config.train.init_from:
            setup.phase("reading weights")
            load_start(stages, config, out, waiting=setup.pulse.beat)
        setup.phase("building the optimizer")
        self.stages = wrap_stages(stages, config)
        self.optimizer, self.scheduler = build_optimizer(self.stages, config)
        self.step = 0
        self.meter = Meter(out, config, writes=layout.rank == 0)
        self.watch = Watch(config, layout, out, self.meter, setup.pulse)
        for stage in self.stages:
            self.watch.anatomy.attach(stage.module)
        folder = config.train.checkpoints or out / "checkpoints"
        self.checkpoints = Checkpoints(
            folder, out / "stage", config.train.keep, config.train.keep_every, waiting=self.watch.pulse.beat
        )

    @property
    def decoder(self) -> ImageDecoder | None:
        """The image decoder, where this rank holds it."""
        return self.stages[-1].module.image_decoder

    def resume(self) -> None:
        """Continue from the newest complete checkpoint, if there is one."""
        newest = checkpoint.latest(self.checkpoints.folder)
        if newest is None:
            return
        extra = checkpoint.load(
            self.stages, self.optimizer, self.scheduler, newest, waiting=self.watch.pulse.beat
        )
        self.step = extra["step"]
        self.watch.load_state(extra["watch"])
        self.data.load_state(extra["data"])
        self.meter.resume(self.step)

    def run(self, stop_after: int | None = None) -> None:
        """Train up to ``train.steps``, or to ``stop_after`` steps if that comes first.

        Raises:
            Stopped: when a signal asked for it; the step that it came in is saved.
        """
        last = min(self.config.train.steps, stop_after or self.config.train.steps)
        with self.watch.running(), StopSignals() as signals:
            self._steps(last, signals)
            self._saved(self.checkpoints.wait())
        self.meter.close()

    def _steps(self, last: int, signals: StopSignals) -> None:
        train = self.config.train
        while self.step < last:
            with self.watch.watching(self.step):
                record = self.train_step()
            self.step += 1
            self.meter.step(self.step, record)
            self.watch.losses(record)
            self._saved(self.checkpoints.poll())
            if self._due(train.validate_every, last):
                self.meter.validation(self.step, self.validate())
            if self._due(train.sample_every, last):
                self.sample()
            asked = signals.agreed()
            if self._due(train.save_every, last) or asked:
                self.save()
            if asked:
                self._saved(self.checkpoints.wait())
                self.meter.close()
                raise Stopped(f"{asked}: saved and stopped after step {self.step}")

    def _due(self, every: int, last: int) -> bool:
        return every > 0 and (self.step % every == 0 or self.step == last)

    def train_step(self) -> dict[str, float]:
        """One optimizer step; the record of it for the log."""
        started = time.perf_counter()
        with self.watch.part(DATA):
            delivered = self.data.next()
            inputs = self._prepare(delivered)
        counts = self._count(self.watch.reading(delivered.batches, inputs))
        checksum, quarantined = self._audit(delivered)
        waited = time.perf_counter() - started

        for stage in self.stages:
            stage.train()
            stage.zero_grad_buffer()
        self.optimizer.zero_grad()
        sums = self._pass(inputs, counts)
        self.data.ahead()
        with self.watch.part(OPTIMIZER):
            norm, skipped = finish(self.stages, self.optimizer)
            if not skipped:
                self.scheduler.step(increment=1)
                self._update_average()
        self.watch.made(skipped, norm, self.stages, lambda: self._pass(inputs, counts))
        losses = self._sum_losses(sums)
        seconds = time.perf_counter() - started
        return {
            "next_token_loss": losses[0] / max(counts.tokens, 1),
            "next_image_loss": losses[1] / max(counts.images, 1),
            "grad_norm": norm,
            "lr": self.optimizer.param_groups[0]["lr"],
            "skipped": float(skipped),
            "tokens": counts.tokens,
            "images": counts.images,
            "images_out_of_reach": sum(item.out_of_reach for item in inputs),
            "quarantined": quarantined,
            "data_checksum": checksum,
            "seconds": seconds,
            "data_wait": waited / seconds,
            "tokens_per_second": self.config.train.rows * self.config.data.context_length / seconds,
            "images_per_second": counts.images / seconds,
            **self.watch.rates(seconds),
        }

    def _pass(self, inputs: list[Inputs], counts: Counts) -> Tensor:
        """Forward and backward of the micro-batches; gradients are added up. Sums of the two losses."""
        return schedule.train_step(
            self.stages,
            inputs,
            self.config.model.loss,
            (counts.tokens, counts.images),
            self.config.train.seed,
            self.step,
        )

    def _prepare(self, delivered: Delivered) -> list[Inputs]:
        return delivered.inputs(self.tokenizer.special, self.config.model)

    def _count(self, batches: Sequence[Batch]) -> Counts:
        """Kept tokens and drawn images of the step, from the rows that were really produced."""
        tokens = sum(int((batch.labels != IGNORED).sum()) for batch in batches)
        images = sum(len(batch.drawn) for batch in batches)
        summed = self._sum([torch.tensor(float(tokens)), torch.tensor(float(images))])
        return Counts(int(summed[0]), int(summed[1]))

    def _audit(self, delivered: Delivered) -> tuple[int, int]:
        """Checksum of all samples of the step, the same at any layout: for an audit of what was trained on.
        And the bad samples so far, of all replicas together."""
        values = torch.zeros(delivered.note["step_rows"] + 1, dtype=torch.float64)
        values[delivered.note["rows"]] = torch.tensor(delivered.note["checksums"], dtype=torch.float64)
        values[-1] = delivered.note["quarantined"]
        *rows, quarantined = self._sum(list(values))
        return step_checksum([int(value) for value in rows]), int(quarantined)

    def _sum(self, values: list[Tensor]) -> list[float]:
        """Sums over the data-parallel ranks, in float64 so that counts stay exact."""
        together = torch.stack(values).to(device=device(), dtype=torch.float64)
        dist.all_reduce(together, group=parallel_state.get_data_parallel_group())
        return together.tolist()

    def _sum_losses(self, sums: Tensor) -> list[float]:
        """Sums over the whole run of what the last stages hold, known to every rank."""
        if not self.layout.speaks:  # they hold the same
            sums = torch.zeros_like(sums)
        together = sums.to(device=device(), dtype=torch.float64)
        dist.all_reduce(together)
        return together.tolist()

    def _update_average(self) -> None:
        if self.decoder is not None and self.decoder.average is not None:
            gather_parameters(self.stages)
            self.decoder.update_average()

    def _evaluating(self) -> None:
        gather_parameters(self.stages)
        for stage in self.stages:
            stage.eval()

    def validate(self) -> dict[str, float]:
        """Held-out losses of every source, with the same noise each time."""
        self._evaluating()
        results = {}
        for source in self.config.data.sources:
            delivered = self.data.validation(source.name)
            counts, inputs = self._count(delivered.batches), self._prepare(delivered)
            tokens, images = self._sum_losses(schedule.evaluate(self.stages, inputs, VALIDATION_SEED, 0))
            results[f"{source.name}/next_token_loss"] = tokens / max(counts.tokens, 1)
            results[f"{source.name}/next_image_loss"] = images / max(counts.images, 1)
        return results

    def sample(self) -> None:
        """Draw the images of a few held-out documents beside the true ones, as a PNG (collective)."""
        train, model = self.config.train, self.stages[-1].module
        if not self.config.model.loss.next_image or train.sample_documents == 0:
            return
        self._evaluating()
        delivered = self.data.heldout(train.sample_documents, self.tokenizer.special.pad)
        ((_, true),) = delivered.pixels
        seeds = list(range(len(true)))
        draw = partial(model.draw_from, steps=train.sample_steps, guidance=train.guidance, seeds=seeds)
        with nullcontext() if self.decoder is None else self.decoder.averaged():
            drawn = schedule.read(self.stages, self._prepare(delivered)[0], draw)
        first = self.layout.speaks and self.layout.dp_rank == 0
        if drawn is not None and first and len(true):
            path = self.out / "samples" / f"step_{self.step:07d}.png"
            save_strip(path, true.cpu().numpy(), drawn.permute(0, 2, 3, 1).cpu().numpy())

    def save(self) -> None:
        """Begin to write a checkpoint of this step, unless there is one."""
        if self.checkpoints.last == self.step:
            return
        gather_parameters(self.stages)
        extra = {"step": self.step, "data": self.data.state(), "watch": self.watch.state()}
        self._saved(self.checkpoints.save(self.stages, self.optimizer, self.scheduler, extra, step=self.step))

    def _saved(self, saved: Saved | None) -> None:
        if saved is not None:
            values = {"stall": saved.stall, "seconds": saved.seconds}
            self.meter.event("checkpoint", saved.step, values)


def check_tokenizer(config: Config, size: int) -> None:
    """Refuse a tokenizer that is not the model's.

    Raises:
        ValueError: naming both sizes.
    """
    vocabulary = config.model.language.vocabulary
    if size != vocabulary:
        raise ValueError(
            f"data.tokenizer: {config.data.tokenizer} has {size} tokens with the image tokens, but "
            f"model.language.vocabulary is {vocabulary}; set it, or name the tokenizer of this model"
        )


def train(
    config: Config,
    out: Path,
    resume: bool = False,
    stop_after: int | None = None,
    setup: SetUp | None = None,
) -> None:
    """Run a training job on this rank, from set-up to the last step.

    Args:
        config: the run.
        out: its folder.
        resume: continue from the run's newest complete checkpoint.
        stop_after: stop, with a checkpoint, after this many steps of the whole run.
        setup: takes this rank to its first step, watched; by default nobody watches.
    """
    if setup is None:
        setup = SetUp(Pulse(out / "logs", int(os.environ.get("RANK", "0"))), config.train.setup_timeout)
    setup.phase("joining the process groups")
    layout = groups.initialize(config)
    try:
        if layout.rank == 0:
            save_config(config, out / "config.yaml")
        resume = resume and checkpoint.latest(config.train.checkpoints or out / "checkpoints") is not None
        trainer = Trainer(config, layout, out, setup, fresh=not resume)
        with closing(trainer.data):
            if resume:
                setup.phase("loading the checkpoint")
                trainer.resume()
            setup.phase("beginning to train")
            trainer.run(stop_after)
    finally:
        groups.destroy()
