"""Effect of the penalty of GSparsity without a loss: python benchmarks/gsparsity_loss_free.py

The norms of the operations of the CIFAR-10 supernet (16 channels, 8 cells) under ProxSGD with all gradients zero: sum_k ||w_k|| /
sqrt(size_k) after each epoch of 782 steps, which agrees with the published logs to four digits for five epochs, and the epoch in
which each kind of operation becomes zero. With the published weighting mu / sqrt(size) the order depends on size and initial norm
only; with `initial_norm` all norms decrease at the same relative rate. Writes loss_free.csv and loss_free.png to --out.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from nas.engine.log import write_csv
from nas.methods.group_sparsity import loss_free
from nas.methods.gsparsity import OperationGroups
from nas.methods.settings.gsparsity import GSparsitySettings
from nas.nets.torch import cnn
from nas.space import drawing, spaces
from nas.space.drawing import COLORS, plt

STEPS = 782  # in an epoch: 50 000 images in batches of 64


def curves(settings: GSparsitySettings, epochs: int) -> tuple[OperationGroups, np.ndarray]:
    """Return the groups, and their norms initially and after each epoch, (epochs + 1, groups)."""
    torch.manual_seed(0)
    operations = OperationGroups(cnn.Supernet(spaces.get_space(settings.space)), settings)
    norms = [np.array(list(operations.initial.values()))]
    strength = np.array([operations.strength(key) for key in operations.flats])
    for _ in range(epochs):
        norms.append(loss_free(norms[-1], strength, settings.lr, settings.tau, STEPS))
    return operations, np.array(norms)


def picture(found: dict[str, tuple[OperationGroups, np.ndarray]]) -> plt.Figure:
    figure, axes = plt.subplots(1, len(found), figsize=(5.2 * len(found), 3.8), constrained_layout=True)
    for axis, (weighting, (operations, norms)) in zip(axes, found.items()):
        for name in spaces.DARTS:
            k = next(i for i, (cell, path) in enumerate(operations.flats) if cell == "normal" and path.operation == name)
            axis.plot(100 * norms[:, k] / norms[0, k], color=COLORS[name], label=name)
        axis.set(
            title=f"{weighting}, mu = {operations.settings.mu:g}", xlabel="epoch", ylabel="norm, normal cells (% of the first)"
        )
        axis.grid(alpha=0.25)
    axes[0].legend(frameon=False, fontsize=8)
    return figure


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=80)
    parser.add_argument("--mu-initial-norm", type=float, default=0.02, help="mu of the weighting initial_norm")
    parser.add_argument("--out", type=Path, default=Path("runs/loss_free"))
    args = parser.parse_args(argv)
    found = {
        "inverse_sqrt_size": curves(GSparsitySettings(), args.epochs),
        "initial_norm": curves(GSparsitySettings(weighting="initial_norm", mu=args.mu_initial_norm), args.epochs),
    }
    rows = []
    for weighting, (operations, norms) in found.items():
        sizes = np.array([flat.vector.numel() for flat in operations.flats.values()])
        for epoch, norm in enumerate(norms):
            rows.append({"weighting": weighting, "epoch": epoch, "regulariser": (norm / np.sqrt(sizes)).sum()})
        own = [row["regulariser"] for row in rows if row["weighting"] == weighting]
        print(f"{weighting}: regulariser " + ", ".join(f"{own[e]:.2f} ({e})" for e in (0, 1, 2, 3, 5, 10, 20) if e < len(own)))
        for name in spaces.DARTS:
            ends = []
            for cell in ("normal", "reduce"):
                k = [i for i, (c, path) in enumerate(operations.flats) if c == cell and path.operation == name][-1]
                gone = np.nonzero(norms[:, k] < 0.01 * norms[0, k])[0]
                ends.append(str(gone[0]) if len(gone) else f"> {args.epochs}")
            print(f"    {name:14} below 1 % from epoch {ends[0]:>4} in the normal cells, {ends[1]:>4} in the reduction cells")
    args.out.mkdir(parents=True, exist_ok=True)
    write_csv(args.out / "loss_free.csv", rows)
    drawing.save(picture(found), args.out / "loss_free.png")
    print(f"written: {args.out}/loss_free.csv, {args.out}/loss_free.png")


if __name__ == "__main__":
    main()
