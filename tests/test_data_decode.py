"""The decoder's rule: large JPEGs are decoded small, upright all the same, close to the full decode."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from data_pipeline.decode import Decoder, Room, crop, decode, has_native, reduction
from data_pipeline.errors import BadSample, ResumeError, SettingsError
from data_pipeline.stream import Stream
from data_pipeline.views import CENTER, View
from tests.data_corpora import cut_jpeg, documents, huge_png, make_settings

PIXELS = 1 << 30
NATIVE = pytest.param(
    "native", marks=pytest.mark.skipif(not has_native(), reason="not compiled: no headers of libjpeg-turbo")
)
EACH = ["pillow", NATIVE, pytest.param("turbo", marks=pytest.mark.soak)]
"""The decoders; turbo needs an extra."""


def scene(width: int, height: int, orientation: int = 1, kind: str = "JPEG", **coding) -> bytes:
    """A picture with large shapes and fine detail, different in every corner; orientation 0: without EXIF."""
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    waves = [np.sin(9 * x + 4 * y) + 0.3 * np.sin(90 * x * y), x - y, np.cos(14 * y) * x]
    pixels = np.stack([127 + 90 * wave for wave in waves], -1).clip(0, 255).astype(np.uint8)
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(file, kind, quality=92, exif=exif if orientation else b"", **coding)
    return file.getvalue()


def squares(decoder: Decoder, blob: bytes, *sizes: int, view: View = CENTER) -> list[np.ndarray]:
    out = [np.empty((size, size, 3), np.uint8) for size in sizes]
    decoder.squares(blob, out, view)
    return out


def by_hand(blob: bytes, size: int, repeated: bool, ways: str, factor: int = 1, crop: int = 0) -> np.ndarray:
    """The calls of the two libraries the rule asks for: ``ways`` names those of OpenCV, in turn."""
    import cv2
    import simplejpeg

    height, width, *_ = simplejpeg.decode_jpeg_header(blob)
    least = {"min_height": height // factor, "min_width": width // factor, "min_factor": float(factor)}
    pixels = simplejpeg.decode_jpeg(blob, "RGB", fastupsample=repeated, **(least if factor > 1 else {}))
    height, width, _ = pixels.shape
    side = crop or min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = pixels[top : top + side, left : left + side]
    for way in ways.split():
        to = 2 * size if way == "double" else size
        chosen = {"cubic": cv2.INTER_CUBIC, "area": cv2.INTER_AREA}.get(way, cv2.INTER_LINEAR)
        square = cv2.resize(square, (to, to), interpolation=chosen)
    return square


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    error = np.square(one.astype(float) - other.astype(float)).mean()
    return 10 * np.log10(255**2 / max(error, 1e-9))


@pytest.mark.parametrize(
    ("size", "target", "factor"),
    [((447, 900), 224, 1), ((448, 900), 224, 1), ((896, 2000), 224, 2), ((1791, 1800), 224, 2)]
    + [((4000, 3000), 224, 4), ((4000, 3600), 224, 8), ((1000, 1000), 512, 1), ((2048, 2048), 512, 2)],
)
def test_a_jpeg_is_reduced_while_twice_the_target_is_left(size, target, factor):
    assert reduction(size, target) == factor
    assert factor == 1 or min(size) // factor >= 2 * target
    assert factor == 8 or min(size) // (2 * factor) < 2 * target


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", EACH)
def test_reduced_and_upright_as_the_full_decode(name, orientation):
    blob = scene(1000, 700, orientation)
    (small,) = squares(Decoder(name, PIXELS), blob, 64)
    full = crop(decode(blob, PIXELS), 64)
    assert psnr(small, full) > 33
    others = [np.rot90(full, turn) for turn in (1, 2, 3)] + [full[:, ::-1]]
    assert psnr(small, full) > 8 + max(psnr(small, other) for other in others)


@pytest.mark.parametrize("name", EACH)
def test_both_sizes_come_from_one_decode_and_bad_images_are_named(name):
    decoder = Decoder(name, 4_000_000)
    for kind in ("JPEG", "PNG", "WEBP"):
        blob = scene(300, 200, kind=kind)
        for square, size in zip(squares(decoder, blob, 32, 96), (32, 96), strict=True):
            assert psnr(square, crop(decode(blob, PIXELS), size)) > 25
    for blob in (cut_jpeg(), huge_png(), b"\xff\xd8 no image", b"", scene(3000, 2000)):
        with pytest.raises(BadSample):
            squares(decoder, blob, 32)
    assert decoder.fingerprint.startswith(f"{name}, rule 3, ")  # up with every change of a pixel


@pytest.mark.parametrize("name", EACH)
def test_a_turned_picture_stands_upright_behind_a_comment_too(name):
    blob = scene(300, 200, 6)
    commented = blob[:2] + b"\xff\xfe\x00\x06abcd" + blob[2:]
    both = [squares(Decoder(name, PIXELS), one, 64)[0] for one in (blob, commented)]
    assert np.array_equal(*both)


def test_room_for_pixels_never_begins_at_a_multiple_of_a_vector():
    room = Room()
    for size in (1, 1000, 518_400, 3_000_000, 10):
        whole = room.whole(size)
        assert len(whole) >= size and whole.ctypes.data % 16 == 8


@pytest.mark.soak
def test_turbo_leaves_what_it_does_not_know_to_pillow():
    file = io.BytesIO()
    Image.fromarray(np.full((80, 80, 4), 90, np.uint8), "CMYK").save(file, "JPEG")
    both = [squares(Decoder(name, PIXELS), file.getvalue(), 32)[0] for name in ("turbo", "pillow")]
    assert np.array_equal(*both)


def test_the_first_decoder_that_is_there_is_taken_and_what_another_needs_is_said(monkeypatch):
    for native, turbo, chosen in ((1, 1, "native"), (0, 1, "turbo"), (0, 0, "pillow")):
        monkeypatch.setattr("data_pipeline.decode.has_native", lambda: native)  # noqa: B023
        monkeypatch.setattr("data_pipeline.decode.has_turbo", lambda: turbo)  # noqa: B023
        monkeypatch.setattr("data_pipeline.decode._native", lambda: SimpleNamespace(version="3"))
        monkeypatch.setattr("data_pipeline.decode._turbo", lambda: [SimpleNamespace(__version__="1")] * 2)
        assert Decoder("auto", PIXELS).name == chosen
    for name, need in (("native", "libjpeg-turbo's headers"), ("turbo", "data-fast")):
        with pytest.raises(SettingsError, match=f"data.decoder: {name} needs .*{need}"):
            Decoder(name, PIXELS)


@pytest.mark.soak
@pytest.mark.parametrize(
    ("size", "target", "repeated", "ways"),
    [
        ((300, 200), 224, False, "cubic"),
        ((480, 360), 224, False, "linear"),
        ((640, 447), 224, False, "linear"),
        ((640, 448), 224, False, "area"),
        ((640, 470), 224, False, "double area"),
        ((640, 471), 224, True, "double area"),
        ((640, 480), 224, True, "double area"),
        ((640, 481), 224, True, "double area"),
        ((640, 482), 224, True, "area"),
        ((800, 600), 224, True, "area"),
    ],
)
def test_colours_are_repeated_from_a_shrink_of_21_on_and_interpolated_below(size, target, repeated, ways):
    for coding in (
        {"subsampling": "4:2:0"},
        {"subsampling": "4:2:2"},
        {"subsampling": 0, "progressive": True},
    ):
        blob = scene(*size, **coding)
        (found,) = squares(Decoder("turbo", PIXELS), blob, target)
        assert np.array_equal(found, by_hand(blob, target, repeated, ways))
        other = by_hand(blob, target, not repeated, ways)
        assert np.array_equal(found, other) == (coding["subsampling"] == 0)  # 4:4:4: nothing to interpolate


@pytest.mark.soak
def test_reduced_grey_and_part_of_a_picture_follow_the_pixels_that_are_left():
    turbo = Decoder("turbo", PIXELS)
    for size, repeated, ways in (((1000, 900), False, "double area"), ((1100, 1000), True, "area")):
        blob = scene(*size, subsampling="4:2:2")
        assert np.array_equal(squares(turbo, blob, 224)[0], by_hand(blob, 224, repeated, ways, 2))
        assert not np.array_equal(squares(turbo, blob, 224)[0], by_hand(blob, 224, not repeated, ways, 2))
        blob = scene(*size, subsampling="4:2:0")  # its DCT gives the colours at the size of the reduced light
        either = [by_hand(blob, 224, fast, ways, 2) for fast in (True, False)]
        assert np.array_equal(*either) and np.array_equal(squares(turbo, blob, 224)[0], either[0])
    blob = scene(800, 600)
    (half,) = squares(turbo, blob, 224, view=View(0.5))
    assert np.array_equal(half, by_hand(blob, 224, False, "linear", crop=300))
    small, large = squares(turbo, blob, 96, 400)  # the larger decides
    assert np.array_equal(large, by_hand(blob, 400, False, "linear"))
    assert np.array_equal(small, by_hand(blob, 96, False, "area"))
    file = io.BytesIO()
    Image.open(io.BytesIO(blob)).convert("L").save(file, "JPEG")
    (grey,) = squares(turbo, file.getvalue(), 224)
    assert np.array_equal(grey, by_hand(file.getvalue(), 224, False, "area"))


@pytest.mark.soak
@pytest.mark.parametrize(("width", "height"), [(600, 459), (640, 480), (800, 600)])
def test_what_the_fast_decoder_saves_costs_little_of_a_photograph(width, height):
    """Against the full decode averaged over areas, and against the pixels before the encoder: the bounds
    of benchmarks/results/decode_quality_2026-11-21.md."""
    from benchmarks.decode_quality import averages, photograph

    _, _, apart, loss = averages(photograph(1, width, height), height / 224, 87, "4:2:0")
    assert apart > 50
    assert loss < 0.25


def test_pixels_of_images_that_are_not_reduced_are_those_of_the_release(tmp_path):
    blob = scene(300, 260)
    assert np.array_equal(squares(Decoder("pillow", PIXELS), blob, 224)[0], crop(decode(blob, PIXELS), 224))


def test_an_unknown_decoder_is_refused():
    with pytest.raises(SettingsError, match=r"data\.decoder: must be one of auto, native, turbo, pillow"):
        Decoder("nvjpeg", PIXELS)


def test_resume_refuses_another_decoder_unless_told_otherwise(tmp_path):
    chosen = make_settings(tmp_path, {"a": documents(20)})
    stream = Stream(chosen)
    rows = stream.next().rows
    state = stream.state() | {"decoder": "pillow, rule 0"}
    with pytest.raises(ResumeError, match=r"image decoder \(was pillow, rule 0.*accept_changes=\[decoder\]"):
        Stream(chosen).load_state(state)
    chosen.accept_changes = ["decoder"]
    resumed = Stream(chosen)
    resumed.load_state(state)
    assert resumed.next().rows == stream.next().rows != rows
    chosen.image_size = 16
    with pytest.raises(ResumeError, match=r"data.image_size was 8, now 16; .*accept_changes=\[settings\]"):
        Stream(chosen).load_state(state)
    chosen.accept_changes = ["decoder", "settings"]
    Stream(chosen).load_state(state)
    chosen.accept_changes = ["everything"]
    with pytest.raises(SettingsError, match="accept_changes"):
        Stream(chosen)
