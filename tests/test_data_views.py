"""Random crops and mirroring: keyed by seed, document and pass, the same wherever a picture is decoded."""

import io
from dataclasses import fields, replace

import numpy as np
import pytest
from PIL import Image

from data_pipeline.decode import Decoder
from data_pipeline.errors import ResumeError, SettingsError
from data_pipeline.formats import Document
from data_pipeline.settings import SourceSettings, check_settings
from data_pipeline.stream import Stream
from data_pipeline.views import CENTER, View, view_of
from tests.data_corpora import make_settings
from tests.data_soak import checksums, feeds, step
from tests.test_data_decode import EACH


def noise(seed: int, width: int = 40, height: int = 24) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def random(tmp_path_factory):
    """Documents of two pictures, one row each, seen in random views."""
    made = [Document(f"d{i:03d}", ["one", noise(2 * i), "two", noise(2 * i + 1)], {}) for i in range(30)]
    settings = make_settings(tmp_path_factory.mktemp("views"), {"a": made}, holdout=0.3, drawn_size=8)
    settings.sources = [replace(settings.sources[0], crop="random", crop_scale=0.25, flip=0.5)]
    return settings


def test_views_are_drawn_as_the_settings_say():
    source = SourceSettings("a", "x", crop="random", crop_scale=0.2, flip=0.3)
    views = [view_of(source, key, 0) for key in range(4000)]
    areas = np.array([view.side**2 for view in views])
    assert areas.min() >= 0.2
    assert abs(areas.mean() - 0.6) < 0.02
    for name in ("left", "top"):
        values = np.array([getattr(view, name) for view in views])
        assert 0 <= values.min() < 0.01 < 0.99 < values.max() < 1
        assert abs(np.corrcoef(values, areas)[0, 1]) < 0.06
    assert abs(np.mean([view.mirrored for view in views]) - 0.3) < 0.03
    both = [(view_of(source, key, 0), view_of(source, key, 1)) for key in range(200)]
    assert all(one.mirrored == other.mirrored and one.side != other.side for one, other in both)
    assert view_of(source, None, 0) == CENTER == View()
    left = view_of(SourceSettings("a", "x", flip=1.0), 7, 0)
    assert left == View(mirrored=True)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("name", EACH)
def test_a_view_is_that_square_of_the_picture(name, kind):
    """Against slices of the decoded picture: views whose square has the pixels asked for."""
    file = io.BytesIO()
    Image.open(io.BytesIO(noise(1, 48, 32))).save(file, kind, quality=95, subsampling=0)
    decoder = Decoder(name, 1 << 20)
    whole = np.asarray(Image.open(io.BytesIO(file.getvalue())).convert("RGB"))
    out = np.empty((16, 16, 3), np.uint8)
    for left, top, mirrored in ((0.0, 0.0, False), (0.5, 0.25, False), (1.0, 1.0, True)):
        decoder.squares(file.getvalue(), [out], View(0.5, left, top, mirrored))
        x, y = int(left * 32), int(top * 16)
        square = whole[y : y + 16, x : x + 16]
        expected = square[:, ::-1] if mirrored else square
        assert np.abs(out.astype(int) - expected).max() <= (0 if name == "pillow" else 2)


def test_a_reduced_jpeg_keeps_twice_the_pixels_of_the_square():
    gradient = np.tile(np.linspace(0, 255, 2048).astype(np.uint8)[None, :, None], (2048, 1, 3))
    file = io.BytesIO()
    Image.fromarray(gradient).save(file, "JPEG", quality=95)
    out = np.empty((64, 64, 3), np.uint8)
    Decoder("pillow", 1 << 30).squares(file.getvalue(), [out], View(0.25, 0.0, 0.0))
    assert abs(int(out[32, -1, 0]) - 255 // 4) <= 3
    assert out[32, 0, 0] <= 3


def test_every_executor_and_number_of_ranks_sees_the_same_views(random):
    expected = checksums(random, "inline", steps=12)
    plain = replace(random, sources=[replace(random.sources[0], crop="center", flip=0.0)])
    assert not set(expected) & set(checksums(plain, "inline", steps=12))
    for executor, ranks in (("inline", 4), ("threads", 2), ("processes", 1)):
        assert checksums(random, executor, ranks, 12) == expected
    (feed,) = feeds(random, "threads")
    state = [step([feed])[1].state for _ in range(5)][-1]
    feed.close()
    other = feeds(random, "inline", 2, state)
    assert [step(other)[0] for _ in range(4)] == expected[5:9]


def test_another_pass_another_view_and_both_sizes_show_the_same(random):
    stream = Stream(random, global_rows=1)
    documents = stream.planner.orders[0].documents
    first, second = (stream.planner.samples(0, draw, documents) for draw in (0, documents))
    views = [{part.number: part.view for part in parts} for parts in (first, second)]
    assert all(views[0][number] != views[1][number] for number in views[0])
    pixels: dict[int, list[bytes]] = {}
    for _ in range(60):
        batch = stream.next().batches(0, 1, 1, 1)[0]
        assert np.array_equal(batch.drawn, batch.images[batch.drawn_index])
        for image, identity in zip(batch.images, batch.image_ids.tolist(), strict=True):
            pixels.setdefault(identity, []).append(image.tobytes())
    again = [seen for seen in pixels.values() if len(seen) > 1]
    assert len(again) > 20
    assert all(len(set(seen)) == len(seen) for seen in again)


def test_validation_sees_the_middle_and_a_resume_with_other_views_is_refused(random):
    plain = replace(random, sources=[SourceSettings("a", random.sources[0].path)])
    ours, theirs = (Stream(settings).validation_batches("a", 8, 2) for settings in (random, plain))
    for one, other in zip(ours, theirs, strict=True):
        assert all(np.array_equal(getattr(one, f.name), getattr(other, f.name)) for f in fields(one))
    state = Stream(random).state()
    with pytest.raises(ResumeError, match=r"data.sources was .*'crop': 'random'.* now \[\['a'"):
        Stream(plain).load_state(state)
    assert Stream(plain).state()["settings"]["sources"] == [["a", "interleaved"]]


@pytest.mark.parametrize(
    ("change", "named"),
    [({"crop": "middle"}, "crop"), ({"crop_scale": 0.0}, "crop_scale"), ({"flip": 1.5}, "flip")],
)
def test_views_that_make_no_sense_are_named(random, change, named):
    with pytest.raises(SettingsError, match=rf"data.sources\[0\].{named}: must be"):
        check_settings(replace(random, sources=[replace(random.sources[0], **change)]))
