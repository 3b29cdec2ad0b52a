"""``mmi data``: corpora to shards, and the tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from data_pipeline import service_cli
from data_pipeline.corpus import make_index
from data_pipeline.errors import BadSample, DataError
from data_pipeline.formats import Summary, find_shards, parse_content, read_range, scan_file
from data_pipeline.importers.html import import_html
from data_pipeline.importers.mmc4 import Filters, import_mmc4
from data_pipeline.importers.obelics import import_obelics
from data_pipeline.importers.pairs import import_pairs
from data_pipeline.inspect import inspect
from data_pipeline.reporting import bar, reported
from data_pipeline.settings import DataSettings, SourceSettings
from data_pipeline.storybook import write_stories
from data_pipeline.tokens import train_tokenizer

app = typer.Typer(help="Documents to training data.", no_args_is_help=True, pretty_exceptions_enable=False)

Folder = Annotated[Path, typer.Argument(help="Folder to import.", show_default=False)]
Out = Annotated[Path, typer.Option(help="Folder of shards to write; must hold none yet.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print the summary as one JSON object.")]


@app.command("import-html")
@reported
def html(folder: Folder, out: Out, as_json: Json = False) -> Summary:
    """Import web pages on disk: text and images in order, without navigation and icons."""
    return import_html(folder, out)


@app.command("import-mmc4")
@reported
def mmc4(
    folder: Folder,
    out: Out,
    similarity: Annotated[float, typer.Option(help="Least CLIP similarity of an image.")] = 0.24,
    max_images: Annotated[int, typer.Option(min=1, help="Images of a document at most.")] = 6,
    drop_single: Annotated[float, typer.Option(help="Share of one-image documents to drop.")] = 0.5,
    as_json: Json = False,
) -> Summary:
    """Import MMC4 with the paper's filters."""
    return import_mmc4(folder, out, Filters(similarity, max_images, drop_single))


@app.command("import-obelics")
@reported
def obelics(folder: Folder, out: Out, as_json: Json = False) -> Summary:
    """Import OBELICS from JSON lines or Parquet."""
    return import_obelics(folder, out)


@app.command("import-pairs")
@reported
def pairs(
    folder: Folder,
    out: Out,
    min_tokens: Annotated[int, typer.Option(min=0, help="Drop captions of fewer tokens.")] = 0,
    tokenizer: Annotated[Path | None, typer.Option(help="tokenizer.json to count with.")] = None,
    as_json: Json = False,
) -> Summary:
    """Import image-text pairs in img2dataset's layout."""
    return import_pairs(folder, out, min_tokens, tokenizer)


