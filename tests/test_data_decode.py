"""The decoder's rule: large JPEGs are decoded small, upright all the same, close to the full decode."""

import io

import numpy as np
import pytest
from PIL import Image

from data_pipeline.decode import Decoder, Room, crop, decode, reduction
from data_pipeline.errors import BadSample, ResumeError, SettingsError
from data_pipeline.stream import Stream
from tests.data_corpora import cut_jpeg, documents, huge_png, make_settings

PIXELS = 1 << 30


def scene(width: int, height: int, orientation: int = 1, kind: str = "JPEG") -> bytes:
    """A picture with large shapes and fine detail, different in every corner."""
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    waves = [np.sin(9 * x + 4 * y) + 0.3 * np.sin(90 * x * y), x - y, np.cos(14 * y) * x]
    pixels = np.stack([127 + 90 * wave for wave in waves], -1).clip(0, 255).astype(np.uint8)
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(file, kind, quality=92, exif=exif)
    return file.getvalue()


def squares(decoder: Decoder, blob: bytes, *sizes: int) -> list[np.ndarray]:
    out = [np.empty((size, size, 3), np.uint8) for size in sizes]
    decoder.squares(blob, out)
    return out


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
@pytest.mark.parametrize("name", ["pillow", pytest.param("turbo", marks=pytest.mark.soak)])
def test_reduced_and_upright_as_the_full_decode(name, orientation):
    blob = scene(1000, 700, orientation)
    (small,) = squares(Decoder(name, PIXELS), blob, 64)
    full = crop(decode(blob, PIXELS), 64)
    assert psnr(small, full) > 33
    others = [np.rot90(full, turn) for turn in (1, 2, 3)] + [full[:, ::-1]]
    assert psnr(small, full) > 8 + max(psnr(small, other) for other in others)


@pytest.mark.parametrize("name", ["pillow", pytest.param("turbo", marks=pytest.mark.soak)])
def test_both_sizes_come_from_one_decode_and_bad_images_are_named(name):
    decoder = Decoder(name, 4_000_000)
    for kind in ("JPEG", "PNG", "WEBP"):
        blob = scene(300, 200, kind=kind)
        for square, size in zip(squares(decoder, blob, 32, 96), (32, 96), strict=True):
            assert psnr(square, crop(decode(blob, PIXELS), size)) > 25
    for blob in (cut_jpeg(), huge_png(), b"\xff\xd8 no image", b"", scene(3000, 2000)):
        with pytest.raises(BadSample):
            squares(decoder, blob, 32)
    assert name in decoder.fingerprint


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
    assert Decoder("auto", PIXELS).name == "turbo"


def test_pixels_of_images_that_are_not_reduced_are_those_of_the_release(tmp_path):
    blob = scene(300, 260)
    assert np.array_equal(squares(Decoder("pillow", PIXELS), blob, 224)[0], crop(decode(blob, PIXELS), 224))


def test_an_unknown_decoder_is_refused():
    with pytest.raises(SettingsError, match=r"data\.decoder: must be one of auto, pillow, turbo"):
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
