"""``ParamGroups``: the list of param groups that the functions of ``proxopt_torch.groups`` return."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from proxopt_torch.groups import dry_run
from proxopt_torch.param_groups import ParamGroup

Member: TypeAlias = Tensor | tuple[str, Tensor]  # of "params": a parameter, with its name or without


@dataclass(frozen=True)
class Units:
    """Units of one kind: how many, and the first layer that computes them."""

    kind: str
    layer: str
    count: int

    def __str__(self) -> str:
        return f"{self.count} {self.kind if self.count != 1 else self.kind.removesuffix('s')} of {self.layer or 'the model'}"


class ParamGroups(list[ParamGroup]):
    """A list of param groups for an optimizer, in which every parameter occurs once.

    ``a + b`` holds the penalised groups of both, and all parameters that neither of them penalises in groups without a penalty.
    One of the two may be a plain list of param groups. ``print(a)`` shows a table with one row for each penalised problem: the
    kind of its groups and the first layer that computes them, the number of its tensors and groups, the entries and the weight of
    a group, the strength, and the share of the penalty at the present weights; then what is not penalised, and why.

    Args:
      groups: the param groups.
      units: what a joint problem penalises, by the name of its first parameter.
      left_out: what is not penalised, with the reason.

    Raises:
      ValueError: by ``+``, for a parameter that both summands penalise.

    >>> import torch
    >>> from proxopt import GroupL2
    >>> from proxopt_torch import groups
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> _ = [torch.nn.init.ones_(p) for p in net.parameters()]
    >>> print(groups.output_channels(net, GroupL2(1e-3), "0") + groups.output_channels(net, GroupL2(1e-2), "2"))
    kind             layer  tensors  groups  entries  weight  strength   share
    output channels  0            1       4        8    2.83     0.001   28.6%
    output channels  2            1       2        4       2      0.01   71.4%
    total                         2       6                             100.0%
    without penalty: 6 entries in 0.bias, 2.bias
    """

    def __init__(
        self,
        groups: Iterable[ParamGroup] = (),
        *,
        units: dict[str, tuple[Units, ...]] | None = None,
        left_out: dict[Units, str] | None = None,
    ) -> None:
        super().__init__(groups)
        self.units = dict(units or {})
        self.left_out = dict(left_out or {})

    def __add__(self, other: Any) -> ParamGroups:  # type: ignore[override]
        return _sum(self, other) if isinstance(other, list) else NotImplemented

    def __radd__(self, other: Any) -> ParamGroups:
        return _sum(other, self) if isinstance(other, list) else NotImplemented

    def __iadd__(self, other: Any) -> ParamGroups:  # type: ignore[override]
        return _sum(self, other) if isinstance(other, list) else NotImplemented

    def __str__(self) -> str:
        return dry_run.table(self)


def members(group: ParamGroup) -> list[Member]:
    """The parameters of a group, with their names if it has them: before or after an optimizer has taken the names out."""
    params = group["params"]
    params = [params] if isinstance(params, Tensor) else list(params)
    names = group.get("param_names")
    return list(zip(names, params)) if names else params


def tensor(member: Member) -> Tensor:
    """The parameter of a member without its name."""
    return member[1] if isinstance(member, tuple) else member


def _sum(a: list[ParamGroup], b: list[ParamGroup]) -> ParamGroups:
    # copies, because an optimizer adds keys to the groups that it gets
    penalised = [_options(group) | {"params": members(group)} for group in (*a, *b) if group.get("penalty") is not None]
    taken: set[int] = set()
    for group in penalised:
        for member in members(group):
            if id(tensor(member)) in taken:
                name = member[0] if isinstance(member, tuple) else f"a parameter of shape {tuple(member.shape)}"
                raise ValueError(
                    f"{name} must be penalised by one of the summands of +, but is by both: exclude its layer in one of them"
                )
        taken |= {id(tensor(member)) for member in members(group)}
    rest: list[ParamGroup] = []
    for group in (*a, *b):
        if group.get("penalty") is None:
            _add_rest(rest, group, taken)
    notes = [part for part in (a, b) if isinstance(part, ParamGroups)]
    units = {name: found for part in notes for name, found in part.units.items()}
    present = {u for found in units.values() for u in found}
    left_out = {u: reason for part in notes for u, reason in part.left_out.items() if u not in present}
    return ParamGroups(penalised + rest, units=units, left_out=left_out)


def _add_rest(rest: list[ParamGroup], group: ParamGroup, taken: set[int]) -> None:
    """Add the parameters of an unpenalised group that are in no group yet, to one with the same options if there is one."""
    found = [member for member in members(group) if id(tensor(member)) not in taken]
    taken |= {id(tensor(member)) for member in found}
    if not found:
        return
    same = next((other for other in rest if _options(other) == _options(group)), None)
    if same is None:
        rest.append(_options(group) | {"params": found})
    else:
        same["params"] += found


def _options(group: ParamGroup) -> ParamGroup:
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}
