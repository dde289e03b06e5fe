"""Several levels of one hierarchy: entries inside groups inside larger groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from typing import Any

import numpy as np

from proxopt import _arrays
from proxopt._arrays import Array
from proxopt.groups import Groups
from proxopt.penalties.base import Penalty, check_strength
from proxopt.penalties.elementwise import L1
from proxopt.penalties.group import GroupL2


@dataclass(frozen=True, eq=False, init=False, repr=False)
class Nested(Penalty):
    """f(x) = strength * sum_k f_k(x) over the levels of one hierarchy, leaves first.

    Each level is an `L1` or a `GroupL2`, and each of its groups lies inside one group of the next. Then the prox is
    the composition of the levels' proxes, leaves to root:

        prox(x) = prox_{f_K}( ... prox_{f_2}(prox_{f_1}(x)))

    Args:
      penalties: `L1` and `GroupL2` objects, leaves first, each with a strength of its own.
      strength: a number that multiplies all levels.

    Raises ValueError where the groups are not nested, and where an array `step` meets the exact metric in two or more group
    levels: there the composition is exact only for steps constant inside the inner groups.

    Source: Jenatton, Mairal, Obozinski, Bach, "Proximal methods for hierarchical sparse coding", 2011.

    >>> import numpy as np
    >>> from proxopt import Groups
    >>> rows_in_all = Nested(L1(0.5), GroupL2(1.0, Groups.along(1), weights="none"), GroupL2(1.0, weights="none"))
    >>> rows_in_all.prox(np.array([[3.5, 4.5], [0.5, 1.0]]))
    array([[1.8, 2.4],
           [0. , 0. ]])
    """

    penalties: tuple[Penalty, ...]
    strength: Any

    def __init__(self, *penalties: Penalty, strength: Any = 1.0) -> None:
        if not penalties:
            raise ValueError("penalties must hold at least one level, got none")
        for i, level in enumerate(penalties):
            if not isinstance(level, (L1, GroupL2)):
                raise TypeError(f"penalties[{i}] must be an L1 or a GroupL2, got {type(level).__name__}")
            if isinstance(level, L1) and i:
                raise ValueError(f"L1 must come first: its groups, the single entries, hold no group, got it as level {i}")
        check_strength(strength)
        object.__setattr__(self, "penalties", tuple(penalties))
        object.__setattr__(self, "strength", strength)

    def __repr__(self) -> str:
        return f"Nested({', '.join(map(repr, self.penalties))}, strength={self.strength!r})"

    def with_metric(self, default: str) -> Nested:
        return Nested(*(p.with_metric(default) for p in self.penalties), strength=self.strength)

    def with_strength(self, strength: Any) -> Nested:
        return Nested(*self.penalties, strength=strength)

    def to_dict(self) -> dict:
        levels = [p.to_dict() | {"strength": getattr(p.strength, "tolist", lambda p=p: p.strength)()} for p in self.penalties]
        return {"kind": "Nested", "penalties": levels}

    @classmethod
    def _from_dict(cls, data: dict, strength: Any) -> Nested:
        kinds: dict[str, type[Penalty]] = {"L1": L1, "GroupL2": GroupL2}
        levels = []
        for level in data["penalties"]:
            own = level["strength"]
            own = np.asarray(own) if isinstance(own, list) else own
            levels.append(kinds[level["kind"]]._from_dict({k: v for k, v in level.items() if k != "strength"}, own))
        return cls(*levels, strength=strength)

    def _check(self, xs: Sequence[Array]) -> None:
        super()._check(xs)
        group_levels = self._group_levels()
        for level in self.penalties:
            level._check(xs)
            for groups, x in product(group_levels, xs):
                groups.refuse_batch("strength", level.strength, x)
        for i, (inner, outer) in enumerate(pairwise(group_levels)):
            if not _nested(inner, outer, xs) and not self._lies_inside(i, tuple(tuple(x.shape) for x in xs)):
                raise ValueError(f"groups must be nested, leaves first: {inner} does not lie inside {outer}")

    @_arrays.untraced
    def _lies_inside(self, i: int, shapes: tuple[tuple[int, ...], ...]) -> bool:
        """Whether group level i lies inside the next, looked up in the labels."""
        inner, outer = self._group_levels()[i : i + 2]
        return inner.inside(outer, [np.broadcast_to(0.0, shape) for shape in shapes])

    def _group_levels(self) -> list[Groups]:
        return [p.groups or Groups.whole() for p in self.penalties if isinstance(p, GroupL2)]

    def _value(self, xs: list[Array]) -> Array:
        levels = self._scaled(xs)
        if any(_arrays.ndim(level.strength) for level in levels):  # every level counts each problem of a batch
            xs = [_batched(x, levels) for x in xs]
        values = [level._value(xs) for level in levels]
        return sum(values[1:], start=values[0])

    def _prox(self, xs: list[Array], steps: list[Any]) -> list[Array]:
        self._refuse_inexact(xs, steps)
        for level in self._scaled(xs):
            xs = level._prox(xs, steps)
        return xs

    def _scaled(self, xs: Sequence[Array]) -> list[Penalty]:
        """The levels at their full strength, with axes that stay when a strength brings a batch in front."""
        levels = [p.with_strength(_arrays.times(p.strength, self.strength, xs[0])) for p in self.penalties]
        return [replace(p, groups=p._groups.from_right(xs)) if isinstance(p, GroupL2) else p for p in levels]

    def _refuse_inexact(self, xs: list[Array], steps: list[Any]) -> None:
        levels = [p for p in self.penalties if isinstance(p, GroupL2)]
        for inner, outer in pairwise(levels):
            if outer.metric not in (None, "exact") and inner.metric not in (None, "exact"):
                continue
            groups = inner.groups or Groups.whole()
            for step, x in zip(steps, xs):
                if groups.varies(step, x) and not _constant_inside(groups, step, xs):
                    raise ValueError(
                        "metric='exact' is not the prox of two group levels where steps differ inside a group "
                        f"of {groups}: use metric='median' or 'support' in every GroupL2, or a step constant in each group"
                    )


def _batched(x: Array, levels: list[Penalty]) -> Array:
    shapes = [tuple(level.strength.shape) for level in levels if _arrays.ndim(level.strength)]
    return _arrays.namespace(x).broadcast_to(x, np.broadcast_shapes(tuple(x.shape), *shapes))


def _constant_inside(groups: Groups, step: Any, xs: list[Array]) -> bool:
    if not _arrays.is_numpy_array(step) or len(xs) > 1:
        return False
    try:
        groups.constant("step", step, xs)
    except ValueError:
        return False
    return True


def _nested(inner: Groups, outer: Groups, xs: Sequence[Array]) -> bool:
    """Whether the kinds of groups alone tell that `inner` lies inside `outer`."""
    if inner.kind == outer.kind == "along":
        return set(inner._axes(xs[0].ndim)) <= set(outer._axes(xs[0].ndim))
    return outer.kind == "whole"
