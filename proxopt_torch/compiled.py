"""Steps on a CPU by the compiled loops of ``proxopt.kernels``: one call for all tensors of a param group.

They equal the functions of ``proxopt.updates`` up to rounding. Taken are dense tensors in float32 or float64, in any memory
layout, without a penalty or with one that declares its ``Shrinkage``; joint groups too. The tables that describe the tensors are
cached between steps. Each step reads the addresses anew, and rebuilds the tables where a shape, a stride, a dtype or the groups
have changed.
"""

# mypy: disallow-untyped-calls=False

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import is_
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from proxopt import Groups, ProxOperator, Shrinkage, kernels, updates
from proxopt._arrays import is_number
from proxopt.penalties import declared
from proxopt_torch.kernels import in_layout_of, is_dense, plain_tensor
from proxopt_torch.param_groups import Entry, ParamGroup, State, entries

if TYPE_CHECKING:
    from proxopt.kernels.layout import Layout
    from proxopt_torch.base import ProximalOptimizer
    from proxopt_torch.penalised import Penalised

Numbers: TypeAlias = dict[str, float]

DTYPES = {torch.float32: np.float32, torch.float64: np.float64}
ROLES = {"velocity": "FIRST", "exp_avg": "FIRST", "exp_avg_sq": "SECOND", "point": "POINT"}
METRICS = {"exact": "EXACT", "median": "MEDIAN", "support": "SUPPORT"}
NO_PENALTY = Shrinkage()


@dataclass(frozen=True)
class Method:
    """What a step does around the prox, in the names of the constants of ``proxopt.kernels.steps``.

    Attributes:
      before: ``"NO_STEP"``, ``"GRADIENT"``, ``"MOMENTUM"`` or ``"ADAM"``.
      after: ``"COPY"``, ``"EXTRAPOLATE"`` or ``"RELAX"``.
      numbers: returns the hyperparameters of a param group in the step with this number, by the names of their columns.
    """

    before: str
    after: str
    numbers: Callable[[ParamGroup, int], Numbers]


# -- which entries --------------------------------------------------------------------------------


def split(
    optimizer: Penalised, group: ParamGroup, penalty: ProxOperator | None, present: list[Entry]
) -> tuple[list[Batch], list[Entry]]:
    """Divide entries of a param group into batches that one call each updates, and those that the loops cannot take."""
    form = _form(group, penalty) if present else None
    if form is None or not kernels.usable():
        return [], present
    cache = optimizer.__dict__.setdefault("_compiled", {})
    found = cache.get(id(group))
    if found is None or not found.is_current(group, form):
        found = cache[id(group)] = _Compiled(optimizer, group, form)
    result: tuple[list[Batch], list[Entry]] = found.split(form, present)
    return result


def _form(group: ParamGroup, penalty: ProxOperator | None) -> Shrinkage | None:
    """The form of the penalty of a group that compiled loops may update; None for any other group."""
    if not _possible() or group.get("differentiable") or group.get("capturable"):
        return None
    return NO_PENALTY if penalty is None else declared.shrinkage(penalty)


def _possible() -> bool:
    """Whether compiled loops may run here: they are available, and neither torch.compile nor torch.func traces."""
    return not torch.compiler.is_compiling() and kernels.available() and not torch._C._are_functorch_transforms_active()


def _fits(entry: Entry) -> bool:
    """Whether the loops can write to the tensors of an entry: on the CPU, of one dtype, dense, not of a subclass."""
    return all(p.dtype == entry[0].dtype and _readable(p) and is_dense(p) for p in entry)


def _readable(x: Tensor) -> bool:
    """Whether x is an ordinary tensor whose memory holds its values."""
    return plain_tensor(x) and x.device.type == "cpu" and not x.is_neg() and not x.is_inference()


