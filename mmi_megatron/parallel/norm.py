"""RMSNorm for Megatron's layers: its fallback norm refuses sequence parallelism."""

from __future__ import annotations

import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm whose weight is marked for the gradient sum of sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **_):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """Megatron's sharded tensors: replicas over the tensor-parallel group. Its own default for
        modules like this one takes every rank's copy for the first."""
        state = self.state_dict(keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {}, sharded_offsets)


class MapsNorm(RMSNorm):
    """RMSNorm of what is the same on all tensor-parallel ranks and is put to different use by each:
    every rank's gradient is a part, and the weight's parts are summed."""

    def forward(self, maps: Tensor) -> Tensor:
        """[..., width] to the same shape."""
        weight = copy_to_tensor_model_parallel_region(self.weight)
        return F.rms_norm(maps, weight.shape, weight, self.eps)
