"""Small illustrated stories with known truth, so that a machine without data can train and be judged.

A story has 3 to 5 pages. Each page says what will be drawn, shows it, and says something that only
the picture tells. The first page names kind, colour and place of a shape; later ones say where it
moves, and every third or so only calls it "it", so that its looks follow from the pages before. A
random digit and the paper's colour, which no text announces, are told after the picture, so that the
next token depends on the image.

    A red circle is at the top.         [picture]  The number is 7, the paper pink.
    The red circle moves to the left.   [picture]  The number is 2, the paper white.
    It moves to the bottom.             [picture]  ...

Everything is a function of (seed, index). Lengths are in units of the picture's side.
"""

from __future__ import annotations

import io
import random
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from data_pipeline.errors import DataError
from data_pipeline.formats import Document, Summary, write_documents

KINDS = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (230, 20, 30),
    "green": (0, 200, 40),
    "blue": (20, 40, 240),
    "yellow": (250, 220, 0),
    "purple": (200, 0, 220),
    "teal": (0, 215, 230),
}
BACKGROUNDS = {
    "grey": (128, 128, 128),
    "brown": (140, 105, 70),
    "slate": (80, 105, 140),
    "olive": (100, 120, 65),
}
POSITIONS = {
    "top": (0.5, 0.25),
    "bottom": (0.5, 0.75),
    "left": (0.25, 0.5),
    "right": (0.75, 0.5),
    "middle": (0.5, 0.5),
}
PLACES = {"top": "at the top", "bottom": "at the bottom", "left": "on the left", "right": "on the right"}
PLACES["middle"] = "in the middle"
OPENINGS = ("A {colour} {kind} is {place}.", "Here is a {colour} {kind} {place}.")
MOVES = (
    "The {colour} {kind} moves to the {position}.",
    "Now the {colour} {kind} is {place}.",
    "It moves to the {position}.",
)
CLOSINGS = ("The number is {digit}, the paper {background}.",)
CHANCE = {"colour": 1 / len(COLOURS), "kind": 1 / len(KINDS), "position": 1 / len(POSITIONS)}
"""How often a guess is right."""

RADIUS = 0.19
CORNER = 0.3
"""Side of the square at the top left that the digit lies in; no shape reaches it."""
INK = (250, 250, 250)
_GLYPHS = (
    ("111", "101", "101", "101", "111"),
    ("010", "110", "010", "010", "111"),
    ("111", "001", "111", "100", "111"),
    ("111", "001", "011", "001", "111"),
    ("101", "101", "111", "001", "001"),
    ("111", "100", "111", "001", "111"),
    ("111", "100", "111", "101", "111"),
    ("111", "001", "010", "010", "010"),
    ("111", "101", "111", "101", "111"),
    ("111", "101", "111", "001", "111"),
)
OVERSAMPLED = 8
JUDGED = 32
"""Pixels a side at which pictures are judged."""


def story(seed: int, index: int, size: int = 32) -> Document:
    """One story.

    Args:
        seed, index: choose it.
        size: pixels a side of its pictures.

    Returns:
        A document whose metadata holds ``pages``: kind, colour, position, digit and background of
        each picture.
    """
    choose = random.Random(f"storybook {seed} {index}")
    kind, colour = choose.choice(KINDS), choose.choice(list(COLOURS))
    content: list[str | bytes] = []
    pages: list[dict[str, Any]] = []
    position = ""
    for number in range(choose.randint(3, 5)):
        position = choose.choice([place for place in POSITIONS if place != position])
        page: dict[str, Any] = {
            "kind": kind,
            "colour": colour,
            "position": position,
            "digit": choose.randrange(10),
            "background": choose.choice(list(BACKGROUNDS)),
        }
        before = choose.choice(MOVES if number else OPENINGS).format(**page, place=PLACES[position])
        after = choose.choice(CLOSINGS).format(**page)
        content += [(" " if number else "") + before, to_png(draw_page(page, size)), f" {after}"]
        pages.append(page)
    return Document(f"story-{seed}-{index:06d}", content, {"pages": pages})


def write_stories(folder: Path | str, stories: int, seed: int = 0, size: int = 32) -> Summary:
    """Write stories 0 to ``stories - 1`` of a seed to shards.

    Raises:
        DataError: when there is nothing to write or the folder already holds shards.
    """
    if stories < 1 or size < 16:
        raise DataError(f"--stories {stories} must be at least 1 and --size {size} at least 16")
    return write_documents((story(seed, index, size) for index in range(stories)), folder)


def draw_page(page: dict, size: int) -> np.ndarray:
    """Draw a page: uint8 [size, size, 3]."""
    side = size * OVERSAMPLED
    image = Image.new("RGB", (side, side), BACKGROUNDS[page["background"]])
    pen = ImageDraw.Draw(image)
    _draw_shape(pen, page["kind"], POSITIONS[page["position"]], side, COLOURS[page["colour"]])
    for row, line in enumerate(_GLYPHS[page["digit"]]):
        for column, dot in enumerate(line):
            if dot == "1":
                x, y = 0.03125 + 0.0625 * column, 0.02 + 0.0525 * row
                box = [x * side, y * side, (x + 0.0625) * side - 1, (y + 0.0525) * side - 1]
                pen.rectangle(box, fill=INK)
    return np.asarray(image.resize((size, size), Image.Resampling.BOX))


