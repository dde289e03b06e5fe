"""Draw cells as graphs and architecture weights as a heat map, with matplotlib."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path as File
from typing import Any

import matplotlib
import numpy as np

from . import placement
from .amounts import plural
from .files import draft, write_text
from .genotype import AnyGenotype, Path, cell_name
from .spaces import Space

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import FancyBboxPatch, PathPatch, Polygon, Rectangle
from matplotlib.path import Path as Outline
from matplotlib.textpath import TextPath

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
    "nor_conv_1x1": "#41ab5d",
    "nor_conv_3x3": "#2171b5",
    "tanh": "#2171b5",
    "relu": "#d94801",
    "sigmoid": "#41ab5d",
    "identity": "#969696",
}
NAMES: dict[str, dict[Any, str]] = {
    "convolutional": {0: "input\nk-2", 1: "input\nk-1", "out": "output\n(concatenated)"},
    "nasbench201": {0: "input", "out": "output"},
    "recurrent": {0: "word,\nstate", "out": "state\n(mean)"},
}
FACES = {"input": "#fff3d6", "node": "#deebf7", "out": "#e3efda", "zero": "#f6f6f6"}
LINE, DARK, FAINT = "#8a8a8a", "#333333", "#c4c4c4"
FONT, SMALL = 9, 8  # points
ROW = 0.155  # height of an operation in its box, in inches
MARGIN = 0.2
BARS = "bars: size of the weight of an operation; arrows into nodes: sum of these"


def cells(
    genotype: AnyGenotype, title: str = "", space: Space | None = None, point: Mapping[str, Any] | None = None
) -> plt.Figure:
    """Draw all cells as graphs from left to right: a box for each node, and one for the operations between two nodes.

    Nodes and inputs without paths are left out. With the weights of all paths of a space, bars behind the operations show their
    magnitudes, and the widths of arrows the sums of them. point: arrays of NumPy, torch or JAX.
    """
    cells = genotype.layout.cells
    weights = {cell: _magnitudes(genotype, cell, space, point) for cell in cells}
    largest = max((w for found in weights.values() for w in found.values()), default=0.0) or 1.0
    drawn = [_place(genotype, cell) for cell in cells]
    captions = [_caption(genotype, cell) for cell in cells]
    width = 2 * MARGIN + max(4.5, *(part.width for part in drawn), *(_width(line, FONT) for text in captions for line in text))
    head = _wrapped(title, width - 2 * MARGIN)
    tops, y = [], MARGIN + 0.24 * len(head) + 0.2 * (point is not None)
    for part, text in zip(drawn, captions):
        tops.append(y + 0.2 * len(text) + 0.14)
        y = tops[-1] + part.height + 2 * MARGIN
    figure, axis = plt.subplots(figsize=(width, y))
    axis.set(position=(0, 0, 1, 1), xlim=(0, width), ylim=(y, 0))
    axis.axis("off")
    for number, line in enumerate(head):
        axis.text(MARGIN, MARGIN + 0.24 * number, line, fontsize=FONT + 2, va="top", weight="bold")
    if point is not None:
        axis.text(MARGIN, MARGIN + 0.24 * len(head), BARS, fontsize=SMALL, va="top", color=LINE)
    for cell, part, text, top in zip(cells, drawn, captions, tops):
        for number, line in enumerate(text):
            y = top - 0.14 - 0.2 * (len(text) - number)
            axis.text(MARGIN, y, line, fontsize=FONT, va="top", color=LINE if number else DARK)
        _lines(axis, part, genotype, cell, weights[cell], top)
        _boxes(axis, part, genotype, cell, {path: w / largest for path, w in weights[cell].items()}, top)
    return figure


def _wrapped(text: str, width: float, size: float = FONT + 2, bold: bool = True) -> list[str]:
    """The lines of a title of this width in inches. size: of its letters, in points."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and (1.15 if bold else 1.0) * _width(longer, size) <= width:  # bold letters are wider
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _magnitudes(genotype: AnyGenotype, cell: str, space: Space | None, point: Mapping[str, Any] | None) -> dict[Path, float]:
    """The absolute weight of each path of the genotype; empty without weights."""
    if space is None or point is None:
        return {}
    all_weights = dict(zip(space.paths(cell), np.abs(np.array(point[cell].tolist()))))
    return {path: float(all_weights.get(path, 0.0)) for path in genotype.paths(cell)}


