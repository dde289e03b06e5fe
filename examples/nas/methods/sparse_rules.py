"""What the rules of SparseNAS define, whatever library computes them: the strength in each epoch, and the norms that are held."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from proxopt import Groups, Sphere, schedules

from ..space.spaces import Space


def strengths(settings: Any) -> Callable[[int], float]:
    """The strength of the penalty in each epoch, counted from 0."""
    found: Callable[[int], float] = settings.final_strength if settings.strength else schedules.linear(settings.strength_step)
    return found


def spheres(space: Space, parts: str) -> dict[str, Sphere]:
    """By cell the sets of architecture weights whose norm is held: those of each edge, of each node, or of the cell."""
    if parts == "none":
        return {}
    labels = {"edge": space.edges, "node": space.nodes, "cell": lambda cell: [0] * len(space.paths(cell))}[parts]
    return {cell: Sphere(Groups.labels(labels(cell))) for cell in space.layout.cells}
