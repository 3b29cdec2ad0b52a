"""The storybook: stories are true and repeatable, and pictures are judged rightly from pixels."""

import io

import numpy as np
import pytest
from PIL import Image, ImageFilter

from data_pipeline.errors import DataError
from data_pipeline.formats import find_shards
from data_pipeline.settings import DataSettings, SourceSettings
from data_pipeline.storybook import (
    BACKGROUNDS,
    CHANCE,
    COLOURS,
    CORNER,
    KINDS,
    PLACES,
    POSITIONS,
    draw_page,
    read_picture,
    story,
    write_stories,
)
from data_pipeline.stream import Stream
from data_pipeline.tokens import train_tokenizer

PAGES = [
    {"kind": kind, "colour": colour, "position": position, "digit": digit % 10, "background": ground}
    for digit, (kind, colour, position, ground) in enumerate(
        (k, c, p, b) for k in KINDS for c in COLOURS for p in POSITIONS for b in BACKGROUNDS
    )
]


def agreement(change, size=32, pages=PAGES):
    """Share of pages whose colour, kind and position are read rightly after ``change``."""
    right = dict.fromkeys(("colour", "kind", "position"), 0)
    for page in pages:
        read = read_picture(change(draw_page(page, size)))
        for name in right:
            right[name] += read[name] == page[name]
    return min(right.values()) / len(pages)


@pytest.mark.parametrize("size", [16, 32, 64])
def test_true_pictures_are_read_rightly(size):
    assert agreement(lambda pixels: pixels, size) >= 0.99
    assert agreement(lambda pixels: pixels.transpose(2, 0, 1), size, PAGES[::7]) >= 0.99


@pytest.mark.parametrize(("noise", "blur", "least"), [(25, 0.7, 0.97), (40, 1.0, 0.9), (25, 0.0, 0.97)])
def test_noisy_and_blurred_pictures_are_read_nearly_as_well(noise, blur, least):
    rng = np.random.default_rng(0)

    def change(pixels):
        soft = np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(blur)), np.float64)
        return np.clip(soft + rng.normal(0, noise, soft.shape), 0, 255).astype(np.uint8)

    assert agreement(change) >= least


def test_pale_shifted_and_shrunk_shapes_are_still_read():
    def pale(pixels):
        return (pixels * 0.75 + 60).clip(0, 255).astype(np.uint8)

    assert agreement(pale) >= 0.95
    assert agreement(lambda pixels: np.roll(pixels, (1, -1), (0, 1))) >= 0.95


def test_blank_and_noise_pictures_are_not_read_better_than_chance():
    blank = np.full((32, 32, 3), 250, np.uint8)
    assert read_picture(blank) == {"colour": None, "kind": None, "position": None}
    rng = np.random.default_rng(0)
    right = dict.fromkeys(CHANCE, 0)
    for page in PAGES:
        read = read_picture(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
        for name in right:
            right[name] += read[name] == page[name]
    for name, chance in CHANCE.items():
        assert right[name] / len(PAGES) < chance + 0.08


def test_a_wrong_shape_of_array_is_an_error():
    with pytest.raises(ValueError, match="square"):
        read_picture(np.zeros((32, 30, 3), np.uint8))


def test_the_digit_and_the_shape_never_touch():
    for page in PAGES[::3]:
        bare = draw_page({**page, "digit": 1}, 64).astype(int)
        other = draw_page({**page, "digit": 8}, 64).astype(int)
        differs = np.argwhere((bare != other).any(-1))
        assert differs.max() < CORNER * 64
        corner = bare[: int(CORNER * 64), : int(CORNER * 64)]
        assert np.abs(corner - COLOURS[page["colour"]]).sum(-1).min() > 30


def test_digits_and_backgrounds_can_be_told_apart_in_the_picture():
    for ground in BACKGROUNDS:
        page = {**PAGES[0], "background": ground}
        corners = [draw_page({**page, "digit": digit}, 32)[:10, :10].astype(int) for digit in range(10)]
        for first in range(10):
            for second in range(first):
                assert np.abs(corners[first] - corners[second]).sum() > 600
    colours = np.array(list(BACKGROUNDS.values()))
    distances = np.abs(colours[:, None] - colours[None]).sum(-1) + 1000 * np.eye(len(colours))
    assert distances.min() >= 40


def test_stories_tell_the_truth_and_depend_on_their_context():
    called_it = 0
    for index in range(200):
        made = story(3, index)
        pages = made.metadata["pages"]
        assert 3 <= len(pages) <= 5
        assert len(made.images) == len(pages)
        assert len({(page["kind"], page["colour"]) for page in pages}) == 1
        for number, page in enumerate(pages):
            before, image, after = made.content[3 * number : 3 * number + 3]
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(image))), draw_page(page, 32))
            assert str(page["digit"]) in after
            assert page["background"] in after
            assert page["position"] in before or PLACES[page["position"]] in before
            named = page["colour"] in before and page["kind"] in before
            assert named or (number and "It" in before)
            called_it += not named
            if number:
                assert page["position"] != pages[number - 1]["position"]
    # Some pages leave the shape's looks to the pages before.
    assert called_it > 150


def test_stories_depend_on_seed_and_index_alone():
    assert story(1, 5) == story(1, 5)
    assert story(1, 5).content != story(2, 5).content
    assert story(1, 5).content != story(1, 6).content


def test_truth_is_spread_evenly():
    pages = [page for index in range(1500) for page in story(0, index, 16).metadata["pages"]]
    for name, chance in {**CHANCE, "digit": 0.1, "background": 0.25}.items():
        values = [page[name] for page in pages]
        shares = [values.count(value) / len(values) for value in set(values)]
        assert len(shares) == round(1 / chance)
        assert max(abs(share - chance) for share in shares) < 0.25 * chance


def test_stories_become_training_steps(tmp_path):
    summary = write_stories(tmp_path / "shards", 60, seed=4)
    assert summary.documents == 60
    assert len(find_shards(str(tmp_path / "shards"), "x")) == 1
    train_tokenizer([t for t in story(0, 0).content if isinstance(t, str)], 300).save(
        tmp_path / "tokenizer.json"
    )
    settings = DataSettings(
        sources=[SourceSettings("stories", str(tmp_path / "shards"))],
        tokenizer=str(tmp_path),
        context_length=512,
        image_tokens=4,
        image_size=32,
        drawn_size=32,
        holdout=0.2,
    )
    stream = Stream(settings, global_rows=2)
    held = stream.heldout_documents(5)
    batch = stream.row_of(held[0])
    for pixels, page in zip(batch.images, held[0].metadata["pages"], strict=True):
        assert read_picture(pixels) == {name: page[name] for name in ("colour", "kind", "position")}
    assert len(batch.drawn) == len(batch.images)
    assert np.array_equal(batch.drawn, batch.images)


def test_nothing_to_write_is_an_error(tmp_path):
    with pytest.raises(DataError, match="--stories 0"):
        write_stories(tmp_path, 0)
