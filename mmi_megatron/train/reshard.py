"""Writes a checkpoint anew at another layout: processes of this machine load it as that layout's ranks
would, and save it. No GPU is needed, and nothing is trained."""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from pathlib import Path

from mmi_megatron.config import Config
from mmi_megatron.errors import ConfigError
from mmi_megatron.layout import data_parallel_size
from mmi_megatron.train import checkpoint_folder, launch, worker
from mmi_megatron.train.storage import Folder

SOURCE, TARGET = "MMI_RESHARD_FROM", "MMI_RESHARD_TO"
"""Environment variables of the ranks: the checkpoint to read, the folder to write one in."""


def launch_reshard(config: Config, run: Path, out: str, step: int | None, ranks: int | None) -> int:
    """Rewrite a checkpoint of a run.

    Args:
        config: the run's, with the layout wanted.
        run: its folder.
        out: folder or URL of the new checkpoint.
        step: of the checkpoint, None for the newest whole one.
        ranks: processes, None for those of one replica.

    Returns:
        Exit code, 0 when the new checkpoint is whole.

    Raises:
        ConfigError: when there is no such checkpoint, it would be written over itself, or the layout
            does not fit.
    """
    folder = Folder(config.train.checkpoints or run / "checkpoints")
    found = checkpoint_folder.newest(folder) if step is None else folder / checkpoint_folder.name_of(step)
    if found is None or checkpoint_folder.fault(found) is not None:
        raise ConfigError(f"{folder}: no whole checkpoint" + ("" if step is None else f" of step {step}"))
    target = Folder(out)
    if target == folder or (
        target.local and folder.local and target.local.resolve() == folder.local.resolve()
    ):
        raise ConfigError(f"--out: {out} is where the run's own checkpoints are; name another folder")
    parallel = config.parallel
    count = ranks or parallel.tensor * parallel.pipeline * parallel.context
    # One row a micro-batch for each replica: nothing is trained, and the layout must fit.
    train = replace(config.train, rows=count, micro_rows=1)
    config = replace(config, train=train, parallel=replace(parallel, optimizer_copies=1))
    data_parallel_size(config, count)
    here = Path(target.local or run).absolute()
    os.environ |= {SOURCE: found.address, TARGET: str(target.local.absolute() if target.local else target)}
    try:
        return launch.start(config, here, count, "mmi_megatron.train.reshard", "mmi checkpoint reshard")
    finally:
        for name in (SOURCE, TARGET):
            del os.environ[name]


def rewrite(config: Config, out: Path, resume: bool, stop_after: int | None) -> None:
    """On a rank: load and save."""
    from data_pipeline.tokens import load_tokenizer
    from mmi_megatron.parallel import groups
    from mmi_megatron.parallel.model import build_stages
    from mmi_megatron.train import checkpoint
    from mmi_megatron.train.optimizer import build_optimizer, wrap_stages

    groups.initialize(config)
    try:
        stages = build_stages(config, load_tokenizer(config.data.tokenizer).special)
        wrapped = wrap_stages(stages, config)
        optimizer, scheduler = build_optimizer(wrapped, config)
        extra = checkpoint.load(wrapped, optimizer, scheduler, os.environ[SOURCE])
        path = checkpoint.save(wrapped, optimizer, scheduler, extra, os.environ[TARGET], extra["step"])
    finally:
        groups.destroy()
    if os.environ["RANK"] == "0":
        layout = {key: value for key, value in asdict(config.parallel).items() if value not in (1, [], 0)}
        print(f"{path} written for {os.environ['WORLD_SIZE']} ranks, {layout}")


if __name__ == "__main__":
    worker.main(work=rewrite)
