"""``mmi data bench``, ``serve``, ``filter``, ``dedup`` and ``recaption``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from data_pipeline.formats import Summary
from data_pipeline.reporting import bar, mendable
from data_pipeline.settings import DataSettings

Source = Annotated[str, typer.Argument(help="Folder or URL of shards.", show_default=False)]
Out = Annotated[
    str, typer.Option(help="Folder or URL of shards to write; a job in it goes on.", show_default=False)
]
Function = Annotated[str, typer.Option(help="module:function, importable here and on the cluster.")]
Workers = Annotated[int, typer.Option(min=1, help="Shards worked on at a time.")]
Cluster = Annotated[str, typer.Option(help="auto, local or host:port of the Ray cluster.")]
Json = Annotated[bool, typer.Option("--json", help="Print the summary as one JSON object.")]


def bench(
    executors: Annotated[str, typer.Option(help="Which to measure.")] = "inline,threads,processes",
    images: Annotated[int, typer.Option(help="Of the shards that are made for it.")] = 3000,
    workers: Annotated[int, typer.Option(help="Of each executor.")] = 2,
    decoder: Annotated[str, typer.Option(help="auto, native, turbo or pillow.")] = "auto",
    rounds: Annotated[int, typer.Option(help="Turns of the raw limit and delivery.")] = 12,
    folder: Annotated[Path | None, typer.Option(help="Where the shards are kept, to measure again.")] = None,
    as_json: Json = False,
) -> None:
    """Rates of reading, decoding, packing and delivery against this machine's raw decode limit."""
    from data_pipeline.bench import run

    with mendable():
        found = run(executors.split(","), images, workers, decoder, rounds, folder)
    if as_json:
        typer.echo(json.dumps(found))
        return
    table = Table("what", "unit", "a CPU-second", "a second", title=found["decoder"])
    for row in found["rates"]:
        table.add_row(row["name"], row["unit"], f"{row['a CPU-second']:,.0f}", f"{row['a second']:,.0f}")
    console = Console()
    console.print(table)
    ratios = Table("delivery", "over", "median", "quartiles")
    for executor, own in found["ratios"].items():
        for name, (low, median, high) in own.items():
            ratios.add_row(executor, name, f"{median:.2f}", f"{low:.2f} to {high:.2f}")
    console.print(ratios)


def serve(
    address: Annotated[
        str | None, typer.Option(help="host:port of the cluster to join; without it one starts here.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Actors that may decode here at a time.")] = 2,
    port: Annotated[int, typer.Option(help="Of a cluster that starts here.")] = 6379,
) -> None:
    """Make this machine part of the data service (Ray), until Ctrl-C. For trusted networks only."""
    from data_pipeline.ray_cluster import serve as join

    with mendable():
        code = join(address, workers, port)
    raise typer.Exit(code)


def filter_(
    source: Source,
    out: Out,
    function: Function,
    workers: Workers = 2,
    ray: Cluster = "local",
    as_json: Json = False,
) -> Summary:
    """Keep the documents that a function accepts: it gives None, or the reason to leave one out."""
    from data_pipeline.ray_jobs import filter_corpus

    return _job(filter_corpus, ray, workers, source, out, function=function)


def recaption(
    source: Source,
    out: Out,
    function: Function,
    batch: Annotated[int, typer.Option(min=1, help="Documents given to the function at a time.")] = 32,
    workers: Workers = 2,
    ray: Cluster = "local",
    as_json: Json = False,
) -> Summary:
    """Change documents through a function of a list of them, a model that describes images, say."""
    from data_pipeline.ray_jobs import recaption_corpus

    return _job(recaption_corpus, ray, workers, source, out, function=function, batch=batch)


def dedup(
    source: Source,
    out: Out,
    distance: Annotated[int, typer.Option(help="Bits of 64 in which the hashes may differ.")] = 4,
    workers: Workers = 2,
    ray: Cluster = "local",
    as_json: Json = False,
) -> Summary:
    """Leave out images that look like an earlier one (perceptual hash)."""
    from data_pipeline.ray_jobs import dedup_corpus

    return _job(dedup_corpus, ray, workers, source, out, distance=distance)


def index_on(address: str, workers: int) -> Callable:
    """``ray_jobs.index_corpus`` on that cluster, which this process joins."""
    from data_pipeline.ray_cluster import connect
    from data_pipeline.ray_jobs import index_corpus

    connect(DataSettings(ray_address=address, workers=workers))
    return index_corpus


def _job(
    job: Callable[..., Summary], address: str, workers: int, source: str, out: str, **options: Any
) -> Summary:
    """Run a function of ``ray_jobs`` on a cluster, with a progress bar."""
    from data_pipeline.ray_cluster import connect

    connect(DataSettings(ray_address=address, workers=workers))
    with bar("shards") as progress:
        return job(source, out, workers=workers, progress=progress, **options)
