"""The prox of a group norm in a diagonal metric, where the steps differ inside a group."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from proxopt import _arrays
from proxopt._arrays import Array
from proxopt.groups import Groups

BISECTIONS = 5  # find the decade of the root ...
NEWTON_STEPS = 3  # ... and, with the next two, its digits: 1e-12 for steps that spread over 20 decades
DERIVATIVE_STEPS = 2  # that are differentiated: k of them give all derivatives up to order 2^k - 1


def metric_shrink(xp: Any, xs: list[Array], steps: list[Array], groups: Groups, bound: Any) -> list[Array]:
    r"""The minimiser of ``sum_i (z_i - x_i)^2 / (2 s_i) + t ||z||_2`` for each group, with ``s = steps`` and ``t = bound``.

    It is 0 where ``||x / s|| <= t``. Elsewhere

    .. math::

        z_i = \frac{r}{r + s_i t} x_i, \qquad r = \|z\|_2 > 0 \text{ the root of } \sum_i \frac{x_i^2}{(r + s_i t)^2} = 1.

    The root is found on detached arrays, and the last Newton steps are differentiated. The error of a step is quadratic in that
    of its start: where derivatives are right up to order n before it, they are right up to order 2 n + 1 after it.
    """
    unit = groups.scale(xs, xp)
    y, a = [], []
    for x, s, m, t in zip(xs, steps, groups.spread(unit, xs, xp), groups.spread(bound, xs, xp)):
        threshold = _arrays.clip(xp, t / m, float(xp.finfo(m.dtype).max))  # t / m overflows for tiny m, and 0 * inf is NaN
        yi, ai = xp.broadcast_arrays(x / m, s * threshold)
        y.append(yi)
        a.append(xp.where(ai >= 0, ai, xp.zeros_like(ai)))

    size = [_arrays.detach(xp.abs(yi)) for yi in y]
    shift = [_arrays.detach(ai) for ai in a]
    fixed = [ai <= 0 for ai in shift]  # step or threshold 0: the entry stays, and where it is not 0 its group is not zeroed
    anchored = groups.largest([xp.where(f, yi, xp.zeros_like(yi)) for f, yi in zip(fixed, size)], xp) != 0
    ratio = [xp.where(f, xp.zeros_like(yi), yi / xp.where(f, xp.ones_like(ai), ai)) for f, yi, ai in zip(fixed, size, shift)]
    zeroed = groups.spread(~anchored & (groups.norms(ratio, xp) <= 1), xs, xp)

    def replaced(values: list[Array], fill: float) -> list[Array]:
        return [xp.where(z, xp.full_like(v, fill), v) for z, v in zip(zeroed, values)]

    y, size = replaced(y, 1.0), replaced(size, 1.0)  # a problem with r > 0 in place of one whose solution is 0
    a, shift = replaced(a, 0.0), replaced(shift, 0.0)

    root = _root(xp, size, shift, groups)
    for _ in range(DERIVATIVE_STEPS):
        root = _newton(xp, root, y, a, groups)

    out = []
    for x, r, ai, z, f in zip(xs, groups.spread(root, xs, xp), a, zeroed, fixed):
        below = r + ai
        share = r / xp.where(below > 0, below, xp.ones_like(below))
        share = xp.where(z, xp.zeros_like(share), share)
        stays = f & (z | ~xp.isfinite(r))  # any other fixed entry has the share r / r = 1, with a slope in its step
        out.append(x * xp.where(stays, xp.ones_like(share), share) + 0.0)
    return out


def _root(xp: Any, y: list[Array], a: list[Array], groups: Groups) -> Array:
    """The root r of h(r) = (sum y^2 / (r + a)^2)^(-1/2) - 1 for every group, with y >= 0 and a >= 0.

    h is concave and increasing: Newton lands left of the root from anywhere, and climbs to it from there. Where steps spread
    over many decades it would climb about one decade at a time, so the bracket is first halved on a logarithmic scale.
    """
    high = groups.norms(y, xp)
    excess = groups.largest([xp.where(yi > ai, yi - ai, xp.zeros_like(yi)) for yi, ai in zip(y, a)], xp)
    low = xp.maximum(excess, high - groups.largest(a, xp))

    def climb(point: Array, low: Array, high: Array) -> tuple[Array, Array]:
        ahead = _newton(xp, point, y, a, groups)
        return xp.minimum(xp.maximum(ahead, low), high), ahead < point

    def halve(bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bracket
        middle = xp.sqrt(low * high)
        low, beyond = climb(middle, low, high)
        return low, xp.where(beyond, middle, high)

    low, _ = climb(xp.minimum(low, high), low, high)
    low, high = _arrays.repeated(BISECTIONS, halve, (low, high))
    root: Array = _arrays.repeated(NEWTON_STEPS, lambda point: climb(point, point, high)[0], low)
    return root


def _newton(xp: Any, root: Array, y: list[Array], a: list[Array], groups: Groups) -> Array:
    """One step for h(r) = F^(-1/2) - 1 with F = sum y^2 / (r + a)^2."""
    below = [r + ai for r, ai in zip(groups.spread(root, y, xp), a)]
    below = [xp.where(b > 0, b, xp.ones_like(b)) for b in below]
    square = [_arrays.square(xp, yi / b) for yi, b in zip(y, below)]
    f = groups.total(square, xp)
    slope = groups.total([q / b for q, b in zip(square, below)], xp)
    return root + f * (xp.sqrt(f) - 1) / xp.where(slope > 0, slope, xp.ones_like(slope))


def support_step(xp: Any, xs: Sequence[Array], steps: Sequence[Array], groups: Groups) -> Array:
    """``||x|| / ||x / s||``: one step per group with which the same groups are zeroed as in the metric."""
    ratio = [x / xp.where(s > 0, s, xp.full_like(s, math.inf)) for x, s in zip(xs, steps)]
    anchored = groups.largest([xp.where(s > 0, xp.zeros_like(s), xp.abs(_arrays.detach(x))) for x, s in zip(xs, steps)], xp) > 0
    norm = groups.norms(ratio, xp)
    step = groups.norms(xs, xp) / xp.where(norm > 0, norm, xp.ones_like(norm))
    return xp.where(anchored, xp.zeros_like(step), step)
