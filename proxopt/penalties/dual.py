"""The smallest strength that zeroes everything: where a regularisation path starts."""

from __future__ import annotations

from typing import Any

import numpy as np

from proxopt._arrays import as_list, is_number, like_input
from proxopt.penalties.base import Penalty


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


def to_numpy(x: Any) -> np.ndarray:
    """A double precision copy in host memory."""
    if hasattr(x, "detach"):
        x = x.detach().cpu().double()
    return np.asarray(x, dtype=np.float64)
