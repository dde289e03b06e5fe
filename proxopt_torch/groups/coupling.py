"""Joint groups of everything that must be removed together, found from the flow of data through a model."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from proxopt import Groups, ProxOperator
from proxopt.penalties import declared
from proxopt_torch.dependencies import Dependencies, NotTraceable, analyse, arguments, removable
from proxopt_torch.groups import assignment
from proxopt_torch.groups.assignment import Problem
from proxopt_torch.groups.claims import Claim, collect, with_groups
from proxopt_torch.groups.result import ParamGroups, Units
from proxopt_torch.groups.selection import Selection, items, matching

KINDS = ("channels", "attention heads", "hidden units", "recurrent units", "input features")


def coupled(
    model: nn.Module, example_inputs: Any, penalty: ProxOperator, include: Selection = None, exclude: Selection = None
) -> ParamGroups:
    r"""One group for each unit of a model: all parameters that must become zero together for ``compact`` to remove it.

    A unit is a channel of a residual stream with its entries in all blocks, their biases and norms; an attention head with its
    rows of the query, key and value projections and its columns of the output projection; or a hidden unit with the rows that
    compute it and the columns that read it. With the entries :math:`w_u` of the unit u, the penalty is

    .. math::

        R(w) = \sum_u R_u(w_u), \qquad \text{e.g. } R_u(w_u) = \lambda \sqrt{n_u} \, \|w_u\|_2

    Each weight is in the groups of one of its dimensions: of the units that it computes if they can be removed, else of those
    that it reads. So in a chain of convolutions each weight belongs to its output channels; in a transformer, whose residual
    stream is mixed by norms, ``fc1`` and ``fc2`` both belong to the hidden units between them.

    ``print`` of the result lists the problems, and the units that are left out with the reason, before anything is trained.
    Results for different units add up, e.g. with other strengths for heads than for hidden units:
    ``coupled(net, x, GroupL2(1e-3), "attention heads") + coupled(net, x, GroupL2(1e-2), "hidden units")``.

    Args:
      model: a model that ``torch.export`` can trace. Some of its weights are set to zero for a check, and restored.
      example_inputs: a tensor, a tuple of arguments, or a dict of keyword arguments, with which the model can be called.
      penalty: a penalty without groups of its own, e.g. ``GroupL2(1e-3)``. Where a parameter holds units to penalise and others
        that cannot be removed, the latter get the weight 0; a penalty with an L1 part, which acts on every entry, then leaves the
        parameter out together with the units that it computes.
      include, exclude: layers by name (patterns such as ``"encoder.*"``), layers or containers by type, or kinds of units:
        ``"channels"``, ``"attention heads"``, ``"hidden units"``, ``"recurrent units"``. A layer stands for the units that it
        computes. No parameter of an excluded layer is penalised.

    Raises:
      TypeError: ``model`` is no ``nn.Module``, or ``penalty`` no ``ProxOperator``.
      ValueError: the model cannot be traced; a name or type that matches no layer; a penalty that has groups or an array of
        weights; or no units are left to penalise.

    >>> import torch
    >>> from proxopt import GroupL2
    >>> from proxopt_torch import ProxAdam, groups
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> found = groups.coupled(net, torch.randn(2, 8), GroupL2(1e-3))
    >>> [[name for name, _ in group["params"]] for group in found]
    [['0.weight', '0.bias', '2.weight'], ['2.bias']]
    >>> optimizer = ProxAdam(found)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    _check_penalty(penalty)
    args, kwargs = arguments(example_inputs)
    try:
        found = analyse(model, args, kwargs)
    except NotTraceable as error:
        raise ValueError(
            f"model must be one that torch.export can trace with example_inputs: {error}; groups.output_channels, input_features "
            "and attention_heads work without a trace"
        ) from error
    reasons = assignment.refused(found, model)
    reasons |= not_removed(model, found, assignment.axes(found, model, reasons), reasons)
    return from_dependencies(model, found, penalty, include, exclude, reasons)


def from_dependencies(
    model: nn.Module,
    found: Dependencies,
    penalty: ProxOperator,
    include: Selection = None,
    exclude: Selection = None,
    reasons: Mapping[int, str] | None = None,
) -> ParamGroups:
    """``coupled``, from the result of the analysis. ``reasons``: why units cannot be removed by training."""
    reasons = dict(assignment.refused(found, model) if reasons is None else reasons)
    axes = assignment.axes(found, model, reasons)
    excluded = _select(model, found, reasons, include, exclude)
    axes = {name: axis for name, axis in axes.items() if not excluded & set(_ancestors(name))}
    if not _can_exempt(penalty):
        assignment.drop_mixed(found, axes, reasons)
    order = list(dict(model.named_parameters(remove_duplicate=False)))
    parts = assignment.problems(found, order, axes, reasons)
    penalised = {u for part in parts for units in part.units.values() for u in units.tolist()}
    left_out = _left_out(model, found, penalised, reasons)
    if not parts:
        shown = "; ".join(f"{u}: {reason}" for u, reason in list(left_out.items())[:5])
        hint = f" ({shown})" if shown else ""
        raise ValueError(f"model must have units that can be removed, got none to penalise in {type(model).__name__}{hint}")
    claimed = [_claim(model, found, part, penalty) for part in parts]
    return collect(model, claimed, left_out)


def not_removed(model: nn.Module, found: Dependencies, axes: Mapping[str, int], reasons: Mapping[int, str]) -> dict[int, str]:
    """The units that could not be removed if their parameters were zero, e.g. because something else adds to their output.

    The parameters of every second unit are set to zero for the time of this check, then those of the others: if all were zero at
    once, many units would count as removable because nothing reads them.
    """
    if any(p.is_meta for p in model.parameters()):
        return {}
    units = [int(u) for family in found.families for u in family.units if int(u) not in reasons]
    out: dict[int, str] = {}
    for part in (units[::2], units[1::2]):
        with zeroed(model, found, axes, part):
            removal = removable(found)
        gone = {int(u) for u in removal.units} | set(removal.kept)
        out |= {u: "their output is not constant where their parameters are zero" for u in part if u not in gone}
    return out


