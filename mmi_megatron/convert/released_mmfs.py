"""MMFS of the released checkpoint: its names, and our module built from its state dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmi_megatron.config import MMFSConfig
from mmi_megatron.convert.rules import Rule, Table, load, rename, renames, unsqueezed
from mmi_megatron.model.mmfs import MMFS


def mmfs_table(heads: int, levels: int, points: int) -> Table:
    """Names of an MMFS. In its logits the last slot of every (head, level) is dead weight: left out
    when loading, zero when saving."""

    def drop(tensors: list[Tensor]) -> Tensor:
        return tensors[0].unflatten(0, (heads, levels, points + 1))[:, :, :points].flatten(0, 2)

    def pad(tensor: Tensor) -> list[Tensor]:
        live = tensor.unflatten(0, (heads, levels, points))
        dead = live.new_zeros(heads, levels, 1, *live.shape[3:])
        return [torch.cat([live, dead], 2).flatten(0, 2)]

    logits = [
        Rule(f"logits.{part}", (f"attention_weights.{part}",), drop, pad) for part in ("weight", "bias")
    ]
    same = {
        "query_proj": "dynamic_offset_mask",
        "offsets": "sampling_offsets",
        "value_proj": "value_proj",
        "output_proj": "output_proj",
    }
    rules = [
        rename("table.weight", "query_relpos.weight"),
        unsqueezed("sink_value", "ignore_token", 3),
        *renames(same),
        *logits,
    ]
    return Table(rules)


def intervals(visibility: Tensor) -> tuple[Tensor | None, Tensor]:
    """A 0/1 visibility as half-open intervals of images.

    Where every row's visible images are neighbours the intervals are over the N * M images as they
    are. Gaps need another order: then each distinct pattern gets a run of its own images.

    Args:
        visibility: [N, Q, M], nonzero where visible.

    Returns:
        The images in their new order, int64 indices into N * M, or None for the order given; and
        int32 [N * Q, 2] intervals into that order.
    """
    batch, queries, count = visibility.shape
    seen = visibility.ne(0).flatten(0, 1)
    row = torch.arange(batch, device=seen.device).repeat_interleave(queries)
    number = seen.sum(1)
    index = torch.arange(count, device=seen.device)
    first = torch.where(seen, index, count).amin(1) if count else number
    last = torch.where(seen, index, -1).amax(1) if count else number
    if bool(((number == 0) | (last - first + 1 == number)).all()):
        first = row * count + torch.where(number > 0, first, 0)
        return None, torch.stack([first, first + number], 1).int()
    patterns, which = torch.cat([row[:, None], seen.long()], 1).unique(dim=0, return_inverse=True)
    pattern, image = patterns[:, 1:].nonzero(as_tuple=True)
    sizes = patterns[:, 1:].sum(1)
    start = sizes.cumsum(0) - sizes
    return patterns[pattern, 0] * count + image, torch.stack([start, start + sizes], 1)[which].int()


def mask_of(visibility: Tensor, batch: int, queries: int, images: int) -> Tensor:
    """The part of a visibility that concerns the queries.

    Args:
        visibility: 0/1 [N, Q, M], or [N, M] for all queries alike; of more than Q rows the last Q
            count (cached decoding).
        batch, queries, images: N, Q and M.

    Returns:
        [N, Q, M], or [N, 1, M] for all queries alike.

    Raises:
        ValueError: when it is of another shape.
    """
    mask = visibility[:, None] if visibility.ndim == 2 else visibility[:, -queries:]
    if mask.shape not in ((batch, queries, images), (batch, 1, images)):
        raise ValueError(
            f"visibility: expected [{batch}, {queries}, {images}] or [{batch}, {images}], "
            f"got {tuple(visibility.shape)}"
        )
    return mask


class ReleasedMMFS(nn.Module):
    """Our MMFS behind the release's arguments."""

    def __init__(self, core: MMFS):
        super().__init__()
        self.core = core

    def forward(
        self, query: Tensor, reference_points: Tensor, features: Tensor, visibility: Tensor
    ) -> Tensor:
        """What the queries find.

        Args:
            query: [N, Q, dq].
            reference_points: [1 or N, Q, 1, 2] as (x, y) in 0..1.
            features: [N, M, positions of all levels, dv].
            visibility: 0/1 [N, Q, M], or [N, M] for all queries alike; of more than Q rows the last
                Q count (cached decoding).

        Returns:
            [N, Q, out].
        """
        batch, queries = query.shape[:2]
        order, visible = intervals(mask_of(visibility, batch, queries, features.shape[1]))
        maps = features.flatten(0, 1)
        if order is not None:
            maps = maps[order]
        points = reference_points[:, :, 0].expand(batch, queries, 2).flatten(0, 1)
        return self.core(query.flatten(0, 1), maps, points, visible).unflatten(0, (batch, queries))


def mmfs(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> ReleasedMMFS:
    """An MMFS of the release.

    Args:
        state_dict: its tensors, names without prefix.
        config: d_query, d_value, d_out, d_model, ratio, n_heads, n_points, n_levels, spatial_shapes
            (pixels a side of each level), base_spatial_shape, max_num_image_per_seq.

    Raises:
        ValueError: naming tensors that are missing, left over or of another shape.
    """
    shapes = level_shapes(config)
    settings = MMFSConfig(
        heads=config["n_heads"],
        points=config["n_points"],
        value_width=int(config["d_model"] * config["ratio"]),
        table_rows=config["max_num_image_per_seq"],
        levels=list(range(len(shapes))),
        base=config["base_spatial_shape"],
    )
    core = MMFS(config["d_query"], config["d_value"], config["d_out"], settings, shapes)
    table = mmfs_table(settings.heads, len(shapes), settings.points)
    return ReleasedMMFS(filled(core, state_dict, table, "released MMFS"))


def level_shapes(config: Mapping[str, Any]) -> list[tuple[int, int]]:
    """(height, width) of the levels from ``spatial_shapes``: sides of squares, or pairs."""
    return [(side, side) if isinstance(side, int) else tuple(side) for side in config["spatial_shapes"]]


def filled(module: nn.Module, state_dict: Mapping[str, Tensor], table: Table, what: str) -> Any:
    """The module with the release's tensors, in their dtype (constants may have another), in evaluation
    mode. Raises as ``load``."""
    names = (name for rule in table.rules for name in rule.theirs if name in state_dict)
    if (first := next(names, None)) is not None:
        module.to(state_dict[first].dtype)
    load(module, state_dict, table, what)
    return module.eval()
