"""Self-attention over packed documents, and the rotary embedding, for both language models."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def rotary_angles(position: Tensor, head_width: int, theta: float) -> Tensor:
    """Angles of the rotary embedding, half-rotate layout (RoFormer; LLaMA).

    Args:
        position: integers [T], position of each token in its document.
        head_width: width of an attention head, even.
        theta: base of the geometric series of wavelengths.

    Returns:
        float32 [T, head_width]; the second half repeats the first.
    """
    exponent = torch.arange(0, head_width, 2, dtype=torch.float32, device=position.device) / head_width
    # The quotient, not a negative power: to the bit what transformers computes.
    angles = position.float()[:, None] * (1.0 / theta**exponent)
    return torch.cat([angles, angles], -1)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Apply the rotary embedding to [T, heads, head_width]; angles [T, head_width]."""
    cos, sin = angles.cos()[:, None].to(x.dtype), angles.sin()[:, None].to(x.dtype)
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


def packed_attention(query: Tensor, key: Tensor, value: Tensor, bounds: Sequence[int]) -> Tensor:
    """Causal attention inside each document of a packed stream.

    Args:
        query: [T, heads, head_width].
        key, value: [T, kv_heads, head_width]; kv_heads divides heads.
        bounds: ascending offsets of the documents, from 0 to T.

    Returns:
        [T, heads, head_width].
    """
    grouped = query.shape[1] != key.shape[1]
    # Heads first: SDPA wants [heads, tokens, width], and a slice of tokens of that is a view.
    query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    out = [
        F.scaled_dot_product_attention(
            query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], is_causal=True, enable_gqa=grouped
        )
        for a, b in zip(bounds[:-1], bounds[1:], strict=True)
    ]
    return torch.cat(out, 2)[0].transpose(0, 1)


def cached_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention of the last n tokens of a document to all of it.

    Args:
        query: [n, heads, head_width], the document's last n tokens.
        key, value: [T, kv_heads, head_width], all its tokens, T >= n.

    Returns:
        [n, heads, head_width].
    """
    new, total = query.shape[0], key.shape[0]
    mask = torch.ones(new, total, dtype=torch.bool, device=query.device).tril(total - new)
    grouped = query.shape[1] != key.shape[1]
    query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=grouped)
    return out[0].transpose(0, 1)
