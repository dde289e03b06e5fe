"""A group of weights from several tensors as one flat parameter, so that an optimizer treats it as one group."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Flat:
    """One flat parameter, `vector`, of which the given parameters of a network become views.

    Build it when the network is on its device. Call `gather` before each step of the optimizer that updates `vector`.
    """

    def __init__(self, name: str, parts: Sequence[nn.Parameter]):
        if not parts:
            raise ValueError(f"{name} must hold at least one parameter, got none")
        self.name, self.parts = name, list(parts)
        self.vector = nn.Parameter(torch.cat([p.detach().reshape(-1) for p in parts]))
        start = 0
        for p in parts:
            p.data = self.vector.detach()[start : start + p.numel()].view(p.shape)
            start += p.numel()

    def gather(self) -> None:
        """Move the gradients of the parts to the vector: 0 for a part without gradient, None if no part has one."""
        if all(p.grad is None for p in self.parts):
            self.vector.grad = None
            return
        self.vector.grad = torch.cat([self._gradient(p) for p in self.parts])
        for p in self.parts:  # zero_grad of the optimizer does not reach them
            p.grad = None

    def _gradient(self, p: nn.Parameter) -> Tensor:
        return torch.zeros_like(p).reshape(-1) if p.grad is None else p.grad.reshape(-1)

    @torch.no_grad()
    def clear(self) -> None:
        """Set all entries to 0."""
        self.vector.zero_()
