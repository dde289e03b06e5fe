"""Prune whole operations of a network: python examples/prune_operations.py --genotype DARTS_V2 --data-dir data --out runs/prune

For each --mu the network is trained by ProxSGD, which makes operations exactly zero; all operations with a norm of at most a
threshold are removed, and accuracy is measured before and after without retraining (GSparsity, Table 1); the remaining network is
trained from new weights (Fig. 1). --start begins with the weights in a folder of `train_cifar10.py`, or in a network.pt. To prune
half of the weights, `--want-share 0.5` finds the mu by bisection from the first --mu.

Presets: paper (the default, 600 epochs) and small (for a laptop). Before the first step of each training it is printed what it
will compute, and after a few steps the time and memory that it needs. Results in --out: table.csv, pruning.png, for each mu the
pruned network (network.pt, cells.json), which `nas.load` reads, and checkpoints: `--resume --out FOLDER` continues an interrupted
run, `--config FILE` starts a new one with the settings in a settings.json. Where TensorBoard is installed (`pip install
tensorboard`), `tensorboard --logdir OUT` shows the columns of the prune.csv and train.csv of each training.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from nas.engine import checkpoint, report
from nas.engine.bisection import closest_strength, refuse_existing_runs
from nas.engine.command_line import SEEDS, CommandLine, errors_in_one_line, first_process, run_each_seed
from nas.engine.lock import locked
from nas.engine.log import write_csv
from nas.engine.resume import expand, write_settings
from nas.engine.run import launch
from nas.engine.settings import check
from nas.methods import operation_pruning as pruning
from nas.nets.torch import cnn
from nas.space import drawing, genotype
from nas.space.drawing import plt
from nas.space.files import write_text
from nas.space.genotype import Genotype
from nas.train.settings import CifarTrainSettings, GenotypeTrainSettings
from nas.train.train_cifar import GenotypeTraining, Prepared, image_network


@dataclass(frozen=True)
class PruneOperationsSettings(pruning.PruningSettings):
    out: Path = Path("runs/prune")
    mu: tuple[float, ...] = (1e-4, 2e-4, 5e-4, 2e-3, 4e-3)
    """Strengths of the penalty (mu); there is one training for each."""
    want_share: float = 0.0
    """Share of the weights to prune, in [0, 1): the mu for it is found by bisection; 0: train with each --mu."""
    bisect_runs: int = 6
    """Maximal number of trainings of a bisection."""
    thresholds: tuple[float, ...] = (0.0, 1e-6, 1e-3, 0.5)
    """Norms up to which operations are removed after the training; the table has a row for each. 0: exact zeros only."""
    retrain_epochs: int = 600
    """Number of epochs for which the remaining network is trained from new weights by the recipe of train_cifar10.py; 0: it is
    not."""
    retrain_lr: float = 0.035
    """Initial learning rate of that training, 0.035 in the published code, where the recipe itself has 0.025."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.mu or min(self.mu) < 0:
            raise ValueError(f"mu must hold numbers >= 0, got {self.mu}")
        check(self, amounts=("retrain_lr",), shares=("want_share",))
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
    """Train with this mu, remove operations for each threshold, and retrain; return a row of the table for each threshold."""
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
        zeroed = run.zeroed_operations(threshold)
        small = pruning.cut(whole, zeroed)
        after, left = accuracy(small, run)
        row = {
            "mu": mu,
            "threshold": threshold,
            "dead_operations": len(zeroed),
            "pruned_share": pruning.pruned_share(whole, zeroed),
        }
        row |= {"before": before, "after": after, "largest_change": float((left - logits).abs().max())}
        rows.append(row)
        if threshold == settings.thresholds[0]:
            save_pruned(small, out)
            row |= retrain(settings, pruning.cascade(small), run.prepared, seed, out)
    return rows


@torch.no_grad()
def accuracy(net: cnn.Discrete, run: pruning.Pruning) -> tuple[float, torch.Tensor]:
    """Compute the accuracy on the validation images, and all logits."""
    net.eval()
    logits, labels = zip(*((net(images)[0], y) for images, y in run.validation()))
    joined, y = torch.cat(logits), torch.cat(labels)
    return float((joined.argmax(1) == y).float().mean()), joined


def save_pruned(net: cnn.Discrete, out: Path) -> None:
    """Write the pruned network and the paths of each of its cells."""
    checkpoint.save_network(out / "network.pt", net)
    cells = [[list(path) for path in cell.paths] for cell in net.cells]
    write_text(out / "cells.json", json.dumps(cells, indent=1) + "\n")


