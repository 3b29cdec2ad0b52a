"""Exponential moving average of a module's trainable weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average(nn.Module):
    """Keeps float32 averages under the names that the weights have in their module.

    The first update copies the weights; the n-th after it uses min(decay, (1 + n) / (10 + n)), so that
    the average follows early training. The averages are buffers: they are saved with the module.

    Args:
        module: whose parameters that require a gradient are averaged; must not hold this average yet.
        decay: in 0..1.
    """

    updates: Tensor

    def __init__(self, module: nn.Module, decay: float):
        super().__init__()
        self.decay = decay
        self.names = [name for name, p in module.named_parameters() if p.requires_grad]
        self.register_buffer("updates", torch.zeros(1, dtype=torch.int64))
        for name in self.names:
            _place(self, name, module.get_parameter(name).detach().float().clone())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Average:
        """Moves between devices, but stays float32: in bfloat16 small updates would round to nothing."""

        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep, recurse)

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take in the module's weights as they are now."""
        count = int(self.updates)
        decay = min(self.decay, (1 + count) / (10 + count)) if count else 0.0
        for name in self.names:
            self.get_buffer(name).lerp_(module.get_parameter(name).float(), 1 - decay)
        self.updates += 1

    @contextmanager
    def swapped(self, module: nn.Module) -> Iterator[None]:
        """Inside, the module has the averages for weights (nothing changes before the first update)."""
        if not int(self.updates):
            yield
            return
        weights = {name: module.get_parameter(name).data for name in self.names}
        try:
            for name, weight in weights.items():
                module.get_parameter(name).data = self.get_buffer(name).to(weight.dtype)
            yield
        finally:
            for name, weight in weights.items():
                module.get_parameter(name).data = weight


def _place(root: nn.Module, name: str, value: Tensor) -> None:
    *path, last = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.register_buffer(last, value)
