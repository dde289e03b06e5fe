"""Penalties that act on each entry alone: the L1 norm and the elastic net."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from proxopt import _arrays, _checks
from proxopt._arrays import Array
from proxopt.penalties.base import Penalty, check_strength
from proxopt.penalties.dual import known, untraced
from proxopt.penalties.shrinkage import Shrinkage, soft


class _EntryStrengths:
    """What the penalties of this file share: a strength for each entry, and a dual in closed form."""

    strength: float | Array
    elementwise = True
    absolute = True

    def has_dual(self, problems: int = 0) -> bool:
        return True

    def unpenalised(self, x: Array) -> Array | None:
        if _arrays.is_number(self.strength) and self.strength > 0:
            return None
        with untraced(x):
            ones = _arrays.full(tuple(x.shape), 1.0, x)
            mask = _arrays.namespace(x).broadcast_to(_arrays.like(self.strength, ones) + 0 * ones, ones.shape) == 0
        return known(mask)


@dataclass(frozen=True, eq=False)
class L1(_EntryStrengths, Penalty):
    r"""The L1 norm, with a soft threshold as its prox.

    .. math::

        f(x) = \lambda \|x\|_1, \qquad
        \operatorname{prox}(x) = \operatorname{sign}(x) \max(|x| - \text{step} \cdot \lambda, 0)

    Args:
      strength: λ, a number >= 0, or an array that broadcasts against x (the weighted lasso).

    Source: Tibshirani, "Regression shrinkage and selection via the lasso", 1996; SparseNAS Eq. 9.

    >>> import numpy as np
    >>> L1(1.0).prox(np.array([-3.0, 0.5, 2.0]), step=0.5)
    array([-2.5,  0. ,  1.5])
    """

    strength: float | Array

    def shrinkage(self) -> Shrinkage:
        return Shrinkage(l1=self.strength)

    def entries(self, x: Array) -> Array:
        return _arrays.like(self.strength, x) * _arrays.modulus(_arrays.namespace(x), x)

    def dual(self, c: Array, problems: int = 0) -> tuple[Array, float | Array]:
        return _scale_into_box(c, self.strength, problems)


@dataclass(frozen=True, eq=False)
class ElasticNet(_EntryStrengths, Penalty):
    r"""The elastic net: the L1 norm and half the square of the L2 norm.

    .. math::

        f(x) = \lambda \left(\alpha \|x\|_1 + \frac{1 - \alpha}{2} \|x\|_2^2\right), \qquad
        \operatorname{prox}(x) = \frac{\operatorname{soft}(x, s \alpha)}{1 + s (1 - \alpha)}, \quad s = \text{step} \cdot \lambda

    Args:
      strength: λ, a number >= 0, or an array that broadcasts against x.
      l1_ratio: α, the share of the L1 part, in [0, 1].

    Source: Zou and Hastie, "Regularization and variable selection via the elastic net", 2005.

    >>> import numpy as np
    >>> ElasticNet(1.0, l1_ratio=0.5).prox(np.array([-3.5, 0.5, 2.0]))
    array([-2.,  0.,  1.])
    """

    strength: float | Array
    l1_ratio: float = 0.5
    homogeneous = False

    def __post_init__(self) -> None:
        check_strength(self.strength)
        _checks.in_range("l1_ratio", self.l1_ratio, 0, 1)

    def entries(self, x: Array) -> Array:
        xp = _arrays.namespace(x)
        parts = self.l1_ratio * _arrays.modulus(xp, x) + (1 - self.l1_ratio) / 2 * _arrays.square(xp, x)
        return _arrays.like(self.strength, x) * parts

    def _prox(self, xs: list[Array], steps: list[Any]) -> list[Array]:
        xp = _arrays.namespace(*xs)
        out = []
        for x, step in zip(xs, steps):
            s = step * _arrays.like(self.strength, x)
            out.append(soft(xp, x, s * self.l1_ratio) / (1 + s * (1 - self.l1_ratio)))
        return out

    def dual(self, c: Array, problems: int = 0) -> tuple[Array, float | Array]:
        if self.l1_ratio == 1:
            return _scale_into_box(c, self.strength, problems)
        xp = _arrays.namespace(c)
        strength = _arrays.like(self.strength, c) + 0 * c
        excess = xp.abs(c) - strength * self.l1_ratio
        excess = xp.where(excess <= 0, 0.0, excess)  # NaN stays
        curvature = strength * (1 - self.l1_ratio)
        parts = excess * (excess / xp.where(curvature > 0, 2 * curvature, 1.0))
        parts = xp.where((curvature == 0) & (excess > 0), np.inf, parts)
        parts = xp.where(strength < 0, np.nan, parts)
        return _arrays.full(tuple(c.shape[:problems]), 1.0, c), xp.sum(parts, axis=tuple(range(problems, c.ndim)))


def _scale_into_box(c: Array, bound: Any, problems: int) -> tuple[Array, float]:
    """The largest s in [0, 1] with ``|s c| <= bound``, and the conjugate of the L1 norm there, which is 0."""
    xp = _arrays.namespace(c)
    axes = tuple(range(problems, c.ndim))
    bound = _arrays.like(bound, c) + 0 * c
    lies_in = xp.abs(c) <= bound
    shares = xp.where(lies_in, 1.0, bound / xp.where(lies_in, 1.0, xp.abs(c)))
    shares = xp.where(bound < 0, np.nan, shares)
    return (xp.min(shares, axis=axes) if _arrays.size(c) else xp.sum(c, axis=axes) + 1), 0.0
