"""The operators' public face: checks the arguments, then runs the fastest implementation there is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmi_kernels import reference


def mmfs_attention(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    offsets: Tensor,
    logits: Tensor,
    table_offsets: Tensor,
    table_logits: Tensor,
    reference_points: Tensor,
    visible: Tensor,
    *,
    base: float,
    sink_value: Tensor | None = None,
    sink: bool = True,
) -> Tensor:
    """Multi-image multi-scale deformable attention (MM-Interleaved, equation 4), fused.

    Query q sees the images of a half-open interval [a, b). Image m of it lies rel = b - m back
    (1 is the nearest). Its sampling locations are ``reference + (offsets[q] + table_offsets[rel])
    / base``, the same on every level, and its logits ``logits[q] + table_logits[rel]``. One softmax
    per head runs over all visible images, levels and points, with an extra entry of logit 0 whose
    value is ``sink_value`` (zero when None). An image whose rel has no row in the table is not
    visible. Sampling is bilinear; pixel = location * size - 0.5; outside a map lies zero.

    Letters: I images, S positions of all levels of an image, L levels, Q queries, H heads,
    P points, D channels a head, K rows of the table (row 0 is never used), G query groups.

    Args:
        value: [I, S, H, D], the projected maps; levels one after the other, row-major.
        spatial_shapes: (height, width) of each of the L levels.
        offsets: [Q, H, P, 2] as (x, y), in pixels of a grid of ``base`` pixels a side.
        logits: [Q, H, L, P].
        table_offsets: [K, H, P, 2].
        table_logits: [K, H, L, P].
        reference_points: [Q, 2] or [1, 2] as (x, y) in 0..1.
        visible: int32 [G, 2], half-open intervals into I; Q is a multiple of G and each run of
            Q / G queries shares one interval.
        base: pixels a side of the grid in which offsets are measured.
        sink_value: [H, D] or None.
        sink: with the extra entry, or a plain softmax (then ``sink_value`` is what a query that
            sees nothing gets).

    Returns:
        [Q, H, D] in the dtype of ``value``.

    Raises:
        ValueError: naming the argument whose shape, dtype or device does not fit.
    """
    _check_mmfs(value, spatial_shapes, offsets, logits, table_offsets, table_logits, reference_points, visible)
    return reference.mmfs_attention(
        value,
        spatial_shapes,
        offsets,
        logits,
        table_offsets,
        table_logits,
        reference_points,
        visible,
        base=base,
        sink_value=sink_value,
        sink=sink,
    )


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Multi-scale deformable attention (Deformable DETR, equation 3) after its projections.

    Args:
        value: [N, S, H, D], levels one after the other, row-major.
        spatial_shapes: (height, width) of each of the L levels, or an integer tensor [L, 2].
        sampling_locations: [N, Q, H, L, P, 2] as (x, y) in 0..1.
        attention_weights: [N, Q, H, L, P].

    Returns:
        [N, Q, H * D] in the dtype of ``value``.

    Raises:
        ValueError: when the levels do not add up to S, or shapes disagree.
    """
    shapes = as_shapes(spatial_shapes)
    _check_levels(value, shapes)
    if sampling_locations.shape[:-1] != attention_weights.shape or sampling_locations.shape[-1] != 2:
        raise ValueError(
            f"sampling_locations {tuple(sampling_locations.shape)} must be attention_weights "
            f"{tuple(attention_weights.shape)} with a last axis of 2"
        )
    return reference.ms_deform_attn(value, shapes, sampling_locations, attention_weights)


def as_shapes(spatial_shapes: Sequence[tuple[int, int]] | Tensor) -> tuple[tuple[int, int], ...]:
    """Level sizes as a tuple of (height, width)."""
    if isinstance(spatial_shapes, Tensor):
        spatial_shapes = spatial_shapes.tolist()
    return tuple((int(h), int(w)) for h, w in spatial_shapes)


def _check_levels(value: Tensor, shapes: tuple[tuple[int, int], ...]) -> None:
    if value.ndim != 4:
        raise ValueError(f"value: expected 4 axes, got shape {tuple(value.shape)}")
    positions = sum(h * w for h, w in shapes)
    if positions != value.shape[1]:
        raise ValueError(f"spatial_shapes: levels {shapes} hold {positions} positions, value has {value.shape[1]}")


def _check_mmfs(value, spatial_shapes, offsets, logits, table_offsets, table_logits, reference_points, visible):
    shapes = as_shapes(spatial_shapes)
    _check_levels(value, shapes)
    heads, levels = value.shape[2], len(shapes)
    queries, points = offsets.shape[0], offsets.shape[2]
    rows = table_offsets.shape[0]
    expected = {
        "offsets": (offsets, (queries, heads, points, 2)),
        "logits": (logits, (queries, heads, levels, points)),
        "table_offsets": (table_offsets, (rows, heads, points, 2)),
        "table_logits": (table_logits, (rows, heads, levels, points)),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
    if tuple(reference_points.shape) not in ((queries, 2), (1, 2)):
        raise ValueError(f"reference_points: expected ({queries}, 2) or (1, 2), got {tuple(reference_points.shape)}")
    groups = visible.shape[0]
    if visible.ndim != 2 or visible.shape[1] != 2 or visible.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"visible: expected integers [G, 2], got {visible.dtype} {tuple(visible.shape)}")
    if queries and (groups == 0 or queries % groups):
        raise ValueError(f"visible: {queries} queries do not divide into {groups} groups")
