"""Draw cells as graphs and architecture weights as a heat map, with matplotlib."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path as File
from typing import Any

import matplotlib
import numpy as np

from .files import draft, write_text
from .genotype import AnyGenotype
from .spaces import Space

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

COLORS = {
    "max_pool_3x3": "#8c6bb1",
    "avg_pool_3x3": "#c994c7",
    "skip_connect": "#969696",
    "sep_conv_3x3": "#2171b5",
    "sep_conv_5x5": "#08306b",
    "dil_conv_3x3": "#41ab5d",
    "dil_conv_5x5": "#00441b",
    "sep_conv_7x7": "#54278f",
    "conv_7x1_1x7": "#e7298a",
    "noise": "#d94801",
    "tanh": "#2171b5",
    "relu": "#d94801",
    "sigmoid": "#41ab5d",
    "identity": "#969696",
}
# Coordinates of the nodes of a cell, by layout: inputs on the left, output on the right.
PLACES: dict[str, dict[Any, tuple[float, float]]] = {
    "convolutional": {
        **{0: (0.0, 2.0), 1: (0.0, 0.0), 2: (2.0, 2.6), 3: (4.0, -0.7), 4: (6.0, 2.6), 5: (8.0, -0.7)},
        "out": (10.0, 1.0),
    },
    "recurrent": {
        0: (0.0, 1.0),
        **{node: (0.2 + 1.1 * node, (3.2, -1.2, 2.0, 0.0)[node % 4]) for node in range(1, 9)},
        "out": (10.4, 1.0),
    },
}
NAMES: dict[str, dict[Any, str]] = {
    "convolutional": {0: "input\nk-2", 1: "input\nk-1", "out": "output"},
    "recurrent": {0: "word,\nstate", "out": "state"},
}


def cells(genotype: AnyGenotype, title: str = "") -> plt.Figure:
    """Draw all cells as graphs: an arrow in the colour of its operation for each path, nodes without paths in grey."""
    layout = genotype.layout
    places = PLACES[layout.name]
    figure, grid = plt.subplots(
        len(layout.cells), 1, figsize=(11, 4.3 * len(layout.cells)), constrained_layout=True, squeeze=False
    )
    for axis, cell in zip(grid[:, 0], layout.cells):
        paths = genotype.paths(cell)
        axis.set_title(
            f"{cell} cell: {plural(len(paths), 'path')}, {plural(len(genotype.active_nodes(cell)), 'node')}",
            loc="left",
            fontsize=11,
        )
        _nodes(axis, genotype, cell)
        for node, source in layout.edges:
            here = [path.operation for path in paths if (path.node, path.source) == (node, source)]
            for i, operation in enumerate(here):
                _arrow(axis, places[source], places[node], COLORS[operation], (i - (len(here) - 1) / 2) * 0.13 + 0.08)
        for node in genotype.active_nodes(cell):
            _arrow(axis, places[node], places["out"], "#bbbbbb", 0.05, style="--")
        axis.set(xlim=(-0.8, 11.0), ylim=(-2.0, 3.9))
        axis.axis("off")
    shown = [name for name in COLORS if any(path.operation == name for cell in layout.cells for path in genotype.paths(cell))]
    handles = [plt.Line2D([], [], color=COLORS[name], linewidth=2.5, label=name) for name in shown]
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 5), frameon=False)
    if title:
        figure.suptitle(title)
    return figure


def plural(number: int, word: str) -> str:
    return f"{number} {word}" + ("" if number == 1 else "s")


def _nodes(axis: Any, genotype: AnyGenotype, cell: str) -> None:
    layout = genotype.layout
    for node, (x, y) in PLACES[layout.name].items():
        active = node in (*layout.inputs, "out", *genotype.active_nodes(cell))
        face = "#fff3d6" if node in layout.inputs else "#e3efda" if node == "out" else "#deebf7" if active else "#f6f6f6"
        edge = "#444444" if active else "#cccccc"
        axis.add_patch(FancyBboxPatch((x - 0.38, y - 0.3), 0.76, 0.6, "round,pad=0.05", facecolor=face, edgecolor=edge, zorder=3))
        text = NAMES[layout.name].get(node, str(node))
        axis.text(x, y, text, ha="center", va="center", fontsize=9, color=edge, zorder=4)


def _arrow(axis: Any, start: tuple, end: tuple, color: str, bend: float, style: str = "-") -> None:
    axis.add_patch(
        FancyArrowPatch(
            start, end, connectionstyle=f"arc3,rad={bend}", arrowstyle="-|>", mutation_scale=13, shrinkA=17, shrinkB=17,
            color=color, linewidth=1.7, linestyle=style, zorder=2,
        )
    )  # fmt: skip


def heat_map(space: Space, point: Mapping[str, Any]) -> plt.Figure:
    """Draw the weights of all cells: a row for each operation, a column for each edge, lines between nodes.

    Exact zeros are white with a dot; entries that are no path of the space are grey. point: arrays of NumPy, torch or JAX.
    """
    cells, edges = space.layout.cells, space.layout.edges
    figure, grids = plt.subplots(len(cells), 1, figsize=(11, 3.2 * len(cells)), constrained_layout=True, squeeze=False)
    axes = grids[:, 0]
    values = {cell: np.array(point[cell].tolist()) for cell in cells}
    limit = max((float(np.abs(v).max(initial=0.0)) for v in values.values()), default=0.0) or 1.0
    for axis, cell in zip(axes, cells):
        names = list(dict.fromkeys(path.operation for path in space.paths(cell)))
        grid = np.full((len(names), len(edges)), np.nan)
        for path, weight in zip(space.paths(cell), values[cell]):
            grid[names.index(path.operation), edges.index((path.node, path.source))] = weight
        axis.set_facecolor("#dddddd")
        picture = axis.imshow(grid, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
        for row, column in np.argwhere(grid == 0):
            axis.plot(column, row, ".", color="#bbbbbb", markersize=2)
        for number in np.flatnonzero(np.diff([node for node, _ in edges])):
            axis.axvline(number + 0.5, color="black", linewidth=0.8)
        axis.set_yticks(range(len(names)), names)
        axis.set_xticks(range(len(edges)), [f"{source}-{node}" for node, source in edges], fontsize=10 if len(edges) < 20 else 7)
        zeros = int(np.nansum(grid == 0))
        axis.set_title(
            f"{cell} cell: {int(np.isfinite(grid).sum()) - zeros} weights, {zeros} exact zeros", loc="left", fontsize=11
        )
    axes[-1].set_xlabel("edge (source-node)")
    figure.colorbar(picture, ax=axes, label="architecture weight")
    return figure


def svg(figure: plt.Figure) -> str:
    """Return the figure as SVG text; equal figures give equal text."""
    text = io.StringIO()
    with plt.rc_context({"svg.hashsalt": "cells"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def save(figure: plt.Figure, *files: File) -> None:
    """Save the figure to every file, in the format of its suffix, and close it."""
    for file in files:
        if file.suffix == ".svg":
            write_text(file, svg(figure))
        else:
            with draft(file) as part:
                figure.savefig(part, dpi=120, format=file.suffix[1:])
    plt.close(figure)
