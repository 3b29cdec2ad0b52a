"""Context parallelism: attention with its heads divided is attention, whatever the heads and documents."""

from __future__ import annotations

import pytest
import torch

from tests.samples import small_config

TOKENS, HEADS, WIDTH, BOUNDS = 24, 4, 6, [0, 7, 8, 19, 24]


def given(kv_heads: int) -> list[torch.Tensor]:
    """Queries, keys, values and weights of the outputs, in float64."""
    generator = torch.Generator().manual_seed(kv_heads)
    heads = (HEADS, kv_heads, kv_heads, HEADS)
    return [torch.randn(TOKENS, n, WIDTH, generator=generator, dtype=torch.float64) for n in heads]


def attended(kv_heads: int, context: int) -> list[torch.Tensor]:
    """On a rank: outputs and gradients of queries, keys and values, of the whole stream."""
    import torch.distributed as dist

    from mmi_megatron.model.attention import packed_attention
    from mmi_megatron.parallel import context as parallel
    from mmi_megatron.parallel import groups

    config = small_config()
    config.parallel.context = context
    groups.initialize(config)
    try:
        *inputs, weights = (parallel.part(tensor) for tensor in given(kv_heads))
        inputs = [tensor.clone().requires_grad_() for tensor in inputs]
        out = parallel.by_tokens(packed_attention(*parallel.by_heads(*inputs), BOUNDS))
        (out * weights).sum().backward()
        whole = []
        for tensor in (out.detach(), *(tensor.grad for tensor in inputs)):
            pieces = [torch.empty_like(tensor) for _ in range(context)]
            dist.all_gather(pieces, tensor.contiguous())
            whole.append(torch.cat(pieces))
        return whole
    finally:
        groups.destroy()


@pytest.mark.parametrize(("kv_heads", "context"), [(4, 2), (2, 2), (1, 2), (4, 4), (2, 4), (1, 4)])
def test_attention_by_heads_is_attention(ranks, kv_heads, context):
    from mmi_megatron.model.attention import packed_attention

    *inputs, weights = given(kv_heads)
    inputs = [tensor.requires_grad_() for tensor in inputs]
    out = packed_attention(*inputs, BOUNDS)
    (out * weights).sum().backward()
    for got in ranks.run(context, attended, kv_heads, context):
        for found, want in zip(got, (out.detach(), *(x.grad for x in inputs)), strict=True):
            torch.testing.assert_close(found, want, atol=1e-12, rtol=1e-12)


def divided(context: int):
    """On a rank: its part of ten positions, those of some that it owns, and what is said of nine."""
    from mmi_megatron.parallel import context as parallel
    from mmi_megatron.parallel import groups

    config = small_config()
    config.parallel.context = context
    groups.initialize(config)
    try:
        where, which = parallel.own(torch.tensor([0, 4, 5, 6, 9]), 5)
        try:
            parallel.part(torch.arange(9))
            said = ""
        except ValueError as error:
            said = str(error)
        return parallel.part(torch.arange(10)).tolist(), where.tolist(), which.tolist(), said
    finally:
        groups.destroy()


def test_parts_are_neighbours_and_of_one_length(ranks):
    first, second = ranks.run(2, divided, 2)
    assert first[:3] == ([0, 1, 2, 3, 4], [0, 4], [0, 1])
    assert second[:3] == ([5, 6, 7, 8, 9], [0, 1, 4], [2, 3, 4])
    assert all(rank[3] == "9 tokens do not divide by parallel.context, 2" for rank in (first, second))
