"""Operation pruning: the network of a genotype is trained by ProxSGD, and operations that become zero are removed.

    run = Pruning(genotype, settings, mu, seed, out, processes, device)
    run.run()
    small = cut(run.net, run.zeroed_operations())  # same logits, bit for bit
    again = Network(cascade(small), ...)           # the remaining architecture, to be trained from new weights

Source: GSparsity, "Operation pruning"; the per-tensor groups and the adaptive tau are those of the published code.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from proxopt import GroupL2
from proxopt_torch import ProxSGD

from ..engine.distributed import Processes
from ..engine.settings import check
from ..nets.torch import cnn
from ..nets.torch.flat import Flat
from ..space.genotype import CELLS, Genotype
from ..train.settings import GenotypeTrainSettings
from ..train.train_cifar import ImageTraining, start_network
from ..train.weights import read_weights

__all__ = ["Pruning", "PruningSettings", "cascade", "cut", "groups_of", "pruned_share", "read_weights", "weights_of"]

Operation = tuple[int, int]  # index of the cell, index of the path in it
BETA = 0.999  # decay of the second moment for the adaptive tau


@dataclass(frozen=True)
class PruningSettings(GenotypeTrainSettings):
    """Settings of a pruning run; mu and retraining belong to `prune_operations.py`."""

    epochs: int = 600
    lr: float = 1e-3
    lr_min: float = 1e-4
    momentum: float = 0.1
    """Weight of the last direction in ProxSGD, in [0, 1): 1 - rho of the paper."""
    weight_decay: float = 0.0
    groups: Literal["operation", "tensor"] = "operation"
    """Groups of the penalty: one for each operation (the paper), or for each tensor of the network, classifier and batch norms
    included (the published code); then an operation is zero as soon as one of its tensors is."""
    tau: float | Literal["adaptive", "direct"] = "adaptive"
    """Curvature of ProxSGD's model, > 0. adaptive: the mean over the group of the square root of the gradient's second moment.
    direct: prox steps of length --lr on the weights themselves, which are then exactly sparse, and not only their prox point."""
    vanish: float = 1e-6
    """Norm below which a group that is 0 at the prox point is set to 0, at the end of an epoch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, amounts=("vanish",), shares=("momentum",))
        if not isinstance(self.tau, str) and not 0 < self.tau < math.inf:
            raise ValueError(f"tau must be finite and > 0, adaptive or direct, got {self.tau}")


class Pruning(ImageTraining):
    """A pruning run with one mu and one seed."""

    kind, table, command = "pruning", "prune.csv", "prune_operations"
    settings: PruningSettings

    def __init__(
        self,
        genotype: Genotype,
        settings: PruningSettings,
        mu: float,
        seed: int,
        out: Path,
        processes: Processes,
        device: torch.device,
    ) -> None:
        if not 0 <= mu < math.inf:
            raise ValueError(f"mu must be finite and >= 0, got {mu}")
        self.genotype, self.mu = genotype, mu
        super().__init__(settings, seed, out, processes, device)
        self.members, self.flats = groups_of(self.net, settings.groups)
        self.squares = [torch.zeros_like(flat.vector) for flat in self.flats]
        self.count = 0
        penalty = GroupL2(mu, weights="none")
        tau = {"adaptive": 1.0, "direct": None}.get(settings.tau, settings.tau)  # type: ignore[arg-type]
        named = [{"params": [(f.name, f.vector)], "penalty": penalty} for f in self.flats]
        grouped = {id(p) for flat in self.flats for p in flat.parts}
        rest = [(name, p) for name, p in self.net.named_parameters() if id(p) not in grouped]
        unpenalised = [{"params": rest, "penalty": None, "weight_decay": settings.weight_decay}] if rest else []
        self.sgd = ProxSGD([*named, *unpenalised], settings.lr, 1 - settings.momentum, tau)

    def build(self, classes: int) -> cnn.Discrete:
        return start_network(self.genotype, self.settings, classes, self.out, self.image_channels)

    def write_settings(self) -> None:
        super().write_settings()
        self.genotype.save(self.out / "genotype.json")

    def title(self) -> str:
        return f"mu {self.mu:g}, {super().title()}"

    def begin_epoch(self) -> None:
        super().begin_epoch()
        for group in self.sgd.param_groups:
            group["lr"] = self.settings.rate(self.epoch)

    def update(self) -> None:
        updated = [p for p in self.params if p.grad is not None]
        self.processes.average([p.grad for p in updated])  # type: ignore[misc]
        if self.settings.clip:
            nn.utils.clip_grad_norm_(updated, self.settings.clip)
        for flat in self.flats:
            flat.gather()
        if self.settings.tau == "adaptive":
            self._adapt()
        self.sgd.step()

    @torch.no_grad()
    def _adapt(self) -> None:
        """Set tau of each group to the mean of the square root of the second moment of its gradients."""
        self.count += 1
        grads = [flat.vector.grad for flat in self.flats]
        torch._foreach_mul_(self.squares, BETA)
        torch._foreach_addcmul_(self.squares, grads, grads, 1 - BETA)
        means = torch.stack([s.sqrt().mean() for s in self.squares]) / math.sqrt(1 - BETA**self.count) + 1e-8
        for group, tau in zip(self.sgd.param_groups, means.tolist()):
            group["tau"] = tau

    # -- zeroed operations --------------------------------------------------------------------

    def norms(self) -> list[float]:
        """The norm of each group."""
        return torch.stack(torch._foreach_norm([f.vector.detach() for f in self.flats])).tolist()

    def zeroed_operations(self, threshold: float = 0.0) -> set[Operation]:
        """The operations with norm at most `threshold`; with groups of tensors, with such a tensor."""
        return {m for m, norm in zip(self.members, self.norms()) if m is not None and norm <= threshold}

    def drop_zeroed(self) -> None:
        """Set groups to 0 that are 0 at the prox point and have decayed below `vanish`."""
        for flat, norm in zip(self.flats, self.norms()):
            point = self.sgd.state.get(flat.vector, {}).get("point")
            if point is not None and 0 < norm < self.settings.vanish and not bool(point.any()):
                flat.clear()

    def end_epoch(self) -> dict[str, Any]:
        self.drop_zeroed()
        row = super().end_epoch()
        zeroed = self.zeroed_operations()
        return row | {"dead_operations": len(zeroed), "pruned_share": pruned_share(self.net, zeroed)}

    def identity(self) -> dict[str, Any]:
        return {"architecture": self.genotype.to_json(), "mu": self.mu, **super().identity()}

    def state(self) -> dict[str, Any]:
        own = {"optimizer": self.sgd.state_dict(), "squares": self.squares, "count": self.count}
        return {"net": self.net.state_dict(), "sums": self.sums, **own}

    def restore(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["net"])
        self.sgd.load_state_dict(state["optimizer"])
        torch._foreach_copy_(self.squares, state["squares"])
        self.sums.copy_(state["sums"])
        self.count = state["count"]


