"""What all penalties share: the public methods ``value`` and ``prox``, their checks, and what a penalty declares of itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np

from proxopt import _arrays, _checks
from proxopt._arrays import Array, ArrayOrList
from proxopt.groups import Groups
from proxopt.penalties.dual import largest_scale, unpenalised_entries
from proxopt.penalties.shrinkage import Shrinkage

P = TypeVar("P", bound="Penalty")


@runtime_checkable
class ProxOperator(Protocol):
    r"""Any object with the two methods of a proximal operator: what every argument ``penalty`` takes.

    .. math::

        \operatorname{prox}(x, \text{step})
            = \operatorname*{arg\,min}_z f(z) + \frac{1}{2\,\text{step}} \|z - x\|^2

    An operator that is no subclass of ``Penalty`` takes part by these two methods alone: it is applied tensor by tensor, and a
    checkpoint holds only its name. It may also declare any of the methods and properties of ``Penalty``, which are then used.

    >>> from proxopt import L1, ProxOperator
    >>> isinstance(L1(0.1), ProxOperator)
    True
    """

    def value(self, x: ArrayOrList) -> Any:
        """f(x), a number."""

    def prox(self, x: ArrayOrList, step: float | ArrayOrList = 1.0) -> Any:
        """The minimiser; it has the library, dtype, shape and device of x, which stays as it was."""


class Penalty:
    r"""A penalty with an exact proximal operator. Subclass it to add your own.

    A subclass is a frozen dataclass (``@dataclass(frozen=True, eq=False)``) with a field ``strength``. Its equation is stated in
    one of three ways, for real arrays in at least single precision:

    - ``shrinkage()`` returns a ``Shrinkage`` if the prox is a soft threshold of entries, then of groups. Nothing else is needed.
    - ``entries(x)`` returns what each entry of an array contributes, and ``_prox(xs, steps)`` is the prox. With
      ``elementwise = True``.
    - ``_value(xs)`` and ``_prox(xs, steps)`` for a list of arrays that form one problem, in general.

    ``_prox`` receives one step for each array, a float or an array that broadcasts against it, and returns a new list. The public
    methods ``value`` and ``prox`` check their input, compute half precision in float32, and return what came in.

    What the rest of the package needs to know of a penalty, the penalty declares:

    - ``convex`` (True unless you say otherwise): f is convex, so that its prox is firmly nonexpansive.
    - ``homogeneous`` (True unless you say otherwise): ``f(c x) = c f(x)`` for ``c >= 0``, as a norm is. If it is convex too,
      solvers certify solutions by a duality gap, and ``Nested`` takes it as an inner level.
    - ``elementwise`` (False): ``f(x) = sum_i f_i(x_i)``. The prox acts on each entry alone.
    - ``radial`` (False): the prox multiplies each group by a factor between 0 and 1. ``Nested`` takes it as an outer level.
    - a field ``groups``, a ``Groups`` or None for all entries as one group: the prox acts on each group alone.
    - a field ``metric``, which may be None: how a step that differs inside a group is treated.

    >>> from dataclasses import dataclass
    >>> from typing import Any
    >>> import numpy as np
    >>> from proxopt import Penalty
    >>> @dataclass(frozen=True, eq=False)
    ... class Ridge(Penalty):
    ...     strength: Any
    ...     homogeneous = False
    ...     elementwise = True
    ...     def entries(self, x):
    ...         return self.strength / 2 * x * x
    ...     def _prox(self, xs, steps):
    ...         return [x / (1 + step * self.strength) for x, step in zip(xs, steps)]
    >>> Ridge(3.0).prox(np.array([2.0, -4.0]))
    array([ 0.5, -1. ])
    """

    strength: float | Array
    convex: bool = True
    homogeneous: bool = True
    elementwise: bool = False
    radial: bool = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        KINDS[cls._kind()] = cls

    def __post_init__(self) -> None:
        check_strength(self.strength)

    # -- the public methods -------------------------------------------------------------------

    def value(self, x: ArrayOrList) -> Array:
        """f(x), a zero-dimensional array; summed over the problems of a batch.

        Its gradient at x = 0, and at a group of zeros, is the symmetric subgradient 0 in every library.

        Args:
          x: a floating-point array of any array library, or a list of them (one joint problem).

        Raises:
          TypeError: x is not floating point.
          ValueError: the groups or the strength do not fit x.
        """
        arrays, _ = _arrays.as_list(x)
        self._check(arrays)
        return self._value([_arrays.widen(a) for a in arrays])

    def prox(self, x: ArrayOrList, step: float | ArrayOrList = 1.0, *, out: ArrayOrList | None = None) -> Any:
        r"""The proximal operator, in the library, dtype, shape and device of x.

        .. math::

            \operatorname{prox}(x) = \operatorname*{arg\,min}_z f(z) + \sum_i \frac{(z_i - x_i)^2}{2\,\text{step}_i}

        Derivatives with respect to x, step and strength are right up to the third order. Those of zeroed entries are 0, and at
        step or strength 0 they are the limits from above. Steps with ties under ``metric="median"``, and steps of 0 under
        ``"support"``, are kinks of the metric: the derivatives with respect to them are finite there, but no limits.

        Args:
          x: a floating-point array of any array library, or a list of them (one joint problem).
          step: a number >= 0, or an array that broadcasts against x (a diagonal metric); for a list of
            arrays a number or a matching list. An entry with step 0 stays as it is.
          out: a mutable array (or list of arrays) that takes the result; may be x itself.

        Raises:
          TypeError: x is not floating point, or ``out`` cannot be written.
          ValueError: step is negative or not finite, or the groups or the strength do not fit x.
        """
        arrays, _ = _arrays.as_list(x)
        self._check(arrays)
        steps = match_steps(step, arrays)
        if any(_arrays.size(a) for a in arrays):
            wide = [_arrays.widen(a) for a in arrays]
            result = self._prox(wide, [_arrays.like(s, a) for s, a in zip(steps, wide)])
            if len(result) != len(arrays):
                name = type(self).__name__
                raise ValueError(f"{name}._prox must return one array for each of {len(arrays)}, got {len(result)}")
        else:
            result = [a * 1 for a in arrays]
        result = [_arrays.cast(r, a) for r, a in zip(result, arrays)]
        return _arrays.like_input(x, result if out is None else _write(out, result))

    # -- the equation: stated by subclasses ---------------------------------------------------

    def shrinkage(self) -> Shrinkage | None:
        """The soft threshold of entries and groups that this penalty is; None where it is not of that form."""
        return None

    def entries(self, x: Array) -> Array | None:
        """What each entry of an array contributes to the value; None where the penalty is no such sum."""
        return None

    def _value(self, xs: list[Array]) -> Array:
        """f of real or complex arrays in at least single precision."""
        form = self.shrinkage()
        if form is not None:
            return form.value(xs)
        parts = [self.entries(x) for x in xs]
        if any(part is None for part in parts):
            raise TypeError(f"{type(self).__name__} must state shrinkage(), entries(x) or _value(xs)")
        sums = [_arrays.namespace(part).sum(part) for part in parts]
        return sum(sums[1:], start=sums[0])

    def _prox(self, xs: list[Array], steps: list[Any]) -> list[Array]:
        """The prox of such arrays, with one step (a float or an array) each."""
        form = self.shrinkage()
        if form is None:
            raise TypeError(f"{type(self).__name__} must state shrinkage() or _prox(xs, steps)")
        return form.prox(xs, steps)

    # -- declared properties ------------------------------------------------------------------

    @property
    def partition(self) -> Groups | None:
        """The groups of entries that become zero together, the outermost ones of a hierarchy; None where there are none."""
        groups: Groups | None = getattr(self, "groups", None)
        return groups if groups is not None or not hasattr(self, "groups") else Groups.whole()

    def with_groups(self: P, groups: Groups) -> P:
        """This penalty with these groups; one that has no field for them stays as it is."""
        return replace(self, groups=groups) if hasattr(self, "groups") else self  # type: ignore[type-var]

    def with_strength(self: P, strength: float | Array) -> P:
        """This penalty at another strength."""
        return replace(self, strength=strength)  # type: ignore[type-var]

    def with_metric(self: P, default: str) -> P:
        """This penalty, with ``default`` where its metric was left to the caller."""
        if getattr(self, "metric", default) is not None:
            return self
        return replace(self, metric=default)  # type: ignore[type-var]

    def batched(self: P, ndim: int) -> P | None:
        """This penalty for arrays with ``ndim`` axes that are stacked along new axes in front, each a problem of its own.

        None where there is no such penalty: labels, arrays among its fields, or a prox that is neither elementwise nor grouped.
        """
        own = [getattr(self, f.name) for f in fields(self)] if is_dataclass(self) else [None]
        if ndim == 0 or not all(isinstance(v, (float, int, str, Groups, type(None))) for v in own):
            return None
        if self.elementwise:
            return self
        groups = self.partition.over_last(ndim) if self.partition is not None else None
        return None if groups is None else self.with_groups(groups)

    def has_dual(self, problems: int = 0) -> bool:
        """Whether ``dual`` has an answer for arrays whose first ``problems`` axes are a batch."""
        return self.convex and self.homogeneous and (self.elementwise or not problems)

    def dual(self, c: Array, problems: int = 0) -> tuple[Array, float | Array]:
        r"""A feasible point for a duality gap, and the convex conjugate there.

        Returns ``(s, f*(s c))`` with the largest s in [0, 1] for which the conjugate

        .. math::

            f^*(y) = \sup_x \langle y, x \rangle - f(x)

        is finite at ``s c``, both exact up to rounding. Numbers that are not finite come out as NaN, as does a negative strength.
        Here f is a norm, or like one: its conjugate is 0 in the dual ball, whose edge is found by bisection on ``prox``.

        Args:
          c: the point, 0 where ``unpenalised`` holds: f* is infinite anywhere else there.
          problems: how many of its first axes are a batch, with one s each.
        """
        return largest_scale(self, c, problems), 0.0

    def unpenalised(self, x: Array) -> Array | None:
        """Which entries of x this penalty does not depend on: a boolean array of x's shape; None for none of them.

        They have strength 0 or are in groups of weight 0. Entries of less than 1e-20 of the usual weight may be among them. Of x
        only the shape, dtype and library matter. The result is a NumPy array, unless JAX traces the parameters of the penalty.
        """
        return unpenalised_entries(self, x)

    # -- plain data ---------------------------------------------------------------------------

    @classmethod
    def _kind(cls) -> str:
        """What plain data calls this class: its qualified name, and the bare name for the classes of this package."""
        return cls.__name__ if cls.__module__.startswith("proxopt.") else f"{cls.__module__}.{cls.__qualname__}"

    def to_dict(self) -> dict[str, Any]:
        """Everything but the strength as plain data: strings, numbers, lists. ``from_dict`` is the inverse.

        Raises TypeError where a field holds something else.
        """
        if not is_dataclass(self):
            raise TypeError(f"{type(self).__name__} must be a dataclass to be written as plain data")
        plain = {f.name: _plain(f.name, getattr(self, f.name)) for f in fields(self) if f.name != "strength"}
        return {"kind": self._kind(), **plain}

    @classmethod
    def _from_dict(cls: type[P], data: dict[str, Any], strength: float | Array) -> P:
        options = {k: restored(v) for k, v in data.items() if k != "kind"}
        return cls(strength=strength, **options)  # type: ignore[call-arg]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Penalty) or type(self) is not type(other):
            return NotImplemented
        try:
            mine, others = self.to_dict(), other.to_dict()
        except TypeError:
            return self is other
        return mine == others and np.array_equal(np.asarray(self.strength), np.asarray(other.strength))

    def __hash__(self) -> int:
        return hash(self._kind())

    # -- checks -------------------------------------------------------------------------------

    def _check(self, xs: Sequence[Array]) -> None:
        """Raise where the penalty does not fit the arrays."""
        for x in xs:
            _broadcasts("strength", self.strength, x)
        if self.partition is not None:
            self.partition.check(xs)


KINDS: dict[str, type[Penalty]] = {}


def from_dict(data: dict[str, Any], strength: float | Array) -> Penalty:
    """The penalty that ``Penalty.to_dict`` described, at the given strength.

    Raises ValueError for a class that no imported module has defined: data never leads to an import.
    """
    kind = str(data.get("kind"))
    if kind not in KINDS and "." in kind:
        raise ValueError(f"penalty kind {kind!r} must be defined before its data is read: import {kind.rpartition('.')[0]} first")
    _checks.one_of("penalty kind", kind, tuple(KINDS))
    return KINDS[kind]._from_dict(data, strength)


def plain_data(operator: Any) -> dict[str, Any] | None:
    """``Penalty.to_dict`` of an operator that ``from_dict`` would rebuild; None for any other, which must stay an object."""
    if not isinstance(operator, Penalty):
        return None
    try:
        data = operator.to_dict()
        again = from_dict(data, operator.strength)
    except TypeError:
        return None
    names = [name for name in data if name not in ("kind", "weights")]  # weights may come back as a list
    pairs = [(getattr(operator, name), getattr(again, name)) for name in names]
    same = all(type(a) is type(b) or (_arrays.is_number(a) and _arrays.is_number(b)) for a, b in pairs)
    return data if again == operator and same else None


def match_steps(step: Any, arrays: Sequence[Array]) -> list[Any]:
    """`step` as one number or array per array."""
    steps = list(step) if isinstance(step, (list, tuple)) else [step] * len(arrays)
    if len(steps) != len(arrays):
        raise ValueError(f"step must be a number or one entry per array, {len(arrays)}, got {len(steps)}")
    for s, x in zip(steps, arrays):
        _checks.in_range("step", s)
        _broadcasts("step", s, x)
    return [float(s) if _arrays.is_number(s) else s for s in steps]


def check_strength(strength: float | Array) -> None:
    """Raise unless strength is a number >= 0 or an array of such."""
    if isinstance(strength, (list, tuple)):
        raise TypeError(f"strength must be a number or an array, got a {type(strength).__name__}")
    _checks.in_range("strength", strength)


def _broadcasts(name: str, value: Any, x: Array) -> None:
    if not _arrays.ndim(value):
        return
    pairs = zip(reversed(value.shape), reversed(x.shape))
    if not all(v == n or v == 1 or n == 1 for v, n in pairs):
        raise ValueError(f"{name} must broadcast against x of shape {tuple(x.shape)}, got shape {tuple(value.shape)}")


def _write(out: Any, result: list[Array]) -> list[Array]:
    outs, _ = _arrays.as_list(out, "out")
    if len(outs) != len(result):
        raise ValueError(f"out must hold {len(result)} arrays, got {len(outs)}")
    for o, r in zip(outs, result):
        if tuple(o.shape) != tuple(r.shape) or o.dtype != r.dtype:
            raise ValueError(f"out must have shape {tuple(r.shape)} and dtype {r.dtype}, got {tuple(o.shape)} and {o.dtype}")
    for o, r in zip(outs, result):
        o[...] = r
    return outs


def _plain(name: str, value: Any) -> Any:
    """A field as strings, numbers and lists."""
    if isinstance(value, (str, int, float, type(None))):
        return value
    if isinstance(value, Groups):
        return value.to_dict()
    if isinstance(value, Penalty):
        return value.to_dict() | {"strength": _plain("strength", value.strength)}
    if isinstance(value, (list, tuple)):
        return [_plain(name, v) for v in value]
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{name} must be a string, number, array, Groups or Penalty to be written as plain data, got {value!r}")


def restored(value: Any) -> Any:
    """The inverse of `_plain`, arrays aside, which stay lists."""
    if isinstance(value, dict):
        if "axis" in value:
            return Groups.from_dict(value)
        strength = value.get("strength")
        return from_dict(
            {k: v for k, v in value.items() if k != "strength"}, np.asarray(strength) if isinstance(strength, list) else strength
        )
    return [restored(v) for v in value] if isinstance(value, list) and value and isinstance(value[0], dict) else value
