"""Duals of penalties: the smallest strength that zeroes everything, and feasible points for a duality gap."""

from __future__ import annotations

from typing import Any

import numpy as np

from proxopt import _arrays
from proxopt._arrays import Array, as_list, is_number, like_input
from proxopt._loops import repeat
from proxopt.penalties.base import Penalty
from proxopt.penalties.elementwise import L1, ElasticNet


def max_strength(gradient: Any, penalty: Penalty) -> float:
    """The smallest strength at which x = 0 is a stationary point of f + penalty, given the gradient of f there.

        min { strength : -gradient lies in the subdifferential of the penalty at 0 }

    which is max|g| for `L1`, max_g ||g_g|| / w_g for `GroupL2`, and one root per group for `SparseGroupLasso`. It is found by
    bisection on prox(gradient) = 0, which is the same condition, to the last digits of double precision. The strength of
    `penalty` is ignored; for `Nested` the result is its overall factor.

    Args:
      gradient: an array, or a list of arrays for one joint problem.
      penalty: any penalty of proxopt.

    Raises:
      ValueError: the gradient is not finite, or no strength zeroes it (an elastic net with l1_ratio 0).

    >>> import numpy as np
    >>> from proxopt import L1
    >>> round(max_strength(np.array([0.5, -3.0]), L1(1.0)), 9)
    3.0
    """
    arrays, _ = as_list(gradient, "gradient")
    if not is_number(penalty.strength):
        raise ValueError(f"penalty must have a number as strength, got an array of shape {np.shape(penalty.strength)}")
    g = like_input(gradient, [to_numpy(a) for a in arrays])
    parts = g if isinstance(g, (list, tuple)) else [g]
    largest = max((float(np.max(np.abs(a), initial=0.0)) for a in parts), default=0.0)
    if not np.isfinite(largest):
        raise ValueError(f"gradient must be finite, got {largest}")
    if largest == 0:
        penalty.with_strength(1.0).prox(g)  # a penalty that does not fit is an error here too
        return 0.0
    scaled = like_input(g, [a / largest for a in parts])

    def all_zero(strength: float) -> bool:
        p = penalty.with_strength(strength).prox(scaled)
        return not any(np.any(a) for a in (p if isinstance(p, (list, tuple)) else [p]))

    low, high = 0.0, 1.0
    while not all_zero(high):
        low, high = high, 2 * high
        if high > 1e200:
            raise ValueError(f"penalty must zero the gradient at some strength, but {penalty!r} never does")
    while low < (middle := (low + high) / 2) < high:
        low, high = (low, middle) if all_zero(middle) else (middle, high)
    return high * largest


def dual_scale(penalty: Any, c: Array, problems: int = 0) -> tuple[Array, Any] | None:
    """(s, g*(s c)): the largest s in [0, 1] for which the conjugate g* of the penalty is finite at s c, and its value there.

    Args:
      penalty: any penalty of proxopt; None is the answer for others.
      c: the point; its first `problems` axes are a batch, which needs a penalty that sees each entry alone.
    """
    xp = _arrays.namespace(c)
    axes = tuple(range(problems, c.ndim))
    if isinstance(penalty, ElasticNet) and penalty.l1_ratio < 1:
        excess = xp.abs(c) - _arrays.like(penalty.strength, c) * penalty.l1_ratio
        excess = xp.where(excess > 0, excess, 0.0)
        curvature = _arrays.like(penalty.strength, c) * (1 - penalty.l1_ratio) + 0 * c
        parts = xp.where(excess > 0, excess * excess / (2 * xp.where(curvature > 0, curvature, 1.0)), 0.0)
        parts = xp.where((excess > 0) & (curvature == 0), np.inf, parts)
        total = xp.sum(parts, axis=axes)
        return total * 0 + 1, total
    if isinstance(penalty, (L1, ElasticNet)):
        strength = _arrays.like(penalty.strength, c) + 0 * c
        lies_in = xp.abs(c) <= strength
        shares = xp.where(lies_in, 1.0, strength / xp.where(lies_in, 1.0, xp.abs(c)))
        return (xp.min(shares, axis=axes) if _arrays.size(c) else xp.sum(c, axis=axes) + 1), 0.0
    if not isinstance(penalty, Penalty) or not penalty.homogeneous or problems:
        return None
    return _largest_scale(xp, penalty, c), 0.0


def _largest_scale(xp: Any, penalty: Penalty, c: Array) -> Array:
    """The largest s in [0, 1] with prox(s c) = 0, from below: for a norm, where its dual ball ends."""
    one = xp.sum(c * 0) + 1
    inside = lambda s: ~xp.any(penalty.prox(s * c) != 0)

    def halve(state: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = state
        middle = (low + high) / 2
        good = inside(middle)
        return xp.where(good, middle, low), xp.where(good, high, middle)

    low, _ = repeat(52, halve, (one * 0, one))
    return xp.where(inside(one), one, low)


def to_numpy(x: Any) -> np.ndarray:
    """A double precision copy in host memory."""
    if hasattr(x, "detach"):
        x = x.detach().cpu().double()
    return np.asarray(x, dtype=np.float64)