class _Compiled:
    """The tables of a param group, and the batch of the last step."""

    def __init__(self, optimizer: Penalised, group: ParamGroup, form: Shrinkage) -> None:
        self._params = list(group["params"])
        self._dtypes = [p.dtype for p in self._params]
        self._form, self._joint = form, group["joint"]
        fitting = [entry for entry in entries(group) if _fits(entry)]
        self._dense = [p for entry in fitting for p in entry]
        self._shapes = [(p.shape, p.stride()) for p in self._dense]
        self._tables: list[Tables] = []
        self._where: dict[int, tuple[int, int]] = {}  # by the identity of the first tensor of an entry
        for dtype in dict.fromkeys(entry[0].dtype for entry in fitting):
            members = [entry for entry in fitting if entry[0].dtype == dtype]
            self._where |= {id(entry[0]): (len(self._tables), i) for i, entry in enumerate(members)}
            self._tables.append(Tables(members, form, optimizer.metric))
        self._last: tuple[list[int], list[Batch], list[Entry]] | None = None

    def is_current(self, group: ParamGroup, form: Shrinkage) -> bool:
        """Whether the tables describe the parameters of the group as they are now, with these penalty groups."""
        params = group["params"]
        return (
            len(params) == len(self._params)
            and all(map(is_, params, self._params))
            and [p.dtype for p in params] == self._dtypes
            and [(p.shape, p.stride()) for p in self._dense] == self._shapes
            and all(p.is_cpu for p in self._dense)
            and group["joint"] == self._joint
            and _same_groups(form, self._form)
        )

    def split(self, form: Shrinkage, present: list[Entry]) -> tuple[list[Batch], list[Entry]]:
        key = [id(entry[0]) for entry in present]
        if self._last is None or self._last[0] != key:
            self._last = (key, *self._divided(present))
        _, batches, rest = self._last
        if all(tables.set_strengths(form) for tables in self._tables):
            return batches, rest
        return [], present

    def _divided(self, present: list[Entry]) -> tuple[list[Batch], list[Entry]]:
        chosen: list[list[int]] = [[] for _ in self._tables]
        rest = []
        for entry in present:
            if id(entry[0]) in self._where:
                table, number = self._where[id(entry[0])]
                chosen[table].append(number)
            else:
                rest.append(entry)
        return [Batch(tables, numbers) for tables, numbers in zip(self._tables, chosen) if numbers], rest


def _same_groups(a: Shrinkage, b: Shrinkage) -> bool:
    """Whether two forms differ in strengths and weights only."""
    if (a.l2 is None, a.metric) != (b.l2 is None, b.metric):
        return False
    return a.l2 is None or a.groups is b.groups or _labels(a.groups) == _labels(b.groups)


def _labels(groups: Groups | None) -> Any:
    """What distinguishes groups from others, for comparison."""
    if groups is None or groups.codes is None:
        return (Groups.whole().kind, None) if groups is None else (groups.kind, groups.axis)
    codes = groups.codes if isinstance(groups.codes, tuple) else (groups.codes,)
    return groups.kind, groups.axis, len(groups.names), [(c.shape, c.tobytes()) for c in codes]


def known_finite(grads: Sequence[Tensor]) -> bool:
    """Whether the loops find all gradients finite; False where they cannot read one."""
    dtypes = {g.dtype for g in grads}
    if not _possible() or len(dtypes) != 1 or not dtypes <= DTYPES.keys() or not _ordinary(grads):
        return False
    if (not all(map(Tensor.is_contiguous, grads)) and not all(map(is_dense, grads))) or not kernels.usable():
        return False
    from proxopt.kernels import steps

    kernels.calls["all_finite"] += 1
    sizes = np.array([g.numel() for g in grads], np.int64)
    return bool(steps.all_finite(_addresses(grads), sizes, np.empty(0, DTYPES[dtypes.pop()])))


def _ordinary(grads: Sequence[Tensor]) -> bool:
    """Whether all gradients are tensors of no subclass whose memory, on the CPU, holds their values."""
    kinds = {(type(g), g.layout) for g in grads}
    return kinds == {(Tensor, torch.strided)} and {g.device.type for g in grads} == {"cpu"} and not any(map(Tensor.is_neg, grads))


# -- the tables -----------------------------------------------------------------------------------


