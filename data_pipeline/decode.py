"""Image files to pixels.

Three decoders, one rule. Where the picture is much larger than what is made of it, a JPEG is decoded at
1/2, 1/4 or 1/8 of its size, which its DCT gives almost for free, still at least twice as large as
needed; the rest of the way is an average over areas. Where it is not, it is decoded in full.

``pillow`` is always there. The others take the JPEGs and leave the rest, and every JPEG they do not like, to
``pillow``. ``native`` (csrc/, compiled with the package where libjpeg-turbo's headers are) brings light and
colours to size as they are stored and makes RGB of them last, so that nothing is interpolated at the size of
the picture; whatever is shrunk is an average over areas. ``turbo`` (simplejpeg and OpenCV, the ``data-fast``
extra) resizes linearly below a shrink of 2, and saves more where an average hides it: colours stored
coarser than the light are repeated, not interpolated, from a shrink of ``REPEATED`` on, and up to ``BARELY``
the average is of a picture brought to exactly twice the size. The decoders give slightly different pixels,
so the fingerprint of the decoder is part of the data's position.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import math
import struct
import threading
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import PIL
from PIL import Image, ImageOps, UnidentifiedImageError, features

from data_pipeline.errors import BadSample, SettingsError
from data_pipeline.views import CENTER, View

FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
DECODERS = ("auto", "native", "turbo", "pillow")
RULE = 3
"""Version of the rule; part of the fingerprint."""
REDUCTIONS = (8, 4, 2)
START_OF_SCAN = 0xDA
"""Marker of a JPEG."""
VECTOR = 64
"""Bytes; the longest vectors of any CPU."""
OVERSIZE = 2
"""A reduced JPEG still has at least this many times the pixels a side that are asked for."""
REPEATED = 2.1
"""From this shrink on a JPEG's colours are repeated (libjpeg-turbo's merged upsampling), not interpolated.
On photographs that is then at most 0.2 dB further from the picture before the encoder; from 1.25 to 2 it
would be 0.3 in the median and up to 1: benchmarks/results/decode_quality_2026-11-21.md."""
BARELY = 2.15
"""Above ``OVERSIZE`` and up to this shrink, a linear resize to exactly ``OVERSIZE`` times the size and the
average of two by two pixels stand for the average over areas: OpenCV takes a third of the time, and on
photographs that is at most 0.2 dB further from the truth in the median (the same file)."""
NEEDS = {
    "native": "a C++ compiler and libjpeg-turbo's headers (Debian: libjpeg-dev) at installation",
    "turbo": "`pip install mmi-megatron[data-fast]`",
}
"""What a decoder that is not there takes."""
TURNS = {2: "h", 3: "rr", 4: "v", 5: "t", 6: "r", 7: "rrt", 8: "rrr"}
"""What an EXIF orientation takes to stand upright: h, v mirror, r a quarter to the right, t transpose."""


class Room(threading.local):
    """Memory of a thread, used again and again: fresh pages cost as much as a resize.

    Where a row of pixels begins at a multiple of its vectors, libjpeg-turbo writes it past the CPU's cache
    (non-temporal stores), and the resize then reads it from memory: a tenth of the whole. So the room begins
    at no such multiple.
    """

    def __init__(self) -> None:
        self._whole = np.empty(0, np.uint8)

    def whole(self, size: int) -> np.ndarray:
        """At least so many bytes."""
        if self._whole.size < size:
            room = np.empty((1 << (size - 1).bit_length()) + VECTOR, np.uint8)
            start = (VECTOR // 8 - room.ctypes.data) % VECTOR
            self._whole = room[start : start + room.size - VECTOR]
        return self._whole


class Decoder:
    """Images to squares of pixels.

    Args:
        name: ``native``, ``turbo``, ``pillow``, or ``auto``: the first of these that is there.
        max_pixels: an image of more pixels is a bad sample; never decoded.

    Raises:
        SettingsError: when the decoder is unknown or not there.

    Attributes:
        name: the decoder that was chosen.
        fingerprint: changes with what may change a pixel: the rule and the versions of the libraries, of
            ``native`` that of the headers it was compiled with.
    """

    def __init__(self, name: str, max_pixels: int):
        if name not in DECODERS:
            raise SettingsError(f"data.decoder: must be one of {', '.join(DECODERS)}, got {name!r}")
        there = {"native": has_native(), "turbo": has_turbo(), "pillow": True}
        if not there.get(name, True):
            raise SettingsError(f"data.decoder: {name} needs {NEEDS[name]}")
        self.name = next(own for own in DECODERS if there.get(own)) if name == "auto" else name
        self.max_pixels = max_pixels
        versions = [f"rule {RULE}", f"pillow {PIL.__version__}", f"libjpeg-turbo {_libjpeg()}"]
        if self.name == "turbo":
            cv2, simplejpeg = _turbo()
            versions += [f"simplejpeg {simplejpeg.__version__}", f"opencv {cv2.__version__}"]
        elif self.name == "native":
            versions += [f"compiled with libjpeg-turbo {_native().version}"]
        self.fingerprint = ", ".join([self.name, *versions])
        self._room = Room()

    def squares(self, blob: bytes, out: Sequence[np.ndarray], view: View = CENTER) -> None:
        """Decode once and write a square at every size asked for.

        Args:
            blob: an image file.
            out: uint8 [size, size, 3] each, RGB; filled.
            view: which square; by default the largest in the middle.

        Raises:
            BadSample: when it cannot be decoded to the end, or has more than ``max_pixels``.
        """
        target = math.ceil(max(map(len, out)) / view.side)  # of the whole picture: what it is reduced to
        if self.name != "pillow" and blob[:2] == b"\xff\xd8":
            if self.name == "native":
                done = self._native(blob, target, out, view)
            else:
                done = self._turbo(blob, target, out, view)
            if done:
                return
        image, reduced = self._pillow(blob, target)
        for square in out:
            way = Image.Resampling.BOX if reduced else Image.Resampling.BICUBIC
            found = np.asarray(_square(image, len(square), way, view))
            square[...] = found[:, ::-1] if view.mirrored else found

    def _pillow(self, blob: bytes, target: int) -> tuple[Image.Image, bool]:
        image = open_image(blob, self.max_pixels)
        factor = reduction(image.size, target) if image.format == "JPEG" else 1
        if factor > 1:
            image.draft(image.mode, (-(-image.width // factor), -(-image.height // factor)))
        return _upright(image), factor > 1

    def _native(self, blob: bytes, target: int, out: Sequence[np.ndarray], view: View) -> bool:
        """A JPEG's squares; or False: Pillow is to say what is wrong with it, or to decode it."""
        jpeg = _native()
        done = jpeg.view(blob, out, target, self.max_pixels, (view.side, view.left, view.top), view.mirrored)
        if done is not None:
            return done
        size, turns = jpeg.size(blob), TURNS.get(_orientation(blob), "")
        lying = [np.empty_like(square) for square in out]
        if not jpeg.part(blob, lying, reduction(size, target), _lying(view, size, turns), False):
            return False
        for square, one in zip(out, lying, strict=True):
            found = _turned(one, turns)
            square[...] = found[:, ::-1] if view.mirrored else found
        return True

    def _turbo(self, blob: bytes, target: int, out: Sequence[np.ndarray], view: View) -> bool:
        """A JPEG's squares; or False: Pillow is to say what is wrong with it, or to decode it."""
        _, simplejpeg = _turbo()
        try:
            height, width, space, _ = simplejpeg.decode_jpeg_header(blob)
            if space not in ("YCbCr", "Gray") or height * width > self.max_pixels:
                return False
            factor = reduction((width, height), target)
            rows, columns = -(-height // factor), -(-width // factor)
            repeated = min(rows, columns) >= REPEATED * target
            turns = TURNS.get(_orientation(blob))  # first: the decode drives the file out of the cache
            room = self._room.whole(3 * rows * columns)
            if factor == 1:
                pixels = simplejpeg.decode_jpeg(blob, "RGB", fastupsample=repeated, buffer=room)
            else:
                least = {"min_height": rows, "min_width": columns, "min_factor": float(factor)}
                pixels = simplejpeg.decode_jpeg(blob, "RGB", fastupsample=repeated, buffer=room, **least)
        except ValueError:
            return False
        pixels = _turned(pixels, turns) if turns else pixels
        for square in out:
            resize(pixels, square, view)
        return True


def reduction(size: tuple[int, int], target: int) -> int:
    """1, or by how much to reduce a JPEG of that size while decoding it for squares of ``target``."""
    most = min(size) // (OVERSIZE * target)
    if most < REDUCTIONS[-1]:
        return 1
    return next(factor for factor in REDUCTIONS if factor <= most)


def open_image(blob: bytes, max_pixels: int) -> Image.Image:
    """Open an image by its header; no pixel is decoded.

    Raises:
        BadSample: when it is no image we know, or has more than ``max_pixels``.
    """
    try:
        image = Image.open(io.BytesIO(blob), formats=FORMATS)
    except UnidentifiedImageError:
        raise BadSample("image cannot be read", f"none of {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError as error:
        raise BadSample("image is too large", str(error)) from None
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise BadSample("image cannot be read", str(error)) from None
    if image.width * image.height > max_pixels:
        raise BadSample("image is too large", f"{image.width} x {image.height}, at most {max_pixels} pixels")
    return image


def decode(blob: bytes, max_pixels: int) -> Image.Image:
    """Decode an image in full to RGB: upright by its EXIF tag, transparent parts on white, the first
    frame.

    Raises:
        BadSample: when it cannot be decoded to the end, or has more than ``max_pixels``.
    """
    return _upright(open_image(blob, max_pixels))


def crop(image: Image.Image, size: int) -> np.ndarray:
    """The largest square in the middle, resized to ``size`` (bicubic): uint8 [size, size, 3]."""
    return np.array(_square(image, size, Image.Resampling.BICUBIC))


def _upright(image: Image.Image) -> Image.Image:
    try:
        image.load()
        return _rgb(ImageOps.exif_transpose(image))
    except (OSError, ValueError, SyntaxError, EOFError, TypeError) as error:
        raise BadSample("image cannot be read", str(error)) from None


def _square(image: Image.Image, size: int, way: Image.Resampling, view: View = CENTER) -> Image.Image:
    left, top, side = view.box(*image.size)
    if image.size == (size, size) and side == size:
        return image
    return image.resize((size, size), way, box=(left, top, left + side, top + side))


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a channel: convert() would clip them
        values = np.asarray(image, dtype=np.float64) / 257.0
        return Image.fromarray(values.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(ground, image).convert("RGB")
    return image.convert("RGB")


# The fast decoders


def has_native() -> bool:
    """Whether ``native`` was compiled when the package was installed, and finds its libraries."""
    try:
        return bool(_native())
    except ImportError:
        return False


def has_turbo() -> bool:
    """Whether the packages of ``turbo`` are installed."""
    return all(importlib.util.find_spec(package) for package in ("cv2", "simplejpeg"))


@cache
def _native() -> Any:
    return importlib.import_module("data_pipeline._jpeg")


@cache
def _turbo() -> tuple[Any, Any]:
    """OpenCV, kept from starting threads of its own, and simplejpeg."""
    import cv2
    import simplejpeg

    cv2.setNumThreads(0)
    return cv2, simplejpeg


def _libjpeg() -> str:
    return str(features.version("libjpeg_turbo") or features.version("jpg"))


def resize(pixels: np.ndarray, out: np.ndarray, view: View) -> None:
    """A square of a picture brought to size as ``turbo`` does it.

    Args:
        pixels: uint8 [h, w, 3].
        out: uint8 [size, size, 3]; filled.
        view: which square.
    """
    cv2, _ = _turbo()
    size = len(out)
    height, width, _ = pixels.shape
    x, y, edge = view.box(width, height)
    left, top, side = int(x), int(y), int(edge)
    square = pixels[top : top + side, left : left + side]
    if OVERSIZE * size < side <= BARELY * size:
        side = OVERSIZE * size
        square = cv2.resize(square, (side, side), None, 0, 0, cv2.INTER_LINEAR)
    if side != size:
        way = cv2.INTER_AREA if side >= OVERSIZE * size else cv2.INTER_LINEAR
        way = way if side > size else cv2.INTER_CUBIC
        square = cv2.resize(square, (size, size), None if view.mirrored else out, 0, 0, way)
    if view.mirrored:
        cv2.flip(square, 1, dst=out)
    elif side == size:
        out[...] = square


def _lying(view: View, size: tuple[int, int], turns: str) -> tuple[int, int, int]:
    """A view's left edge, top edge and side in a picture as it is stored, which ``turns`` make upright."""
    sizes = [size]
    for turn in turns:
        width, height = sizes[-1]
        sizes.append((height, width) if turn in "rt" else (width, height))
    x, y, side = map(int, view.box(*sizes.pop()))
    for turn, (width, height) in zip(reversed(turns), reversed(sizes), strict=True):
        if turn == "r":
            x, y = y, height - x - side
        elif turn == "t":
            x, y = y, x
        elif turn == "h":
            x = width - x - side
        else:
            y = height - y - side
    return x, y, side


def _turned(pixels: np.ndarray, turns: str) -> np.ndarray:
    for turn in turns:
        if turn == "r":
            pixels = np.rot90(pixels, -1)
        elif turn == "t":
            pixels = pixels.transpose(1, 0, 2)
        else:
            pixels = pixels[:, ::-1] if turn == "h" else pixels[::-1]
    return np.ascontiguousarray(pixels)


def _orientation(blob: bytes) -> int:
    """The EXIF orientation of a JPEG, 1 where it says none. It stands before the pixels."""
    at = 2
    while at + 4 <= len(blob) and blob[at] == 0xFF and blob[at + 1] != START_OF_SCAN:
        (size,) = struct.unpack_from(">H", blob, at + 2)
        if blob[at + 1] == 0xE1 and blob[at + 4 : at + 10] == b"Exif\0\0":
            exif = Image.Exif()
            try:
                exif.load(blob[at + 4 : at + 2 + size])
                return int(exif.get(0x0112, 1))
            except (SyntaxError, ValueError, TypeError, struct.error, KeyError):
                return 1  # a broken tag says nothing of how the picture stands
        at += 2 + size
    return 1
