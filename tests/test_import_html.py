"""Illustrated pages as documents: what is kept in which order, what is left out and counted."""

import os
import socket

import pytest

from data_pipeline.importers.html import import_html
from tests.data_corpora import cut_jpeg, huge_png, picture, read_corpus

BIG = picture(5, (70, 80))


def page(tmp_path, body, name="page.html", **files):
    folder = tmp_path / "in"
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(
        f"<html><head><title>T</title></head><body>{body}</body></html>", encoding="utf-8"
    )
    for file, blob in {"big.png": BIG, **{k.replace("__", "."): v for k, v in files.items()}}.items():
        (folder / file).write_bytes(blob)
    return folder


def dropped(tmp_path, body, **files):
    """Drops of a page with one good image and ``body``."""
    folder = page(tmp_path, f"<p>text</p><img src='big.png'>{body}", **files)
    summary = import_html(folder, tmp_path / "out")
    assert summary.documents == 1
    return summary.images, dict(summary.dropped)


def test_html_keeps_text_and_images_in_order(tmp_path):
    second = picture(9, (64, 64))
    folder = page(
        tmp_path,
        """<h1>Head<em>ing</em></h1><p>One &amp; <b>two</b>
        lines<br>three</p><!-- no --><p><img src="big.png"> beside <a href="x.html">a link</a></p>
        <ul><li>a</li><li>b</li></ul><div>loose<p>nested</p>tail</div><script>no()</script>
        <table><tr><td>c1</td><td>c2</td></tr></table><img src="sub%20dir/b.png"/>end""",
    )
    (folder / "sub dir").mkdir()
    (folder / "sub dir" / "b.png").write_bytes(second)
    summary = import_html(folder, tmp_path / "out")
    assert summary.as_dict() == {"documents": 1, "images": 2, "dropped": {}}
    text = ["Heading", "One & two lines", "three", BIG, "beside a link", "a", "b", "loose", "nested", "tail"]
    expected = [*text, "c1", "c2", second, "end"]
    assert read_corpus(tmp_path / "out") == {
        "page": [x if isinstance(x, bytes) else x + "\n" for x in expected]
    }


def test_html_drops_navigation_and_icons(tmp_path):
    links = "".join(f"<li><a href='{i}'>chapter {i}</a></li>" for i in range(5))
    body = f"""<nav>N<img src="big.png"></nav><div class="navheader">H<img src="big.png"></div>
    <footer>F</footer><header>G</header><ul>{links}</ul><div id="sidebar">S</div>
    <div role="navigation">R</div><img src="icon.png"><p class="canvas">kept</p>"""
    images, drops = dropped(tmp_path, body, icon__png=picture(1, (63, 200)))
    assert images == 1
    assert drops == {"image in navigation": 2, "icon": 1}
    assert read_corpus(tmp_path / "out")["page"] == ["text\n", BIG, "kept\n"]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("http://localhost/a.png", "image on the network"),
        ("https://localhost/a.png", "image on the network"),
        ("//localhost/a.png", "image on the network"),
        ("ftp://localhost/a.png", "image on the network"),
        ("file:///etc/passwd", "image outside the folder"),
        ("/etc/passwd", "image outside the folder"),
        ("../secret.png", "image outside the folder"),
        ("a/../../secret.png", "image outside the folder"),
        ("%2e%2e/secret.png", "image outside the folder"),
        ("link.png", "image outside the folder"),
        ("linked/secret.png", "image outside the folder"),
        ("loop.png", "image is missing"),
        ("none.png", "image is missing"),
        ("a%00b.png", "image is missing"),
        ("x" * 5000, "image is missing"),
        ("pipe.png", "image is missing"),
        (".", "image is missing"),
        ("", "image without an address"),
        ("http://[", "image without an address"),
        ("data:image/png;base64,AAAA", "image inside the page"),
        ("cut.jpg", "image cannot be read"),
        ("text.png", "image cannot be read"),
        ("huge.png", "image is too large"),
        ("drawing.svg", "image cannot be read"),
    ],
)
def test_html_reads_nothing_outside_and_counts_what_it_leaves(tmp_path, monkeypatch, source, reason):
    def refuse(*_):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket, "socket", refuse)
    (tmp_path / "secret.png").write_bytes(BIG)
    folder = page(tmp_path, "")
    os.symlink(tmp_path / "secret.png", folder / "link.png")
    os.symlink(tmp_path, folder / "linked")
    os.symlink(folder / "loop.png", folder / "loop.png")
    os.mkfifo(folder / "pipe.png")
    files = {"cut__jpg": cut_jpeg(), "text__png": b"text", "huge__png": huge_png(), "drawing__svg": b"<svg/>"}
    assert dropped(tmp_path, f'<img src="{source}">', **files) == (1, {reason: 1})


def test_html_pages_outside_without_images_and_broken_ones_are_counted(tmp_path):
    (tmp_path / "outside.html").write_text("<img src='big.png'>")
    folder = page(tmp_path, "<img src='big.png'>")
    os.symlink(tmp_path / "outside.html", folder / "linked.html")
    (folder / "plain.html").write_text("<p>only text")
    (folder / "binary.htm").write_bytes(bytes(range(256)) * 50)
    (folder / "deep.html").write_text("<div>" * 20_000 + "<img src='big.png'>")
    (folder / "folder.html").mkdir()
    (folder / "base.html").write_text("<base href='http://localhost/'><img src='big.png'>")
    (folder / "bad.html").write_text("<base href='http://['><img src='big.png'>")
    summary = import_html(folder, tmp_path / "out")
    assert summary.as_dict() == {
        "documents": 2,
        "images": 2,
        "dropped": {
            "image on the network": 1,
            "image without an address": 1,
            "page outside the folder": 1,
            "page without an image": 4,
        },
    }


def test_html_keys_are_fit_and_unique(tmp_path):
    folder = page(tmp_path, "<img src='big.png'>", "a.b.html")
    (folder / "a_b.html").write_text("<img src='big.png'>")
    (folder / "ünïcode.html").write_text("<img src='big.png'>")
    (folder / "sub").mkdir()
    (folder / "sub" / "a.html").write_text("<img src='../big.png'>")
    import_html(folder, tmp_path / "out")
    assert sorted(read_corpus(tmp_path / "out")) == ["_n_code", "a_b", "a_b-2", "sub_a"]