class Tables:
    """What a call reads of the entries of a param group that have one dtype.

    Attributes:
      entries: the entries.
      dtype: of their tensors.
      plan: the tables for the loops. Its problems are the entries, or where there are no groups the single tensors.
    """

    def __init__(self, members: list[Entry], form: Shrinkage, metric: str | None) -> None:
        from proxopt.kernels import layout
        from proxopt.kernels.plan import Plan, Problem

        self.entries, self.dtype = members, members[0][0].dtype
        ends = np.cumsum([0] + [len(entry) for entry in members])
        self._places = [range(*pair) for pair in pairwise(ends)]
        grouped = form.l2 is not None
        self._metric = "NO_GROUPS" if not grouped else "ONE_STEP" if metric is None else METRICS[form.metric or metric]
        self._problems: list[tuple[Entry, Layout]] = []
        numbered: list[Problem] = []
        owners: list[int] = []
        known: dict[Any, Layout] = {}
        for number, (entry, places) in enumerate(zip(members, self._places)):
            for part, members_of_part in [(entry, list(places))] if grouped else [([p], [i]) for p, i in zip(entry, places)]:
                key = tuple((p.shape, p.stride()) for p in part)
                if key not in known:
                    make = layout.of_groups if grouped else layout.of_entries
                    known[key] = make(part, [p.stride() for p in part], form.groups or Groups.whole())
                self._problems.append((part, known[key]))
                numbered.append(Problem(members_of_part, known[key]))
                owners.append(number)
        self.plan = Plan(numbered, DTYPES[self.dtype])
        self._owners = np.array(owners)
        self._unit: np.ndarray | None = None  # the bounds of the groups at strength 1 with these weights, if that is cached
        self._unit_weights: str | None = None
        self._strengths: list[Any] = []
        self._regular = True
        self._l1 = 0.0
        self._each: list[Tensor] = []  # the strength of each entry of each tensor, where it is an array

    def places(self, chosen: Sequence[int]) -> np.ndarray:
        """The numbers of the tensors of some entries."""
        return np.array([place for number in chosen for place in self._places[number]])

    def active(self, chosen: Sequence[int]) -> np.ndarray | None:
        """Which problems belong to some entries; None where all do."""
        return np.isin(self._owners, chosen) if len(chosen) < len(self.entries) else None

    def set_strengths(self, form: Shrinkage) -> bool:
        """Read the strengths of a penalty; False where one is negative, not finite or does not fit: that is for the reference."""
        values = [form.l1, form.l2, form.weights]
        if len(self._strengths) == len(values) and all(map(_unchanged, values, self._strengths)):
            return self._regular
        self._strengths = [(v, _version(v)) for v in values]
        try:
            self._regular = self._read_l1(form.l1) and self._read_bounds(form)
        except (ValueError, TypeError, RuntimeError):  # the reference raises it again, with the name of the argument
            self._regular = False
        return self._regular

    def _read_l1(self, l1: Any) -> bool:
        self._each, self._l1 = [], 0.0
        from proxopt.kernels import steps

        self.plan.addresses[steps.L1] = 0  # of arrays that are freed now
        if l1 is None or is_number(l1):
            self._l1 = float(l1 or 0.0)
            return 0.0 <= self._l1 < math.inf
        params = [p for entry in self.entries for p in entry]
        with torch.no_grad():
            value = torch.as_tensor(l1, dtype=self.dtype)
            self._each = [torch.empty_like(p).copy_(value.expand(p.shape)) for p in params]
        self.plan.addresses[steps.L1] = _addresses(self._each)
        return all(float(e.min()) >= 0.0 and float(e.max()) < math.inf for e in self._each)

    def _read_bounds(self, form: Shrinkage) -> bool:
        if form.l2 is None:
            return True
        from proxopt.kernels.plan import bounds_of

        plain = is_number(form.l2) and isinstance(form.weights, str)
        weights = form.weights if plain else None
        if self._unit is None or weights is None or weights != self._unit_weights:
            strength = Shrinkage(l2=1.0 if plain else form.l2, groups=form.groups, weights=form.weights)
            known: dict[Any, np.ndarray] = {}
            parts = []
            for entry, layout in self._problems:
                if id(layout) not in known:
                    known[id(layout)] = bounds_of(_per_group(strength, entry), layout)
                parts.append(known[id(layout)])
            self._unit, self._unit_weights = np.concatenate(parts), weights
        self.plan.bounds = self._unit * float(form.l2) if plain else self._unit
        return bool((self.plan.bounds >= 0).all()) and bool(np.isfinite(self.plan.bounds).all())

    def launch(self, name: str, method: Method, numbers: np.ndarray, which: Any, active: np.ndarray | None) -> None:
        """Call the loops."""
        from proxopt.kernels import steps

        how = tuple(getattr(steps, constant) for constant in (method.before, self._metric, method.after))
        self.plan.launch(name, how, numbers, which, self._l1, active, torch.get_num_threads())


