"""The rule of DARTS by which weights of paths become a genotype, the same in every library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..space.genotype import AnyGenotype, Path
from ..space.spaces import Space

KEPT = {"convolutional": 2, "recurrent": 1, "nasbench201": 3}  # edges into a node, if there are so many


def strongest_genotype(space: Space, weights: Mapping[str, Sequence[float]]) -> AnyGenotype:
    """The genotype of the strongest edges of each node of each cell. weights: one for each path."""
    layout = space.layout
    weighted = {cell: list(zip(space.paths(cell), weights[cell])) for cell in layout.cells}
    kept: Any = {cell: strongest_edges(weighted[cell], layout.nodes, KEPT[layout.name]) for cell in layout.cells}
    return space.kind.from_paths(**kept)


def strongest_edges(weighted: list[tuple[Path, float]], nodes: Sequence[int], kept: int) -> list[Path]:
    """For each node the `kept` edges of largest weight, each with its strongest operation; zero operations are ignored."""
    chosen = []
    for node in nodes:
        best: dict[int, tuple[float, Path]] = {}
        for path, weight in weighted:
            if path.node == node and path.operation != "none" and weight > best.get(path.source, (-1.0,))[0]:
                best[path.source] = (weight, path)
        chosen += [path for _, path in sorted(best.values(), key=lambda found: -found[0])[:kept]]
    return chosen
