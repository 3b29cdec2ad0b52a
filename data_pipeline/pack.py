"""Packing parts of documents into rows: best fit decreasing."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

from data_pipeline.plan import Part


def pack(parts: Sequence[Part], room: int, max_images: int | None = None) -> list[list[Part]]:
    """Pack parts into rows of ``room`` tokens.

    Longest first, each into the fullest row that still takes it; ties by the order given. Parts of
    one row come in the order given.

    Args:
        parts: each at most ``room`` tokens and ``max_images`` images.
        room: tokens of a row.
        max_images: images of a row at most, or None.

    Returns:
        Rows; every part in exactly one.
    """
    rows: list[list[int]] = []
    images: list[int] = []
    open_rows: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for index in sorted(range(len(parts)), key=lambda i: -parts[i].length):
        part = parts[index]
        slot = bisect_left(open_rows, (part.length, -1))
        while slot < len(open_rows) and max_images is not None:
            if images[open_rows[slot][1]] + part.images <= max_images:
                break
            slot += 1
        if slot < len(open_rows):
            free, row = open_rows.pop(slot)
        else:
            free, row = room, len(rows)
            rows.append([])
            images.append(0)
        rows[row].append(index)
        images[row] += part.images
        insort(open_rows, (free - part.length, row))
    return [[parts[index] for index in sorted(row)] for row in rows]
