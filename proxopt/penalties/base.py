"""What all penalties share: the doors `value` and `prox`, their checks, and plain data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, ClassVar, TypeVar

import numpy as np

from proxopt import _arrays, _checks
from proxopt._arrays import Array
from proxopt.groups import Groups

P = TypeVar("P", bound="Penalty")
METRICS = (None, "exact", "median", "support")


class Penalty(ABC):
    """A convex penalty f with an exact proximal operator.

    Subclasses are frozen dataclasses that state `_value` and `_prox` for a list of real arrays. Their doors
    `value` and `prox` check the input, compute half precision in float32 and hand back what came in.

    Declared properties, which `proxopt.testing.check_prox` holds a penalty to:
      convex: f is convex, so the prox is firmly nonexpansive.
      homogeneous: f(c x) = c f(x) for c >= 0, so Moreau's identity has the projection on a dual ball.
    """

    strength: Any
    convex: ClassVar[bool] = True
    homogeneous: ClassVar[bool] = True

    def value(self, x: Any) -> Array:
        """f(x), a zero-dimensional array; summed over the problems of a batch.

        Its gradient at x = 0, and at a group of zeros, is the symmetric subgradient 0 in every library.
        """
        arrays, _ = _arrays.as_list(x)
        self._check(arrays)
        return self._value([_arrays.widen(a) for a in arrays])

    def prox(self, x: Any, step: Any = 1.0, *, out: Any = None) -> Any:
        """argmin_z f(z) + sum((z - x)^2 / (2 step)), in the library, dtype, shape and device of x.

        Args:
          x: a floating-point array of any array API library, or a list of them (one joint problem).
          step: a number >= 0, or an array that broadcasts against x (a diagonal metric); for a list of
            arrays a number or a matching list. An entry with step 0 stays as it is.
          out: mutable array (or list) that takes the result; may be x itself.

        Derivatives with respect to x, step and strength are right up to the third order. Those of zeroed entries are 0, and at
        step or strength 0 they are the limits from above. Steps with ties under metric="median", and steps of 0 under "support",
        are kinks of the metric: the derivatives with respect to them are finite there, but no limits.

        Raises:
          TypeError: x is not floating point, or `out` cannot be written.
          ValueError: step is negative or not finite, or the groups do not fit x.
        """
        arrays, _ = _arrays.as_list(x)
        self._check(arrays)
        steps = match_steps(step, arrays)
        if any(_arrays.size(a) for a in arrays):
            wide = [_arrays.widen(a) for a in arrays]
            result = self._prox(wide, [_arrays.like(s, a) for s, a in zip(steps, wide)])
        else:
            result = [a * 1 for a in arrays]
        result = [_arrays.cast(r, a) for r, a in zip(result, arrays)]
        return _arrays.like_input(x, result if out is None else _write(out, result))

    def with_metric(self: P, default: str) -> P:
        """This penalty, with `default` where its metric was left to the caller."""
        if getattr(self, "metric", default) is not None:
            return self
        return replace(self, metric=default)  # type: ignore[type-var]

    def with_strength(self: P, strength: Any) -> P:
        """This penalty at another strength."""
        return replace(self, strength=strength)  # type: ignore[type-var]

    def to_dict(self) -> dict:
        """Everything but the strength as plain data: strings, numbers, lists. `from_dict` is the inverse."""
        data: dict = {"kind": type(self).__name__}
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if f.name != "strength":
                data[f.name] = value.to_dict() if isinstance(value, Groups) else _plain(value)
        return data

    @classmethod
    def _from_dict(cls: type[P], data: dict, strength: Any) -> P:
        options = {k: v for k, v in data.items() if k != "kind"}
        if options.get("groups") is not None:
            options["groups"] = Groups.from_dict(options["groups"])
        return cls(strength=strength, **options)  # type: ignore[call-arg]

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        assert isinstance(other, Penalty)
        same = np.array_equal(np.asarray(self.strength), np.asarray(other.strength))
        return same and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash((type(self).__name__, *(f.name for f in fields(self))))  # type: ignore[arg-type]

    def _check(self, xs: Sequence[Array]) -> None:
        """Raise where the penalty does not fit the arrays."""
        for x in xs:
            _broadcasts("strength", self.strength, x)

    @abstractmethod
    def _value(self, xs: list[Array]) -> Array:
        """f of real or complex arrays in at least single precision."""

    @abstractmethod
    def _prox(self, xs: list[Array], steps: list[Any]) -> list[Array]:
        """The prox of such arrays, with one step (a float or an array) each."""


def match_steps(step: Any, arrays: Sequence[Array]) -> list[Any]:
    """`step` as one number or array per array."""
    steps = list(step) if isinstance(step, (list, tuple)) else [step] * len(arrays)
    if len(steps) != len(arrays):
        raise ValueError(f"step must be a number or one entry per array, {len(arrays)}, got {len(steps)}")
    for s, x in zip(steps, arrays):
        _checks.in_range("step", s)
        _broadcasts("step", s, x)
    return [float(s) if _arrays.is_number(s) else s for s in steps]


def check_strength(strength: Any) -> None:
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


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value
