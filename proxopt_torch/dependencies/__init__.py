"""Which parts of a network can only be removed together, and which of them can be removed now.

``analyse`` reads the graph of a model once; ``removable`` reads its weights. Neither changes the model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from .flow import Flow
from .reading import read_graph
from .rules import base_name
from .trace import Arguments, NotTraceable, Trace, arguments, flat_tensors, module_path, preserved, trace_model
from .units import Ints
from .values import Removal, evaluate, shifts

__all__ = [
    "Arguments",
    "Dependencies",
    "Family",
    "NotTraceable",
    "Removal",
    "View",
    "analyse",
    "arguments",
    "flat_tensors",
    "preserved",
    "remaining_sizes",
    "removable",
]


@dataclass
class Family:
    """Units of one kind in the same dimensions of the same tensors.

    kind: "channels", "attention heads", "hidden units", "recurrent units" or "input features". name: path of the first layer that
    computes them. units: ids. places: the (name, dimension) pairs. reason: why none of them can be removed, or "".
    """

    kind: str
    name: str
    units: Ints
    places: tuple[tuple[str, int], ...] = ()
    reason: str = ""


@dataclass
class View:
    """An operator whose sizes may be written in the code of a module.

    module: path of the module whose code runs it. operator: its name. sizes: of the output. blocks: (dimensions, array of units
    over these dimensions); the other dimensions keep their sizes.
    """

    module: str
    operator: str
    sizes: tuple[int, ...]
    blocks: list[tuple[tuple[int, ...], Ints]]

    def resized(self, removed: Iterable[int]) -> tuple[int, ...]:
        """The sizes without the removed units."""
        gone = np.asarray(list(removed), dtype=np.int64)
        return remaining_sizes(self.sizes, [(dims, ~np.isin(units, gone)) for dims, units in self.blocks])


@dataclass
class Dependencies:
    """The units of a model.

    places: name of a parameter or buffer -> for each dimension the unit of each index, None where it is never cut. A tensor
    with several names has the first. roles: (name, dimension) -> "computes" (rows, biases), "scales" (norms, depthwise
    convolutions) or "reads" (columns). kept: unit -> why it is never removed. families, views: see there. unknown: operator
    without rule -> path of the module that runs it. inputs: units of the features of the first input, flattened; None unless
    asked for.
    """

    places: dict[str, tuple[Ints | None, ...]]
    roles: dict[tuple[str, int], str]
    kept: dict[int, str]
    families: list[Family]
    views: list[View]
    unknown: dict[str, str]
    inputs: Ints | None = None
    flow: Flow | None = field(default=None, repr=False)
    unit: Ints = field(default_factory=lambda: np.zeros(0, np.int64), repr=False)


def analyse(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None, *, inputs: bool = False
) -> Dependencies:
    """Find the units of a model in the graph of its operators.

    Args:
      model: any module that torch.export can trace; it is not changed.
      args, kwargs: arguments for which it runs.
      inputs: also track the features of the first input.

    Raises:
      NotTraceable: torch.export finds no graph.

    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> found = analyse(net, (torch.randn(3, 4),))
    >>> [(f.kind, f.name, len(f.units), f.places) for f in found.families if not f.reason]
    [('hidden units', '0', 8, (('0.bias', 0), ('0.weight', 0), ('2.weight', 1)))]
    """
    found = trace_model(model, args, kwargs or {})
    flow = read_graph(found, inputs)
    unit = flow.atoms.units()
    kept = _reasons(flow, unit)
    places = _places(flow, unit)
    features = None
    if inputs and found.inputs:
        blocks = flow.steps[found.inputs[0]].blocks
        features = unit[blocks[0].atoms.ravel()] if blocks else None
    families = _families(flow, found, unit, places, kept, features)
    return Dependencies(places, flow.roles, kept, families, _views(flow, unit), flow.unknown, features, flow, unit)


def remaining_sizes(
    sizes: Sequence[int], blocks: Iterable[tuple[Sequence[int], np.ndarray[Any, np.dtype[np.bool_]]]]
) -> tuple[int, ...]:
    """The sizes of a tensor that keeps the marked positions of its blocks: the slices that hold one of them."""
    found = list(sizes)
    for dims, stays in blocks:
        for axis, dim in enumerate(dims):
            found[dim] = int(stays.any(tuple(a for a in range(stays.ndim) if a != axis)).sum())
    return tuple(found)


def removable(dependencies: Dependencies) -> Removal:
    """The units that can be removed with the weights that the analysed model has now.

    A unit goes if, wherever a tensor of the graph holds it, nothing reads it, or it is a constant that biases can take. Each
    dimension keeps at least one index.

    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> _ = torch.nn.init.zeros_(net[0].weight[3:])
    >>> found = analyse(net, (torch.randn(3, 4),))
    >>> removal = removable(found)
    >>> len(removal.units), list(removal.shifts)
    (5, ['2.bias'])
    """
    flow, unit = dependencies.flow, dependencies.unit
    assert flow is not None
    flow.forget_numbers()
    values = evaluate(flow)
    count = int(unit.max()) + 1 if unit.size else 0
    used, present, fixed = np.zeros(count, bool), np.zeros(count, bool), np.ones(count, bool)
    for node, step in flow.steps.items():
        for index, block in enumerate(step.blocks if not flow.stored(node) else ()):
            ids = unit[block.atoms.ravel()]
            present[ids] = True
            fixed[ids[np.isnan(values.constants[node][index])]] = False
            used[ids[values.used[node][index]]] = True
    unread = present & ~used
    kept: dict[int, str] = {int(u): dependencies.kept[int(u)] for u in np.flatnonzero(unread) if int(u) in dependencies.kept}
    for u in np.flatnonzero(present & used & fixed):
        kept[int(u)] = dependencies.kept.get(int(u), "it is a constant that cannot be added to the bias of a layer that reads it")
    stored = np.zeros(count, bool)
    for dims in dependencies.places.values():
        for row in dims:
            if row is not None:
                stored[row] = True
    removed = unread & stored  # others are sizes of tensors that the code makes
    removed[list(dependencies.kept)] = False
    _restrict(flow, unit, removed, kept)
    return Removal(np.flatnonzero(removed), shifts(values, unit, removed), kept)


def _restrict(flow: Flow, unit: Ints, removed: np.ndarray[Any, np.dtype[np.bool_]], kept: dict[int, str]) -> None:
    """Take units out of ``removed`` until each block loses whole slices only, and keeps at least one."""
    arrays = {}
    for step in flow.steps.values():
        for block in step.blocks:
            arrays[block.atoms.shape, block.atoms.tobytes()] = unit[block.atoms]
    arrays = {(a.shape, a.tobytes()): a for a in arrays.values()}
    rigid = [(unit[atoms], axis) for atoms, axis in flow.rigid]
    even = [(rule.parts(unit), rule.reason) for rule in flow.even]

    def keep(ids: Ints, reason: str) -> bool:
        ids = np.unique(ids)
        ids = ids[removed[ids]]
        removed[ids] = False
        kept.update({int(u): reason for u in ids})
        return bool(ids.size)

    changed = True
    while changed:
        changed = False
        for array in arrays.values():
            gone = removed[array]
            if not gone.any():
                continue
            if gone.all():
                changed |= keep(array.ravel()[:1], "a layer needs at least one")
                gone = removed[array]
            if array.ndim > 1:
                rest = ~gone
                whole = np.ones(array.shape, bool)
                for axis in range(array.ndim):
                    others = tuple(a for a in range(array.ndim) if a != axis)
                    whole &= rest.any(others, keepdims=True)
                changed |= keep(array[whole & gone], "only whole slices of a tensor can be removed, such as whole heads")
        for array, axis in rigid:
            slices = np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)
            empty = removed[slices].all(1)
            changed |= keep(slices[empty, 0], "its index is written in the code of the model")
        for parts, reason in even:
            lost = [np.flatnonzero(removed[part].all(1)) for part in parts]
            least = 0 if len({len(part) for part in parts}) > 1 else min(len(which) for which in lost)
            for part, which in zip(parts, lost):
                changed |= keep(part[which[least:]], reason)


def _reasons(flow: Flow, unit: Ints) -> dict[int, str]:
    """The first reason for each unit that can never be removed."""
    kept: dict[int, str] = {}
    for atoms, reason in flow.atoms.pins:
        for u in np.unique(unit[atoms]):
            kept.setdefault(int(u), reason)
    _keep_even(flow, unit, kept)
    return kept


def _keep_even(flow: Flow, unit: Ints, kept: dict[int, str]) -> None:
    """Keep all parts of a split that must stay equal if one of them can lose nothing, or has another size."""
    even = [(rule.parts(unit), rule.reason) for rule in flow.even]
    before = -1
    while before != len(kept):
        before = len(kept)
        for parts, reason in even:
            if any((part != part[:, :1]).any() for part in parts):
                continue  # a part of each slice can be removed, such as a head of queries, keys and values
            stay = [all(int(u) in kept for u in part[:, 0]) for part in parts]
            if any(stay) or len({len(part) for part in parts}) > 1:
                for part in parts:
                    for u in part[:, 0].tolist():
                        kept.setdefault(u, reason)


def _places(flow: Flow, unit: Ints) -> dict[str, tuple[Ints | None, ...]]:
    """The units of the dimensions of parameters and buffers that have a role, or share a unit with one that has."""
    tracked = np.zeros(int(unit.max()) + 1 if unit.size else 0, bool)
    for name, dim in flow.roles:
        atoms = flow.leaves[name][dim]
        if atoms is not None:
            tracked[unit[atoms]] = True
    for step in flow.steps.values():
        if not flow.stored(step.node):
            for block in step.blocks:
                tracked[unit[block.atoms]] = True
    places: dict[str, tuple[Ints | None, ...]] = {}
    for name, dims in flow.leaves.items():
        found = [unit[atoms] if atoms is not None and tracked[unit[atoms]].all() else None for atoms in dims]
        for dim, ids in enumerate(found):
            if ids is not None:
                flow.roles.setdefault((name, dim), "scales")
        places[name] = tuple(found)
    return places


def _families(
    flow: Flow, found: Trace, unit: Ints, places: dict[str, tuple[Ints | None, ...]], kept: dict[int, str], features: Ints | None
) -> list[Family]:
    where: dict[int, set[tuple[str, int]]] = defaultdict(set)
    for name, dims in places.items():
        for dim, ids in enumerate(dims):
            for u in np.unique(ids) if ids is not None else ():
                where[int(u)].add((name, dim))
    marks: dict[int, str] = {}
    for atoms, kind in flow.atoms.marks:
        marks.update(dict.fromkeys((int(u) for u in np.unique(unit[atoms])), kind))
    inputs = set() if features is None else {int(u) for u in features}
    members: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for u, spots in where.items():
        kind = "input features" if u in inputs else marks.get(u, "")
        members[tuple(sorted(spots)), kind, kept.get(u, "")].append(u)
    order = {key: k for k, key in enumerate(flow.roles)}
    result = []
    for (spots, kind, reason), units in members.items():
        first = min(spots, key=lambda s: (_rank(flow, found, s), order.get(s, len(order))))
        kind = kind or _kind(flow, found, spots)
        result.append((order.get(first, 0), Family(kind, first[0].rpartition(".")[0], np.array(sorted(units)), spots, reason)))
    return [family for _, family in sorted(result, key=lambda pair: pair[0])]


def _rank(flow: Flow, found: Trace, spot: tuple[str, int]) -> int:
    """Weights that compute come first, then weights that read."""
    matrix = found.tensors[spot[0]].ndim > 1
    return {"computes": 0, "reads": 1, "scales": 2}[flow.roles[spot]] + 3 * (not matrix)


def _kind(flow: Flow, found: Trace, spots: tuple[tuple[str, int], ...]) -> str:
    """Units of an MLP are computed by one Linear layer, or by two that are multiplied, and read by others."""
    matrices = [s for s in spots if found.tensors[s[0]].ndim > 1]
    linear = all(found.tensors[name].ndim == 2 for name, _ in matrices)
    roles = [flow.roles[s] for s in matrices]
    return "hidden units" if linear and 1 <= roles.count("computes") <= 2 and "reads" in roles else "channels"


def _views(flow: Flow, unit: Ints) -> list[View]:
    result = []
    for node in flow.views:
        outputs = [node] if node in flow.steps and not isinstance(node.meta.get("val"), (tuple, list)) else list(node.users)
        for out in outputs:
            step = flow.steps.get(out)
            if step is not None and step.blocks:
                blocks = [(block.dims, unit[block.atoms]) for block in step.blocks]
                result.append(View(module_path(node), base_name(node), flow.shape(out), blocks))
    return result
