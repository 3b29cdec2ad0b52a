"""Image files to pixels."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from data_pipeline.errors import BadSample

FORMATS = ("JPEG", "PNG", "WEBP", "GIF")


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
    """Decode an image to RGB: upright by its EXIF tag, transparent parts on white, the first frame.

    Raises:
        BadSample: when it cannot be decoded to the end, or has more than ``max_pixels``.
    """
    image = open_image(blob, max_pixels)
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
        return _rgb(image)
    except (OSError, ValueError, SyntaxError, EOFError, TypeError) as error:
        raise BadSample("image cannot be read", str(error)) from None


def crop(image: Image.Image, size: int) -> np.ndarray:
    """The largest square in the middle, resized to ``size`` (bicubic): uint8 [3, size, size]."""
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    if image.size != (size, size):
        box = (left, top, left + side, top + side)
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a channel: convert() would clip them
        values = np.asarray(image, dtype=np.float64) / 257.0
        return Image.fromarray(values.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(ground, image).convert("RGB")
    return image.convert("RGB")
