"""SparseNAS: architecture weights enter the supernet linearly, and a sparse group lasso, stepped by HAPG or AdamHAPG, leaves any
number of paths and nodes.

    min_A L_val(w*(A), A) + strength * (l1_ratio ||A||_1 + (1 - l1_ratio) sum_n sqrt(size_n) ||A_n||_2)

One group per node and cell type: all operations on all edges into it, 14, 21, 28 and 35 entries in the DARTS space, 4, 8, ..., 32
in the recurrent one. The strength starts at 0 and grows by `strength_step` each epoch.

Source: Wu, Liu, Huang, Wang, Zhang, Van Gool, "Neural architecture search as sparse supernet", AAAI 2021.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from proxopt import Groups, SparseGroupLasso, schedules
from proxopt_torch import HAPG, AdamHAPG, StrengthPath

from ..bilevel.settings import CifarSearchSettings, TextSearchSettings, small_cifar, small_text
from ..engine.settings import check
from ..space.genotype import AnyGenotype
from ..space.spaces import Masks, Space, Weights


@dataclass(frozen=True)
class PenaltySettings:
    """Of the architecture weights and their penalty."""

    optimizer: Literal["adamhapg", "hapg"] = "adamhapg"
    arch_lr: float | None = None
    """Default 3e-4, constant, for adamhapg, and 0.025, cosine to 0, for hapg."""
    l1_ratio: float = 0.5
    """Share of the L1 part: 1 is the lasso, 0 the group lasso."""
    strength_step: float = 0.01
    """What the strength grows by every epoch."""
    metric: Literal["median", "support", "exact"] = "median"
    """How the group prox meets Adam's steps; the median is the published rule. Only adamhapg has such steps."""
    init: float = 1 / 7
    """Architecture weights at the start, before noise of size 1e-3."""
    target_paths: int = 0
    """Let the architecture rest at its prox point once so few paths are left in all cells, counted after every step, and go on
    with the weights; 0 goes on to the end."""
    probe_every: int = 1
    """Compute the gradient of dead paths, which alone can bring them back, in every n-th architecture step only: an approximation
    that makes the others cheaper."""
    cut: float = 0.0
    """Also remove paths below this share of the largest weight of their cell from the genotype; 0 removes exact zeros only."""

    def __post_init__(self) -> None:
        for name in ("l1_ratio", "cut"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        check(self, counts=("probe_every",), amounts=("strength_step", "target_paths"))
        if self.optimizer == "hapg" and self.metric != "median":
            raise ValueError(f"metric belongs to adamhapg; hapg has one step for all, got metric={self.metric!r}")


@dataclass(frozen=True)
class SparseSupernetSettings(PenaltySettings, CifarSearchSettings):
    usual_lr: ClassVar[Mapping[str, float]] = {"adamhapg": 3e-4, "hapg": 0.025}

    def __post_init__(self) -> None:
        CifarSearchSettings.__post_init__(self)
        PenaltySettings.__post_init__(self)


@dataclass(frozen=True)
class SparseSupernetTextSettings(PenaltySettings, TextSearchSettings):
    arch_lr: float | None = None
    """Default 1e-4, constant, for adamhapg, and 0.025, cosine to 0, for hapg, which explodes on text."""
    init: float = 1 / 4
    usual_lr: ClassVar[Mapping[str, float]] = {"adamhapg": 1e-4, "hapg": 0.025}

    def __post_init__(self) -> None:
        TextSearchSettings.__post_init__(self)
        PenaltySettings.__post_init__(self)


CIFAR_PRESETS = {
    "paper": SparseSupernetSettings(),
    "small": small_cifar(SparseSupernetSettings, arch_lr=1e-3, strength_step=0.04),
}
TEXT_PRESETS = {
    "paper": SparseSupernetTextSettings(),
    "small": small_text(SparseSupernetTextSettings, strength_step=0.0025, target_paths=20),
}


class SparseSupernet:
    """parameters: the architecture weights, a vector for each cell, at the search point A."""

    name = "sparse_supernet"

    def __init__(self, space: Space, settings: Any, device: torch.device) -> None:
        self.space, self.settings, self.cells = space, settings, space.layout.cells
        start = [settings.init + 1e-3 * torch.randn(len(space.paths(c))) for c in self.cells]
        self.parameters = [nn.Parameter(a.to(device)) for a in start]
        adam = settings.optimizer == "adamhapg"
        self.lr = settings.arch_lr if settings.arch_lr is not None else settings.usual_lr[settings.optimizer]
        groups = [{"params": [(cell, a)], "penalty": self._penalty(cell)} for cell, a in zip(self.cells, self.parameters)]
        options: dict[str, Any] = {"betas": (0.5, 0.999)} if adam else {}
        make = AdamHAPG if adam else HAPG
        self.optimizer = make(groups, lr=self.lr, extrapolation="nesterov", **options)  # the published rule, uncapped
        self.path = StrengthPath(self.optimizer, schedules.linear(settings.strength_step))
        self.guards = {cell: Guard(space, cell, device) for cell in self.cells}
        self.rests = False

    def _penalty(self, cell: str) -> SparseGroupLasso:
        s = self.settings
        metric = s.metric if s.optimizer == "adamhapg" else None
        return SparseGroupLasso(0.0, s.l1_ratio, Groups.labels(self.space.nodes(cell)), metric=metric)

    def begin_epoch(self, epoch: int) -> None:
        self.path.step(epoch)
        if self.settings.optimizer == "hapg":
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * (1 + math.cos(math.pi * epoch / self.settings.epochs)) / 2

    def weights(self) -> Weights:
        return dict(zip(self.cells, self.parameters))

    def alive(self) -> Masks | None:
        masks = {cell: (a != 0).tolist() for cell, a in zip(self.cells, self.parameters)}
        return None if all(map(all, masks.values())) else masks

    def probes(self, step: int) -> bool:
        return step % self.settings.probe_every == 0

    @torch.no_grad()
    def update(self, grads: list[Tensor]) -> None:
        before = self.point()
        for a, g in zip(self.parameters, grads):
            a.grad = g
        self.optimizer.step()
        for cell, a in zip(self.cells, self.parameters):
            self.guards[cell](a, self.optimizer.state[a]["point"], before[cell])
        if self.settings.target_paths and sum(sum(mask) for mask in self.masks().values()) <= self.settings.target_paths:
            self.rests = True
            torch._foreach_copy_(self.parameters, list(self.point().values()))

    @torch.no_grad()
    def point(self) -> dict[str, Tensor]:
        state = self.optimizer.state
        return {cell: state.get(a, {}).get("point", a).detach().clone() for cell, a in zip(self.cells, self.parameters)}

    def masks(self) -> Masks:
        """The living paths at the prox point."""
        out = {}
        for cell, p in self.point().items():
            out[cell] = (p.abs() > self.settings.cut * p.abs().max()).tolist()
        return out

    def genotype(self) -> AnyGenotype:
        return self.space.genotype(self.masks()).clean()

    def log(self) -> dict[str, float]:
        penalties = [self.optimizer.penalty_of(group) for group in self.optimizer.param_groups]
        value = sum(float(pen.value(p)) for pen, p in zip(penalties, self.point().values()))
        largest = max(float(a.detach().abs().max()) for a in self.parameters)
        return {"strength": self.optimizer.param_groups[0]["strength"], "penalty": value, "largest_weight": largest}

    def state_dict(self) -> dict[str, Any]:
        return {
            "parameters": [a.detach() for a in self.parameters],
            "optimizer": self.optimizer.state_dict(),
            "path": self.path.state_dict(),
            "rests": self.rests,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        torch._foreach_copy_(self.parameters, state["parameters"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.path.load_state_dict(state["path"])
        self.rests = state["rests"]


class Guard:
    """Keeps a cell from dying: a prox after which no path reaches an input is undone but for the strongest way through the cell.

    Batch norm makes the loss blind to the common size of all weights, so under a growing strength a cell does reach zero. Works
    without looking at values, so that a device need not wait for the host.
    """

    def __init__(self, space: Space, cell: str, device: torch.device) -> None:
        paths = space.paths(cell)
        into = lambda values: torch.tensor(values, device=device)
        self.nodes, self.inputs = space.layout.nodes, space.layout.inputs
        self.node = {n: into([p.node == n and p.operation != "none" for p in paths]) for n in self.nodes}
        self.source = {n: into([p.source == n for p in paths]) for n in (*self.inputs, *self.nodes)}

    def reachable(self, point: Tensor) -> dict[int, Tensor]:
        """For each node the paths into it that live and start in an input or a reachable node."""
        from_living = torch.stack([self.source[n] for n in self.inputs]).any(0)
        out = {}
        for n in self.nodes:
            out[n] = self.node[n] & from_living & (point != 0)
            from_living = from_living | (self.source[n] & out[n].any())
        return out

    def backbone(self, point: Tensor) -> Tensor:
        """The strongest path into the strongest node, the strongest into its source, and so on down to an input."""
        reachable = self.reachable(point)
        norms = torch.stack([torch.where(reachable[n], point, 0).norm() for n in self.nodes])
        wanted = nn.functional.one_hot(norms.argmax(), len(self.nodes)).bool()
        kept = torch.zeros_like(point, dtype=torch.bool)
        for i, n in reversed(list(enumerate(self.nodes))):
            best = torch.where(reachable[n], point.abs(), -1).argmax()
            chosen = nn.functional.one_hot(best, len(point)).bool() & reachable[n] & wanted[i]
            kept |= chosen
            below = torch.stack([(chosen & self.source[m]).any() for m in self.nodes])
            wanted = wanted | below
        return kept

    def __call__(self, search: Tensor, point: Tensor, before: Tensor) -> None:
        """Mend the search point and the prox point in place if the latter left no way through; `before`: the last prox point."""
        lives = torch.stack([mask.any() for mask in self.reachable(point).values()]).any()
        mended = torch.where(self.backbone(before), before, 0)
        search.copy_(torch.where(lives, search, mended))
        point.copy_(torch.where(lives, point, mended))
