"""Checkpoints: Megatron's ``torch_dist`` format, readable at any layout, whole or not there at all.

Hyperparameters are not in them: a resumed run takes them from its configuration.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor, nn

from mmi_megatron import platform
from mmi_megatron.platform import device
from mmi_megatron.train import checkpoint_folder, frozen
from mmi_megatron.train.checkpoint_folder import Address
from mmi_megatron.train.checkpoint_reader import FORMAT, CheckpointError, fill, open_run
from mmi_megatron.train.checkpoint_writer import Job, Piece
from mmi_megatron.train.optimizer import parts
from mmi_megatron.train.storage import Folder

__all__ = ["CheckpointError", "Checkpoints", "Saved", "latest", "load", "load_weights", "save"]

log = logging.getLogger(__name__)

WAIT = 0.05
"""Seconds between two looks at whether all ranks have written."""

Model = Any
"""What one rank trains: a wrapped model, or a list of its pieces where pipeline stages interleave."""


# Writing


@dataclass(frozen=True)
class Saved:
    """A checkpoint that has become whole.

    Attributes:
        step: its step.
        stall: seconds that training stood still for it, on this rank.
        seconds: that the writing took beside the training.
    """

    step: int
    stall: float
    seconds: float


class Checkpoints:
    """A run's checkpoints, written while training goes on; one at a time.

    Args:
        folder: where they are: a path, or a URL such as ``s3://bucket/run``.
        stage: local folder where files wait to be uploaded, if ``folder`` is not local.
        keep: how many of the newest stay, 0 for all.
        keep_every: those of steps that divide by it stay too, 0 for none.
        threads: of each rank that write.
        waiting: called again and again while this rank waits for one to become whole.
    """

    def __init__(
        self,
        folder: Address,
        stage: Path,
        keep: int = 0,
        keep_every: int = 0,
        threads: int = 1,
        waiting: Callable[[], object] = lambda: None,
    ):
        self.folder, self.stage = Folder(folder), stage
        self.keep, self.keep_every, self.threads = keep, keep_every, threads
        self.waiting = waiting
        self.last: int | None = None
        self._frozen: str | None = None
        self._job: tuple[Job, int, float] | None = None

    def save(
        self,
        model: Model,
        optimizer: ChainedOptimizer,
        scheduler: OptimizerParamScheduler,
        extra: dict[str, Any],
        step: int,
    ) -> Saved | None:
        """Begin to write the state after ``step`` optimizer steps (collective). It is copied before
        this returns; a checkpoint of the same step is replaced.

        Args:
            model: the wrapped model; frozen weights are written too, once for all checkpoints.
            optimizer, scheduler: as ``build_optimizer`` made them.
            extra: what ``load`` gives back, JSON values only.
            step: names the checkpoint.

        Returns:
            The checkpoint before this one, where that was still being written.

        Raises:
            OSError: when that could not be written.
        """
        started = time.perf_counter()
        before = self.wait()
        sharded = _sharded_model(model)
        trained, fixed = _split(sharded, model)
        if self._frozen is None:
            self._frozen = frozen.digest(fixed)
        state = {"model": trained} | _sharded_rest(sharded, model, optimizer, loading=False)
        final = self.folder / checkpoint_folder.name_of(step)
        run = {
            "format": FORMAT,
            "step": step,
            "frozen": self._frozen,
            "adam_step": _adam_step(optimizer),
            "schedule_step": scheduler.num_steps,
            "layout": _layout(),
            "extra": extra,
        }
        pieces = []
        if self._frozen and not self._is_there(self._frozen):
            place = self.folder / checkpoint_folder.frozen_name(self._frozen)
            pieces.append(Piece({"model": fixed}, place, self.stage, self.threads))
        pieces.append(Piece(state, final, self.stage, self.threads))
        job = Job(pieces, run, self._prune)
        self._job, self.last = (job, step, time.perf_counter() - started), step
        return before

    def poll(self) -> Saved | None:
        """The checkpoint that has become whole since the last call, on this rank; never waits.

        Raises:
            OSError: when it could not be written.
        """
        return self._finish() if self._job is not None and self._job[0].done else None

    def wait(self) -> Saved | None:
        """Wait until the checkpoint under way is whole (collective).

        Raises:
            OSError: when any rank could not write its part; on every rank, naming it.
        """
        # Not a barrier: a slow disk or network is no reason for a collective to time out.
        while not self._all_done():
            self.waiting()
            time.sleep(WAIT)
        return self._finish()

    def _all_done(self) -> bool:
        job = None if self._job is None else self._job[0]
        done, failed = job is None or job.done, job is not None and job.error is not None
        state = torch.tensor([done, not failed], dtype=torch.int, device=device())
        dist.all_reduce(state, op=dist.ReduceOp.MIN)
        if not state[1]:  # rank 0 would wait for that part for ever
            self._give_up()
        return bool(state[0])

    def _give_up(self) -> None:
        """Raise on every rank what ended the save on some (collective)."""
        assert self._job is not None
        (job, step, _), self._job, self.last = self._job, None, None
        job.stop.set()
        mine = None if job.error is None else f"{type(job.error).__name__}: {job.error}"
        everyone: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        said = "; ".join(f"rank {rank}: {error}" for rank, error in enumerate(everyone) if error)
        name = checkpoint_folder.name_of(step)
        raise OSError(f"{self.folder / name} could not be written: {said}") from job.error

    def _finish(self) -> Saved | None:
        if self._job is None:
            return None
        (job, step, stall), self._job = self._job, None
        job.wait()
        return Saved(step, stall, job.seconds)

    def _is_there(self, digest: str) -> bool:
        """Whether these frozen weights have been written already; rank 0 looks."""
        found = [False]
        if dist.get_rank() == 0:
            found = [checkpoint_folder.fault(self.folder / checkpoint_folder.frozen_name(digest)) is None]
        dist.broadcast_object_list(found, src=0)
        return found[0]

    def _prune(self) -> None:
        checkpoint_folder.prune(self.folder, self.keep, self.keep_every)


def save(
    model: Model,
    optimizer: ChainedOptimizer,
    scheduler: OptimizerParamScheduler,
    extra: dict[str, Any],
    folder: Address,
    step: int,
    keep: int = 0,
) -> Folder:
    """Write one checkpoint and return when it is whole (collective); see ``Checkpoints``.

    Returns:
        The checkpoint's folder.
    """
    checkpoints = Checkpoints(folder, Path(tempfile.gettempdir()) / "mmi_stage", keep)
    checkpoints.save(model, optimizer, scheduler, extra, step)
    checkpoints.wait()
    return checkpoints.folder / checkpoint_folder.name_of(step)


def latest(folder: Address) -> Folder | None:
    """The newest whole checkpoint in ``folder``, None when there is none.

    Broken ones are passed over with a warning. With process groups up it is collective and rank 0
    decides for all.
    """
    if not dist.is_initialized():
        return checkpoint_folder.newest(folder)
    chosen: list[str | None] = [None]
    if dist.get_rank() == 0 and (newest := checkpoint_folder.newest(folder)) is not None:
        chosen = [newest.address]
    dist.broadcast_object_list(chosen, src=0)
    return None if chosen[0] is None else Folder(chosen[0])


# Reading


def load(
    model: Model,
    optimizer: ChainedOptimizer,
    scheduler: OptimizerParamScheduler,
    path: Address,
    waiting: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Continue from a checkpoint written at any layout (collective).

    Weights, Adam's moments and step, the schedule's position and, at the layout it was written at,
    each rank's random states come back exactly. Learning rates, decay and the rest are the
    configuration's. ``waiting`` is called again and again while this rank reads.

    Returns:
        The ``extra`` given to ``save``.

    Raises:
        CheckpointError: for one that is not whole, of another model, or of another version.
    """
    run = open_run(path)
    same_layout = {"context": 1} | run["layout"] == _layout()
    for part in parts(optimizer):
        _repair(part)
    sharded = _sharded_model(model)
    rest = _sharded_rest(sharded, model, optimizer, loading=True, random_states=same_layout)
    state = fill(path, {"model": sharded} | rest, waiting)
    _set_model(model, state["model"])
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
            Folder(path).name,
            run["layout"],
            _layout(),
        )
    return run["extra"]


