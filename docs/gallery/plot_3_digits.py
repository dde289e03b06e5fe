"""
The digits, with fewer and fewer pixels
=======================================

A 64-40-20-10 network classifies 8x8 images. The penalty makes the outgoing weights of pixels and neurons zero together; a larger
strength leaves fewer of them. The upper row are five seeds for each of eight strengths, from the file that
``benchmarks/digits_ablation.py`` wrote; the lower row is trained here, at three strengths.
"""

import csv
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from proxopt import Groups, SparseGroupLasso
from proxopt_torch import ProxAdam

results = next(p / "benchmarks" / "results" for p in [Path.cwd(), *Path.cwd().parents] if (p / "benchmarks").is_dir())
with (results / "digits_ablation.csv").open(encoding="utf-8") as file:
    rows = list(csv.DictReader(file))
curves = {
    "SGD (subgradient)": ("sgd", "sgl", ""),
    "ProxAdam": ("proxadam", "sgl", "exact"),
    "HAPG": ("hapg", "sgl", ""),
    "AdamHAPG": ("adamhapg", "sgl", "median"),
}
figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), constrained_layout=True)
for name, key in curves.items():
    own = [row for row in rows if (row["method"], row["penalty"], row["metric"]) == key]
    strengths = sorted({float(row["strength"]) for row in own})
    for axis, column, factor in zip(axes, ("accuracy", "sparsity", "features"), (100, 100, 1)):
        at = [[factor * float(r[column]) for r in own if float(r["strength"]) == s] for s in strengths]
        axis.errorbar(strengths, np.mean(at, 1), np.std(at, 1), label=name, capsize=2, marker="o", markersize=3)
for axis, title in zip(axes, ("accuracy % after retraining", "zero weights %", "pixels used, of 64")):
    axis.set(xscale="log", xlabel="strength", title=title)
    axis.grid(alpha=0.25)
axes[2].legend(frameon=False, loc="lower left")
plt.show()

# %%
# Which pixels are left
# ---------------------
#
# Crosses mark pixels that the network does not read: all their outgoing weights are exactly zero.

torch.manual_seed(0)
x, y = (torch.tensor(a) for a in load_digits(return_X_y=True))
x = (x / 16).float()
order = torch.randperm(len(x))
train, valid = order[:1350], order[1350:]

figure, axes = plt.subplots(1, 3, figsize=(10, 3.8), constrained_layout=True)
for axis, strength in zip(axes, (2e-4, 8e-4, 1.6e-3)):
    net = nn.Sequential(nn.Linear(64, 40), nn.LeakyReLU(), nn.Linear(40, 20), nn.LeakyReLU(), nn.Linear(20, 10))
    layers = [net[0], net[2], net[4]]
    penalty = SparseGroupLasso(strength, groups=Groups.along(0))
    optimizer = ProxAdam(
        [{"params": [m.weight for m in layers], "penalty": penalty}, {"params": [m.bias for m in layers]}], lr=3e-3
    )
    for _ in range(120):
        for batch in train[torch.randperm(len(train))].split(256):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
            optimizer.step()
    pixels = net[0].weight.detach().norm(dim=0)
    accuracy = (net(x[valid]).argmax(1) == y[valid]).float().mean()
    axis.imshow(pixels.reshape(8, 8), cmap="Greys", vmin=0)
    for unused in (pixels == 0).nonzero().flatten().tolist():
        axis.text(unused % 8, unused // 8, "x", ha="center", va="center", color="#d94801")
    used = int((pixels > 0).sum())
    axis.set(title=f"strength {strength:g}: {used} pixels\naccuracy {100 * accuracy:.1f} %", xticks=[], yticks=[])
plt.show()
