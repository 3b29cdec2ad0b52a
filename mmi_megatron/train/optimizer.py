"""Megatron's data parallelism and distributed AdamW, with the paper's parameter groups.

Losses come divided by the counts of the whole step, so gradients are summed over ranks and
micro-batches and scaled by nothing.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, ParamGroupOverride
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import nn

from mmi_megatron.config import Config
from mmi_megatron.errors import ConfigError
from mmi_megatron.platform import device, parameter_dtype

log = logging.getLogger(__name__)


def mark_image_parallel(module: nn.Module) -> None:
    """Mark a replicated module whose images are divided over tensor- and context-parallel ranks.

    Its gradients are then summed over all these and the data-parallel ranks, and its optimizer state
    is divided over them. It is called by ``wrap_stages`` at every layout: the optimizer's place in a
    checkpoint must not depend on it.
    """
    for parameter in module.parameters():
        # Megatron's way to say "expert": reduced by the expert groups, here TP x CP x DP.
        parameter.allreduce = False  # type: ignore[attr-defined]
        # Each rank's shard of the reduced gradient counts once in the norm.
        parameter.tensor_model_parallel = True  # type: ignore[attr-defined]


Model: TypeAlias = DistributedDataParallel | Sequence[DistributedDataParallel]
"""What one rank trains: a wrapped model, or its stages where a pipeline interleaves them."""


def chunks(model: Model) -> list[DistributedDataParallel]:
    """The wrapped stages of a rank, as a list."""
    return [model] if isinstance(model, DistributedDataParallel) else list(model)


def wrap(model: nn.Module, config: Config) -> DistributedDataParallel:
    """The model in Megatron's data parallelism, with gradients added up and reduced in fp32.

    Frozen parameters (``requires_grad`` false) get no gradient buffer.

    Raises:
        ValueError: when Megatron would divide the gradients once more.
        ConfigError: when all parameters are frozen, those of the other ranks too (collective).
    """
    return wrap_stages([model], config)[0]


def wrap_stages(stages: Sequence[nn.Module], config: Config) -> list[DistributedDataParallel]:
    """``wrap`` for the pipeline stages of a rank. Their ``image_parts`` are marked where they are divided."""
    trained = [any(parameter.requires_grad for parameter in stage.parameters()) for stage in stages]
    anything = torch.tensor(float(any(trained)), device=device())
    dist.all_reduce(anything, op=dist.ReduceOp.MAX)
    if not anything:
        raise ConfigError("nothing to train: every part of the model is frozen")
    wrapped: list[DistributedDataParallel] = []
    for stage in stages:
        model: Any = stage
        transformer = model.config
        if not transformer.calculate_per_token_loss:
            raise ValueError("the model's Megatron configuration needs calculate_per_token_loss=True")
        _mark_divided(stage)
        if config.parallel.shard_images:
            for part in model.image_parts():
                mark_image_parallel(part)
        settings = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            # The distributed optimizer also at one replica: its checkpoints and those of the plain one
            # do not interchange.
            use_distributed_optimizer=True,
            num_distributed_optimizer_instances=config.parallel.optimizer_copies,
            overlap_grad_reduce=config.parallel.overlap,
            overlap_param_gather=config.parallel.overlap,
            bucket_size=config.parallel.bucket or None,
        )
        wrapped.append(DistributedDataParallel(transformer, settings, stage, disable_bucketing=bool(wrapped)))
    if config.parallel.overlap:
        _overlap(wrapped)
    return wrapped


def _overlap(wrapped: list[DistributedDataParallel]) -> None:
    """Reduce gradients after the last micro-batch only, in one order, and wait for parameters where
    they are read without the call of a module that Megatron's hooks see."""
    transformer: Any = wrapped[0].config
    no_sync = [stage.no_sync for stage in wrapped]
    transformer.no_sync_func = no_sync if len(wrapped) > 1 else no_sync[0]
    for stage in wrapped:
        _InOrder(stage)
        stage.module.ready = partial(_wait_for, stage)