def load_weights(model: nn.Module, path: Address) -> dict[str, Any]:
    """Load the weights alone into a model of any layout, not wrapped (collective), for generation
    and evaluation. Returns and raises as ``load`` does."""
    run = open_run(path)
    sharded: Any = model
    model.load_state_dict(fill(path, {"model": sharded.sharded_state_dict()})["model"])
    return run["extra"]


# What is in it


def _chunks(model: Model) -> list[nn.Module]:
    """This rank's pieces of the model, without Megatron's wrapper."""
    wrapped = [model] if isinstance(model, DistributedDataParallel) else list(model)
    return [chunk.module for chunk in wrapped]


def _sharded_model(model: Model) -> dict:
    """Megatron's sharded tensors of the model, by piece."""
    sharded: dict[str, Any] = {}
    for number, chunk in enumerate(_chunks(model)):
        state = chunk.sharded_state_dict()  # type: ignore[operator]
        held = {id(value.data) for value in nested_values(state) if hasattr(value, "data")}
        for name, parameter in chunk.named_parameters():
            if parameter.requires_grad and id(parameter) not in held:
                raise CheckpointError(
                    f"{name}: sharded_state_dict must hold the parameter itself, not a copy"
                )
        sharded[str(number)] = state
    return sharded


def _split(sharded: dict, model: Model) -> tuple[dict, dict]:
    """What training changes of the model, and what is frozen."""
    trained, fixed = {}, {}
    for number, chunk in enumerate(_chunks(model)):
        trained[str(number)], fixed[str(number)] = frozen.split(sharded[str(number)], chunk)
    return trained, fixed


def _set_model(model: Model, state: dict) -> None:
    for number, chunk in enumerate(_chunks(model)):
        chunk.load_state_dict(state[str(number)])


def _sharded_rest(
    sharded: dict, model: Model, optimizer: ChainedOptimizer, loading: bool, random_states: bool = True
) -> dict:
    """The optimizer's and the generators' sharded tensors, to be written or to be filled."""
    flat = {f"{number}.{key}": value for number, part in sharded.items() for key, value in part.items()}
    states = {}
    for part in parts(optimizer):
        _allocate(part)
        # Gathered over the replicas, in the parameters' own shapes: fits any layout.
        states[_part_name(part)] = part.sharded_param_state_fully_reshardable(flat, loading, metadata={})
    state: dict[str, Any] = {"optimizer": states}
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
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
        "context": parallel_state.get_context_parallel_world_size(),
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
