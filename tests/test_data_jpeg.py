"""The compiled JPEG decoder: its filters against float64 NumPy on the planes that another decoder gives, the
same pixels with vector instructions and without, and whatever is damaged left to others."""

from __future__ import annotations

import io
import math
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageFile

from data_pipeline.decode import TURNS, Decoder, _lying, _turned, crop, decode, reduction
from data_pipeline.errors import BadSample
from data_pipeline.views import View
from tests.test_data_decode import PIXELS, psnr, scene, squares

jpeg = pytest.importorskip("data_pipeline._jpeg", reason="not compiled: libjpeg-turbo's headers were missing")

TO_RGB = np.array([[1, 0, 1.402], [1, -0.344136, -0.714136], [1, 1.772, 0]])
"""JFIF: of Y, Cb - 128 and Cr - 128."""


def drawn(blob: bytes, size: int, box, factor: int = 1, mirrored: bool = False, vectors: bool = True):
    """A square; every pixel of it is written."""
    out, other = (np.full((size, size, 3), value, np.uint8) for value in (0, 255))
    for square in (out, other):
        assert jpeg.part(blob, [square], factor, box, mirrored, vectors)
    assert np.array_equal(out, other)
    return out


class Bits:
    """Bits of a JPEG's scan, the first ones first."""

    def __init__(self) -> None:
        self.value, self.count = 1, 0

    def add(self, value: int, count: int) -> None:
        self.value, self.count = self.value << count | value, self.count + count

    def done(self) -> bytes:
        self.add((1 << -self.count % 8) - 1, -self.count % 8)
        return self.value.to_bytes(self.count // 8 + 1, "big")[1:].replace(b"\xff", b"\xff\x00")


def patchwork(width: int, height: int, factors: list[tuple[int, int]], seed: int = 0):
    """A JPEG of any sampling factors (across, down), each block of a plane of one value, written by hand
    (ITU-T T.81): nothing but the first coefficient, 8 times what the value is above 128.

    Returns:
        The file, and its planes at their own sizes: float64.
    """
    rng, parts = np.random.default_rng(seed), range(len(factors))
    most = [max(factor[axis] for factor in factors) for axis in (0, 1)]
    columns, rows = -(-width // (8 * most[0])), -(-height // (8 * most[1]))
    values = [rng.integers(60, 200, (rows * down, columns * across)) for across, down in factors]
    bits, before = Bits(), [0] * len(factors)
    for row in range(rows):
        for column in range(columns):
            for part, (across, down) in enumerate(factors):
                for y, x in np.ndindex(down, across):
                    value = int(values[part][row * down + y, column * across + x]) - 128
                    step, before[part] = value - before[part], value
                    size = abs(step).bit_length()
                    bits.add(size, 4)
                    bits.add(step + ((1 << size) - 1 if step < 0 else 0), size)
                    bits.add(0, 1)  # the end of the block

    def segment(marker: int, *body: int) -> bytes:
        return bytes([0xFF, marker, 0, len(body) + 2, *body])

    named = [
        byte for part, (across, down) in enumerate(factors) for byte in (part + 1, across << 4 | down, 0)
    ]
    blob = b"\xff\xd8" + segment(0xDB, 0, *[8] * 64)
    blob += segment(0xC0, 8, *height.to_bytes(2), *width.to_bytes(2), len(factors), *named)
    blob += segment(0xC4, 0, 0, 0, 0, 12, *[0] * 12, *range(12))  # codes of 4 bits for 0 to 11
    blob += segment(0xC4, 0x10, 1, *[0] * 15, 0)  # a code of 1 bit for the end
    blob += segment(0xDA, len(factors), *[byte for part in parts for byte in (part + 1, 0)], 0, 63, 0)
    planes = []
    for (across, down), own in zip(factors, values, strict=True):
        large = own.repeat(8, 0).repeat(8, 1).astype(float)
        planes.append(large[: -(-height * down // most[1]), : -(-width * across // most[0])])
    return blob + bits.done() + b"\xff\xd9", planes


def planes(blob: bytes, subsampling: str, factor: int) -> list[np.ndarray]:
    """Light and colours as they are stored, from Pillow: light at full size; the colours, where they are
    coarse, at half of it, where libjpeg has nothing to interpolate."""
    image = Image.open(io.BytesIO(blob))
    if image.mode == "L" or subsampling == "4:4:4":
        image.draft(
            image.mode if image.mode == "L" else "YCbCr", (image.width // factor, image.height // factor)
        )
        return [np.asarray(plane, float) for plane in image.split()]
    assert factor == 1
    image.draft("L", image.size)
    half = Image.open(io.BytesIO(blob))
    half.draft("YCbCr", (half.width // 2, half.height // 2))
    return [np.asarray(image, float), *(np.asarray(plane, float) for plane in half.split()[1:])]


def weights(start: float, side: float, size: int, length: int, kind: str) -> np.ndarray:
    """[size, length], by fine steps: 4,000 points a value."""
    made, scale = np.zeros((size, length)), side / size
    for i in range(size):
        if kind == "cubic":
            at = start + (i + 0.5) * scale - 0.5
            for j in range(math.floor(at) - 1, math.floor(at) + 3):
                x = abs(at - j)
                weight = 1.5 * x**3 - 2.5 * x**2 + 1 if x < 1 else -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
                made[i, min(max(j, 0), length - 1)] += weight
            continue
        points = start + (i + (np.arange(4000) + 0.5) / 4000) * scale
        if kind == "area":
            np.add.at(made[i], np.floor(points).astype(int).clip(0, length - 1), 1 / 4000)
        else:
            lower = np.floor(points - 0.5)
            part = points - 0.5 - lower
            np.add.at(made[i], lower.astype(int).clip(0, length - 1), (1 - part) / 4000)
            np.add.at(made[i], (lower + 1).astype(int).clip(0, length - 1), part / 4000)
    return made


def by_hand(planes: list[np.ndarray], shares: list[tuple[float, float]], size: int, box) -> np.ndarray:
    """The decoder's rule in floating point: averages over areas or, where enlarged, bicubic interpolation; of
    colours that are coarser than light averages over the lines between their pixels; RGB last.

    Args:
        planes: light and colours.
        shares: how many pixels of each there are to one of the picture, across and down.
        size, box: of the square, in the picture.
    """
    values = []
    for plane, own in zip(planes, shares, strict=True):
        filters = []
        for axis in (1, 0):
            share, side = own[axis], box[2] * own[axis]
            kind = "linear" if share < shares[0][axis] else "area" if side >= size else "cubic"
            filters.append(weights(box[axis] * share, side, size, plane.shape[1 - axis], kind))
        down, across = filters
        values.append(down @ plane @ across.T)
    light, *colours = values
    u, v = colours or [np.full_like(light, 128)] * 2
    return (np.stack([light, u - 128, v - 128], -1) @ TO_RGB.T).clip(0, 255)


@pytest.mark.parametrize(
    ("subsampling", "size", "box", "factor"),
    [
        ("4:4:4", 224, (60, 0, 360), 1),
        ("4:4:4", 300, (33, 21, 300), 1),  # as they are
        ("4:4:4", 301, (33, 21, 300), 1),
        ("4:2:0", 224, (60, 0, 360), 1),
        ("4:2:0", 100, (61, 7, 345), 1),  # colours from half a pixel on
        ("4:2:0", 180, (60, 0, 360), 1),  # an exact half
        ("4:2:0", 75, (60, 0, 360), 1),  # wider than the window of the vector instructions
        ("4:2:0", 400, (0, 0, 360), 1),  # enlarged
        ("4:4:4", 50, (60, 0, 360), 2),
        ("4:4:4", 33, (60, 0, 360), 4),
        ("grey", 224, (120, 0, 360), 1),
    ],
)
def test_pixels_are_those_of_the_rule_in_floating_point(subsampling, size, box, factor):
    blob = scene(480, 360, subsampling=0 if subsampling == "grey" else subsampling)
    if subsampling == "grey":
        file = io.BytesIO()
        Image.open(io.BytesIO(blob)).convert("L").save(file, "JPEG", quality=92)
        blob = file.getvalue()
    shares = [(1 / factor, 1 / factor)] + [
        (0.5, 0.5) if subsampling == "4:2:0" else (1 / factor, 1 / factor)
    ] * 2
    stored = planes(blob, subsampling, factor)
    found, expected = drawn(blob, size, box, factor), by_hand(stored, shares[: len(stored)], size, box)
    error = np.abs(found - expected)
    assert error.max() < 1.1  # half for rounding; the steps of each value before it
    assert error.mean() < 0.3
    assert np.array_equal(drawn(blob, size, box, factor, mirrored=True), found[:, ::-1])


LIGHT = (1, 1)


@pytest.mark.parametrize(
    ("width", "height", "factors"),
    [
        (100, 90, [(2, 2), LIGHT, LIGHT]),
        (97, 83, [(1, 2), LIGHT, LIGHT]),  # 4:4:0
        (99, 120, [(4, 1), LIGHT, LIGHT]),  # 4:1:1
        (130, 97, [(2, 1), (1, 1), (2, 1)]),  # colours of two sizes
        (97, 101, [(3, 2), (1, 2), (1, 1)]),
        (80, 90, [(1, 1), (2, 2), (1, 1)]),  # light coarser than a colour
        (224, 296, [(1, 1), (1, 3), (1, 3)]),  # the last row needs fewer pixels than the one before
        (112, 298, [(1, 2), (1, 3), (1, 3)]),
        (17, 9, [(2, 2), LIGHT, LIGHT]),
        (90, 70, [(3, 2)]),  # grey: its factors say nothing
    ],
)
def test_any_sampling_factors_are_those_of_the_rule_in_floating_point(width, height, factors):
    blob, stored = patchwork(width, height, factors if len(factors) > 1 else [LIGHT])
    if len(factors) == 1:
        blob = blob.replace(bytes([1, 0x11, 0]), bytes([1, factors[0][0] << 4 | factors[0][1], 0]))
        factors = [LIGHT]
    most = [max(factor[axis] for factor in factors) for axis in (0, 1)]
    shares = [(across / most[0], down / most[1]) for across, down in factors]
    edge = min(width, height)
    for size in {8, 31, edge, 2 * edge, min(224, edge)}:
        for box in ((0, 0, edge), ((width - edge) // 2, (height - edge) // 2, edge), (1, 2, edge - 3)):
            expected = by_hand(stored, shares, size, box)
            for vectors in (True, False):
                error = np.abs(drawn(blob, size, box, vectors=vectors) - expected)
                assert error.max() < 1.2 and error.mean() < 0.35, (size, box)


def random_jpeg(draw: random.Random) -> tuple[bytes, int, int]:
    width, height = draw.choice([1, 2, 7, 16, 33, 200, 500]), draw.choice([1, 3, 8, 17, 64, 333])
    pixels = np.frombuffer(draw.randbytes(width * height * 3), np.uint8).reshape(height, width, 3)
    coding = {
        "progressive": draw.random() < 0.3,
        "subsampling": draw.choice(["4:4:4", "4:2:2", "4:2:0"]),
    }
    file = io.BytesIO()
    image = Image.fromarray(pixels).convert(draw.choice(["RGB", "RGB", "L"]))
    image.save(file, "JPEG", quality=draw.choice([30, 90]), **(coding if image.mode == "RGB" else {}))
    return file.getvalue(), width, height


@pytest.mark.skipif(not jpeg.has_vectors, reason="this CPU has no AVX2: there is one code alone")
def test_vector_instructions_change_no_pixel(monkeypatch):
    monkeypatch.setattr(
        ImageFile, "MAXBLOCK", 1 << 22
    )  # Pillow's room for a JPEG; noise takes more than it thinks
    draw = random.Random(0)
    for _ in range(300):
        blob, width, height = random_jpeg(draw)
        side = draw.randint(1, min(width, height))
        box = draw.uniform(0, width - side), draw.uniform(0, height - side), side
        size, factor, mirrored = (
            draw.choice([1, 5, 16, 31, 100]),
            draw.choice([1, 1, 2, 8]),
            draw.random() < 0.5,
        )
        one, other = (drawn(blob, size, box, factor, mirrored, vectors) for vectors in (True, False))
        assert np.array_equal(one, other), (width, height, box, size, factor)


def test_a_plain_picture_stays_plain():
    for level in (0, 77, 255):
        file = io.BytesIO()
        Image.new("RGB", (333, 222), (level, level, level)).save(file, "JPEG", quality=100)
        for size in (1, 50, 100, 111, 222, 300):
            assert (drawn(file.getvalue(), size, (40, 0, 222)) == level).all()


def test_several_sizes_come_from_one_decode_and_threads_do_not_meet():
    blobs = [scene(300 + 7 * n, 200) for n in range(8)]
    decoder = Decoder("native", PIXELS)
    alone = [squares(decoder, blob, 96) + squares(decoder, blob, 64) for blob in blobs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda blob: squares(decoder, blob, 96, 64), blobs * 8))
    for number, found in enumerate(together):
        assert all(map(np.array_equal, found, alone[number % 8]))


def test_the_rule_is_that_of_the_other_decoders():
    draw = random.Random(2)
    for _ in range(60):
        blob = scene(width := draw.randint(20, 900), height := draw.randint(20, 900), 0)
        view = View(draw.uniform(0.3, 1), draw.random(), draw.random(), draw.random() < 0.5)
        sizes = draw.choice([(8,), (16, 50), (100,), (224,)])
        target = math.ceil(max(sizes) / view.side)
        out = [np.empty((size, size, 3), np.uint8) for size in sizes]
        shares = view.side, view.left, view.top
        assert jpeg.view(blob, out, target, width * height, shares, view.mirrored)
        factor, box = reduction((width, height), target), tuple(map(int, view.box(width, height)))
        for found, size in zip(out, sizes, strict=True):
            assert np.array_equal(found, drawn(blob, size, box, factor, view.mirrored))
        assert jpeg.view(blob, out, target, width * height - 1, shares, view.mirrored) is False
    assert jpeg.view(scene(80, 60), out, 224, 1 << 20, (1, 0.5, 0.5), False) is None


@pytest.mark.parametrize("orientation", TURNS)
def test_a_view_of_a_turned_picture_is_the_view_of_the_upright_one(orientation):
    turns, size, view = TURNS[orientation], (40, 30), View(0.5, 0.2, 0.9)
    y, x = np.mgrid[0:30, 0:40]
    stored = np.stack([x, y, x], -1).astype(np.uint8)
    upright = _turned(stored, turns)
    x, y, side = map(int, view.box(upright.shape[1], upright.shape[0]))
    left, top, edge = _lying(view, size, turns)
    lying = stored[top : top + edge, left : left + edge]
    assert np.array_equal(_turned(lying, turns), upright[y : y + side, x : x + side])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_and_mirrored_views_are_those_of_pillow(orientation):
    blob, view = scene(500, 380, orientation), View(0.6, 0.1, 0.8, mirrored=True)
    (found,), (expected,) = (
        squares(Decoder(name, PIXELS), blob, 100, view=view) for name in ("native", "pillow")
    )
    assert psnr(found, expected) > 32
    assert psnr(found, expected) > 5 + psnr(found, expected[:, ::-1])


def test_what_it_does_not_know_and_what_is_damaged_is_left_to_pillow():
    file = io.BytesIO()
    Image.fromarray(np.full((80, 80, 4), 90, np.uint8), "CMYK").save(file, "JPEG")
    both = [squares(Decoder(name, PIXELS), file.getvalue(), 32)[0] for name in ("native", "pillow")]
    assert np.array_equal(*both)
    whole, out = scene(200, 100), np.empty((32, 32, 3), np.uint8)
    for blob in (b"", b"\xff\xd8", b"\xff\xd8 no image", whole[:300]):
        assert jpeg.size(blob) is None or not jpeg.part(blob, [out], 1, (0, 0, 100), False)
    for cut in (len(whole) // 2, len(whole) - 2):  # not even the end marker may be missing
        assert jpeg.size(whole[:cut]) == (200, 100)
        assert not jpeg.part(whole[:cut], [out], 1, (0, 0, 100), False)
    with pytest.raises(BadSample):
        squares(Decoder("native", PIXELS), whole[: len(whole) // 2], 32)
    with pytest.raises(BadSample, match="200 x 100"):
        squares(Decoder("native", 100 * 200 - 1), whole, 32)


def test_damage_at_random_is_survived():
    """Whatever the bytes are: an answer, and the next picture is as before."""
    draw, out = random.Random(1), np.empty((48, 48, 3), np.uint8)
    originals = [scene(150, 120, progressive=progressive) for progressive in (False, True)]
    expected = [drawn(blob, 48, (0, 0, 120)) for blob in originals]
    taken = 0
    for trial in range(2000):
        blob = bytearray(originals[trial % 2])
        for _ in range(draw.randint(1, 8)):
            blob[draw.randrange(len(blob))] = draw.randrange(256)
        if draw.random() < 0.3:
            del blob[draw.randrange(len(blob)) :]
        size = jpeg.size(bytes(blob))
        if size is not None and size[0] * size[1] < 1 << 20:
            taken += jpeg.part(bytes(blob), [out], draw.choice([1, 2, 8]), (0, 0, min(size)), False)
        if trial % 100 == 0:
            assert all(map(np.array_equal, (drawn(b, 48, (0, 0, 120)) for b in originals), expected))
    assert 0 < taken < 2000


def test_arguments_that_make_no_sense_are_refused():
    blob, good = scene(64, 64), np.empty((8, 8, 3), np.uint8)
    read_only = np.zeros((8, 8, 3), np.uint8)
    read_only.flags.writeable = False
    for out in (
        [np.empty((8, 9, 3), np.uint8)],
        [np.empty((8, 8, 3), np.float32)],
        [good, read_only],
        [7],
        7,
    ):
        with pytest.raises((ValueError, TypeError, BufferError)):
            jpeg.part(blob, out, 1, (0, 0, 64), False)
    with pytest.raises(ValueError, match="too many"):
        jpeg.part(blob, range(10**18), 1, (0, 0, 64), False)
    for shares in ((1e9, 0.5, 0.5), (1, 1e300, 0.5), (1, math.nan, 0.5), (1, -1, 0.5)):
        with pytest.raises(ValueError, match="within the picture"):
            jpeg.view(scene(64, 50, 0), [good], 8, 1 << 20, shares, False)
    for target in (0, 1 << 30):
        with pytest.raises(ValueError, match="target"):
            jpeg.view(blob, [good], target, 1 << 20, (1, 0.5, 0.5), False)
    for box in ((0, 0, 0), (0, 0, -3), (math.nan, 0, 64), (0, 0, math.inf), (-1, 0, 64), (1, 0, 64)):
        with pytest.raises(ValueError, match="within the picture"):
            jpeg.part(blob, [good], 1, box, False)
    with pytest.raises(ValueError, match="factor"):
        jpeg.part(blob, [good], 3, (0, 0, 64), False)


@pytest.mark.parametrize("size", [(300, 200), (480, 360), (1000, 900)])
def test_close_to_the_full_decode(size):
    blob = scene(*size)
    (found,) = squares(Decoder("native", PIXELS), blob, 128)
    assert psnr(found, crop(decode(blob, PIXELS), 128)) > 33
