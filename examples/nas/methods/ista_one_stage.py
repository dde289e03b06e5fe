"""ISTA-NAS in one stage: one network, of the size and by the recipe of the final training, is searched and trained in one run.

Until its code comes to rest, ||z_new - z_old|| <= tolerance between two epochs, each node searches: one backward pass on a
training batch moves its compressed variable and the weights of the paths it has at the time, whose batch norms keep scale 1
and shift 0. Then the node keeps its paths, and their norms are trained too. When all nodes rest, `epochs` epochs of the recipe
follow, without a new start; at the end the coefficients are absorbed into the batch norms.

Source: Yang, Li, You, Wang, Qian, Lin, "ISTA-NAS", NeurIPS 2020, Algorithm 2; ending node by node is the published code's.
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
from ..space.genotype import CELLS, NODES
from ..train.settings import ImageTrainSettings
from ..train.train_cifar import ImageTraining
from .ista import Codes, CodeSettings, code_optimizer


@dataclass(frozen=True)
class OneStageSettings(CodeSettings, ImageTrainSettings):
    """The recipe is that of the papers for CIFAR-10; `epochs` follow the search."""

    out: Path = Path("runs/one_stage")
    lr_min: float = 0.001
    space: str = "darts"
    """Search space: darts, darts_zero, cherry, S1, S2, S3."""
    tolerance: float = 1e-3
    """A node rests when its code moves by no more from one epoch to the next."""
    search_epochs: int = 200
    """The search ends after so many epochs even if nodes still move."""
    max_parameters: int = 0
    """Refuse supports that make a network of more parameters and keep the last ones; 0: none are refused. The published code
    refuses 3.7 million, the paper does not say so."""

    def __post_init__(self) -> None:
        ImageTrainSettings.__post_init__(self)
        CodeSettings.__post_init__(self)
        check(self, counts=("search_epochs",), amounts=("max_parameters", "tolerance"))


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
    """A search and training with one seed."""

    kind, table = "search", "search.csv"

    def __init__(self, settings: OneStageSettings, seed: int, out: Path, processes: Processes, device: torch.device) -> None:
        super().__init__(settings, seed, out, processes, device)
        self.codes = Codes(self.net.space, settings, device)
        self.adam = code_optimizer(self.codes.parameters, settings)
        self.resting = {cell: [False] * len(NODES) for cell in CELLS}
        self.rests_from = -1  # the first epoch in which all nodes rest
        for norms in self._norms().values():
            for norm in norms:
                norm.requires_grad_(False)

    def build(self, classes: int) -> cnn.Supernet:
        s = self.settings
        space = spaces.get_space(s.space)
        if any(path.operation == "noise" for cell in CELLS for path in space.paths(cell)):
            raise ValueError(f"space must hold operations that can end in a batch norm, and noise does not, got {s.space!r}")
        return cnn.Supernet(space, s.channels, s.layers, classes, form="one_stage", auxiliary=s.auxiliary > 0)

    def _norms(self) -> dict[tuple[str, int], list[BatchNorm]]:
        """(cell, node): the batch norms of all candidate operations into the node, in all cells of the type."""
        out: dict[tuple[str, int], list[BatchNorm]] = {(cell, node): [] for cell in CELLS for node in NODES}
        for kind, cell in zip(self.net.kinds, self.net.cells):
            for i, path in enumerate(cell.paths):
                out[kind, path.node] += [m for m in cell.operation(i).modules() if isinstance(m, BatchNorm)]
        return out

    # -- the search inside the recipe ---------------------------------------------------------

    @property
    def searches(self) -> bool:
        return self.rests_from < 0

    def epochs(self) -> int:
        return (self.settings.search_epochs if self.searches else self.rests_from) + self.settings.epochs

    def begin_epoch(self) -> None:
        if self.searches and self.step == 0:
            self._recover()
        s = self.settings
        done = 0 if self.searches else self.epoch - self.rests_from
        self.sgd.param_groups[0]["lr"] = s.rate(done)
        self.net.drop_path.fill_(s.drop_path * done / s.epochs)
        self.net.train()

    def _recover(self) -> None:
        """New codes for the nodes that still search; those whose code has come to rest keep it from now on."""
        codes, old = self.codes.solve(), self.codes.codes
        moved = self.codes.distances(codes)
        for cell in CELLS:
            codes[cell] = [old[cell][i] if rests else z for i, (z, rests) in enumerate(zip(codes[cell], self.resting[cell]))]
        self.codes.moved = max(m for c in CELLS for m, rests in zip(moved[c], self.resting[c]) if not rests)
        self.codes.take_over(codes)
        refused = self.epoch > 0 and self._too_large()
        if refused:
            self.codes.take_over(old)
        if self.epoch > 0 and not refused:
            for cell in CELLS:
                self.resting[cell] = [r or m <= self.settings.tolerance for r, m in zip(self.resting[cell], moved[cell])]
        if self.epoch >= self.settings.search_epochs:
            self.resting = {cell: [True] * len(NODES) for cell in CELLS}
        self._free_norms()
        if all(all(rests) for rests in self.resting.values()):
            self.rests_from = self.epoch

    def _too_large(self) -> bool:
        s = self.settings
        if not s.max_parameters:
            return False
        with torch.device("meta"):
            net = cnn.Network(self.codes.genotype(), s.channels, s.layers, auxiliary=False, form="one_stage")
        return sum(p.numel() for p in net.parameters()) > s.max_parameters

    def _free_norms(self) -> None:
        """The norms of nodes that rest are trained."""
        norms = self._norms()
        for cell in CELLS:
            for node, rests in zip(NODES, self.resting[cell]):
                for norm in norms[cell, node] if rests else ():
                    norm.requires_grad_(True)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        with torch.no_grad() if not self.searches else nullcontext():
            weights = self.codes.weights()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.amp):
            return self.net.outputs(images, weights, self.codes.masks)

    def update(self) -> None:
        """b first, then the weights; the clip sees both gradients, as in the published code."""
        live = [p for p in self.params if p.grad is not None]
        both = live + (self.codes.parameters if self.searches else [])
        self.processes.average([p.grad for p in both])  # type: ignore[misc]
        if self.searches:
            self._move_codes()
        if self.settings.clip:
            nn.utils.clip_grad_norm_(both, self.settings.clip)
        self.sgd.step()
        for b in self.codes.parameters:
            b.grad = None

    @torch.no_grad()
    def _move_codes(self) -> None:
        """One step of Adam for the nodes that search."""
        before = [b.clone() for b in self.codes.parameters]
        self.adam.step()
        for b, old, cell in zip(self.codes.parameters, before, CELLS):
            rests = torch.tensor(self.resting[cell], device=b.device)[:, None]
            b.copy_(torch.where(rests, old, b))

    # -- what it leaves behind ------------------------------------------------------------------

    def end_epoch(self) -> dict[str, Any]:
        row = super().end_epoch()
        self.processes.check_same("the architecture", self.codes.parameters)
        genotype, point = self.codes.genotype(), self.point()
        if self.processes.first:
            results.save_epoch(self.out, self.epoch, genotype)
        own = {"restricted_accuracy": row["valid_accuracy"], "resting_nodes": sum(map(sum, self.resting.values()))}
        return (
            row | own | report.architecture_columns(genotype, point) | {"moved": self.codes.moved, "recovery_gap": self.codes.gap}
        )

    @torch.no_grad()
    def point(self) -> dict[str, Tensor]:
        return {cell: w.cpu() for cell, w in self.codes.weights().items()}

    def finish(self) -> None:
        """The network without architecture variables, and the pictures."""
        with torch.no_grad():
            net = cnn.absorbed(self.net, self.codes.genotype(), self.codes.weights())
        checkpoint.save_network(self.out / "network.pt", net)
        drawing.save(curves.training(self.rows), self.out / "train.png")
        results.write_report(self.out, "ista, one stage", self.rows, self.point(), self.net.space, self.identity())

    def identity(self) -> dict[str, Any]:
        return {"method": "ista one_stage", **super().identity()}

    def state(self) -> dict[str, Any]:
        own = {"codes": self.codes.state_dict(), "adam": self.adam.state_dict(), "resting": self.resting}
        return {**super().state(), **own, "rests_from": self.rests_from}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self.codes.load_state_dict(state["codes"])
        self.adam.load_state_dict(state["adam"])
        self.resting, self.rests_from = state["resting"], state["rests_from"]
        self._free_norms()
