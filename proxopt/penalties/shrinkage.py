"""The soft threshold of entries, then of groups: the form that most penalties have, and that fast paths are written for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from proxopt import _arrays, _checks
from proxopt._arrays import Array
from proxopt.groups import WEIGHTS, Groups
from proxopt.penalties.metric import metric_shrink, support_step

METRICS = (None, "exact", "median", "support")


@dataclass(frozen=True, eq=False)
class Shrinkage:
    r"""A penalty whose prox is a soft threshold of entries and then of groups.

    .. math::

        f(x) = l_1 \|x\|_1 + l_2 \sum_g w_g \|x_g\|_2

    With :math:`u = \operatorname{sign}(x) \max(|x| - \text{step} \cdot l_1, 0)` its prox is

    .. math::

        \operatorname{prox}(x)_g = \max\left(1 - \frac{\text{step} \cdot l_2 w_g}{\|u_g\|_2}, 0\right) u_g .

    A penalty that has this form returns it from its method ``shrinkage``; it needs no other code, and takes part in all fast
    paths.

    Args:
      l1: strength of the L1 part: a number >= 0, or an array that broadcasts against x; None where there is no such part.
      l2: strength of the group part: a number >= 0, or an array that broadcasts against x and is constant inside each group;
        None where there is no such part.
      groups, weights, metric: of the group part, as in ``GroupL2``.

    Source: Jenatton, Mairal, Obozinski, Bach, "Proximal methods for hierarchical sparse coding", 2011; SparseNAS Eq. 9, 10.

    >>> from dataclasses import dataclass
    >>> import numpy as np
    >>> from proxopt import Penalty, Shrinkage
    >>> @dataclass(frozen=True, eq=False)
    ... class UnweightedGroups(Penalty):
    ...     strength: float
    ...     def shrinkage(self):
    ...         return Shrinkage(l2=self.strength, weights="none")
    >>> UnweightedGroups(1.0).prox(np.array([3.0, 4.0]))
    array([2.4, 3.2])
    """

    l1: float | Array | None = None
    l2: float | Array | None = None
    groups: Groups | None = None
    weights: str | Array = "sqrt_size"
    metric: str | None = None

    def value(self, xs: list[Array]) -> Array:
        """f of a list of arrays that form one problem."""
        xp = _arrays.namespace(*xs)
        parts = [xp.sum(_arrays.like(self.l1, x) * _arrays.modulus(xp, x)) for x in xs] if self.l1 is not None else []
        if self.l2 is not None and any(_arrays.size(x) for x in xs):
            groups, strength = self._per_group(xs, [])
            parts.append(xp.sum(strength * groups.weights(xs, self.weights) * groups.norms(xs, xp)))
        return sum(parts[1:], start=parts[0]) if parts else xp.sum(xp.abs(xs[0]))

    def prox(self, xs: list[Array], steps: list[Any]) -> list[Array]:
        """The prox of a list of arrays that form one problem, with one step (a float or an array) each."""
        xp = _arrays.namespace(*xs)
        groups, strength = (None, None) if self.l2 is None else self._per_group(xs, steps)
        if self.l1 is not None:
            xs = [soft(xp, x, s * _arrays.like(self.l1, x)) for x, s in zip(xs, steps)]
        if groups is None or (self.l1 is not None and _arrays.is_number(self.l2) and self.l2 == 0):
            return xs
        bound = strength * groups.weights(xs, self.weights)
        if constant(steps, groups, xs):
            return shrink(xp, xs, groups, groups.constant("step", steps[0], xs) * bound)
        if self.metric in ("median", "support"):
            return shrink(xp, xs, groups, one_step_per_group(xp, xs, steps, groups, self.metric) * bound)
        return metric_shrink(xp, xs, [_full(xp, s, x) for s, x in zip(steps, xs)], groups, bound)

    def thresholds(self, x: Array) -> tuple[float, float, tuple[int, ...]] | None:
        """The thresholds of entries and of groups of one array at step 1, and the axes inside its groups, counted from the right.

        None where they are not numbers (arrays of strengths or weights, labels), or x has no axes.
        """
        l1, l2 = (0.0 if strength is None else strength for strength in (self.l1, self.l2))
        if x.ndim == 0 or not (_arrays.is_number(l1) and _arrays.is_number(l2)):
            return None
        if self.l2 is None:
            return float(l1), 0.0, ()
        groups = (self.groups or Groups.whole()).over_last(x.ndim)
        if groups is None or not isinstance(self.weights, str):
            return None
        return float(l1), float(l2) * groups.weights([x], self.weights), groups.axes(x.ndim)

    def _per_group(self, xs: list[Array], steps: list[Any]) -> tuple[Groups, Any]:
        """The groups, and the strength of each, before anything broadcasts; refuses arrays that cut across groups."""
        groups = self.groups or Groups.whole()
        for step, x in zip(steps, xs):
            groups.refuse_batch("step", step, x)
        return groups.from_right(xs), _arrays.like(groups.constant("strength", self.l2, xs), xs[0])


def soft_threshold(x: Array, threshold: float | Array) -> Array:
    r"""The prox of ``threshold * ||x||_1``.

    .. math::

        \operatorname{soft}(x, t) = \operatorname{sign}(x) \max(|x| - t, 0)

    Computed as ``x - clip(x, -t, t)``, which is one pass less over memory and never returns -0 for a zeroed entry. A complex
    entry shrinks in modulus. At threshold 0 it is the identity, with the slope ``-sign(x)`` in the threshold; at
    ``|x| = threshold > 0`` its slopes are 0, like those of all zeroed entries.

    Args:
      x: a floating-point array of any array library.
      threshold: a number >= 0, or an array that broadcasts against x.

    Returns:
      An array in the library, dtype and device of x.

    Raises:
      TypeError: x is not floating point.
      ValueError: threshold is negative or not finite.

    Source: SparseNAS Eq. 9.

    >>> import numpy as np
    >>> soft_threshold(np.array([-3.0, 0.5, 2.0]), 1.0)
    array([-2.,  0.,  1.])
    """
    _checks.in_range("threshold", threshold)
    from proxopt.penalties import compiled  # it imports this module

    if isinstance(x, (list, tuple)):
        raise TypeError(f"x must be one array, got a {type(x).__name__} of {len(x)}")
    (array,), xp = _arrays.as_list(x)
    fast = compiled.prox(lambda: Shrinkage(l1=threshold), [array], [1.0])
    if fast is not None:
        return fast[0]
    wide = _arrays.widen(array)
    return _arrays.like_input(x, [_arrays.cast(soft(xp, wide, _arrays.like(threshold, wide)), array)])


def soft(xp: Any, x: Array, t: Any) -> Array:
    """``soft_threshold`` without checks: t is a float, or an array of x's library and real dtype."""
    if isinstance(t, float) and t == 0:
        return x * 1
    if _arrays.is_complex(x):
        return x * share_left(xp, xp.abs(x), t)
    clipped = _arrays.clip(xp, x, t)
    if not isinstance(t, float) and not _arrays.is_numpy_array(x):
        if _arrays.may_differentiate(x):  # where t = 0 the result has the slope -sign(x) in t, and 1 in x also at x = 0
            none = xp.where(t < 0, xp.zeros_like(t), t) * _arrays.sign(xp, x)
        else:
            none = xp.zeros_like(clipped)
        clipped = xp.where(t > 0, clipped, none)
    if type(clipped) is np.ndarray:  # memory that is allocated anew costs more than the subtraction
        return np.subtract(x, clipped, out=clipped)
    return x - clipped


