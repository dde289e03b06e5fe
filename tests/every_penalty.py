"""One row for every penalty: the tests of the same name in core/, torch/ and jax/ take each of them through the whole package.

A new penalty is added here once. The last rows are penalties that are defined outside of the package, as a user would.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from array_api_compat import array_namespace

from proxopt import L1, ElasticNet, GroupL2, Groups, Nested, Penalty, Shrinkage, SparseGroupLasso
from proxopt.penalties.metric import norms
from proxopt.penalties.shrinkage import one_step_per_group


def log_prox(size: Any, weight: Any, epsilon: float) -> Any:
    """The minimiser over z >= 0 of ``weight log(1 + z / epsilon) + (z - size)^2 / 2`` for size >= 0."""
    xp = array_namespace(size)
    discriminant = (size + epsilon) ** 2 - 4 * weight
    inside = discriminant >= 0
    z = size - 2 * weight / (size + epsilon + xp.sqrt(xp.where(inside, discriminant, 0.0 * size)))
    z = xp.where(z > 0, z, 0.0 * size)
    gain = size**2 / 2 - (z - size) ** 2 / 2 - weight * xp.log(1 + z / epsilon)
    return xp.where(inside & (gain > 0), z, 0.0 * size)


@dataclass(frozen=True, eq=False)
class Log(Penalty):
    """``strength sum_i log(1 + |x_i| / epsilon)``, which is not convex."""

    strength: Any
    epsilon: float = 0.5
    convex = homogeneous = False
    elementwise = True

    def entries(self, x):
        xp = array_namespace(x)
        return self.strength * xp.log(1 + xp.abs(x) / self.epsilon)

    def _prox(self, xs, steps):
        xp = array_namespace(*xs)
        return [xp.sign(x) * log_prox(xp.abs(x), step * self.strength, self.epsilon) for x, step in zip(xs, steps)]


@dataclass(frozen=True, eq=False)
class GroupLog(Penalty):
    """``strength sum_g log(1 + ||x_g|| / epsilon)``, with a prox of its own that keeps the direction of each group."""

    strength: Any
    epsilon: float = 0.5
    groups: Groups | None = None
    metric: str | None = None
    convex = homogeneous = False
    radial = True

    def _value(self, xs):
        xp = array_namespace(*xs)
        return self.strength * xp.sum(xp.log(1 + norms(xp, xs, self.partition) / self.epsilon))

    def _prox(self, xs, steps):
        xp = array_namespace(*xs)
        groups = self.partition.from_right(xs)
        step = one_step_per_group(xp, xs, steps, groups, "median" if self.metric == "median" else "support")
        size = norms(xp, xs, groups)
        share = log_prox(size, step * self.strength, self.epsilon) / xp.where(size > 0, size, 1.0 + 0.0 * size)
        return [x * s + 0.0 for x, s in zip(xs, groups.spread(share, xs))]


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
    Row("Ridge", Ridge(0.5)),
]
