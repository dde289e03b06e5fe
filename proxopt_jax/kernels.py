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

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from proxopt import _arrays
from proxopt.penalties import declared
from proxopt.penalties.nonnegative import positive_part

BLOCK = 1 << 17  # entries of each array that are in the cache at once
SECANT_STEPS = 40  # 17 suffice for steps that spread over 20 decades; usually 3 to 6 are taken
SECANT_STEPS_GPU = 16  # all taken, because each look at a result would wait for the device
SLICES = 32  # that one reduction returns: more make it slower to compile
COUNTABLE = 1 << 24  # entries of a group that can be counted in float32


def fused(penalty: Any, stacked: bool = False) -> Any:
    """The penalty with the prox of this module; None for None.

    Args:
      penalty: the penalty.
      stacked: lists of arrays are no joint problem, but separate problems of one shape, each for ``penalty``.
    """
    return None if penalty is None else Stacked(Fused(penalty)) if stacked else Fused(penalty)


@dataclass(frozen=True)
class Fused:
    """A penalty whose prox for one array takes the passes of this module, where the penalty has the form for them."""

    penalty: Any

    def value(self, x: Any) -> Any:
        """That of the penalty."""
        return self.penalty.value(x)

    def with_metric(self, default: str) -> Fused:
        """The penalty with ``default`` where it leaves its metric to the caller."""
        return Fused(declared.with_metric(self.penalty, default))

    def prox(self, x: Any, step: Any) -> Any:
        """The prox of the penalty. Steps for each entry must all be positive, or all 0, as those of Adam are."""
        inner = declared.on_positive_part(self.penalty)
        if inner is not None:
            return Fused(inner).prox(jax.tree.map(positive_part, x), step)
        form = _form(self.penalty, x)
        if form is None or jnp.ndim(step) not in (0, x.ndim):
            return self.penalty.prox(x, step)
        wide = _arrays.widen(x)
        return _prox(wide, _arrays.like(step, wide), form).astype(x.dtype)


@dataclass(frozen=True)
class Stacked:
    """A penalty for separate problems of one shape, which it treats as one array, so that one prox is compiled for all."""

    penalty: Any

    def value(self, xs: list[Any]) -> Any:
        """The sum of the values of all problems."""
        return sum(self.penalty.value(x) for x in xs)

    def with_metric(self, default: str) -> Stacked:
        """The penalty with ``default`` where it leaves its metric to the caller."""
        return Stacked(self.penalty.with_metric(default))

    def prox(self, xs: list[Any], step: Any) -> list[Any]:
        """The prox of each array, with one step for all or a list of steps."""
        if isinstance(step, list):
            same = all(s is step[0] for s in step)
            ndim = xs[0].ndim
            step = step[0] if same else jnp.stack([jnp.reshape(s, jnp.shape(s) or (1,) * ndim) for s in step])
        return _unstacked(self.penalty.prox(jnp.stack(xs), step))


@jax.custom_jvp
def _unstacked(stack: jax.Array) -> list[jax.Array]:
    """The slices along the first axis.

    XLA compiles a function of its own for each slice on a CPU. A reduction that returns several slices is one function.
    """
    if jax.default_backend() != "cpu":
        return list(stack)
    slices: list[jax.Array] = []
    for start in range(0, len(stack), SLICES):
        part = stack[start : start + SLICES]
        number = jax.lax.broadcasted_iota(jnp.int32, part.shape, 0)
        none = [np.zeros((), part.dtype)] * len(part)
        slices += jax.lax.reduce((number, *[part] * len(part)), (np.int32(-1), *none), _select, (0,))[1:]
    return slices


def _select(found: tuple[Any, ...], entry: tuple[Any, ...]) -> tuple[Any, ...]:
    """Of the results so far, replace the k-th by the entry if that is in the k-th slice."""
    number = entry[0]
    chosen = (jnp.where(number == k, new, old) for k, (old, new) in enumerate(zip(found[1:], entry[1:])))
    return (jnp.maximum(found[0], number), *chosen)


@_unstacked.defjvp
def _unstacked_jvp(primals: Any, tangents: Any) -> Any:
    return _unstacked(*primals), list(tangents[0])


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
    """The prox for a single step, or for one for each entry, which are all positive or all 0."""
    if form.l1 is not None:
        x = _soft(x, step * form.l1)
    bound = form.bound
    if bound is None or (isinstance(bound, float) and bound == 0):
        return x
    if not jnp.ndim(step):
        return _shrunk(x, _square_of_ratio(x, step * bound, form.axes))
    # without the barrier XLA also stores the parts of step = rate / scale, to compute x / step as x * scale / rate
    x, step = jax.lax.optimization_barrier((x, step))  # type: ignore[no-untyped-call]
    if form.metric == "median":
        threshold = median(step, form.axes) * bound
        return _shrunk(x, _sum(jnp.square(x / _at_least_tiny(threshold)), form.axes))
    if not (isinstance(bound, float) and _is_moderate(bound, x)):
        step, bound = _at_least_tiny(step * bound), 1.0
    still = step[(slice(0, 1),) * step.ndim] <= 0  # at learning rate 0; not where it is NaN
    if form.metric == "support":
        return jnp.where(still, x, _shrunk(x, _sum(jnp.square(x / step), form.axes) / bound**2))
    root, zeroed = _root(form.axes, bound, x, step)
    return jnp.where(still, x, jnp.where(zeroed, 0.0, x * (root / (root + step))))


