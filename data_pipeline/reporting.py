"""What the commands print: summaries, errors in one line, progress bars."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from data_pipeline.errors import DataError
from data_pipeline.formats import Summary

P = ParamSpec("P")


@contextmanager
def mendable() -> Iterator[None]:
    """An error the user can mend is one line and exit code 1."""
    try:
        yield
    except (DataError, OSError) as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(1) from None


def reported(command: Callable[P, Summary]) -> Callable[P, None]:
    """Print a command's summary, and what is ``mendable`` as such."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        with mendable():
            summary = command(*args, **kwargs)
        if kwargs["as_json"]:
            typer.echo(json.dumps(summary.as_dict(), ensure_ascii=False))
        else:
            show(summary)

    return run


def show(summary: Summary) -> None:
    """Print a summary as a table."""
    table = Table("kept", "number")
    table.add_row("documents", f"{summary.documents:,}")
    table.add_row("images", f"{summary.images:,}")
    for name, value in summary.notes.items():
        table.add_row(name, f"{value:,}" if isinstance(value, int) else str(value))
    console = Console()
    console.print(table)
    if summary.dropped:
        dropped = Table("dropped, by reason", "number")
        for reason, count in sorted(summary.dropped.items(), key=lambda item: (-item[1], item[0])):
            dropped.add_row(reason, f"{count:,}")
        console.print(dropped)


@contextmanager
def bar(what: str) -> Iterator[Callable[[int, int | None], None]]:
    """A progress bar on stderr; yields what is to be called with the number done and the total."""
    columns = (
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(what, total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)
