"""Interleaved generation: the cache against reading at once, the course of a document, its page."""

from __future__ import annotations

import base64
import html.parser
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from data_pipeline.errors import DataError
from data_pipeline.formats import Document, read_document
from data_pipeline.storybook import story
from data_pipeline.stream import Stream
from mmi_megatron.errors import ConfigError
from mmi_megatron.generate.interleaved import (
    ENDED,
    ENOUGH_IMAGES,
    ENOUGH_TEXT,
    FULL,
    Options,
    Reader,
    generate,
)
from mmi_megatron.generate.page import write_page
from mmi_megatron.generate.text import TextOptions
from mmi_megatron.model.mm_interleaved import prepare
from tests.small_run import random_run, story_config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return random_run(story_config(folder), folder)


def at_once(run, document, end=False):
    """Hidden states and maps of the model's own way of reading, as in training."""
    batch = Stream(run.config.data, "heldout").row_of(document, end=end)
    inputs = prepare(batch, run.tokenizer.special, run.config.model, torch.device("cpu"))
    with torch.no_grad():
        return batch, inputs, *run.model.read(inputs)


def read_slowly(run, batch):
    """Hidden states of reading a batch of one document piece by piece: one token of text at a time."""
    reader, special = Reader(run), run.tokenizer.special
    tokens, images = batch.tokens.tolist(), iter(batch.images)
    reading = reader.start(Document("start", [run.tokenizer.decode(tokens[1:3])]))
    assert reading.tokens == tokens[:3]
    at = 3
    while at < len(tokens):
        if tokens[at] == special.image:
            count = len(reader._placeholders())
            reading, at = reader.read(reading, tokens[at : at + count], next(images)[None]), at + count
        elif at % 2:
            reading, at = reader.read(reading, tokens[at : at + 1]), at + 1
        else:
            _, (reading,) = reader.step([reading], tokens[at : at + 1])
            at += 1
    return reading


