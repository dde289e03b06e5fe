"""A training in which a budget removes parts of the network, and the same training of the dense network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from nas.engine import checkpoint, console
from nas.engine.distributed import Processes, require_single_process
from nas.engine.log import write_csv
from nas.engine.run import Run, all_finite
from torch import nn

from proxopt import GroupL2, SparseGroupLasso
from proxopt_torch import Budget, ProxAdam, ProximalOptimizer, ProxSGD, groups

from .settings import PruningSettings
from .task import Task

STRENGTH = 1.0  # of the penalty at first; the budget multiplies it by a factor that it chooses


class Pruning(Run):
    """The training of a network with one seed.

    task: makes the task from settings, seed and device. sparse: with a budget; otherwise the network stays dense.
    """

    kind, table = "pruning", "train.csv"
    settings: PruningSettings

    def __init__(
        self,
        task: type[Task],
        settings: PruningSettings,
        sparse: bool,
        seed: int,
        out: Path,
        processes: Processes,
        device: torch.device,
    ) -> None:
        super().__init__(settings, seed, out, processes, device)
        require_single_process(processes, "a network is pruned by one process")
        self.sparse, self.command = sparse, task.command
        self.task = task(settings, seed, device)
        torch.manual_seed(seed)
        self.net = self.task.build()
        self.params = list(self.net.parameters())
        self.optimizer = self._optimizer()
        self.budget = self._budget() if sparse else None
        torch.manual_seed(seed)  # so that the dense training draws the same random numbers as the sparse one
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)

    def _optimizer(self) -> ProximalOptimizer:
        s = self.settings
        found: Any = self.params
        if self.sparse:
            penalty = GroupL2(STRENGTH) if s.penalty == "group_lasso" else SparseGroupLasso(STRENGTH, l1_ratio=s.l1_share)
            found = groups.coupled(self.net, self.task.example(), penalty)
        if s.optimizer == "proxadam":
            betas = (s.momentum, 0.999)
            return ProxAdam(found, s.largest_lr, betas, weight_decay=s.weight_decay, decoupled_weight_decay=True)
        return ProxSGD(found, s.largest_lr, 1 - s.momentum, weight_decay=s.weight_decay)

    def _budget(self) -> Budget:
        s = self.settings
        due = max(round(s.due * self.total_steps()), 1)
        return Budget(
            self.optimizer,
            self.net,
            self.task.example(),
            macs=s.macs,
            steps=due,
            every=max(due // s.measurements, 1),
            start=s.start / s.due,
            tolerance=s.tolerance,
        )

    def __len__(self) -> int:
        return self.task.steps()

    def total_steps(self) -> int:
        return self.settings.epochs * len(self)

    def title(self) -> str:
        aim = f"to {100 * self.settings.macs:g} % of its multiply-adds" if self.sparse else "dense, for comparison"
        return f"{self.task.title()}, {aim}"

    def data_text(self) -> str:
        return self.task.text()

    def initial_lr(self) -> float:
        return self.settings.largest_lr

    def begin_epoch(self) -> None:
        self.net.train()

    def batches(self) -> Iterator[Any]:
        return self.task.batches(self.epoch, self.step)

    def train_step(self, batch: Any) -> None:
        s = self.settings
        rate = s.rate((self.epoch * len(self) + self.step + 0.5) / self.total_steps())
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(self.device.type, torch.bfloat16, enabled=s.amp):
            loss, correct, n = self.task.loss(self.net, batch)
        self.optimizer.zero_grad()
        loss.backward()
        if s.clip:
            nn.utils.clip_grad_norm_(self.params, s.clip)
        self.optimizer.step()
        if self.budget is not None:
            self.budget.step()
        self.sums += torch.stack([loss.detach().double() * n, correct, torch.full_like(self.sums[0], n)])

    def end_epoch(self) -> dict[str, Any]:
        loss, correct, n = self.sums.tolist()
        self.sums.zero_()
        self.check_finite("train", loss / n)
        row = {"lr": self.optimizer.param_groups[0]["lr"], **self.task.training_columns(loss / n, correct / n)}
        row |= self.task.evaluate(self.net.eval(), whole=False)
        self.check_finite("valid", row["valid_loss"])
        if self.budget is not None:
            record = self.budget.record
            row |= {"macs": record.share, "wanted": record.wanted, "strength": record.strength, "frozen": int(record.frozen)}
        return row

    def headline(self, row: dict[str, Any]) -> str:
        parts = [console.progress(row) or f"valid loss {row['valid_loss']:.4g}"]
        if "macs" in row:
            parts.append(f"{100 * row['macs']:.1f} % of the multiply-adds" + (", zeros frozen" if row["frozen"] else ""))
        return ", ".join(parts)

    def is_finite(self) -> bool:
        return bool(self.sums[0].isfinite()) and all_finite(self.params)

    def finish(self) -> None:
        checkpoint.save_network(self.out / "network.pt", self.net)
        if self.budget is not None:
            write_csv(self.out / "budget.csv", self.budget.log)

    def identity(self) -> dict[str, Any]:
        return {"sparse": self.sparse, **super().identity(), **self.task.identity()}

    def state(self) -> dict[str, Any]:
        own = {"net": self.net.state_dict(), "optimizer": self.optimizer.state_dict(), "sums": self.sums}
        return own if self.budget is None else {**own, "budget": self.budget.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.budget is not None:
            self.budget.load_state_dict(state["budget"])
        self.sums.copy_(state["sums"])
