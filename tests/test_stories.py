"""The evaluation on stories: losses, swaps and judged pictures, each against a case with a known answer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

from data_pipeline.batch import IGNORED
from data_pipeline.errors import DataError
from data_pipeline.formats import write_documents
from data_pipeline.settings import SourceSettings
from data_pipeline.storybook import CHANCE
from data_pipeline.stream import Stream
from mmi_megatron.evaluate.stories import Options, Swap, judge_stories, show
from mmi_megatron.model.mm_interleaved import prepare
from tests.data_corpora import documents
from tests.small_run import random_run, story_config

OPTIONS = Options(documents=12, steps=1, guidance=1.0, seed=4)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return random_run(story_config(folder), folder)


@pytest.fixture(scope="module")
def stream(run):
    return Stream(run.config.data, "heldout")


@pytest.fixture(scope="module")
def result(run, stream):
    return judge_stories(run.model, stream, OPTIONS)


def test_losses_are_means_over_the_stories(run, stream, result):
    documents = stream.heldout_documents(12)
    tokens, images, kept = [], [], 0
    for story in documents:
        batch = stream.row_of(story)
        with torch.no_grad():
            losses = run.model(
                prepare(batch, run.tokenizer.special, run.config.model, torch.device("cpu")), 4, 0
            )
        kept += int((batch.labels != IGNORED).sum())
        tokens += losses.tokens.tolist()
        images += losses.images.tolist()
    assert (result["documents"], result["tokens"], result["images"]) == (12, kept, len(images))
    assert result["next_token_loss"] == pytest.approx(sum(tokens) / kept, rel=1e-5)
    assert result["next_image_loss"] == pytest.approx(np.mean(images), rel=1e-4)


def test_swaps_change_what_they_should(run, stream, result):
    """A random model uses everything it sees, so every swap changes the figure."""
    assert abs(result["next_token_loss_images_swapped"] / result["next_token_loss"] - 1) > 1e-4
    assert abs(result["next_image_loss_contexts_swapped"] / result["next_image_loss"] - 1) > 1e-4
    same = judge_stories(run.model, stream, OPTIONS)
    assert same == result
    other = judge_stories(run.model, stream, replace(OPTIONS, seed=5))
    assert other["next_token_loss"] == result["next_token_loss"]
    assert other["next_image_loss"] != result["next_image_loss"]


def test_only_what_is_named_is_swapped(run, stream, monkeypatch):
    """The decoder gets another story's context and references with its own pixels and noise; the
    language model gets another story's images with its own tokens."""
    decoded, encoded = [], []
    loss, encode = run.model.image_decoder.loss, run.model.encode
    record = lambda *given: decoded.append(given) or loss(*given)  # noqa: E731
    monkeypatch.setattr(run.model.image_decoder, "loss", record)
    monkeypatch.setattr(run.model, "encode", lambda images: encoded.append(images) or encode(images))
    monkeypatch.setattr(run.model, "draw", lambda inputs, **_: inputs.drawn)
    judge_stories(run.model, stream, replace(OPTIONS, documents=4))
    batch = stream.row_of(stream.heldout_documents(4))
    swap = Swap(batch, stream)
    assert len(batch.drawn) == len(batch.images), "every picture of a story is drawn"
    (pixels, context, mask, maps, references, keys), swapped = decoded
    for own, other in ((pixels, swapped[0]), (maps, swapped[3]), (keys.noise, swapped[5].noise)):
        assert torch.equal(own, other)
    assert torch.equal(keys.timestep, swapped[5].timestep) and torch.equal(keys.drop, swapped[5].drop)
    assert torch.equal(references[torch.from_numpy(swap.partner)], swapped[4])
    for row, partner in enumerate(swap.partner):
        states = swapped[1][row][swapped[2][row]]
        assert torch.equal(states, context[partner][mask[partner]])
        assert states.shape != context[row][mask[row]].shape or (states != context[row][mask[row]]).any()
    plain, replaced, again = (images.permute(0, 2, 3, 1).numpy() for images in encoded)
    assert np.array_equal(plain, batch.images) and np.array_equal(again, batch.images)
    assert np.array_equal(replaced, batch.images[swap.partner])


def test_a_partner_is_the_same_page_of_another_story(stream):
    stories = stream.heldout_documents(5)
    swap = Swap(stream.row_of(stories), stream)
    counts = [len(story.images) for story in stories]
    assert swap.document.tolist() == [d for d, count in enumerate(counts) for _ in range(count)]
    assert swap.number.tolist() == [n for count in counts for n in range(count)]
    for image, partner in enumerate(swap.partner):
        following = (swap.document[image] + 1) % 5
        assert swap.document[partner] == following
        assert swap.number[partner] == min(swap.number[image], counts[following] - 1)


def test_pictures_that_are_true_are_judged_so(run, stream, monkeypatch):
    """A model that draws the true pictures agrees with every text, and with others only by chance."""

    def draw(inputs, *, steps, guidance, seeds):
        assert len(set(seeds)) == len(inputs.drawn)
        return inputs.drawn

    monkeypatch.setattr(run.model, "draw", draw)
    perfect = judge_stories(run.model, stream, replace(OPTIONS, documents=16))["agreement"]
    for name, row in perfect.items():
        assert row["accuracy"] == row["true_pictures"] > 0.9, name
        assert row["other_story"] < 0.5 and row["chance"] == CHANCE[name], name
        assert row["n"] >= 48

    monkeypatch.setattr(run.model, "draw", lambda inputs, **_: torch.full_like(inputs.drawn, 255))
    blank = judge_stories(run.model, stream, OPTIONS)["agreement"]
    assert all(row["accuracy"] == 0 for row in blank.values())


def test_a_model_without_a_decoder_is_judged_by_its_text(run, stream):
    model = replace(run.config.model, loss=replace(run.config.model.loss, next_image=0.0))
    blind = random_run(replace(run.config, model=model), run.path)
    result = judge_stories(blind.model, stream, OPTIONS)
    assert "agreement" not in result and "next_image_loss" not in result
    assert result["next_token_loss"] > 0
    show(result, Console(width=100, record=True, quiet=True))


def test_the_table_tells_every_figure(result):
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    show(result, console)
    text = console.export_text()
    for figure in ("next_token_loss", "next_token_loss_images_swapped", "next_image_loss_contexts_swapped"):
        assert f"{result[figure]:.4f}" in text
    for name, row in result["agreement"].items():
        assert name in text and f"{row['accuracy']:.0%}" in text and f"{row['chance']:.0%}" in text
    assert "seed 4" in text and "12 held-out stories" in text


def test_documents_that_are_no_stories_are_refused(run, tmp_path):
    write_documents(documents(20), tmp_path / "shards")
    data = replace(run.config.data, sources=[SourceSettings("plain", str(tmp_path / "shards"))])
    with pytest.raises(DataError, match="is no story"):
        judge_stories(run.model, Stream(data, "heldout"), OPTIONS)
    with pytest.raises(DataError, match="at least 2"):
        judge_stories(run.model, Stream(run.config.data, "heldout"), replace(OPTIONS, documents=1))
