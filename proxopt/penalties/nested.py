"""Several levels of one hierarchy: entries inside groups inside larger groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import numpy as np

from proxopt import _arrays
from proxopt._arrays import Array
from proxopt.groups import Groups
from proxopt.penalties.base import Penalty, check_strength
from proxopt.penalties.plain import plain, restored
from proxopt.penalties.shrinkage import Shrinkage


@dataclass(frozen=True, eq=False, init=False, repr=False)
class Nested(Penalty):
    r"""Levels of one hierarchy, leaves first.

    .. math::

        f(x) = \lambda \sum_{k=1}^K f_k(x)

    Each group of a level lies inside one group of the next. Then the prox is the composition of the proxes of the levels,
    leaves to root:

    .. math::

        \operatorname{prox}_f(x) = \operatorname{prox}_{f_K}( \ldots \operatorname{prox}_{f_2}(\operatorname{prox}_{f_1}(x)))

    Args:
      penalties: the levels f_k, leaves first, each with a strength of its own: ``L1`` (only as the first), ``GroupL2``, or any
        ``Penalty`` that is elementwise or has groups. All but the last must be convex and homogeneous, all but the first radial
        (see ``Penalty``): then the composition is exact.
      strength: λ, a number that multiplies all levels.

    Raises:
      TypeError: a level is no such penalty.
      ValueError: the groups are not nested, or an array ``step`` meets the exact metric in two or more group levels. There the
        composition is exact only for steps that are constant inside the inner groups.

    Source: Jenatton, Mairal, Obozinski, Bach, "Proximal methods for hierarchical sparse coding", 2011; Yu, "On decomposing the
    proximal map", 2013, Theorem 4.

    >>> import numpy as np
    >>> from proxopt import L1, GroupL2, Groups
    >>> rows_in_all = Nested(L1(0.5), GroupL2(1.0, Groups.along(1), weights="none"), GroupL2(1.0, weights="none"))
    >>> rows_in_all.prox(np.array([[3.5, 4.5], [0.5, 1.0]]))
    array([[1.8, 2.4],
           [0. , 0. ]])
    """

    penalties: tuple[Penalty, ...]
    strength: float | Array

    def __init__(self, *penalties: Penalty, strength: float | Array = 1.0) -> None:
        if not penalties:
            raise ValueError("penalties must hold at least one level, got none")
        for i, level in enumerate(penalties):
            _check_level(level, i, last=i == len(penalties) - 1)
        check_strength(strength)
        object.__setattr__(self, "penalties", tuple(penalties))
        object.__setattr__(self, "strength", strength)
        for declared in ("convex", "homogeneous"):
            object.__setattr__(self, declared, all(getattr(level, declared) for level in penalties))

    def __repr__(self) -> str:
        return f"Nested({', '.join(map(repr, self.penalties))}, strength={self.strength!r})"

    def with_metric(self, default: str) -> Nested:
        return Nested(*(p.with_metric(default) for p in self.penalties), strength=self.strength)

    def with_strength(self, strength: float | Array) -> Nested:
        return Nested(*self.penalties, strength=strength)

    @property
    def groups(self) -> Groups | None:
        """Those of the outermost level."""
        return getattr(self.penalties[-1], "groups", None)

    @property
    def absolute(self) -> bool:
        return all(level.absolute for level in self.penalties)

    @property
    def partition(self) -> Groups | None:
        return self.penalties[-1].partition

    def with_groups(self, groups: Groups) -> Nested:
        """This penalty with other groups in its outermost level."""
        return Nested(*self.penalties[:-1], self.penalties[-1].with_groups(groups), strength=self.strength)

    def batched(self, ndim: int) -> Nested | None:
        levels = [level for p in self.penalties if (level := p.batched(ndim)) is not None]
        complete = len(levels) == len(self.penalties) and _arrays.is_number(self.strength)
        return Nested(*levels, strength=self.strength) if complete else None

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "Nested", "penalties": plain("penalties", self.penalties, arrays=False)}

    def shrinkage(self) -> Shrinkage | None:
        forms = [level._form() for level in self.penalties]
        numbers = all(_arrays.is_number(v) for v in (self.strength, *(level.strength for level in self.penalties)))
        first, last = forms[0], forms[-1]
        if first is None or last is None or len(forms) > 2 or not numbers:
            return None
        if len(forms) == 2 and not (first.l2 is None and last.l1 is None):
            return None
        l1 = None if first.l1 is None else self.strength * first.l1
        l2 = None if last.l2 is None else self.strength * last.l2
        return Shrinkage(l1, l2, last.groups, last.weights, last.metric)

    @classmethod
    def _from_dict(cls, data: dict[str, Any], strength: float | Array) -> Nested:
        return cls(*restored(data["penalties"]), strength=strength)

    def _check(self, xs: Sequence[Array]) -> None:
        super()._check(xs)
        group_levels = [groups for _, groups in self._group_levels()]
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
        (_, inner), (_, outer) = self._group_levels()[i : i + 2]
        return inner.inside(outer, [np.broadcast_to(0.0, shape) for shape in shapes])

    def _group_levels(self) -> list[tuple[Penalty, Groups]]:
        return [(level, level.partition) for level in self.penalties if level.partition is not None]

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
        return [p if p.partition is None else p.with_groups(p.partition.from_right(xs)) for p in levels]

    def _refuse_inexact(self, xs: list[Array], steps: list[Any]) -> None:
        for (inner, groups), (outer, _) in pairwise(self._group_levels()):
            if all(getattr(level, "metric", None) not in (None, "exact") for level in (inner, outer)):
                continue
            for step, x in zip(steps, xs):
                if groups.varies(step, x) and not _constant_inside(groups, step, xs):
                    raise ValueError(
                        "metric='exact' is not the prox of two group levels where steps differ inside a group "
                        f"of {groups}: use metric='median' or 'support' in every GroupL2, or a step constant in each group"
                    )


def _check_level(level: Any, i: int, last: bool) -> None:
    """Raise where a penalty cannot be the level i: the composition of proxes would not be exact."""
    if not isinstance(level, Penalty) or not (level.elementwise or level.partition is not None):
        raise TypeError(f"penalties[{i}] must be a Penalty that is elementwise or has groups, got {type(level).__name__}")
    if i and not level.radial:
        if level.elementwise:
            raise ValueError(
                f"{type(level).__name__} must come first: its groups, the single entries, hold no group, got it as level {i}"
            )
        raise TypeError(f"penalties[{i}] must be radial, as every level but the first, got {type(level).__name__}")
    if not last and not (level.convex and level.homogeneous):
        raise TypeError(f"penalties[{i}] must be convex and homogeneous, as every level but the last, got {type(level).__name__}")


def _batched(x: Array, levels: list[Penalty]) -> Array:
    shapes = [np.shape(level.strength) for level in levels if _arrays.ndim(level.strength)]
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
    """Whether `inner` lies inside `outer` by the kinds of groups alone."""
    if inner.kind == outer.kind == "along":
        return set(inner.axes(xs[0].ndim)) <= set(outer.axes(xs[0].ndim))
    return outer.kind == "whole"
