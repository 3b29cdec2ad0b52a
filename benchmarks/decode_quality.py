"""What the two savings of the fast decoder cost in quality, by how much the picture is then shrunk.

    python benchmarks/decode_quality.py [FOLDER ...] [--subsampling 4:2:0] [--out FILE]

Every picture below a folder (one table a folder; without any, synthetic ones) is written as a JPEG at three
qualities, decoded twice, colours interpolated and repeated (simplejpeg's ``fastupsample``, libjpeg-turbo's
merged upsampling), and both are cropped and resized as the decoder does. A picture that was a JPEG with
coarse colours is halved first, so that its own have all their detail. For each shrink:

apart   PSNR between the two, dB: the median and the least of the pictures
loss    how many dB further than interpolated ones repeated colours are from the picture before the JPEG
        encoder, brought to the same size in floating point by an antialiased bicubic filter: median, most
same    the same loss where the picture before the encoder is brought to size as the decoder does it, so
        that the resize's own aliasing hides nothing: median, most

A second table compares two ways to shrink the decoded picture, a little more than by half: the average over
areas against a linear resize to exactly twice the size and the average of two by two pixels; and what both
savings, the decoder as it is, cost together against interpolated colours and the average over areas.

A third sets the compiled decoder against this one, as a loss: below 0 ``native`` is the nearer one.
"""

from __future__ import annotations

import argparse
import io
import platform
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg
from PIL import Image, ImageDraw

from data_pipeline.decode import Decoder, has_native, resize
from data_pipeline.views import CENTER

Measure = Callable[[np.ndarray, float, int, str], list[float]]
Given = tuple[list[np.ndarray], str]
"""The pictures of a group, and how their colours are stored."""
QUALITIES = (75, 87, 95)
SHRINKS = (1.0, 1.25, 1.5, 1.607, 1.75, 1.9, 2.0, 2.05, 2.1, 2.143, 2.25, 2.5, 3.0)
NEAR_TWO = (2.02, 2.05, 2.1, 2.143, 2.15, 2.2, 2.25, 2.5)
LEAST = 250
"""Pixels of the shorter side; smaller pictures say little once shrunk."""


def pictures(folder: Path) -> Iterator[np.ndarray]:
    """The opaque RGB pictures below a folder, uint8 [h, w, 3]."""
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in (".jpg", ".jpeg", ".png"):
            continue
        image = Image.open(path)
        coarse = image.format == "JPEG" and getattr(image, "layer", [(1, 1, 1)])[0][1:3] != (1, 1)
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        image = image.convert("RGB")
        image = image.reduce(2) if coarse else image
        if min(image.size) >= LEAST:
            yield np.asarray(image)