def groups_of(net: cnn.Discrete, kind: str) -> tuple[list[Operation | None], list[Flat]]:
    """Return the operation of each group, or None, and the groups."""
    members: list[Operation | None] = []
    flats = []
    if kind == "operation":
        for i, cell in enumerate(net.cells):
            for k, (path, operation) in enumerate(zip(cell.paths, cell.operations)):
                parts = list(operation.parameters())
                if parts:
                    members.append((i, k))
                    flats.append(Flat(f"cell {i} {path.source}-{path.node} {path.operation}", parts))
        return members, flats
    for name, p in net.named_parameters():
        words = name.split(".")
        inside = words[0] == "cells" and words[2] == "operations" and not name.endswith(".bias")
        members.append((int(words[1]), int(words[3])) if inside else None)
        flats.append(Flat(name, [p]))
    return members, flats


def weights_of(net: cnn.Discrete, zeroed: Collection[Operation]) -> int:
    """The number of weights of the operations."""
    return sum(p.numel() for i, k in zeroed for p in net.cells[i].operations[k].parameters())


def pruned_share(net: cnn.Discrete, zeroed: Collection[Operation]) -> float:
    """The share of the weights of these operations in all weights of the network, without its auxiliary head."""
    total = sum(p.numel() for name, p in net.named_parameters() if not name.startswith("auxiliary."))
    return weights_of(net, zeroed) / total


def cut(net: cnn.Discrete, zeroed: Collection[Operation]) -> cnn.Discrete:
    """A copy of the network without these operations. If all their weights are zero, it has the same logits, bit for bit.

    Every output keeps its width: nodes without paths are tensors of zeros. `cascade` removes them.
    """
    out = copy.deepcopy(net)
    for i, cell in enumerate(out.cells):
        kept = [k for k in range(len(cell.paths)) if (i, k) not in zeroed]
        cell.paths = tuple(cell.paths[k] for k in kept)
        cell.operations = nn.ModuleList(cell.operations[k] for k in kept)
    return out


def cascade(net: cnn.Discrete) -> list[Genotype]:
    """The genotype of each layer of a cut network, without dead ends: paths whose source has no paths are removed repeatedly.

    Raises ValueError if a cell has no paths left.
    """
    found = []
    for i, (cell, kind) in enumerate(zip(net.cells, cnn.cell_kinds(len(net.cells)))):
        genotype = Genotype.from_paths(**{name: cell.paths if name == kind else () for name in CELLS}).clean()
        if not genotype.active_nodes(kind):
            raise ValueError(f"all operations of cell {i} are zero: a smaller mu keeps some")
        found.append(genotype)
    return found
