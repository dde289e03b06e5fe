"""ISTA-NAS in one stage: a network of final size is searched and trained in one run, by the recipe of the final training.

While a node is searched, one backward pass on a training batch updates its compressed variable and the weights of its current
paths, whose batch norms have scale 1 and shift 0. When its code has converged, ||z_new - z_old|| <= tolerance between two epochs,
the node is frozen: its paths are final, and their batch norms are trained too. After `search_epochs` epochs all other nodes are
stopped. When all nodes are frozen or stopped, one more epoch has the learning rate of the search, as in the published code, and
`epochs` epochs of the recipe continue with the same weights. At the end the coefficients are absorbed into the batch norms.

Columns of the table: frozen_nodes have converged by themselves, stopped_nodes have not. distance is the mean change of the codes
between two epochs over all nodes, where that of a frozen node is 0 (Fig. 2, right), moved the largest; distances.png shows both.

Source: Yang, Li, You, Wang, Qian, Lin, "ISTA-NAS", NeurIPS 2020, Algorithm 2; convergence by node is that of the published code,
which searches for at most 600 epochs. A refused support (`max_parameters`) freezes no node here; there it can.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..engine import checkpoint, curves, report, results
from ..engine.distributed import Processes
from ..engine.settings import check
from ..nets.torch import cnn
from ..nets.torch.operations import BatchNorm
from ..space import drawing, spaces
from ..space.genotype import CELLS, NODES, Genotype
from ..train.settings import ImageTrainSettings
from ..train.train_cifar import ImageTraining
from .ista import Codes, code_optimizer
from .recovery import mean_distance
from .settings.ista import CodeSettings


@dataclass(frozen=True)
class OneStageSettings(CodeSettings, ImageTrainSettings):
    """Settings of the search and the training. The recipe is the published one for CIFAR-10; `epochs` follow the search."""

    out: Path = Path("runs/one_stage")
    lr_min: float = 0.001
    space: str = "darts"
    """Search space, the candidate operations of the edges: darts (7 operations), darts_zero (and the zero operation), cherry (2),
    or S1, S2, S3 of Zela et al. (2020)."""
    tolerance: float = 1e-3
    """Distance between the codes of a node in successive epochs at which it has converged, and its paths are frozen."""
    search_epochs: int = 200
    """Maximal number of epochs of the search, after which the nodes that are not frozen are stopped; --epochs of training
    follow the search."""
    extra_epochs: int = 1
    """Number of epochs with the learning rate of the search between its last node and the training; 1 in the published code."""
    max_parameters: int = 0
    """Number of parameters of the network up to which new paths are accepted, otherwise the last ones stay; 0: no limit. The
    published code has a limit of 3.7 million, which the paper does not mention."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, counts=("search_epochs",), amounts=("max_parameters", "tolerance", "extra_epochs"))
        if self.warmup_epochs:
            raise ValueError(f"warmup_epochs must be 0 in one stage, which begins with the search, got {self.warmup_epochs}")


CIFAR_PRESETS = {
    "paper": OneStageSettings(),
    "small": OneStageSettings(
        channels=8,
        layers=5,
        epochs=8,
        search_epochs=12,
        batch=32,
        images=8192,
        drop_path=0.1,
        cutout=8,
        arch_lr=3e-3,
        tolerance=0.05,
    ),
}


