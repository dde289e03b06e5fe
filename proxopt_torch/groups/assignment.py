"""Which parameter is penalised along which of its dimensions, and which parameters are one joint problem.

A weight has up to two dimensions with units: its rows compute units, its columns read others. Groups must be disjoint, so each
weight is divided along one of them: along the units that it computes if any of them can be removed, else along those that it
scales, else along those that it reads. This choice depends on the model alone, not on what is selected of it, so that results for
different units of one model can be added.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor, nn

from proxopt_torch.groups.selection import PRUNED, computed

if TYPE_CHECKING:
    from proxopt_torch.dependencies import Dependencies

ROLES = ("computes", "scales", "reads")  # in the order in which a parameter is assigned


@dataclass(frozen=True)
class Problem:
    """Parameters that share units. ``axes`` and ``units``: the penalised dimension of each, and the unit of each of its slices.

    A unit that is not penalised is -1. ``families``: the indices of those that the units belong to.
    """

    axes: dict[str, int]
    units: dict[str, np.ndarray]
    families: list[int]


def places(found: Dependencies) -> Iterator[tuple[str, int, str, np.ndarray]]:
    """Each dimension of a parameter or buffer that has units: its name, the dimension, its role, and the units."""
    for name, dimensions in found.places.items():
        for axis, units in enumerate(dimensions):
            if units is not None and len(units):
                yield name, axis, found.roles.get((name, axis), "computes"), np.asarray(units)


def refused(found: Dependencies, model: nn.Module) -> dict[int, str]:
    """The units that training cannot remove, with the reason: by the structure of the model, or by what computes them."""
    reasons = {int(u): family.reason for family in found.families if family.reason for u in family.units}
    reasons |= {int(u): reason for u, reason in found.kept.items()}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    indirect = _computed_from(model)
    for name, axis, role, units in places(found):
        # A constant for each unit leaves its output constant, so that it can be removed all the same
        if role != "computes" or (len(found.places[name]) == 1 and name not in indirect):
            continue
        reason, concerned = "", units
        if name in indirect:
            reason = indirect[name]
        elif name in buffers:
            reason, concerned = f"{name} is a buffer, which is not trained", units[_nonzero(buffers[name], axis)]
        elif name in parameters and not parameters[name].requires_grad:
            reason, concerned = f"{name} is frozen", units[_nonzero(parameters[name], axis)]
        if reason:
            for u in concerned.tolist():
                reasons.setdefault(u, reason)
    return reasons


def axes(found: Dependencies, model: nn.Module, reasons: dict[int, str]) -> dict[str, int]:
    """The dimension along which each parameter is divided into groups, for the parameters that have units to remove.

    Units that a parameter computes along another dimension cannot become zero: they are added to ``reasons``.
    """
    trained = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    trained -= set(_computed_from(model))
    candidates: dict[str, list[tuple[int, int]]] = {}
    for name, axis, role, units in places(found):
        if name in trained and any(u not in reasons for u in units.tolist()):
            candidates.setdefault(name, []).append((ROLES.index(role), axis))
    chosen = {name: min(options)[1] for name, options in candidates.items()}
    for name, axis, role, units in places(found):
        if role == "computes" and name in chosen and chosen[name] != axis:
            for u in units.tolist():
                reasons.setdefault(u, f"{name} is divided along its dimension {chosen[name]}")
    return chosen


def drop_mixed(found: Dependencies, chosen: dict[str, int], reasons: dict[int, str]) -> None:
    """Take out parameters of which some slices are penalised and others not, and what they compute, until there are none.

    For penalties that act on every entry of their parameters, so that no group of them can be exempted.
    """
    changed = True
    while changed:
        changed = False
        for name, axis, role, units in places(found):
            if chosen.get(name) != axis:
                continue
            penalised = [u for u in units.tolist() if u not in reasons]
            if penalised and len(penalised) < len(units):
                del chosen[name]
                changed = True
                if role == "computes":
                    for u in penalised:
                        reasons[u] = f"this penalty cannot leave out a part of {name}, in which other units are not penalised"


def problems(found: Dependencies, order: Collection[str], chosen: Mapping[str, int], reasons: Mapping[int, str]) -> list[Problem]:
    """The joint problems: parameters that are connected by units of the same families. ``order``: of all parameters."""
    family_of = {int(u): i for i, family in enumerate(found.families) for u in family.units}
    units, families = {}, {}
    for name in order:
        if name in chosen:
            along = found.places[name][chosen[name]]
            assert along is not None
            labels = np.array([u if u not in reasons and u in family_of else -1 for u in np.asarray(along).tolist()])
            if (labels >= 0).any():
                units[name], families[name] = labels, sorted({family_of[u] for u in labels[labels >= 0].tolist()})
    root = list(range(len(found.families)))
    for connected in families.values():
        for other in connected[1:]:
            root[_root(root, other)] = _root(root, connected[0])
    names: dict[int, list[str]] = {}
    for name, connected in families.items():
        names.setdefault(_root(root, connected[0]), []).append(name)
    return [
        Problem({n: chosen[n] for n in part}, {n: units[n] for n in part}, sorted({f for n in part for f in families[n]}))
        for part in names.values()
    ]


def _root(parents: list[int], i: int) -> int:
    while parents[i] != i:
        parents[i] = i = parents[parents[i]]
    return i


def _computed_from(model: nn.Module) -> dict[str, str]:
    """The parameters from which a module computes a weight that may be nonzero where they are zero, with the reason."""
    out = {}
    for place, module in model.named_modules():
        prefix = f"{place}." if place else ""
        for key, (reason, remedy) in computed(module).items():
            if reason == PRUNED:  # the product of a mask with zeros is zero
                continue
            inner = (f"{prefix}parametrizations.{key}.", f"{prefix}{key}_")  # original0, ...; weight_g, weight_v, weight_orig
            for name, _ in model.named_parameters(remove_duplicate=False):
                if name.startswith(inner):
                    out[name] = f"{prefix}{key} is {reason}: call {remedy} first"
    return out


def _nonzero(tensor: Tensor, axis: int) -> np.ndarray:
    """Which slices along an axis hold a number other than zero; all of them if the tensor has no numbers."""
    if tensor.is_meta:
        return np.ones(tensor.shape[axis], dtype=bool)
    inner = tuple(i for i in range(tensor.ndim) if i != axis % tensor.ndim)
    found: np.ndarray = (tensor.detach() != 0).sum(dim=inner).cpu().numpy() > 0 if inner else (tensor.detach() != 0).cpu().numpy()
    return found
