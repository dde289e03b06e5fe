"""
Cells found on NAS-Bench-201
============================

NAS-Bench-201 has the accuracy of all 15 625 cells of a small space, so that the result of a search has a rank. This page shows
all searches of ``benchmarks/results/nas_bench_201_runs.csv``, each of one to five CPU minutes, and the cells that two methods
found most often.
"""

import csv
import sys
from collections import Counter
from pathlib import Path

import matplotlib.pyplot as plt

root = next(p for p in [Path.cwd(), *Path.cwd().parents] if (p / "benchmarks").is_dir())
sys.path.insert(0, str(root / "examples"))

from nas.space import drawing
from nas.space.genotype import CellGenotype

with (root / "benchmarks" / "results" / "nas_bench_201_runs.csv").open(encoding="utf-8") as file:
    runs = list(csv.DictReader(file))
titles = list(dict.fromkeys(run["title"] for run in runs))

figure, axis = plt.subplots(figsize=(9, 0.42 * len(titles) + 1.2), constrained_layout=True)
for place, title in enumerate(titles):
    ranks = [float(run["rank"]) for run in runs if run["title"] == title]
    axis.plot(ranks, [place] * len(ranks), "o", color="#2b5d8a", alpha=0.55)
axis.axvline(7813, color="0.4", linestyle="--", linewidth=1)
axis.text(7813, -0.6, "a random cell ", ha="right", va="center", color="0.4", fontsize=9)
axis.set(xscale="log", xlim=(1, 15_625), xlabel="rank of 15 625 (left is better)", ylim=(len(titles) - 0.5, -0.9))
axis.set_yticks(range(len(titles)), titles)
axis.grid(axis="x", alpha=0.25)
plt.show()

# %%
# The cell that the sound rule of SparseNAS finds most often has a pool on the edge from input to output, where the table prefers
# a skip connection. GSparsity keeps a 3x3 convolution on every edge.

for title in ("SparseNAS, HAPG, sound rule", "GSparsity"):
    own = [run for run in runs if run["title"] == title]
    (architecture, times), *_ = Counter(run["architecture"] for run in own).most_common(1)
    rank = next(run["rank"] for run in own if run["architecture"] == architecture)
    drawing.cells(CellGenotype.from_string(architecture), f"{title}: {times} of {len(own)} runs, rank {rank}")
    plt.show()
