"""The soft threshold of entries, then of groups, for XLA: the prox of ``Shrinkage`` in fewer passes over memory.

XLA turns each reduction into one pass over memory, in which it computes the reduced expression from its inputs. Expensive
expressions (divisions, roots) that two reductions share are stored instead, in arrays as large as the parameters. Here each pass
has one reduction, over an expression of its own, and the number of passes is small:

- The norm of a group is compared to its threshold t as ||x / t|| > 1. Where the square of an entry of x / t overflows or
  underflows, the comparison has the same result, and the group needs no scaling by its largest entry.
- The equation of the exact metric is solved by the secant method, with one reduction for each step, and not two as in Newton's.
- The median is found by bisection on the bit patterns of floating-point numbers, not by sorting.

Results equal those of ``Shrinkage.prox`` up to rounding, with the same zeros.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from proxopt import _arrays
from proxopt.penalties import declared

CLOSE = 1e-3  # relative move at which the secant method stops: Newton's method then squares the error
SECANT_STEPS = 40  # enough for steps that spread over 20 decades; usually 3 to 5 are taken
SECANT_STEPS_GPU = 10  # all taken, because each look at a result would wait for the device
COUNTABLE = 1 << 24  # entries of a group that can be counted in float32


def fused(penalty: Any) -> Any:
    """The penalty with the prox of this module; None for None."""
    return None if penalty is None else Fused(penalty)


@dataclass(frozen=True)
class Fused:
    """A penalty for one array, whose prox takes the passes of this module where the penalty has the form for them."""

    penalty: Any

    def value(self, x: Any) -> Any:
        """That of the penalty."""
        return self.penalty.value(x)

    def with_metric(self, default: str) -> Fused:
        """The penalty with ``default`` where it leaves its metric to the caller."""
        return Fused(declared.with_metric(self.penalty, default))

    def prox(self, x: Any, step: Any) -> Any:
        """The prox of the penalty."""
        form = _form(self.penalty, x)
        if form is None or jnp.ndim(step) not in (0, x.ndim):
            return self.penalty.prox(x, step)
        wide = _arrays.widen(x)
        return _prox(wide, _arrays.like(step, wide), form).astype(x.dtype)


@dataclass(frozen=True)
class _Form:
    """The thresholds of entries and of groups at step 1, None where there are none, the axes inside groups, and the metric."""

    l1: Any
    bound: Any
    axes: tuple[int, ...]
    metric: str


def _form(penalty: Any, x: Any) -> _Form | None:
    """The form, if its strengths are single numbers, traced or not, and its groups are all slices of a real array."""
    form = None if isinstance(x, (list, tuple)) else declared.shrinkage(penalty)
    if form is None or not jnp.issubdtype(x.dtype, jnp.floating) or not x.size or _arrays.ndim(form.l1) or _arrays.ndim(form.l2):
        return None
    unit = replace(form, l1=0.0, l2=None if form.l2 is None else 1.0).thresholds(x)
    if unit is None:
        return None
    _, weight, axes = unit
    wide = _arrays.widen(x)
    l1 = None if form.l1 is None else _arrays.like(form.l1, wide)
    bound = None if form.l2 is None else _arrays.like(form.l2, wide) * weight
    return _Form(l1, bound, axes, form.metric or "exact")


def _prox(x: jax.Array, step: Any, form: _Form) -> jax.Array:
    if form.l1 is not None:
        x = _soft(x, step * form.l1)
    if form.bound is None or (isinstance(form.bound, float) and form.bound == 0):
        return x
    if not jnp.ndim(step):
        return _shrunk(x, step * form.bound, form.axes)
    if form.metric == "median":
        return _shrunk(x, _at_least_tiny(median(step, form.axes) * form.bound, x), form.axes)
    threshold = _at_least_tiny(step * form.bound, x)
    return _shrunk(x, threshold, form.axes) if form.metric == "support" else _exactly_shrunk(x, threshold, form.axes)


def _sum(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return jnp.sum(x, axis=axes, keepdims=True)


def _at_least_tiny(t: Any, x: jax.Array) -> Any:
    """t, or the smallest normal number where it is smaller, by which any number may be divided."""
    tiny = float(jnp.finfo(x.dtype).smallest_normal)
    return max(t, tiny) if isinstance(t, float) else jnp.maximum(t, tiny)


def _soft(x: jax.Array, t: Any) -> jax.Array:
    """``proxopt.soft_threshold``, with the same derivatives."""
    if isinstance(t, float):
        return x if t == 0 else jnp.where(jnp.abs(x) <= t, 0, jnp.where(x < 0, x + t, x - t))
    return jnp.where((jnp.abs(x) <= t) & (t > 0), 0, jnp.where(x < 0, x + t, x - t))


def _shrunk(x: jax.Array, threshold: Any, axes: tuple[int, ...]) -> jax.Array:
    """``max(1 - 1 / ||x / t||, 0) x`` for each group, which for a single threshold t is ``max(1 - t / ||x||, 0) x``.

    For thresholds t > 0 that differ inside a group it is the shrink by the one step of the metric "support".
    """
    if isinstance(threshold, float) and threshold == 0:
        return x
    square = _square_of_ratio(x, threshold, axes)
    regular = (square > 1) & jnp.isfinite(square)
    share = 1 - 1 / jnp.sqrt(jnp.where(regular, square, 1))
    # where the square is infinite, 1 - t / ||x|| rounds to 1; NaN remains NaN
    share = jnp.where(regular, share, jnp.where(square <= 1, 0.0, jnp.where(square > 1, 1.0, square)))
    return x * share + 0.0  # + 0.0 turns -0 into 0


def _square_of_ratio(x: jax.Array, threshold: Any, axes: tuple[int, ...]) -> jax.Array:
    """||x / t||^2 for each group.

    On a CPU, XLA stores a broadcast number that is used in a reduction as an array: where no square can overflow or underflow so
    that it matters, x is not divided by a single threshold.
    """

    def plain() -> jax.Array:
        return _sum(jnp.square(x), axes) / (threshold * threshold)

    def scaled() -> jax.Array:
        return _sum(jnp.square(x / _at_least_tiny(threshold, x)), axes)

    if jnp.ndim(threshold):
        return _sum(jnp.square(x / threshold), axes)
    low, high = (float(jnp.finfo(x.dtype).smallest_normal) ** 0.4, float(jnp.finfo(x.dtype).max) ** 0.3)
    if isinstance(threshold, float):
        return plain() if low < threshold < high else scaled()
    on_cpu = jax.default_backend() == "cpu"
    return jax.lax.cond((low < threshold) & (threshold < high), plain, scaled) if on_cpu else scaled()


def _exactly_shrunk(x: jax.Array, threshold: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The result of ``proxopt.penalties.metric.metric_shrink``: ``x r / (r + t)`` for each group, and 0 where ||x / t|| <= 1."""
    root, zeroed = _root(axes, x, threshold)
    share = jnp.where(zeroed, 0.0, root / (root + threshold))
    return x * share + 0.0


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _root(axes: tuple[int, ...], x: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    r"""The root r > 0 of :math:`h(r) = (\sum_i x_i^2 / (r + t_i)^2)^{-1/2} - 1` for each group, and whether there is none.

    There is none where h(0) >= 0. h is increasing and concave. Its slope at 0 is the largest and :math:`1 / \|x\|` the smallest,
    and give a lower and an upper bound of the root. The secant method starts at 0 and the lower bound, and halves the bracket
    on a logarithmic scale where it would leave it.
    """
    norm_of_ratio = jnp.sqrt(_sum(jnp.square(x / t), axes))
    zeroed = norm_of_ratio <= 1
    at_zero = 1 / norm_of_ratio - 1
    largest = jnp.max(jnp.abs(x), axis=axes, keepdims=True)
    largest = jnp.where(largest > 0, largest, 1)
    high = jnp.where(zeroed, 1, -at_zero * largest * jnp.sqrt(_sum(jnp.square(x / largest), axes)))
    slope = _sum(jnp.square(x / (t * jnp.sqrt(t))), axes)
    low = norm_of_ratio**2 * (norm_of_ratio - 1) / slope
    low = jnp.where((low > 0) & (low < high), low, high)

    def secant(state: Any) -> Any:
        count, _, low, high, before, h_before, point = state
        h = 1 / jnp.sqrt(_sum(jnp.square(x / (point + t)), axes)) - 1
        low = jnp.where(h < 0, jnp.maximum(low, point), low)
        high = jnp.where(h >= 0, jnp.minimum(high, point), high)
        after = point - h * (point - before) / (h - h_before)
        after = jnp.where((after >= low) & (after <= high), after, jnp.sqrt(low) * jnp.sqrt(high))
        moved = jnp.any(~(jnp.abs(after - point) <= CLOSE * after) & ~zeroed)
        return count + 1, moved, low, high, point, h, after

    on_gpu = jax.default_backend() == "gpu"

    def goes_on(state: Any) -> Any:
        return (state[0] < SECANT_STEPS_GPU) if on_gpu else (state[0] < SECANT_STEPS) & state[1]

    start = (0, jnp.any(~zeroed), low, high, jnp.zeros_like(low), at_zero, low)
    point = jax.lax.while_loop(goes_on, secant, start)[-1]
    for _ in range(1 if x.dtype == jnp.float32 else 2):
        point = _newton(point, x, t, axes)
    return point, zeroed


@_root.defjvp
def _root_jvp(axes: tuple[int, ...], primals: Any, tangents: Any) -> Any:
    """The derivatives of two steps of Newton's method from the root, which are those of the root up to the third order."""
    root, zeroed = _root(axes, *primals)

    def polished(x: jax.Array, t: jax.Array) -> jax.Array:
        fixed = jax.lax.stop_gradient(root)
        # a problem with a root in place of one without: its derivatives are finite, and are not used
        x, t = jnp.where(zeroed, 1.0, x), jnp.where(zeroed, 0.0, t)
        return _newton(_newton(fixed, x, t, axes), x, t, axes)

    _, change = jax.jvp(polished, primals, tangents)
    return (root, zeroed), (change, np.zeros(zeroed.shape, jax.dtypes.float0))


def _newton(root: jax.Array, x: jax.Array, t: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """One step of Newton's method for h."""
    below = root + t
    f = _sum(jnp.square(x / below), axes)
    slope = _sum(jnp.square(x / (below * jnp.sqrt(below))), axes)  # shares no division with f
    after = root + f * (jnp.sqrt(f) - 1) / jnp.where(slope > 0, slope, 1)
    return jnp.where(after > 0, after, root)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def median(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The median of numbers >= 0 over ``axes``, which stay with length 1: the mean of the two middle ones if they are even."""
    lower, upper = _middle(x, axes)
    return (lower + upper) / 2


def _middle(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """The two middle entries, equal if the number of entries is odd."""
    n = int(np.prod([x.shape[a] for a in axes]))
    if n >= COUNTABLE:
        rows = jnp.moveaxis(x, axes, range(-len(axes), 0))
        rows = jnp.sort(rows.reshape(*rows.shape[: x.ndim - len(axes)], n), axis=-1)
        return tuple(jnp.expand_dims(rows[..., k], axes) for k in ((n - 1) // 2, n // 2))  # type: ignore[return-value]
    whole = jnp.int32 if x.dtype == jnp.float32 else jnp.int64

    def count(value: jax.Array) -> jax.Array:
        return _sum(jnp.where(x <= value, 1.0, 0.0).astype(jnp.float32), axes)

    def halved(_: Any, bracket: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bracket  # numbers >= 0 are in the order of their bit patterns
        middle = low + (high - low) // 2
        enough = count(jax.lax.bitcast_convert_type(middle, x.dtype)) > (n - 1) // 2
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    zero = jnp.zeros([1 if i - x.ndim in axes else size for i, size in enumerate(x.shape)], whole)
    infinity = jax.lax.bitcast_convert_type(jnp.asarray(jnp.inf, x.dtype), whole)
    bits = 31 if whole == jnp.int32 else 63
    _, high = jax.lax.fori_loop(0, bits, halved, (zero, zero + infinity))
    lower = jax.lax.bitcast_convert_type(high, x.dtype)
    if n % 2:
        return lower, lower
    above = jnp.min(jnp.where(x > lower, x, jnp.inf), axis=axes, keepdims=True)
    return lower, jnp.where(count(lower) > n // 2, lower, above)


@median.defjvp
def _median_jvp(axes: tuple[int, ...], primals: Any, tangents: Any) -> Any:
    """The change of the middle entries; where several are equal, the mean of their changes."""
    (x,), (change,) = primals, tangents
    lower, upper = _middle(x, axes)

    def of(value: jax.Array) -> jax.Array:
        equal = jnp.where(x == value, 1.0, 0.0).astype(x.dtype)
        return _sum(equal * change, axes) / jnp.maximum(_sum(equal, axes), 1)

    return (lower + upper) / 2, (of(lower) + of(upper)) / 2
