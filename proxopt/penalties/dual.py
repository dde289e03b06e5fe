"""Duals of penalties: the smallest strength that zeroes everything, and feasible points for a duality gap."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
from array_api_compat import is_jax_array

from proxopt import _arrays
from proxopt._arrays import Array, as_list, is_number, like_input
from proxopt._loops import repeat
from proxopt.penalties.base import Penalty
from proxopt.penalties.elementwise import L1, ElasticNet

SAFE = 1e100  # up to here, and down to its inverse, squares stay inside double precision
PROBE = 1e20  # a step at which the prox at strength 1 zeroes every entry of size 1 whose weight is not negligible


def max_strength(gradient: Any, penalty: Penalty) -> float:
    """The smallest strength at which x = 0 is a stationary point of f + penalty, given the gradient of f there.

        min { strength : -gradient lies in the subdifferential of the penalty at 0 }

    which is max|g| for `L1`, max_g ||g_g|| / w_g for `GroupL2`, and one root per group for `SparseGroupLasso`. It is found by
    bisection on prox(gradient) = 0, which is the same condition, to the last digits of double precision, and then raised by
    those units in the last place that the prox needs in the gradient's own library and dtype: the prox of the gradient at the
    returned strength is all zeros there. The strength of `penalty` is ignored; for `Nested` the result is its overall factor.

    Args:
      gradient: an array, or a list of arrays for one joint problem.
      penalty: any penalty of proxopt.

    Raises:
      ValueError: the gradient is not finite, or no strength zeroes it (an elastic net with l1_ratio 0).

    >>> import numpy as np
    >>> from proxopt import L1
    >>> max_strength(np.array([0.5, -3.0]), L1(1.0))
    3.0
    """
    return zeroing_strength([(gradient, penalty)])


def zeroing_strength(problems: Sequence[tuple[Any, Penalty]]) -> float:
    """The largest `max_strength` of pairs (gradient, penalty), at which the prox of each gradient is all zeros."""
    return _raised(max(_smallest_strength(gradient, penalty) for gradient, penalty in problems), problems)


def _smallest_strength(gradient: Any, penalty: Penalty) -> float:
    """`max_strength` as double precision has it."""
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
    scale = 1.0 if 1 / SAFE < largest < SAFE else largest
    scaled = like_input(g, [a / scale for a in parts])

    low, high = 0.0, largest / scale
    while not _zeroes(high, scaled, penalty):
        low, high = high, 2 * high
        if high > 1e200 * (largest / scale):
            raise ValueError(f"penalty must zero the gradient at some strength, but {penalty!r} never does")
    while low < (middle := (low + high) / 2) < high:
        low, high = (low, middle) if _zeroes(middle, scaled, penalty) else (middle, high)
    return high * scale


def _raised(strength: float, problems: Sequence[tuple[Any, Penalty]]) -> float:
    """The strength, plus the fewest units in the last place with which every prox is all zeros in its own dtype."""
    if strength == 0 or all(_zeroes(strength, g, penalty) for g, penalty in problems):
        return strength
    unit = strength * max(_eps(g) for g, _ in problems) / 2
    good = lambda units: all(_zeroes(strength + units * unit, g, penalty) for g, penalty in problems)
    low, high = 0, 1
    while not good(high):
        low, high = high, 2 * high
        if high > 1 << 20:
            raise ValueError(f"penalty must zero the gradient at some strength, but no strength near {strength} does")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if good(middle) else (middle, high)
    return strength + high * unit


def _zeroes(strength: float, gradient: Any, penalty: Penalty) -> bool:
    """Whether the prox at this strength is all zeros."""
    p = penalty.with_strength(strength).prox(gradient)
    parts = p if isinstance(p, (list, tuple)) else [p]
    return not any(bool(_arrays.namespace(a).any(a != 0)) for a in parts)


def _eps(gradient: Any) -> float:
    """Spacing of the dtype in which the prox of the gradient is computed, relative; the widest of a list."""
    arrays, _ = as_list(gradient)
    wide = [_arrays.widen(a) for a in arrays]
    return max(float(_arrays.namespace(a).finfo(a.dtype).eps) for a in wide)


def dual_scale(penalty: Any, c: Array, problems: int = 0) -> tuple[Array, Any] | None:
    """(s, g*(s c)): the largest s in [0, 1] for which the conjugate g* of the penalty is finite at s c, and its value there.

    Both are exact up to rounding. Numbers that are not finite come out as NaN, as does a negative strength.

    Args:
      penalty: any convex penalty of proxopt; None is the answer for others.
      c: the point, 0 where `unpenalised` holds: there g* is infinite anywhere else, and s would be 0. Its first `problems` axes
        are a batch, which needs a penalty that sees each entry alone.
    """
    xp = _arrays.namespace(c)
    axes = tuple(range(problems, c.ndim))
    if isinstance(penalty, ElasticNet) and penalty.l1_ratio < 1:
        strength = _arrays.like(penalty.strength, c) + 0 * c
        excess = xp.abs(c) - strength * penalty.l1_ratio
        excess = xp.where(excess <= 0, 0.0, excess)  # NaN stays
        curvature = strength * (1 - penalty.l1_ratio)
        parts = excess * (excess / xp.where(curvature > 0, 2 * curvature, 1.0))
        parts = xp.where((curvature == 0) & (excess > 0), np.inf, parts)
        parts = xp.where(strength < 0, np.nan, parts)
        return _arrays.full(tuple(c.shape[:problems]), 1.0, c), xp.sum(parts, axis=axes)
    if isinstance(penalty, (L1, ElasticNet)):
        strength = _arrays.like(penalty.strength, c) + 0 * c
        lies_in = xp.abs(c) <= strength
        shares = xp.where(lies_in, 1.0, strength / xp.where(lies_in, 1.0, xp.abs(c)))
        shares = xp.where(strength < 0, np.nan, shares)
        return (xp.min(shares, axis=axes) if _arrays.size(c) else xp.sum(c, axis=axes) + 1), 0.0
    return (_largest_scale(xp, penalty, c), 0.0) if has_dual(penalty, problems) else None


def has_dual(penalty: Any, problems: int = 0) -> bool:
    """Whether `dual_scale` has an answer for this penalty and so many axes of problems."""
    if isinstance(penalty, (L1, ElasticNet)):
        return True
    return isinstance(penalty, Penalty) and penalty.homogeneous and penalty.convex and not problems


def unpenalised(penalty: Any, x: Array) -> Array | None:
    """Which entries of x a penalty with a `dual_scale` does not depend on: a boolean array of x's shape; None for none of them.

    They have strength 0 or are in groups of weight 0. Entries of less than 1e-20 of the usual weight may be among them. Of x only
    the shape, dtype and library matter. The result is a NumPy array, unless JAX traces the parameters of the penalty.
    """
    strength = getattr(penalty, "strength", 1.0)
    if isinstance(penalty, (L1, ElasticNet)) and is_number(strength) and strength > 0:
        return None
    with _untraced(x):
        mask = _mask(penalty, strength, _arrays.full(tuple(x.shape), 1.0, x))
    mask = _concrete(mask)
    return None if isinstance(mask, np.ndarray) and not mask.any() else mask


def _mask(penalty: Any, strength: Any, ones: Array) -> Array:
    xp = _arrays.namespace(ones)
    if is_number(strength) and strength == 0:
        return ones == 1
    if isinstance(penalty, (L1, ElasticNet)):
        return xp.broadcast_to(_arrays.like(strength, ones), ones.shape) == 0
    if is_number(strength):
        return penalty.prox(ones, min(PROBE / float(strength), 1e300)) != 0
    unit = (strength != 0).astype(float) if isinstance(strength, np.ndarray) else _arrays.cast(strength != 0, ones)
    return penalty.with_strength(unit).prox(ones, PROBE) != 0


def _untraced(x: Array) -> Any:
    """Where JAX computes at once what it has the values of, while it traces other things."""
    if _arrays.is_numpy_array(x) or _arrays.is_torch_array(x) or not is_jax_array(x):
        return nullcontext()
    import jax

    return jax.ensure_compile_time_eval()


def _concrete(mask: Array) -> Array:
    if _arrays.is_torch_array(mask):
        return to_numpy(mask) != 0
    if not _arrays.is_numpy_array(mask) and is_jax_array(mask):
        import jax

        return mask if isinstance(mask, jax.core.Tracer) else np.asarray(mask)
    return np.asarray(mask)


def _largest_scale(xp: Any, penalty: Penalty, c: Array) -> Array:
    """The largest s in [0, 1] with prox(s c) = 0, from below: for a norm, where its dual ball ends."""
    one = xp.sum(c * 0) + 1  # NaN where c is not finite
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
        x = x.detach().cpu().resolve_conj()
        x = x.cdouble() if x.is_complex() else x.double()
        try:
            x = x.numpy()
        except RuntimeError:  # inside torch.func
            x = x.tolist()
    x = np.asarray(x)
    return np.asarray(x, dtype=np.complex128 if x.dtype.kind == "c" else np.float64)
