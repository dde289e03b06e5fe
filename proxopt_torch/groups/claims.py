"""Which parameters are penalised by what, and the param groups that follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from proxopt import Groups, ProxOperator
from proxopt.penalties import declared
from proxopt_torch.groups.result import ParamGroups, Units
from proxopt_torch.param_groups import ParamGroup, check_operator


@dataclass(frozen=True)
class Claim:
    """Parameters, by name, with their penalty. ``joint``: they are one problem. ``units``: what the groups of it are."""

    names: list[str]
    penalty: ProxOperator
    joint: bool
    units: tuple[Units, ...]


def with_groups(penalty: Any, groups: Groups) -> ProxOperator:
    """The penalty with these groups, or unchanged if it has no groups."""
    check_operator(penalty)
    operator: ProxOperator = penalty
    if declared.partition(penalty) is None:
        return operator
    if not hasattr(penalty, "groups"):
        raise ValueError(f"penalty must have a field 'groups', they are chosen here, got {type(penalty).__name__}")
    if penalty.groups is not None:
        raise ValueError(f"penalty must come without groups, they are chosen here, got {penalty.groups}")
    operator = penalty.with_groups(groups)
    return operator


def collect(model: nn.Module, claimed: list[Claim], left_out: dict[Units, str] | None = None) -> ParamGroups:
    """Param groups with named parameters: one for each penalty or joint problem, and the last for all other parameters."""
    params = dict(model.named_parameters(remove_duplicate=False))
    owners: dict[int, str] = {}  # by the identity of a parameter, which may have several names, the first name of its group
    out: list[ParamGroup] = []
    units: dict[str, tuple[Units, ...]] = {}
    for claim in claimed:
        names = claim.names
        if not claim.joint and all(id(params[n]) in owners for n in names):
            continue  # a tied weight, which is penalised where it came first
        _check_claim(params, owners, names, claim.joint)
        owners |= {id(params[n]): names[0] for n in names}
        units[names[0]] = claim.units
        same = next((g for g in out if not claim.joint and not g["joint"] and g["penalty"] == claim.penalty), None)
        if same is None:
            same = {"params": [], "penalty": claim.penalty, "joint": claim.joint}
            out.append(same)
        same["params"] += [(n, params[n]) for n in names]
    rest = [(name, p) for name, p in model.named_parameters() if id(p) not in owners]
    return ParamGroups(out + ([{"params": rest}] if rest else []), units=units, left_out=left_out)


def _check_claim(params: dict[str, nn.Parameter], owners: dict[int, str], names: list[str], joint: bool) -> None:
    """Raise for a parameter that is in another group already, or a joint group of which a part is frozen."""
    clash = next((n for n in names if id(params[n]) in owners), None)
    if clash is not None:
        owner = owners[id(params[clash])]
        raise ValueError(f"{clash} must be in one group, but is in that of {owner} already: leave one of the layers out")
    frozen = [n for n in names if not params[n].requires_grad]
    if joint and 0 < len(frozen) < len(names):
        raise ValueError(
            f"{frozen[0]} must require grad like the rest of its group ({', '.join(names)}), which is updated as a whole or not "
            "at all: freeze all of it or none, or leave this layer out"
        )
