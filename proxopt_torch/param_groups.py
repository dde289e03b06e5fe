"""The penalty of a param group as plain data, and the conversion from and to penalty objects.

``group["strength"]`` is the strength that counts at run time: schedulers and loops write it. ``group["penalty"]`` holds the
rest of the penalty as a dict of strings, numbers and lists, which ``torch.load(weights_only=True)`` accepts. A penalty that
cannot be written as plain data, such as an operator from another library, stays an object in the group; a checkpoint then
holds its name only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from proxopt import Groups, ProxOperator
from proxopt._arrays import is_number
from proxopt._checks import in_range
from proxopt.penalties import declared, from_dict, plain_data

ParamGroup: TypeAlias = dict[str, Any]
State: TypeAlias = dict[str, Any]  # of one parameter
# Wider than ParamsT of torch, a union of iterables: with that, mypy refuses a list of groups which do not all have the same keys
Params: TypeAlias = Iterable[Tensor | tuple[str, Tensor] | ParamGroup]
Entry: TypeAlias = list[Tensor]  # parameters that are one problem: all of a joint group, or a single one

FOREIGN = "foreign"
# From so many parameters on, a penalty that makes each of them one group is probably a mistake
MANY = 3
# keys that torch and its schedulers write into param groups, and "name", which many users add
BY_TORCH = "params param_names initial_lr max_lr min_lr swa_lr base_momentum max_momentum name".split()


def entries(group: ParamGroup) -> list[Entry]:
    """Split the parameters of a group into problems: all of them as one where it is joint, else each alone."""
    return [group["params"]] if group["joint"] else [[p] for p in group["params"]]


def with_gradient(group: ParamGroup) -> list[Entry]:
    """The entries of a group in which every parameter has a gradient."""
    if not group["joint"]:
        return [[p] for p in group["params"] if p.grad is not None]
    return [entry for entry in entries(group) if all(p.grad is not None for p in entry)]


def normalise(group: ParamGroup) -> None:
    """Turn a penalty object in ``group`` into plain data, and its strength into ``group["strength"]``."""
    penalty = group["penalty"]
    if penalty is None:
        group["strength"] = 0.0 if group.get("strength") is None else group["strength"]
    elif not isinstance(penalty, dict):
        check_operator(penalty)
        data = plain_data(penalty)
        if data is not None:
            group["strength"], group["penalty"] = plain_strength(penalty.strength), data


def own_strength(penalty: ProxOperator) -> float | Tensor | None:
    """The strength of a penalty that stays an object; None for an operator that has no strength to be set."""
    if not callable(getattr(penalty, "with_strength", None)):
        return None
    return plain_strength(penalty.strength)  # type: ignore[attr-defined]


def has_strength(group: ParamGroup) -> bool:
    """Whether the strength of the penalty of a group can be set."""
    penalty = group["penalty"]
    return isinstance(penalty, dict) or callable(getattr(penalty, "with_strength", None))


def check_operator(penalty: object) -> None:
    """Raise TypeError unless ``penalty`` has the methods of a ``ProxOperator``."""
    if isinstance(penalty, type):
        raise TypeError(f"penalty must be an object such as {penalty.__name__}(1e-3), got the class {penalty.__name__}")
    if not isinstance(penalty, ProxOperator):
        raise TypeError(f"penalty must be a penalty (an object with value and prox) or None, got {penalty!r}")


def unread(given: Iterable[str], known: Iterable[str]) -> str | None:
    """A warning about keys of a new param group that the optimizer does not use; None where it uses them all."""
    known = {*known, *BY_TORCH}
    notes = []
    for key in given:
        if key not in known:
            close = get_close_matches(key, known, n=1, cutoff=0.7)
            notes.append(repr(key) + (f" (did you mean {close[0]!r}?)" if close else ""))
    return f"a param group has keys that this optimizer does not read: {', '.join(notes)}" if notes else None


def doubts(group: ParamGroup, strength: Any, penalty: ProxOperator | None) -> Iterator[str]:
    """Warnings about what is probably a mistake in a new param group; ``strength`` is the value that was given in it."""
    if penalty is None and strength is not None and not (is_number(strength) and strength == 0):
        yield f"a param group has the strength {strength} but no penalty, so that nothing is shrunk: add its key 'penalty'"
    ungrouped = penalty is not None and getattr(penalty, "__dict__", {}).get("groups", penalty) is None
    if ungrouped and not group["joint"] and len(group["params"]) >= MANY:
        yield (
            f"{type(penalty).__name__} without groups makes one group of each of {len(group['params'])} parameters, zeroed as a "
            "whole or not at all: pass groups such as Groups.along(0) or use proxopt_torch.groups; pass groups=Groups.whole() if "
            "this is what you want"
        )


def plain_strength(strength: Any) -> float | Tensor:
    """The strength as a float or a tensor, which a checkpoint may hold."""
    if isinstance(strength, Tensor):
        return strength
    if isinstance(strength, (np.ndarray, list)) and np.ndim(strength):
        return torch.as_tensor(strength)
    in_range("strength", strength)
    return float(strength)


def rebuild(group: ParamGroup) -> ProxOperator | None:
    """The penalty object that ``group`` describes, with its strength; None where it has none."""
    penalty, strength = group["penalty"], group["strength"]
    if isinstance(penalty, dict):
        if strength is None:
            raise ValueError(f"strength must be a number for the penalty {penalty['kind']}, got None")
        return from_dict(penalty, strength)
    own: Any = getattr(penalty, "strength", None)
    unchanged = strength is own or (is_number(strength) and is_number(own) and float(strength) == float(own))
    if penalty is None or strength is None or unchanged:
        operator: ProxOperator | None = penalty
        return operator
    if not has_strength(group):
        raise ValueError(f"strength of {name(penalty)} cannot be set, it has no method with_strength, got {strength}")
    changed: ProxOperator = penalty.with_strength(strength)
    return changed


def fingerprint(group: ParamGroup) -> tuple[Any, ...]:
    """A key that changes when ``rebuild`` would return another penalty; cheap enough to compute in every step."""
    penalty, strength = group["penalty"], group["strength"]
    if not isinstance(penalty, dict):
        return (id(penalty), id(strength) if isinstance(strength, Tensor) else strength)
    # lists and tensors by identity: comparing their entries would cost more than the step of a small parameter
    cheap = tuple(v if isinstance(v, (str, float, int, type(None))) else id(v) for v in penalty.values())
    return (*cheap, id(strength) if isinstance(strength, Tensor) else strength)


def name(penalty: Any) -> str | None:
    """The name by which error messages and checkpoints call the penalty of a param group."""
    if penalty is None:
        return None
    return penalty["kind"] if isinstance(penalty, dict) else f"{type(penalty).__module__}.{type(penalty).__qualname__}"


def check_fit(penalty: ProxOperator | None, problems: list[Entry], joint: bool) -> None:
    """Raise ValueError where a penalty does not fit the parameters of its group."""
    if joint and len({id(p) for entry in problems for p in entry}) != sum(map(len, problems)):
        raise ValueError("params of a joint group must hold each parameter once, got the same parameter twice")
    if penalty is None:
        return
    strength: Any = getattr(penalty, "strength", None)
    for entry in problems:
        declared.check_fit(penalty, entry)
        for p in entry if isinstance(strength, Tensor) and strength.ndim else []:
            if not _broadcasts(strength, p):
                raise ValueError(
                    f"strength must broadcast to the parameter's shape {tuple(p.shape)}, got {tuple(strength.shape)}"
                )


def _broadcasts(strength: Tensor, p: Tensor) -> bool:
    try:
        return np.broadcast_shapes(tuple(strength.shape), tuple(p.shape)) == tuple(p.shape)
    except ValueError:
        return False


def packed(group: ParamGroup) -> ParamGroup:
    """``group`` as a state_dict holds it: a penalty that is no plain data is replaced by its name."""
    penalty = group["penalty"]
    if penalty is None or isinstance(penalty, dict):
        return group
    return {**group, "penalty": {"kind": FOREIGN, "name": name(penalty)}}


def check_same(saved: Any, current: Any, where: str) -> None:
    """Raise ValueError where a checkpoint holds another kind of penalty, or other groups, than the optimizer."""
    foreign = isinstance(saved, dict) and saved.get("kind") == FOREIGN
    saved_name = saved["name"] if foreign else name(saved)
    if saved_name != name(current):
        raise ValueError(f"state_dict must hold the penalty {name(current)} in {where}, got {saved_name}")
    if isinstance(current, dict) and _group_data(saved) != _group_data(current):
        raise ValueError(f"state_dict must hold the same groups in {where}: {_shown(current)}, got {_shown(saved)}")


def _group_data(penalty: dict[str, Any]) -> list[Any]:
    """What two descriptions of a penalty must have in common: the kinds and groups of its levels, not its numbers."""
    if "penalties" in penalty:
        return [(level["kind"], level.get("groups")) for level in penalty["penalties"]]
    if "penalty" in penalty:
        return [(penalty["penalty"]["kind"], *_group_data(penalty["penalty"]))]
    groups = penalty.get("groups")
    return [groups if groups is not None else Groups.whole().to_dict()]


def _shown(penalty: dict[str, Any]) -> str:
    text = str(_group_data(penalty))
    return text if len(text) < 200 else text[:200] + "..."
