"""The picture of a pruning: what is left of each layer, and how the cost and the quality went over the epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.ticker import MaxNLocator
from nas.space.drawing import plt

from .task import Layer, Quality

DENSE, COMPACT, WANTED = "#bdbdbd", "#2171b5", "#d94801"
NUMBERED = 24  # layers whose numbers are written over the bars


def pruning(
    layers: Sequence[Layer],
    sparse: Sequence[Mapping[str, Any]],
    dense: Sequence[Mapping[str, Any]],
    measured: Sequence[Mapping[str, Any]],
    steps: int,
    quality: Quality,
) -> plt.Figure:
    """Plot the units of each layer before and after the cut, the quality, and the share of the multiply-adds.

    Args:
      sparse, dense: the rows of the epochs of the two trainings; there may be none of the dense one.
      measured: the log of the budget.
      steps: number of steps of an epoch.
      quality: the column to plot.
    """
    kinds = list(dict.fromkeys(layer.kind for layer in layers))
    figure = plt.figure(figsize=(12.4, 5.6), constrained_layout=True)
    left, right = figure.subfigures(1, 2, width_ratios=(1.25, 1))
    for axis, kind in zip(left.subplots(len(kinds), 1, squeeze=False)[:, 0], kinds):
        _bars(axis, [layer for layer in layers if layer.kind == kind], kind)
    upper, lower = right.subplots(2, 1, sharex=True)
    _quality(upper, sparse, dense, quality)
    _share(lower, measured, steps)
    lower.set_xlabel("epoch")
    lower.set_xlim(0, sparse[-1]["epoch"])
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _bars(axis: Any, layers: Sequence[Layer], kind: str) -> None:
    """Draw the number of units of each layer, in front of that of the dense network."""
    places = range(len(layers))
    axis.bar(places, [layer.before for layer in layers], 0.84, color=DENSE, label="dense")
    axis.bar(places, [layer.after for layer in layers], 0.6, color=COMPACT, label="after the cut")
    if len(layers) <= NUMBERED:
        for place, layer in zip(places, layers):
            axis.annotate(str(layer.after), (place, layer.after), (0, 1), textcoords="offset points", ha="center", fontsize=8)
    axis.set_xticks(places, [layer.name for layer in layers], rotation=60 if len(layers) > 8 else 0, fontsize=8)
    axis.tick_params(axis="x", length=0)
    axis.set(title=f"{kind} of each layer", ylim=(0, 1.18 * max(layer.before for layer in layers)))
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(frameon=False, fontsize=9, loc="upper left", ncols=2)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _quality(axis: Any, sparse: Sequence[Mapping[str, Any]], dense: Sequence[Mapping[str, Any]], quality: Quality) -> None:
    style = {"marker": "o", "markersize": 3 if len(sparse) > 15 else 4, "clip_on": False}
    for rows, label, color in ((dense, "dense", "#737373"), (sparse, "with the budget", COMPACT)):
        if rows:
            values = [quality.factor * row[quality.column] for row in rows]
            axis.plot([row["epoch"] for row in rows], values, color=color, label=label, **style)
    axis.set_title(f"{quality.label} on validation data{quality.unit}")
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=9)


def _share(axis: Any, measured: Sequence[Mapping[str, Any]], steps: int) -> None:
    epochs = [row["step"] / steps for row in measured]
    axis.plot(epochs, [100 * row["wanted"] for row in measured], "--", color=WANTED, linewidth=1.2, label="wanted")
    axis.plot(epochs, [100 * row["share"] for row in measured], color=COMPACT, label="with the budget")
    frozen = next((epoch for epoch, row in zip(epochs, measured) if row["frozen"]), None)
    if frozen is not None:
        axis.axvline(frozen, color="#969696", linestyle=":", label="zeros are frozen")
    axis.set(title="multiply-adds (% of the dense network)", ylim=(0, 105))
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=9)