def shrink(xp: Any, xs: Sequence[Array], groups: Groups, threshold: Any) -> list[Array]:
    """``max(1 - threshold / ||x_g||, 0) x_g``: 0 for a zero group, the identity at threshold 0."""
    if isinstance(threshold, float) and threshold == 0:
        return [x * 1 for x in xs]
    scale = share_left(xp, groups.norms(xs, xp), threshold)
    scaled = [x * s for x, s in zip(xs, groups.spread(scale, xs, xp))]
    return [np.add(z, 0.0, out=z) if type(z) is np.ndarray else z + 0.0 for z in scaled]  # + 0.0 turns -0 into 0


def share_left(xp: Any, size: Array, t: Any) -> Array:
    """``max(1 - t / size, 0)`` for size >= 0, what a soft threshold leaves of it; 1 where t = 0, for size 0 too."""
    zeroed = size <= t
    share = xp.where(zeroed, xp.zeros_like(size), 1 - t / xp.where(zeroed, xp.ones_like(size), size))
    if isinstance(t, float) and t > 0:
        return share
    return xp.where((t < 0) | (zeroed & (t <= 0)), xp.ones_like(share), share)


def constant(steps: Sequence[Any], groups: Groups, xs: Sequence[Array]) -> bool:
    """Whether the steps are the same inside each group, by their shapes alone."""
    first = steps[0]
    return all(s is first or (isinstance(s, float) and s == first) for s in steps) and not groups.varies(first, xs[0])


def one_step_per_group(xp: Any, xs: Sequence[Array], steps: Sequence[Any], groups: Groups, metric: str) -> Any:
    """A single step for each group in place of steps that differ inside it, by the rule "median" or "support"."""
    if constant(steps, groups, xs):
        return groups.constant("step", steps[0], xs)
    full = [_full(xp, s, x) for s, x in zip(steps, xs)]
    return groups.median(full, xp) if metric == "median" else support_step(xp, xs, full, groups)


def check_group_options(groups: Any, weights: Any, metric: Any) -> None:
    """Raise where the arguments that group penalties share are out of their domains."""
    if not (groups is None or isinstance(groups, Groups)):
        raise TypeError(f"groups must be a Groups or None, got {groups!r}")
    if isinstance(weights, str):
        _checks.one_of("weights", weights, WEIGHTS)
    else:
        _checks.in_range("weights", weights)
    _checks.one_of("metric", metric, METRICS)


def _full(xp: Any, step: Any, x: Array) -> Array:
    """The step as a real array of x's shape."""
    return _arrays.like(step, x) + xp.zeros_like(xp.abs(x))
