"""Web pages on disk: text and images in order, without navigation and icons, never the network."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

from bs4 import BeautifulSoup, Comment, NavigableString, Tag, XMLParsedAsHTMLWarning
from bs4.exceptions import ParserRejectedMarkup

from data_pipeline.errors import BadSample, DataError
from data_pipeline.formats import Document, Summary
from data_pipeline.importers.common import Drop, checked_image, read_inside, run_import

ICON = 64
"""An image with a side below this is an icon."""

MAX_PAGE_BYTES = 32 << 20
NAVIGATION = re.compile(
    r"(^|[-_])(nav|navbar|navheader|navfooter|navigation|toc|breadcrumbs?|menu|sidebar)($|[-_])"
)
SKIPPED = (
    "nav",
    "header",
    "footer",
    "script",
    "style",
    "noscript",
    "template",
    "form",
    "head",
    "svg",
    "iframe",
)
HOLDERS = ("div", "ul", "ol", "dl", "table", "section", "aside", "p", "span")
BLOCKS = (
    *("address", "article", "aside", "blockquote", "body", "caption", "center", "dd", "details", "div", "dl"),
    *(
        "dt",
        "fieldset",
        "figcaption",
        "figure",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "h6",
        "hr",
        "html",
        "li",
        "main",
    ),
    *(
        "ol",
        "p",
        "pre",
        "section",
        "summary",
        "table",
        "tbody",
        "td",
        "tfoot",
        "th",
        "thead",
        "tr",
        "ul",
        "br",
    ),
)


def import_html(folder: Path | str, out: Path | str) -> Summary:
    """Import every ``*.html`` and ``*.htm`` under a folder, one document a page with an image.

    Only files under the folder are read: addresses on the network, absolute ones, and paths or
    links that lead outside are counted drops.

    Raises:
        DataError: when the folder holds no pages, or no page with an image is kept.
    """
    root = Path(folder)
    pages = _pages(root)
    if not pages:
        raise DataError(f"{folder}: no *.html or *.htm in it")

    def documents(drop: Drop) -> Iterator[Document]:
        for page in pages:
            try:
                document = read_page(root, page, drop)
            except BadSample as bad:
                drop(bad.reason)
            else:
                yield document

    return run_import(documents, out, folder)


def read_page(root: Path, page: Path, drop: Drop) -> Document:
    """Read one page; its paragraphs are pieces of text that end with a line break.

    Raises:
        BadSample: when the page cannot be read or keeps no image.
    """
    soup = _parse(root, page)
    title = " ".join(soup.title.get_text().split()) if soup.title else ""
    base = soup.find("base", href=True)
    start = str(base["href"]) if base else ""
    for tag in soup.find_all(_is_clutter):
        if not tag.decomposed:
            for _ in tag.find_all("img"):
                drop("image in navigation")
            tag.decompose()
    content: list[str | bytes] = []
    words: list[str] = []
    block: Tag | None = None

    def flush() -> None:
        text = " ".join("".join(words).split())
        words.clear()
        if text:
            content.append(text + "\n")

    for node in soup.descendants:
        if isinstance(node, Tag) and node.name == "img":
            flush()
            try:
                content.append(checked_image(_read(root, page, start, _source(node)), ICON))
            except BadSample as bad:
                drop(bad.reason)
        elif isinstance(node, Tag) and node.name in BLOCKS:
            flush()
        elif isinstance(node, NavigableString) and type(node) is NavigableString:
            own = node.find_parent(BLOCKS)
            if own is not block:
                flush()
                block = own
            words.append(str(node))
    flush()
    if not any(isinstance(piece, bytes) for piece in content):
        raise BadSample("page without an image")
    name = page.relative_to(root).with_suffix("").as_posix()
    return Document(name, content, {"title": title, "page": page.relative_to(root).as_posix()})


def _pages(root: Path) -> list[Path]:
    found = []
    for folder, _, names in os.walk(root):
        found += [Path(folder, name) for name in names if name.lower().endswith((".html", ".htm"))]
    return sorted(found)


def _parse(root: Path, page: Path) -> BeautifulSoup:
    if not page.resolve().is_relative_to(root.resolve()):
        raise BadSample("page outside the folder", str(page))
    if not page.is_file() or page.stat().st_size > MAX_PAGE_BYTES:
        raise BadSample("page cannot be read", "no plain file, or too large")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", XMLParsedAsHTMLWarning)
            soup = BeautifulSoup(page.read_bytes(), "lxml")
    except (OSError, ParserRejectedMarkup, RecursionError) as error:
        raise BadSample("page cannot be read", str(error)) from None
    for comment in soup.find_all(string=lambda text: isinstance(text, Comment)):
        comment.extract()
    return soup


def _is_clutter(tag: Tag) -> bool:
    """Navigation, decoration and what is no text."""
    if tag.name in SKIPPED or tag.get("role") in ("navigation", "banner", "contentinfo"):
        return True
    names = [*(tag.get("class") or []), str(tag.get("id") or "")]
    if tag.name in HOLDERS and any(NAVIGATION.search(name.lower()) for name in names):
        return True
    return tag.name in ("ul", "ol", "dl", "menu") and _is_link_list(tag)


def _is_link_list(tag: Tag) -> bool:
    """Three links or more that make up nearly all of the text."""
    links = tag.find_all("a", href=True)
    if len(links) < 3:
        return False
    total = len("".join(tag.get_text().split()))
    linked = sum(len("".join(link.get_text().split())) for link in links)
    return total > 0 and linked >= 0.8 * total


def _source(image: Tag) -> str:
    source = str(image.get("src") or "").strip()
    if not source:
        raise BadSample("image without an address")
    return source


def _read(root: Path, page: Path, base: str, source: str) -> bytes:
    """Read an image of a page from a file under the root; ``base`` is the page's own, or empty."""
    try:
        address = urljoin(base, source)
        parts = urlsplit(address)
    except ValueError as error:
        raise BadSample("image without an address", str(error)) from None
    if parts.scheme == "data":
        raise BadSample("image inside the page")
    if parts.scheme == "file" or (not parts.netloc and parts.path.startswith(("/", "\\"))):
        raise BadSample("image outside the folder", address)
    if parts.scheme or parts.netloc:
        raise BadSample("image on the network", address)
    return read_inside(root, page.parent / unquote(parts.path))
