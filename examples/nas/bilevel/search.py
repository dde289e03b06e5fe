"""The loop of a bilevel search, for any data and network.

Writes to `out`: checkpoint.pt, search.csv, genotype.json (and one for each epoch), settings.json and the pictures of
`engine.report`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..engine import report, results
from ..engine.distributed import Processes
from ..engine.run import Run
from ..space.spaces import Masks
from .method import Method
from .settings import BilevelSettings
from .steps import BilevelSteps


class BilevelSearch(Run):
    """A search by one method with one seed. Subclasses define the data, the supernet, and the measure of quality."""

    kind, table = "search", "search.csv"
    measure = "accuracy"  # reported in addition to the loss
    net: Any
    method: Method
    steps: BilevelSteps

    def __init__(
        self, method: type[Method], settings: BilevelSettings, seed: int, out: Path, processes: Processes, device: torch.device
    ) -> None:
        super().__init__(settings, seed, out, processes, device)
        self.name, self.make = method.name, method
        self.points: list[dict[str, Tensor]] = []  # the prox point after every epoch

    def prepare(self, net: Any, steps: type[BilevelSteps]) -> None:
        """Move the supernet to its device, and build the method and the steps."""
        self.net = net.to(self.device)
        self.method = self.make(self.net.space, self.settings, self.device)
        self.steps = steps(self.net, self.method, self.settings, self.processes)

    def begin_epoch(self) -> None:
        if self.step == 0:
            self.method.begin_epoch(self.epoch)
        self.net.train()

    def train_step(self, batch: tuple[Any, Any]) -> None:
        train, valid = batch
        self.steps.architecture(self.step, train, valid)
        self.steps.weights(train)

    def end_epoch(self) -> dict[str, Any]:
        self.processes.check_same("the architecture", self.method.parameters)
        self.processes.average_buffers(self.net)
        trained = self.steps.means()
        self.check_finite("train", trained[0])
        point, genotype = self.method.point(), self.method.genotype()
        weights, active, masks = self.method.weights(), self.method.active_paths(), self.net.space.masks(genotype)
        valid = restricted = self.evaluate(weights, active)
        if active != masks or not all(torch.equal(weights[cell], p) for cell, p in point.items()):
            restricted = self.evaluate(point, masks)  # else both are the same network
        self.check_finite("valid", valid[0])
        row = {"lr": self.steps.sgd.param_groups[0]["lr"]}
        for part, found in (("train", trained), ("valid", valid), ("restricted", restricted)):
            row |= dict(zip((f"{part}_loss", f"{part}_{self.measure}"), found))
        self.points.append({cell: p.cpu() for cell, p in point.items()})
        if self.processes.first:
            results.save_epoch(self.out, self.epoch, genotype)
        return row | report.architecture_columns(genotype, point) | self.method.log()

    def check_finite(self, part: str, loss: float) -> None:
        """Raise ValueError for a loss that is infinite or NaN, from which the search cannot recover."""
        if not loss < float("inf"):
            largest = max(float(p.detach().abs().max()) for p in self.method.parameters)
            raise ValueError(
                f"the {part} loss of epoch {self.epoch + 1} must be finite, got {loss}; the largest architecture weight"
                f" is {largest:.3g}: a lower lr or arch_lr may help"
            )

    def evaluate(self, weights: Any, active: Masks | None) -> tuple[float, float]:
        """Compute loss and measure of the supernet on the validation data."""
        raise TypeError(f"{type(self).__name__} must define evaluate")

    def result(self) -> dict[str, Any]:
        limit, cells = self.settings.pick_below, self.net.space.layout.cells
        sparse = [row for row in self.rows if sum(row[f"paths_{cell}"] for cell in cells) <= limit]
        return min(sparse, key=self.selection_loss) if sparse else self.rows[-1]

    def selection_loss(self, row: dict[str, Any]) -> float:
        """The quantity that `pick_below` minimises over the epochs."""
        return -row["restricted_accuracy"]

    def finish(self) -> None:
        epoch = self.result()["epoch"]
        results.select_epoch(self.out, epoch, self.net.space.kind)
        results.write_report(self.out, self.name, self.rows, self.points[epoch], self.net.space, self.identity())

    def identity(self) -> dict[str, Any]:
        return {"method": self.name, **super().identity()}

    def state(self) -> dict[str, Any]:
        return {
            "net": self.net.state_dict(),
            "steps": self.steps.state_dict(),
            "method": self.method.state_dict(),
            "points": self.points,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["net"])
        self.steps.load_state_dict(state["steps"])
        self.method.load_state_dict(state["method"])
        self.points = [{cell: p.cpu() for cell, p in point.items()} for point in state["points"]]
