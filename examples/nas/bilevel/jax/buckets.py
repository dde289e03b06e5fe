"""Which of a few compiled programs takes a step with some active paths.

A program is compiled for a set of paths, and serves all sets within it: the other paths have weight 0, so they are computed in
vain but change nothing. A search that loses its paths one by one compiles a new program only when more than half of the paths
of the smallest fitting one would be computed in vain, and never more than `LIMIT`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ...space.spaces import Masks

LIMIT = 8  # programs of a search
WASTE = 0.5  # largest share of the paths of a program that may be inactive, while there may be more programs

Paths = tuple[tuple[str, tuple[bool, ...]], ...]  # a set of paths as a constant: a flag for each path of each cell


def paths_of(masks: Masks) -> Paths:
    return tuple((cell, tuple(map(bool, flags))) for cell, flags in masks.items())


class Buckets:
    """The sets of paths that have a program. paths: the number of paths of each cell."""

    def __init__(self, paths: dict[str, int]) -> None:
        self.every: Paths = tuple((cell, (True,) * count) for cell, count in paths.items())
        self.sets: list[Paths] = []

    def choose(self, active: Paths) -> Paths:
        """The smallest set that contains the active paths; a new one if that is too large, and the limit allows it."""
        fitting = [known for known in self.sets if _contains(known, active)]
        best = min(fitting, key=_count, default=None)
        if best is not None and _count(active) >= (1 - WASTE) * _count(best):
            return best
        left = LIMIT - len(self.sets)
        if left <= (self.every not in self.sets):  # the last program is kept for all paths
            if best is not None:
                return best
            new = self.every
        else:
            new = self._padded(active)
        self.sets.append(new)
        return new

    def _padded(self, active: Paths) -> Paths:
        """The active paths, and those of the last set if that is not too many: a path that has just gone may come back."""
        if self.sets:
            union = _union(active, self.sets[-1])
            if _count(active) >= (1 - WASTE) * _count(union):
                return union
        return active

    def plain(self) -> list[Any]:
        """The sets as JSON has them. A resumed search needs them: other programs would round differently."""
        return [[[cell, list(flags)] for cell, flags in known] for known in self.sets]

    def restore(self, plain: Iterable[Sequence[Any]]) -> None:
        self.sets = [tuple((cell, tuple(flags)) for cell, flags in known) for known in plain]


def _count(paths: Paths) -> int:
    return sum(sum(flags) for _, flags in paths)


def _contains(larger: Paths, smaller: Paths) -> bool:
    return all(all(a >= b for a, b in zip(x, y)) for (_, x), (_, y) in zip(larger, smaller))


def _union(one: Paths, other: Paths) -> Paths:
    return tuple((cell, tuple(a or b for a, b in zip(x, y))) for (cell, x), (_, y) in zip(one, other))
