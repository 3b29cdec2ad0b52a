"""Pictures written while training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def save_strip(path: Path, true: np.ndarray, drawn: np.ndarray) -> None:
    """Write true images above drawn ones; uint8 [J, 3, H, W] each, at most 16 of them."""
    rows = [np.concatenate(list(images[:16]), axis=-1) for images in (true, drawn)]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(rows, axis=-2).transpose(1, 2, 0)).save(path)
