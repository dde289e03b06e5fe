"""Plot accuracy, loss, perplexity and sparsity over the epochs of searches and trainings, with matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator, ScalarFormatter

from ..space.drawing import plt
from ..space.genotype import cell_name


def curves(runs: Mapping[str, Sequence[Mapping[str, Any]]], evaluated: str = "validation") -> plt.Figure:
    """Plot accuracy or perplexity, paths and active nodes over the epochs.

    runs: the rows of each search, by its name. evaluated: the data on which searches are evaluated, for the legend.
    """
    last = next(iter(runs.values()))[-1]
    what = "accuracy" if "valid_accuracy" in last else "perplexity"
    cells = [key.removeprefix("paths_") for key in last if key.startswith("paths_")]
    figure, axes = plt.subplots(1, 3, figsize=(11.6, 4), constrained_layout=True)
    for number, (name, rows) in enumerate(runs.items()):
        if len(runs) == 1:
            _quality(axes[0], rows, what, evaluated)
        else:
            _line(axes[0], rows, f"valid_{what}", name, f"C{number}", "-")
        for axis, quantity in zip(axes[1:], ("paths", "nodes")):
            for place, cell in enumerate(cells):
                label = cell_name(cell) if len(runs) == 1 else f"{name}, {cell}" if len(cells) > 1 else name
                color = f"C{place}" if len(runs) == 1 else f"C{number}"
                _line(axis, rows, f"{quantity}_{cell}", label, color, ("-", "--")[place])
    _finish(axes[0], f"{what} (%)" if what == "accuracy" else f"{what} (per word)")
    if what == "perplexity":
        _logarithmic(axes[0])
    for axis, title in zip(axes[1:], ("paths of the genotype (number)", "nodes with paths (number)")):
        _finish(axis, title)
        axis.set_ylim(0, axis.dataLim.y1 * 1.06 + 0.1)
        axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _quality(axis: Any, rows: Sequence[Mapping[str, Any]], what: str, evaluated: str) -> None:
    """Draw training and evaluation of one search; the genotype alone too, unless it is always the whole network."""
    alone = [row.get(f"restricted_{what}") for row in rows]
    differs = any(a is not None and a != row[f"valid_{what}"] for a, row in zip(alone, rows))
    _line(axis, rows, f"train_{what}", "training", "C2", ":")
    _line(axis, rows, f"valid_{what}", evaluated + (", supernet" if differs else ""), "C0", "-")
    if differs:
        _line(axis, rows, f"restricted_{what}", f"{evaluated}, paths of the genotype only", "C1", "--")


def _line(axis: Any, rows: Sequence[Mapping[str, Any]], key: str, label: str, color: str, style: str) -> None:
    """Draw a column over the epochs, accuracies in percent. Epochs without a finite value are left out."""
    factor = 100 if "accuracy" in key else 1
    points = [(row["epoch"], factor * row[key]) for row in rows if math.isfinite(row.get(key, math.nan))]
    epochs, values = zip(*points) if points else ((), ())
    axis.plot(epochs, values, style, color=color, label=label, marker="o", markersize=3 if len(rows) > 5 else 5)


def _finish(axis: Any, title: str) -> None:
    """Give an axis over the epochs its title, whole numbers as ticks, and a legend below, where it hides no data."""
    axis.set(title=title, xlabel="epoch")
    low, high = axis.dataLim.intervalx
    if not math.isfinite(low):
        low = high = 1.0
    margin = max(0.03 * (high - low), 0.25)
    axis.set_xlim(low - margin, high + margin)
    axis.xaxis.set_major_locator(MaxNLocator(nbins="auto", integer=True, min_n_ticks=1))
    axis.grid(alpha=0.25)
    if handles := axis.get_legend_handles_labels()[0]:
        axis.legend(handles=handles, frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.16), handlelength=3)


def _logarithmic(axis: Any) -> None:
    """Make the y axis logarithmic, with a few tick labels such as 200 instead of powers of ten."""
    low, high = axis.dataLim.intervaly
    if not (math.isfinite(low) and low > 0):
        return
    axis.set_yscale("log")
    wide = high > 8 * low
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if wide else MaxNLocator(6))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter("{x:g}" if wide else ScalarFormatter())
    axis.yaxis.set_minor_formatter(NullFormatter())


def training(rows: Sequence[Mapping[str, Any]], evaluated: str = "validation") -> plt.Figure:
    """Plot loss and accuracy of a training over the epochs. evaluated: the data of the evaluation, for the legend."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for axis, what, title in zip(axes, ("loss", "accuracy"), ("loss (cross-entropy)", "accuracy (%)")):
        _line(axis, rows, f"train_{what}", "training", "C2", ":")
        _line(axis, rows, f"valid_{what}", evaluated, "C0", "-")
        _finish(axis, title)
    return figure


def distances(rows: Sequence[Mapping[str, Any]]) -> plt.Figure:
    """Plot the mean and the largest distance of the codes of all nodes between two recoveries over the epochs of ISTA-NAS."""
    figure, axis = plt.subplots(figsize=(7, 4.4), constrained_layout=True)
    for key, label, color, style in (("distance", "mean over the nodes", "C0", "-"), ("moved", "largest", "C2", ":")):
        _line(axis, [row for row in rows if row.get(key, 0) > 0], key, label, color, style)  # 0 once all nodes are frozen
    _finish(axis, "distance of the codes of two recoveries")
    if math.isfinite(axis.dataLim.y0):
        axis.set_yscale("log")
    return figure


def perplexities(rows: Sequence[Mapping[str, Any]]) -> plt.Figure:
    """Plot perplexity over the epochs, with the first epoch of averaged weights and the epochs of rollbacks marked."""
    figure, axis = plt.subplots(figsize=(7, 4.4), constrained_layout=True)
    _line(axis, rows, "train_perplexity", "training", "C2", ":")
    _line(axis, rows, "valid_perplexity", "validation", "C0", "-")
    averaged = next((row["epoch"] for row in rows if row["averaged"]), None)
    if averaged is not None:
        axis.axvline(averaged - 0.5, color="#969696", linestyle="--", linewidth=1, label="weights are averaged from here on")
    label: str | None = "return to the best epoch after a divergence"
    for before, row in zip([{"rollbacks": 0}, *rows], rows):
        if row["rollbacks"] > before["rollbacks"]:
            axis.axvline(row["epoch"], color="#d94801", linewidth=1, label=label)
            label = None
    _finish(axis, "perplexity (per word)")
    _logarithmic(axis)
    return figure