def retrain(settings: PruneOperationsSettings, cells: list[Genotype], data: Prepared, seed: int, out: Path) -> dict[str, Any]:
    """Count the parameters of the remaining network, and train it from new weights. data: of the pruning."""
    net = image_network(cells, replace(settings, auxiliary=0.0), data.classes, data.channels)
    row: dict[str, Any] = {"parameters": sum(p.numel() for p in net.parameters())}
    if settings.retrain_epochs:
        recipe = CifarTrainSettings()
        shared = {f.name: getattr(settings, f.name) for f in fields(GenotypeTrainSettings)}
        kept = {name: getattr(recipe, name) for name in ("lr_min", "momentum", "weight_decay")}
        own = {"lr": settings.retrain_lr, "epochs": settings.retrain_epochs, "resume": True, "start": None}
        again = replace(recipe, **{**shared, **kept, **own})
        folder = out / "retrained"
        make = lambda processes, device: GenotypeTraining(cells, again, seed, folder, processes, device)
        row["retrained"] = launch(make, again, folder)["valid_accuracy"]
    return row


def picture(rows: list[dict[str, Any]], evaluated: str) -> plt.Figure:
    """Plot accuracy over the share of pruned weights, a point for each mu. evaluated: the images, for the label."""
    figure, axis = plt.subplots(figsize=(6.4, 4.8), constrained_layout=True)
    first = sorted((row for row in rows if "parameters" in row), key=lambda row: row["mu"])
    curves = (
        ("before", "before the operations are removed", "o-"),
        ("after", "after they are removed", "x--"),
        ("retrained", "the rest, trained from new weights", "s:"),
    )
    for key, label, style in curves:
        points = [(100 * row["pruned_share"], 100 * row[key]) for row in first if key in row]
        if points:
            axis.plot(*zip(*points), style, label=label)
    for row in first:
        place = 100 * row["pruned_share"], 100 * row["after"]
        text = f"mu {row['mu']:.3g}"
        axis.annotate(text, place, (9, 0), textcoords="offset points", va="center", fontsize=8, color="#555555")
    axis.set(xlabel="pruned weights (%)", ylabel=f"accuracy on the {evaluated} (%)")
    axis.margins(0.14, 0.08)
    axis.set_xlim(-3, max(axis.get_xlim()[1], 10))  # also where nothing was pruned
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    return figure


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Prune; return the rows of the table."""
    settings = CommandLine(expand(argv, "prune_operations", "runs/prune")).settings(PRESETS, __doc__)
    with errors_in_one_line():
        found = genotype.load_genotype(settings.genotype)

    def one(seed: int, out: Path) -> dict[str, Any]:
        with locked(out):
            return {"rows": every_mu(settings, found, seed, out)}

    rows = [{"seed": seed["seed"], **row} for seed in run_each_seed(settings, one) for row in seed["rows"]]
    if len(settings.seeds) > 1 and first_process():
        write_csv(settings.out / SEEDS, rows)
    return rows


def every_mu(settings: PruneOperationsSettings, found: Genotype, seed: int, out: Path) -> list[dict[str, Any]]:
    """Prune with every mu and one seed; return the rows of the table, which is also written and printed."""
    refuse_existing_runs(out, settings.resume)
    write_settings(out, settings, command="prune_operations", seed=seed)
    found.save(out / "genotype.json")
    tables: dict[float, list[dict[str, Any]]] = {}

    def left(mu: float) -> int:
        """Remaining weights in thousandths; without retraining, which follows for the final mu only."""
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
    drawing.save(picture(rows, report.evaluation_images(settings.plain())), out / "pruning.png")
    print(f"\n{'mu':>10}{'threshold':>11}{'pruned':>9}{'before':>9}{'after':>9}{'change':>10}{'retrained':>11}")
    for row in rows:
        again = f"{100 * row['retrained']:>10.2f}%" if "retrained" in row else ""
        shares = f"{100 * row['pruned_share']:>8.1f}%{100 * row['before']:>8.2f}%{100 * row['after']:>8.2f}%"
        print(f"{row['mu']:>10.3g}{row['threshold']:>11.3g}{shares}{row['largest_change']:>10.2g}{again}")
    print(f"written: {out}/table.csv, {out}/pruning.png")
    return rows


if __name__ == "__main__":
    main()
