"""Checkpoints: Megatron's ``torch_dist`` format, readable at any layout, whole or not there at all.

Hyperparameters are not in them: a resumed run takes them from its configuration.
"""

from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint import save as save_tensors

from mmi_megatron import platform
from mmi_megatron.platform import device
from mmi_megatron.train import checkpoint_folder
from mmi_megatron.train.checkpoint_folder import RUN
from mmi_megatron.train.optimizer import parts

log = logging.getLogger(__name__)

FORMAT = 1


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; the message names the file and what to do."""


# Writing


def save(
    model: DistributedDataParallel,
    optimizer: ChainedOptimizer,
    scheduler: OptimizerParamScheduler,
    extra: dict[str, Any],
    folder: Path,
    step: int,
    keep: int = 0,
) -> Path:
    """Write the state after ``step`` optimizer steps (collective, returns when it is whole).

    Args:
        model: the wrapped model; frozen weights are written too.
        optimizer, scheduler: as ``build_optimizer`` made them.
        extra: what ``load`` gives back, JSON values only.
        folder: of all checkpoints of the run.
        step: names the checkpoint; one of the same step is replaced.
        keep: how many of the newest stay, 0 for all.

    Returns:
        The checkpoint's folder.
    """
    draft = checkpoint_folder.draft_of(folder, step)
    if dist.get_rank() == 0:
        checkpoint_folder.begin(draft)
    dist.barrier()
    state = _sharded_state(model.module, optimizer, loading=False)
    writer = FullyParallelSaveStrategyWrapper(
        _WriteInThreads("torch_dist", 1), parallel_state.get_data_parallel_group(with_context_parallel=True)
    )
    dist_checkpointing.save(state, str(draft), writer)
    adam_step = _adam_step(optimizer)
    if dist.get_rank() == 0:
        run = {
            "format": FORMAT,
            "step": step,
            "adam_step": adam_step,
            "schedule_step": scheduler.num_steps,
            "layout": _layout(),
            "extra": extra,
        }
        checkpoint_folder.complete(draft, run)
        if keep:
            checkpoint_folder.forget(folder, keep)
    dist.barrier()
    return checkpoint_folder.final_of(draft)


class _WriteInThreads(TorchDistSaveShardedStrategy):
    """Megatron's format written by threads of this process. Megatron's own writer forks it, which
    the threads of gloo and CUDA do not survive, and starts a second process to collect results."""

    def save(self, sharded_state_dict: dict, checkpoint_dir: str) -> None:
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, self.keep_only_main_replica
        )
        save_tensors(
            mcore_to_pyt_state_dict(by_key, False),
            storage_writer=FileSystemWriter(checkpoint_dir, thread_count=self.thread_count),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint in ``folder``, None when there is none.

    Broken ones are passed over with a warning. With process groups up it is collective and rank 0
    decides for all.
    """
    if not dist.is_initialized():
        return checkpoint_folder.newest(folder)
    chosen = [checkpoint_folder.newest(folder) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(chosen, src=0)
    return chosen[0]


# Reading


def load(
    model: DistributedDataParallel,
    optimizer: ChainedOptimizer,
    scheduler: OptimizerParamScheduler,
    path: Path,
) -> dict[str, Any]:
    """Continue from a checkpoint written at any layout (collective).

    Weights, Adam's moments and step, the schedule's position and, at the layout it was written at,
    each rank's random states come back exactly. Learning rates, decay and the rest are the
    configuration's.

    Returns:
        The ``extra`` given to ``save``.

    Raises:
        CheckpointError: for one that is not whole, of another model, or of another version.
    """
    run = _open(path)
    same_layout = run["layout"] == _layout()
    for part in parts(optimizer):
        _repair(part)
    state = _load(path, _sharded_state(model.module, optimizer, loading=True, random_states=same_layout))
    model.module.load_state_dict(state["model"])
    for part in parts(optimizer):
        part.load_parameter_state_from_fully_reshardable(state["optimizer"][_part_name(part)])
        _set_adam_step(part, run["adam_step"])
    scheduler.num_steps = run["schedule_step"]
    scheduler.step(increment=0)
    if same_layout:
        _set_random_states(state["random"])
    elif dist.get_rank() == 0:
        log.warning(
            "%s was written at %s and is read at %s: the ranks' generators start anew; noise, dropout "
            "and data order do not depend on them",
            path.name,
            run["layout"],
            _layout(),
        )
    return run["extra"]


def load_weights(model: nn.Module, path: Path) -> dict[str, Any]:
    """Load the weights alone into a model of any layout, not wrapped (collective), for generation
    and evaluation. Returns and raises as ``load`` does."""
    run = _open(path)
    sharded: Any = model
    model.load_state_dict(_load(path, {"model": sharded.sharded_state_dict()})["model"])
    return run["extra"]


def _open(path: Path) -> dict[str, Any]:
    """What ``run.json`` holds, of a checkpoint that is whole."""
    fault = checkpoint_folder.fault(path)
    if fault is not None:
        raise CheckpointError(f"checkpoint refused: {fault}; use an older one or train without --resume")
    run = json.loads((path / RUN).read_text())
    if run["format"] != FORMAT:
        raise CheckpointError(f"{path / RUN}: format {run['format']}, this version reads {FORMAT}")
    _check_pickle(path / ".metadata")
    return run


def _load(path: Path, state: dict) -> dict:
    """Megatron's load, refusing tensors that are missing or of another shape."""
    saved = dist_checkpointing.load_tensors_metadata(str(path))
    wanted = [value for value in nested_values(state) if isinstance(value, ShardedTensor)]
    missing = sorted({tensor.key for tensor in wanted} - saved.keys())
    if missing:
        raise CheckpointError(
            f"{path} lacks {len(missing)} tensors of this model or optimizer, the first: {missing[:5]}; "
            "was it trained with another model, or with these parameters frozen?"
        )
    for tensor in wanted:
        if tuple(saved[tensor.key].global_shape) != tuple(tensor.global_shape):
            raise CheckpointError(
                f"{path}: {tensor.key} is {tuple(saved[tensor.key].global_shape)}, "
                f"this model has {tuple(tensor.global_shape)}"
            )
    return dist_checkpointing.load(state, str(path), strict=StrictHandling.ASSUME_OK_UNEXPECTED)


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickles what torch writes as ``.metadata`` and nothing that could run code."""

    MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
    NAMES = {
        ("torch", "Size"),
        ("torch", "device"),
        ("torch.serialization", "_get_layout"),
        ("builtins", "getattr"),
        ("collections", "OrderedDict"),
        ("pathlib", "PosixPath"),
        ("pathlib._local", "PosixPath"),
    }

    def find_class(self, module: str, name: str) -> Any:
        plain = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if plain or module in self.MODULES or (module, name) in self.NAMES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's index")


def _check_pickle(path: Path) -> None:
    """Refuse an index that would run code: Megatron is about to unpickle it."""
    try:
        with path.open("rb") as file:
            _MetadataUnpickler(file).load()
    except (pickle.UnpicklingError, EOFError, AttributeError) as error:
        raise CheckpointError(f"checkpoint refused: {path}: {error}") from error


# What is in it


def _sharded_state(
    model: Any, optimizer: ChainedOptimizer, loading: bool, random_states: bool = True
) -> dict:
    """The tree of Megatron's sharded tensors, to be written or to be filled."""
    sharded = model.sharded_state_dict()
    held = {id(value.data) for value in nested_values(sharded) if hasattr(value, "data")}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in held:
            raise CheckpointError(f"{name}: sharded_state_dict must hold the parameter itself, not a copy")
    states = {}
    for part in parts(optimizer):
        _allocate(part)
        # Gathered over the replicas, in the parameters' own shapes: fits any layout.
        states[_part_name(part)] = part.sharded_param_state_fully_reshardable(sharded, loading, metadata={})
    state = {"model": sharded, "optimizer": states}
    if random_states:
        place = (0, dist.get_rank(), dist.get_world_size())
        state["random"] = {
            name: ShardedTensor.from_rank_offsets(f"random.{name}", value.cpu(), place, prepend_axis_num=1)
            for name, value in _random_states().items()
        }
    return state


def _part_name(part: DistributedOptimizer) -> str:
    """Of the two optimizers within Megatron's, that of the divided images or that of the rest."""
    return "images" if part.param_groups[0]["is_expert_parallel"] else "rest"


def _layout() -> dict[str, Any]:
    return {
        "ranks": dist.get_world_size(),
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "device": device().type,
    }


# Adam's state


def _allocate(part: DistributedOptimizer) -> None:
    """Give an optimizer that has not stepped yet the state that it would start with."""
    part.init_state_fn(part.optimizer, part.config)
    if isinstance(part.optimizer, torch.optim.AdamW):
        for state in part.optimizer.state.values():
            state.setdefault("step", torch.tensor(0.0))


def _repair(part: DistributedOptimizer) -> None:
    """Let Megatron load into torch's AdamW, whose ``step`` it does not expect among the tensors."""
    original = type(part)._set_main_param_and_optimizer_states

    def set_states(model_param: Tensor, tensors: dict[str, Tensor]) -> None:
        group, order = part.model_param_group_index_map[model_param]
        state = part.optimizer.state[part.optimizer.param_groups[group]["params"][order]]
        step = {"step": state["step"]} if "step" in state else {}
        original(part, model_param, tensors | step)

    part._set_main_param_and_optimizer_states = set_states


def _adam_step(optimizer: ChainedOptimizer) -> int:
    """Steps that Adam has made, the same for all parameters (collective)."""
    steps = [0]
    for part in parts(optimizer):
        steps += [int(state["step"]) for state in part.optimizer.state.values() if "step" in state]
        steps += [int(group["step"]) for group in part.optimizer.param_groups if "step" in group]
    most = torch.tensor([max(steps)], device=device())  # a rank may hold no share of any parameter
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)


def _set_adam_step(part: DistributedOptimizer, step: int) -> None:
    """One tensor for each parameter: torch advances it in place, and a shared one would run ahead.
    Fused optimizers count in the group."""
    for state in part.optimizer.state.values():
        if "step" in state:
            state["step"] = torch.full_like(state["step"], float(step))
    if not isinstance(part.optimizer, torch.optim.AdamW):
        for group in part.optimizer.param_groups:
            group["step"] = step


# Random states


def _random_states() -> dict[str, Tensor]:
    """Generators of this rank: torch's, and those of Megatron's tracker."""
    tracked = {f"tracker.{name}": state for name, state in get_cuda_rng_tracker().get_states().items()}
    return tracked | platform.random_states()


def _set_random_states(states: dict[str, Tensor]) -> None:
    tracked = {name.removeprefix("tracker."): s for name, s in states.items() if name.startswith("tracker.")}
    get_cuda_rng_tracker().set_states(tracked)
    platform.set_random_states(states)
