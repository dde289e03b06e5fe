"""The loop of a bilevel search, for any data and network.

Writes to `out`: settings.json, checkpoint.pt, search.csv, genotype.json (and one for each epoch), result.json and the pictures
of `engine.report`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..engine.distributed import Processes
from ..engine.run import Run, all_finite
from ..space.spaces import Masks, discrete
from .method import Method
from .outcome import Outcome
from .settings import BilevelSettings
from .steps import BilevelSteps


class BilevelSearch(Outcome, Run):
    """A search by one method with one seed. Subclasses define the data, the supernet, and the measure of quality."""

    net: Any
    method: Method
    steps: BilevelSteps

    def __init__(
        self, method: type[Method], settings: BilevelSettings, seed: int, out: Path, processes: Processes, device: torch.device
    ) -> None:
        super().__init__(settings, seed, out, processes, device)
        self.name, self.make = method.name, method
        self.points = []

    def prepare(self, net: Any, steps: type[BilevelSteps]) -> None:
        """Move the supernet to its device, and build the method and the steps."""
        self.net, self.space = net.to(self.device), net.space
        self.method = self.make(self.space, self.settings, self.device)
        self.steps = steps(self.net, self.method, self.settings, self.processes)

    def begin_epoch(self) -> None:
        if self.step == 0:
            self.method.begin_epoch(self.epoch)
        self.net.train()

    def train_step(self, batch: tuple[Any, Any]) -> None:
        train, valid = batch
        if self.settings.levels == 1:
            self.steps.joint(self.step, train)
            return
        self.steps.architecture(self.step, train, valid)
        self.steps.weights(train)

    def end_epoch(self) -> dict[str, Any]:
        self.steps.begin_step()
        self.processes.check_same("the architecture", self.method.parameters)
        self.processes.average_buffers(self.net)
        trained, largest = self.steps.means(), max(float(p.detach().abs().max()) for p in self.method.parameters)
        self.check_finite("train", trained[0], largest)
        point = self.method.point()
        genotype = discrete(self.space, self.method.genotype(), point)
        weights, active, masks = self.method.weights(), self.method.active_paths(), self.space.masks(genotype)
        valid = restricted = self.evaluate(weights, active)
        if active != masks or not all(torch.equal(weights[cell], p) for cell, p in point.items()):
            restricted = self.evaluate(point, masks)  # else both are the same network
        self.check_finite("valid", valid[0], largest)
        on_host = {cell: p.cpu() for cell, p in point.items()}
        lr = self.steps.sgd.param_groups[0]["lr"]
        return self.epoch_row(lr, trained, valid, restricted, genotype, on_host) | self.method.log()

    def is_finite(self) -> bool:
        return bool(self.steps.sums[0].isfinite()) and all_finite(self.steps.params)

    def evaluate(self, weights: Any, active: Masks | None) -> tuple[float, float]:
        """Compute loss and measure of the supernet on the validation data."""
        raise TypeError(f"{type(self).__name__} must define evaluate")

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
