"""``mmi checkpoint``: look at checkpoints, check them, write them for another layout."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmi_megatron.cli import export, reported
from mmi_megatron.errors import ConfigError

app = typer.Typer(help="Checkpoints of a run: list, check, write for another layout.", no_args_is_help=True)

Where = Annotated[
    str,
    typer.Argument(
        help="Folder of a run, or of its checkpoints; a path or a URL (s3://bucket/run).",
        show_default=False,
    ),
]


app.command("export")(export)


@app.command("ls")
@reported
def list_all(where: Where) -> None:
    """List the checkpoints of a run, whole and broken."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from mmi_megatron.train import checkpoint_folder

    folder = _folder(where)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for heading in ("checkpoint", "MiB", "frozen MiB", "layout", "state"):
        table.add_column(heading, justify="right" if "MiB" in heading else "left")
    for path in checkpoint_folder.by_step(folder):
        fault = checkpoint_folder.fault(path)
        sizes = [f"{sum(part.files().values()) / 2**20:.1f}" for part in checkpoint_folder.parts_of(path)]
        layout = "-"
        if fault is None:
            layout = " ".join(
                f"{key} {value}" for key, value in checkpoint_folder.run_of(path)["layout"].items()
            )
        table.add_row(path.name, sizes[0], *(sizes[1:] or ["-"]), layout, fault or "whole")
    Console().print(table)


@app.command()
@reported
def verify(
    where: Where,
    step: Annotated[
        int | None, typer.Option(help="Only the checkpoint of this step.", show_default="all")
    ] = None,
) -> None:
    """Read every byte of every checkpoint and compare it with its hash."""
    from mmi_megatron.train import checkpoint_folder

    folder, damaged = _folder(where), False
    paths = checkpoint_folder.by_step(folder)
    if step is not None:
        paths = [path for path in paths if checkpoint_folder.step_of(path.name) == step]
    if not paths:
        raise ConfigError(f"{folder}: no such checkpoint")
    for path in paths:
        faults = checkpoint_folder.verify(path)
        damaged = damaged or bool(faults)
        typer.echo("\n".join(faults) if faults else f"{path.name}: every file is as it was written")
    raise typer.Exit(1 if damaged else 0)


@app.command()
@reported
def reshard(
    run: Annotated[Path, typer.Argument(help="Folder of a run.", show_default=False)],
    out: Annotated[str, typer.Option(help="Folder for the checkpoint, or a URL.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...", help="The layout, as in parallel.tensor=4.", show_default=False
        ),
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Processes of the layout.", show_default="one replica")
    ] = None,
    step: Annotated[
        int | None, typer.Option(help="Of which checkpoint.", show_default="the newest whole one")
    ] = None,
) -> None:
    """Write a checkpoint anew, divided for another layout. Any checkpoint can be read at any layout as it
    is; this one is then read faster, in large pieces. Needs no GPU; memory for the whole training state.
    """
    from mmi_megatron.settings import load_config
    from mmi_megatron.train.reshard import launch_reshard

    raise typer.Exit(launch_reshard(load_config(run / "config.yaml", overrides or []), run, out, step, ranks))


def _folder(where: str):
    from mmi_megatron.train import checkpoint_folder
    from mmi_megatron.train.storage import Folder

    folder = Folder(where)
    if checkpoint_folder.by_step(folder):
        return folder
    if folder.local is not None and (folder.local / "config.yaml").is_file():
        from mmi_megatron.settings import load_config

        if address := load_config(folder.local / "config.yaml").train.checkpoints:
            return Folder(address)
    return folder / "checkpoints"
