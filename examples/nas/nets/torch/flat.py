"""A group of weights spread over many tensors as one flat parameter: one group for an optimizer, tensors for the network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Flat:
    """Parameters of a network as views into one flat parameter, `vector`; what an optimizer does to it happens to them.

    Build it when the network is on its device. Before a step of the optimizer `gather` hands over the gradients.
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
        """Move the gradients of the parts to the vector: 0 where a part has none, and none where all have none."""
        if all(p.grad is None for p in self.parts):
            self.vector.grad = None
            return
        self.vector.grad = torch.cat([self._gradient(p) for p in self.parts])
        for p in self.parts:  # the optimizer does not know them: it could not clear their gradients
            p.grad = None

    def _gradient(self, p: nn.Parameter) -> Tensor:
        return torch.zeros_like(p).reshape(-1) if p.grad is None else p.grad.reshape(-1)

    @torch.no_grad()
    def clear(self) -> None:
        """All to exactly zero."""
        self.vector.zero_()
