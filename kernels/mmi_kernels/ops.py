"""The operators' public face: checks the arguments, then runs the fastest implementation there is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmi_kernels import library, reference
from mmi_kernels.autograd import OPS, exact_dtype

VALUE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


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
    visible. Sampling is bilinear; pixel = location * size - 0.5; outside a map lies zero. A sample
    whose location is not finite has the value zero and gives its location no gradient; it keeps its
    share of the softmax. Locations, softmax and sums are in float64 for a float64 value, else in
    float32. Results are the same bits at any number of threads of a CPU; on a GPU gradients are the same
    bits from run to run under ``torch.use_deterministic_algorithms(True)``.

    Letters: I images, S positions of all levels of an image, L levels, Q queries, H heads,
    P points, D channels a head, K rows of the table (row 0 is never used), G query groups.

    Args:
        value: [I, S, H, D] float32, float64, bfloat16 or float16, the projected maps; levels one
            after the other, row-major. The other floating tensors may have any floating dtype.
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
        RuntimeError: ``visible`` names images that ``value`` does not hold; on a GPU, where finding out
            would wait for the device, such an interval is cut to the images that there are.
    """
    shapes = as_shapes(spatial_shapes)
    projections = {
        "offsets": offsets,
        "logits": logits,
        "table_offsets": table_offsets,
        "table_logits": table_logits,
        "reference_points": reference_points,
    }
    _check_value(value, shapes)
    _check_mmfs(value, shapes, projections, visible, sink_value)
    if library.compiled(value.device):
        tensors = [_exact(tensor, value) for tensor in projections.values()]
        interval = visible.to(torch.int32).contiguous()
        sink_row = None if sink_value is None else _exact(sink_value, value)
        out, _ = OPS.mmfs_forward(
            _rows(value), _flat(shapes), *tensors, interval, sink_row, float(base), sink
        )
        return out
    return reference.mmfs_attention(
        value,
        shapes,
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

    Numbers, locations that are not finite and determinism as in ``mmfs_attention``.

    Args:
        value: [N, S, H, D] float32, float64, bfloat16 or float16; levels one after the other,
            row-major. The other tensors may have any floating dtype.
        spatial_shapes: (height, width) of each of the L levels, or an integer tensor [L, 2] (which
            torch.compile cannot read: give it a sequence).
        sampling_locations: [N, Q, H, L, P, 2] as (x, y) in 0..1.
        attention_weights: [N, Q, H, L, P].

    Returns:
        [N, Q, H * D] in the dtype of ``value``.

    Raises:
        ValueError: naming the argument whose shape, dtype or device does not fit.
    """
    shapes = as_shapes(spatial_shapes)
    _check_value(value, shapes)
    _check_general(value, shapes, sampling_locations, attention_weights)
    if library.compiled(value.device):
        locations, weights = _exact(sampling_locations, value), _exact(attention_weights, value)
        return OPS.deform_forward(_rows(value), _flat(shapes), locations, weights)
    return reference.ms_deform_attn(value, shapes, sampling_locations, attention_weights)


def intervals(mask: Tensor) -> Tensor:
    """The half-open intervals of images that a mask lets queries see, for ``mmfs_attention``.

    Args:
        mask: bool [G, I], True where the queries of group g see image i.

    Returns:
        int32 [G, 2]; (0, 0) for a group that sees nothing.

    Raises:
        ValueError: a group sees two images, but not one between them. Order the images so that each
            group's lie side by side.
    """
    if mask.ndim != 2 or mask.dtype != torch.bool:
        raise ValueError(f"mask: expected bool [G, I], got {mask.dtype} {tuple(mask.shape)}")
    image = torch.arange(1, mask.shape[1] + 1, device=mask.device, dtype=torch.int32)
    last = torch.where(mask, image, 0).amax(1) if len(image) else image.new_zeros(len(mask))
    count = mask.sum(1, dtype=torch.int32)
    found = torch.stack([last - count, last], 1)
    gaps = (mask & (image <= found[:, :1])).any(1)
    if gaps.any():
        group = int(gaps.nonzero()[0, 0])
        seen = mask[group].nonzero().flatten().tolist()
        raise ValueError(
            f"mask: group {group} sees images {seen}, which has a gap; mmfs_attention takes intervals"
        )
    return found


def as_shapes(spatial_shapes: Sequence[tuple[int, int]] | Tensor) -> tuple[tuple[int, int], ...]:
    """Level sizes as a tuple of (height, width)."""
    if isinstance(spatial_shapes, Tensor):
        if spatial_shapes.ndim != 2 or spatial_shapes.shape[1] != 2:
            raise ValueError(f"spatial_shapes: expected [L, 2], got {tuple(spatial_shapes.shape)}")
        spatial_shapes = spatial_shapes.tolist()
    return tuple((int(h), int(w)) for h, w in spatial_shapes)


def _exact(tensor: Tensor, value: Tensor) -> Tensor:
    return tensor.to(exact_dtype(value)).contiguous()


def _rows(value: Tensor) -> Tensor:
    """The value with adjacent channels; other axes may have any stride."""
    return value if value.stride(-1) == 1 else value.contiguous()


def _flat(shapes: tuple[tuple[int, int], ...]) -> list[int]:
    return [size for shape in shapes for size in shape]


def _check_value(value: Tensor, shapes: tuple[tuple[int, int], ...]) -> None:
    if value.ndim != 4:
        raise ValueError(f"value: expected 4 axes, got shape {tuple(value.shape)}")
    if value.dtype not in VALUE_DTYPES:
        raise ValueError(f"value: expected float32, float64, bfloat16 or float16, got {value.dtype}")
    positions = sum(h * w for h, w in shapes)
    if not shapes or min(size for shape in shapes for size in shape) < 1:
        raise ValueError(f"spatial_shapes: expected levels of at least 1 x 1, got {shapes}")
    if positions != value.shape[1]:
        raise ValueError(
            f"spatial_shapes: levels {shapes} hold {positions} positions, value has {value.shape[1]}"
        )


def _check_floating(value: Tensor, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not tensor.dtype.is_floating_point:
            raise ValueError(f"{name}: expected a floating dtype, got {tensor.dtype}")
        if tensor.device != value.device:
            raise ValueError(f"{name}: lies on {tensor.device}, value on {value.device}")


def _check_shape(name: str, tensor: Tensor, *shapes: tuple[int, ...]) -> None:
    if tuple(tensor.shape) not in shapes:
        expected = " or ".join(map(str, shapes))
        raise ValueError(f"{name}: expected shape {expected}, got {tuple(tensor.shape)}")


def _check_mmfs(
    value: Tensor,
    shapes: tuple[tuple[int, int], ...],
    projections: dict[str, Tensor],
    visible: Tensor,
    sink_value: Tensor | None,
) -> None:
    offsets, table = projections["offsets"], projections["table_offsets"]
    for name in ("offsets", "table_offsets"):
        if projections[name].ndim != 4:
            raise ValueError(f"{name}: expected 4 axes, got shape {tuple(projections[name].shape)}")
    _check_floating(value, **projections)
    heads, levels = value.shape[2], len(shapes)
    queries, points, rows = offsets.shape[0], offsets.shape[2], table.shape[0]
    if points < 1:
        raise ValueError(f"offsets: expected at least one point, got shape {tuple(offsets.shape)}")
    _check_shape("offsets", offsets, (queries, heads, points, 2))
    _check_shape("logits", projections["logits"], (queries, heads, levels, points))
    _check_shape("table_offsets", table, (rows, heads, points, 2))
    _check_shape("table_logits", projections["table_logits"], (rows, heads, levels, points))
    _check_shape("reference_points", projections["reference_points"], (queries, 2), (1, 2))
    if sink_value is not None:
        _check_floating(value, sink_value=sink_value)
        _check_shape("sink_value", sink_value, (heads, value.shape[3]))
    if visible.ndim != 2 or visible.shape[1] != 2 or visible.dtype not in (torch.int32, torch.int64):
        hint = "; a mask becomes intervals by mmi_kernels.intervals" if visible.dtype == torch.bool else ""
        raise ValueError(f"visible: expected int32 [G, 2], got {visible.dtype} {tuple(visible.shape)}{hint}")
    if visible.device != value.device:
        raise ValueError(f"visible: lies on {visible.device}, value on {value.device}")
    groups = visible.shape[0]
    if queries and (groups == 0 or queries % groups):
        raise ValueError(f"visible: {queries} queries do not divide into {groups} groups")


def _check_general(
    value: Tensor, shapes: tuple[tuple[int, int], ...], sampling_locations: Tensor, attention_weights: Tensor
) -> None:
    if attention_weights.ndim != 5:
        raise ValueError(f"attention_weights: expected 5 axes, got shape {tuple(attention_weights.shape)}")
    _check_floating(value, sampling_locations=sampling_locations, attention_weights=attention_weights)
    batch, _, heads, _ = value.shape
    queries, points = attention_weights.shape[1], attention_weights.shape[4]
    expected = (batch, queries, heads, len(shapes), points)
    _check_shape("attention_weights", attention_weights, expected)
    _check_shape("sampling_locations", sampling_locations, (*expected, 2))
