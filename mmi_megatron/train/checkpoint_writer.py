"""Writing a checkpoint while training goes on.

The ranks agree on who writes what and copy their tensors to memory of their own; from there a thread
of each rank writes them, in Megatron's ``torch_dist`` format. The ranks' threads do not talk to each
other: each leaves a list of what it has written beside its files, and rank 0, when all lists are
there, writes the index and marks the checkpoint whole. Megatron's own asynchronous writer forks the
process, which the threads of gloo and CUDA do not survive.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter, Metadata
from torch.distributed.checkpoint import save as save_tensors
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from mmi_megatron.train import checkpoint_folder
from mmi_megatron.train.storage import Folder

log = logging.getLogger(__name__)

POLL = 0.05
"""Seconds between two looks at what the other ranks have written."""

INDEX = (".metadata", "metadata.json", "common.pt")
"""What rank 0 writes besides its tensors."""


class _Staging(FileSystemWriter):
    """Takes part in torch's save up to where it would write; keeps copies to be written later."""

    def __init__(self, path: Path, threads: int):
        super().__init__(path, thread_count=threads)
        self.tensors: dict[MetadataIndex, Any] = {}
        self.plan: Any = None
        self.metadata: Metadata | None = None

    def write_data(self, plan: Any, planner: Any) -> Future[list[WriteResult]]:
        self.plan = plan
        for item in plan.items:
            data = planner.resolve_data(item)
            copied = data.detach().to("cpu", copy=True) if isinstance(data, Tensor) else data
            self.tensors[item.index] = copied
        nothing: Future = Future()
        nothing.set_result([])
        return nothing

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        self.metadata = metadata

    def resolve_data(self, item: Any) -> Any:
        """Plays the planner towards torch's writer."""
        return self.tensors[item.index]

    def write(self) -> list[WriteResult]:
        """Write what was staged, and let go of it."""
        written = super().write_data(self.plan, self)  # type: ignore[arg-type]
        self.tensors.clear()
        return written.value()

    def write_index(self, results: list[WriteResult]) -> None:
        """Write torch's index of what all ranks have written (rank 0)."""
        assert self.metadata is not None
        super().finish(self.metadata, [results])


class _Stage(TorchDistSaveShardedStrategy):
    """Megatron's strategy that stages instead of writing."""

    def __init__(self, threads: int):
        super().__init__("torch_dist", 1)
        self.threads = threads
        self.staging: _Staging | None = None

    def save(self, sharded_state_dict: dict, checkpoint_dir: str) -> None:
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, self.keep_only_main_replica
        )
        self.staging = _Staging(Path(checkpoint_dir), self.threads)
        save_tensors(
            mcore_to_pyt_state_dict(by_key, False),
            storage_writer=self.staging,
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )


class Piece:
    """One folder of tensors on its way from this rank's memory to where it stays.

    Args:
        state: Megatron's sharded tensors.
        final: the folder's address.
        stage: local folder where files wait to be uploaded, if ``final`` is not local.
        threads: that write.
    """

    def __init__(self, state: dict, final: Folder, stage: Path, threads: int = 1):
        self.final = final
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.draft = checkpoint_folder.draft_of(final)
        self.here = self.draft.local or stage / final.name
        if self.rank == 0:
            checkpoint_folder.begin(self.draft)
            Folder(self.here).delete()
        dist.barrier()
        self.here.mkdir(parents=True, exist_ok=True)
        strategy = _Stage(threads)
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        dist_checkpointing.save(
            {"state": state}, str(self.here), FullyParallelSaveStrategyWrapper(strategy, group)
        )
        assert strategy.staging is not None
        self.staging = strategy.staging

    def write(self) -> None:
        """Write and upload this rank's tensors, and say so (runs in a thread)."""
        results = self.staging.write()
        files = sorted({result.storage_data.relative_path for result in results})
        part = {"files": self._bring(files), "results": [_as_json(result) for result in results]}
        self.draft.write(_part_name(self.rank), json.dumps(part).encode())
        if self.draft.local is None and self.rank > 0:
            with contextlib.suppress(OSError):  # not the last of its machine, or rank 0's: not empty
                self.here.rmdir()

    def complete(self, run: dict[str, Any] | None, stopped: Callable[[], bool]) -> None:
        """Wait for all ranks and mark the folder whole (rank 0, in a thread).

        Args:
            run: what ``run.json`` holds; none is written without it.
            stopped: whether to give up waiting.
        """
        names = {_part_name(rank) for rank in range(self.world)}
        while not names <= self.draft.files().keys():
            if stopped():
                return
            time.sleep(POLL if self.draft.local else 10 * POLL)
        parts = [json.loads(self.draft.read(name)) for name in sorted(names)]
        self.staging.write_index([_from_json(result) for part in parts for result in part["results"]])
        files = {name: entry for part in parts for name, entry in part["files"].items()}
        index = list(INDEX)
        if run is not None:
            (self.here / checkpoint_folder.RUN).write_text(json.dumps(run, indent=1, allow_nan=False))
            index.append(checkpoint_folder.RUN)
        files |= self._bring(index)
        for name in names:
            self.draft.remove(name)
        checkpoint_folder.complete(self.draft, self.final, files)
        if self.draft.local is None:
            Folder(self.here).delete()

    def _bring(self, files: list[str]) -> dict[str, dict[str, Any]]:
        """Put files where they belong; bytes and SHA-256 of each."""
        entries = {}
        for name in files:
            path = self.here / name
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256")
                os.fsync(file.fileno())  # before the marker is, which says that it is whole
            entries[name] = {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
            if self.draft.local is None:
                self.draft.put(path, name)
                path.unlink()
        return entries


class Job:
    """A save under way in a thread.

    Args:
        pieces: folders to write, in this order; the last is the checkpoint.
        run: what its ``run.json`` holds.
        finished: called at the end, on rank 0.
    """

    def __init__(self, pieces: list[Piece], run: dict[str, Any], finished: Callable[[], object]):
        self.pieces, self.run, self.finished = pieces, run, finished
        self.error: BaseException | None = None
        self.seconds = 0.0
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._work, name="checkpoint", daemon=True)
        self.thread.start()

    @property
    def done(self) -> bool:
        """Whether this rank's part is over; on rank 0, everyone's."""
        return not self.thread.is_alive()

    def wait(self) -> None:
        """Wait for it.

        Raises:
            OSError, and whatever else ended the thread.
        """
        self.thread.join()
        if self.error is not None:
            raise self.error

    def _work(self) -> None:
        started = time.perf_counter()
        try:
            for piece in self.pieces:
                piece.write()
                if piece.rank == 0:
                    last = piece is self.pieces[-1]
                    piece.complete(self.run if last else None, self.stop.is_set)
            if self.pieces[-1].rank == 0 and not self.stop.is_set():
                self.finished()
        except BaseException as error:  # raised again where the training loop looks for it
            self.error = error
        self.seconds = time.perf_counter() - started


def _part_name(rank: int) -> str:
    return f"part_{rank:05d}.json"


def _as_json(result: WriteResult) -> dict[str, Any]:
    index, place = result.index, result.storage_data
    return {
        "key": index.fqn,
        "offset": None if index.offset is None else list(index.offset),
        "index": index.index,
        "bytes": result.size_in_bytes,
        "place": dataclasses.asdict(place),
    }


def _from_json(entry: dict[str, Any]) -> WriteResult:
    offset = None if entry["offset"] is None else torch.Size(entry["offset"])
    index = MetadataIndex(entry["key"], offset, entry["index"])
    return WriteResult(index, entry["bytes"], _StorageInfo(**entry["place"]))