def _sum(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return jnp.sum(x, axis=axes, keepdims=True)


def _soft(x: jax.Array, t: Any) -> jax.Array:
    """``proxopt.soft_threshold``, with the same derivatives."""
    if isinstance(t, float):
        return x if t == 0 else jnp.where(jnp.abs(x) <= t, 0, jnp.where(x < 0, x + t, x - t))
    return jnp.where((jnp.abs(x) <= t) & (t > 0), 0, jnp.where(x < 0, x + t, x - t))


def _at_least_tiny(t: jax.Array) -> jax.Array:
    """t, or the smallest normal number where it is smaller, by which any number may be divided."""
    return jnp.maximum(t, float(np.finfo(t.dtype).smallest_normal))


def _is_moderate(t: Any, x: jax.Array) -> Any:
    """Whether a sum of squares of entries of x that over- or underflows is still on the right side of t^2."""
    kind = np.finfo(x.dtype)
    return (float(kind.smallest_normal) ** 0.4 < t) & (t < float(kind.max) ** 0.3)


def _shrunk(x: jax.Array, square: jax.Array) -> jax.Array:
    """``max(1 - 1 / sqrt(square), 0) x``: the shrink of a group by the threshold t for ``square`` = ||x / t||^2.

    For thresholds t > 0 that differ inside a group it is the shrink by the one step of the metric "support".
    """
    regular = (square > 1) & jnp.isfinite(square)
    share = 1 - 1 / jnp.sqrt(jnp.where(regular, square, 1))
    # where the square is infinite, 1 - t / ||x|| rounds to 1; NaN remains NaN
    share = jnp.where(regular, share, jnp.where(square <= 1, 0.0, jnp.where(square > 1, 1.0, square)))
    return jnp.where(share == 0, 0.0, x * share)  # not -0


def _square_of_ratio(x: jax.Array, t: Any, axes: tuple[int, ...]) -> jax.Array:
    """||x / t||^2 for each group and a number t; infinite for t = 0 and x != 0.

    On a CPU, XLA stores a number that is used for each entry of a reduction as an array. x is not divided by a moderate t.
    """

    def plain() -> jax.Array:
        return cast(jax.Array, _sum(jnp.square(x), axes) / (t * t))

    def scaled() -> jax.Array:
        return _sum(jnp.square(x / _at_least_tiny(jnp.asarray(t, x.dtype))), axes)

    if isinstance(t, float):
        return plain() if _is_moderate(t, x) else scaled()
    if jax.default_backend() != "cpu":
        return scaled()
    return cast(jax.Array, jax.lax.cond(_is_moderate(t, x), plain, scaled))


def _in_blocks(f: Callable[..., Any], axes: tuple[int, ...], *arrays: jax.Array) -> Any:
    """``f(*arrays)``, which has one result for each group; on a CPU computed for as many groups at a time as fit in the cache.

    The groups are divided along the longest axis that is not in ``axes``.
    """
    x = arrays[0]
    kept = [a for a in range(-x.ndim, 0) if a not in axes]
    axis = max(kept, key=lambda a: x.shape[a], default=None)
    if axis is None or x.size <= 2 * BLOCK or jax.default_backend() != "cpu":
        return f(*arrays)
    length = x.shape[axis]
    most = max(1, BLOCK * length // x.size)
    rows = next(n for n in range(most, 0, -1) if length % n == 0)
    if rows * 8 < most:  # many small blocks cost more than they save
        return f(*arrays)

    def block(i: jax.Array) -> Any:
        return f(*(jax.lax.dynamic_slice_in_dim(a, i * rows, rows, axis % x.ndim) for a in arrays))

    return jax.tree.map(partial(_merged, axis=axis % x.ndim), jax.lax.map(block, jnp.arange(length // rows)))


def _merged(parts: jax.Array, axis: int) -> jax.Array:
    """Blocks along a first axis, put one behind another along ``axis``."""
    moved = jnp.moveaxis(parts, 0, axis)
    return moved.reshape(*moved.shape[:axis], -1, *moved.shape[axis + 2 :])


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _root(axes: tuple[int, ...], bound: float, x: jax.Array, s: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``_secant_root`` in blocks, with derivatives."""
    return cast(tuple[jax.Array, jax.Array], _in_blocks(partial(_secant_root, axes, bound), axes, x, s))


def _secant_root(axes: tuple[int, ...], bound: float, x: jax.Array, s: jax.Array) -> tuple[jax.Array, jax.Array]:
    r"""For each group the root r > 0 of h, and whether there is none, in which case the group becomes zero.

    .. math::

        h(r) = \frac{b}{\sqrt{F(r)}} - 1, \qquad F(r) = \sum_i \frac{x_i^2}{(r + s_i)^2}

    for b = ``bound``. h is increasing and concave. There is no root where h(0) >= 0. The slope of h is at least b / ||x||: a line
    through (0, h(0)) with this slope meets 0 at the root or above it, where the secant method starts. Where the method would
    leave the interval that contains the root, it halves the interval on a logarithmic scale.
    """
    ratio = jnp.sqrt(_sum(jnp.square(x / s), axes))
    zeroed = ratio <= bound
    at_zero = bound / ratio - 1
    largest = jnp.max(jnp.abs(x), axis=axes, keepdims=True)
    norm = largest * jnp.sqrt(_sum(jnp.square(x / jnp.where(largest > 0, largest, 1)), axes))
    start = jnp.where(zeroed, 1, norm * -at_zero / bound)
    done = zeroed | jnp.isnan(ratio) | (s[(slice(0, 1),) * s.ndim] <= 0)
    eps = float(np.finfo(x.dtype).eps)

    def secant(state: Any) -> Any:
        count, _, low, high, before, h_before, point = state
        h = bound / jnp.sqrt(_sum(jnp.square(x / (point + s)), axes)) - 1
        low = jnp.where(h < 0, jnp.maximum(low, point), low)
        high = jnp.where(h >= 0, jnp.minimum(high, point), high)
        after = point - h * (point - before) / (h - h_before)
        inside = (after > low) & (after < high)
        after = jnp.where(inside, after, jnp.where(low > 0, jnp.sqrt(low) * jnp.sqrt(high), high / 1024))
        exact = jnp.abs(h) <= 4 * eps
        after = jnp.where(exact, point, after)
        moves = ~(exact | (jnp.abs(after - point) <= math.sqrt(eps) * after) | done)
        return count + 1, jnp.any(moves), low, high, point, h, after

    on_gpu = jax.default_backend() == "gpu"

    def goes_on(state: Any) -> Any:
        return (state[0] < SECANT_STEPS_GPU) if on_gpu else (state[0] < SECANT_STEPS) & state[1]

    state = (0, jnp.any(~done), jnp.zeros_like(start), start, jnp.zeros_like(start), at_zero, start)
    return jax.lax.while_loop(goes_on, secant, state)[-1], zeroed


@_root.defjvp
def _root_jvp(axes: tuple[int, ...], bound: float, primals: Any, tangents: Any) -> Any:
    """The derivatives of two steps of Newton's method from the root, which are those of the root up to the third order."""
    root, zeroed = _root(axes, bound, *primals)

    def polished(x: jax.Array, s: jax.Array) -> jax.Array:
        r = jax.lax.stop_gradient(root)
        # a problem with a root in place of one without: its derivatives are finite, and are not used
        x, s = jnp.where(zeroed, 1.0, x), jnp.where(zeroed, 0.0, s)
        for _ in range(2):
            square = _sum(jnp.square(x / (r + s)), axes)
            slope = _sum(jnp.square(x / (r + s)) / (r + s), axes)
            r = r + square * (jnp.sqrt(square) / bound - 1) / slope
        return r

    _, change = jax.jvp(polished, primals, tangents)
    return (root, zeroed), (change, np.zeros(zeroed.shape, jax.dtypes.float0))


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def median(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The median of numbers >= 0 over ``axes``, which stay with length 1: the mean of the two middle ones if they are even."""
    lower, upper = _in_blocks(partial(_middle, axes=axes), axes, x)
    return cast(jax.Array, (lower + upper) / 2)


def _middle(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """The two middle entries, equal if the number of entries is odd."""
    n = int(np.prod([x.shape[a] for a in axes]))
    if n >= COUNTABLE:
        rows = jnp.moveaxis(x, axes, range(-len(axes), 0))
        rows = jnp.sort(rows.reshape(*rows.shape[: x.ndim - len(axes)], n), axis=-1)
        return tuple(jnp.expand_dims(rows[..., k], axes) for k in ((n - 1) // 2, n // 2))  # type: ignore[return-value]
    whole = jnp.int32 if x.dtype == jnp.float32 else jnp.int64

    def count(value: jax.Array) -> jax.Array:
        return _sum((x <= value).astype(jnp.float32), axes)

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
    lower, upper = _in_blocks(partial(_middle, axes=axes), axes, x)

    def of(value: jax.Array) -> jax.Array:
        equal = jnp.where(x == value, 1.0, 0.0).astype(x.dtype)
        return _sum(equal * change, axes) / jnp.maximum(_sum(equal, axes), 1)

    return median(x, axes), (of(lower) + of(upper)) / 2
