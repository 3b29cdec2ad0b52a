"""Documents as a run sees them, on one HTML page: tokens, images, packing and loss masks, and statistics.

The page needs nothing but itself: images are in it, plots are inline SVG. Everything from the data is
escaped, and images are decoded and encoded anew, so a hostile corpus can be looked at.
"""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from data_pipeline.batch import IGNORED, PADDING, Batch
from data_pipeline.corpus import Source
from data_pipeline.errors import DataError
from data_pipeline.formats import Summary
from data_pipeline.index import read_sidecar
from data_pipeline.plan import SAMPLE_BITS
from data_pipeline.settings import DataSettings
from data_pipeline.stream import Stream

SHARDS = 64
"""Shards that the statistics are taken from at most, evenly chosen."""
BARS = 24
WIDTH, HEIGHT = 420, 120
STYLE = """
body{font:14px/1.45 system-ui,sans-serif;margin:2em auto;max-width:70em;color:#222}
h1{font-size:1.5em} h2{font-size:1.15em;margin-top:2em} table{border-collapse:collapse}
td{padding:.15em .8em;text-align:right} td:first-child{text-align:left}
.row{border:1px solid #bbb;margin:1em 0;padding:.6em}
.doc{border-left:4px solid #59c;padding-left:.6em;margin:.5em 0;overflow-wrap:anywhere}
.pad{color:#999;border-left-color:#ddd} .t{border-radius:2px;padding:0 1px}
.t:nth-child(odd){background:#eef4fa} .t:nth-child(even){background:#dde9f4}
.off{background:#f1f1f1!important;color:#999} .s{color:#b33;font-size:.85em}
img{height:64px;vertical-align:middle;margin:2px;border:2px solid #aaa} img.drawn{border-color:#2a8}
figure{display:inline-block;margin:.5em 1.5em .5em 0} figcaption{font-size:.9em} .bar{fill:#59c}
.fill{height:8px;background:#ddd} .fill div{height:8px;background:#59c} text{font-size:10px;fill:#555}
"""


SHOWN = ["tokens", "image_sizes", "widths", "heights", "text_bytes", "language", "flags"]
"""Columns of an index that statistics are made of."""


def inspect(settings: DataSettings, out: Path, rows: int = 8) -> Summary:
    """Write the page of a source.

    Args:
        settings: with one source; what a run would have.
        out: HTML file to write.
        rows: packed rows to show.

    Returns:
        Documents and images of the source, and its bad documents by reason.

    Raises:
        DataError: when the shards cannot be used or the page cannot be written.
    """
    stream = Stream(replace(settings, executor="inline", failure_limit=0.999), global_rows=rows)
    (source,) = stream.corpus.sources
    step = stream.next()
    batch = step.batches(0, 1, rows, 1)[0]
    keys = {part.number: source.entry(part.number).key for row in step.rows for part in row}
    body = [
        f"<h1>{escape(source.settings.path)}</h1>",
        _facts(stream, source),
        "<h2>Statistics</h2>",
        _statistics(source),
        f"<h2>{rows} rows as they are trained on</h2>",
        "<p>Each row holds documents that do not see each other. Grey tokens are not predicted; a green "
        "frame marks an image that is drawn.</p>",
        *(_row(stream, batch, row, keys) for row in range(rows)),
    ]
    page = f'<!doctype html><meta charset="utf-8"><title>{escape(source.settings.name)}</title>'
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(f"{page}<style>{STYLE}</style>{''.join(body)}", encoding="utf-8", errors="replace")
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error})") from None
    dropped = Counter(stream.ledger.counts(source.settings.name))
    images = sum(shard.images for shard in source.shards)
    return Summary(len(source), images, dropped, {"page": str(out)})


def _facts(stream: Stream, source: Source) -> str:
    lines = {
        "documents": len(source),
        "held out": int(source.counts("heldout").sum()),
        "images": sum(shard.images for shard in source.shards),
        "text tokens": sum(shard.tokens for shard in source.shards),
        "shards": len(source.shards),
        "bytes": sum(shard.stamp.size for shard in source.shards),
    }
    cells = [f"<tr><td>{name}<td>{value:,}" for name, value in lines.items()]
    cells += [f"<tr><td>manifest<td>{stream.corpus.manifest}"]
    for reason, count in stream.ledger.counts(source.settings.name).items():
        cells.append(f"<tr><td>left out: {escape(reason)}<td>{count:,}")
    return f"<table>{''.join(cells)}</table>"


def _statistics(source: Source) -> str:
    chosen = np.unique(np.linspace(0, len(source.shards) - 1, min(SHARDS, len(source.shards))).astype(int))
    tables = []
    for shard in chosen.tolist():
        found = read_sidecar(source.storage, source.shards[shard].url, source.tokenizer, SHOWN)
        if found is not None:
            tables.append(found[0].slice(0, found[1]["documents"]))
    if not tables:
        return "<p>The indexes of this source are not kept, so there are no statistics.</p>"
    table = pa.concat_tables(tables)
    images = [len(sizes) for sizes in table["image_sizes"].to_pylist()]
    widths, heights = (table[name].combine_chunks().flatten().to_numpy() for name in ("widths", "heights"))
    kilobytes = table["image_sizes"].combine_chunks().flatten().to_numpy() / 1024
    plots = [
        _histogram("tokens of text a document", table["tokens"].to_numpy()),
        _histogram("images a document", np.array(images)),
        _histogram("pixels of an image's shorter side", np.minimum(widths, heights)),
        _histogram("width over height of an image", widths / np.maximum(heights, 1)),
        _histogram("kilobytes of an image", kilobytes),
        _histogram("bytes of text a document", table["text_bytes"].to_numpy()),
    ]
    languages = Counter(language or "unknown" for language in table["language"].to_pylist())
    flags = Counter(flag for own in table["flags"].to_pylist() for flag in own)
    plots.append(_named("languages", languages))
    if flags:
        plots.append(_named("flags", flags))
    note = f"<p>Over {len(table):,} documents of {len(tables):,} of {len(source.shards):,} shards.</p>"
    return note + "".join(plots)