@pytest.mark.parametrize(
    "change", [{}, {"kind": "dense"}, {"max_images": 1}, {"levels": [0, 2]}, {"kind": "none"}]
)
def test_reading_with_a_cache_equals_reading_at_once(run, change):
    config = run.config
    language = replace(config.model.language, mmfs=replace(config.model.language.mmfs, **change))
    run = random_run(replace(config, model=replace(config.model, language=language)), run.path)
    batch, _, hidden, maps = at_once(run, story(5, 1))
    reading = read_slowly(run, batch)
    assert len(batch.images) >= 3 and reading.tokens == batch.tokens.tolist()
    torch.testing.assert_close(torch.cat(reading.hidden), hidden, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(reading.maps, maps, atol=1e-5, rtol=1e-5)
    want = run.model.language_model.logits(hidden[-1:])[0]
    allowed = torch.isfinite(reading.logits)
    assert (~allowed).sum() == 3
    torch.testing.assert_close(reading.logits[allowed], want[allowed], atol=1e-4, rtol=1e-5)


def test_images_are_encoded_and_projected_once(run, monkeypatch):
    layer = run.model.language_model.layers[0].mmfs.attention
    encoded, projected, encode, project = [], [], run.model.encode, layer.project
    monkeypatch.setattr(run.model, "encode", lambda images: encoded.append(len(images)) or encode(images))
    monkeypatch.setattr(layer, "project", lambda maps: projected.append(len(maps)) or project(maps))
    batch = Stream(run.config.data, "heldout").row_of(story(5, 1), end=False)
    read_slowly(run, batch)
    assert encoded == [1] * len(batch.images) and sum(projected) == len(batch.images)


def test_a_step_of_beams_equals_steps_alone(run):
    reader = Reader(run)
    start = reader.start(Document("start", list(story(5, 2).content[:3])))
    readings = [reader.read(start, [token]) for token in (7, 30, 9)]
    logits, together = reader.step(readings, [11, 12, 40])
    for row, (reading, token) in enumerate(zip(readings, (11, 12, 40), strict=True)):
        alone = reader.read(reading, [token])
        torch.testing.assert_close(together[row].hidden[-1], alone.hidden[-1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(logits[row], alone.logits, atol=1e-4, rtol=1e-5)
        assert together[row].tokens == alone.tokens
    assert len(start.tokens) + 1 == len(readings[0].tokens), "a reading has been changed by reading on"


def test_a_picture_is_drawn_from_the_context_and_references_of_training(run):
    document = story(5, 3)
    batch, inputs, _, _ = at_once(run, document, end=True)
    seeds = [11, 12, 13, 14, 15][: len(batch.drawn)]
    want = run.model.draw(inputs, steps=2, guidance=1.5, seeds=seeds)
    reader, special = Reader(run), run.tokenizer.special
    for number in range(len(seeds)):
        pieces = list(document.content)
        images = [i for i, piece in enumerate(pieces) if isinstance(piece, bytes)]
        reading = reader.start(Document("part", pieces[: images[number]]))
        reading = reader.read(reading, [special.boi])
        got = reader.draw(reading, Options(steps=2, guidance=1.5), seeds[number])
        assert np.abs(got.astype(int) - want[number].numpy().astype(int)).max() <= 1


def favour(run, monkeypatch, boi=0.0, eos=0.0):
    """Let the model end texts more often than chance would."""
    special, logits = run.tokenizer.special, run.model.language_model.logits

    def biased(hidden):
        out = logits(hidden).clone()
        out[:, special.boi] += boi
        out[:, special.eos] += eos
        return out

    monkeypatch.setattr(run.model.language_model, "logits", biased)


def options(**changes):
    text = TextOptions(**{name: changes.pop(name) for name in list(changes) if hasattr(TextOptions, name)})
    return Options(text, **({"steps": 1, "guidance": 1.0} | changes))


def test_the_course_of_a_document(run, monkeypatch):
    favour(run, monkeypatch, boi=4.0)
    prompt = Document("prompt", list(story(5, 4).content[:2]))
    done = generate(run, prompt, options(max_images=3, max_tokens=60, seed=1))
    assert done.content[:2] == prompt.content and done.metadata["prompt"] == 2
    pictures = [piece for piece in done.content[2:] if isinstance(piece, bytes)]
    assert len(pictures) == done.metadata["new_images"] == 3
    assert done.metadata["ended"] == ENOUGH_IMAGES
    assert done.metadata["new_tokens"] <= 60
    # What was written is what a reader of the finished document reads.
    again = generate(run, prompt, options(max_images=3, max_tokens=60, seed=1))
    assert again.content == done.content
    other = generate(run, prompt, options(max_images=3, max_tokens=60, seed=2))
    assert other.content != done.content
    beams = generate(run, prompt, options(max_images=1, max_tokens=20, beams=3, min_tokens=2))
    assert (
        beams.content
        == generate(run, prompt, options(max_images=1, max_tokens=20, beams=3, min_tokens=2)).content
    )


def test_why_a_document_ends(run, monkeypatch):
    prompt = Document("prompt", [story(5, 4).content[0]])
    favour(run, monkeypatch, boi=-100.0, eos=-100.0)
    done = generate(run, prompt, options(max_tokens=9))
    assert (done.metadata["ended"], done.metadata["new_tokens"]) == (ENOUGH_TEXT, 9)
    assert generate(run, prompt, options(max_tokens=1000)).metadata["ended"] == FULL
    first = generate(run, prompt, options(max_tokens=3, picture_first=True))
    assert isinstance(first.content[1], bytes) and first.metadata["new_images"] == 1
    assert generate(run, prompt, options(max_images=0, picture_first=True)).metadata["ended"] == ENOUGH_IMAGES
    favour(run, monkeypatch, boi=-100.0, eos=200.0)
    done = generate(run, prompt, options())
    assert done.metadata["ended"] == ENDED and done.content == prompt.content
    favour(run, monkeypatch, boi=300.0, eos=-300.0)
    full = generate(run, prompt, options(max_images=1000))
    assert full.metadata["ended"] == FULL and full.metadata["new_images"] > 20


def test_a_run_without_a_decoder_never_asks_for_a_picture(run, monkeypatch):
    model = replace(run.config.model, loss=replace(run.config.model.loss, next_image=0.0))
    blind = random_run(replace(run.config, model=model), run.path)
    favour(blind, monkeypatch, boi=100.0)
    prompt = Document("prompt", list(story(5, 4).content[:2]))
    done = generate(blind, prompt, options(max_tokens=12))
    assert done.metadata["new_images"] == 0 and len(done.content) == 3
    with pytest.raises(ConfigError, match="without an image decoder"):
        generate(blind, prompt, options(picture_first=True))


@pytest.mark.parametrize(
    "content, message",
    [
        ([], "empty"),
        ([""], "empty"),
        (["A red circle.", b"\x89PNG\r\n\x1a\nno picture"], r"content\[1\].*cannot be read"),
        (["red " * 500], "data.context_length"),
    ],
)
def test_a_bad_prompt_is_a_clear_error(run, content, message):
    with pytest.raises(DataError, match=message):
        generate(run, Document("prompt", content), options())


def test_options_that_make_no_sense_are_named():
    for wrong in ({"steps": 0}, {"max_images": -1}, {"scheduler": "euler"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Options(**wrong)


class Words(html.parser.HTMLParser):
    """Text and image sources of a page's body."""

    def __init__(self):
        super().__init__()
        self.text, self.sources, self.tags = "", [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "img":
            self.sources.append(dict(attributes)["src"])

    def handle_data(self, data):
        self.text += data


def test_the_page_stands_alone_and_its_json_is_a_prompt(tmp_path):
    content = story(5, 4).content[:3]
    document = Document(
        "a <b>", [content[0] + " <script>alert(1)</script> & more", *content[1:]], {"prompt": 1}
    )
    target = tmp_path / "new" / "page.html"
    record = write_page(document, target, {"seed": "<3"})
    text = target.read_text()
    page = Words()
    page.feed(text)
    assert "script" not in page.tags and "<script>alert(1)</script> & more" in page.text
    assert "seed <3" in page.text
    (source,) = page.sources
    kind, _, data = source.partition(";base64,")
    assert kind == "data:image/png" and base64.b64decode(data) == content[1]
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!data:)", text)
    assert json.loads(record.read_text())["metadata"] == {"prompt": 1}
    assert read_document(record).content == document.content
