"""RMSNorm for Megatron's layers: its fallback norm refuses sequence parallelism."""

from __future__ import annotations

from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm whose weight is marked for the gradient sum of sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **_):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel
