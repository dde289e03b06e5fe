"""Optimizers of a smaller model that continue with the sliced state of another optimizer."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from proxopt import Groups
from proxopt_torch.compaction.slicing import Kept, first_names

O = TypeVar("O", bound=Optimizer)  # noqa: E741

POINTS = ("point", "search_point")
"""States that hold values of the parameter: what was added to a bias is added to them too."""


def sliced(optimizer: O, before: nn.Module, after: nn.Module, kept: dict[str, Kept], shifts: dict[str, Tensor]) -> O:
    """A copy of an optimizer of the model ``before`` for the smaller model ``after``.

    Args:
      kept: the remaining indices of the tensors that were cut, by name.
      shifts: what was added to biases of ``after``, by name.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if isinstance(getattr(optimizer, "base", optimizer), torch.optim.LBFGS):
        raise ValueError("optimizer must have a state for each parameter, got LBFGS: make a new one for the smaller model")
    names, new = first_names(before), dict(after.named_parameters(remove_duplicate=False))
    old = dict(before.named_parameters(remove_duplicate=False))
    owners = {id(p): names[name] for name, p in reversed(old.items())}
    used = [p for group in optimizer.param_groups for p in group["params"]]
    foreign = [p for p in used if id(p) not in owners]
    if foreign:
        raise ValueError(
            f"optimizer must hold parameters of the model that was compacted, got {len(foreign)} others of {len(used)}"
        )
    memo: dict[int, Any] = {id(p): new[name] for p, name in ((p, owners[id(p)]) for p in used)}
    result = copy.deepcopy(optimizer, memo)
    cut = {id(memo[id(p)]): kept.get(owners[id(p)]) for p in used}
    shapes = {id(memo[id(p)]): tuple(p.shape) for p in used}
    added = {id(memo[id(p)]): shifts.get(owners[id(p)]) for p in used}
    for p, state in result.state.items():
        if isinstance(p, Tensor) and isinstance(state, dict):
            for key, value in state.items():
                state[key] = _state(key, value, shapes[id(p)], cut[id(p)], added[id(p)])
    groups = [part for group in result.param_groups for part in _group(group, cut, shapes)]
    result.param_groups[:] = groups
    present = {id(p) for group in groups for p in group["params"]}
    for name, p in after.named_parameters():
        if name not in old and id(p) not in present:  # the bias of a layer that had none
            template = next((g for g in groups if any(q is _weight(after, name) for q in g["params"])), None)
            if template is not None:
                _add(result, template, name, p)
    return result


def _weight(model: nn.Module, name: str) -> Tensor | None:
    return dict(model.named_parameters()).get(name.rpartition(".")[0] + ".weight")


def _add(optimizer: Optimizer, template: dict[str, Any], name: str, p: nn.Parameter) -> None:
    """Add a parameter in a group of its own, with the hyperparameters of another group and without penalty."""
    without = ("params", "param_names", "penalty", "strength", "joint", "projection", "mode")
    group: dict[str, Any] = {k: v for k, v in template.items() if k not in without}
    group["params"] = [(name, p)] if "param_names" in template else [p]
    if "penalty" in template:
        group["penalty"] = None
    optimizer.add_param_group(group)
    if "mode" in template:
        optimizer.param_groups[-1]["mode"] = template["mode"]


def _state(key: str, value: Any, shape: tuple[int, ...], kept: Kept | None, shift: Tensor | None) -> Any:
    """A state as it is for the smaller parameter: axes of its sizes are cut, those of size 1 (factored states) are not."""
    if not isinstance(value, Tensor) or value.ndim != len(shape):
        return value
    if any(n not in (1, size) for n, size in zip(value.shape, shape)):
        return value
    for dimension, indices in enumerate(kept or ()):
        if indices is not None and value.shape[dimension] == shape[dimension]:
            value = value.index_select(dimension, indices.to(value.device))
    if key in POINTS and shift is not None:
        value = value + shift.to(value)
    return value