def photograph(seed: int, width: int = 640, height: int = 480) -> np.ndarray:
    """Detail at all scales, colour falling off faster than light as in photographs: uint8 [h, w, 3]."""
    rng = np.random.default_rng(seed)
    image = np.full((height, width, 3), 128.0)
    for cells, light, colour in ((4, 50, 30), (16, 30, 14), (60, 16, 6), (200, 8, 2), (400, 5, 1)):
        for channel in (None, 0, 1, 2):
            coarse = rng.normal(0, light if channel is None else colour, (cells * height // width + 1, cells))
            layer = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
            image[..., slice(None) if channel is None else channel] += (
                layer[..., None] if channel is None else layer
            )
    return image.clip(0, 255).astype(np.uint8)


def lettering(ink: str, ground: str) -> np.ndarray:
    """Small text of one colour on another: the hardest case for coarse colours."""
    image = Image.new("RGB", (640, 480), ground)
    draw = ImageDraw.Draw(image)
    for line in range(30):
        draw.text((4 + line % 7, 16 * line), "the quick brown fox jumps over the lazy dog " * 3, fill=ink)
    return np.asarray(image)


def edges(seed: int) -> np.ndarray:
    """Polygons of saturated colours."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (640, 480))
    draw = ImageDraw.Draw(image)
    for _ in range(200):
        middle, corners = rng.uniform(0, (640, 480)), rng.normal(0, 40, (3, 2))
        draw.polygon([tuple(point) for point in middle + corners], fill=tuple(rng.integers(0, 256, 3)))
    return np.asarray(image)


def synthetic() -> dict[str, list[np.ndarray]]:
    """The pictures to look at where no folder is named."""
    colours = (("red", "blue"), ("blue", "red"), ("lime", "magenta"), ("black", "white"))
    return {
        "synthetic photographs": [photograph(seed) for seed in range(6)],
        "text in colour": [lettering(*pair) for pair in colours],
        "polygons in colour": [edges(seed) for seed in range(4)],
    }


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """dB, of 8-bit values."""
    error = np.square(one.astype(np.float64) - other.astype(np.float64)).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


def antialiased(square: np.ndarray, size: int) -> np.ndarray:
    """A square brought to a size by a bicubic filter as wide as the shrink asks: float32 [size, size, 3]."""
    planes = [Image.fromarray(square[..., channel].astype(np.float32)) for channel in range(3)]
    return np.stack(
        [np.asarray(plane.resize((size, size), Image.Resampling.BICUBIC)) for plane in planes], -1
    )


def encoded(pixels: np.ndarray, quality: int, subsampling: str) -> bytes:
    """A JPEG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling=subsampling)
    return file.getvalue()


def middle(pixels: np.ndarray) -> np.ndarray:
    """The largest square in the middle."""
    height, width, _ = pixels.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return pixels[top : top + side, left : left + side]


def colours(pixels: np.ndarray, shrink: float, quality: int, subsampling: str) -> list[float]:
    """Interpolated against repeated colours, dB: apart, and the loss against each of the two truths."""
    blob = encoded(pixels, quality, subsampling)
    size = int(min(pixels.shape[:2]) / shrink)
    same, fine, fast = (np.empty((size, size, 3), np.uint8) for _ in range(3))
    resize(pixels, same, CENTER)
    for repeated, out in ((False, fine), (True, fast)):
        resize(simplejpeg.decode_jpeg(blob, "RGB", fastupsample=repeated), out, CENTER)
    truths = antialiased(middle(pixels), size), same
    return [psnr(fine, fast)] + [psnr(fine, truth) - psnr(fast, truth) for truth in truths]


def averages(pixels: np.ndarray, shrink: float, quality: int, subsampling: str) -> list[float]:
    """Average over areas against the average in two steps, then against the decoder as it is, dB: apart and
    loss, each."""
    blob = encoded(pixels, quality, subsampling)
    square = middle(simplejpeg.decode_jpeg(blob, "RGB"))
    size = int(len(square) / shrink)
    once = cv2.resize(square, (size, size), interpolation=cv2.INTER_AREA)
    twice = cv2.resize(square, (2 * size, 2 * size), interpolation=cv2.INTER_LINEAR)
    steps = cv2.resize(twice, (size, size), interpolation=cv2.INTER_AREA)
    both = np.empty_like(once)
    Decoder("turbo", pixels.size).squares(blob, [both])
    truth = antialiased(middle(pixels), size)
    loss = psnr(once, truth) - psnr(steps, truth), psnr(once, truth) - psnr(both, truth)
    return [psnr(once, steps), loss[0], psnr(once, both), loss[1]]


def decoders(pixels: np.ndarray, shrink: float, quality: int, subsampling: str) -> list[float]:
    """``native`` against ``turbo``, dB: apart, and the loss against the picture before the encoder."""
    blob = encoded(pixels, quality, subsampling)
    size = int(min(pixels.shape[:2]) / shrink)
    turbo, native = (np.empty((size, size, 3), np.uint8) for _ in range(2))
    for name, out in (("turbo", turbo), ("native", native)):
        Decoder(name, pixels.size).squares(blob, [out])
    truth = antialiased(middle(pixels), size)
    return [psnr(turbo, native), psnr(turbo, truth) - psnr(native, truth)]


def row(shrink: float, quality: int, measured: list[list[float]], apart: tuple[int, ...]) -> str:
    """The median and the worst of the pictures: the least of what is ``apart``, the most of a loss."""
    cells = [f"{shrink}", f"{quality}"]
    for at, values in enumerate(zip(*measured, strict=True)):
        worst = min(values) if at in apart else max(values)
        cells += [f"{value:.{1 if at in apart else 2}f}" for value in (np.median(values), worst)]
    return f"| {' | '.join(cells)} |"


def table(
    text: str,
    columns: str,
    measure: Measure,
    shrinks: tuple[float, ...],
    apart: tuple[int, ...],
    given: Given,
) -> list[str]:
    """A table in Markdown below a line of text: a row for each shrink and quality."""
    images, subsampling = given
    names = f"shrink | quality | {columns}"
    lines = ["", text, "", f"| {names} |", "|---" * len(names.split(" | ")) + "|"]
    for shrink in shrinks:
        for quality in QUALITIES:
            found = [measure(image, shrink, quality, subsampling) for image in images]
            lines.append(row(shrink, quality, found, apart))
    return lines


def tables(group: str, images: list[np.ndarray], subsampling: str, native_alone: bool) -> str:
    """A group's tables in Markdown."""
    given = images, subsampling
    lines = [f"## {group}: {len(images)} pictures, {subsampling}"]
    if not native_alone:
        columns = "apart: median | least | loss: median | most | same: median | most"
        lines += table("Colours repeated, not interpolated:", columns, colours, SHRINKS, (0,), given)
        text = "The average in two steps, and both savings as the decoder makes them:"
        columns = "apart | least | loss | most | both apart | least | loss | most"
        lines += table(text, columns, averages, NEAR_TWO, (0, 2), given)
    if has_native():
        columns = "apart: median | least | loss: median | most"
        lines += table("`native` against `turbo`:", columns, decoders, SHRINKS, (0,), given)
    return "\n".join([*lines, ""])


def main() -> None:
    """Print, and write where asked, the tables of each group."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER")
    parser.add_argument("--subsampling", choices=("4:2:0", "4:2:2"), default="4:2:0")
    parser.add_argument("--native", action="store_true", help="the third table alone")
    parser.add_argument("--out", type=Path)
    asked: Any = parser.parse_args()
    groups = {folder.name: list(pictures(folder)) for folder in asked.folders} or synthetic()
    versions = (
        f"simplejpeg {simplejpeg.__version__}, OpenCV {cv2.__version__}, Python {platform.python_version()}"
    )
    text = [
        f"# What the fast decoder's savings cost in quality, {datetime.now(UTC):%Y-%m-%d}",
        "",
        versions,
        "",
    ]
    for group, images in groups.items():
        if not images:
            raise SystemExit(f"{group}: holds no JPEG or PNG of at least {LEAST} pixels a side")
        text.append(tables(group, images, asked.subsampling, asked.native))
    print("\n".join(text))
    if asked.out:
        asked.out.write_text("\n".join(text))


if __name__ == "__main__":
    main()
