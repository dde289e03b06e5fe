"""Layered layout of a cell: boxes in columns from left to right, and lanes on which lines pass the boxes of a column.

A line between two columns that are not neighbours passes every column between them on a lane of its own, and bends in the gaps
between columns only, so that no line runs through a box. All lines that leave a node share its lanes: they form a tree, whose
branches end at the boxes of the operations that read the node.

The method is that of Sugiyama, Tagawa, Toda, "Methods for visual understanding of hierarchical system structures", 1981: columns
by the longest path, order within a column by barycentres, coordinates by least squares under minimal distances.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

Key = Hashable
SWEEPS = 8  # of the order of columns; more change nothing in cells of the spaces here
PASSES = 40  # over the coordinates
SPACE = 0.13  # between boxes of a column, in inches
NARROWEST, WIDEST, SLOPE = 0.38, 1.3, 0.16  # gap between columns in inches: its bounds, and its growth with the height of lines
STRAIGHT = 6.0  # weight of the link between two lanes beside one that ends at a box: long lines should be level


@dataclass
class Box:
    """A rectangle, or a lane if its width and height are 0; x and y are its centre in inches, y downwards."""

    column: int
    width: float = 0.0
    height: float = 0.0
    x: float = 0.0
    y: float = 0.0

    @property
    def left(self) -> float:
        return self.x - self.width / 2

    @property
    def right(self) -> float:
        return self.x + self.width / 2


@dataclass
class Placement:
    """Boxes by key, the links between boxes of neighbouring columns, and the size of the whole in inches.

    spans: the left and right end of each column, which lanes cross on a level.
    """

    boxes: dict[Key, Box]
    links: list[tuple[Key, Key]]
    spans: list[tuple[float, float]] = field(default_factory=list)
    width: float = 0.0
    height: float = 0.0


def depths(inputs: Iterable[int], edges: Iterable[tuple[int, int]]) -> dict[int, int]:
    """The length of the longest path to each node. edges: (node, source), ordered by node; a source without edges has depth 0."""
    found = dict.fromkeys(inputs, 0)
    for node, source in edges:
        found[node] = max(found.get(node, 0), found.setdefault(source, 0) + 1)
    return found


def add_lines(layout: Placement, start: Key, ends: Sequence[Key]) -> None:
    """Link a box to boxes in later columns by a tree of lanes."""
    boxes, last = layout.boxes, start
    first, final = boxes[start].column + 1, max((boxes[end].column for end in ends), default=0)
    for column in range(first, final + 1):
        layout.links += [(last, end) for end in ends if boxes[end].column == column]
        if column < final:
            lane = ("lane", start, column)
            boxes[lane] = Box(column)
            layout.links.append((last, lane))
            last = lane


def arrange(layout: Placement) -> Placement:
    """Set the coordinates of all boxes, which are not negative, and the size of the layout."""
    columns: list[list[Key]] = [[] for _ in range(1 + max(box.column for box in layout.boxes.values()))]
    for key, box in layout.boxes.items():
        columns[box.column].append(key)
    columns = _ordered(columns, layout.links)
    _set_heights(columns, layout)
    _set_columns(columns, layout)
    return layout


def _neighbours(links: Iterable[tuple[Key, Key]]) -> tuple[dict[Key, list[Key]], dict[Key, list[Key]]]:
    """The keys linked on the left and on the right of each key."""
    left: dict[Key, list[Key]] = {}
    right: dict[Key, list[Key]] = {}
    for a, b in links:
        right.setdefault(a, []).append(b)
        left.setdefault(b, []).append(a)
    return left, right


def _ordered(columns: list[list[Key]], links: Sequence[tuple[Key, Key]]) -> list[list[Key]]:
    """The columns in the order with the fewest crossings of all that sweeps of barycentres visit."""
    left, right = _neighbours(links)
    best, fewest = [list(column) for column in columns], _crossings(columns, links)
    for _ in range(SWEEPS):
        for beside, sweep in ((left, columns), (right, columns[::-1])):
            places = {key: (place + 0.5) / len(column) for column in columns for place, key in enumerate(column)}
            for column in sweep:
                mean = {k: float(np.mean([places[n] for n in beside[k]])) if k in beside else places[k] for k in column}
                column.sort(key=mean.__getitem__)
                places |= {key: (place + 0.5) / len(column) for place, key in enumerate(column)}
            if (found := _crossings(columns, links)) < fewest:
                best, fewest = [list(column) for column in columns], found
    return best


def _crossings(columns: Sequence[Sequence[Key]], links: Sequence[tuple[Key, Key]]) -> int:
    place = {key: (number, i) for number, column in enumerate(columns) for i, key in enumerate(column)}
    ends = np.array([(*place[a], place[b][1]) for a, b in links]).reshape(-1, 3)
    gap, a, b = ends[:, :, None].transpose(1, 0, 2)
    return int(((gap == gap.T) & (a < a.T) & (b > b.T)).sum())


def _set_heights(columns: Sequence[Sequence[Key]], layout: Placement) -> None:
    """Set y: each box close to the mean of its neighbours, boxes of a column in order and apart."""
    boxes, beside = layout.boxes, {key: list[tuple[Key, float]]() for key in layout.boxes}
    for a, b in layout.links:
        weight = STRAIGHT ** ((not boxes[a].width) + (not boxes[b].width))
        beside[a].append((b, weight))
        beside[b].append((a, weight))
    apart = {}
    for number, column in enumerate(columns):
        halves = [boxes[key].height / 2 + SPACE / 2 for key in column]
        apart[number] = np.cumsum([0.0, *(a + b for a, b in pairwise(halves))])
        for key, y in zip(column, apart[number] - apart[number].mean()):
            boxes[key].y = float(y)
    order = [*range(len(columns)), *reversed(range(len(columns)))] * PASSES
    for number in order:
        wanted, weights = [], []
        for key in columns[number]:
            total = sum(weight for _, weight in beside[key])
            wanted.append(sum(weight * boxes[n].y for n, weight in beside[key]) / total if total else boxes[key].y)
            weights.append(total or 1.0)
        for key, y in zip(columns[number], _isotonic(np.array(wanted) - apart[number], weights) + apart[number]):
            boxes[key].y = float(y)
    top = min(box.y - box.height / 2 for box in boxes.values())
    for box in boxes.values():
        box.y -= top
    layout.height = max(box.y + box.height / 2 for box in boxes.values())


def _isotonic(wanted: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """The nondecreasing vector that is closest to `wanted` in weighted least squares (pool adjacent violators)."""
    blocks: list[tuple[float, float, int]] = []  # mean, weight, count
    for value, weight in zip(wanted.tolist(), weights):
        block = (value, weight, 1)
        while blocks and blocks[-1][0] > block[0]:
            mean, mass, count = blocks.pop()
            total = mass + block[1]
            block = ((mean * mass + block[0] * block[1]) / total, total, count + block[2])
        blocks.append(block)
    return np.concatenate([np.full(count, mean) for mean, _, count in blocks])


def _set_columns(columns: Sequence[Sequence[Key]], layout: Placement) -> None:
    """Set x: columns as wide as their boxes, with gaps that are wider where lines rise or fall steeply."""
    boxes = layout.boxes
    heights: Mapping[int, list[float]] = {number: [0.0] for number in range(len(columns))}
    for a, b in layout.links:
        heights[boxes[b].column].append(abs(boxes[a].y - boxes[b].y))
    x = 0.0
    for number, column in enumerate(columns):
        if number:
            x += min(NARROWEST + SLOPE * max(heights[number]), WIDEST)
        width = max(boxes[key].width for key in column)
        for key in column:
            boxes[key].x = x + width / 2
        layout.spans.append((x, x + width))
        x += width
    layout.width = x
