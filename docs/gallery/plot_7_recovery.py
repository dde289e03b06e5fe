"""
Does the lasso find the support?
================================

ISTA-NAS keeps two paths into each node of a cell, and recovers them from a compressed variable by a lasso. How often does it find
the right two? The lines are the 500 draws for each point of ``benchmarks/results/recovery.csv``; every recovery there has a
relative duality gap below 1e-12, so that the failures are those of the method, not of the solver.
"""

import csv
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from proxopt import sparse_code

results = next(p / "benchmarks" / "results" for p in [Path.cwd(), *Path.cwd().parents] if (p / "benchmarks").is_dir())
with (results / "recovery.csv").open(encoding="utf-8") as file:
    rows = list(csv.DictReader(file))

figure, axes = plt.subplots(1, 2, figsize=(10.5, 3.6), sharey=True, constrained_layout=True)
colours = ["#c6dbef", "#6baed6", "#2171b5", "#08306b"]
for axis, matrix in zip(axes, ("uniform", "gaussian")):
    own = [row for row in rows if row["matrix"] == matrix]
    for colour, paths in zip(colours, sorted({int(row["paths"]) for row in own})):
        line = sorted((int(r["rows"]), 100 * float(r["recovered"])) for r in own if int(r["paths"]) == paths)
        axis.plot(*zip(*line), marker="o", color=colour, label=f"{paths} paths")
    axis.axvline(7, color="0.6", linestyle="--", linewidth=1)
    axis.set(title=f"{matrix} entries", xlabel="rows of the matrix (published: 7)")
    axis.grid(alpha=0.25)
axes[0].set_ylabel("% of supports recovered")
axes[0].legend(frameon=False)
plt.show()

# %%
# Two draws
# ---------
#
# A code with two nonzero entries (blue) is measured seven times. The lasso at a falling strength either finds both, while others
# (orange) enter and leave, or explains the measurements by other columns: a smaller norm at the same residual.

figure, axes = plt.subplots(1, 2, figsize=(10.5, 3.4), constrained_layout=True, sharey=True)
strengths = np.geomspace(1, 1e-3, 60)
for axis, seed in zip(axes, (7, 3)):
    rng = np.random.default_rng(seed)
    A = rng.normal(size=(7, 21))
    A /= np.linalg.norm(A, axis=0)
    truth = np.zeros(21)
    truth[[4, 13]] = 1.0, -0.7
    found = sparse_code(A, A @ truth, strengths, tol=1e-10)
    for entry in np.argsort(truth != 0):
        right = bool(truth[entry])
        axis.plot(strengths, found.x[:, entry], color="#2b5d8a" if right else "#d94801", linewidth=1.8 if right else 1)
    for value in (1.0, -0.7):
        axis.axhline(value, color="0.7", linestyle=":", linewidth=1)
    axis.set(xscale="log", xlabel="strength")
    axis.invert_xaxis()
axes[0].set(title="recovered", ylabel="entries of the code")
axes[1].set(title="not recovered")
plt.show()
