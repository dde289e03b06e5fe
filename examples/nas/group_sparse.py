"""The search of GSparsity: one supernet, one level, the full training set; the cut at the end changes no logit.

row = carry_out(lambda processes, device: GroupSparse(settings, 0, out, processes, device), settings, out)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import cnn, report, spaces
from .genotype import CELLS
from .methods.gsparsity import Operations, Settings
from .operations import frozen_statistics, repeated_noise
from .processes import Processes
from .spaces import Masks
from .train import Recipe


class GroupSparse(Recipe):
    """A search with one seed."""

    kind, table = "search", "search.csv"
    settings: Settings

    def __init__(self, settings: Settings, seed: int, out: Path, processes: Processes, device: torch.device) -> None:
        super().__init__(settings, seed, out, processes, device)
        self.operations = Operations(self.net, settings)
        self.sgd = self.operations.optimizer

    def build(self, classes: int) -> cnn.Supernet:
        s = self.settings
        return cnn.Supernet(spaces.get(s.space), s.channels, s.layers, classes, auxiliary=s.auxiliary > 0)

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
            genotype.save(self.out / "genotypes" / f"epoch-{self.epoch + 1:03d}.json")
            genotype.save(self.out / "genotype.json")
        own = {"restricted_loss": loss, "restricted_accuracy": accuracy, "regulariser": regulariser}
        return row | own | report.columns(genotype, point) | {"vanished": sum(not a for a in operations.alive_.values())}

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
        (self.out / "settings.json").write_text(json.dumps(self.identity(), indent=1) + "\n", encoding="utf-8")
        print(f"the cut changes logits by {self.cut_changes():g}")
        report.write(self.out, "gsparsity", self.rows, self.operations.point(), self.net.space, self.identity())

    def identity(self) -> dict[str, Any]:
        return {"method": "gsparsity", **super().identity()}

    def state(self) -> dict[str, Any]:
        return {"net": self.net.state_dict(), "operations": self.operations.state_dict(), "sums": self.sums}

    def restore(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["net"])
        self.operations.load_state_dict(state["operations"])
        self.sums.copy_(state["sums"])
