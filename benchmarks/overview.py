"""Draw the picture of the README: a network before training, with exact zeros, and after the cut.

    python benchmarks/overview.py

A network with 64 hidden units learns scikit-learn's digits under a group lasso; a budget asks for a quarter of its parameters.
The picture shows the weights of its first layer, a row for each hidden unit. Writes overview.png to --out and prints the figures
in it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from nas.space import drawing

from proxopt import GroupL2
from proxopt_torch import Budget, ProxAdam, compact, groups

BATCH, UNITS, TEST = 64, 64, 397


def trained(seed: int, steps: int) -> tuple[list[np.ndarray], list[str]]:
    """The weights of the three panels, and the lines below them."""
    torch.manual_seed(seed)
    digits = load_digits()
    order = torch.randperm(len(digits.target))
    x = torch.as_tensor(digits.data / 16, dtype=torch.float32)[order]
    y = torch.as_tensor(digits.target)[order]
    net = nn.Sequential(nn.Linear(64, UNITS), nn.ReLU(), nn.Linear(UNITS, 10))
    accuracy = lambda model: 100 * (model(x[-TEST:]).argmax(1) == y[-TEST:]).double().mean().item()
    size = lambda model: sum(p.numel() for p in model.parameters())
    first = lambda model: model[0].weight.detach().numpy().copy()
    optimizer = ProxAdam(groups.coupled(net, x[:2], GroupL2(1e-3)), lr=3e-3)
    budget = Budget(optimizer, net, x[:2], parameters=0.25, steps=steps // 2, start=0.2, every=5)
    panels, lines = [first(net)], [f"{UNITS} hidden units, {size(net):,} parameters"]
    for _ in range(steps):
        rows = torch.randint(0, len(x) - TEST, (BATCH,))
        optimizer.zero_grad()
        F.cross_entropy(net(x[rows]), y[rows]).backward()
        optimizer.step()
        budget.step()
    small = compact(net, x[:2]).model
    zeros = int((net[0].weight == 0).all(1).sum())
    panels += [first(net), first(small)]
    lines.append(f"{zeros} rows exactly zero, test accuracy {accuracy(net):.1f} %")
    lines.append(f"{UNITS - zeros} hidden units, {size(small):,} parameters, {accuracy(small):.1f} %")
    return panels, lines


def picture(panels: list[np.ndarray], lines: list[str]) -> drawing.plt.Figure:
    """Three heat maps, with arrows between them."""
    plt = drawing.plt
    figure, axes = plt.subplots(1, 3, figsize=(10.5, 4.2))
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.08, top=0.92, wspace=0.06)
    limit = max(np.abs(panel).max() for panel in panels[1:]) / 2
    titles = ("before training", "trained with a proximal optimizer", "compact(net, x): the same outputs")
    for axis, panel, title, line in zip(axes, panels, titles, lines):
        shown = np.where(np.abs(panel).sum(1, keepdims=True) == 0, np.nan, panel)
        axis.imshow(
            shown,
            cmap=plt.get_cmap("RdBu_r").with_extremes(bad="#262626"),
            vmin=-limit,
            vmax=limit,
            interpolation="nearest",
            aspect="equal",
        )
        axis.set_ylim(len(panels[0]) - 0.5, -0.5)
        axis.set_title(title, fontsize=11)
        axis.set_xlabel(line, fontsize=9.5)
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    return figure


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the picture")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2000, help="of the training")
    args = parser.parse_args(argv)
    panels, lines = trained(args.seed, args.steps)
    args.out.mkdir(parents=True, exist_ok=True)
    drawing.save(picture(panels, lines), args.out / "overview.png")
    print("\n".join([*lines, f"written: {args.out / 'overview.png'}"]))


if __name__ == "__main__":
    main()
