"""The quantities that a budget can limit. Each is measured with the parameters that the model holds at that moment."""

from __future__ import annotations

import statistics
import time
from collections.abc import Collection
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from proxopt import sparsity
from proxopt.penalties import declared
from proxopt_torch import sharding
from proxopt_torch.budgets import counting
from proxopt_torch.compaction import compact, verification
from proxopt_torch.compaction.attempts import Attempts, copied
from proxopt_torch.compaction.surgery import described, not_runnable
from proxopt_torch.dependencies import Arguments, Dependencies, NotTraceable, analyse, arguments, removable
from proxopt_torch.groups import assignment
from proxopt_torch.groups.coupling import zeroed
from proxopt_torch.groups.selection import Selection, matching
from proxopt_torch.param_groups import Entry, entries
from proxopt_torch.penalised import Penalised

TOLERANCE = 1e-4
"""That of ``compact``."""

REPEATS = 15
"""Pairs of passes, of the dense and of the smaller model, whose medians are compared."""


class Quantity(Protocol):
    """label: what is measured, as a log line calls it."""

    label: str

    def share(self) -> float:
        """What is left of it, as a share of what the dense model has."""


class Analysed:
    """Multiply-adds or parameters of the model that ``compact`` would return."""

    def __init__(self, kind: str, model: nn.Module, example_inputs: Any, modules: Selection) -> None:
        args, kwargs = arguments(example_inputs)
        try:
            self._found = analyse(model, args, kwargs)
        except NotTraceable as error:
            raise ValueError(
                f"model must be one that torch.export can trace with example_inputs to count {kind}: {error}; "
                "sparsity and living_groups need no trace"
            ) from error
        try:
            verification.run(copied(model), (args, kwargs))
        except Exception as error:  # the trace forgives a wrong dtype and indices out of range
            raise not_runnable(example_inputs, error) from error
        keep_what_code_fixes(self._found, model, (args, kwargs))
        self._counter: counting.MultiplyAdds | counting.Parameters
        if kind == "macs":
            self.label = "multiply-adds"
            self._counter = counting.MultiplyAdds(self._found, None if modules is None else selected(model, modules))
        else:
            self.label = "parameters"
            self._counter = counting.Parameters(self._found, list(parameters(model, modules)))
        if not self._counter.dense and modules is None:
            raise ValueError(f"example_inputs must be such that the model has {self.label}, got {described(example_inputs)}")
        if not self._counter.dense:
            raise ValueError(f"modules must hold {self.label}, got none in {modules!r}")

    def share(self) -> float:
        return self._counter.count(removable(self._found)) / self._counter.dense


def keep_what_code_fixes(found: Dependencies, model: nn.Module, given: Arguments) -> None:
    """Mark units as never removed if ``compact`` gives them back, as their number is written in the code of a module.

    Two trial cuts, each of every second unit, show which.
    """
    reasons = assignment.refused(found, model)
    axes = assignment.axes(found, model, reasons)
    units = [int(u) for family in found.families for u in family.units if int(u) not in reasons]
    for part in (units[::2], units[1::2]):
        with zeroed(model, found, axes, part):
            original = copied(model)
            # notes in ``found`` what has to stay
            Attempts(original, given, found, verification.run(original, given), TOLERANCE, False).search()


class NonzeroWeights:
    """The entries of parameters that are not zero."""

    label = "nonzero weights"

    def __init__(self, model: nn.Module, modules: Selection) -> None:
        self._tensors = list(parameters(model, modules).values())
        self._size = sum(p.numel() for p in self._tensors)
        if not self._size:
            raise ValueError(f"modules must hold parameters, got none in {modules!r}")

    def share(self) -> float:
        found: dict[torch.device, list[Tensor]] = {}
        for p in self._tensors:
            count = sharding.gathered(p.detach()).count_nonzero()
            found.setdefault(count.device, []).append(count)
        return sum(int(torch.stack(counts).sum()) for counts in found.values()) / self._size  # one synchronisation per device


class NonzeroGroups:
    """The groups of the penalties that are not zero; those of a joint problem all count if one of its parameters is selected."""

    label = "nonzero groups"

    def __init__(self, optimizer: Penalised, model: nn.Module, modules: Selection) -> None:
        self._optimizer = optimizer
        self._chosen = {id(p) for p in parameters(model, modules).values()}
        if not self._entries():
            raise ValueError(f"modules must hold parameters with a penalty, got none in {modules!r}")

    def share(self) -> float:
        groups, living = 0, 0
        for entry, partition in self._entries():
            tensors = [sharding.gathered(p.detach()) for p in entry]
            counts = sparsity.summary(tensors if len(tensors) > 1 else tensors[0], partition)
            # A penalty on single entries declares no groups: each entry is one
            groups += counts.entries if partition is None else counts.groups
            living += counts.entries - counts.zeros if partition is None else counts.living
        return living / groups

    def _entries(self) -> list[tuple[Entry, Any]]:
        found = []
        for group in self._optimizer.param_groups:
            penalty = self._optimizer.penalty_of(group)
            if penalty is not None:
                partition = declared.partition(penalty)
                found += [(e, partition) for e in entries(group) if any(id(p) in self._chosen for p in e)]
        return found


class Latency:
    """The time of one pass on the example, of the model that ``compact`` returns, on this machine."""

    label = "latency"

    def __init__(self, model: nn.Module, example_inputs: Any) -> None:
        self._model, self._example = model, example_inputs
        self._given = arguments(example_inputs)

    def share(self) -> float:
        small, dense = compact(self._model, self._example).model, copied(self._model)
        for model in (dense, small):
            seconds(model, self._given)  # the first pass allocates and chooses kernels
        # Alternately, so that other load of the machine slows both
        pairs = [(seconds(dense, self._given), seconds(small, self._given)) for _ in range(REPEATS)]
        return statistics.median(after for _, after in pairs) / statistics.median(before for before, _ in pairs)


def seconds(model: nn.Module, given: Arguments) -> float:
    """The time of one pass without gradients."""
    args, kwargs = given
    with torch.no_grad():
        _synchronize()
        start = time.perf_counter()
        model(*args, **kwargs)
        _synchronize()
        return time.perf_counter() - start


def _synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def parameters(model: nn.Module, modules: Selection) -> dict[str, Tensor]:
    """The parameters of the selected modules, by their first names; tied ones once."""
    chosen = None if modules is None else selected(model, modules)
    return {name: p for name, p in model.named_parameters() if chosen is None or name.rpartition(".")[0] in chosen}


def selected(model: nn.Module, modules: Selection) -> Collection[str]:
    """The paths of the modules that a selection names, and of those inside them."""
    everything = dict(model.named_modules())
    roots = matching(everything, modules, "modules", everything)
    return {name for name in everything if any(not root or name == root or name.startswith(f"{root}.") for root in roots)}
