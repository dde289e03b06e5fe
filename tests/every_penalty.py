"""One row for every penalty: the tests of the same name in core/, torch/ and jax/ take each of them through the whole package.

A new penalty is added here once. The last rows are penalties that are defined outside of the package.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from array_api_compat import array_namespace
from own_penalty import GroupLog, Log

from proxopt import L1, ElasticNet, GroupL2, Groups, Nested, NonNegative, Penalty, Shrinkage, SparseGroupLasso


@dataclass(frozen=True, eq=False)
class SquareRootGroup(Penalty):
    """A group norm whose weights are the fourth roots of the sizes: it states its form and nothing else."""

    strength: Any
    size: int = 4
    groups: Groups | None = None
    radial = True

    def shrinkage(self):
        return Shrinkage(l2=self.strength * self.size**0.25, groups=self.groups, weights="none")


@dataclass(frozen=True, eq=False)
class Ridge(Penalty):
    """``strength / 2 ||x||^2``, which declares nothing but that it is not homogeneous."""

    strength: Any
    homogeneous = False

    def _value(self, xs):
        xp = array_namespace(*xs)
        return sum(xp.sum(x * x) for x in xs) * self.strength / 2

    def _prox(self, xs, steps):
        return [x / (1 + s * self.strength) for x, s in zip(xs, steps)]


class Row(NamedTuple):
    """A penalty with shapes of arrays that it takes; several are one joint problem. step: whether it takes arrays as step."""

    name: str
    penalty: Penalty
    shapes: tuple[tuple[int, ...], ...] = ((4, 3),)
    array_step: bool = True


COLUMNS = Groups.along(0)

ROWS = [
    Row("L1", L1(0.3)),
    Row("ElasticNet", ElasticNet(0.3, 0.4)),
    Row("GroupL2", GroupL2(0.2, COLUMNS)),
    Row("GroupL2 joint", GroupL2(0.2, Groups.labels([[0, 1, 0, 2], [1, 2]])), ((4, 3), (2,))),
    Row("SparseGroupLasso", SparseGroupLasso(0.3, 0.4, COLUMNS)),
    Row("Nested", Nested(L1(0.1), GroupL2(0.2, COLUMNS))),
    Row("Nested of groups", Nested(GroupL2(0.1, COLUMNS), GroupL2(0.2)), array_step=False),
    Row("Log", Log(0.1)),
    Row("Log of large steps", Log(0.4)),
    Row("GroupLog", GroupLog(0.2, groups=COLUMNS), array_step=False),
    Row("GroupLog joint", GroupLog(0.2, groups=Groups.labels([[0, 1, 0, 2], [1, 2]])), ((4, 3), (2,)), array_step=False),
    Row("Nested with an outer GroupLog", Nested(L1(0.1), GroupLog(0.2, groups=COLUMNS)), array_step=False),
    Row("SquareRootGroup", SquareRootGroup(0.3, groups=COLUMNS)),
    Row("NonNegative", NonNegative(SparseGroupLasso(0.2, 0.4, COLUMNS))),
    Row("Ridge", Ridge(0.5)),
]
