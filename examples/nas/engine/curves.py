"""Plot accuracy, loss, perplexity and sparsity over the epochs of searches and trainings, with matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..space.drawing import plt


def curves(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> plt.Figure:
    """Plot accuracy or perplexity, paths and active nodes over the epochs. runs: the rows of each search, by its name."""
    last = next(iter(runs.values()))[-1]
    what = "accuracy" if "valid_accuracy" in last else "perplexity"
    cells = [key.removeprefix("paths_") for key in last if key.startswith("paths_")]
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), constrained_layout=True)
    one = len(runs) == 1
    for number, (name, rows) in enumerate(runs.items()):
        epochs = [row["epoch"] + 1 for row in rows]
        color = f"C{number}"
        series: list[tuple[int, str, str, str, str]] = [(0, f"valid_{what}", "supernet", "-", color)]
        if one:
            series += [(0, f"restricted_{what}", "nonzero paths only", "--", "C1"), (0, f"train_{what}", "training", ":", "C2")]
        for axis, quantity in ((1, "paths"), (2, "nodes")):
            series += [(axis, f"{quantity}_{c}", f"{c} cell", s, color) for c, s in zip(cells, ("-", "--"))]
        for axis, key, meaning, style, shade in series:
            factor = 100 if "accuracy" in key else 1
            label = meaning if one else name if key in (f"valid_{what}", f"paths_{cells[0]}", f"nodes_{cells[0]}") else None
            axes[axis].plot(
                epochs, [factor * row[key] for row in rows], style, color=shade, label=label, marker=".", markersize=3
            )
    for axis, title in zip(axes, ("accuracy (%)" if what == "accuracy" else what, "nonzero paths", "nonzero nodes")):
        axis.set(title=title, xlabel="epoch")
        axis.grid(alpha=0.25)
        axis.legend(frameon=False, fontsize=8)
    if what == "perplexity":
        _logarithmic(axes[0])
    axes[1].set_ylim(bottom=0)
    axes[2].set_ylim(bottom=0)
    return figure


def _logarithmic(axis: Any) -> None:
    """Make the y axis logarithmic, with tick labels such as 200 instead of powers of ten."""
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}")


def training(rows: Sequence[Mapping[str, Any]]) -> plt.Figure:
    """Plot loss and accuracy of a training over the epochs."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), constrained_layout=True)
    epochs = [row["epoch"] + 1 for row in rows]
    for axis, what, factor in zip(axes, ("loss", "accuracy"), (1, 100)):
        for part, style in (("train", ":"), ("valid", "-")):
            axis.plot(epochs, [factor * row[f"{part}_{what}"] for row in rows], style, label=part, marker=".", markersize=3)
        axis.set(title=what + (" (%)" if factor == 100 else ""), xlabel="epoch")
        axis.grid(alpha=0.25)
        axis.legend(frameon=False)
    return figure


def distances(rows: Sequence[Mapping[str, Any]]) -> plt.Figure:
    """Plot the mean and the largest distance of the codes of all nodes between two recoveries over the epochs of ISTA-NAS."""
    figure, axis = plt.subplots(figsize=(6.4, 3.8), constrained_layout=True)
    for key, label, style in (("distance", "mean over the nodes", "-"), ("moved", "largest", ":")):
        found = [(row["epoch"] + 1, row[key]) for row in rows if row.get(key, 0) > 0]  # zero once all nodes are frozen
        if found:
            axis.plot(*zip(*found), style, label=label, marker=".", markersize=3)
    axis.set(xlabel="epoch", title="distance of the codes of two recoveries")
    axis.set_yscale("log")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.25)
    if axis.lines:
        axis.legend(frameon=False)
    return figure


def perplexities(rows: Sequence[Mapping[str, Any]]) -> plt.Figure:
    """Plot perplexity over the epochs, with the first epoch of averaged weights and the epochs of rollbacks marked."""
    figure, axis = plt.subplots(figsize=(7, 4), constrained_layout=True)
    epochs = [row["epoch"] + 1 for row in rows]
    for part, style in (("train", ":"), ("valid", "-")):
        axis.plot(epochs, [row[f"{part}_perplexity"] for row in rows], style, label=part, marker=".", markersize=3)
    averaged = next((row["epoch"] + 1 for row in rows if row["averaged"]), None)
    if averaged is not None:
        axis.axvline(averaged - 0.5, color="#969696", linestyle="--", linewidth=1, label="averaged from here")
    for before, row in zip([{"rollbacks": 0}, *rows], rows):
        if row["rollbacks"] > before["rollbacks"]:
            axis.axvline(row["epoch"] + 1, color="#d94801", linewidth=1)
    axis.set(xlabel="epoch", title="perplexity")
    axis.xaxis.get_major_locator().set_params(integer=True)
    _logarithmic(axis)
    axis.grid(alpha=0.25, which="both")
    axis.legend(frameon=False)
    return figure
