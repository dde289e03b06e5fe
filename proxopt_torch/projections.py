"""The option ``"projection"`` of param groups: a map that is applied to the parameters after each step.

It is a live object in the group. A checkpoint holds a description of it only, which is compared with that of the optimizer that
loads the checkpoint: the plain data of a ``proxopt.Sphere``, or a name, with the arguments of a ``functools.partial``, the object
of a method, and the fields of a frozen dataclass. Two functions of one name, such as lambdas, are not told apart.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from proxopt import Sphere
from proxopt.penalties import declared
from proxopt_torch.param_groups import Entry, ParamGroup, State


class Projector(Protocol):
    """An object with a projection."""

    def project(self, x: Any) -> Any:
        """The projection of a tensor, or in a joint group of a list of tensors."""


Projection: TypeAlias = Projector | Callable[[Any], Any]


def check(projection: Any, problems: Sequence[Entry]) -> None:
    """Raise where the option is of the wrong type, or a ``Sphere`` does not fit the parameters of its group."""
    if projection is None:
        return
    if isinstance(projection, type):
        raise TypeError(f"projection must be an object such as {projection.__name__}(), got the class {projection.__name__}")
    if not (callable(projection) or callable(getattr(projection, "project", None))):
        raise TypeError(f"projection must be None, a callable, or an object with a method project(x), got {projection!r}")
    for entry in problems:
        for p in entry:
            if not (p.is_floating_point() or p.is_complex()):
                raise TypeError(f"a parameter with a projection must be floating point, got {p.dtype}")
        declared.check_fit(projection, entry)


def apply(group: ParamGroup, entry: Entry, states: Sequence[State] = ()) -> None:
    """Replace the parameters of an entry, and their prox points where there are any, by their projections.

    Raises ValueError or TypeError where the projection does not return tensors of the same shapes.
    """
    # autograd saves what it differentiates, and the parameters are overwritten below: it gets copies
    differentiable = bool(group.get("differentiable"))
    for p, value in zip(entry, _projected(group, [p.clone() for p in entry] if differentiable else entry)):
        p.copy_(value)
    with_point = [s for s in states if "point" in s]
    if not with_point:
        return
    for state, value in zip(with_point, _projected(group, [s["point"] for s in with_point])):
        if differentiable or torch.compiler.is_compiling():
            state["point"] = value
        else:
            state["point"].copy_(value)


def may_raise(group: ParamGroup) -> bool:
    """Whether the projection of a group is a function or an object of the user; a ``Sphere`` is checked before the step."""
    return not isinstance(group.get("projection"), (Sphere, type(None))) and not group.get("differentiable")


@contextmanager
def restoring(states: MutableMapping[Any, State], params: Sequence[Tensor]) -> Iterator[None]:
    """Set these parameters and their states back to what they are now if an error occurs inside."""
    capturing = any(p.is_cuda for p in params) and torch.cuda.is_current_stream_capturing()
    recorded = torch.compiler.is_compiling() or capturing  # nothing is computed yet
    saved = [] if recorded else [(p, p.clone(), _saved(states[p]) if p in states else None) for p in params]
    try:
        yield
    except BaseException:
        for p, value, state in saved:
            p.copy_(value)
            if state is None:
                states.pop(p, None)
            else:
                states[p].clear()
                states[p].update({k: _restored(*pair) for k, pair in state.items()})
        raise


def _saved(state: State) -> dict[str, tuple[Any, Any]]:
    """Each value of a state, and a copy of it."""
    return {k: (v, v.clone() if isinstance(v, Tensor) else copy.deepcopy(v)) for k, v in state.items()}


def _restored(value: Any, copied: Any) -> Any:
    return value.copy_(copied) if isinstance(value, Tensor) else copied  # the same tensor: other objects may refer to it


def _projected(group: ParamGroup, tensors: list[Tensor]) -> list[Tensor]:
    """The projections of the tensors of an entry, which are one problem in a joint group."""
    project = _function(group["projection"])
    found: list[Tensor] = project(list(tensors)) if group["joint"] else [project(tensors[0])]
    _check_result(found, tensors)
    return found


def packed(projection: Any) -> Any:
    """The description of a projection that a checkpoint holds: of a foreign one its name, and what it is made of if shown."""
    if projection is None or isinstance(projection, Sphere):
        return None if projection is None else projection.to_dict()
    name, shown = _name(projection), _shown(projection)
    return {"kind": "foreign", "name": name, **({} if shown == name else {"made_of": shown})}


def check_same(saved: Any, current: Any, where: str) -> None:
    """Raise ValueError where a checkpoint, or a param group in memory, holds another projection than the optimizer."""
    saved = saved if isinstance(saved, dict) else packed(saved)
    own = packed(current)
    by_name = {k: v for k, v in (own or {}).items() if k != "made_of"}  # as earlier checkpoints hold it
    if saved not in (own, by_name):
        raise ValueError(f"state_dict must hold the projection {own} in {where}, got {saved}")


def _function(projection: Any) -> Callable[[Any], Any]:
    method = getattr(projection, "project", None)
    return method if callable(method) else projection  # type: ignore[no-any-return]


def _name(projection: Any) -> str:
    """The qualified name of a function, or of the class of an object."""
    named = projection if hasattr(projection, "__qualname__") else type(projection)
    return f"{named.__module__}.{named.__qualname__}"


def _shown(v: Any) -> str:
    """A text that is the same for equal values: arguments of a partial function, the owner of a method, fields that are frozen.

    Numbers and texts are shown, arrays by a digest of their entries. Any other object has its name only, as what it holds may
    change from step to step.
    """
    if isinstance(v, Sphere):
        return str(v.to_dict())
    if isinstance(v, (Tensor, np.ndarray)):
        return f"{tuple(v.shape)} of {v.dtype} {_digest(torch.as_tensor(v) if v.dtype != object else None)}".rstrip()
    if isinstance(v, (list, tuple)):
        return f"[{', '.join(map(_shown, v))}]"
    if isinstance(v, dict):
        return f"{{{', '.join(f'{_shown(k)}: {_shown(v[k])}' for k in v)}}}"
    if isinstance(v, functools.partial):
        named = [f"{k}={_shown(v.keywords[k])}" for k in sorted(v.keywords)]
        return f"{_shown(v.func)}({', '.join([*map(_shown, v.args), *named])})"
    owner = getattr(v, "__self__", None)  # of built-in functions it is a module or a class
    if owner is not None and not isinstance(owner, (type, ModuleType)):
        return f"{_shown(owner)}.{getattr(v, '__name__', type(v).__name__)}"
    if dataclasses.is_dataclass(v) and not isinstance(v, type) and type(v).__dataclass_params__.frozen:  # type: ignore[attr-defined]
        fields = [f"{f.name}={_shown(getattr(v, f.name))}" for f in dataclasses.fields(v) if f.init]
        return f"{_name(v)}({', '.join(fields)})"
    if isinstance(v, (float, np.floating)) or (type(v) is int and abs(v) < 2**53):
        return repr(float(v))
    return repr(v) if isinstance(v, (str, bytes, int, complex, type(None), np.generic)) else _name(v)


def _digest(x: Tensor | None) -> str:
    """A short text that depends on all entries of an ordinary tensor."""
    if x is None or type(x) not in (Tensor, torch.nn.Parameter) or x.layout != torch.strided or x.device.type == "meta":
        return ""
    entries = x.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return hashlib.sha256(entries.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def _check_result(found: Any, tensors: Sequence[Tensor]) -> None:
    if not isinstance(found, (list, tuple)) or len(found) != len(tensors):
        got = len(found) if isinstance(found, (list, tuple)) else f"a {type(found).__name__}"
        raise ValueError(f"projection must return a list of one tensor for each of {len(tensors)} in a joint group, got {got}")
    for value, t in zip(found, tensors):
        if not isinstance(value, Tensor):
            raise TypeError(f"projection must return a tensor, got a {type(value).__name__}")
        if value.is_complex() and not t.is_complex():
            raise TypeError(f"projection must return a real tensor for one of {t.dtype}, got {value.dtype}")
        if value.shape != t.shape:
            raise ValueError(f"projection must return a tensor of shape {tuple(t.shape)}, got {tuple(value.shape)}")