def to_png(pixels: np.ndarray) -> bytes:
    """A PNG file of uint8 [H, W, 3]."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def read_picture(pixels: np.ndarray) -> dict[str, str | None]:
    """Judge a picture from its pixels alone, true or drawn by a model.

    The background is the picture's median colour. Each pixel counts as shape as far as it lies on
    the way from the background to a palette colour; the colour that explains most is the shape's,
    the nearest place to its centre of mass is the position, and the kind is the template that
    overlaps best when moved about there.

    Args:
        pixels: uint8 [3, H, W] or [H, W, 3], square.

    Returns:
        ``colour``, ``kind`` and ``position``; all None when there is no shape.

    Raises:
        ValueError: when it is not such an array.
    """
    pixels = np.asarray(pixels)
    if pixels.ndim == 3 and pixels.shape[0] == 3 and pixels.shape[-1] != 3:
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.shape[0] != pixels.shape[1]:
        raise ValueError(f"expected a square uint8 [3, H, W] or [H, W, 3], got {pixels.shape}")
    size = JUDGED
    if len(pixels) != size:
        pixels = np.asarray(Image.fromarray(pixels.astype(np.uint8)).resize((size, size)))
    flat = _blurred(pixels.astype(np.float64))
    outside = np.ones((size, size), bool)
    corner = round(CORNER * size)
    outside[:corner, :corner] = False
    ground = np.median(flat[outside], axis=0)
    names = list(COLOURS)
    ways = np.array([COLOURS[name] for name in names]) - ground
    along = np.clip((flat - ground) @ ways.T / (ways**2).sum(-1), 0, 1)
    residual = ((flat - ground)[:, :, None] - along[..., None] * ways) ** 2
    nearest = residual.sum(-1).argmin(-1)
    shape = along.max(-1) > 0.5
    counts = [(outside & shape & (nearest == index)).sum() for index in range(len(names))]
    best = int(np.argmax(counts))
    if counts[best] < 0.01 * size * size:
        return {"colour": None, "kind": None, "position": None}
    mask = np.where(outside, along[..., best], 0.0)
    mask[mask < 0.25] = 0.0
    mask = _levelled(mask)
    y, x = np.mgrid[:size, :size] + 0.5
    centre = np.array([(mask * x).sum(), (mask * y).sum()]) / mask.sum() / size
    position = min(POSITIONS, key=lambda name: np.hypot(*(centre - POSITIONS[name])))
    return {"colour": names[best], "kind": _kind(mask, position), "position": position}


def _kind(mask: np.ndarray, position: str) -> str:
    """The kind whose template covers the mask best (intersection over union, soft)."""
    scores = {}
    for kind in KINDS:
        templates = _templates(kind, position)
        overlap = np.minimum(mask, templates).sum((1, 2)) / np.maximum(mask, templates).sum((1, 2))
        scores[kind] = overlap.max()
    return max(scores, key=scores.__getitem__)


@cache
def _templates(kind: str, position: str) -> np.ndarray:
    """The shape near a position, moved about by up to two pixels: [25, JUDGED, JUDGED] in 0..1."""
    side = JUDGED * 4
    moved = []
    for dy in range(-2, 3):
        for dx in range(-2, 3):
            image = Image.new("L", (side, side), 0)
            x, y = POSITIONS[position]
            place = (x + dx / JUDGED, y + dy / JUDGED)
            _draw_shape(ImageDraw.Draw(image), kind, place, side, 255)
            small = np.asarray(image.resize((JUDGED, JUDGED), Image.Resampling.BOX), np.float64)
            moved.append(_levelled(_blurred(small[..., None])[..., 0] / 255))
    return np.stack(moved)


def _levelled(mask: np.ndarray) -> np.ndarray:
    """The mask scaled so that a pale or thin shape counts as much as a full one."""
    return np.minimum(mask / np.quantile(mask[mask > 0], 0.8), 1.0)


def _draw_shape(
    pen: ImageDraw.ImageDraw,
    kind: str,
    place: tuple[float, float],
    side: int,
    fill: tuple[int, int, int] | int,
) -> None:
    x, y, r = place[0] * side, place[1] * side, RADIUS * side
    if kind == "circle":
        pen.ellipse([x - r, y - r, x + r, y + r], fill=fill)
    elif kind == "square":
        r *= 0.9
        pen.rectangle([x - r, y - r, x + r, y + r], fill=fill)
    elif kind == "triangle":
        pen.polygon([(x, y - 1.1 * r), (x - 1.1 * r, y + r), (x + 1.1 * r, y + r)], fill=fill)
    else:
        arm = r / 3
        pen.rectangle([x - arm, y - r, x + arm, y + r], fill=fill)
        pen.rectangle([x - r, y - arm, x + r, y + arm], fill=fill)


def _blurred(pixels: np.ndarray) -> np.ndarray:
    """Mean over 3 x 3, against noise: [H, W, C]."""
    padded = np.pad(pixels, ((1, 1), (1, 1), (0, 0)), mode="edge")
    height, width = pixels.shape[:2]
    shifts = [padded[dy : dy + height, dx : dx + width] for dy in range(3) for dx in range(3)]
    return np.mean(shifts, axis=0)