def _per_group(form: Shrinkage, entry: Entry) -> Any:
    """Strength times weight of each group of an entry, as the reference computes it."""
    xs: list[Any] = [p.detach() for p in entry]
    groups, strength = form._per_group(xs, [])
    return torch.as_tensor(strength * groups.weights(xs, form.weights), dtype=torch.float64).numpy()


def _version(value: Any) -> int | None:
    return value._version if isinstance(value, Tensor) and not value.is_inference() else None


def _unchanged(value: Any, known: tuple[Any, int | None]) -> bool:
    """Whether a strength or weight is what it was when it was read."""
    before, version = known
    if is_number(value) and is_number(before):
        return bool(value == before)
    plain = isinstance(value, (str, type(None)))
    return value == before if plain else value is before and version is not None and value._version == version


# -- one step -------------------------------------------------------------------------------------


class Batch:
    """Entries of a param group that one call updates."""

    def __init__(self, tables: Tables, chosen: list[int]) -> None:
        self._tables = tables
        self.entries = [tables.entries[number] for number in chosen]
        self.params = [p for entry in self.entries for p in entry]
        self.grads: list[Tensor] = []
        self._active = tables.active(chosen)
        self._places = tables.places(chosen)
        self._shapes = [p.shape for p in self.params]
        self._strides = [p.stride() for p in self.params]
        lengths = [len(entry) for entry in self.entries]
        self._first = np.repeat(np.cumsum([0, *lengths[:-1]]), lengths)  # the first tensor of the entry of each tensor
        self._states: dict[str, list[Tensor]] = {}

    def collect(self, optimizer: ProximalOptimizer, group: ParamGroup) -> bool:
        """Collect the gradients. False where a gradient or state is not an ordinary tensor of the parameter's dtype."""
        grads: list[Any] = [p.grad for p in self.params]
        if not _ordinary(grads) or {g.dtype for g in grads} != {self._tables.dtype}:
            return False
        if not self._have_layout(grads):
            grads = [in_layout_of(p, g) for p, g in zip(self.params, grads)]
        self.grads = grads
        return self._check_states(optimizer, optimizer._state_names(group))

    def _check_states(self, optimizer: ProximalOptimizer, names: tuple[str, ...]) -> bool:
        """Check the states that exist, and give them the layout of their parameters."""
        found: list[State] = [optimizer.state.get(p) or {} for p in self.params]
        for name in ("step", *names):
            values: list[Any] = [s.get(name) for s in found]
            if _same_objects(values, self._states.get(name, [])) and self._are_unchanged(name, values):
                continue
            for p, state in zip(self.params, found):
                value = state.get(name)
                if value is None:
                    continue
                if type(value) is not Tensor or not _readable(value):
                    return False
                if name == "step":
                    if value.dtype != torch.float32 or value.numel() != 1:
                        return False
                elif value.dtype != p.dtype or value.shape != p.shape:
                    return False
                else:
                    state[name] = in_layout_of(p, value)
        return True

    def _have_layout(self, tensors: Sequence[Tensor]) -> bool:
        """Whether tensors have the shapes and strides of the parameters."""
        # one after the other: lists of thousands of tuples would start the garbage collector in every step
        return all(t.shape == n and t.stride() == by for t, n, by in zip(tensors, self._shapes, self._strides))

    def _are_unchanged(self, name: str, values: Sequence[Tensor]) -> bool:
        """Whether states that were checked in an earlier step still fit: assigning ``.data`` may give them other memory."""
        dtype = torch.float32 if name == "step" else self._tables.dtype
        if {v.dtype for v in values} != {dtype} or not all(v.is_cpu for v in values):
            return False
        return all(v.numel() == 1 for v in values) if name == "step" else self._have_layout(values)

    def step(self, optimizer: ProximalOptimizer, group: ParamGroup, method: Method) -> None:
        """Update the parameters and their states."""
        from proxopt.kernels import steps

        names = optimizer._state_names(group)
        states = [s for entry in self.entries for s in optimizer._states(group, entry)]
        tensors: dict[str, list[Tensor]] = {name: [s[name] for s in states] for name in ("step", *names)}
        counters = _addresses(tensors["step"])
        counts = np.empty(len(counters), np.float32)
        steps.read_counts(counters, counts)
        addresses = self._tables.plan.addresses
        addresses[steps.X, self._places] = _addresses(self.params)
        addresses[steps.GRAD, self._places] = _addresses(self.grads)
        for name in names:
            addresses[getattr(steps, ROLES[name]), self._places] = _addresses(tensors[name])
        distinct, which = np.unique(counts[self._first], return_inverse=True)
        numbers = _table([method.numbers(group, int(count) + 1) for count in distinct])
        self._launch(type(optimizer).__name__, method, numbers, which)
        steps.write_counts(counters, counts + np.float32(1))
        for name in names:
            increment_version(tensors[name])
        self._states = tensors
        self.grads = []  # which may be freed until the next step

    def prox(self, name: str, step: float) -> None:
        """Replace the parameters by their prox, for a number as step."""
        from proxopt.kernels import steps

        self._tables.plan.addresses[steps.X, self._places] = _addresses(self.params)
        self._launch(name, PROX, _table([{"STEP": step}]), 0)

    def _launch(self, name: str, method: Method, numbers: np.ndarray, which: Any) -> None:
        every = np.zeros(self._tables.plan.addresses.shape[1], np.int64)
        every[self._places] = which
        self._tables.launch(name, method, numbers, every, self._active)
        increment_version(self.params)


