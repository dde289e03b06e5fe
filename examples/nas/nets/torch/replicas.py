"""Several supernets that share an architecture, so that its gradient depends less on the weights of one of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...space.spaces import Masks, Weights


class Replicas(nn.Module):
    """Supernets with weights of their own, each of which computes an equal part of every batch.

    The mean loss of the batch gives each supernet the gradient of the mean loss of its own part, as if it were trained alone on
    it, and the architecture the mean of the gradients of all supernets.

    nets: at least one, in the same space.
    """

    def __init__(self, nets: Sequence[Any]):
        super().__init__()
        self.nets = nn.ModuleList(nets)
        self.space = nets[0].space

    @property
    def drop_path(self) -> Any:
        return self.nets[0].drop_path

    @drop_path.setter
    def drop_path(self, probability: Any) -> None:
        for net in self.nets:
            net.drop_path = probability

    def forward(self, images: Tensor, weights: Weights | None = None, active: Masks | None = None) -> Tensor:
        """Return the logits (N, classes) of images (N, channels, H, W), of which each supernet computes an equal part."""
        count = len(self.nets)
        if weights is not None:
            weights = {cell: ScaledGradient.apply(w, 1 / count) for cell, w in weights.items()}
        logits = [net(part, weights, active) for net, part in zip(self.nets, images.tensor_split(count))]
        return ScaledGradient.apply(torch.cat(logits), count)


class ScaledGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad * ctx.factor, None
