"""What the networks of NAS-Bench-201 of all libraries share."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import or_
from typing import Any, Literal

from ..space.genotype import CellGenotype, Path
from .convolutional import cell_kinds

KERNELS = {"nor_conv_1x1": 1, "nor_conv_3x3": 3}  # sides of the kernels, in pixels
PUBLISHED = {"channels": 16, "layers": 17}  # the size of all networks of the benchmark
LAST = CellGenotype.layout.nodes[-1]  # the node that is the output of a cell

Transition = Literal["residual", "patch"]


def layer_kinds(layers: int) -> list[str]:
    """The kind of each layer: a searched "cell", or "reduce", a transition to the next stage."""
    kinds = ["cell" if kind == "normal" else kind for kind in cell_kinds(layers)]
    if "cell" not in kinds:
        raise ValueError(f"layers must be at least 3, two transitions and one cell, got {layers}")
    return kinds


def read_paths(paths: Sequence[Path], active: Any) -> list[Any]:
    """Flags of the active paths on a way from the input of a cell to its output.

    active: a flag of each path, Python's or traced ones, as the result then has too; None: all.
    """
    used = [path.operation != "none" and (True if active is None else active[i]) for i, path in enumerate(paths)]
    nodes = CellGenotype.layout.nodes
    reached: dict[int, Any] = {0: True}
    for node in nodes:
        reached[node] = reduce(or_, (used[i] & reached[p.source] for i, p in enumerate(paths) if p.node == node), False)
    read: dict[int, Any] = {LAST: True}
    for node in reversed((0, *nodes[:-1])):
        read[node] = reduce(or_, (used[i] & read[p.node] for i, p in enumerate(paths) if p.source == node), False)
    return [used[i] & reached[path.source] & read[path.node] for i, path in enumerate(paths)]
