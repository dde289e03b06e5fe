"""What a param group says about its penalty: plain data in the group, a penalty object for the step.

`group["strength"]` is the only truth at run time; `group["penalty"]` is the rest, a dict of strings, numbers and lists that
`torch.load(weights_only=True)` accepts. A penalty from elsewhere (an object with `value` and `prox`) stays a live object, and
checkpoints hold its name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from typing import Any

import numpy as np
import torch
from torch import Tensor

from proxopt import Groups, ProxOperator
from proxopt._arrays import is_number
from proxopt._checks import in_range
from proxopt.penalties import declared, from_dict, plain_data

FOREIGN = "foreign"
MANY = 3  # parameters; a group penalty on so many at once is seldom meant to have each as one group
# keys that torch and its schedulers write into param groups, and the name that many people give them
BY_TORCH = "params param_names initial_lr max_lr min_lr swa_lr base_momentum max_momentum name".split()


def normalise(group: dict) -> None:
    """Turn a penalty object in `group` into plain data, and its strength into `group["strength"]`."""
    penalty = group["penalty"]
    if penalty is None:
        group["strength"] = 0.0 if group.get("strength") is None else group["strength"]
    elif not isinstance(penalty, dict):
        check_operator(penalty)
        data = plain_data(penalty)
        group["strength"] = None if data is None else plain_strength(penalty.strength)
        if data is not None:
            group["penalty"] = data


def check_operator(penalty: Any) -> None:
    """Raise TypeError unless `penalty` has the methods of a `ProxOperator`."""
    if isinstance(penalty, type):
        raise TypeError(f"penalty must be an object such as {penalty.__name__}(1e-3), got the class {penalty.__name__}")
    if not isinstance(penalty, ProxOperator):
        raise TypeError(f"penalty must be a penalty (an object with value and prox) or None, got {penalty!r}")


def unread(given: Iterable[str], known: Iterable[str]) -> str | None:
    """A sentence on the keys of a new param group that the optimizer does not know; None where it knows them all."""
    known = {*known, *BY_TORCH}
    notes = []
    for key in given:
        if key not in known:
            close = get_close_matches(key, known, n=1, cutoff=0.7)
            notes.append(repr(key) + (f" (did you mean {close[0]!r}?)" if close else ""))
    return f"a param group has keys that this optimizer does not read: {', '.join(notes)}" if notes else None


def doubts(group: dict, strength: Any, penalty: Any) -> Iterator[str]:
    """Sentences on what a new param group most likely does not mean; `strength` is the one given in it."""
    if penalty is None and strength is not None and not (is_number(strength) and strength == 0):
        yield f"a param group has the strength {strength} but no penalty, so that nothing is shrunk: add its key 'penalty'"
    ungrouped = penalty is not None and getattr(penalty, "__dict__", {}).get("groups", penalty) is None
    if ungrouped and not group["joint"] and len(group["params"]) >= MANY:
        yield (
            f"{type(penalty).__name__} without groups makes one group of each of {len(group['params'])} parameters, zeroed as a "
            "whole or not at all: pass groups such as Groups.along(0), use proxopt_torch.groups, or say groups=Groups.whole()"
        )


def plain_strength(strength: Any) -> Any:
    """A float or a tensor: what a checkpoint may hold."""
    if isinstance(strength, Tensor):
        return strength
    if isinstance(strength, (np.ndarray, list)) and np.ndim(strength):
        return torch.as_tensor(strength)
    in_range("strength", strength)
    return float(strength)


def rebuild(group: dict) -> Any:
    """The penalty that `group` describes, at its strength; None where it has none."""
    penalty, strength = group["penalty"], group["strength"]
    if not isinstance(penalty, dict):
        return penalty
    if strength is None:
        raise ValueError(f"strength must be a number for the penalty {penalty['kind']}, got None")
    return from_dict(penalty, strength)


def fingerprint(group: dict) -> tuple:
    """Changes when `rebuild` would give another penalty; cheap enough for every step."""
    penalty, strength = group["penalty"], group["strength"]
    if not isinstance(penalty, dict):
        return (id(penalty),)
    cheap = tuple(v if isinstance(v, (str, float, int, type(None))) else id(v) for v in penalty.values())
    return (*cheap, id(strength) if isinstance(strength, Tensor) else strength)


def name(penalty: Any) -> str | None:
    """What an error message calls a penalty in a param group."""
    if penalty is None:
        return None
    return penalty["kind"] if isinstance(penalty, dict) else f"{type(penalty).__module__}.{type(penalty).__qualname__}"


def check_fit(penalty: Any, entries: list[list[Tensor]], joint: bool) -> None:
    """Raise where a penalty does not fit the parameters of its group."""
    if joint and len({id(p) for entry in entries for p in entry}) != sum(map(len, entries)):
        raise ValueError("params of a joint group must hold each parameter once, got the same parameter twice")
    for entry in entries if penalty is not None else []:
        declared.check_fit(penalty, entry)
        strength = getattr(penalty, "strength", None)
        if isinstance(strength, Tensor) and strength.ndim:
            for p in entry:
                try:
                    fits = torch.broadcast_shapes(strength.shape, p.shape) == p.shape
                except RuntimeError:
                    fits = False
                if not fits:
                    raise ValueError(
                        f"strength must broadcast to the parameter's shape {tuple(p.shape)}, got {tuple(strength.shape)}"
                    )


def packed(group: dict) -> dict:
    """`group` for a state_dict: a foreign penalty becomes its name."""
    penalty = group["penalty"]
    if penalty is None or isinstance(penalty, dict):
        return group
    return {**group, "penalty": {"kind": FOREIGN, "name": name(penalty)}}


def check_same(saved: Any, live: Any, where: str) -> None:
    """Raise where a checkpoint holds another kind of penalty or other groups than the optimizer."""
    if isinstance(saved, dict) and saved.get("kind") == FOREIGN:
        saved_name: Any = saved["name"]
    else:
        saved_name = name(saved)
    if saved_name != name(live):
        raise ValueError(f"state_dict must hold the penalty {name(live)} in {where}, got {saved_name}")
    if isinstance(live, dict) and _group_data(saved) != _group_data(live):
        raise ValueError(f"state_dict must hold the same groups in {where}: {_shown(live)}, got {_shown(saved)}")


def _group_data(penalty: dict) -> list:
    if "penalties" in penalty:
        return [(level["kind"], level.get("groups")) for level in penalty["penalties"]]
    groups = penalty.get("groups")
    return [groups if groups is not None else Groups.whole().to_dict()]


def _shown(penalty: dict) -> str:
    text = str(_group_data(penalty))
    return text if len(text) < 200 else text[:200] + "..."
