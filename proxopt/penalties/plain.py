"""Penalties as plain data, which checkpoints hold: strings, numbers and lists, under the qualified name of the class."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from proxopt import _arrays, _checks
from proxopt._arrays import Array
from proxopt.groups import Groups

if TYPE_CHECKING:
    from proxopt.penalties.base import Penalty

KINDS: dict[str, type[Penalty]] = {}


def from_dict(data: dict[str, Any], strength: float | Array) -> Penalty:
    """The penalty that ``Penalty.to_dict`` described, at the given strength.

    Raises ValueError for a class that no imported module has defined: data never leads to an import.
    """
    name = str(data.get("kind"))
    if name not in KINDS and "." in name:
        raise ValueError(f"penalty kind {name!r} must be defined before its data is read: import {name.rpartition('.')[0]} first")
    _checks.one_of("penalty kind", name, tuple(known for known in KINDS if "." not in known or known == name))
    return KINDS[name]._from_dict(data, strength)


def plain_data(operator: Any) -> dict[str, Any] | None:
    """``Penalty.to_dict`` of an operator that ``from_dict`` would rebuild; None for any other, which must stay an object."""
    name = kind(type(operator))
    if "<locals>" in name or KINDS.get(name) is not type(operator):  # another class may have the same name
        return None
    try:
        data = operator.to_dict()
        again = from_dict(data, 0.0)
        if again.to_dict() != data:
            return None
    except TypeError:
        return None
    names = [name for name in data if name not in ("kind", "weights")]  # weights may come back as a list
    pairs = [(getattr(operator, name), getattr(again, name)) for name in names]
    return data if all(type(a) is type(b) or (_arrays.is_number(a) and _arrays.is_number(b)) for a, b in pairs) else None


def kind(cls: type) -> str:
    """What plain data calls a class: its qualified name, and the bare name for the classes of this package."""
    return cls.__name__ if is_own(cls) else f"{cls.__module__}.{cls.__qualname__}"


def is_own(cls: type) -> bool:
    """Whether the class is one of this package."""
    return cls.__module__.startswith("proxopt.")


def field_names(penalty: Penalty) -> list[str]:
    """Names of the fields of a dataclass; none for another class."""
    return [f.name for f in fields(penalty)] if is_dataclass(penalty) else []


def is_rebuilt_from_fields(penalty: Penalty) -> bool:
    """Whether the constructor of the class, called with the fields of this penalty, makes an equal one."""
    cls = type(penalty)
    maker = next(c for c in cls.__mro__ if "__init__" in vars(c))
    generated = "__dataclass_params__" in vars(maker) and vars(maker)["__dataclass_params__"].init
    return generated and set(getattr(penalty, "__dict__", ())) <= set(field_names(penalty))


def same_strength(a: Any, b: Any) -> bool:
    """Whether two strengths, numbers or arrays, are equal."""
    if _arrays.ndim(a) != _arrays.ndim(b):
        return False
    return a is b or (bool((a == b).all()) if _arrays.ndim(a) and a.shape == b.shape else not _arrays.ndim(a) and bool(a == b))


def plain(name: str, value: Any, arrays: bool) -> Any:
    """A field as strings, numbers and lists. arrays: whether they may become lists."""
    if type(value) in (str, int, float, bool, type(None)):
        return value
    if isinstance(value, np.generic) and type(value.item()) in (int, float, bool):
        return value.item()
    if isinstance(value, Groups):
        return value.to_dict()
    if type(value) in KINDS.values():
        return value.to_dict() | {"strength": plain("strength", value.strength, True)}
    if isinstance(value, (list, tuple)):
        return [plain(name, v, arrays) for v in value]
    if hasattr(value, "tolist") and arrays:
        return value.tolist()
    raise TypeError(f"{name} must be a string, number, Groups or Penalty to be plain data, got {value!r}")


def restored(value: Any) -> Any:
    """The inverse of `plain`, arrays aside, which stay lists."""
    if isinstance(value, dict):
        if value["kind"] in ("whole", "along", "labels"):
            return Groups.from_dict(value)
        strength = value.get("strength")
        return from_dict(
            {k: v for k, v in value.items() if k != "strength"}, np.asarray(strength) if isinstance(strength, list) else strength
        )
    return [restored(v) for v in value] if isinstance(value, list) and value and isinstance(value[0], dict) else value
