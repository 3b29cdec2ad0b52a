"""The folder of a run's checkpoints: which there are, which are whole. Needs no torch.

A checkpoint is a folder ``step_0000500`` on a file system that all ranks share::

    .metadata, *.distcp, common.pt, metadata.json   weights, optimizer and random states (Megatron's)
    run.json                                        step, data position, schedule, layout
    complete.json                                   bytes of each file above; written last

It is written under a name that ends in ``.tmp`` and renamed when all ranks are done.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

NAME = re.compile(r"step_(\d{7,})")
DRAFT = ".tmp"
MARKER, RUN = "complete.json", "run.json"


def draft_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is written."""
    return folder / f"step_{step:07d}{DRAFT}"


def final_of(draft: Path) -> Path:
    """Where it stands once it is whole."""
    return draft.with_name(draft.name.removesuffix(DRAFT))


def begin(draft: Path) -> None:
    """Make the draft's folder, empty."""
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)


def complete(draft: Path, run: dict[str, Any]) -> None:
    """Write what ``run.json`` holds, mark the draft whole and rename it. An older checkpoint of the
    same step leaves only when the new one is there."""
    _write_json(draft / RUN, run)
    _write_json(draft / MARKER, _sizes(draft))
    target = final_of(draft)
    old = target.with_name(f"{target.name}.old{DRAFT}")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    draft.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def forget(folder: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` whole checkpoints, and drafts of runs that were killed.
    Broken ones stay for a person to look at."""
    whole = [path for path in by_step(folder) if fault(path) is None]
    for path in [*whole[:-keep], *folder.glob(f"step_*{DRAFT}")]:
        shutil.rmtree(path)


def by_step(folder: Path) -> list[Path]:
    """Checkpoints by name, the oldest first, whole or not."""
    if not folder.is_dir():
        return []
    found = {int(match[1]): path for path in folder.iterdir() if (match := NAME.fullmatch(path.name))}
    return [found[step] for step in sorted(found)]


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint, None when there is none; broken ones are passed over with a warning."""
    for path in reversed(by_step(folder)):
        broken = fault(path)
        if broken is None:
            return path
        log.warning("checkpoint %s is passed over: %s", path.name, broken)
    return None


def fault(path: Path) -> str | None:
    """What keeps this checkpoint from being whole, None if nothing does. Reads no tensors."""
    if not path.is_dir():
        return f"{path} does not exist"
    try:
        sizes = json.loads((path / MARKER).read_text())
    except FileNotFoundError:
        return f"{path / MARKER} is missing: it was never finished"
    except ValueError as error:
        return f"{path / MARKER} is no JSON ({error})"
    for name, size in sizes.items():
        file = path / name
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != size:
            return f"{file} has {file.stat().st_size} bytes of {size}"
    return None


def _write_json(path: Path, value: Any) -> None:
    with path.open("w") as file:
        json.dump(value, file, indent=1, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())


def _sizes(folder: Path) -> dict[str, int]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
