"""The sparse group lasso: single entries and whole groups become zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from proxopt import _arrays, _checks
from proxopt._arrays import Array
from proxopt.groups import Groups
from proxopt.penalties.base import Penalty, check_strength
from proxopt.penalties.elementwise import shrink_entries, weighted_l1
from proxopt.penalties.group import check_group_options, group_prox, group_value, per_group


@dataclass(frozen=True, eq=False)
class SparseGroupLasso(Penalty):
    """f(x) = strength * (l1_ratio * ||x||_1 + (1 - l1_ratio) * sum_g w_g ||x_g||_2).

    With s = step * strength, the prox is a soft threshold of each entry, then a shrink of each group:

        u         = sign(x) max(|x| - s * l1_ratio, 0)
        prox(x)_g = max(1 - s * (1 - l1_ratio) * w_g / ||u_g||, 0) u_g

    Args:
      strength: a number >= 0, or an array that broadcasts against x and is constant inside each group.
      l1_ratio: share of the L1 part, in [0, 1]; alpha in SparseNAS.
      groups, weights, metric: as in `GroupL2`.

    Source: Simon, Friedman, Hastie, Tibshirani, "A sparse-group lasso", 2013; SparseNAS Eq. 3, 9, 10.

    >>> import numpy as np
    >>> from proxopt import Groups
    >>> x = np.array([[3.5, 0.5], [4.5, 0.5]])
    >>> SparseGroupLasso(1.0, l1_ratio=0.5, groups=Groups.along(0), weights="none").prox(x)
    array([[2.7, 0. ],
           [3.6, 0. ]])
    """

    strength: Any
    l1_ratio: float = 0.5
    groups: Groups | None = None
    weights: Any = "sqrt_size"
    metric: str | None = None

    def __post_init__(self) -> None:
        check_strength(self.strength)
        _checks.in_range("l1_ratio", self.l1_ratio, 0, 1)
        check_group_options(self.groups, self.weights, self.metric)

    @property
    def _groups(self) -> Groups:
        return self.groups or Groups.whole()

    def _check(self, xs: Sequence[Array]) -> None:
        super()._check(xs)
        self._groups.check(xs)

    def _value(self, xs: list[Array]) -> Array:
        l1 = weighted_l1(xs, self.strength)
        return self.l1_ratio * l1 + (1 - self.l1_ratio) * group_value(xs, self._groups, self.weights, self.strength)

    def _prox(self, xs: list[Array], steps: list[Any]) -> list[Array]:
        groups, strength = per_group(xs, steps, self._groups, self.strength)
        threshold = [_arrays.like(self.strength, x) * self.l1_ratio for x in xs]
        sparse = [shrink_entries(x, s * t) for x, s, t in zip(xs, steps, threshold)]
        if _arrays.is_number(self.l1_ratio) and self.l1_ratio == 1:
            return sparse
        return group_prox(sparse, steps, groups, self.weights, strength * (1 - self.l1_ratio), self.metric)