class _InOrder:
    """Starts the exchanges of a stage's gradients in the same order on every rank. Megatron starts each
    when its gradients are there, which in a micro-batch without images is another order than in one
    with them; ranks would exchange different parameters with each other."""

    def __init__(self, stage: DistributedDataParallel):
        position = {parameter: index for index, parameter in enumerate(stage.module.parameters())}
        groups = stage.bucket_groups + stage.expert_parallel_bucket_groups
        self.groups = sorted(groups, key=lambda group: -max(position[p] for p in group.params))
        self.starts = [group.start_grad_sync for group in self.groups]
        self.waiting: dict[int, dict] = {}
        self.next = 0
        for index, group in enumerate(self.groups):
            group.start_grad_sync = partial(self.start, index)

    def start(self, index: int, **options) -> None:
        """Take the place of a group's ``start_grad_sync``."""
        if self.groups[index].is_first_batch:  # nothing overlaps yet; they follow each other at the end
            self.starts[index](**options)
            return
        self.waiting[index] = options
        while self.next in self.waiting:
            self.starts[self.next](**self.waiting.pop(self.next))
            self.next = (self.next + 1) % len(self.groups)


def _wait_for(stage: DistributedDataParallel, part: nn.Module) -> None:
    groups = {stage.param_to_bucket_group.get(parameter): None for parameter in part.parameters()}
    for group in groups:
        if group is not None:
            group.finish_param_sync()


def gather_parameters(model: Model) -> None:
    """Wait for all parameters of the last step, before something other than a training step reads
    them (collective)."""
    for stage in chunks(model):
        if stage.ddp_config.overlap_param_gather:
            for group in stage.bucket_groups + stage.expert_parallel_bucket_groups:
                if not group.param_gather_dispatched:
                    group.start_param_sync(force_sync=True)
                elif group.param_gather_handle is not None:
                    group.finish_param_sync(skip_next_bucket_dispatch=True)


def _mark_divided(model: nn.Module) -> None:
    """Mark the weights that Megatron's layers divide over the tensor-parallel group. It does so only
    while it draws their start values, which we load instead; a weight without the mark counts in the
    gradient norm on the first rank alone."""
    for module in model.modules():
        for kind, dim in ((ColumnParallelLinear, 0), (RowParallelLinear, 1), (VocabParallelEmbedding, 0)):
            if isinstance(module, kind) and not hasattr(module.weight, "tensor_model_parallel"):
                set_tensor_model_parallel_attributes(module.weight, True, dim, 1)


def learning_rate(name: str, config: Config) -> float:
    """Peak learning rate of the parameter of this name.

    Sampling offsets, wherever they are, learn at ``offsets_lr``; the rest of the image decoder at
    ``decoder_lr``; everything else at ``lr`` (table 11 of the paper, and the release for offsets).
    """
    optimizer = config.optimizer
    if is_offset(name):
        return optimizer.offsets_lr
    return optimizer.decoder_lr if "image_decoder." in name else optimizer.lr


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay pulls at the parameter.

    Offsets and gates are without in the paper's runs. So are, after Megatron's habit, biases, norms
    and all else with one dimension: decay would pull scales towards 0 and not towards their 1.
    """
    return parameter.dim() > 1 and not name.endswith("bias") and not is_offset(name)


def is_offset(name: str) -> bool:
    """Whether the parameter of this name yields sampling offsets of deformable attention."""
    return any(part == "offsets" or part.startswith("offsets_") for part in name.split("."))


def _overrides(config: Config) -> dict[ParamKey, ParamGroupOverride]:
    """Megatron's overrides, one for each pair of learning rate and decay that occurs."""
    base, ratio = config.optimizer.lr, config.optimizer.min_lr_ratio
    rules = {(rate, decay) for rate in _rates(config) for decay in (True, False)} - {(base, True)}
    overrides: dict[ParamKey, ParamGroupOverride] = {}
    for rate, decay in sorted(rules):
        predicate = ParamWithNamePredicate(
            name=f"lr={rate} decay={decay}",
            fn=lambda parameter, name, rule=(rate, decay): (
                rule == (learning_rate(name, config), decays(name, parameter))
            ),
        )
        override: dict = {"wd_mult": float(decay)}
        if rate != base:
            override |= {"max_lr": rate, "min_lr": ratio * rate}
        overrides[ParamKey(with_name_predicate=predicate)] = override
    return overrides