@contextmanager
def zeroed(model: nn.Module, found: Dependencies, axes: Mapping[str, int], units: Collection[int]) -> Iterator[None]:
    """Set the slices of parameters that belong to these units to zero for the time of a ``with`` block."""
    params = dict(model.named_parameters(remove_duplicate=False))
    saved: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        try:
            for name, axis in axes.items():
                along = found.places[name][axis]
                assert along is not None
                (rows,) = np.nonzero(np.isin(along, list(units)))
                if len(rows):
                    saved.append((params[name], params[name].detach().clone()))
                    params[name].index_fill_(axis, torch.as_tensor(rows, device=params[name].device), 0.0)
            yield
        finally:
            for p, values in saved:
                p.copy_(values)


def _check_penalty(penalty: Any) -> None:
    """Raise for what is no penalty, or for one whose groups or weights are chosen already."""
    with_groups(penalty, Groups.whole())
    weights = getattr(declared.levels(penalty)[-1], "weights", "none")
    if not isinstance(weights, str):
        raise ValueError("weights of the penalty must be a rule such as 'sqrt_size', the groups are found here, got an array")


def _can_exempt(penalty: Any) -> bool:
    """Whether the weight 0 exempts a group from the penalty, which then has no other part that acts on its entries."""
    form = declared.shrinkage(penalty)
    return dataclasses.is_dataclass(penalty) and hasattr(penalty, "weights") and form is not None and form.l1 is None


def _claim(model: nn.Module, found: Dependencies, part: Problem, penalty: Any) -> Claim:
    """The penalty of one joint problem, with its units as groups, numbered from 0 in the order of their first occurrence."""
    names = list(part.units)
    joined = np.concatenate(list(part.units.values()))
    distinct, first, inverse = np.unique(joined, return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))
    labels = np.split(rank[inverse.reshape(-1)], np.cumsum([len(u) for u in part.units.values()])[:-1])
    groups = Groups.labels(labels, axis=tuple(part.axes[name] for name in names))
    operator: Any = with_groups(penalty, groups)
    if (distinct < 0).any() and declared.partition(penalty) is not None:
        params = dict(model.named_parameters(remove_duplicate=False))
        shapes = [np.broadcast_to(np.float64(0.0), tuple(params[name].shape)) for name in names]
        weights = np.broadcast_to(groups.weights(shapes, operator.weights), len(groups.names)).copy()
        weights[rank[distinct < 0]] = 0.0
        operator = dataclasses.replace(operator, weights=weights)
    penalised = set(distinct[distinct >= 0].tolist())
    units = tuple(
        Units(family.kind, family.name, len(penalised & set(map(int, family.units))))
        for family in (found.families[i] for i in part.families)
    )
    return Claim(names, operator, True, units)


def _left_out(model: nn.Module, found: Dependencies, penalised: set[int], reasons: Mapping[int, str]) -> dict[Units, str]:
    """The units that are not penalised, counted by family and reason."""
    out: dict[Units, str] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    computed = {u for name, _, role, units in assignment.places(found) if name in parameters and role != "reads" for u in units}
    for family in found.families:
        if not computed & set(family.units):
            continue  # an input of the model, or a buffer
        rest = [int(u) for u in family.units if int(u) not in penalised]
        for reason, count in Counter(reasons.get(u, "no parameter of theirs is trained") for u in rest).items():
            out[Units(family.kind, family.name, count)] = reason
    return out


def _select(model: nn.Module, found: Dependencies, reasons: dict[int, str], include: Selection, exclude: Selection) -> set[str]:
    """Add the units that are not included, or are excluded, to ``reasons``; return the names of the excluded modules."""
    computing: list[set[str]] = [set() for _ in found.families]  # modules with parameters of the units that are no readers
    family_of = {int(u): i for i, family in enumerate(found.families) for u in family.units}
    for name, _, role, units in assignment.places(found):
        if role != "reads":
            for i in {family_of[u] for u in set(units.tolist()) if u in family_of}:
                computing[i] |= set(_ancestors(name))
    wanted_kinds, wanted = _matched(model, found, include, "include")
    unwanted_kinds, unwanted = _matched(model, found, exclude, "exclude")
    for family, modules in zip(found.families, computing):
        reason = ""
        if include is not None and family.kind not in wanted_kinds and not modules & wanted:
            reason = "not included"
        if family.kind in unwanted_kinds or modules & unwanted:
            reason = "excluded"
        for u in family.units if reason else ():
            reasons.setdefault(int(u), reason)
    return unwanted


def _matched(model: nn.Module, found: Dependencies, selection: Selection, argument: str) -> tuple[set[str], set[str]]:
    """The kinds of units and the names of the modules that a selection names."""
    modules = {name: module for name, module in model.named_modules() if name or len(model._parameters)}
    present = list(dict.fromkeys(family.kind for family in found.families))
    kinds, names = set(), set()
    for item in items(selection, argument):
        if isinstance(item, str) and item in KINDS and item not in modules:
            if item not in present:
                raise ValueError(f"{argument} must name kinds of units in the model, got {item!r}; there are {present}")
            kinds.add(item)
        else:
            names |= matching(modules, item, argument, modules)
    return kinds, names


def _ancestors(name: str) -> list[str]:
    """The names of the module that holds a parameter, and of the modules around it."""
    parts = name.split(".")[:-1]
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)] or [""]
