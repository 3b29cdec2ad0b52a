"""A document as one HTML page, and as the JSON it could be read from."""

from __future__ import annotations

import base64
import html
import json
from pathlib import Path
from string import Template

from data_pipeline.decode import open_image
from data_pipeline.formats import Document, members_of, suffix_of

TYPES = {"jpg": "image/jpeg", "png": "image/png", "gif": "image/gif", "webp": "image/webp"}

PAGE = Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
  body { margin: 0; background: #f4f1ea; color: #26221c; font: 19px/1.6 Georgia, "Times New Roman", serif; }
  main { max-width: 34rem; margin: 3rem auto; padding: 2.5rem 3rem; background: #fffdf8;
         border-radius: 4px; box-shadow: 0 1px 2px #0002, 0 8px 32px #0001; }
  p { margin: 0 0 1rem; white-space: pre-line; }
  .given { color: #8a8172; }
  figure { margin: 1.5rem 0; text-align: center; }
  img { width: 16rem; max-width: 100%; border-radius: 3px; box-shadow: 0 1px 6px #0003; }
  img.small { image-rendering: pixelated; }
  figcaption, footer { font: 13px/1.5 system-ui, sans-serif; color: #8a8172; }
  footer { margin-top: 2rem; padding-top: 1rem; border-top: 1px solid #e6dfd0; }
</style>
</head>
<body>
<main>
$body
<footer>$footer</footer>
</main>
</body>
</html>
""")
SMALL = 128
"""Pictures of fewer pixels a side are shown with sharp pixels."""
ANY_SIZE = 1 << 62


def write_page(document: Document, path: Path, facts: dict[str, object] | None = None) -> Path:
    """Write ``path``, an HTML page that needs no other file, and beside it ``<stem>.json`` with its
    images in ``<stem>_images/``, in the format of a prompt.

    Args:
        document: its metadata's ``prompt`` says how many pieces were given and not generated.
        path: of the page.
        facts: what the footer tells, in order.

    Returns:
        The path of the JSON.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(as_html(document, facts or {}), encoding="utf-8")
    folder = path.with_name(f"{path.stem}_images")
    (_, blob), *images = members_of(document)
    value = json.loads(blob)
    for piece in value["content"]:
        if "image" in piece:
            piece["image"] = f"{folder.name}/{piece['image']}"
    if images:
        folder.mkdir(exist_ok=True)
    for name, image in images:
        (folder / name).write_bytes(image)
    target = path.with_suffix(".json")
    target.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")
    return target


def as_html(document: Document, facts: dict[str, object]) -> str:
    """The page; text is escaped, pictures are data URIs."""
    given = document.metadata.get("prompt", 0)
    blocks: list[str] = []
    words: list[str] = []
    for number, piece in enumerate([*document.content, b""]):
        if isinstance(piece, str):
            kind = "given" if number < given else "new"
            words.append(f'<span class="{kind}">{html.escape(piece)}</span>')
            continue
        if words:
            blocks.append(f"<p>{''.join(words)}</p>")
            words = []
        if piece:
            blocks.append(_figure(piece, number < given))
    told = " · ".join(f"{html.escape(name)} {html.escape(str(value))}" for name, value in facts.items())
    title = html.escape(str(document.key))
    return PAGE.substitute(title=title, body="\n".join(blocks), footer=told)


def _figure(blob: bytes, given: bool) -> str:
    data = base64.b64encode(blob).decode("ascii")
    caption = "<figcaption>given</figcaption>" if given else ""
    source = f"data:{TYPES.get(suffix_of(blob), 'application/octet-stream')};base64,{data}"
    small = ' class="small"' if max(open_image(blob, ANY_SIZE).size) < SMALL else ""
    return f'<figure><img{small} alt="" src="{source}">{caption}</figure>'
