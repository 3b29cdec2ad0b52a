"""The process groups of a run: this rank's place among all ranks."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from mmi_megatron import platform
from mmi_megatron.config import Config
from mmi_megatron.layout import data_parallel_size


@dataclass(frozen=True)
class Layout:
    """This rank's place: in the world and in its tensor-, pipeline-, data- and context-parallel groups."""

    rank: int
    world: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int
    cp_rank: int = 0
    cp_size: int = 1

    @property
    def speaks(self) -> bool:
        """Whether it is the first of those ranks of its stage that work on its rows and hold their losses."""
        return self.tp_rank == self.cp_rank == 0


def initialize(config: Config) -> Layout:
    """Join the world, set up Megatron's groups and seed every generator of this process.

    The world is torchrun's environment variables; without them it is this process alone. Every
    collective of every group fails after ``train.timeout`` seconds.

    Raises:
        ConfigError: before any group is started, when the layout does not fit the world.
    """
    platform.prepare_megatron()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    replicas = data_parallel_size(config, world)
    platform.set_threads(config.train.threads, int(os.environ.get("LOCAL_WORLD_SIZE", world)))
    with _world():
        platform.init_process_group(config.train.timeout)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.parallel.tensor,
        pipeline_model_parallel_size=config.parallel.pipeline,
        virtual_pipeline_model_parallel_size=(
            config.parallel.virtual if config.parallel.virtual > 1 else None
        ),
        context_parallel_size=config.parallel.context,
        num_distributed_optimizer_instances=config.parallel.optimizer_copies,
        # Modules whose images are divided over tensor- and context-parallel ranks are reduced over these
        # and the replicas by Megatron's expert groups (train.optimizer.mark_image_parallel).
        expert_tensor_parallel_size=1,
        distributed_timeout_minutes=config.train.timeout / 60,
    )
    seed(config.train.seed)
    return Layout(
        rank=dist.get_rank(),
        world=world,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=config.parallel.tensor,
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=config.parallel.pipeline,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=replicas,
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_size=config.parallel.context,
    )


@contextlib.contextmanager
def _world() -> Iterator[None]:
    """The environment of a world of one where there is none; gone afterwards, so that what this
    process does and starts next does not take it for torchrun's."""
    if "WORLD_SIZE" in os.environ:
        yield
        return
    alone = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    before = {name: os.environ.get(name) for name in alone}
    os.environ.update(alone)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def seed(value: int) -> None:
    """Seed Python, NumPy, torch and Megatron's tracker, whose tensor-parallel stream differs by rank.

    What must not depend on the layout is keyed instead (``train.rng.keyed_seed``).
    """
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)
    tensor_parallel.model_parallel_cuda_manual_seed(value)


def destroy() -> None:
    """Leave the groups; another layout can be set up afterwards in the same process."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
