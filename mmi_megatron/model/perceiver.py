"""Perceiver resampler: a fixed number of learned queries reads a sequence of any length.

Built as the query side of a BLIP-2 Q-Former (BERT layers with the norm after each residual):
self-attention among the queries, in some layers cross-attention to the sequence, then an FFN.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmi_megatron.config import ResamplerConfig

INIT_STD = 0.02
NORM_EPS = 1e-12  # BERT's, in the norms of q and k too


class Attention(nn.Module):
    """Multi-head attention, its residual, and the norm after it."""

    def __init__(self, width: int, in_width: int, heads: int, qk_norm: bool):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(in_width, width)
        self.value = nn.Linear(in_width, width)
        self.output = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        head = width // heads
        self.query_norm = nn.LayerNorm(head, eps=NORM_EPS) if qk_norm else nn.Identity()
        self.key_norm = nn.LayerNorm(head, eps=NORM_EPS) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [B, n, width] attends to context [B, S, in_width] where mask, bool [B, S], is true; where
        none is, to all positions alike."""
        query, key, value = (
            projection(source).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection, source in ((self.query, x), (self.key, context), (self.value, context))
        )
        if mask is not None:
            lowest = torch.finfo(query.dtype).min
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, lowest)[:, None, None]
        out = F.scaled_dot_product_attention(
            self.query_norm(query), self.key_norm(key), value, attn_mask=mask
        )
        return self.norm(x + self.output(out.transpose(1, 2).flatten(2)))


class FeedForward(nn.Module):
    """FFN, its residual, and the norm after it."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.down(F.gelu(self.up(x))))


class Layer(nn.Module):
    """Self-attention, cross-attention where ``in_width`` is given, FFN."""

    def __init__(self, in_width: int | None, config: ResamplerConfig):
        super().__init__()
        width, heads, qk_norm = config.width, config.heads, config.qk_norm
        self.attention = Attention(width, width, heads, qk_norm)
        self.cross = None if in_width is None else Attention(width, in_width, heads, qk_norm)
        self.ffn = FeedForward(width, config.ffn)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        x = self.attention(x, x)
        if self.cross is not None:
            x = self.cross(x, context, mask)
        return self.ffn(x)


class Resampler(nn.Module):
    """``config.queries`` tokens of ``config.width`` from a sequence.

    Args:
        in_width: channels of the sequence.
        config: sizes; cross-attention sits in the layers 0, cross_every, 2 cross_every, ...

    Raises:
        ValueError: when the width does not divide into the heads.
    """

    def __init__(self, in_width: int, config: ResamplerConfig):
        super().__init__()
        if config.width % config.heads:
            raise ValueError(
                f"resampler.width {config.width} does not divide into resampler.heads {config.heads}"
            )
        self.config = config
        self.queries = nn.Parameter(torch.empty(config.queries, config.width))
        self.norm = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.layers = nn.ModuleList(
            Layer(None if layer % config.cross_every else in_width, config) for layer in range(config.layers)
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Linear layers by fan, biases 0; queries that differ, or they would stay alike."""
        nn.init.normal_(self.queries, std=INIT_STD)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                # By fan: a fixed deviation that suits a width of 1,000 leaves the queries of a narrow
                # resampler all but blind to what they attend to.
                nn.init.xavier_normal_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tokens [B, queries, width] from x [B, S, in_width]; mask, bool [B, S], is true where a
        position counts."""
        tokens = self.norm(self.queries).expand(len(x), -1, -1)
        for layer in self.layers:
            tokens = layer(tokens, x, mask)
        return tokens
