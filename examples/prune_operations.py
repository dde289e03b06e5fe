"""Prune whole operations of a network: python examples/prune_operations.py --genotype DARTS_V2 --data-dir data --out runs/prune

For each --mu a training by ProxSGD, in which operations become exactly zero; the accuracy before and after all are removed
whose norm is at most a threshold, without retraining (GSparsity, Table 1); and the training of what is left from new weights
(Fig. 1). --start takes a network.pt of `train_cifar10.py` instead of new weights. --want-share 0.5 looks for the mu that prunes
half of the weights, by bisection from the first --mu.

Presets: paper (the default, 600 epochs) and small (for a laptop). Into --out: table.csv, pruning.png, for each mu the pruned
network (network.pt, cells.json), and checkpoints: the same command with --resume goes on after any stop.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from nas.engine import checkpoint
from nas.engine.bisection import closest_strength, refuse_existing_runs
from nas.engine.command_line import CommandLine, errors_in_one_line, run_each_seed
from nas.engine.log import write_csv
from nas.engine.run import launch
from nas.engine.settings import check
from nas.methods import operation_pruning as pruning
from nas.nets.torch import cnn
from nas.space import drawing, genotype
from nas.space.drawing import plt
from nas.space.genotype import Genotype
from nas.train.settings import CifarTrainSettings, GenotypeTrainSettings
from nas.train.train_cifar import GenotypeTraining


@dataclass(frozen=True)
class PruneOperationsSettings(pruning.PruningSettings):
    out: Path = Path("runs/prune")
    mu: tuple[float, ...] = (1e-4, 2e-4, 5e-4, 2e-3, 4e-3)
    """Strengths of the penalty, one training each."""
    want_share: float = 0.0
    """Look for the mu that prunes this share of the weights; 0: train with each mu."""
    bisect_runs: int = 6
    """Trainings that a bisection may take."""
    thresholds: tuple[float, ...] = (0.0, 1e-6, 1e-3, 0.5)
    """Operations whose norm is at most this are removed, each for one row of the table; 0 removes exact zeros only."""
    retrain_epochs: int = 600
    """Of the training of what is left, by the recipe of `train_cifar10.py`; 0: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.mu or min(self.mu) < 0:
            raise ValueError(f"mu must hold numbers >= 0, got {self.mu}")
        check(self, shares=("want_share",))
        if not self.thresholds or min(self.thresholds) < 0:
            raise ValueError(f"thresholds must hold numbers >= 0, got {self.thresholds}")
        if self.retrain_epochs < 0 or self.bisect_runs < 1:
            raise ValueError(
                f"retrain_epochs must be >= 0 and bisect_runs >= 1, got {self.retrain_epochs} and {self.bisect_runs}"
            )


PRESETS = {
    "paper": PruneOperationsSettings(),
    "small": PruneOperationsSettings(
        channels=8,
        layers=5,
        epochs=5,
        batch=32,
        images=4096,
        valid_images=2000,
        lr=0.02,
        lr_min=0.002,
        tau="direct",
        drop_path=0.0,
        cutout=0,
        mu=(0.5,),
        retrain_epochs=5,
    ),
}


def prune(settings: PruneOperationsSettings, found: Genotype, mu: float, seed: int, out: Path) -> list[dict[str, Any]]:
    """One training with this mu, its cuts, and the training of what is left; a row of the table for each threshold."""
    made: list[pruning.Pruning] = []
    common = {f.name: getattr(settings, f.name) for f in fields(pruning.PruningSettings)}
    own = pruning.PruningSettings(**{**common, "resume": True})

    def make(processes: Any, device: Any) -> pruning.Pruning:
        made.append(pruning.Pruning(found, own, mu, seed, out, processes, device))
        return made[0]

    launch(make, own, out)
    run, rows = made[0], []
    whole = run.net
    before, logits = accuracy(whole, run)
    for threshold in settings.thresholds:
        dead = run.dead(threshold)
        small = pruning.cut(whole, dead)
        after, left = accuracy(small, run)
        row = {"mu": mu, "threshold": threshold, "dead_operations": len(dead), "pruned_share": pruning.pruned_share(whole, dead)}
        row |= {"before": before, "after": after, "largest_change": float((left - logits).abs().max())}
        rows.append(row)
        if threshold == settings.thresholds[0]:
            leave(small, out)
            row |= retrain(settings, pruning.cascade(small), seed, out)
    return rows


