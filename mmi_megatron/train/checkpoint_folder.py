"""The folder of a run's checkpoints: which there are, which are whole. Needs no torch.

A checkpoint is a folder ``step_0000500``, on a file system that all ranks share or in an object store::

    .metadata, *.distcp, common.pt, metadata.json   trained weights, optimizer, random states (Megatron's)
    run.json                                        step, data position, schedule, layout, frozen weights
    complete.json                                   bytes and SHA-256 of each file above; written last

Weights that are not trained lie beside it, once for all checkpoints that have them, in
``frozen_`` and the hash of their contents; such a folder has no ``run.json``.

On a file system a checkpoint is written under a name that ends in ``.tmp`` and renamed when all ranks
are done. An object store renames nothing: there the marker alone makes it whole.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmi_megatron.train.storage import Folder

log = logging.getLogger(__name__)

NAME = re.compile(r"step_(\d{7,})")
DRAFT = ".tmp"
OLD = f".old{DRAFT}"
MARKER, RUN = "complete.json", "run.json"
CHUNK = 1 << 24

Address = str | Path | Folder


def name_of(step: int) -> str:
    """Name of the checkpoint of a step."""
    return f"step_{step:07d}"


def step_of(name: str) -> int:
    """Step of the checkpoint of this name."""
    match = NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"{name}: no name of a checkpoint, such as step_0000500")
    return int(match[1])


def frozen_name(digest: str) -> str:
    """Name of the folder of frozen weights of this hash."""
    return f"frozen_{digest}"


def draft_of(final: Folder) -> Folder:
    """Where the checkpoint is written that will be ``final``."""
    return final if final.local is None else Folder(f"{final}{DRAFT}")


def begin(draft: Folder) -> None:
    """Empty the place where a checkpoint is going to be written."""
    draft.remove(MARKER)  # first: from here on what is left is not whole
    draft.delete()


def complete(draft: Folder, final: Folder, hashes: dict[str, dict[str, Any]]) -> None:
    """Mark a draft whole, and give it its name. An older checkpoint of the same step leaves only when
    the new one is there."""
    draft.write(MARKER, json.dumps(hashes, indent=1).encode())
    if draft.local is None or final.local is None:
        return
    old = Folder(f"{final}{OLD}")
    old.delete()
    if final.local.exists():
        final.local.rename(str(old))
    draft.local.rename(final.local)
    _sync(final.local.parent)
    old.delete()


def _sync(folder: Path) -> None:
    """Let the names in a folder be on its disk, where the system can."""
    place = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(place)
    finally:
        os.close(place)


def prune(folder: Address, keep: int, keep_every: int = 0) -> list[str]:
    """Delete whole checkpoints that are not wanted any more, drafts of runs that were killed, and frozen
    weights that no checkpoint has. Broken checkpoints stay for a person to look at.

    Args:
        folder: of all checkpoints.
        keep: how many of the newest stay, 0 for all.
        keep_every: those of steps that divide by it stay too, 0 for none.

    Returns:
        Names of what was deleted.
    """
    folder = Folder(folder)
    whole = [path for path in by_step(folder) if fault(path) is None]
    old = whole[:-keep] if keep else []
    gone = [path for path in old if not (keep_every and step_of(path.name) % keep_every == 0)]
    gone += [folder / name for name in folder.folders() if name.endswith(DRAFT)]
    for path in gone:
        path.delete()
    wanted = {frozen.name for path in by_step(folder) for frozen in _frozen_of(path)}
    lost = [name for name in folder.folders() if name.startswith("frozen_") and name not in wanted]
    for name in lost:
        (folder / name).delete()
    return [path.name for path in gone] + lost


def by_step(folder: Address) -> list[Folder]:
    """Checkpoints by step, the oldest first, whole or not."""
    folder = Folder(folder)
    found = {step_of(name): folder / name for name in folder.folders() if NAME.fullmatch(name)}
    return [found[step] for step in sorted(found)]


def newest(folder: Address) -> Folder | None:
    """The newest whole checkpoint, None when there is none; broken ones are passed over with a warning."""
    for path in reversed(by_step(folder)):
        broken = fault(path)
        if broken is None:
            return path
        log.warning("checkpoint %s is passed over: %s", path.name, broken)
    return None


def run_of(path: Address) -> dict[str, Any]:
    """What ``run.json`` holds."""
    return json.loads(Folder(path).read(RUN))


def parts_of(path: Address) -> list[Folder]:
    """Folders that hold a whole checkpoint's tensors: its own, and that of the frozen weights."""
    path = Folder(path)
    return [path, *_frozen_of(path)]


def _frozen_of(path: Folder) -> Iterator[Folder]:
    try:
        digest = run_of(path).get("frozen")
    except (FileNotFoundError, ValueError):  # broken, which `fault` reports
        return
    if digest:
        yield path.parent / frozen_name(digest)


def fault(path: Address) -> str | None:
    """What keeps this checkpoint from being whole, None if nothing does. Looks at names and sizes."""
    return next(_faults(Folder(path), hashes=False), None)


def verify(path: Address) -> list[str]:
    """Everything that is wrong with a checkpoint, its frozen weights included; reads every byte."""
    return list(_faults(Folder(path), hashes=True))


def _faults(path: Folder, hashes: bool) -> Iterator[str]:
    there = path.files()
    if not there:
        yield f"{path} does not exist"
        return
    try:
        listed = json.loads(path.read(MARKER))
    except FileNotFoundError:
        yield f"{path}/{MARKER} is missing: it was never finished"
        return
    except ValueError as error:
        yield f"{path}/{MARKER} is no JSON ({error})"
        return
    for name, wanted in listed.items():
        if name not in there:
            yield f"{path}/{name} is missing"
        elif there[name] != wanted["bytes"]:
            yield f"{path}/{name} has {there[name]} bytes of {wanted['bytes']}"
        elif hashes and sha256(path, name, there[name]) != wanted["sha256"]:
            yield f"{path}/{name} is damaged: its SHA-256 is not that of {MARKER}"
    if RUN in listed:
        for frozen in _frozen_of(path):
            yield from _faults(frozen, hashes)


def sha256(folder: Folder, name: str, size: int) -> str:
    """Hash of a file, read piece by piece."""
    digest = hashlib.sha256()
    for start in range(0, size, CHUNK):
        digest.update(folder.read(name, start, min(start + CHUNK, size)))
    return digest.hexdigest()