def _table(rows: Iterable[Numbers]) -> np.ndarray:
    """Hyperparameters in the columns of the table of numbers."""
    from proxopt.kernels import steps

    rows = list(rows)
    table = np.zeros((len(rows), steps.COUNT))
    table[:, [steps.SIGN, steps.KEEP]] = 1.0
    for i, row in enumerate(rows):
        for name, value in row.items():
            table[i, getattr(steps, name)] = value
    return table


def _addresses(tensors: Sequence[Tensor]) -> np.ndarray:
    return np.array([t.data_ptr() for t in tensors], np.int64)


def _same_objects(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(map(is_, a, b))


# -- the methods ----------------------------------------------------------------------------------


def _descent(group: ParamGroup) -> Numbers:
    """Numbers that all gradient steps have: the sign of the gradient, weight decay that is added to it, the learning rate."""
    decay = 0.0 if group.get("decoupled_weight_decay") else group["weight_decay"]
    return {"SIGN": -1.0 if group["maximize"] else 1.0, "DECAY": float(decay), "STEP": float(group["lr"])}


def _momentum(group: ParamGroup, count: int) -> Numbers:
    return {**_descent(group), "BETA1": float(group["rho"])}


def _gsparsity(group: ParamGroup, count: int) -> Numbers:
    """ProxSGD with tau: the prox has the step 1 / tau, and x goes the way to the prox point by the share lr."""
    return {**_momentum(group, count), "STEP": 1 / float(group["tau"]), "WEIGHT": float(group["lr"])}


def _hapg(group: ParamGroup, count: int) -> Numbers:
    return {**_descent(group), "WEIGHT": float(updates.momentum(count, group["extrapolation"]))}


def _adam(group: ParamGroup, count: int) -> Numbers:
    b1, b2 = (float(beta) for beta in group["betas"])
    keep = 1 - float(group["lr"]) * float(group["weight_decay"]) if group.get("decoupled_weight_decay") else 1.0
    corrections = {"CORRECTION1": 1 - b1**count, "CORRECTION2": 1 - b2**count}
    return {**_descent(group), "BETA1": b1, "BETA2": b2, "EPS": float(group["eps"]), "KEEP": keep, **corrections}


def _adam_hapg(group: ParamGroup, count: int) -> Numbers:
    return {**_hapg(group, count), **_adam(group, count)}


def prox_sgd(group: ParamGroup) -> Method:
    return Method("MOMENTUM", "COPY", _momentum) if group["tau"] is None else Method("MOMENTUM", "RELAX", _gsparsity)


def hapg(group: ParamGroup) -> Method:
    return Method("GRADIENT", "EXTRAPOLATE", _hapg)


def prox_adam(group: ParamGroup) -> Method:
    return Method("ADAM", "COPY", _adam)


def adam_hapg(group: ParamGroup) -> Method:
    return Method("ADAM", "EXTRAPOLATE", _adam_hapg)


PROX = Method("NO_STEP", "COPY", lambda group, count: {})
