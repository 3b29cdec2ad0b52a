"""Multi-image multi-scale feature synchronizer: each query looks into the maps of earlier images.

MM-Interleaved, section 3.3 and equation 4. The sampling itself is ``mmi_kernels.mmfs_attention``;
here are the projections around it. The relative table enters by linearity: offsets and logits of
query + table[rel] are those of the query plus those of the table's row, so no projection is
repeated for the images.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmi_kernels import mmfs_attention
from mmi_megatron.config import MMFSConfig

Shapes = Sequence[tuple[int, int]]
INVISIBLE = -1e4
"""A logit whose exponential is zero in every dtype, bfloat16 products included."""


def select_levels(maps: Tensor, shapes: Shapes, levels: Sequence[int]) -> Tensor:
    """Some levels of a pyramid, one after the other.

    Args:
        maps: [I, S, C], all levels one after the other.
        shapes: (height, width) of all levels.
        levels: which of them, ascending.

    Returns:
        [I, positions of these levels, C]; a view when the levels are neighbours.

    Raises:
        ValueError: when the maps' positions are not those of the shapes.
    """
    sizes = [height * width for height, width in shapes]
    if maps.shape[1] != sum(sizes):
        raise ValueError(
            f"maps have {maps.shape[1]} positions an image, the levels {tuple(shapes)} {sum(sizes)}"
        )
    first, last = levels[0], levels[-1]
    if list(levels) == list(range(first, last + 1)):
        return maps[:, sum(sizes[:first]) : sum(sizes[: last + 1])]
    pieces = maps.split(sizes, 1)
    return torch.cat([pieces[level] for level in levels], 1)


class MMFS(nn.Module):
    """Attention from queries to the feature maps of the images they see.

    Kind ``deformable`` (equation 4): every query samples ``points`` locations a head in each level
    of each visible image. Kind ``dense`` (the baseline of table 6): plain multi-head attention to
    all positions of these levels; its relative table is added to the keys, so that a key says which
    image back it belongs to.

    Args:
        query_width: channels of the queries.
        value_width_in: channels of the maps.
        out_width: channels of the output.
        config: heads, points, levels and the rest.
        shapes: (height, width) of all levels of the pyramid, the finest first.
        base: pixels a side of the grid in which offsets are measured. By default ``config.base``,
            and where that is 0, the side of the finest level sampled.

    Raises:
        ValueError: on a configuration that does not fit together, naming the setting.
    """

    def __init__(
        self,
        query_width: int,
        value_width_in: int,
        out_width: int,
        config: MMFSConfig,
        shapes: Shapes,
        base: int | None = None,
    ):
        super().__init__()
        _check(config, shapes)
        self.config, self.shapes = config, tuple((int(h), int(w)) for h, w in shapes)
        self.sampled = tuple(self.shapes[level] for level in config.levels)
        self.base = base or config.base or self.sampled[0][0]
        inner, dense = config.value_width, config.kind == "dense"
        table_width = inner if dense else query_width
        self.query_proj = nn.Linear(query_width, table_width)
        self.table = nn.Embedding(config.table_rows, table_width)
        if dense:
            self.key_proj = nn.Linear(value_width_in, inner)
        else:
            self.offsets = nn.Linear(query_width, config.heads * config.points * 2)
            self.logits = nn.Linear(query_width, config.heads * len(config.levels) * config.points)
        self.value_proj = nn.Linear(value_width_in, inner)
        self.sink_value = nn.Parameter(torch.empty(inner))
        self.output_proj = nn.Linear(inner, out_width)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start values of the release: points scattered evenly, the same for every query."""
        nn.init.trunc_normal_(self.table.weight, std=0.02)
        nn.init.zeros_(self.sink_value)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)
        if self.config.kind == "dense":
            for projection in (self.query_proj, self.key_proj):
                nn.init.xavier_uniform_(projection.weight)
                nn.init.zeros_(projection.bias)
        else:
            nn.init.zeros_(self.offsets.weight)
            nn.init.uniform_(self.offsets.bias, -self.config.offset_init, self.config.offset_init)
            nn.init.zeros_(self.logits.bias)

    def forward(self, query: Tensor, maps: Tensor, reference_points: Tensor, visible: Tensor) -> Tensor:
        """What the queries find.

        Args:
            query: [Q, query_width].
            maps: [I, S, value_width_in], all levels of the pyramid of every image.
            reference_points: float32 (or wider) [Q, 2] or [1, 2] as (x, y) in 0..1.
            visible: int32 [G, 2], half-open intervals of images; Q / G queries in turn share one.
                The last image of an interval is the nearest, 1 back.

        Returns:
            [Q, out_width]. A query that sees no image gets the projected ``sink_value``.
        """
        return self.attend(query, self.project(maps), reference_points, visible)

    def project(self, maps: Tensor) -> Tensor:
        """What the queries look into, one entry an image, so that it can be kept while queries come.

        Args:
            maps: [I, S, value_width_in].

        Returns:
            [I, positions sampled, heads, d], the values; with kind ``dense`` 2d, each after its key.
        """
        maps = select_levels(maps, self.shapes, self.config.levels)
        projections = [self.key_proj, self.value_proj] if self.config.kind == "dense" else [self.value_proj]
        projected = [projection(maps).unflatten(-1, (self.config.heads, -1)) for projection in projections]
        return projected[0] if len(projected) == 1 else torch.cat(projected, -1)

    def attend(self, query: Tensor, projected: Tensor, reference_points: Tensor, visible: Tensor) -> Tensor:
        """``forward`` with images that ``project`` has projected."""
        attend = self._dense if self.config.kind == "dense" else self._deformable
        out = attend(self.query_proj(query), projected, reference_points, visible)
        return self.output_proj(out.flatten(1))

    @property
    def reach(self) -> int:
        """Rows of the table in use; images further back than ``max_images`` are not visible."""
        rows, limit = self.config.table_rows, self.config.max_images
        return rows if limit is None else min(rows, limit + 1)

    def _deformable(self, query: Tensor, value: Tensor, centre: Tensor, visible: Tensor) -> Tensor:
        heads, points = self.config.heads, self.config.points
        offset, logit = (heads, points, 2), (heads, len(self.sampled), points)
        table = self.table.weight[: self.reach]
        return mmfs_attention(
            value,
            self.sampled,
            self.offsets(query).unflatten(-1, offset),
            self.logits(query).unflatten(-1, logit),
            F.linear(table, self.offsets.weight).unflatten(-1, offset),
            F.linear(table, self.logits.weight).unflatten(-1, logit),
            centre,
            visible,
            base=self.base,
            sink_value=self.sink_value.view(heads, -1),
            sink=self.config.sink,
        )

    def _dense(self, query: Tensor, projected: Tensor, centre: Tensor, visible: Tensor) -> Tensor:
        heads = self.config.heads
        key, value = projected.chunk(2, -1)
        return dense_attention(
            query.unflatten(-1, (heads, -1)),
            key,
            value,
            self.table.weight[: self.reach].unflatten(-1, (heads, -1)),
            self.sink_value.view(heads, -1),
            visible,
            sink=self.config.sink,
        )


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: Tensor,
    sink_value: Tensor,
    visible: Tensor,
    *,
    sink: bool,
) -> Tensor:
    """Plain attention to all positions of the visible images.

    Which images a query sees, and how far back they lie, is one number per query, head and image;
    it enters as extra channels, of which a key has the one of its image set. So no mask of queries x
    positions is made, and any attention kernel will do.

    Args:
        query: [Q, H, D].
        key, value: [I, S, H, D].
        table: [K, H, D], added to the keys of the image ``rel`` back; row 0 is unused.
        sink_value: [H, D], the value of the extra key.
        visible: integers [G, 2], as in ``MMFS.forward``.
        sink: whether the extra key, of logit 0, is there; without it, it serves only a query that
            sees nothing.

    Returns:
        [Q, H, D].
    """
    (queries, heads, width), images = query.shape, len(key)
    query = query.transpose(0, 1) * width**-0.5  # [H, Q, D]
    interval = visible.long().repeat_interleave(queries // max(len(visible), 1), 0)
    image = torch.arange(images, device=query.device)
    back = interval[:, 1:] - image  # [Q, I]
    seen = (image >= interval[:, :1]) & (back > 0) & (back < len(table))
    near = torch.where(seen, back, 0).expand(heads, -1, -1)
    bias = (query @ table.permute(1, 2, 0)).gather(2, near).masked_fill(~seen, INVISIBLE)

    # One more key holds the sink: logit 0, or out of sight where there is no sink; then a query
    # that sees nothing takes it alone.
    last = query.new_full((heads, queries, 1), 0.0 if sink else 2 * INVISIBLE)
    last = last.masked_fill(~seen.any(1)[:, None], 0.0)
    key = key.permute(2, 0, 1, 3)  # [H, I, S, D]
    own = torch.eye(images, images + 1, dtype=key.dtype, device=key.device)[:, None]
    key = torch.cat([key, own.expand(heads, -1, key.shape[2], -1)], -1).flatten(1, 2)
    extra = F.one_hot(torch.tensor([key.shape[-1] - 1], device=key.device), key.shape[-1]).to(key.dtype)
    key = torch.cat([key, extra.expand(heads, -1, -1)], 1)
    value = torch.cat([value.permute(2, 0, 1, 3).flatten(1, 2), sink_value[:, None]], 1)
    query = torch.cat([query, bias, last], -1)
    out = F.scaled_dot_product_attention(query[None], key[None], value[None], scale=1.0)
    return out[0].transpose(0, 1)


def _check(config: MMFSConfig, shapes: Shapes) -> None:
    if config.kind not in ("deformable", "dense"):
        raise ValueError(f"mmfs.kind: expected 'deformable' or 'dense', got {config.kind!r}")
    if config.value_width % config.heads:
        raise ValueError(
            f"mmfs.value_width {config.value_width} does not divide into mmfs.heads {config.heads}"
        )
    levels = list(config.levels)
    if not levels or levels != sorted(set(levels)) or not 0 <= levels[0] <= levels[-1] < len(shapes):
        raise ValueError(f"mmfs.levels: expected ascending levels among 0..{len(shapes) - 1}, got {levels}")
    if config.table_rows < 2:
        raise ValueError(f"mmfs.table_rows: needs 2 or more (row 0 is unused), got {config.table_rows}")
    if config.max_images is not None and config.max_images < 1:
        raise ValueError(
            f"mmfs.max_images: needs 1 or more; use kind 'none' to turn MMFS off, got {config.max_images}"
        )
