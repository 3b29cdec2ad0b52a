"""The weights that a run starts from: converted checkpoints and those of other runs, each a part of the
model or the whole."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch import nn

from mmi_megatron.config import Config, ModelConfig
from mmi_megatron.convert.rules import ConvertError
from mmi_megatron.convert.sharded import MODEL
from mmi_megatron.settings import build
from mmi_megatron.train import checkpoint_folder
from mmi_megatron.train.checkpoint_reader import fill, open_run, read_index, shapes_of
from mmi_megatron.train.storage import Folder

log = logging.getLogger(__name__)

RECORD = "start_weights.json"

FREE = {
    "frozen",
    "document_attention",
    "train_image_tokens",
    "max_images",
    "offset_init",
    "zero_offset_bias",
    "use_resampler",
    "references",
    "guidance_drop",
    "ema",
    "decoder.image_size",
    "loss.next_token",
    "loss.next_image",
}
"""Settings, by the end of their name, that the weights of a model do not hang on."""


def load_start(
    chunks: Sequence[nn.Module], config: Config, out: Path, waiting: Callable[[], object] = lambda: None
) -> None:
    """Fill this rank's pieces of the model from ``train.init_from`` (collective).

    Of every tensor a rank reads its own slice alone. What no checkpoint holds keeps its start value;
    which tensor came from where is written to ``start_weights.json`` in the run's folder.

    Args:
        chunks: the model, not wrapped yet; its pieces where pipeline stages interleave.
        config: of the run.
        out: its folder.
        waiting: called again and again while this rank reads.

    Raises:
        ConfigError: when two of them hold the same tensor, or one is of another model.
        CheckpointError: when one is not whole or a tensor has another shape.
    """
    sharded = [chunk.sharded_state_dict() for chunk in chunks]  # type: ignore[operator]
    ours = _all_keys(sharded)
    origin: dict[str, str] = {}
    unused: dict[str, list[str]] = {}
    for address in config.train.init_from:
        folder = _resolve_once(address)
        _check_settings(folder, config)
        held = {key for key in shapes_of(read_index(folder)) if key.startswith(MODEL)}
        twice = sorted(held & ours & origin.keys())
        if twice:
            raise ConvertError(
                f"train.init_from: {twice[0]} and {len(twice) - 1} more are in {origin[twice[0]]} and in "
                f"{folder}; name one of them only"
            )
        origin |= dict.fromkeys(held & ours, folder.address)
        unused[folder.address] = sorted(held - ours)
        _fill(chunks, sharded, folder, held, waiting)
    if dist.get_rank() == 0:
        _record(out, origin, sorted(ours - origin.keys()), unused)


def resolve(address: str) -> Folder:
    """The checkpoint at an address: itself, or the newest of a run's.

    Raises:
        ConvertError: when there is none.
    """
    folder = Folder(address)
    if checkpoint_folder.RUN in folder.files():
        return folder
    for place in (folder, folder / "checkpoints"):
        if (newest := checkpoint_folder.newest(place)) is not None:
            return newest
    raise ConvertError(f"{address}: neither a checkpoint nor the folder of a run with a complete one")


def _resolve_once(address: str) -> Folder:
    """``resolve`` on rank 0 for all: another run may write its next checkpoint meanwhile (collective)."""
    found: list[str | ConvertError | None] = [None]
    if dist.get_rank() == 0:
        try:
            found[0] = resolve(address).address
        except ConvertError as error:
            found[0] = error
    dist.broadcast_object_list(found, src=0)
    if not isinstance(found[0], str):
        assert found[0] is not None
        raise found[0]
    return Folder(found[0])


def load_whole(model: nn.Module, folder: Folder) -> None:
    """Fill a model, not wrapped, from a converted checkpoint that holds all of it (collective).

    Raises:
        CheckpointError: when it is not whole, lacks a tensor, or has one of another shape.
    """
    sharded = [model.sharded_state_dict()]  # type: ignore[operator]
    _fill([model], sharded, folder, _all_keys(sharded))


def converted_model(extra: dict[str, Any]) -> ModelConfig | None:
    """Settings of the model in a converted checkpoint, true for the parts that it holds; None for a
    checkpoint of a run.

    Args:
        extra: of its ``run.json``.
    """
    return build(ModelConfig, extra["settings"]) if "settings" in extra else None


def _all_keys(sharded: list[dict]) -> set[str]:
    """Names of all tensors of the model, on whatever rank they are."""
    mine = {tensor.key for part in sharded for tensor in _tensors(part).values()}
    every: list[set[str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    return set().union(*(keys for keys in every if keys))


def _tensors(sharded: dict) -> dict[str, Any]:
    """Sharded tensors, and factories of such, without Megatron's other objects."""
    return {name: value for name, value in sharded.items() if not isinstance(value, ShardedObject)}


def _fill(
    chunks: Sequence[nn.Module],
    sharded: list[dict],
    folder: Folder,
    held: set[str],
    waiting: Callable[[], object] = lambda: None,
) -> None:
    wanted = {
        str(number): {name: tensor for name, tensor in _tensors(part).items() if tensor.key in held}
        for number, part in enumerate(sharded)
    }
    filled = fill(folder, {"model": wanted}, waiting)
    state = filled.get("model", {})  # nothing for a stage without such parts
    for number, chunk in enumerate(chunks):
        result = chunk.load_state_dict(state.get(str(number), {}), strict=False)
        if result.unexpected_keys:
            raise ConvertError(f"{folder}: no place in the model for {result.unexpected_keys[:4]}")


def _check_settings(folder: Folder, config: Config) -> None:
    """Refuse weights that were made for other settings than the run's."""
    settings = open_run(folder)["extra"].get("settings")
    if settings is None:  # a checkpoint of a run: shapes alone are checked
        return
    model = dataclasses.asdict(config.model)
    for name, value in _leaves(settings):
        if any(name == free or name.endswith(f".{free}") for free in FREE):
            continue
        ours: Any = model
        for part in name.split("."):
            ours = None if ours is None else ours.get(part)
        if ours != value:
            raise ConvertError(
                f"train.init_from: {folder} is of a model with model.{name}={value}, this run has {ours}"
            )


def _leaves(tree: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _record(out: Path, origin: dict[str, str], fresh: list[str], unused: dict[str, list[str]]) -> None:
    """Say what came from where, and keep the whole list."""
    out.mkdir(parents=True, exist_ok=True)
    record = {"from": origin, "start_values": fresh, "unused": unused}
    (out / RECORD).write_text(json.dumps(record, indent=1))
    for address, names in unused.items():
        count = sum(folder == address for folder in origin.values())
        left = f"; {len(names)} of its tensors have no place in this model, as {names[0]}" if names else ""
        log.warning("start weights: %d tensors from %s%s", count, address, left)
    parts = Counter(".".join(name.split(".")[:2]) for name in fresh)
    rest = ", ".join(f"{count} of {part}" for part, count in sorted(parts.items()))
    log.warning("start weights: %d tensors keep their start values (%s)", len(fresh), rest or "none")