@torch.no_grad()
def accuracy(net: cnn.Discrete, run: pruning.Pruning) -> tuple[float, torch.Tensor]:
    """On the validation images, and the logits of all."""
    net.eval()
    logits, labels = zip(*((net(images)[0], y) for images, y in run.validation()))
    joined, y = torch.cat(logits), torch.cat(labels)
    return float((joined.argmax(1) == y).float().mean()), joined


def leave(net: cnn.Discrete, out: Path) -> None:
    """The pruned network, and the paths of each of its cells."""
    checkpoint.save_network(out / "network.pt", net)
    cells = [[list(path) for path in cell.paths] for cell in net.cells]
    (out / "cells.json").write_text(json.dumps(cells, indent=1) + "\n", encoding="utf-8")


def retrain(settings: PruneOperationsSettings, cells: list[Genotype], seed: int, out: Path) -> dict[str, Any]:
    """Parameters of what is left and its accuracy when it is trained from new weights."""
    sizes = (cells, settings.channels, settings.layers)
    row: dict[str, Any] = {"parameters": cnn.network_size(cnn.Network(*sizes, auxiliary=False), (3, 32, 32))["parameters"]}
    if settings.retrain_epochs:
        recipe = CifarTrainSettings()
        shared = {f.name: getattr(settings, f.name) for f in fields(GenotypeTrainSettings)}
        kept = {name: getattr(recipe, name) for name in ("lr", "lr_min", "momentum", "weight_decay")}
        again = replace(recipe, **{**shared, **kept, "epochs": settings.retrain_epochs, "resume": True})
        folder = out / "retrained"
        make = lambda processes, device: GenotypeTraining(cells, again, seed, folder, processes, device)
        row["retrained"] = launch(make, again, folder)["valid_accuracy"]
    return row


def picture(rows: list[dict[str, Any]]) -> plt.Figure:
    """Accuracy over the share of pruned weights."""
    figure, axis = plt.subplots(figsize=(5.6, 4), constrained_layout=True)
    first = [row for row in rows if "parameters" in row]
    curves = (("before", "before the cut", "o-"), ("after", "after the cut", "x--"), ("retrained", "retrained", "s:"))
    for key, label, style in curves:
        points = sorted((100 * row["pruned_share"], 100 * row[key]) for row in first if key in row)
        if points:
            axis.plot(*zip(*points), style, label=label)
    axis.set(xlabel="pruned weights (%)", ylabel="accuracy (%)")
    axis.grid(alpha=0.25)
    axis.legend(frameon=False)
    return figure


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Prune; the rows of the table."""
    settings = CommandLine(argv).settings(PRESETS, __doc__)
    with errors_in_one_line():
        found = genotype.load_genotype(settings.genotype)
    seeds = run_each_seed(settings, lambda seed, out: {"rows": every_mu(settings, found, seed, out)})
    return [{"seed": one["seed"], **row} for one in seeds for row in one["rows"]]


def every_mu(settings: PruneOperationsSettings, found: Genotype, seed: int, out: Path) -> list[dict[str, Any]]:
    """The table of one seed."""
    refuse_existing_runs(out, settings.resume)
    tables: dict[float, list[dict[str, Any]]] = {}

    def left(mu: float) -> int:
        """Thousandths of the weights that are left; only the training that is chosen is worth a retraining."""
        tables[mu] = prune(replace(settings, retrain_epochs=0), found, mu, seed, out / f"mu-{mu:.6g}")
        return round(1000 * (1 - tables[mu][0]["pruned_share"]))

    if settings.want_share:
        want = round(1000 * (1 - settings.want_share))
        mus = (closest_strength(left, want, settings.mu[0], settings.bisect_runs),)
    else:
        mus = settings.mu
    for mu in mus:
        tables[mu] = prune(settings, found, mu, seed, out / f"mu-{mu:.6g}")
    rows = [row for mu in sorted(tables) for row in tables[mu]]
    write_csv(out / "table.csv", rows)
    drawing.save(picture(rows), out / "pruning.png")
    print(f"\n{'mu':>10}{'threshold':>11}{'pruned':>9}{'before':>9}{'after':>9}{'change':>10}{'retrained':>11}")
    for row in rows:
        again = f"{100 * row['retrained']:>10.2f}%" if "retrained" in row else ""
        shares = f"{100 * row['pruned_share']:>8.1f}%{100 * row['before']:>8.2f}%{100 * row['after']:>8.2f}%"
        print(f"{row['mu']:>10.3g}{row['threshold']:>11.3g}{shares}{row['largest_change']:>10.2g}{again}")
    print(f"written: {out}/table.csv, {out}/pruning.png")
    return rows


if __name__ == "__main__":
    main()
