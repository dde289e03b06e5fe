"""GSparsity: no architecture variables. Group sparsity on the weights of each operation themselves, by ProxSGD on one level.

    min_w L(w) + sum_k mu_k ||w_k||_2

A group k is one operation on one edge, in all cells of a type. Operations without parameters (pools, skip connections, noise)
get one factor in each cell, which starts at 1. The architecture is read from the prox point w_hat, where whole groups are exactly
zero; w itself only decays. With batch norms that have no shift, an operation of zero weights gives exactly zero: the cut
changes no logit.

Weighting. As published, mu_k = mu / sqrt(size): the more weights, the less shrinkage. A loss in front of batch norms hardly
resists, so norms fall by lr * mu_k a step and the largest ||w_k(0)|| sqrt(size) survives: sep_conv_5x5. The factors of 6 (or 2)
cells have mu_k = 24.5 (42.4) for mu = 60, beyond their norm: pools and skips die at once whatever the loss says.
`weighting="initial_norm"`, mu_k = mu ||w_k(0)||, lets all groups fall alike, so that only the loss tells them apart;
`gates="free"` leaves operations without parameters unpenalised.

Source: "GSparsity: unifying network pruning and neural architecture search by group sparsity", Eq. 1 and 2; settings of the
published code and logs.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from proxopt import GroupL2
from proxopt_torch import ProxSGD

from ..engine import report, results
from ..engine.bisection import closest_strength, refuse_existing_runs
from ..engine.distributed import Processes
from ..engine.log import write_csv
from ..engine.run import launch
from ..engine.settings import check
from ..nets.torch import cnn
from ..nets.torch.flat import Flat
from ..nets.torch.operations import Identity, Noise, Pool, frozen_statistics, repeated_noise
from ..space import genotype, spaces
from ..space.genotype import CELLS, Genotype
from ..space.genotype import Path as CellPath
from ..space.spaces import Masks
from ..train.settings import ImageTrainSettings
from ..train.train_cifar import ImageTraining

Weighting = Literal["inverse_sqrt_size", "none", "sqrt_size", "initial_norm"]
WEIGHTINGS: dict[str, Callable[[Tensor], float]] = {
    "inverse_sqrt_size": lambda w: 1 / math.sqrt(w.numel()),
    "none": lambda w: 1.0,
    "sqrt_size": lambda w: math.sqrt(w.numel()),
    "initial_norm": lambda w: float(w.norm()),
}


@dataclass(frozen=True)
class GSparsitySettings(ImageTrainSettings):
    channels: int = 16
    layers: int = 8
    epochs: int = 100
    batch: int = 64
    lr: float = 1e-3
    lr_min: float = 1e-3
    momentum: float = 0.2
    """Weight of the old direction: 1 - rho of ProxSGD."""
    weight_decay: float = 0.0
    clip: float = 0.0
    cutout: int = 0
    auxiliary: float = 0.0
    drop_path: float = 0.0
    space: str = "darts"
    """Search space: darts, darts_zero, cherry, S1, S2, S3, S4."""
    mu: float = 60.0
    """Strength of the penalty."""
    weighting: Weighting = "inverse_sqrt_size"
    """mu_k = mu times this of the group; see the text above."""
    gates: Literal["penalised", "free"] = "penalised"
    """Whether operations without parameters are penalised too."""
    tau: float | Literal["direct"] = 1.0
    """Curvature of the model step of ProxSGD. direct: the weights themselves take the prox step, of length lr, so that they and
    not only their prox point are exactly sparse."""
    vanish: float = 1e-6
    """Groups that are 0 at the prox point and whose own norm is below this are set to 0 and run no more; 0: never."""
    cut: float = 0.0
    """Remove groups whose norm at the prox point is at most this; 0 removes exact zeros only, which changes no logit."""
    not_identifying: ClassVar[tuple[str, ...]] = ("data_dir", "want_paths", "want_parameters", "bisect_runs")  # of one search
    want_paths: int = 0
    """Look for the mu that leaves so many paths in both cells, by bisection; 0: take mu as it is."""
    want_parameters: int = 0
    """The same for the parameters of the found network of 20 cells and 36 channels."""
    bisect_runs: int = 6
    """Searches that a bisection may take."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, amounts=("mu", "vanish", "cut"), shares=("momentum",))
        for name, least in (("want_paths", 0), ("want_parameters", 0), ("bisect_runs", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be >= {least}, got {getattr(self, name)}")
        if self.want_paths and self.want_parameters:
            raise ValueError(f"want_paths and want_parameters exclude each other, got {self.want_paths}, {self.want_parameters}")
        if self.tau != "direct" and not 0 < self.tau < math.inf:
            raise ValueError(f"tau must be finite and > 0, or direct, got {self.tau}")


CIFAR_PRESETS = {
    "paper": GSparsitySettings(),
    "small": GSparsitySettings(
        channels=8,
        layers=5,
        epochs=10,
        batch=32,
        images=4096,
        valid_images=2000,
        lr=0.02,
        lr_min=0.02,
        tau="direct",
        mu=0.05,
        weighting="initial_norm",
    ),
}


def loss_free(norm: np.ndarray, strength: np.ndarray, lr: float, tau: float, steps: int) -> np.ndarray:
    """The norms of groups after so many steps of ProxSGD without any gradient: what the penalty does on its own.

        ||w_hat|| = max(||w|| - mu_k / tau, 0),   ||w|| <- ||w|| + lr (||w_hat|| - ||w||)

    norm, strength: one entry for each group.
    """
    for _ in range(steps):
        norm = norm + lr * (np.maximum(norm - strength / tau, 0) - norm)
    return norm


class GatedGroup:
    """mu_k ||w||_2 as a penalty, with the last `gates` entries of the prox clipped to [0, 1], as in the published code."""

    def __init__(self, mu: float, gates: int):
        self.mu, self.gates = mu, gates

    def value(self, x: Tensor) -> Tensor:
        return self._group.value(x)

    def prox(self, x: Tensor, step: Any = 1.0) -> Tensor:
        z = self._group.prox(x, step)
        if not self.gates:
            return z
        weights, gates = z.split([len(z) - self.gates, self.gates])
        return torch.cat([weights, gates.clamp(0, 1)])

    @property
    def _group(self) -> GroupL2:
        return GroupL2(self.mu, weights="none")


class OperationGroups:
    """The groups of a supernet: for each path of each cell type its weights and gates, as one flat parameter."""

    def __init__(self, net: cnn.Supernet, settings: GSparsitySettings):
        self.net, self.settings = net, settings
        self.gates: dict[tuple[str, CellPath], nn.Parameter] = {}
        self.flats: dict[tuple[str, CellPath], Flat] = {}
        self.count = {cell: net.kinds.count(cell) for cell in CELLS}
        for (cell, path), weights in net.path_parameters().items():
            if path.operation == "none":
                continue
            parts = list(weights)
            if self._is_gated(cell, path):
                self.gates[cell, path] = nn.Parameter(net.classifier.weight.new_ones(self.count[cell]))
                parts.append(self.gates[cell, path])
            self.flats[cell, path] = Flat(f"{cell} {path.source}-{path.node} {path.operation}", parts)
        self.initial = {key: float(flat.vector.detach().norm()) for key, flat in self.flats.items()}
        self.alive_: dict[tuple[str, CellPath], bool] = dict.fromkeys(self.flats, True)
        self.others = [p for p in net.parameters() if id(p) not in {id(q) for flat in self.flats.values() for q in flat.parts}]
        tau = None if settings.tau == "direct" else settings.tau
        self.optimizer = ProxSGD(self.param_groups(), settings.lr, 1 - settings.momentum, tau)

    def _is_gated(self, cell: str, path: CellPath) -> bool:
        """Whether the operation has no parameters of its own, or is a strided skip connection."""
        mixed = self.net.cells[self.net.kinds.index(cell)]
        return isinstance(mixed.operation(mixed.paths.index(path)), (Identity, Pool, Noise)) or path.operation == "skip_connect"

    def strength(self, key: tuple[str, CellPath]) -> float:
        """mu_k."""
        if self.settings.gates == "free" and key in self.gates and len(self.flats[key].parts) == 1:
            return 0.0
        return self.settings.mu * WEIGHTINGS[self.settings.weighting](self.flats[key].vector.detach())

    def param_groups(self) -> list[dict[str, Any]]:
        """One for each operation, and one without penalty for the rest: stem, classifier, preprocessing."""
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
        """For the supernet, (cells, paths): the gates, and 1 where an operation has weights of its own."""
        out = {}
        for cell in CELLS:
            one = self.net.classifier.weight.new_ones(self.count[cell])
            out[cell] = torch.stack([self.gates.get((cell, path), one) for path in self.net.space.paths(cell)], 1)
        return out

    def alive(self) -> Masks | None:
        """The paths that have not vanished; None where none has."""
        if all(self.alive_.values()):
            return None
        return {cell: tuple(self.alive_.get((cell, path), False) for path in self.net.space.paths(cell)) for cell in CELLS}

    def step(self) -> None:
        """One step of ProxSGD from the gradients of the network."""
        for flat in self.flats.values():
            flat.gather()
        self.optimizer.step()

    def norms(self) -> dict[tuple[str, CellPath], float]:
        """||w_hat_k|| of each group: its norm at the prox point."""
        state = self.optimizer.state
        points = [state.get(f.vector, {}).get("point", f.vector).detach() for f in self.flats.values()]
        return dict(zip(self.flats, torch.stack(torch._foreach_norm(points)).tolist()))

    @torch.no_grad()
    def let_vanish(self) -> None:
        """Set to exactly 0, and run no more, what is 0 at the prox point and has decayed below `vanish`.

        A cell of which nothing would be left goes on as it is: it could not run.
        """
        found = torch.stack(torch._foreach_norm([f.vector.detach() for f in self.flats.values()])).tolist()
        small = {k for (k, point), norm in zip(self.norms().items(), found) if point == 0 and norm < self.settings.vanish}
        for cell in CELLS:
            left = [path for c, path in self.flats if c == cell and (c, path) not in small]
            if Genotype.from_paths(**{name: left if name == cell else [] for name in CELLS}).clean().living(cell):
                for key in (k for k in small if k[0] == cell and self.alive_[k]):
                    self.flats[key].clear()
                    for held in self.optimizer.state[self.flats[key].vector].values():
                        if isinstance(held, Tensor) and held.ndim:
                            held.zero_()  # no momentum is left to bring it back
                    self.alive_[key] = False

    def genotype(self) -> Genotype:
        """The operations that are not 0 at the prox point, without dead ends."""
        norms = self.norms()
        kept = {cell: [path for (c, path), n in norms.items() if c == cell and n > self.settings.cut] for cell in CELLS}
        return Genotype.from_paths(**kept).clean()

    def regulariser(self) -> float:
        """sum_k ||w_k|| / sqrt(size_k) at the search point, as the published logs have it."""
        vectors = [f.vector.detach() for f in self.flats.values()]
        found = torch.stack(torch._foreach_norm(vectors)).tolist()
        return sum(n / math.sqrt(v.numel()) for n, v in zip(found, vectors))

    def point(self) -> dict[str, Tensor]:
        """For pictures: ||w_hat_k|| / ||w_k(0)|| for each path."""
        norms = self.norms()
        share = lambda key: norms[key] / self.initial[key] if key in norms else 0.0
        return {cell: torch.tensor([share((cell, path)) for path in self.net.space.paths(cell)]) for cell in CELLS}

    def state_dict(self) -> dict[str, Any]:
        """All but the weights, which are the network's; gates are none of its parameters."""
        gates = [g.detach() for g in self.gates.values()]
        return {
            "gates": gates,
            "alive": list(self.alive_.values()),
            "initial": list(self.initial.values()),
            "optimizer": self.optimizer.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """After the network has loaded its weights."""
        for gate, saved in zip(self.gates.values(), state["gates"]):
            gate.copy_(saved)
        self.alive_ = dict(zip(self.flats, state["alive"]))
        self.initial = dict(zip(self.flats, state["initial"]))
        self.optimizer.load_state_dict(state["optimizer"])


class GSparsitySearch(ImageTraining):
    """A search with one seed."""

    kind, table = "search", "search.csv"
    settings: GSparsitySettings

    def __init__(self, settings: GSparsitySettings, seed: int, out: Path, processes: Processes, device: torch.device) -> None:
        super().__init__(settings, seed, out, processes, device)
        self.operations = OperationGroups(self.net, settings)
        self.sgd = self.operations.optimizer

    def build(self, classes: int) -> cnn.Supernet:
        s = self.settings
        return cnn.Supernet(spaces.get_space(s.space), s.channels, s.layers, classes, auxiliary=s.auxiliary > 0)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.amp):
            return self.net.outputs(images, self.operations.weights(), self.operations.alive())

    def begin_epoch(self) -> None:
        super().begin_epoch()
        for group in self.sgd.param_groups:
            group["lr"] = self.settings.rate(self.epoch)

    def update(self) -> None:
        self.processes.average([p.grad for p in self.everything() if p.grad is not None])
        if self.settings.clip:
            torch.nn.utils.clip_grad_norm_(self.everything(), self.settings.clip)
        self.operations.step()

    def everything(self) -> list[Tensor]:
        return [*self.params, *self.operations.gates.values()]

    def end_epoch(self) -> dict[str, Any]:
        row = super().end_epoch()
        operations = self.operations
        genotype, point = operations.genotype(), operations.point()
        regulariser = operations.regulariser()
        loss = accuracy = float("nan")
        if all(genotype.living(cell) for cell in CELLS):
            loss, accuracy = self.at_point(self.net.space.masks(genotype))
        if self.settings.vanish:
            operations.let_vanish()
        if self.processes.first:
            results.save_epoch(self.out, self.epoch, genotype)
        own = {"restricted_loss": loss, "restricted_accuracy": accuracy, "regulariser": regulariser}
        return (
            row
            | own
            | report.architecture_columns(genotype, point)
            | {"vanished": sum(not a for a in operations.alive_.values())}
        )

    @torch.no_grad()
    def at_point(self, masks: Masks) -> tuple[float, float]:
        """Loss and accuracy of the living paths at the prox point, batch norms with the statistics of each batch."""
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
        """The largest difference that the cut makes to a logit of one validation batch, at the prox point."""
        images, _ = next(iter(self.validation()))
        masks = self.net.space.masks(self.operations.genotype())
        self.net.train()
        with self.sgd.at_prox_point(), frozen_statistics(self.net), repeated_noise(self.net):
            logits = [self.net(images, self.operations.weights(), alive) for alive in (None, masks)]
        return float((logits[0] - logits[1]).abs().max())

    def finish(self) -> None:
        dead = [cell for cell in CELLS if not self.operations.genotype().living(cell)]
        if dead:
            print(f"every operation of the {dead[0]} cell has died: a smaller mu than {self.settings.mu:g} keeps some")
            return
        print(f"the cut changes logits by {self.cut_changes():g}")
        results.write_report(self.out, "gsparsity", self.rows, self.operations.point(), self.net.space, self.identity())

    def identity(self) -> dict[str, Any]:
        return {"method": "gsparsity", **super().identity()}

    def state(self) -> dict[str, Any]:
        return {"net": self.net.state_dict(), "operations": self.operations.state_dict(), "sums": self.sums}

    def restore(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["net"])
        self.operations.load_state_dict(state["operations"])
        self.sums.copy_(state["sums"])


def search_or_bisect(settings: GSparsitySettings, seed: int, out: Path) -> dict[str, Any]:
    """Search with one mu, or look for the one that leaves as much as is wanted; the last row."""
    if settings.want_paths or settings.want_parameters:
        return bisect(settings, seed, out)
    return launch(partial(GSparsitySearch, settings, seed, out), settings, out)


def bisect(settings: GSparsitySettings, seed: int, out: Path) -> dict[str, Any]:
    """Searches in `out`/mu-..., each going on where it was; what the closest one left is copied to `out`. Its last row.

    Raises FileExistsError where `out` holds such searches and `settings.resume` is off.
    """
    refuse_existing_runs(out, settings.resume)
    rows: dict[float, dict[str, Any]] = {}
    want = settings.want_paths or settings.want_parameters

    def left(mu: float) -> int:
        at = replace(settings, mu=mu, want_paths=0, want_parameters=0, resume=True)
        folder = out / f"mu-{mu:.6g}"
        rows[mu] = launch(partial(GSparsitySearch, at, seed, folder), at, folder)
        paths = rows[mu]["paths_normal"] + rows[mu]["paths_reduce"]
        count = paths if settings.want_paths else genotype_parameters(genotype.load_genotype(folder / "genotype.json"))
        print(f"mu {mu:.6g}: {count} {'paths' if settings.want_paths else 'parameters'}, {want} wanted")
        rows[mu] = {"mu": mu, "left": count, **rows[mu]}
        return count

    mu = closest_strength(left, want, settings.mu, settings.bisect_runs)
    for file in (out / f"mu-{mu:.6g}").iterdir():
        if file.is_file() and file.name != "checkpoint.pt":
            shutil.copy(file, out / file.name)
    write_csv(out / "bisection.csv", [rows[m] for m in sorted(rows)])
    return rows[mu]


def genotype_parameters(found: genotype.Genotype) -> int:
    """Of the network of 20 cells and 36 channels; 0 for a genotype with a dead cell."""
    if not all(found.living(cell) for cell in genotype.CELLS):
        return 0
    return cnn.network_size(cnn.Network(found, auxiliary=False), (3, 32, 32))["parameters"]