def _group(group: dict[str, Any], cut: dict[int, Kept | None], shapes: dict[int, tuple[int, ...]]) -> list[dict[str, Any]]:
    """A param group whose penalty fits the smaller parameters; one for each parameter where they need different penalties."""
    params = group["params"]
    sizes, kept = [shapes[id(p)] for p in params], [cut[id(p)] for p in params]
    if all(k is None for k in kept) or not isinstance(group.get("penalty"), dict):
        return [group]
    if group.get("joint"):
        return [{**group, "penalty": _penalty(group["penalty"], sizes, kept)}]
    if not _by_position(group):
        return [group]
    out = []
    for index, p in enumerate(params):
        part = {**group, "params": [p], "penalty": _penalty(group["penalty"], sizes[index : index + 1], kept[index : index + 1])}
        if "param_names" in group:
            part["param_names"] = group["param_names"][index : index + 1]
        if isinstance(group["strength"], Tensor) and group["strength"].ndim:
            part["strength"] = _aligned(group["strength"], sizes[index], kept[index])
        out.append(part)
    return out


def _by_position(group: dict[str, Any]) -> bool:
    """Whether a penalty holds labels or arrays for the positions of a parameter."""

    def found(value: Any) -> bool:
        if isinstance(value, dict):
            return value.get("kind") == "labels" or any(found(v) for k, v in value.items() if k != "axis")
        if isinstance(value, (list, tuple)):
            return any(found(v) if isinstance(v, dict) else True for v in value)
        return isinstance(value, (Tensor, np.ndarray)) and value.ndim > 0

    array = isinstance(group["strength"], Tensor) and group["strength"].ndim > 0
    return array or found(group["penalty"])


def _penalty(data: Any, sizes: Sequence[tuple[int, ...]], kept: Sequence[Kept | None]) -> Any:
    """The plain data of a penalty for smaller parameters."""
    if isinstance(data, list) and data and isinstance(data[0], dict):
        return [_penalty(item, sizes, kept) for item in data]
    if not isinstance(data, dict):
        return data
    out = {key: _penalty(value, sizes, kept) for key, value in data.items()}
    groups, weights = data.get("groups"), data.get("weights")
    if isinstance(groups, dict) and groups["kind"] == "labels":
        out["groups"] = _labels(groups, sizes, kept)
        if _is_array(weights):
            before, after = Groups.from_dict(groups).names, Groups.from_dict(out["groups"]).names
            out["weights"] = _taken(weights, [before.index(name) for name in after])
    elif isinstance(groups, dict) and groups["kind"] == "along" and _is_array(weights):
        inside = [axis % len(sizes[0]) for axis in np.atleast_1d(groups["axis"])]
        outer = [d for d in range(len(sizes[0])) if d not in inside]
        cuts = tuple((kept[0] or (None,) * len(sizes[0]))[d] for d in outer)
        out["weights"] = _aligned(weights, tuple(sizes[0][d] for d in outer), cuts)
    return out


def _labels(groups: dict[str, Any], sizes: Sequence[tuple[int, ...]], kept: Sequence[Kept | None]) -> dict[str, Any]:
    labels, axis = groups["labels"], groups["axis"]
    several = len(sizes) > 1 or isinstance(axis, list)
    parts = labels if several else [labels]
    axes = axis if isinstance(axis, list) else [axis] * len(parts)
    cut = [_labels_of_one(part, a, size, k) for part, a, size, k in zip(parts, axes, sizes, kept)]
    return {**groups, "labels": cut if several else cut[0]}


def _labels_of_one(labels: list[Any], axis: int | None, size: tuple[int, ...], kept: Kept | None) -> list[Any]:
    if kept is None:
        return labels
    if axis is not None:
        indices = kept[axis % len(size)]
        return labels if indices is None else [labels[i] for i in indices.tolist()]
    array = np.asarray(labels)
    for dimension, indices in enumerate(kept):
        if indices is not None:
            array = array.take(indices.cpu().numpy(), dimension)
    return list(array.tolist())


def _aligned(value: Any, size: tuple[int, ...], kept: Kept | None) -> Any:
    """An array that broadcasts to a size, for the remaining indices."""
    array = torch.as_tensor(value)
    for dimension, indices in enumerate(kept or ()):
        axis = dimension - len(size)
        if indices is not None and array.ndim >= -axis and array.shape[axis] == size[dimension] and size[dimension] > 1:
            array = array.index_select(axis + array.ndim, indices.to(array.device))
    return array if isinstance(value, Tensor) else array.numpy() if isinstance(value, np.ndarray) else array.tolist()


def _is_array(value: Any) -> bool:
    return isinstance(value, (list, tuple)) or (isinstance(value, (Tensor, np.ndarray)) and value.ndim > 0)


def _taken(value: Any, indices: list[int]) -> Any:
    return [value[i] for i in indices] if isinstance(value, (list, tuple)) else value[indices]