def _rates(config: Config) -> set[float]:
    optimizer = config.optimizer
    return {optimizer.lr, optimizer.decoder_lr, optimizer.offsets_lr}


def build_optimizer(model: Model, config: Config) -> tuple[ChainedOptimizer, OptimizerParamScheduler]:
    """Megatron's distributed AdamW over the trainable parameters, and its schedule.

    States and main parameters are fp32 at either precision.

    Returns:
        The optimizer, its groups split by learning rate and decay; and the scheduler, to be stepped
        once per optimizer step. Warm-up is linear from 0 and every group keeps its ratio to ``lr``.

    Raises:
        ConfigError: for a warm-up that does not end before the run, or a final learning rate above the
            peak.
    """
    settings, steps = config.optimizer, config.train.steps
    if not 0 <= settings.min_lr_ratio <= 1:
        raise ConfigError(f"optimizer.min_lr_ratio: must be within 0 and 1, got {settings.min_lr_ratio}")
    if not 0 <= settings.warmup_steps < steps:
        raise ConfigError(
            f"optimizer.warmup_steps: {settings.warmup_steps} must be below train.steps, {steps}"
        )
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=settings.lr,
            min_lr=settings.lr * settings.min_lr_ratio,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.beta1,
            adam_beta2=settings.beta2,
            adam_eps=settings.eps,
            bf16=config.train.precision == "bf16",
            params_dtype=parameter_dtype(config.train.precision),
            use_distributed_optimizer=True,
            clip_grad=settings.clip,
            overlap_param_gather=config.parallel.overlap,
        ),
        chunks(model),
        config_overrides=_overrides(config),
    )
    for part in parts(optimizer):
        _count_padding(part)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.lr * settings.min_lr_ratio,
        lr_warmup_steps=settings.warmup_steps,
        lr_decay_steps=steps,
        lr_decay_style=settings.schedule,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
        # The run's configuration decides, not what a checkpoint was made with.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    return optimizer, scheduler


def _count_padding(part: Any) -> None:
    """Let Megatron find the state of a parameter behind the first bucket when it saves. It joins the
    buckets without the padding at their ends and then looks each parameter up where it lies with it:
    every checkpoint of more than one bucket would hold shifted moments, with a warning at most."""
    for buffer in part.buffers:
        for bucket in buffer.buckets:
            bucket.numel_unpadded = bucket.grad_data.numel()
        buffer.numel_unpadded = buffer.numel


def parts(optimizer: ChainedOptimizer) -> Iterator:
    """The distributed optimizers within that hold parameters: one of what is replicated or divided
    by tensor parallelism, one of what is marked by ``mark_image_parallel``."""
    # Megatron makes the same parameter groups on all ranks; a pipeline stage may have nothing in them.
    return (part for part in optimizer.chained_optimizers if not part.is_stub_optimizer and part.buffers)


@torch.no_grad()
def finish(model: Model, optimizer: ChainedOptimizer) -> tuple[float, bool]:
    """Reduce the gradients, clip them by their global norm and step (collective).

    Returns:
        The norm before clipping, the same on every rank, and whether the step was skipped because
        the norm was not finite. A skipped step leaves weights and optimizer state as they were, and
        the log names the parameters whose gradients are to blame.
    """
    finalize_model_grads(chunks(model))
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    if not math.isfinite(norm):
        log.warning("step skipped, the gradient norm is %s; not finite here: %s", norm, _not_finite(model))
        return norm, True
    if optimizer.config.clip_grad > 0:
        for part in parts(optimizer):
            clip_grad_by_total_norm_fp32(part.get_parameters(), optimizer.config.clip_grad, norm)
    optimizer.step_with_ready_grads()
    return norm, False


def _not_finite(model: Model, most: int = 8) -> list[str]:
    """Names of parameters with a gradient that is not finite in this rank's buffers."""
    named = (pair for stage in chunks(model) for pair in stage.module.named_parameters())
    trained = ((name, parameter) for name, parameter in named if parameter.requires_grad)
    return [name for name, parameter in trained if not parameter.main_grad.isfinite().all()][:most]
