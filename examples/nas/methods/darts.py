"""DARTS: a softmax over the operations of each edge, whose logits are trained by Adam.

The genotype keeps the strongest edges of each node, two in a convolutional cell and one in a recurrent one. In NAS-Bench-201 it
keeps all edges, as there; each has its strongest operation, and the zero operation is left out as in the other spaces, while
that benchmark also lets it win.

Source: Liu, Simonyan, Yang, "DARTS", 2019.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..space.genotype import AnyGenotype
from ..space.spaces import Masks, Space, Weights
from .edges import strongest_genotype
from .settings.darts import LogitSettings


class Darts:
    """DARTS. parameters: the logits of the paths, a vector for each cell."""

    name = "darts"
    frozen = False

    def __init__(self, space: Space, settings: LogitSettings, device: torch.device) -> None:
        self.space, self.cells = space, space.layout.cells
        self.parameters = [nn.Parameter((1e-3 * torch.randn(len(space.paths(c)))).to(device)) for c in self.cells]
        betas, decay = (settings.arch_beta1, 0.999), settings.arch_decay
        self.optimizer = torch.optim.Adam(self.parameters, lr=settings.arch_lr, betas=betas, weight_decay=decay)

    def begin_epoch(self, epoch: int) -> None:
        """Nothing depends on the epoch."""

    def weights(self) -> Weights:
        return edge_softmax(self.space, dict(zip(self.cells, self.parameters)))

    def active_paths(self) -> Masks | None:
        return None

    def needs_zeroed_paths(self, step: int) -> bool:
        return True

    def update(self, grads: list[Tensor]) -> None:
        for p, g in zip(self.parameters, grads):
            p.grad = g
        self.optimizer.step()

    @torch.no_grad()
    def point(self) -> dict[str, Tensor]:
        return dict(self.weights())

    def genotype(self) -> AnyGenotype:
        return strongest_genotype(self.space, {cell: w.tolist() for cell, w in self.point().items()})

    def log(self) -> dict[str, float]:
        edges = len(self.space.layout.edges)
        entropy = {cell: float(-(w * w.clamp_min(1e-30).log()).sum()) / edges for cell, w in self.point().items()}
        return {f"entropy_{cell}": e for cell, e in entropy.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"parameters": [p.detach() for p in self.parameters], "optimizer": self.optimizer.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        torch._foreach_copy_(self.parameters, state["parameters"])
        self.optimizer.load_state_dict(state["optimizer"])


def edge_softmax(space: Space, logits: Weights) -> dict[str, Tensor]:
    """Apply a softmax over the paths of each edge to logits of shape (paths,) or (cells, paths)."""
    out = {}
    for cell in space.layout.cells:
        sizes = [len(names) for names in space.operations[cell]]
        out[cell] = torch.cat([part.softmax(-1) for part in logits[cell].split(sizes, -1)], -1)
    return out
