"""Checks of a checkpoint before it is loaded, what older or foreign checkpoints leave open, and checkpoints of the prox point."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from proxopt_torch import param_groups, projections, sharding
from proxopt_torch.frozen_zeros import FROZEN, ZEROS
from proxopt_torch.options import EVAL, TRAIN
from proxopt_torch.param_groups import ParamGroup, State

if TYPE_CHECKING:
    from proxopt_torch.penalised import Penalised

States = dict[Any, State]  # by the index of the parameter


def packed(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state_dict with descriptions in place of the penalties that are no plain data, and of projections."""
    groups = [param_groups.packed(g) for g in state_dict["param_groups"]]
    return {**state_dict, "param_groups": [{**g, "projection": projections.packed(g.get("projection"))} for g in groups]}


def prox_points(optimizer: Penalised) -> dict[int, Tensor]:
    """The prox points of parameters that hold the search point now, by the id of the parameter."""
    held = [p for group in optimizer.param_groups if group["mode"] == TRAIN for p in group["params"]]
    return {id(p): state["point"] for p in held if "point" in (state := optimizer.state.get(p) or {})}


def of_eval_mode(optimizer: Penalised, state_dict: dict[str, Any]) -> dict[str, Any]:
    """What ``state_dict()`` of the optimizer would return in eval mode, from what it returns now; parameters are not swapped.

    It belongs beside a model whose parameters are saved at the prox point. ``optimizer.train()`` is due after it was loaded.
    """
    points = prox_points(optimizer)
    if not points:
        return state_dict
    state, groups = dict(state_dict["state"]), []
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"]):
        for p, index in zip(group["params"], saved["params"]):
            if id(p) in points:
                state[index] = {**state[index], "search_point": p.detach()}
        groups.append({**saved, "mode": EVAL})
    return {**state_dict, "state": state, "param_groups": groups}


def completed(optimizer: Penalised, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A copy of a checkpoint in which everything that it leaves open is taken from the optimizer.

    Raises ValueError where it is not a checkpoint of this kind of optimizer, with these parameters and penalties.
    """
    found = sorted(map(str, state_dict)) if isinstance(state_dict, dict) else type(state_dict).__name__
    for key in ("state", "param_groups"):
        if key not in found:
            raise ValueError(f"state_dict must hold the key {key!r}, got {found}")
    groups, saved_groups = optimizer.param_groups, state_dict["param_groups"]
    if len(saved_groups) != len(groups):
        raise ValueError(f"loaded state dict has a different number of parameter groups: {len(saved_groups)}, not {len(groups)}")
    # Copies, because torch keeps tensors of the right type as they are: the steps to come would overwrite the checkpoint
    state = {index: {k: _copied(v) for k, v in saved.items()} for index, saved in state_dict["state"].items()}
    pairs = enumerate(zip(saved_groups, groups))
    full = [_completed_group(optimizer, state, saved, group, f"param_groups[{number}]") for number, (saved, group) in pairs]
    return {**state_dict, "state": state, "param_groups": full}


def _completed_group(optimizer: Penalised, state: States, saved: ParamGroup, group: ParamGroup, where: str) -> ParamGroup:
    """A saved param group with the keys that it lacks; raises where it, or the state of its parameters, does not fit."""
    param_groups.normalise(group)
    if len(saved["params"]) != len(group["params"]):
        raise ValueError(
            "loaded state dict contains a parameter group that doesn't match the size of optimizer's group: "
            f"{len(saved['params'])}, not {len(group['params'])} parameters in {where}"
        )
    if "projection" in saved:
        projections.check_same(saved["projection"], group.get("projection"), where)
    saved = {**{k: v for k, v in group.items() if k != "params"}, "mode": TRAIN, FROZEN: False, **saved, "projection": None}
    param_groups.check_same(saved["penalty"], group["penalty"], where)
    if isinstance(saved["penalty"], dict) and saved["penalty"].get("kind") != param_groups.FOREIGN:
        try:
            param_groups.rebuild(saved)
        except TypeError as error:  # the class has other fields today
            raise ValueError(f"state_dict must hold a penalty that can be rebuilt in {where}: {error}") from error
    if bool(saved["joint"]) != group["joint"]:
        raise ValueError(f"state_dict must hold joint={group['joint']} in {where}, got {saved['joint']}")
    if group["joint"]:
        _split_joint(state, saved["params"])
    for place, (index, p) in enumerate(zip(saved["params"], group["params"])):
        zeros = state.get(index, {}).get(ZEROS)
        if sharding.is_sharded(p) and zeros is not None and not sharding.is_sharded(zeros):
            # torch.distributed.checkpoint shards only states that a new optimizer has; the next step records the same zeros
            del state[index][ZEROS]
        optimizer._check_state({**group, **saved}, state.get(index, {}), p, f"{where}['params'][{place}]")
    return saved


def _split_joint(state: States, indices: list[Any]) -> None:
    """Give each parameter of a joint group a state of its own.

    Version 0.1.0 stored lists of tensors, one per parameter, in the state of the first one.
    """
    first = state.get(indices[0], {})
    if any(isinstance(value, list) for value in first.values()):
        for place, index in enumerate(indices):
            state[index] = {k: v[place] if isinstance(v, list) else _copied(v) for k, v in first.items()}


def _copied(value: Any) -> Any:
    if isinstance(value, list):
        return [_copied(v) for v in value]
    return value.detach().clone() if isinstance(value, Tensor) else value
