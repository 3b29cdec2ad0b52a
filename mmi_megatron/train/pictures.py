"""Pictures written while training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def save_strip(path: Path, true: np.ndarray, drawn: np.ndarray) -> None:
    """Write true images above drawn ones; uint8 [J, H, W, 3] each, at most 16 of them."""
    rows = [np.concatenate(list(images[:16]), axis=1) for images in (true, drawn)]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(rows)).save(path)
