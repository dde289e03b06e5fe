"""The search of GSparsity, transcribed from the published code: the reference for benchmarks and tests.

Every operation of every edge is computed; pools and skip connections have a gate in each cell. ProxSGD is a loop over groups and
their tensors.
"""

from __future__ import annotations

import math

import torch
from naive_darts import NaiveNetwork
from torch import Tensor, nn
from torch.nn import functional as F

GATED = (0, 1, 2)  # max pool, average pool, skip connection


class NaiveGSparsity(nn.Module):
    """gates[i][edge][k] is the gate of pool or skip connection k on an edge of cell i."""

    def __init__(self, channels: int = 16, layers: int = 8, classes: int = 10):
        super().__init__()
        self.net = NaiveNetwork(channels, layers, classes, linear=True)
        del self.net.alphas_normal, self.net.alphas_reduce
        self.gates = nn.ParameterList(nn.Parameter(torch.ones(14, len(GATED))) for _ in self.net.cells)

    def forward(self, x: Tensor) -> Tensor:
        s0 = s1 = self.net.stem(x)
        for cell, gates in zip(self.net.cells, self.gates):
            weights = torch.cat([gates, gates.new_ones(14, 4)], dim=1)
            s0, s1 = s1, cell(s0, s1, weights)
        return self.net.classifier(self.net.global_pooling(s1).flatten(1))


class NaiveProxSGD:
    """groups: (reduction, edge, operation) -> its (tensor, entries or None for all of them) in all cells of the type."""

    def __init__(self, model: NaiveGSparsity, mu: float = 60.0, lr: float = 1e-3, rho: float = 0.8, tau: float = 1.0):
        self.model, self.lr, self.rho, self.tau = model, lr, rho, tau
        self.groups: dict[tuple, list[tuple[nn.Parameter, tuple | None]]] = {}
        for cell, reduction, gates in zip(model.net.cells, model.net.reductions, model.gates):
            for edge, mixed in enumerate(cell._ops):
                for k, operation in enumerate(mixed._ops):
                    members = self.groups.setdefault((reduction, edge, k), [])
                    members += [(p, None) for p in operation.parameters()]
                    if k in GATED:
                        members.append((gates, (edge, k)))
        held = {id(p) for members in self.groups.values() for p, _ in members}
        self.rest = [p for p in model.parameters() if id(p) not in held]
        self.velocity = {id(p): torch.zeros_like(p) for p in model.parameters()}
        self.mu = {key: mu / math.sqrt(sum(p.numel() if at is None else 1 for p, at in m)) for key, m in self.groups.items()}

    @torch.no_grad()
    def step(self) -> None:
        for p in self.model.parameters():
            self.velocity[id(p)].mul_(1 - self.rho).add_(p.grad, alpha=self.rho)
        for p in self.rest:
            p.add_(self.velocity[id(p)], alpha=-self.lr / self.tau)
        for key, members in self.groups.items():
            targets = []
            square = torch.zeros(())
            for p, at in members:
                v = self.velocity[id(p)]
                c = p - v / self.tau if at is None else p[at] - v[at] / self.tau
                targets.append(c)
                square = square + (c**2).sum()
            shrink = torch.clamp(1 - self.mu[key] / self.tau / square.sqrt(), min=0)
            for (p, at), c in zip(members, targets):
                if at is None:
                    p.add_(shrink * c - p, alpha=self.lr)
                else:
                    p[at] += self.lr * (torch.clamp(shrink * c, 0, 1) - p[at])


class NaiveGSparsitySearch:
    """The loop, with weights and gates trained on the same data."""

    def __init__(self, model: NaiveGSparsity, **options: float):
        self.model, self.optimizer = model, NaiveProxSGD(model, **options)

    def step(self, images: Tensor, labels: Tensor) -> float:
        """Take a search step; return the training loss."""
        self.model.zero_grad()
        loss = F.cross_entropy(self.model(images), labels)
        loss.backward()
        self.optimizer.step()
        return loss.item()
