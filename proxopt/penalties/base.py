"""What all penalties share: the public methods ``value`` and ``prox``, their checks, and what a penalty declares of itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np

from proxopt import _arrays, _checks
from proxopt._arrays import Array, ArrayOrList
from proxopt.groups import Groups
from proxopt.penalties import compiled
from proxopt.penalties.dual import largest_scale, unpenalised_entries
from proxopt.penalties.plain import KINDS, field_names, is_own, is_rebuilt_from_fields, kind, plain, restored, same_strength
from proxopt.penalties.shrinkage import Shrinkage, constant, one_step_per_group

P = TypeVar("P", bound="Penalty")

EQUATION = ("shrinkage", "entries", "_value", "_prox")
DERIVED = ("has_dual", "dual", "unpenalised", "absolute")  # of the equation
# names that a field cannot have
RESERVED = set("kind value prox shrinkage entries partition batched dual has_dual unpenalised to_dict".split())
RESERVED |= set("with_groups with_strength with_metric".split())


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

    ``_prox`` receives one step for each array, a float or an array that broadcasts against it, and returns a list of new arrays
    of the same shapes. The public methods ``value`` and ``prox`` check their input, compute half precision in float32, and return
    an array (or list) in the library, dtype and shape of x. ``Groups.norms``, ``spread`` and ``total`` help with groups.

    What the rest of the package needs to know of a penalty, the penalty declares. A penalty with ``shrinkage`` need not declare
    the last five.

    - ``convex`` (True unless you say otherwise): f is convex, so that its prox is firmly nonexpansive.
    - ``homogeneous`` (True unless you say otherwise): ``f(c x) = c f(x)`` for ``c >= 0``, as a norm is. If it is convex too,
      solvers certify solutions by a duality gap, and ``Nested`` takes it as an inner level.
    - ``elementwise`` (False): ``f(x) = sum_i f_i(x_i)``. The prox acts on each entry alone.
    - a field ``groups``, a ``Groups`` or None for all entries as one group: the prox acts on each group alone.
    - ``radial`` (False): the prox multiplies each group by a factor between 0 and 1. ``Nested`` takes it as an outer level.
    - ``absolute`` (False): f depends on the moduli ``|x_i|`` only, and does not decrease where one of them grows.
      ``NonNegative`` takes it.
    - ``one_step_per_group`` (False): ``_prox`` is written for steps that are constant in each group. Steps that differ inside a
      group, as those of Adam do, are replaced by a single one for the group: that with which the same groups of an L2 norm become
      zero, or the median where a field ``metric`` is "median". Otherwise ``_prox`` must treat any step.

    A penalty whose other fields are strings, numbers and penalties is stored in checkpoints as plain data, under its qualified
    name: the module that defines it must be imported before such a checkpoint is loaded. Any other stays a live object in the
    optimizer, which gets it again where it is constructed.

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
    one_step_per_group: bool = False
    _has_form: bool = False  # whether `shrinkage` is the whole truth: not so below a class that overrides value or prox

    def __init_subclass__(cls, *, register: bool = True, **options: Any) -> None:
        super().__init_subclass__(**options)
        reserved = sorted(RESERVED & set(vars(cls).get("__annotations__", ())))
        if reserved:
            raise TypeError(f"{cls.__name__} must not have a field {reserved[0]!r}: the name is taken by Penalty")
        _forget_inherited_equation(cls)
        if register:
            KINDS[kind(cls)] = cls

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
        fast = None if self.one_step_per_group or not self._has_form else compiled.prox(self.shrinkage, arrays, steps)
        if fast is not None:
            return _arrays.like_input(x, fast if out is None else _write(out, fast))
        if any(_arrays.size(a) for a in arrays):
            wide = [_arrays.widen(a) for a in arrays]
            result = self._prox(wide, self._matched([_arrays.like(s, a) for s, a in zip(steps, wide)], wide))
            check_result(f"{type(self).__name__}._prox", result, wide)
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
        parts = [] if self._has_form else [part for x in xs if (part := self.entries(x)) is not None]
        if len(parts) == len(xs):
            sums = [_arrays.namespace(part).sum(part) for part in parts]
            return sum(sums[1:], start=sums[0])
        form = self.shrinkage()
        if form is None:
            raise TypeError(f"{type(self).__name__} must state shrinkage(), entries(x) or _value(xs)")
        return form.value(xs)

    def _prox(self, xs: list[Array], steps: list[Any]) -> list[Array]:
        """The prox of such arrays, with one step (a float or an array) each."""
        form = self.shrinkage()
        if form is None:
            raise TypeError(f"{type(self).__name__} must state shrinkage() or _prox(xs, steps)")
        return form.prox(xs, steps)

    def _form(self) -> Shrinkage | None:
        """The form, unless a subclass has overridden what it describes."""
        return self.shrinkage() if self._has_form else None

    def _matched(self, steps: list[Any], xs: list[Array]) -> list[Any]:
        """The steps as ``_prox`` takes them."""
        groups = self.partition if self.one_step_per_group else None
        if groups is None or constant(steps, groups, xs):
            return steps
        metric = "median" if getattr(self, "metric", None) == "median" else "support"
        xp = _arrays.namespace(*xs)
        step = one_step_per_group(xp, xs, steps, groups.from_right(xs), metric)
        return groups.from_right(xs).spread(step, xs, xp)

    # -- declared properties ------------------------------------------------------------------

    @property
    def elementwise(self) -> bool:
        """Whether the prox acts on each entry alone."""
        form = self._form()
        return form is not None and form.l2 is None

    @property
    def radial(self) -> bool:
        """Whether the prox multiplies each group by a factor between 0 and 1."""
        form = self._form()
        return form is not None and form.l1 is None

    @property
    def absolute(self) -> bool:
        """Whether f depends on the moduli ``|x_i|`` only, and does not decrease where one of them grows."""
        return self._form() is not None

    @property
    def partition(self) -> Groups | None:
        """The groups of entries that become zero together, the outermost ones of a hierarchy; None where there are none."""
        if not hasattr(self, "groups"):
            form = self._form()
            return None if form is None or form.l2 is None else form.groups or Groups.whole()
        if not isinstance(self.groups, (Groups, type(None))):
            raise TypeError(f"groups must be a Groups or None, got {self.groups!r}")
        return self.groups or Groups.whole()

    def with_groups(self: P, groups: Groups) -> P:
        """This penalty with these groups. Raises TypeError for one that has groups, but no field for them."""
        if self.partition is None:
            return self
        if not hasattr(self, "groups"):
            raise TypeError(f"{type(self).__name__} must have a field 'groups' to be used with other groups")
        return self._with(groups=groups)

    def with_strength(self: P, strength: float | Array) -> P:
        """This penalty at another strength."""
        return self._with(strength=strength)

    def with_metric(self: P, default: str) -> P:
        """This penalty, with ``default`` where its metric was left to the caller."""
        return self if getattr(self, "metric", default) is not None else self._with(metric=default)

    def _with(self: P, **changes: Any) -> P:
        """This penalty with other values of some fields."""
        if not is_rebuilt_from_fields(self):
            (name,) = changes
            raise TypeError(f"{type(self).__name__} must be a dataclass with the __init__ of its own fields to change {name}")
        return replace(self, **changes)  # type: ignore[type-var]

    def batched(self, ndim: int) -> Penalty | None:
        """This penalty for arrays with ``ndim`` axes that are stacked along new axes in front, each a problem of its own.

        None where there is no such penalty: labels, arrays among its fields, or a prox that is neither elementwise nor grouped.
        """
        own = vars(self).values() if hasattr(self, "__dict__") else [getattr(self, name) for name in field_names(self)]
        if ndim == 0 or any(isinstance(v, (list, tuple)) or _arrays.ndim(v) for v in own):
            return None
        if self.elementwise:
            return self
        groups = self.partition.over_last(ndim) if self.partition is not None else None
        if groups is None:
            return None
        form = self._form()
        if form is not None and not hasattr(self, "groups"):
            return Formed(1.0, replace(form, groups=groups, metric=form.metric or "exact"))
        return self.with_groups(groups) if is_rebuilt_from_fields(self) else None

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

    def to_dict(self) -> dict[str, Any]:
        """Everything but the strength as plain data: strings, numbers, lists. ``from_dict`` is the inverse.

        Raises TypeError where a field holds something else.
        """
        if not is_rebuilt_from_fields(self):
            raise TypeError(f"{type(self).__name__} must be a dataclass with the __init__ of its own fields to be plain data")
        data = {name: plain(name, getattr(self, name), is_own(type(self))) for name in field_names(self) if name != "strength"}
        return {"kind": kind(type(self)), **data}

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
        return mine == others and same_strength(self.strength, other.strength)

    def __hash__(self) -> int:
        return hash(kind(type(self)))

    # -- checks -------------------------------------------------------------------------------

    def _check(self, xs: Sequence[Array]) -> None:
        """Raise where the penalty does not fit the arrays."""
        for x in xs:
            _broadcasts("strength", getattr(self, "strength", 1.0), x)
        if self.partition is not None:
            self.partition.check(xs)


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
    many = isinstance(out, (list, tuple))
    for i, o in enumerate(out if many else [out]):
        if isinstance(o, np.generic):
            raise TypeError(f"{f'out[{i}]' if many else 'out'} must be an array that can be written, got {type(o).__name__}")
    outs, _ = _arrays.as_list(out, "out")
    if len(outs) != len(result):
        raise ValueError(f"out must hold {len(result)} arrays, got {len(outs)}")
    for o, r in zip(outs, result):
        if tuple(o.shape) != tuple(r.shape) or o.dtype != r.dtype:
            raise ValueError(f"out must have shape {tuple(r.shape)} and dtype {r.dtype}, got {tuple(o.shape)} and {o.dtype}")
    for o, r in zip(outs, result):
        o[...] = r
    return outs


def check_result(name: str, result: Any, xs: Sequence[Array]) -> None:
    """Raise where what a prox returned is not a list with an array of the right library and shape for each of ``xs``."""
    if not isinstance(result, (list, tuple)) or len(result) != len(xs):
        found = len(result) if isinstance(result, (list, tuple)) else f"a {type(result).__name__}"
        raise ValueError(f"{name} must return a list of one array for each of {len(xs)}, got {found}")
    for r, x in zip(result, xs):
        shape = tuple(getattr(r, "shape", ("no array",)))
        fits = len(shape) >= x.ndim and all(m == n or n == 1 for m, n in zip(reversed(shape), reversed(x.shape)))
        if not fits:  # a larger shape is a batch
            raise ValueError(f"{name} must return an array of shape {tuple(x.shape)}, got {shape}")
        in_numpy = _arrays.is_numpy_array(r) or isinstance(r, np.generic)  # arithmetic of arrays without axes makes the latter
        if _arrays.is_torch_array(r) != _arrays.is_torch_array(x) or in_numpy != _arrays.is_numpy_array(x):
            raise TypeError(f"{name} must return an array of the library of x, a {type(x).__name__}, got a {type(r).__name__}")


def _forget_inherited_equation(cls: type[Penalty]) -> None:
    """Give a class with an equation of its own the defaults of ``Penalty`` for what its parent derived from another one."""
    stated = [name for name in EQUATION if name in vars(cls)]
    if not stated:
        return
    cls._has_form = "shrinkage" in stated
    stale = set(DERIVED)
    stale |= {"entries", "_value", "_prox"} if "shrinkage" in stated else set()
    stale |= {"entries"} if "_value" in stated else {"_value"} if "entries" in stated else set()
    parents = [parent for parent in cls.__mro__[1:] if issubclass(parent, Penalty) and parent is not Penalty]
    for name in stale - set(vars(cls)):
        if any(getattr(parent, name) is getattr(cls, name) for parent in parents):
            setattr(cls, name, getattr(Penalty, name))


@dataclass(frozen=True, eq=False)
class Formed(Penalty, register=False):
    """strength times a given ``Shrinkage``."""

    strength: float | Array
    form: Shrinkage

    def shrinkage(self) -> Shrinkage:
        scaled = {name: getattr(self.form, name) for name in ("l1", "l2")}
        return replace(self.form, **{name: v if v is None else self.strength * v for name, v in scaled.items()})
