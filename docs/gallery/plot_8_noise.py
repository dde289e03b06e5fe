"""
Extrapolation under minibatch noise
===================================

HAPG extrapolates. The published rule lets the coefficient tend to one, which accelerates where gradients are exact and
accumulates noise where they are not. The default caps it at 0.9. Here are both on least squares, run with the pure functions of
``proxopt.updates``; the lower picture is the measurement on the digits from ``benchmarks/results/extrapolation.csv``.
"""

import csv
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from proxopt import updates

rng = np.random.default_rng(0)
curvature = np.geomspace(1, 1e-2, 20)
rules = {"nesterov": "#d94801", 0.9: "#2b5d8a", 0.5: "#6baed6"}


def distances(noise, rule, steps=1500, lr=0.1):
    """The root mean square distance from the minimum, over the steps, of 40 runs at once."""
    x, state, found = np.ones((40, 20)), None, []
    for _ in range(steps):
        gradient = curvature * x + noise * rng.normal(size=x.shape)
        x, state = updates.hapg(x, gradient, state, None, lr=lr, extrapolation=rule)
        found.append(np.sqrt(np.mean(state.point**2)))
    return np.array(found)


figure, axes = plt.subplots(1, 2, figsize=(11, 3.6), constrained_layout=True)
for axis, noise, title in zip(axes, (0.0, 0.3), ("exact gradients", "noisy gradients")):
    for rule, colour in rules.items():
        axis.plot(distances(noise, rule), color=colour, label=rule if isinstance(rule, str) else f"cap {rule}")
    axis.set(yscale="log", xlabel="step", ylabel="rms distance from the minimum", title=title)
    axis.grid(alpha=0.25)
axes[0].legend(frameon=False)
plt.show()

# %%
# The digits
# ----------
#
# Accuracy of AdamHAPG after 150 epochs with a penalty, over the cap, for three batch sizes. Small batches have noisier gradients.

results = next(p / "benchmarks" / "results" for p in [Path.cwd(), *Path.cwd().parents] if (p / "benchmarks").is_dir())
with (results / "extrapolation.csv").open(encoding="utf-8") as file:
    rows = [row for row in csv.DictReader(file) if row["experiment"] == "digits" and row["optimizer"] == "AdamHAPG"]
rows = [row for row in rows if float(row["strength"]) > 0]
caps = [rule for rule in dict.fromkeys(row["rule"] for row in rows) if rule != "nesterov"]
caps = [*sorted(caps, key=float), "nesterov"]
figure, axes = plt.subplots(1, 2, figsize=(11, 3.6), constrained_layout=True)
for batch, colour in zip(("16", "64", "256"), ("#c6dbef", "#6baed6", "#08306b")):
    for axis, column in zip(axes, ("accuracy", "zeros")):
        at = [[100 * float(r[column]) for r in rows if (r["batch"], r["rule"]) == (batch, cap)] for cap in caps]
        means, deviations = [np.mean(v) for v in at], [np.std(v) for v in at]
        axis.errorbar(range(len(caps)), means, deviations, marker="o", capsize=2, color=colour, label=f"batch {batch}")
for axis, title in zip(axes, ("accuracy %", "zero weights %")):
    axis.set(title=title, xlabel="cap of the extrapolation")
    axis.set_xticks(range(len(caps)), caps)
    axis.grid(alpha=0.25)
axes[0].legend(frameon=False)
plt.show()