@app.command("download")
@reported
def download_lists(
    lists: Annotated[Path, typer.Argument(help="Lists of URLs: Parquet or JSON lines.", show_default=False)],
    out: Annotated[
        Path, typer.Option(help="Folder of shards; a download in it goes on.", show_default=False)
    ],
    connections: Annotated[int, typer.Option(min=1, help="Under way in all.")] = 64,
    per_host: Annotated[int, typer.Option(min=1, help="Under way to one host.")] = 4,
    timeout: Annotated[float, typer.Option(help="Seconds for one file.")] = 20.0,
    retries: Annotated[int, typer.Option(min=0, help="Of a failure that may pass.")] = 2,
    max_bytes: Annotated[int, typer.Option(help="Of a file.")] = 20 << 20,
    smallest: Annotated[int, typer.Option(help="Pixels of the shorter side at least.")] = 64,
    recipe: Annotated[
        str | None, typer.Option(help="Filter as the paper: mmc4, laion-2b, laion-coco or captioned.")
    ] = None,
    aesthetic: Annotated[float | None, typer.Option(help="Least aesthetics score.")] = None,
    min_tokens: Annotated[int | None, typer.Option(help="Drop captions of fewer tokens.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="tokenizer.json to count them with.")] = None,
    unsafe: Annotated[float, typer.Option(help="Most probability of NSFW (punsafe).")] = 0.5,
    watermark: Annotated[float, typer.Option(help="Most probability of a watermark (pwatermark).")] = 0.8,
    similarity: Annotated[float, typer.Option(help="Least CLIP similarity of a pair.")] = 0.0,
    license: Annotated[
        list[str] | None, typer.Option(help="Keep this license only; may be repeated.")
    ] = None,
    ignore_opt_out: Annotated[bool, typer.Option("--ignore-opt-out", help="Take what says no, too.")] = False,
    allow: Annotated[
        list[str] | None, typer.Option(help="Network to allow beyond public addresses, as 10.0.0.0/8.")
    ] = None,
    documents_per_shard: Annotated[int, typer.Option(min=1, help="Listed documents of a shard.")] = 1000,
    as_json: Json = False,
) -> Summary:
    """Download lists of URLs (LAION, MMC4, OBELICS) to shards. Goes on where it was stopped."""
    try:
        from data_pipeline.download.run import RECIPES, Download, Filters, Limits, download
    except ModuleNotFoundError as error:
        raise DataError(f"downloads need {error.name}: pip install mmi-megatron[data-service]") from None
    if recipe is not None and recipe not in RECIPES:
        raise DataError(f"--recipe {recipe}: none of {', '.join(RECIPES)}")
    chosen = {"aesthetic": aesthetic, "min_tokens": min_tokens, "tokenizer": tokenizer and str(tokenizer)}
    own = RECIPES.get(recipe or "", {}) | {name: value for name, value in chosen.items() if value is not None}
    wanted = Download(
        lists,
        out,
        Filters(unsafe, watermark, similarity, license or [], not ignore_opt_out, **own),
        limits=Limits(
            connections, per_host, timeout, retries, max_bytes, smallest, opt_out=not ignore_opt_out
        ),
        allow=allow or [],
        documents_per_shard=documents_per_shard,
    )
    with bar("documents") as progress:
        return download(wanted, lambda documents: progress(documents, None))


@app.command("index")
@reported
def index(
    shards: Annotated[str, typer.Argument(help="Folder or URL of shards.", show_default=False)],
    tokenizer: Annotated[Path, typer.Option(help="tokenizer.json of the runs to come.", show_default=False)],
    holdout: Annotated[float, typer.Option(help="Fraction held out for validation.")] = 0.01,
    workers: Annotated[int, typer.Option(min=1, help="Processes, or shards at a time on a cluster.")] = 2,
    ray: Annotated[
        str | None, typer.Option(help="Work on a Ray cluster: auto, local or host:port.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> Summary:
    """Index shards: a Parquet file beside each, and a manifest. Goes on where it was stopped."""
    make = make_index if ray is None else service_cli.index_on(ray, workers)
    with bar("shards") as progress:
        found, digest = make(shards, str(tokenizer), holdout, workers=workers, progress=progress)
    summary = Summary(sum(shard.documents for shard in found), sum(shard.images for shard in found))
    for shard in found:
        summary.dropped.update(json.loads(shard.reasons))
    tokens, held = sum(shard.tokens for shard in found), sum(shard.heldout for shard in found)
    summary.notes = {"shards": len(found), "text tokens": tokens, "held out": held, "manifest": digest}
    return summary


@app.command("inspect")
@reported
def inspect_shards(
    shards: Annotated[str, typer.Argument(help="Folder or URL of shards.", show_default=False)],
    tokenizer: Annotated[Path, typer.Option(help="tokenizer.json of the runs to come.", show_default=False)],
    out: Annotated[Path, typer.Option(help="HTML page to write.", show_default=False)],
    kind: Annotated[str, typer.Option(help="interleaved or pairs.")] = "interleaved",
    rows: Annotated[int, typer.Option(min=1, help="Packed rows to show.")] = 8,
    context_length: Annotated[int, typer.Option(help="Tokens of a row.")] = 2048,
    image_tokens: Annotated[int, typer.Option(help="Placeholders of an image.")] = 64,
    as_json: Json = False,
) -> Summary:
    """Show documents as a run sees them, and statistics, on an HTML page."""
    settings = DataSettings(
        sources=[SourceSettings(Path(shards).name or "source", shards, 1.0, kind)],
        tokenizer=str(tokenizer),
        context_length=context_length,
        image_tokens=image_tokens,
        image_size=64,
        drawn_size=64,
        window=256,
    )
    return inspect(settings, out, rows)


@app.command("storybook")
@reported
def storybook(
    out: Out,
    stories: Annotated[int, typer.Option(help="How many.")] = 2000,
    seed: Annotated[int, typer.Option(help="Other stories for another seed.")] = 0,
    size: Annotated[int, typer.Option(help="Pixels a side of a picture.")] = 32,
    as_json: Json = False,
) -> Summary:
    """Make small illustrated stories with known truth."""
    return write_stories(out, stories, seed, size)


@app.command("tokenizer")
@reported
def tokenizer(
    shards: Annotated[
        list[Path], typer.Argument(help="Folders of shards to learn from.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="tokenizer.json to write.", show_default=False)],
    vocab: Annotated[int, typer.Option(help="Ids in all.")] = 32000,
    as_json: Json = False,
) -> Summary:
    """Train a byte-level BPE tokenizer on the text of shards."""
    return fit_tokenizer(shards, out, vocab)


def fit_tokenizer(shards: list[Path], out: Path, vocabulary: int) -> Summary:
    """Train a tokenizer on the documents of shards and write it.

    Returns:
        The documents and images seen, and the documents left out by reason.

    Raises:
        DataError: when there are no shards, or no text in them.
    """
    summary = Summary()

    def texts() -> Iterator[str]:
        for shard in [shard for folder in shards for shard, _ in find_shards(str(folder), folder.name)]:
            for _, members in scan_file(shard):
                head = next((member for member in members if member.name == "json"), None)
                try:
                    if head is None or head.problem:
                        raise BadSample(head.problem if head else members[0].problem or "no json")
                    pieces, _ = parse_content(read_range(shard, head.offset, head.size))
                except BadSample as bad:
                    summary.dropped[bad.reason] += 1
                    continue
                summary.documents += 1
                summary.images += sum(kind == "image" for kind, _ in pieces)
                yield from (text for kind, text in pieces if kind == "text")

    trained = train_tokenizer(texts(), vocabulary)
    if summary.documents == 0:
        raise DataError(f"{shards[0]}: no usable document to learn from")
    out.parent.mkdir(parents=True, exist_ok=True)
    trained.save(out)
    return summary


app.command("bench")(service_cli.bench)
app.command("serve")(service_cli.serve)
app.command("filter")(reported(service_cli.filter_))
app.command("recaption")(reported(service_cli.recaption))
app.command("dedup")(reported(service_cli.dedup))
