"""A test of proximal operators by the laws that hold for all of them: for the penalties of this package and for your own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from proxopt import _arrays
from proxopt._arrays import ArrayOrList
from proxopt.penalties import ProxOperator, declared
from proxopt.penalties.base import Formed
from proxopt.penalties.dual import to_numpy

Point = list[np.ndarray]  # the entries of x, of p, of any z: double precision arrays in host memory

SCALES = (1e-6, 1e-3, 1e-1, 1.0, 10.0)  # distances from p at which points are tried, in units of max|x|


def check_prox(
    penalty: ProxOperator,
    x: ArrayOrList,
    step: float | ArrayOrList = 1.0,
    *,
    tolerance: float | None = None,
    seed: int = 0,
) -> None:
    r"""Raise AssertionError, naming the law and the gap, where ``penalty.prox(x, step)`` breaks one.

    With :math:`p = \operatorname{prox}(x)`, :math:`q = \operatorname{prox}(y)`, :math:`u = (x - p) / \text{step}` and
    :math:`\|v\|_{1/\text{step}}^2 = \sum_i v_i^2 / \text{step}_i` the laws are:

    - in place: x stays as it was;
    - type: p has the library, dtype and shape of x, and two calls agree;
    - objective: :math:`f(z) + \frac12 \|z - x\|_{1/\text{step}}^2` is nowhere smaller than at p, for z near and far;
    - identity: step 0 changes nothing, and an entry whose step is 0 stays. For x with finite f(x) only: the prox of the
      indicator function of a set is a projection for any step;
    - origin: prox(0) = 0, unless the objective at x = 0 is smaller elsewhere;
    - subgradient: :math:`f(z) \ge f(p) + \langle u, z - p \rangle` for all z tried, if f is convex;
    - firm: :math:`\langle p - q, x - y \rangle_{1/\text{step}} \ge \|p - q\|_{1/\text{step}}^2`, if f is convex;
    - moreau: :math:`f(p) = \langle u, p \rangle`, if f is homogeneous. Then x / step - u lies in the dual ball, the other half
      of Moreau's identity;
    - separate: a change of one entry or group leaves the prox of the others as it is, if ``elementwise`` or groups are declared;
    - radial: each group of the prox is a multiple between 0 and 1 of that of x, if ``radial`` is declared and step is a number;
    - absolute: ``f(z) = f(|z|)``, and f does not fall where a modulus grows, if ``absolute`` is declared;
    - shrinkage: value and prox are those of the form that ``shrinkage()`` returns, if it does.

    Args:
      penalty: any object with ``value(x)`` and ``prox(x, step)``. f counts as convex unless ``penalty.convex`` is False.
        Whether it is homogeneous, ``f(c x) = c f(x)`` for c >= 0, is found by trying where ``penalty.homogeneous`` is not
        declared.
      x: a floating-point array, or a list of arrays; finite, and of the shape that the prox has.
      step: a number >= 0, or an array of x's shape (a list for a list).
      tolerance: allowed relative gap; by default 100 rounding units of x's dtype.
      seed: of the random points.

    >>> import numpy as np
    >>> from proxopt import L1
    >>> check_prox(L1(0.3), np.array([1.0, -0.2, 0.0]), step=0.5)

    The projection onto a box is the prox of the box's indicator function:

    >>> class Box:
    ...     def value(self, x):
    ...         return 0.0 if np.all(abs(x) <= 1) else np.inf
    ...     def prox(self, x, step=1.0):
    ...         return np.clip(x, -1, 1)
    >>> check_prox(Box(), np.array([3.0, -0.2]))
    """
    case = _Case(penalty, x, step, tolerance, seed)
    for law in LAWS:
        law(case)


class _Case:
    """One prox problem, seen from NumPy in double precision; points reach the operator in the library and dtype of x."""

    def __init__(self, penalty: ProxOperator, x: Any, step: Any, tolerance: float | None, seed: int) -> None:
        self.penalty, self.given_x, self.given_step = penalty, x, step
        self.arrays, xp = _arrays.as_list(x)
        self.rng = np.random.default_rng(seed)
        self.tolerance = 100 * float(xp.finfo(self.arrays[0].dtype).eps) if tolerance is None else tolerance
        self.x: Point = [to_numpy(a).copy() for a in self.arrays]
        self.size = max((float(np.max(np.abs(a), initial=0.0)) for a in self.x), default=0.0) or 1.0
        steps = step if isinstance(step, (list, tuple)) else [step] * len(self.x)
        self.steps = steps
        steps = [np.broadcast_to(to_numpy(s), a.shape) for s, a in zip(steps, self.x)]
        self.moves = [s > 0 for s in steps]
        self.inverse = [np.divide(1.0, s, out=np.zeros(s.shape), where=m) for s, m in zip(steps, self.moves)]
        self.p = self.prox(self.x)
        self.u = [(a - b) * i for a, b, i in zip(self.x, self.p, self.inverse)]

    def like(self, z: Point) -> Any:
        """z as the arrays that x came as."""
        made = []
        for a, v in zip(self.arrays, z):
            where = {"device": a.device} if _arrays.is_torch_array(a) else {}
            made.append(_arrays.namespace(a).asarray(v.copy(), dtype=a.dtype, **where))
        return _arrays.like_input(self.given_x, made)

    def rounded(self, z: Point) -> Point:
        """z as the dtype of x holds it."""
        return [to_numpy(a) for a in _arrays.as_list(self.like(z))[0]]

    def prox(self, z: Point, step: Any = None) -> Point:
        result = self.penalty.prox(self.like(z), self.given_step if step is None else step)
        return [to_numpy(a) for a in _arrays.as_list(result, "prox(x)")[0]]

    def value(self, z: Point) -> float:
        return float(to_numpy(self.penalty.value(self.like(z))))

    def objective(self, z: Point) -> float:
        """f(z) + sum((z - x)^2 / (2 step)), over the entries that move."""
        return self.value(z) + self.inner([a - b for a, b in zip(z, self.x)]) / 2

    def inner(self, a: Point, b: Point | None = None) -> float:
        """<a, b> in the metric 1 / step; ||a||^2 without b."""
        return _dot([v * i for v, i in zip(a, self.inverse)], a if b is None else b)

    def around(self, z: Point) -> Iterator[Point]:
        """Points near and far from z: at random, in few entries, along u, and towards 0."""
        for scale in SCALES:
            noise = [self.rng.normal(size=a.shape) for a in z]
            few = [v * (self.rng.random(v.shape) < 0.3) for v in noise]
            for direction in (noise, few, _unit(self.u), _unit([-a for a in self.p])):
                far = [a + m * scale * self.size * d for a, m, d in zip(z, self.moves, direction)]
                yield self.rounded(far)


def _in_place(case: _Case) -> None:
    for x in (case.like(case.x), case.given_x):  # a copy first, so that the caller's array is not lost
        case.penalty.prox(x, case.given_step)
        kept = _equal([to_numpy(a) for a in _arrays.as_list(x)[0]], case.x)
        _law("in place", kept, "prox(x, step) wrote its result into x; it must leave x as it is and return a new array")


def _type(case: _Case) -> None:
    result, _ = _arrays.as_list(case.penalty.prox(case.given_x, case.given_step), "prox(x)")
    _law("type", len(result) == len(case.arrays), f"{len(result)} arrays for {len(case.arrays)}")
    for a, b in zip(case.arrays, result):
        _law("type", type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape, f"{type(b).__name__} {b.dtype} {b.shape}")
    _law("type", _equal([to_numpy(a) for a in result], case.p), "two calls differ")


def _identity(case: _Case) -> None:
    if not math.isfinite(case.value(case.x)):
        return
    room = case.tolerance * case.size
    _law("identity", _distance(case.prox(case.x, 0.0), case.x) <= room, "prox(x, 0) != x")
    stays = [np.where(m, a, b) for m, a, b in zip(case.moves, case.x, case.p)]
    _law("identity", _distance(stays, case.x) <= room, "an entry with step 0 moved")


def _origin(case: _Case) -> None:
    zero = [np.zeros_like(a) for a in case.x]
    found = case.prox(zero)
    if any(np.any(a) for a in found):
        at_zero, at_found = case.value(zero), case.value(found) + case.inner(found) / 2
        _law("origin", at_found < at_zero, f"prox(0) != 0: the objective is {at_found!r} there, {at_zero!r} at 0")


def _objective(case: _Case) -> None:
    best = case.objective(case.p)
    _law("objective", math.isfinite(best), f"the value at the prox must be finite, got {best!r}")
    for z in case.around(case.p):
        value = case.objective(z)
        room = case.tolerance * (abs(value) + abs(best))
        _law("objective", best <= value + room, f"{best!r} at the prox, {value!r} at a distance of {_distance(z, case.p):.1e}")


def _subgradient(case: _Case) -> None:
    f = case.value(case.p)
    for z in case.around(case.p):
        move = [a - b for a, b in zip(z, case.p)]
        value, lower = case.value(z), f + _dot(case.u, move)
        reach = [abs(a) + abs(b) for a, b in zip(case.x, case.p)]  # what u was rounded from
        room = case.tolerance * (abs(f) + abs(value) + case.inner(reach, [abs(a) for a in move]))
        _law("subgradient", value >= lower - room, f"f = {value!r} < {lower!r} at a distance of {_distance(z, case.p):.1e}")


def _firm(case: _Case) -> None:
    for y in case.around(case.x):
        q = case.prox(y)
        apart, moved = [a - b for a, b in zip(case.x, y)], [a - b for a, b in zip(case.p, q)]
        cross, square = case.inner(moved, apart), case.inner(moved)
        room = case.tolerance * case.inner([abs(a) + abs(b) for a, b in zip(case.x, y)])
        _law("firm", cross >= square - room, f"{cross!r} < {square!r} at a distance of {_distance(y, case.x):.1e}")


def _moreau(case: _Case) -> None:
    if not all(m.all() for m in case.moves):  # an entry with step 0 can have any u
        return
    f, inner = case.value(case.p), _dot(case.u, case.p)
    reach = [abs(a) + abs(b) for a, b in zip(case.x, case.p)]
    room = case.tolerance * (abs(f) + case.inner(reach, [abs(a) for a in case.p]))
    _law("moreau", abs(f - inner) <= room, f"f(p) = {f!r}, <u, p> = {inner!r}")


def _blocks(case: _Case) -> list[np.ndarray] | None:
    """For each entry the number of the entry or group that it declares to belong to; None without such a declaration."""
    if getattr(case.penalty, "elementwise", False):
        ends = np.cumsum([a.size for a in case.x])
        return [np.arange(end - a.size, end).reshape(a.shape) for a, end in zip(case.x, ends)]
    groups = declared.partition(case.penalty)
    return None if groups is None else groups.ids(case.arrays)


def _separate(case: _Case) -> None:
    blocks = _blocks(case)
    if blocks is None or not any(a.size for a in case.x):
        return
    changed = case.rng.random(1 + max(int(b.max(initial=0)) for b in blocks)) < 0.5
    masks = [changed[b] for b in blocks]
    y = case.rounded([np.where(m, -1.3 * a + 0.1 * case.size, a) for m, a in zip(masks, case.x)])
    q = [np.where(m, a, b) for m, a, b in zip(masks, case.p, case.prox(y))]
    what = "entry" if getattr(case.penalty, "elementwise", False) else "group"
    _law("separate", _distance(q, case.p) <= case.tolerance * case.size, f"the prox of one {what} depends on another {what}")


def _radial(case: _Case) -> None:
    groups = declared.partition(case.penalty)
    if groups is None or not getattr(case.penalty, "radial", False) or any(np.ndim(s) for s in case.steps):
        return
    square, inner = (groups.total([a * b for a, b in zip(case.x, other)]) for other in (case.x, case.p))
    share = inner / np.where(square > 0, square, 1.0)
    scaled = [a * s for a, s in zip(case.x, groups.spread(share, case.x))]
    room = case.tolerance * case.size
    in_range = bool(np.all((share >= -case.tolerance) & (share <= 1 + case.tolerance)))
    _law("radial", in_range and _distance(scaled, case.p) <= room, "the prox is no multiple, between 0 and 1, of each group")


def _absolute(case: _Case) -> None:
    if not getattr(case.penalty, "absolute", False):
        return
    for z in case.around(case.p):
        sizes = case.rounded([abs(a) for a in z])
        larger = case.rounded([a * (1 + case.rng.random(a.shape)) for a in sizes])
        here, there, beyond = case.value(z), case.value(sizes), case.value(larger)
        room = case.tolerance * (abs(here) + abs(there))
        _law("absolute", abs(here - there) <= room, f"f(z) = {here!r}, f(|z|) = {there!r}")
        _law("absolute", beyond >= there - room, f"f = {there!r}, and {beyond!r} where moduli are larger")


def _form(case: _Case) -> None:
    form = declared.shrinkage(case.penalty)
    if form is None:
        return
    formed = Formed(1.0, form)
    p = [to_numpy(a) for a in _arrays.as_list(formed.prox(case.given_x, case.given_step))[0]]
    a, b = case.value(case.x), float(to_numpy(formed.value(case.given_x)))
    same = _distance(p, case.p) <= case.tolerance * case.size and abs(a - b) <= case.tolerance * (abs(a) + abs(b))
    _law("shrinkage", same, "value or prox differ from those of shrinkage()")


def _convex(case: _Case) -> bool:
    return bool(getattr(case.penalty, "convex", True))


def _homogeneous(case: _Case) -> bool:
    """Whether f(c x) = c f(x), as declared or else at the points tried."""
    declared = getattr(case.penalty, "homogeneous", None)
    if declared is not None:
        return bool(declared)
    points = [case.x, case.p, *case.around(case.p)]
    scaled = [(c, z, case.rounded([c * a for a in z])) for z in points for c in (0.0, 0.5, 2.0)]
    values = [(c * case.value(z) if c else 0.0, case.value(far)) for c, z, far in scaled]
    return all(math.isclose(a, b, rel_tol=10 * case.tolerance) for a, b in values)


def _if(condition: Callable[[_Case], bool], law: Callable[[_Case], None]) -> Callable[[_Case], None]:
    """The law, for operators that meet the condition."""
    return lambda case: law(case) if condition(case) else None


LAWS = (
    _in_place,
    _type,
    _identity,
    _origin,
    _objective,
    _if(_convex, _subgradient),
    _if(_convex, _firm),
    _if(_homogeneous, _moreau),
    _separate,
    _radial,
    _absolute,
    _form,
)


def _law(name: str, holds: bool, found: str) -> None:
    if not holds:
        raise AssertionError(f"law {name!r} of the prox is broken: {found}")


def _dot(a: Point, b: Point) -> float:
    return sum(float(np.sum(v * w)) for v, w in zip(a, b))


def _unit(a: Point) -> Point:
    largest = max((float(np.max(np.abs(v), initial=0.0)) for v in a), default=0.0) or 1.0
    return [v / largest for v in a]


def _equal(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> bool:
    return all(np.array_equal(v, w, equal_nan=True) for v, w in zip(a, b))


def _distance(a: Point, b: Point) -> float:
    return max((float(np.max(np.abs(v - w), initial=0.0)) for v, w in zip(a, b)), default=0.0)
