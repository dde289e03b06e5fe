"""Duals of penalties: the smallest strength that zeroes everything, and feasible points for a duality gap."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
from array_api_compat import is_jax_array

from proxopt import _arrays
from proxopt._arrays import Array, ArrayOrList, as_list, is_number, like_input
from proxopt._loops import repeat

if TYPE_CHECKING:
    from proxopt.penalties.base import Penalty

SAFE = 1e100  # up to here, and down to its inverse, squares stay inside double precision
PROBE = 1e20  # a step at which the prox at strength 1 zeroes every entry of size 1 whose weight is not negligible


def max_strength(gradient: ArrayOrList, penalty: Penalty) -> float:
    r"""The smallest strength at which x = 0 is a stationary point of f + penalty, given the gradient g of f there.

    .. math::

        \min \{ \lambda \ge 0 : -g \in \partial (\lambda \, \text{penalty})(0) \}

    It is max|g| for ``L1``, max_g ||g_g|| / w_g for ``GroupL2``, and one root per group for ``SparseGroupLasso``. It is found by
    bisection on prox(-g) = 0, which is the same condition, to the last digits of double precision. It is then raised by
    those units in the last place that the prox needs in the gradient's own library and dtype, so that the prox of -g
    at the returned strength is all zeros there.

    Args:
      gradient: an array, or a list of arrays for one joint problem.
      penalty: a ``Penalty``. Its strength is ignored; for ``Nested`` the result is its overall factor.

    Raises:
      ValueError: the gradient is not finite, or no strength zeroes it (an elastic net with l1_ratio 0).

    >>> import numpy as np
    >>> from proxopt import L1
    >>> max_strength(np.array([0.5, -3.0]), L1(1.0))
    3.0
    """
    return zeroing_strength([(gradient, penalty)])


def zeroing_strength(problems: Sequence[tuple[ArrayOrList, Penalty]]) -> float:
    """The largest `max_strength` of pairs (gradient, penalty), at which the prox of each negative gradient is all zeros."""
    return _raised(max(_smallest_strength(gradient, penalty) for gradient, penalty in problems), problems)


def _smallest_strength(gradient: ArrayOrList, penalty: Penalty) -> float:
    """`max_strength` as double precision has it."""
    arrays, _ = as_list(gradient, "gradient")
    if not hasattr(penalty, "with_strength"):
        raise TypeError(f"penalty must be a proxopt.Penalty, got {penalty!r}")
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
    if _zeroes(0.0, scaled, penalty):  # by its domain alone
        return 0.0

    low, high = 0.0, largest / scale
    while not _zeroes(high, scaled, penalty):
        low, high = high, 2 * high
        if high > 1e200 * (largest / scale):
            raise ValueError(f"penalty must zero the gradient at some strength, but {penalty!r} never does")
    while low < (middle := (low + high) / 2) < high:
        low, high = (low, middle) if _zeroes(middle, scaled, penalty) else (middle, high)
    return high * scale


def _raised(strength: float, problems: Sequence[tuple[ArrayOrList, Penalty]]) -> float:
    """The strength, plus the fewest units in the last place with which every prox is all zeros in its own dtype."""
    if strength == 0 or all(_zeroes(strength, g, penalty) for g, penalty in problems):
        return strength
    unit = strength * max(_eps(g) for g, _ in problems) / 2

    def good(units: int) -> bool:
        return all(_zeroes(strength + units * unit, g, penalty) for g, penalty in problems)

    low, high = 0, 1
    while not good(high):
        low, high = high, 2 * high
        if high > 1 << 20:
            raise ValueError(f"penalty must zero the gradient at some strength, but no strength near {strength} does")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if good(middle) else (middle, high)
    return strength + high * unit


def _zeroes(strength: float, gradient: ArrayOrList, penalty: Penalty) -> bool:
    """Whether the prox at this strength is all zeros."""
    negative = like_input(gradient, [-g for g in as_list(gradient)[0]])
    p = penalty.with_strength(strength).prox(negative)
    parts = p if isinstance(p, (list, tuple)) else [p]
    return not any(bool(_arrays.namespace(a).any(a != 0)) for a in parts)


def _eps(gradient: Any) -> float:
    """Spacing of the dtype in which the prox of the gradient is computed, relative; the widest of a list."""
    arrays, _ = as_list(gradient)
    wide = [_arrays.widen(a) for a in arrays]
    return max(float(_arrays.namespace(a).finfo(a.dtype).eps) for a in wide)


def largest_scale(penalty: Penalty, c: Array, problems: int = 0) -> Array:
    """The largest s in [0, 1] with prox(s c) = 0, from below: for a norm, where its dual ball ends.

    With problems > 0 the first axes of c are a batch with one s each, for a penalty that acts on each entry alone.
    """
    xp = _arrays.namespace(c)
    axes = tuple(range(problems, c.ndim))
    one = xp.sum(c * 0, axis=axes) + 1  # NaN where c is not finite

    def inside(s: Array) -> Array:
        wide = xp.reshape(s, (*s.shape, *(1 for _ in axes)))
        return ~xp.any(penalty.prox(wide * c) != 0, axis=axes)

    def halve(state: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = state
        middle = (low + high) / 2
        good = inside(middle)
        return xp.where(good, middle, low), xp.where(good, high, middle)

    low, _ = repeat(52, halve, (one * 0, one))
    return xp.where(inside(one), one, low)


def unpenalised_entries(penalty: Penalty, x: Array) -> Array | None:
    """`Penalty.unpenalised`, by a prox whose step is so large that it zeroes whatever is penalised."""
    strength = getattr(penalty, "strength", 1.0)
    with untraced(x):
        ones = _arrays.full(tuple(x.shape), 1.0, x)
        if is_number(strength) and strength == 0:
            mask = ones == 1
        elif is_number(strength):
            mask = penalty.prox(ones, min(PROBE / float(strength), 1e300)) != 0
        else:
            unit = (strength != 0).astype(float) if isinstance(strength, np.ndarray) else _arrays.cast(strength != 0, ones)
            mask = penalty.with_strength(unit).prox(ones, PROBE) != 0
    return known(mask)


def known(mask: Array) -> Array | None:
    """A boolean array as a NumPy array, unless JAX traces it; None where it holds nowhere."""
    mask = _concrete(mask)
    return None if isinstance(mask, np.ndarray) and not mask.any() else mask


def untraced(x: Array) -> Any:
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


def to_numpy(x: Any) -> np.ndarray:
    """A double precision copy in host memory."""
    if hasattr(x, "detach"):
        x = x.detach().cpu().resolve_conj()
        x = x.cdouble() if x.is_complex() else x.double()
        try:
            x = x.numpy()
        except RuntimeError:  # inside torch.func, where torch before 2.10 has no tolist() either
            x = np.reshape([v.item() for v in x.reshape(-1)], tuple(x.shape))
    x = np.asarray(x)
    return np.asarray(x, dtype=np.complex128 if x.dtype.kind == "c" else np.float64)