def _edges(genotype: AnyGenotype, cell: str) -> dict[tuple[int, int], list[Path]]:
    """The paths of each (node, source), ordered by node."""
    found: dict[tuple[int, int], list[Path]] = {}
    for path in sorted(genotype.paths(cell), key=lambda path: (path.node, path.source)):
        found.setdefault((path.node, path.source), []).append(path)
    return found


def _caption(genotype: AnyGenotype, cell: str) -> list[str]:
    """The heading of a cell, and a line about the nodes and inputs that are left out."""
    layout, paths, active = genotype.layout, genotype.paths(cell), genotype.active_nodes(cell)
    counts = (plural(len(paths), "path"), plural(len(_edges(genotype, cell)), "edge"), plural(len(active), "node"))
    lines = [f"{cell_name(cell)}: {counts[0]} on {counts[1]}, into {counts[2]}"]
    missing = [f"node {node}" for node in layout.nodes if node not in active]
    missing += [
        "input " + NAMES[layout.name][node].replace("input", "").replace("\n", " ").strip()
        for node in layout.inputs
        if paths and node not in {path.source for path in paths}
    ]
    if missing:
        lines.append(f"without paths: {', '.join(missing)}")
    return lines


def _place(genotype: AnyGenotype, cell: str) -> placement.Placement:
    """The boxes of a cell: nodes in even columns, the operations into them in the columns before, the output at the end."""
    edges, layout = _edges(genotype, cell), placement.Placement({}, [])
    used = [node for node in genotype.layout.inputs if any(source == node for _, source in edges)]
    depth = placement.depths(used, edges)
    into = {node: [edge for edge in edges if edge[0] == node] for node in depth}
    outputs = genotype.output_nodes(cell)
    for node in sorted(depth):
        layout.boxes[node] = placement.Box(2 * depth[node], *_size(_name(genotype, cell, node), len(into[node])))
    for edge, paths in edges.items():
        size = max(_width(path.operation, SMALL) for path in paths) + 0.2, ROW * len(paths) + 0.06
        layout.boxes[edge] = placement.Box(2 * depth[edge[0]] - 1, *size)
    last = max((2 * d + 1 for d in depth.values()), default=0)
    layout.boxes["out"] = placement.Box(last, *_size(_name(genotype, cell, "out"), len(outputs)))
    for node in sorted(depth):
        placement.add_lines(layout, node, [edge for edge in edges if edge[1] == node] + ["out"] * (node in outputs))
    layout.links += [(edge, edge[0]) for edge in edges]
    return placement.arrange(layout)


def _name(genotype: AnyGenotype, cell: str, node: Any) -> str:
    """The text in the box of a node."""
    names = NAMES[genotype.layout.name]
    return names[node] if node in names else f"{node}" if node in genotype.active_nodes(cell) else f"{node}\n(zero)"


def _size(text: str, arrows: int) -> tuple[float, float]:
    """Width and height of the box of a node, in inches, with room for its text and for the arrows into it."""
    lines = text.split("\n")
    return max(0.42, max(_width(line, FONT) for line in lines) + 0.2), max(0.17 * len(lines) + 0.14, 0.13 * arrows + 0.1)


@cache
def _width(text: str, size: float) -> float:
    """The width of a line of text in inches."""
    return TextPath((0, 0), text, size=size).get_extents().x1 / 72


def _lines(
    axis: Any, part: placement.Placement, genotype: AnyGenotype, cell: str, weights: Mapping[Path, float], top: float
) -> None:
    """Draw lines from nodes to the operations that read them, and arrows into nodes and the output."""
    edges, active = _edges(genotype, cell), {*genotype.layout.inputs, *genotype.active_nodes(cell)}
    sums = {edge: sum(weights.get(path, 0.0) for path in paths) for edge, paths in edges.items()}
    largest = max(sums.values(), default=0.0)
    ports = _ports(part)
    for a, b in part.links:
        box, other, span = part.boxes[a], part.boxes[b], part.spans[part.boxes[b].column]
        source = a[1] if isinstance(a, tuple) else a  # operations have the key (node, source), lanes ("lane", source, column)
        color = FAINT if source not in active else DARK if a in edges else LINE
        width = 0.9 + 2.6 * sums[a] / largest if a in edges and largest else 1.2
        start = MARGIN + (box.right if box.width else part.spans[box.column][1]), top + box.y
        end = MARGIN + (other.left if other.width else span[0]), top + ports[a, b]
        _curve(axis, start, end, color, width, arrow=a in edges or b == "out")
        if not other.width:  # a lane crosses its column on a level
            axis.plot([end[0], MARGIN + span[1]], [end[1], end[1]], color=color, linewidth=width, zorder=1)