class OneStageSearch(ImageTraining):
    """A search and training in one run, with one seed."""

    kind, table, command = "search", "search.csv", "nas_cifar10"
    size: dict[str, int] | None = None

    def __init__(self, settings: OneStageSettings, seed: int, out: Path, processes: Processes, device: torch.device) -> None:
        super().__init__(settings, seed, out, processes, device)
        self.codes = Codes(self.net.space, settings, device)
        self.adam = code_optimizer(self.codes.parameters, settings)
        self.frozen = {cell: [False] * len(NODES) for cell in CELLS}  # converged or stopped
        self.stopped = 0  # the number of nodes that were stopped
        self.training_from = -1  # the first epoch of the training, as soon as it is known
        for norms in self._norms().values():
            for norm in norms:
                norm.requires_grad_(False)

    def title(self) -> str:
        return f"ista in one stage, {super().title()}"

    def build(self, classes: int) -> cnn.Supernet:
        s = self.settings
        space = spaces.get_space(s.space)
        if space.kind is not Genotype:
            raise ValueError(f"space must have cells of DARTS for a one-stage search, got {s.space!r}")
        if any(path.operation == "noise" for cell in CELLS for path in space.paths(cell)):
            raise ValueError(f"space must have operations that can end in a batch norm, which noise cannot, got {s.space!r}")
        options = {"auxiliary": s.auxiliary > 0, "image_channels": self.image_channels}
        return cnn.Supernet(space, s.channels, s.layers, classes, form="one_stage", **options)

    def _norms(self) -> dict[tuple[str, int], list[BatchNorm]]:
        """For each (cell type, node) the batch norms of all candidate operations into the node, in all cells of the type."""
        out: dict[tuple[str, int], list[BatchNorm]] = {(cell, node): [] for cell in CELLS for node in NODES}
        for kind, cell in zip(self.net.kinds, self.net.cells):
            for i, path in enumerate(cell.paths):
                out[kind, path.node] += [m for m in cell.operation(i).modules() if isinstance(m, BatchNorm)]
        return out

    # -- search phase ---------------------------------------------------------------------------

    @property
    def searching(self) -> bool:
        return self.training_from < 0

    def epochs(self) -> int:
        s = self.settings
        return s.epochs + (s.search_epochs + s.extra_epochs if self.searching else self.training_from)

    def begin_epoch(self) -> None:
        if self.step == 0:
            self.codes.moved = self.codes.distance = 0.0
            if self.searching:
                self._recover()
        s = self.settings
        done = 0 if self.searching else max(self.epoch - self.training_from, 0)
        self.sgd.param_groups[0]["lr"] = s.rate(done)
        self.net.drop_path.fill_(s.drop_path * done / s.epochs)
        self.net.train()

    def _recover(self) -> None:
        """Recover new codes of the nodes that are not frozen, and freeze those that have converged."""
        codes, old = self.codes.solve(), self.codes.codes
        for cell in CELLS:
            triples = zip(codes[cell], old[cell], self.frozen[cell])
            codes[cell] = [last if frozen else new for new, last, frozen in triples]
        moved = self.codes.distances(codes)
        self.codes.moved, self.codes.distance = max(map(max, moved.values())), mean_distance(moved)
        self.codes.set_codes(codes)
        refused = self.epoch > 0 and self._too_large()
        if refused:
            self.codes.set_codes(old)
        if self.epoch > 0 and not refused:
            for cell in CELLS:
                self.frozen[cell] = [f or m <= self.settings.tolerance for f, m in zip(self.frozen[cell], moved[cell])]
        if self.epoch >= self.settings.search_epochs:
            self.stopped = sum(not frozen for cell in CELLS for frozen in self.frozen[cell])
            self.frozen = {cell: [True] * len(NODES) for cell in CELLS}
        self._train_norms()
        if all(map(all, self.frozen.values())):
            self.training_from = self.epoch + self.settings.extra_epochs

    def _too_large(self) -> bool:
        s = self.settings
        if not s.max_parameters:
            return False
        with torch.device("meta"):
            sizes = (s.channels, s.layers, self.prepared.classes, False)
            net = cnn.Network(self.codes.genotype(), *sizes, form="one_stage", image_channels=self.image_channels)
        return sum(p.numel() for p in net.parameters()) > s.max_parameters

    def _train_norms(self) -> None:
        """Train the batch norms of frozen nodes."""
        norms = self._norms()
        for cell in CELLS:
            for node, frozen in zip(NODES, self.frozen[cell]):
                for norm in norms[cell, node] if frozen else ():
                    norm.requires_grad_(True)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        with torch.no_grad() if not self.searching else nullcontext():
            weights = self.codes.weights()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.amp):
            return self.net.outputs(images, weights, self.codes.masks)

    def update(self) -> None:
        """Update b first, then the weights; clipping uses the norm of both gradients, as in the published code."""
        updated = [p for p in self.params if p.grad is not None]
        both = updated + (self.codes.parameters if self.searching else [])
        self.processes.average([p.grad for p in both])  # type: ignore[misc]
        if self.searching:
            self._move_codes()
        if self.settings.clip:
            nn.utils.clip_grad_norm_(both, self.settings.clip)
        self.sgd.step()
        for b in self.codes.parameters:
            b.grad = None

    @torch.no_grad()
    def _move_codes(self) -> None:
        """Take a step of Adam for the nodes that are not frozen."""
        before = [b.clone() for b in self.codes.parameters]
        self.adam.step()
        for b, old, cell in zip(self.codes.parameters, before, CELLS):
            frozen = torch.tensor(self.frozen[cell], device=b.device)[:, None]
            b.copy_(torch.where(frozen, old, b))

    # -- results --------------------------------------------------------------------------------

    def end_epoch(self) -> dict[str, Any]:
        row = super().end_epoch()
        self.processes.check_same("the architecture", self.codes.parameters)
        genotype, point = self.codes.genotype(), self.point()
        if self.processes.first:
            results.save_epoch(self.out, self.epoch, genotype)
        frozen = sum(map(sum, self.frozen.values())) - self.stopped
        own = {"restricted_accuracy": row["valid_accuracy"], "frozen_nodes": frozen, "stopped_nodes": self.stopped}
        last = {"moved": self.codes.moved, "distance": self.codes.distance, "recovery_gap": self.codes.gap}
        return row | own | report.architecture_columns(genotype, point) | last

    @torch.no_grad()
    def point(self) -> dict[str, Tensor]:
        return {cell: w.cpu() for cell, w in self.codes.weights().items()}

    def finish(self) -> None:
        """Write the network without architecture variables, and the report."""
        with torch.no_grad():
            net = cnn.absorbed(self.net, self.codes.genotype(), self.codes.weights())
        checkpoint.save_network(self.out / "network.pt", net)
        self.draw_curves()
        drawing.save(curves.distances(self.rows), self.out / "distances.png")
        details = report.Details(size=cnn.genotype_size, data_dir=self.settings.data_dir)
        self.size = results.write_report(
            self.out, "ista, one stage", self.rows, self.point(), self.net.space, self.identity(), details
        )

    def result(self) -> dict[str, Any]:
        return {**super().result(), **(self.size or {})}

    def identity(self) -> dict[str, Any]:
        return {"method": "ista one_stage", **super().identity()}

    def state(self) -> dict[str, Any]:
        own = {"codes": self.codes.state_dict(), "adam": self.adam.state_dict(), "stopped": self.stopped}
        # the keys of release 0.1.0, whose checkpoints must load
        return {**super().state(), **own, "resting": self.frozen, "rests_from": self.training_from}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self.codes.load_state_dict(state["codes"])
        self.adam.load_state_dict(state["adam"])
        self.frozen, self.training_from = state["resting"], state["rests_from"]
        self.stopped = state["stopped"] if "stopped" in state else self._stopped_before()
        self._train_norms()

    def _stopped_before(self) -> int:
        """The nodes that a run of release 0.1.0 stopped: all that were not frozen after its last epoch of search."""
        if self.training_from < self.settings.search_epochs:
            return 0
        return len(CELLS) * len(NODES) - self.rows[self.training_from - 1]["resting_nodes"]
