"""What is taken of a picture: the largest square in the middle, or a random one, mirrored or not.

The choice is a keyed hash of (seed, source, pass over it, document, image), so it is the same on any rank
and in any executor, and another one in each pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from data_pipeline.keys import keyed
from data_pipeline.settings import SourceSettings

AREA, LEFT, TOP, MIRROR = range(4)
"""What a keyed choice is for."""


@dataclass(frozen=True)
class View:
    """A square of a picture.

    Attributes:
        side: of the square, a share of the picture's shorter side.
        left, top: where it lies, as shares of the room on that axis; 0.5 is the middle.
        mirrored: left and right change places.
    """

    side: float = 1.0
    left: float = 0.5
    top: float = 0.5
    mirrored: bool = False

    def box(self, width: int, height: int) -> tuple[float, float, float]:
        """Left edge, top edge and side in pixels, within a picture of that size."""
        side = max(1.0, self.side * min(width, height))
        return (width - side) * self.left, (height - side) * self.top, side


CENTER = View()


def is_random(source: SourceSettings) -> bool:
    """Whether pictures of a source are seen in random views."""
    return source.crop == "random" or source.flip > 0


def view_of(source: SourceSettings, key: int | None, image: int) -> View:
    """The view of an image of a document.

    Args:
        source: how its pictures are seen.
        key: the document's, in this pass; None for the plain view.
        image: its number in the document.

    Returns:
        A square of an area drawn uniformly from ``crop_scale`` to 1 of the largest, anywhere; a document
        is mirrored with all its images or not at all, so that pictures of one scene stay alike.
    """
    if key is None:
        return CENTER
    mirrored = _share(key, MIRROR) < source.flip
    if source.crop != "random":
        return View(mirrored=mirrored)
    area = source.crop_scale + (1 - source.crop_scale) * _share(key, AREA, image)
    return View(math.sqrt(area), _share(key, LEFT, image), _share(key, TOP, image), mirrored)


def _share(*key: int) -> float:
    """A number from 0 up to, not including, 1."""
    return (keyed(*key) >> 11) / (1 << 53)