def _ports(part: placement.Placement) -> dict[tuple[Any, Any], float]:
    """The height at which each arrow meets its node: apart, in the order in which the arrows come."""
    found = {}
    for key, box in part.boxes.items():
        arriving = sorted((link for link in part.links if link[1] == key), key=lambda link: part.boxes[link[0]].y)
        room = min(0.13, box.height / max(len(arriving), 1))
        for number, link in enumerate(arriving):
            found[link] = box.y + room * (number - (len(arriving) - 1) / 2)
    return found


def _curve(axis: Any, start: tuple[float, float], end: tuple[float, float], color: str, width: float, arrow: bool) -> None:
    """Draw a line that is level at both ends; an arrowhead touches its end."""
    head = 0.1 if arrow else 0.0
    (x0, y0), (x1, y1) = start, (end[0] - head, end[1])
    middle = (x0 + x1) / 2
    codes = [Outline.MOVETO, *[Outline.CURVE4] * 3]
    curve = Outline([(x0, y0), (middle, y0), (middle, y1), (x1, y1)], codes)
    axis.add_artist(PathPatch(curve, facecolor="none", edgecolor=color, linewidth=width, capstyle="round", zorder=1))
    if arrow:
        half = 0.035 + width / 100
        axis.add_artist(Polygon([(x1, y1 - half), end, (x1, y1 + half)], facecolor=color, edgecolor="none", zorder=2))


def _boxes(
    axis: Any, part: placement.Placement, genotype: AnyGenotype, cell: str, shares: Mapping[Path, float], top: float
) -> None:
    """Draw nodes, and the operations between two nodes. shares: of the largest weight, for the bars; empty without weights."""
    layout, edges = genotype.layout, _edges(genotype, cell)
    active = genotype.active_nodes(cell)
    for key, box in part.boxes.items():
        if not box.width:
            continue
        x, y = MARGIN + box.left, top + box.y - box.height / 2
        if key in edges:
            live = key[1] in layout.inputs or key[1] in active
            _operations(axis, x, y, box, edges[key], shares, live)
            continue
        kind = "out" if key == "out" else "input" if key in layout.inputs else "node" if key in active else "zero"
        color = FAINT if kind == "zero" else DARK
        style = "round,pad=0,rounding_size=0.06"
        axis.add_artist(
            FancyBboxPatch((x, y), box.width, box.height, style, facecolor=FACES[kind], edgecolor=color, linewidth=1, zorder=3)
        )
        place = {"ha": "center", "va": "center", "fontsize": FONT, "zorder": 4}
        axis.text(MARGIN + box.x, top + box.y, _name(genotype, cell, key), color=color, **place)


def _operations(
    axis: Any, x: float, y: float, box: placement.Box, paths: Sequence[Path], shares: Mapping[Path, float], active: bool
) -> None:
    """Draw the box of the operations between two nodes: a row for each, with a bar in its colour; grey if its source is zero."""
    axis.add_artist(Rectangle((x, y), box.width, box.height, facecolor="white", edgecolor=LINE, linewidth=0.7, zorder=3))
    for number, path in enumerate(paths):
        row, color = y + 0.03 + ROW * number, COLORS[path.operation] if active else FAINT
        bar = (box.width - 0.1) * shares.get(path, 1.0)
        axis.add_artist(Rectangle((x + 0.1, row), bar, ROW, facecolor=color, alpha=0.25, linewidth=0, zorder=3))
        axis.add_artist(Rectangle((x + 0.02, row + 0.01), 0.06, ROW - 0.02, facecolor=color, linewidth=0, zorder=3))
        place = {"va": "center_baseline", "fontsize": SMALL, "zorder": 4}
        axis.text(x + 0.13, row + ROW / 2, path.operation, color=DARK if active else FAINT, **place)


