"""The group lasso, in the plain and in a diagonal metric."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from proxopt import _arrays, _checks
from proxopt._arrays import Array
from proxopt.groups import WEIGHTS, Groups
from proxopt.penalties.base import METRICS, Penalty, check_strength
from proxopt.penalties.elementwise import share_left

BISECTIONS = 5  # find the decade of the root ...
NEWTON_STEPS = 3  # ... and, with the next two, its digits: 1e-12 for steps that spread over 20 decades
DERIVATIVE_STEPS = 2  # that are differentiated: k of them give all derivatives up to order 2^k - 1


@dataclass(frozen=True, eq=False)
class GroupL2(Penalty):
    """f(x) = strength * sum_g w_g ||x_g||_2, the group lasso.

        prox(x)_g = max(1 - step * strength * w_g / ||x_g||, 0) x_g        for a step constant in the group

    Args:
      strength: a number >= 0, or an array that broadcasts against x and is constant inside each group.
      groups: a `Groups`; None makes all entries one group.
      weights: w_g: "sqrt_size" (SparseNAS Eq. 3, 10), "inverse_sqrt_size" (GSparsity), "none", or an array with
        one number per group: for `along` in the reduced shape, for `labels` in the order of `Groups.names`.
      metric: what an array `step` means inside a group. "exact" minimises in the diagonal metric, "median"
        (SparseNAS) lets the group's median step stand for all, "support" the one step with the exact zeros.
        None leaves it to the caller: exact in `prox`, median in AdamHAPG.

    Source: Yuan and Lin, "Model selection and estimation in regression with grouped variables", 2006.

    >>> import numpy as np
    >>> GroupL2(1.0, weights="none").prox(np.array([3.0, 4.0]))
    array([2.4, 3.2])
    """

    strength: Any
    groups: Groups | None = None
    weights: Any = "sqrt_size"
    metric: str | None = None

    def __post_init__(self) -> None:
        check_strength(self.strength)
        check_group_options(self.groups, self.weights, self.metric)

    @property
    def _groups(self) -> Groups:
        return self.groups or Groups.whole()

    def _check(self, xs: Sequence[Array]) -> None:
        super()._check(xs)
        self._groups.check(xs)

    def _value(self, xs: list[Array]) -> Array:
        return group_value(xs, self._groups, self.weights, self.strength)

    def _prox(self, xs: list[Array], steps: list[Any]) -> list[Array]:
        groups, strength = per_group(xs, steps, self._groups, self.strength)
        return group_prox(xs, steps, groups, self.weights, strength, self.metric)


def check_group_options(groups: Any, weights: Any, metric: Any) -> None:
    if not (groups is None or isinstance(groups, Groups)):
        raise TypeError(f"groups must be a Groups or None, got {groups!r}")
    if isinstance(weights, str):
        _checks.one_of("weights", weights, WEIGHTS)
    else:
        _checks.in_range("weights", weights)
    _checks.one_of("metric", metric, METRICS)


def group_value(xs: list[Array], groups: Groups, weights: Any, strength: Any) -> Array:
    """strength * sum_g w_g ||x_g||_2."""
    xp = _arrays.namespace(*xs)
    if not any(_arrays.size(x) for x in xs):
        return xp.sum(xp.abs(xs[0]))
    _, scale = per_group(xs, [], groups, strength)
    return xp.sum(scale * groups.weights(xs, weights) * norms(xs, groups))


def per_group(xs: list[Array], steps: list[Any], groups: Groups, strength: Any) -> tuple[Groups, Any]:
    """The groups, and the strength of each, before anything broadcasts; refuses arrays that cut across groups."""
    for step, x in zip(steps, xs):
        groups.refuse_batch("step", step, x)
    return groups.from_right(xs), _arrays.like(groups.constant("strength", strength, xs), xs[0])


def group_prox(xs: list[Array], steps: list[Any], groups: Groups, weights: Any, strength: Any, metric: str | None) -> list[Array]:
    """The prox of strength * sum_g w_g ||x_g||_2 by the rule that `metric` names; groups and strength come from `per_group`."""
    bound = strength * groups.weights(xs, weights)
    step = steps[0]
    if all(s is step or (isinstance(s, float) and s == step) for s in steps) and not groups.varies(step, xs[0]):
        return shrink(xs, groups, groups.constant("step", step, xs) * bound)
    full = [_arrays.like(s, x) + _arrays.namespace(x).zeros_like(_arrays.namespace(x).abs(x)) for s, x in zip(steps, xs)]
    if metric == "median":
        return shrink(xs, groups, groups.median(full) * bound)
    if metric == "support":
        return shrink(xs, groups, _support_step(xs, full, groups) * bound)
    return metric_shrink(xs, full, groups, bound)


def norms(xs: Sequence[Array], groups: Groups) -> Array:
    """||x_g||_2, scaled by max|x_g| so that neither tiny nor huge entries are lost; gradient 0 at a zero group."""
    xp = _arrays.namespace(*xs)
    largest = _scale(xs, groups)
    square = _square_sum([x / m for x, m in zip(xs, groups.spread(largest, xs))], groups)
    zero = square == 0
    root = largest * xp.sqrt(xp.where(zero, xp.ones_like(square), square))
    return xp.where(zero, xp.zeros_like(root), root)


def shrink(xs: list[Array], groups: Groups, threshold: Any) -> list[Array]:
    """max(1 - threshold / ||x_g||, 0) x_g; 0 for a zero group, the identity at threshold 0."""
    if isinstance(threshold, float) and threshold == 0:
        return [x * 1 for x in xs]
    scale = share_left(norms(xs, groups), threshold)
    return [x * s + 0.0 for x, s in zip(xs, groups.spread(scale, xs))]  # + 0.0: a dead entry is 0, not -0


def metric_shrink(xs: list[Array], steps: list[Array], groups: Groups, bound: Any) -> list[Array]:
    """argmin_z sum_i (z_i - x_i)^2 / (2 s_i) + t ||z||_2 for each group, t = `bound`.

        z = 0                      where ||x / s|| <= t
        z_i = x_i r / (r + s_i t)  else, with r = ||z|| > 0 the root of sum x_i^2 / (r + s_i t)^2 = 1

    The root is found on detached arrays, and the last Newton steps are differentiated. The error of a step is quadratic in that
    of its start: where derivatives are right up to order n before it, they are right up to order 2 n + 1 after it.
    """
    xp = _arrays.namespace(*xs)
    unit = _scale(xs, groups)
    y, a = [], []
    for x, s, m, t in zip(xs, steps, groups.spread(unit, xs), groups.spread(bound, xs)):
        threshold = _arrays.clip(t / m, float(xp.finfo(m.dtype).max))  # t / m overflows for tiny m, and 0 * inf is NaN
        yi, ai = xp.broadcast_arrays(x / m, s * threshold)
        y.append(yi)
        a.append(xp.where(ai >= 0, ai, xp.zeros_like(ai)))

    size = [_arrays.detach(xp.abs(yi)) for yi in y]
    shift = [_arrays.detach(ai) for ai in a]
    fixed = [ai <= 0 for ai in shift]  # step or threshold 0: the entry stays, and where it is not 0 its group is not zeroed
    anchored = groups.largest([xp.where(f, yi, xp.zeros_like(yi)) for f, yi in zip(fixed, size)]) != 0
    ratio = [xp.where(f, xp.zeros_like(yi), yi / xp.where(f, xp.ones_like(ai), ai)) for f, yi, ai in zip(fixed, size, shift)]
    zeroed = groups.spread(~anchored & (norms(ratio, groups) <= 1), xs)
    replaced = lambda values, fill: [xp.where(z, xp.full_like(v, fill), v) for z, v in zip(zeroed, values)]
    y, size = replaced(y, 1.0), replaced(size, 1.0)  # a problem with r > 0 in place of one whose solution is 0
    a, shift = replaced(a, 0.0), replaced(shift, 0.0)

    root = _root(size, shift, groups)
    for _ in range(DERIVATIVE_STEPS):
        root = _newton(root, y, a, groups)

    out = []
    for x, r, ai, z, f in zip(xs, groups.spread(root, xs), a, zeroed, fixed):
        below = r + ai
        share = r / xp.where(below > 0, below, xp.ones_like(below))
        share = xp.where(z, xp.zeros_like(share), share)
        stays = f & (z | ~xp.isfinite(r))  # any other fixed entry has the share r / r = 1, with a slope in its step
        out.append(x * xp.where(stays, xp.ones_like(share), share) + 0.0)
    return out


def _root(y: list[Array], a: list[Array], groups: Groups) -> Array:
    """The root r of h(r) = (sum y^2 / (r + a)^2)^(-1/2) - 1 for every group, with y >= 0 and a >= 0.

    h is concave and increasing: Newton lands left of the root from anywhere, and climbs to it from there. Where steps spread
    over many decades it would climb about one decade at a time, so the bracket is first halved on a logarithmic scale.
    """
    xp = _arrays.namespace(*y)
    high = norms(y, groups)
    excess = groups.largest([xp.where(yi > ai, yi - ai, xp.zeros_like(yi)) for yi, ai in zip(y, a)])
    low = xp.maximum(excess, high - groups.largest(a))

    def climb(point: Array) -> tuple[Array, Array]:
        ahead = _newton(point, y, a, groups)
        return xp.minimum(xp.maximum(ahead, low), high), ahead < point

    low, _ = climb(xp.minimum(low, high))
    for _ in range(BISECTIONS):
        middle = xp.sqrt(low * high)
        low, beyond = climb(middle)
        high = xp.where(beyond, middle, high)
    for _ in range(NEWTON_STEPS):
        low, _ = climb(low)
    return low


def _newton(root: Array, y: list[Array], a: list[Array], groups: Groups) -> Array:
    """One step for h(r) = F^(-1/2) - 1 with F = sum y^2 / (r + a)^2."""
    xp = _arrays.namespace(root)
    below = [r + ai for r, ai in zip(groups.spread(root, y), a)]
    below = [xp.where(b > 0, b, xp.ones_like(b)) for b in below]
    square = [_arrays.square(yi / b) for yi, b in zip(y, below)]
    f = groups.total(square)
    slope = groups.total([q / b for q, b in zip(square, below)])
    return root + f * (xp.sqrt(f) - 1) / xp.where(slope > 0, slope, xp.ones_like(slope))


def _support_step(xs: list[Array], steps: list[Array], groups: Groups) -> Array:
    """||x|| / ||x / s||: the one step that zeroes exactly the groups that the metric zeroes."""
    xp = _arrays.namespace(*xs)
    ratio = [x / xp.where(s > 0, s, xp.full_like(s, math.inf)) for x, s in zip(xs, steps)]
    anchored = groups.largest([xp.where(s > 0, xp.zeros_like(s), xp.abs(_arrays.detach(x))) for x, s in zip(xs, steps)]) > 0
    norm = norms(ratio, groups)
    step = norms(xs, groups) / xp.where(norm > 0, norm, xp.ones_like(norm))
    return xp.where(anchored, xp.zeros_like(step), step)


def _scale(xs: Sequence[Array], groups: Groups) -> Array:
    """max|x_g| as a constant; 1 where it is 0 or not finite."""
    xp = _arrays.namespace(*xs)
    largest = groups.largest([xp.abs(_arrays.detach(x)) for x in xs])
    return xp.where((largest > 0) & xp.isfinite(largest), largest, xp.ones_like(largest))


def _square_sum(xs: Sequence[Array], groups: Groups) -> Array:
    return groups.total([_arrays.square(x) for x in xs])
