"""Shapes (for compilers) and gradients of the compiled operators.

The operators take every floating tensor but ``value`` in the type of the arithmetic (float64 for
a float64 value, else float32) and contiguous; ``mmi_kernels.ops`` sees to that.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

OPS = torch.ops.mmi_kernels


def register(namespace: str = "mmi_kernels") -> None:
    """Attach fake implementations and autograd; call once, after the library is loaded."""
    operators = getattr(torch.ops, namespace)
    torch.library.register_fake(f"{namespace}::mmfs_forward", _mmfs_forward_fake)
    torch.library.register_fake(f"{namespace}::mmfs_backward", _mmfs_backward_fake)
    torch.library.register_fake(f"{namespace}::deform_forward", _deform_forward_fake)
    torch.library.register_fake(f"{namespace}::deform_backward", _deform_backward_fake)
    torch.library.register_autograd(
        f"{namespace}::mmfs_forward", partial(_mmfs_backward, operators), setup_context=_mmfs_setup_context
    )
    torch.library.register_autograd(
        f"{namespace}::deform_forward",
        partial(_deform_backward, operators),
        setup_context=_deform_setup_context,
    )


def exact_dtype(value: Tensor) -> torch.dtype:
    """The type of the arithmetic for a value's type."""
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def _mmfs_forward_fake(value, spatial_shapes, offsets, *rest):
    queries, heads = offsets.shape[0], value.shape[2]
    out = value.new_empty(queries, heads, value.shape[3])
    return out, value.new_empty(2, queries, heads, dtype=exact_dtype(value))


def _mmfs_backward_fake(
    grad_out, out, stats, value, spatial_shapes, offsets, logits, table_offsets, table_logits,
    reference_points, visible, base, sink, for_value, for_query, deterministic=False,
):  # fmt: skip
    def like(tensor: Tensor, wanted: bool) -> Tensor:
        return tensor.new_empty(tensor.shape if wanted else (0,))

    per_query = (offsets, logits, table_offsets, table_logits)
    return like(value, for_value), *(like(tensor, for_query) for tensor in per_query)


def _mmfs_setup_context(ctx, inputs, output) -> None:
    *tensors, base, sink = inputs
    ctx.shapes, ctx.base, ctx.sink = tensors.pop(1), base, sink
    ctx.save_for_backward(*output, *tensors)


def _mmfs_backward(operators, ctx, grad_out: Tensor, _grad_stats: Tensor):
    out, stats, value, *projections, sink_value = ctx.saved_tensors
    needs = ctx.needs_input_grad
    for_query = any(needs[2:7])
    grad_out = grad_out.contiguous()
    grad_value, *grads = operators.mmfs_backward(
        grad_out, out, stats, value, ctx.shapes, *projections, ctx.base, ctx.sink, needs[0], for_query,
        torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    grad_reference = None
    if needs[6]:
        # A location is reference + offset / base.
        grad_reference = grads[0].sum((1, 2)) * ctx.base
        if projections[4].shape[0] != grad_reference.shape[0]:
            grad_reference = grad_reference.sum(0, keepdim=True)
    grad_sink = None
    if sink_value is not None and needs[8]:
        peak, total = stats.unbind(0)
        share = torch.exp(-peak) / total if ctx.sink else (total == 0).to(peak.dtype)
        # (No matrix product: cuBLAS refuses deterministic algorithms without an environment variable.)
        grad_sink = (share[..., None] * grad_out).sum(0)
    kept = [grad if need else None for grad, need in zip(grads, needs[2:6], strict=True)]
    return grad_value if needs[0] else None, None, *kept, grad_reference, None, grad_sink, None, None


def _deform_forward_fake(value, spatial_shapes, locations, weights):
    return value.new_empty(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])


def _deform_backward_fake(
    grad_out, value, spatial_shapes, locations, weights, for_value, for_query, deterministic=False
):
    wanted = ((value, for_value), (locations, for_query), (weights, for_query))
    return tuple(tensor.new_empty(tensor.shape if want else (0,)) for tensor, want in wanted)


def _deform_setup_context(ctx, inputs, output) -> None:
    value, ctx.shapes, locations, weights = inputs
    ctx.save_for_backward(value, locations, weights)


def _deform_backward(operators, ctx, grad_out: Tensor):
    value, locations, weights = ctx.saved_tensors
    needs = ctx.needs_input_grad
    for_query = needs[2] or needs[3]
    grads = operators.deform_backward(
        grad_out.contiguous(), value, ctx.shapes, locations, weights, needs[0], for_query,
        torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    grad_value, grad_locations, grad_weights = (
        grad if need else None for grad, need in zip(grads, (needs[0], needs[2], needs[3]), strict=True)
    )
    return grad_value, None, grad_locations, grad_weights