def heat_map(space: Space, point: Mapping[str, Any], quantity: str = "architecture weight") -> plt.Figure:
    """Draw the weights of all cells as a table: a row for each operation, a column for each edge, grouped by the node it enters.

    Nonzero weights are written; exact zeros are white with a dot; entries that are no path of the space are grey.
    point: arrays of NumPy, torch or JAX. quantity: what the weights are, for the titles.
    """
    cells, edges = space.layout.cells, space.layout.edges
    values = {cell: np.array(point[cell].tolist(), float) for cell in cells}
    limit = max((float(np.abs(v).max(initial=0.0)) for v in values.values()), default=0.0) or 1.0
    signed = any((v < 0).any() for v in values.values())
    names = {cell: list(dict.fromkeys(path.operation for path in space.paths(cell))) for cell in cells}
    left = 0.25 + max(_width(name, FONT) for found in names.values() for name in found)
    column, row, foot = (0.52 if len(edges) < 20 else 0.42), 0.28, 0.75
    wide = max(column * len(edges), 4.0)
    titles = {cell: _wrapped(_title(space, cell, values[cell], quantity), wide, 10, bold=False) for cell in cells}
    heads = [0.33 + 0.17 * len(titles[cell]) for cell in cells]
    heights = [head + row * len(names[cell]) + foot for head, cell in zip(heads, cells)]
    size = left + wide + MARGIN, sum(heights)
    figure = plt.figure(figsize=size)
    for number, cell in enumerate(cells):
        bottom = sum(heights[number + 1 :]) + foot
        axis = figure.add_axes(
            (left / size[0], bottom / size[1], column * len(edges) / size[0], row * len(names[cell]) / size[1])
        )
        grid = np.full((len(names[cell]), len(edges)), np.nan)
        for path, weight in zip(space.paths(cell), values[cell]):
            grid[names[cell].index(path.operation), edges.index((path.node, path.source))] = weight
        _table(axis, grid, _shades(grid, limit, signed), signed)
        axis.set_yticks(range(len(names[cell])), names[cell], fontsize=FONT)
        axis.set_title("\n".join(titles[cell]), loc="left", fontsize=10)
        _edge_labels(axis, space)
    return figure


def _title(space: Space, cell: str, values: np.ndarray, quantity: str) -> str:
    """The heading of a table of weights, with the numbers of those that are zero and not."""
    zeros = int((values == 0).sum())
    return f"{cell_name(cell)}, {quantity}: {len(values) - zeros} nonzero, {zeros} exactly 0"


def _shades(grid: np.ndarray, limit: float, signed: bool) -> np.ndarray:
    """The colours of a table of weights: numbers in [0, 1], or in [-1, 1] if weights of any cell are negative (`signed`).

    They follow the square roots of magnitudes, so that small weights differ from zero. Where nothing is zero, as after a softmax,
    they range from the smallest weight to the largest.
    """
    low, high = np.nanmin(grid), np.nanmax(grid)
    if low > 0 and not signed:
        return 0.05 + 0.75 * (grid - low) / max(high - low, 1e-12)
    return np.sign(grid) * np.sqrt(np.abs(grid) / limit)


def _table(axis: Any, grid: np.ndarray, shades: np.ndarray, signed: bool) -> None:
    """Draw a table of weights in these colours."""
    axis.set_facecolor("#dddddd")
    axis.imshow(shades, cmap="RdBu_r" if signed else "Blues", vmin=-1 if signed else 0, vmax=1, aspect="auto")
    digits = 3 if np.nanmax(grid) < 2 * np.nanmin(grid) else 2
    rows, columns = np.nonzero(grid == 0)
    axis.plot(columns, rows, ".", color="#bbbbbb", markersize=3)
    for r, c in np.argwhere(np.isfinite(grid) & (grid != 0)):
        color = "white" if abs(shades[r, c]) > 0.65 else DARK
        axis.text(c, r, _short(grid[r, c], digits), ha="center", va="center", fontsize=6.5, color=color)
    axis.tick_params(length=0)


def _short(weight: float, digits: int) -> str:
    """A weight in a few characters: .12, 3.4, -.05, 2e-5."""
    text = f"{weight:.{digits}g}" if abs(weight) >= 0.001 else f"{weight:.0e}".replace("e-0", "e-")
    return text.replace("0.", ".", 1) if abs(weight) < 1 else text


def _edge_labels(axis: Any, space: Space) -> None:
    """Label the columns of a table by the source of each edge, and groups of them by the node that they enter."""
    edges, names = space.layout.edges, {0: "in"}
    if space.layout.name == "convolutional":
        names = {0: "k-2", 1: "k-1"}
    axis.set_xticks(range(len(edges)), [names.get(source, str(source)) for _, source in edges], fontsize=8)
    nodes = [node for node, _ in edges]
    for number in np.flatnonzero(np.diff(nodes)):
        axis.axvline(number + 0.5, color="black", linewidth=0.8)
    for node in dict.fromkeys(nodes):
        first, last = nodes.index(node), len(nodes) - 1 - nodes[::-1].index(node)
        place = {
            "xy": ((first + last) / 2, 0),
            "xycoords": ("data", "axes fraction"),
            "xytext": (0, -22),
            "textcoords": "offset points",
        }
        axis.annotate(f"into {node}", ha="center", va="top", fontsize=8, **place)


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
