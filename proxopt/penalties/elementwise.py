"""Penalties that see each entry alone: the soft threshold, the L1 norm, the elastic net."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from proxopt import _arrays, _checks
from proxopt._arrays import Array
from proxopt.penalties.base import Penalty, check_strength


def soft_threshold(x: Array, threshold: Any) -> Array:
    """sign(x) max(|x| - threshold, 0): the prox of threshold * ||x||_1.

    Computed as x - clip(x, -threshold, threshold), which is one pass less and never returns -0 for a dead
    entry. A complex entry shrinks in modulus. At threshold 0 it is the identity, in its gradient too.

    Args:
      x: a floating-point array.
      threshold: a number >= 0 or an array that broadcasts against x.

    >>> import numpy as np
    >>> soft_threshold(np.array([-3.0, 0.5, 2.0]), 1.0)
    array([-2.,  0.,  1.])
    """
    _checks.in_range("threshold", threshold)
    (x,), _ = _arrays.as_list(x)
    wide = _arrays.widen(x)
    return _arrays.cast(shrink_entries(wide, _arrays.like(threshold, wide)), x)


def shrink_entries(x: Array, t: Any) -> Array:
    """`soft_threshold` inside the doors: nothing is checked, t is a float or an array of x's library and real dtype."""
    xp = _arrays.namespace(x)
    if isinstance(t, float) and t == 0:
        return x * 1
    if _arrays.is_complex(x):
        modulus = xp.abs(x)
        dead = modulus <= t
        scale = 1 - t / xp.where(dead, xp.ones_like(modulus), modulus)
        return x * xp.where(dead, xp.zeros_like(scale), scale)
    clipped = _arrays.clip(x, t)
    if not isinstance(t, float):  # a clip to [0, 0] would still carry half a gradient at x = 0
        clipped = xp.where(t > 0, clipped, xp.zeros_like(clipped))
    return x - clipped


@dataclass(frozen=True, eq=False)
class L1(Penalty):
    """f(x) = strength * ||x||_1, with prox(x) = soft_threshold(x, step * strength).

    Args:
      strength: a number >= 0, or an array that broadcasts against x (the weighted lasso).

    Source: Tibshirani, "Regression shrinkage and selection via the lasso", 1996; SparseNAS Eq. 9.

    >>> import numpy as np
    >>> L1(1.0).prox(np.array([-3.0, 0.5, 2.0]), step=0.5)
    array([-2.5,  0. ,  1.5])
    """

    strength: Any

    def __post_init__(self) -> None:
        check_strength(self.strength)

    def entries(self, x: Array) -> Array:
        """What each entry of an array contributes to the value."""
        return _arrays.like(self.strength, x) * _arrays.namespace(x).abs(x)

    def _value(self, xs: list[Array]) -> Array:
        return weighted_l1(xs, self.strength)

    def _prox(self, xs: list[Array], steps: list[Any]) -> list[Array]:
        return [shrink_entries(x, s * _arrays.like(self.strength, x)) for x, s in zip(xs, steps)]


@dataclass(frozen=True, eq=False)
class ElasticNet(Penalty):
    """f(x) = strength * (l1_ratio * ||x||_1 + (1 - l1_ratio) / 2 * ||x||^2).

        prox(x) = soft_threshold(x, step * strength * l1_ratio) / (1 + step * strength * (1 - l1_ratio))

    Args:
      strength: a number >= 0, or an array that broadcasts against x.
      l1_ratio: share of the L1 part, in [0, 1].

    Source: Zou and Hastie, "Regularization and variable selection via the elastic net", 2005.

    >>> import numpy as np
    >>> ElasticNet(1.0, l1_ratio=0.5).prox(np.array([-3.5, 0.5, 2.0]))
    array([-2.,  0.,  1.])
    """

    strength: Any
    l1_ratio: float = 0.5
    homogeneous: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_strength(self.strength)
        _checks.in_range("l1_ratio", self.l1_ratio, 0, 1)

    def entries(self, x: Array) -> Array:
        """What each entry of an array contributes to the value."""
        size = _arrays.namespace(x).abs(x)
        return _arrays.like(self.strength, x) * (self.l1_ratio * size + (1 - self.l1_ratio) / 2 * size**2)

    def _value(self, xs: list[Array]) -> Array:
        sums = [_arrays.namespace(x).sum(self.entries(x)) for x in xs]
        return sum(sums[1:], start=sums[0])

    def _prox(self, xs: list[Array], steps: list[Any]) -> list[Array]:
        out = []
        for x, step in zip(xs, steps):
            s = step * _arrays.like(self.strength, x)
            out.append(shrink_entries(x, s * self.l1_ratio) / (1 + s * (1 - self.l1_ratio)))
        return out


def weighted_l1(xs: list[Array], strength: Any) -> Array:
    """strength * ||x||_1 over all arrays."""
    sums = [_arrays.namespace(x).sum(_arrays.like(strength, x) * _arrays.namespace(x).abs(x)) for x in xs]
    return sum(sums[1:], start=sums[0])
