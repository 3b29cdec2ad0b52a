"""MMFS divided over the tensor-parallel group: the cross-attention sublayer of Megatron's layer.

By heads (``parallel.mmfs=heads``) no projection is repeated: the query projection is column-parallel;
the offset and logit projections work on each rank's slice of it and their sums are scattered, so that
every rank ends with its own heads; values are column-parallel and the output row-parallel. The
relative table enters by linearity as (W table)[rel], with its columns divided like the query's.
The dense kind (table 6) divides queries, keys, values and the table by heads in the usual way.

By queries (``parallel.mmfs=queries``, under sequence parallelism) every rank keeps its part of the
sequence and all heads: what is applied to queries is held whole by every rank, its gradient summed
once a step, and in place of queries and outputs the values travel, which are projected by heads.

Context-parallel ranks each have their own queries and project all maps. To divide that too would save two
ranks 14 GFLOP in a layer's forward pass over ten images at full size, and have each send 14 MB of values.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    all_gather_last_dim_from_tensor_parallel_region,
    reduce_scatter_last_dim_to_tensor_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint, sharded_state_dict_default
from torch import Tensor, nn

from mmi_kernels import mmfs_attention
from mmi_megatron.config import MMFSConfig
from mmi_megatron.model.mmfs import dense_attention
from mmi_megatron.parallel.norm import MapsNorm


class ShardedMMFS(MegatronModule):
    """Twin of ``model.mmfs.MMFS`` inside ``GatedMMFS``, without the gate.

    Called by Megatron's layer as its cross-attention: ``attention_mask`` carries the visible
    intervals of this context-parallel rank's tokens, int32 [T, 2], and ``key_value_states`` the maps,
    [I * S, 1, maps_width].

    Args:
        config, layer_number, pg_collection: Megatron's.
        mmfs: heads, points, levels and the rest.
        maps_width: channels of the maps; ``shapes``: (height, width) of their levels.
        divide: ``heads`` or ``queries``; the parameters' names and whole shapes are the same.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        mmfs: MMFSConfig,
        maps_width: int,
        shapes: tuple[tuple[int, int], ...],
        divide: str = "heads",
        pg_collection=None,
        **_,
    ):
        super().__init__(config=config)
        self.in_place = divide == "queries"
        tensor = 1 if self.in_place else config.tensor_model_parallel_size
        width, heads = config.hidden_size, mmfs.heads // tensor
        dense = mmfs.kind == "dense"
        self.heads, self.mmfs, self.shapes = heads, mmfs, shapes
        self.base = mmfs.base or shapes[0][0]
        levels, points = len(mmfs.levels), mmfs.points

        # The maps are the same on every rank, their gradient is not: each rank adds that of its heads,
        # and where a stage begins they are summed once for all its layers. Under sequence parallelism
        # only the queries are split.
        whole = copy.copy(config)
        whole.sequence_parallel = False
        inner = mmfs.value_width if dense else width
        column = partial(ColumnParallelLinear, gather_output=False)
        of_maps = partial(column, disable_grad_reduce=True)
        row = partial(RowParallelLinear, input_is_parallel=True)
        self.norm_maps = MapsNorm(whole, maps_width, config.layernorm_epsilon)
        self.query_proj = _linear(config, WholeLinear if self.in_place else column, width, inner)
        self.table = self._slice(mmfs.table_rows, inner // tensor, dim=1)
        if dense:
            self.key_proj = _linear(whole, of_maps, maps_width, mmfs.value_width)
        else:
            self.offsets_weight = self._slice(mmfs.heads * points * 2, width // tensor, dim=1)
            self.offsets_bias = self._slice(heads * points * 2, dim=0)
            self.logits_weight = self._slice(mmfs.heads * levels * points, width // tensor, dim=1)
            self.logits_bias = self._slice(heads * levels * points, dim=0)
        self.value_proj = _linear(whole, of_maps, maps_width, mmfs.value_width)
        self.sink_value = self._slice(mmfs.value_width // tensor, dim=0)
        self.output_proj = _linear(config, WholeLinear if self.in_place else row, mmfs.value_width, width)

    def _slice(self, *shape: int, dim: int) -> nn.Parameter:
        """A parameter divided along ``dim``; with queries in place a whole one."""
        parameter = nn.Parameter(torch.zeros(*shape, dtype=self.config.params_dtype))
        if self.in_place:
            parameter.sequence_parallel = True  # type: ignore[attr-defined]
        else:
            set_tensor_model_parallel_attributes(parameter, True, dim, 1)
        return parameter

    def forward(self, hidden: Tensor, attention_mask: Tensor, key_value_states: Tensor, **_):
        """Output of MMFS [T, 1, width] and its bias, as Megatron's sublayers return them."""
        positions = sum(height * width for height, width in self.shapes)
        maps = self.norm_maps(key_value_states.view(-1, positions, key_value_states.shape[-1]))
        query = self.query_proj(hidden)[0].squeeze(1)
        visible = attention_mask
        if self.in_place:
            visible = visible.chunk(self.config.tensor_model_parallel_size)[
                parallel_state.get_tensor_model_parallel_rank()
            ]
        attend = self._dense if self.mmfs.kind == "dense" else self._deformable
        out = attend(query, maps, self._of_maps(self.value_proj, maps), visible)
        return self.output_proj(out.flatten(1).unsqueeze(1))

    def _of_maps(self, projection: nn.Module, maps: Tensor) -> Tensor:
        """The maps' values or keys, [I, S, heads, d]: of this rank's heads, or with queries in place of
        all; then their gradient is summed over the ranks' queries, each rank getting its heads'."""
        projected = projection(maps)[0]
        if self.in_place:
            projected = all_gather_last_dim_from_tensor_parallel_region(projected)
        return projected.unflatten(-1, (self.heads, -1))

    def _dense(self, query: Tensor, maps: Tensor, value: Tensor, visible: Tensor) -> Tensor:
        split = (self.heads, -1)
        key = self._of_maps(self.key_proj, maps)
        table, sink_value = self.table.unflatten(-1, split), self.sink_value.view(split)
        return dense_attention(
            query.unflatten(-1, split), key, value, table, sink_value, visible, sink=self.mmfs.sink
        )

    def _deformable(self, query: Tensor, maps: Tensor, value: Tensor, visible: Tensor) -> Tensor:
        projected = self._project(torch.cat([query, self.table]))
        mine, table = projected.split([len(query), len(self.table)])
        split = [self.mmfs.points * 2, len(self.shapes) * self.mmfs.points]
        (offsets, logits), (table_offsets, table_logits) = mine.split(split, -1), table.split(split, -1)
        points, levels = (self.mmfs.points, 2), (len(self.shapes), self.mmfs.points)
        return mmfs_attention(
            value,
            self.shapes,
            (offsets + self.offsets_bias.view(self.heads, -1)).unflatten(-1, points),
            (logits + self.logits_bias.view(self.heads, -1)).unflatten(-1, levels),
            table_offsets.unflatten(-1, points),
            table_logits.unflatten(-1, levels),
            query.new_full((1, 2), 0.5, dtype=torch.float32),
            visible,
            base=self.base,
            sink_value=self.sink_value.view(self.heads, -1),
            sink=self.mmfs.sink,
        )

    def _project(self, query: Tensor) -> Tensor:
        """Offsets and logits of this rank's heads, [n, heads, points * 2 + levels * points], from
        every rank's slice of the queries [n, width / tensor], or from whole queries."""
        both = torch.cat(
            [
                F.linear(query, weight).unflatten(-1, (self.mmfs.heads, -1))
                for weight in (self.offsets_weight, self.logits_weight)
            ],
            -1,
        )
        if self.in_place:
            return both
        summed = reduce_scatter_last_dim_to_tensor_parallel_region(both.flatten(1))
        return summed.unflatten(-1, (self.heads, -1))

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """Megatron's sharded tensors of every parameter."""
        sharded: dict[str, Any] = {}
        for name, child in self.named_children():
            sharded |= sharded_state_dict_default(child, f"{prefix}{name}.", sharded_offsets, metadata)
        own = dict(self.named_parameters(recurse=False))
        axes = {} if self.in_place else {name: getattr(self, name).partition_dim for name in own}
        return sharded | make_sharded_tensors_for_checkpoint(own, prefix, axes, sharded_offsets)


def _linear(config: TransformerConfig, kind: Callable, inputs: int, outputs: int) -> nn.Module:
    """A tensor-parallel linear layer with bias; its start value is loaded from the plain twin."""
    return kind(inputs, outputs, config=config, init_method=nn.init.zeros_, bias=True, skip_bias_add=False)


class WholeLinear(nn.Linear):
    """A linear layer that every tensor-parallel rank holds whole and applies to its part of the
    sequence; its gradient is summed over the ranks with those of the norms. Called and returning as
    Megatron's linear layers do."""

    def __init__(self, inputs: int, outputs: int, *, config: TransformerConfig, **_):
        super().__init__(inputs, outputs, dtype=config.params_dtype)
        for parameter in self.parameters():
            parameter.sequence_parallel = True  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """[..., inputs] to [..., outputs]."""
        return super().forward(x), None

    def get_extra_state(self) -> None:
        """Nothing, under the name that Megatron's linear layers save nothing by: a checkpoint is then read
        by either of the two."""

    def set_extra_state(self, state: None) -> None:
        """See ``get_extra_state``."""

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """Megatron's sharded tensors: replicas over the tensor-parallel group."""
        state = self.state_dict(keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {}, sharded_offsets)


class GatedAdd(MegatronModule):
    """The sublayer's residual: hidden + tanh(gate) * out, in the place of bias-dropout-add."""

    def __init__(self, config: TransformerConfig):
        super().__init__(config=config)
        self.gate = nn.Parameter(torch.zeros(1, dtype=config.params_dtype))
        self.gate.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, training: bool, fused: bool):
        """The function that Megatron's layer calls with (out, bias), residual and dropout."""

        def add(out_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
            return residual + torch.tanh(self.gate) * out_with_bias[0]

        return add

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """Megatron's sharded tensor of the gate."""
        return make_sharded_tensors_for_checkpoint({"gate": self.gate}, prefix, {}, sharded_offsets)
