"""MMFS divided over the tensor-parallel group: the cross-attention sublayer of Megatron's layer.

Heads are divided, and no projection is repeated: the query projection is column-parallel; the
offset and logit projections work on each rank's slice of it and their sums are scattered, so that
every rank ends with its own heads; values are column-parallel and the output row-parallel. The
relative table enters by linearity as (W table)[rel], with its columns divided like the query's.
"""

from __future__ import annotations

import copy
from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import reduce_scatter_last_dim_to_tensor_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint, sharded_state_dict_default
from torch import Tensor, nn

from mmi_kernels import mmfs_attention
from mmi_megatron.config import MMFSConfig
from mmi_megatron.parallel.norm import RMSNorm


class ShardedMMFS(MegatronModule):
    """Twin of ``model.mmfs.MMFS`` inside ``GatedMMFS``, without the gate.

    Called by Megatron's layer as its cross-attention: ``attention_mask`` carries the visible
    intervals, int32 [T, 2], and ``key_value_states`` the maps, [I * S, 1, maps_width].
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        mmfs: MMFSConfig,
        maps_width: int,
        shapes: tuple[tuple[int, int], ...],
        pg_collection=None,
        **_,
    ):
        super().__init__(config=config)
        tensor = config.tensor_model_parallel_size
        width, heads = config.hidden_size, mmfs.heads // tensor
        self.heads, self.mmfs = heads, mmfs
        self.shapes = shapes
        self.base = mmfs.base or shapes[0][0]
        self.rows = mmfs.table_rows
        levels, points = len(mmfs.levels), mmfs.points

        linear = partial(_linear, config)
        replicated = copy.copy(config)
        replicated.sequence_parallel = False
        self.norm_maps = RMSNorm(replicated, maps_width, config.layernorm_epsilon)
        self.query_proj = linear(ColumnParallelLinear, width, width, gather_output=False)
        self.table = nn.Parameter(torch.zeros(mmfs.table_rows, width // tensor, dtype=config.params_dtype))
        self.offsets_weight = self._slice(mmfs.heads * points * 2, width // tensor, dim=1)
        self.offsets_bias = self._slice(heads * points * 2, dim=0)
        self.logits_weight = self._slice(mmfs.heads * levels * points, width // tensor, dim=1)
        self.logits_bias = self._slice(heads * levels * points, dim=0)
        self.value_proj = _linear(
            replicated, ColumnParallelLinear, maps_width, mmfs.value_width, gather_output=False
        )
        self.sink_value = self._slice(mmfs.value_width // tensor, dim=0)
        self.output_proj = linear(RowParallelLinear, mmfs.value_width, width, input_is_parallel=True)
        set_tensor_model_parallel_attributes(self.table, True, 1, 1)

    def _slice(self, *shape: int, dim: int) -> nn.Parameter:
        parameter = nn.Parameter(torch.zeros(*shape, dtype=self.config.params_dtype))
        set_tensor_model_parallel_attributes(parameter, True, dim, 1)
        return parameter

    def forward(self, hidden: Tensor, attention_mask: Tensor, key_value_states: Tensor, **_):
        """Output of MMFS [T, 1, width] and its bias, as Megatron's sublayers return them."""
        visible, positions = attention_mask, sum(h * w for h, w in self.shapes)
        maps = key_value_states.view(-1, positions, key_value_states.shape[-1])
        query, _ = self.query_proj(hidden)
        projected = self._project(torch.cat([query[:, 0], self.table]))
        mine, table = projected.split([query.shape[0], self.rows])
        split = [self.mmfs.points * 2, len(self.mmfs.levels) * self.mmfs.points]
        (offsets, logits), (table_offsets, table_logits) = mine.split(split, -1), table.split(split, -1)
        value, _ = self.value_proj(self.norm_maps(maps))
        points = (self.mmfs.points, 2)
        levels = (len(self.mmfs.levels), self.mmfs.points)
        out = mmfs_attention(
            value.unflatten(-1, (self.heads, -1)),
            self.shapes,
            (offsets + self.offsets_bias.view(self.heads, -1)).unflatten(-1, points),
            (logits + self.logits_bias.view(self.heads, -1)).unflatten(-1, levels),
            table_offsets.unflatten(-1, points),
            table_logits.unflatten(-1, levels),
            hidden.new_full((1, 2), 0.5, dtype=torch.float32),
            visible,
            base=self.base,
            sink_value=self.sink_value.view(self.heads, -1),
            sink=self.mmfs.sink,
        )
        return self.output_proj(out.flatten(1).unsqueeze(1))

    def _project(self, query: Tensor) -> Tensor:
        """Offsets and logits of this rank's heads, [n, heads, points * 2 + levels * points], from
        every rank's slice of the queries [n, width / tensor]."""
        both = [
            F.linear(query, weight).unflatten(-1, (self.mmfs.heads, -1))
            for weight in (self.offsets_weight, self.logits_weight)
        ]
        summed = reduce_scatter_last_dim_to_tensor_parallel_region(torch.cat(both, -1).flatten(1))
        return summed.unflatten(-1, (self.heads, -1))

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """Megatron's sharded tensors of every parameter."""
        sharded = {}
        for name, child in self.named_children():
            sharded |= sharded_state_dict_default(child, f"{prefix}{name}.", sharded_offsets, metadata)
        axes = {"table": 1, "offsets_weight": 1, "logits_weight": 1, "offsets_bias": 0, "logits_bias": 0, "sink_value": 0}
        own = {name: getattr(self, name).detach() for name in axes}
        return sharded | make_sharded_tensors_for_checkpoint(own, prefix, axes, sharded_offsets)


def _linear(config: TransformerConfig, kind: type, rows: int, columns: int, **options) -> nn.Module:
    """A tensor-parallel linear layer with bias; its start value is loaded from the plain twin."""
    return kind(
        rows,
        columns,
        config=config,
        init_method=nn.init.zeros_,
        bias=True,
        skip_bias_add=False,
        **options,
    )


class GatedAdd(MegatronModule):
    """The sublayer's residual: hidden + tanh(gate) * out, in the place of bias-dropout-add."""

    def __init__(self, config: TransformerConfig):
        super().__init__(config=config)
        self.gate = nn.Parameter(torch.zeros(1, dtype=config.params_dtype))

    def forward(self, training: bool, fused: bool):
        """The function that Megatron's layer calls with (out, bias), residual and dropout."""

        def add(out_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
            return residual + torch.tanh(self.gate) * out_with_bias[0]

        return add

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """Megatron's sharded tensor of the gate."""
        return make_sharded_tensors_for_checkpoint({"gate": self.gate.detach()}, prefix, {}, sharded_offsets)
