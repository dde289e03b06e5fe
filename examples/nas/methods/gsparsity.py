"""GSparsity: group sparsity on the weights of the operations themselves, by ProxSGD, without architecture variables.

    min_w L(w) + sum_k mu_k ||w_k||_2

A group k is one operation on one edge, in all cells of a type. Operations without parameters (pools, skip connections, noise)
have a gate in each cell, a factor with initial value 1. The architecture is determined by the prox point w_hat, in which whole
groups are exactly zero; w itself only decays towards it. As batch norms have no shift, an operation of zero weights is exactly
zero, and removing it changes no logit.

Weighting. As published, mu_k = mu / sqrt(size): groups with more weights are shrunk less. Batch norms make the loss almost
independent of these norms, so that they decrease by lr * mu_k in each step and the groups with the largest ||w_k(0)|| sqrt(size)
remain: sep_conv_5x5. For mu = 60 the gates of 6 (or 2) cells have mu_k = 24.5 (42.4), more than their norm: pools and skip
connections are zeroed at once, whatever the loss. With `weighting="initial_norm"`, mu_k = mu ||w_k(0)||, all groups decrease at
the same relative rate but for the loss; `gates="free"` leaves operations without parameters unpenalised.

Source: "GSparsity: unifying network pruning and neural architecture search by group sparsity", Eq. 1 and 2; settings of the
published code and logs.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from proxopt_torch import ProxSGD

from ..engine import report, results
from ..engine.command_line import first_process
from ..engine.distributed import Processes
from ..engine.run import launch
from ..nets.torch import cnn, image_networks
from ..nets.torch.flat import Flat
from ..nets.torch.operations import frozen_statistics, repeated_noise
from ..space import spaces
from ..space.genotype import Genotype, cell_name
from ..space.genotype import Path as CellPath
from ..space.spaces import Masks
from ..train.train_cifar import ImageTraining
from .group_sparsity import GatedGroup, droppable, genotype_of, search_or_bisect, shares, strength_of_group
from .settings.gsparsity import GSparsitySettings


class OperationGroups:
    """The groups of a supernet: the weights and gates of each path of each cell type, as one flat parameter."""

    def __init__(self, net: Any, settings: GSparsitySettings):
        self.net, self.settings = net, settings
        self.gates: dict[tuple[str, CellPath], nn.Parameter] = {}
        self.flats: dict[tuple[str, CellPath], Flat] = {}
        self.cells, self.kind = net.space.layout.cells, net.space.kind
        self.count = {cell: net.kinds.count(cell) for cell in self.cells}
        for (cell, path), weights in net.path_parameters().items():
            if path.operation == "none":
                continue
            parts = list(weights)
            if not parts or path.operation == "skip_connect":  # the latter has parameters where it is strided
                self.gates[cell, path] = nn.Parameter(net.classifier.weight.new_ones(self.count[cell]))
                parts.append(self.gates[cell, path])
            self.flats[cell, path] = Flat(f"{cell} {path.source}-{path.node} {path.operation}", parts)
        self.initial = {key: float(flat.vector.detach().norm()) for key, flat in self.flats.items()}
        self.is_active: dict[tuple[str, CellPath], bool] = dict.fromkeys(self.flats, True)
        self.others = [p for p in net.parameters() if id(p) not in {id(q) for flat in self.flats.values() for q in flat.parts}]
        tau = None if settings.tau == "direct" else settings.tau
        self.optimizer = ProxSGD(self.param_groups(), settings.lr, 1 - settings.momentum, tau)

    def strength(self, key: tuple[str, CellPath]) -> float:
        """mu_k of a group."""
        if self.settings.gates == "free" and key in self.gates and len(self.flats[key].parts) == 1:
            return 0.0
        return strength_of_group(self.settings.mu, self.settings.weighting, self.flats[key].vector.numel(), self.initial[key])

    def param_groups(self) -> list[dict[str, Any]]:
        """Parameter groups: one for each operation, and an unpenalised one for stem, classifier and preprocessing."""
        out: list[dict[str, Any]] = []
        for key, flat in self.flats.items():
            gates = len(self.gates[key]) if key in self.gates else 0
            out.append({"params": [(flat.name, flat.vector)], "penalty": GatedGroup(self.strength(key), gates)})
        others = {id(p) for p in self.others}
        decay = self.settings.weight_decay
        rest = [(name, p) for name, p in self.net.named_parameters() if id(p) in others]
        out.append({"params": rest, "penalty": None, "weight_decay": decay})
        return out

    def weights(self) -> dict[str, Tensor]:
        """The weights of the supernet, (cells, paths): gates, and 1 for operations with parameters of their own."""
        out = {}
        for cell in self.cells:
            one = self.net.classifier.weight.new_ones(self.count[cell])
            out[cell] = torch.stack([self.gates.get((cell, path), one) for path in self.net.space.paths(cell)], 1)
        return out

    def active_paths(self) -> Masks | None:
        """Flags of the paths that have not been dropped; None if none has."""
        if all(self.is_active.values()):
            return None
        paths = self.net.space.paths
        return {cell: tuple(self.is_active.get((cell, path), False) for path in paths(cell)) for cell in self.cells}

    def step(self) -> None:
        """Take a step of ProxSGD with the gradients of the network."""
        for flat in self.flats.values():
            flat.gather()
        self.optimizer.step()

    def norms(self) -> dict[tuple[str, CellPath], float]:
        """The norm ||w_hat_k|| of each group at the prox point."""
        state = self.optimizer.state
        points = [state.get(f.vector, {}).get("point", f.vector).detach() for f in self.flats.values()]
        return dict(zip(self.flats, torch.stack(torch._foreach_norm(points)).tolist()))

    @torch.no_grad()
    def drop_zeroed(self) -> None:
        """Set groups to 0 that are 0 at the prox point and have decayed below `vanish`; they are not computed any more.

        A cell that would lose its last connection keeps all its groups.
        """
        found = torch.stack(torch._foreach_norm([f.vector.detach() for f in self.flats.values()])).tolist()
        small = {k for (k, point), norm in zip(self.norms().items(), found) if point == 0 and norm < self.settings.vanish}
        for key in droppable(self.flats, small, self.kind):
            if self.is_active[key]:
                self.flats[key].clear()
                for buffer in self.optimizer.state[self.flats[key].vector].values():
                    if isinstance(buffer, Tensor) and buffer.ndim:
                        buffer.zero_()  # momentum would make it nonzero again
                self.is_active[key] = False

    def genotype(self) -> Any:
        """The operations that are nonzero at the prox point, without dead ends; in NAS-Bench-201 one on each edge.

        There the path counts whose norm has kept the largest share of its initial value.
        """
        return spaces.discrete(self.net.space, genotype_of(self.norms(), self.settings.cut, self.kind), self.point())

    def regulariser(self) -> float:
        """sum_k ||w_k|| / sqrt(size_k) at the search point, the value in the published logs."""
        vectors = [f.vector.detach() for f in self.flats.values()]
        found = torch.stack(torch._foreach_norm(vectors)).tolist()
        return sum(n / math.sqrt(v.numel()) for n, v in zip(found, vectors))

    def point(self) -> dict[str, Tensor]:
        """||w_hat_k|| / ||w_k(0)|| of each path, for pictures."""
        return {cell: torch.from_numpy(found) for cell, found in shares(self.net.space, self.norms(), self.initial).items()}

    def state_dict(self) -> dict[str, Any]:
        """The state without the weights, which are part of the network's; gates are not."""
        gates = [g.detach() for g in self.gates.values()]
        return {
            "gates": gates,
            "alive": list(self.is_active.values()),  # the key of release 0.1.0, whose checkpoints must load
            "initial": list(self.initial.values()),
            "optimizer": self.optimizer.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state, after the network has loaded its weights."""
        for gate, saved in zip(self.gates.values(), state["gates"]):
            gate.copy_(saved)
        self.is_active = dict(zip(self.flats, state["alive"]))
        self.initial = dict(zip(self.flats, state["initial"]))
        self.optimizer.load_state_dict(state["optimizer"])


class GSparsitySearch(ImageTraining):
    """A search by GSparsity with one seed."""

    kind, table, command = "search", "search.csv", "nas_cifar10"
    settings: GSparsitySettings
    size: dict[str, int] | None = None

    def __init__(self, settings: GSparsitySettings, seed: int, out: Path, processes: Processes, device: torch.device) -> None:
        super().__init__(settings, seed, out, processes, device)
        self.operations = OperationGroups(self.net, settings)
        self.sgd = self.operations.optimizer

    def build(self, classes: int) -> Any:
        s, space = self.settings, spaces.get_space(self.settings.space)
        if s.auxiliary and space.kind is not Genotype:
            raise ValueError(f"auxiliary must be 0 in {s.space}, whose networks have no auxiliary head, got {s.auxiliary:g}")
        own = partial(cnn.Supernet, auxiliary=True) if s.auxiliary else None
        return image_networks.supernet(space, s, classes, self.image_channels, own)

    def title(self) -> str:
        return f"gsparsity, {super().title()}"

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.amp):
            return self.net.outputs(images, self.operations.weights(), self.operations.active_paths())

    def begin_epoch(self) -> None:
        super().begin_epoch()
        for group in self.sgd.param_groups:
            group["lr"] = self.settings.rate(self.epoch)

    def update(self) -> None:
        self.processes.average([p.grad for p in self.trained_tensors() if p.grad is not None])
        if self.settings.clip:
            torch.nn.utils.clip_grad_norm_(self.trained_tensors(), self.settings.clip)
        self.operations.step()

    def trained_tensors(self) -> list[Tensor]:
        return [*self.params, *self.operations.gates.values()]

    def end_epoch(self) -> dict[str, Any]:
        row = super().end_epoch()
        operations = self.operations
        genotype, point = operations.genotype(), operations.point()
        regulariser = operations.regulariser()
        loss = accuracy = float("nan")
        if all(genotype.output_nodes(cell) for cell in operations.cells):
            loss, accuracy = self.at_point(self.net.space.masks(genotype))
        if self.settings.vanish:
            operations.drop_zeroed()
        if self.processes.first:
            results.save_epoch(self.out, self.epoch, genotype)
        own = {"restricted_loss": loss, "restricted_accuracy": accuracy, "regulariser": regulariser}
        last = {"vanished": sum(not active for active in operations.is_active.values())}
        return row | own | report.architecture_columns(genotype, point) | last

    @torch.no_grad()
    def at_point(self, masks: Masks) -> tuple[float, float]:
        """Compute loss and accuracy of these paths at the prox point, with batch statistics in batch norms."""
        self.net.train()
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        with self.sgd.at_prox_point(), frozen_statistics(self.net):
            for images, labels in self.validation():
                logits = self.net(images, self.operations.weights(), masks).float()
                loss = F.cross_entropy(logits, labels, reduction="sum").double()
                sums += torch.stack([loss, (logits.argmax(1) == labels).sum(), torch.full_like(loss, len(labels))])
        self.processes.total([sums])
        loss_sum, correct, images_seen = sums.tolist()
        return loss_sum / images_seen, correct / images_seen

    @torch.no_grad()
    def cut_changes(self) -> float:
        """The largest change of a logit of a validation batch when zero paths are removed, at the prox point."""
        images, _ = next(iter(self.validation()))
        masks = self.net.space.masks(self.operations.genotype())
        self.net.train()
        with self.sgd.at_prox_point(), frozen_statistics(self.net), repeated_noise(self.net):
            logits = [self.net(images, self.operations.weights(), active) for active in (None, masks)]
        return float((logits[0] - logits[1]).abs().max())

    def finish(self) -> None:
        empty = [cell for cell in self.operations.cells if not self.operations.genotype().output_nodes(cell)]
        if empty:
            zero = f"all operations of the {cell_name(empty[0])} are zero"
            print(f"{zero}: a mu smaller than {self.settings.mu:g} keeps some")
            return
        print(f"the cut changes logits by {self.cut_changes():g}")
        details = report.Details(size=image_networks.genotype_size, data_dir=self.settings.data_dir)
        point = self.operations.point()
        self.size = results.write_report(self.out, "gsparsity", self.rows, point, self.net.space, self.identity(), details)

    def result(self) -> dict[str, Any]:
        return {**super().result(), **(self.size or {})}

    def identity(self) -> dict[str, Any]:
        return {"method": "gsparsity", **super().identity()}

    def state(self) -> dict[str, Any]:
        return {"net": self.net.state_dict(), "operations": self.operations.state_dict(), "sums": self.sums}

    def restore(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["net"])
        self.operations.load_state_dict(state["operations"])
        self.sums.copy_(state["sums"])


def search(settings: GSparsitySettings, seed: int, out: Path) -> dict[str, Any]:
    """Search with one mu, or find the mu with the wanted size by bisection; return the last row."""
    run = lambda own, folder: launch(partial(GSparsitySearch, own, seed, folder), own, folder)
    description = {"command": GSparsitySearch.command, "framework": "torch", "method": "gsparsity", "seed": seed}
    return search_or_bisect(settings, out, run, image_networks.genotype_size, first_process, description)
