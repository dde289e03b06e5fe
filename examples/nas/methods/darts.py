"""DARTS: a softmax over the operations of each edge, Adam on its logits; the two strongest edges of each node at the end.

Source: Liu, Simonyan, Yang, "DARTS", 2019.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..cnn import Supernet, Weights, edge_softmax
from ..genotype import CELLS, NODES, Genotype, Path
from ..settings import SearchSettings, small
from ..spaces import Masks


@dataclass(frozen=True)
class Settings(SearchSettings):
    space: str = "darts_zero"
    arch_lr: float = 3e-4
    """Of Adam on the architecture logits."""
    arch_decay: float = 1e-3
    """Weight decay of the logits."""


PRESETS = {"paper": Settings(), "small": small(Settings, arch_lr=3e-3)}


class Search:
    """parameters: the logits of the paths of the normal and of the reduction cell."""

    def __init__(self, net: Supernet, settings: Settings) -> None:
        device = net.classifier.weight.device
        self.space = net.space
        self.parameters = [nn.Parameter((1e-3 * torch.randn(len(self.space.paths(c)))).to(device)) for c in CELLS]
        decay = settings.arch_decay
        self.optimizer = torch.optim.Adam(self.parameters, lr=settings.arch_lr, betas=(0.5, 0.999), weight_decay=decay)

    def begin_epoch(self, epoch: int) -> None:
        """Nothing changes."""

    def weights(self) -> Weights:
        return edge_softmax(self.space, dict(zip(CELLS, self.parameters)))

    def alive(self) -> Masks | None:
        return None

    def probes(self, step: int) -> bool:
        return True

    def update(self, grads: list[Tensor]) -> None:
        for p, g in zip(self.parameters, grads):
            p.grad = g
        self.optimizer.step()

    @torch.no_grad()
    def point(self) -> dict[str, Tensor]:
        return dict(self.weights())

    def genotype(self) -> Genotype:
        point = {cell: w.tolist() for cell, w in self.point().items()}
        return Genotype.from_paths(**{cell: strongest(list(zip(self.space.paths(cell), point[cell]))) for cell in CELLS})

    def log(self) -> dict[str, float]:
        entropy = [float(-(w * w.clamp_min(1e-30).log()).sum()) / 14 for w in self.point().values()]
        return {f"entropy_{cell}": e for cell, e in zip(CELLS, entropy)}

    def state_dict(self) -> dict[str, Any]:
        return {"parameters": [p.detach() for p in self.parameters], "optimizer": self.optimizer.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        torch._foreach_copy_(self.parameters, state["parameters"])
        self.optimizer.load_state_dict(state["optimizer"])


def strongest(weighted: list[tuple[Path, float]]) -> list[Path]:
    """Of each node the two edges with the largest weight, and on each the operation that has it; zero does not count."""
    chosen = []
    for node in NODES:
        best: dict[int, tuple[float, Path]] = {}
        for path, weight in weighted:
            if path.node == node and path.operation != "none" and weight > best.get(path.source, (-1.0,))[0]:
                best[path.source] = (weight, path)
        chosen += [path for _, path in sorted(best.values(), key=lambda found: -found[0])[:2]]
    return chosen
