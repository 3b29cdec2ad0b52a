"""Plain PyTorch implementations: what the compiled kernels are tested against.

``mmfs_attention`` works on the list of visible (query, image) pairs, so its cost follows what is
seen and not queries x images. Both operators sample through ``grid_sample``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sample_levels(value: Tensor, spatial_shapes, locations: Tensor) -> Tensor:
    """Bilinear samples of every level, zero outside.

    Args:
        value: [N, S, H, D].
        spatial_shapes: (height, width) a level.
        locations: [N, Q, H, L, P, 2] as (x, y) in 0..1.

    Returns:
        [N, H, D, Q, L, P].
    """
    batch, _, heads, channels = value.shape
    # From -0.5 and 1.5 on, a sample lies outside any map; NaN is sent there too.
    grid = 2 * locations.nan_to_num(nan=-1.0).clamp(-1, 2) - 1
    samples, start = [], 0
    for level, (height, width) in enumerate(spatial_shapes):
        stop = start + height * width
        maps = value[:, start:stop].permute(0, 2, 3, 1).reshape(batch * heads, channels, height, width)
        at = grid[:, :, :, level].transpose(1, 2).flatten(0, 1)
        samples.append(F.grid_sample(maps, at.to(maps.dtype), padding_mode="zeros", align_corners=False))
        start = stop
    return torch.stack(samples, -2).unflatten(0, (batch, heads))


def ms_deform_attn(
    value: Tensor, spatial_shapes, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """See ``mmi_kernels.ms_deform_attn``."""
    exact = torch.promote_types(value.dtype, torch.float32)
    samples = sample_levels(value.to(exact), spatial_shapes, sampling_locations.to(exact))
    weights = attention_weights.to(exact).transpose(1, 2).unsqueeze(2)
    return (samples * weights).flatten(-2).sum(-1).permute(0, 3, 1, 2).flatten(2).to(value.dtype)


def visible_pairs(visible: Tensor, queries: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """The visible (query, image) pairs.

    Args:
        visible: integers [G, 2], half-open intervals of images, ``queries / G`` queries each.
        queries: number of queries.
        rows: rows of the relative table; pairs further apart than it reaches are left out.

    Returns:
        query, image and rel (1 is the nearest), int64 [pairs] each, queries ascending.
    """
    groups = visible.shape[0]
    interval = visible.long().repeat_interleave(queries // max(groups, 1), 0)
    last = interval[:, 1]
    first = torch.maximum(interval[:, 0], last - (rows - 1))
    count = (last - first).clamp_min(0)
    query = torch.repeat_interleave(torch.arange(queries, device=visible.device), count)
    rank = torch.arange(len(query), device=visible.device) - (count.cumsum(0) - count)[query]
    image = first[query] + rank
    return query, image, last[query] - image


def mmfs_attention(
    value: Tensor,
    spatial_shapes,
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
    """See ``mmi_kernels.mmfs_attention``."""
    queries, heads, points, _ = offsets.shape
    images, levels, channels = value.shape[0], logits.shape[2], value.shape[-1]
    beyond = (visible[:, 0] < visible[:, 1]) & ((visible[:, 0] < 0) | (visible[:, 1] > images))
    if beyond.any():
        group = int(beyond.nonzero()[0, 0])
        first, last = visible[group].tolist()
        raise RuntimeError(f"visible: group {group} sees images {first} to {last}, but value holds {images}")
    exact = torch.promote_types(value.dtype, torch.float32)
    query, image, rel = visible_pairs(visible, queries, table_offsets.shape[0])

    shift = (offsets.to(exact)[query] + table_offsets.to(exact)[rel]) / base
    centre = reference_points.to(exact).expand(queries, 2)[query]
    location = centre[:, None, None] + shift  # [pairs, H, P, 2]
    logit = logits.to(exact)[query] + table_logits.to(exact)[rel]  # [pairs, H, L, P]

    # Softmax over all pairs of a query, per head, with the sink's logit of 0 where there is one.
    at = query[:, None].expand(-1, heads)
    floor = 0.0 if sink else -torch.inf
    peak = torch.full((queries, heads), floor, dtype=exact, device=value.device)
    peak = peak.scatter_reduce(0, at, logit.detach().flatten(2).amax(-1), "amax")
    power = torch.exp(logit - peak[query][..., None, None])
    total = torch.zeros_like(peak).index_add(0, query, power.flatten(2).sum(-1))
    if sink:
        total = total + torch.exp(-peak)
    seen = total > 0
    total = torch.where(seen, total, 1.0)
    weight = power / total[query][..., None, None]

    # Queries of one image are sampled together: pairs are sorted by image and padded to the
    # longest list, so that one grid_sample a level serves all images.
    order = torch.argsort(image, stable=True)
    # (With nothing visible, one idle slot keeps the value's gradient: zeros, not None, as the compiled
    # operators give; Megatron's data parallelism needs one of every parameter.)
    out = torch.zeros(queries, heads, channels, dtype=exact, device=value.device)
    if images:
        by_image = image[order]
        counts = torch.bincount(by_image, minlength=images)
        width = max(int(counts.max()), 1)
        slot = torch.arange(len(order), device=value.device) - (counts.cumsum(0) - counts)[by_image]
        flat = by_image * width + slot
        grid = torch.zeros(images * width, heads, points, 2, dtype=exact, device=value.device)
        grid = grid.index_copy(0, flat, location[order]).view(images, width, heads, 1, points, 2)
        samples = sample_levels(value.to(exact), spatial_shapes, grid.expand(-1, -1, -1, levels, -1, -1))
        samples = samples.permute(0, 3, 1, 4, 5, 2).flatten(0, 1)[flat]  # [pairs, H, L, P, D]
        # (No einsum: autocast would round its factors.)
        mixed = (weight[order][..., None] * samples).sum((2, 3))
        out = out.index_add(0, query[order], mixed)
    else:
        out = out + (value.to(exact).sum() + location.sum() + weight.sum())  # sums of nothing
    if sink_value is not None:
        share = torch.exp(-peak) / total if sink else (~seen).to(exact)
        out = out + share[..., None] * sink_value.to(exact)
    return out.to(value.dtype)
