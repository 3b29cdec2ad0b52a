"""Micro-batches through the pipeline: Megatron's schedules over the stages of this rank.

Without a pipeline it is gradient accumulation; with one, 1F1B, in which the first stage's visual tokenizer
may run ahead (``parallel.ahead``); with several stages a rank, interleaved.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from mmi_megatron.config import LossConfig
from mmi_megatron.model.mm_interleaved import Inputs, Losses
from mmi_megatron.parallel import ahead
from mmi_megatron.parallel.model import Finish


def train_step(
    stages: Sequence[nn.Module],
    inputs: Sequence[Inputs],
    weights: LossConfig,
    counts: tuple[int, int],
    seed: int,
    step: int,
) -> Tensor:
    """Forward and backward of a step's micro-batches (collective).

    Args:
        stages: this rank's, wrapped for data parallelism; gradients are added to their buffers.
        inputs: this replica's micro-batches.
        weights: of the two losses.
        counts: kept tokens and drawn images of the whole step, which the losses are divided by.
        seed, step: key the noise.

    Returns:
        float64 [2], sums of next-token and next-image losses on the last stage, zero elsewhere.
    """
    tokens, images = max(counts[0], 1), max(counts[1], 1)

    def forward(feed: Iterator[Inputs], model: nn.Module):
        def reduce(losses: Losses):
            sums = losses.tokens.sum(), losses.images.sum()
            loss = weights.next_token * sums[0] / tokens + weights.next_image * sums[1] / images
            # Zero tokens: the losses are divided already, and Megatron must not divide again.
            none = torch.zeros((), dtype=torch.int, device=loss.device)
            # A loss that is not finite makes all gradients so: every rank skips the step.
            loss = (loss + losses.zero) * torch.where(loss.isfinite(), 1.0, torch.nan)
            return loss, none, torch.stack(sums).detach()

        return model(next(feed), seed, step), reduce

    return _sums(_run(stages, inputs, forward, forward_only=False), inputs)


@torch.no_grad()
def evaluate(stages: Sequence[nn.Module], inputs: Sequence[Inputs], seed: int, step: int) -> Tensor:
    """Losses of micro-batches, without gradients (collective). Returns as ``train_step`` does."""

    def forward(feed: Iterator[Inputs], model: nn.Module):
        def collect(losses: Losses, non_loss_data: bool):
            return torch.stack([losses.tokens.sum(), losses.images.sum()])

        return model(next(feed), seed, step), collect

    return _sums(_run(stages, inputs, forward, forward_only=True), inputs)


@torch.no_grad()
def read(stages: Sequence[nn.Module], inputs: Inputs, finish: Finish) -> Any:
    """What ``finish`` makes of a micro-batch on the last stage; None elsewhere (collective)."""

    def forward(feed: Iterator[Inputs], model: nn.Module):
        return model(next(feed), finish=finish), lambda made, non_loss_data: made

    made = _run(stages, [inputs], forward, forward_only=True)
    return made[0] if made else None


def _run(stages: Sequence[nn.Module], inputs: Sequence[Inputs], forward, forward_only: bool) -> list:
    """Results of the micro-batches on the last stage, an empty list elsewhere."""
    if not inputs:
        return []
    given = len(inputs)
    size = parallel_state.get_pipeline_model_parallel_world_size()
    if forward_only and len(stages) > 1:  # interleaving takes micro-batches in turns of `size`
        inputs = [*inputs, *[inputs[-1]] * (-given % size)]
    feeds = [_Feed(inputs) for _ in stages]
    options = {} if forward_only else _run_ahead(stages[0], feeds[0])
    results = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=feeds if len(stages) > 1 else feeds[0],
        model=list(stages),
        num_microbatches=len(inputs),
        seq_length=len(inputs[0].tokens),
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
        **options,
    )
    return results[:given]


class _Feed(Iterator[Inputs]):
    """Micro-batches in turn; ``following`` is the one that comes next, None after the last."""

    def __init__(self, inputs: Sequence[Inputs]):
        self.inputs, self.taken = inputs, 0

    def __next__(self) -> Inputs:
        if self.following is None:
            raise StopIteration
        self.taken += 1
        return self.inputs[self.taken - 1]

    @property
    def following(self) -> Inputs | None:
        return self.inputs[self.taken] if self.taken < len(self.inputs) else None


def _run_ahead(stage: Any, feed: _Feed) -> dict[str, Any]:
    """What lets a first stage's visual tokenizer run ahead, as options of Megatron's schedule."""
    model = stage.module
    if not (model.vision_ahead and model.stage.first):
        return {}

    def meanwhile() -> None:
        if feed.following is not None:
            model.run_ahead(feed.following)

    communicator = ahead.AheadCommunicator(model.config, meanwhile)
    return {"p2p_communicator": communicator, "pg_collection": ahead.groups()}


def _sums(results: list[Tensor], inputs: Sequence[Inputs]) -> Tensor:
    if not results:
        where = inputs[0].tokens.device if inputs else None
        return torch.zeros(2, dtype=torch.float64, device=where)
    return torch.stack(results).double().sum(0)


def on_last_stage() -> bool:
    """Whether this rank holds the last stage."""
    return parallel_state.is_pipeline_last_stage(ignore_virtual=True)