def _histogram(title: str, values: np.ndarray) -> str:
    """A histogram as SVG: up to the 99th percentile, the rest in the last bar."""
    if len(values) == 0:
        return ""
    low, high = float(values.min()), float(np.percentile(values, 99))
    whole = np.issubdtype(values.dtype, np.integer)
    bars = min(BARS, int(high - low) + 1) if whole else BARS
    edges = np.linspace(low, high + whole or low + 1, bars + 1)
    counts, _ = np.histogram(np.minimum(values, high), edges)
    about = f"median {np.median(values):,.4g}, mean {values.mean():,.4g}, most {values.max():,.4g}"
    return _figure(title, about, counts.tolist(), [f"{low:,.4g}", f"{high:,.4g}"])


def _named(title: str, counts: Counter[str]) -> str:
    most = counts.most_common(12)
    cells = "".join(f"<tr><td>{escape(name)}<td>{count:,}" for name, count in most)
    rest = counts.total() - sum(count for _, count in most)
    more = f"<tr><td>others<td>{rest:,}" if rest else ""
    return f"<figure><figcaption>{title}</figcaption><table>{cells}{more}</table></figure>"


def _figure(title: str, about: str, counts: Sequence[int], ends: Sequence[str]) -> str:
    step, top = WIDTH / len(counts), max(*counts, 1)
    bars = "".join(
        f'<rect class="bar" x="{i * step + 0.5:.1f}" y="{HEIGHT * (1 - n / top):.1f}" width="{step - 1:.1f}" '
        f'height="{HEIGHT * n / top:.1f}"><title>{n:,}</title></rect>'
        for i, n in enumerate(counts)
    )
    axis = f'<text x="0" y="{HEIGHT + 12}">{ends[0]}</text>'
    axis += f'<text x="{WIDTH}" y="{HEIGHT + 12}" text-anchor="end">{ends[1]}</text>'
    svg = f'<svg width="{WIDTH}" height="{HEIGHT + 16}" role="img">{bars}{axis}</svg>'
    return f"<figure><figcaption>{title}: {about}</figcaption>{svg}</figure>"


def _row(stream: Stream, batch: Batch, row: int, keys: dict[int, str]) -> str:
    first, last = batch.row_starts[row : row + 2].tolist()
    starts = batch.cu_seqlens[:-1]
    own = np.flatnonzero((starts >= first) & (starts < last)).tolist()
    filled = sum(int(np.diff(batch.cu_seqlens)[d]) for d in own if batch.source[d] != PADDING)
    share = filled / (last - first)
    documents = "".join(_document(stream, batch, number, keys) for number in own)
    head = f"row {row}: {len(own)} runs, {filled:,} of {last - first:,} tokens"
    return (
        f'<div class="row"><b>{head}</b><div class="fill"><div style="width:{100 * share:.1f}%"></div></div>'
        f"{documents}</div>"
    )


def _document(stream: Stream, batch: Batch, number: int, keys: dict[int, str]) -> str:
    start, stop = batch.cu_seqlens[number : number + 2].tolist()
    if batch.source[number] == PADDING:
        return f'<div class="doc pad">{stop - start:,} tokens of padding</div>'
    special, tokenizer = stream.tokenizer.special, stream.tokenizer
    names = {special.bos: "BOS", special.eos: "EOS", special.boi: "BoI", special.pad: "PAD"}
    tokens, labels = batch.tokens[start:stop].tolist(), batch.labels[start:stop].tolist()
    image = int((batch.tokens[:start] == special.boi).sum())
    pieces = []
    for at, token in enumerate(tokens):
        # A label stands where its token is predicted from: one place before it.
        predicted = at > 0 and labels[at - 1] != IGNORED
        shade = "t" if predicted else "t off"
        if token == special.image:
            continue
        if token in names:
            pieces.append(f'<span class="{shade} s">{names[token]}</span>')
        else:
            pieces.append(f'<span class="{shade}">{escape(tokenizer.decode([token]))}</span>')
        if token == special.boi:
            pieces.append(_image(batch, image))
            image += 1
    key = keys.get(int(batch.sample_ids[number]) & ((1 << SAMPLE_BITS) - 1), "")
    predicted = sum(label != IGNORED for label in labels)
    head = f"<small>{escape(key)}: {stop - start:,} tokens, {predicted:,} predicted</small>"
    return f'<div class="doc">{head}<br>{"".join(pieces)}</div>'


def _image(batch: Batch, number: int) -> str:
    file = io.BytesIO()
    Image.fromarray(batch.images[number]).save(file, "PNG")
    shade = ' class="drawn"' if number in batch.drawn_index else ""
    return (
        f'<img{shade} alt="image" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'
    )
