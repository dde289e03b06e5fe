"""The strengths of an optimizer's penalties, multiplied by one common factor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from proxopt import GroupL2, sparsity
from proxopt.penalties import declared
from proxopt.penalties.dual import PROBE, zeroing_strength
from proxopt_torch import param_groups, report, sharding
from proxopt_torch.param_groups import Entry, ParamGroup
from proxopt_torch.penalised import Penalised


class Strengths:
    """The strengths at construction, and the factor that multiplies them now.

    Groups are held by their numbers: ``load_state_dict`` of an optimizer replaces its param groups.
    """

    def __init__(self, optimizer: Penalised) -> None:
        self.optimizer = optimizer
        self.factor = 1.0
        self.own: dict[int, float | Tensor] = {}
        for number, group in enumerate(optimizer.param_groups):
            optimizer.penalty_of(group)  # turns a penalty object that was assigned since into plain data
            if param_groups.has_strength(group):
                self.own[number] = _positive(group["strength"], number)
        if not self.own:
            raise ValueError("optimizer must have a param group whose penalty has a strength to set, got none")

    def groups(self) -> Iterator[tuple[ParamGroup, float | Tensor]]:
        """The param groups that are driven, with their strengths at construction."""
        for number, own in self.own.items():
            yield self.optimizer.param_groups[number], own

    def set(self, factor: float) -> None:
        """Multiply the strengths at construction by ``factor``."""
        self.factor = factor
        for group, own in self.groups():
            group["strength"] = own * factor

    def largest(self) -> float:
        """The largest strength now."""
        return max(_largest(own * self.factor) for own in self.own.values())

    def value(self) -> float:
        """The value of the penalties at the present parameters, with the strengths at construction."""
        found: list[Tensor] = []
        with torch.no_grad():
            for group, own in self.groups():
                penalty: Any = self.optimizer.penalty_of(group)
                penalty = penalty.with_strength(own)
                for entry in param_groups.entries(group):
                    tensors = [sharding.gathered(p) for p in entry]
                    found.append(penalty.value(tensors if group["joint"] else tensors[0]))
        return float(sum(v.detach().double().cpu() if isinstance(v, Tensor) else v for v in found))

    def check(self) -> None:
        """Raise RuntimeError where a strength was set by others."""
        for number, own in self.own.items():
            now: Any = self.optimizer.param_groups[number]["strength"]
            if not _equal(now, own * self.factor):
                raise RuntimeError(
                    f"the strength of param group {number} must be set by the budget alone, {own * self.factor}, got {now}: do "
                    "not use a StrengthPath or another schedule of strengths on the same optimizer, and when you resume load the "
                    "states of both the optimizer and the budget"
                )

    def zeroing_factor(self) -> float | None:
        """The factor at which zero is a stationary point, by the present gradients; None where they are missing or not finite."""
        found = []
        for group, own in self.groups():
            problems = [(_gathered(x), penalty) for x, penalty in report.group_problems(self.optimizer, group)]
            try:
                found += [zeroing_strength(problems) / _largest(own)] if problems else []
            except (TypeError, ValueError):  # a gradient that is not finite, or a penalty of others without a dual
                continue
        return max(found) if found and max(found) > 0 else None

    @contextmanager
    def almost_all_zeroed(self) -> Iterator[None]:
        """Zero what the penalties can zero, but for one group of each problem, for the time of a ``with`` block.

        A network without any unit in a layer would be constant, and say nothing of the size of the others.
        """
        saved: list[tuple[Tensor, Tensor]] = []
        with torch.no_grad():
            try:
                for group, _ in self.groups():
                    penalty = self.optimizer.penalty_of(group)
                    for entry in param_groups.entries(group):
                        for p, kept in zip(entry, _kept(penalty, entry, group["joint"])):
                            saved.append((p, p.detach().clone()))
                            p.masked_fill_(~kept, 0)
                yield
            finally:
                for p, values in saved:
                    p.copy_(values)


def _kept(penalty: Any, entry: Entry, joint: bool) -> list[Tensor]:
    """Which entries of a problem the penalty cannot zero, and those of the first group that it can zero, if it has several."""

    def nonzero(operator: Any, x: list[Tensor]) -> list[Tensor]:
        left = operator.prox(x if joint else x[0], PROBE)
        return [part != 0 for part in (left if joint else [left])]

    ones = [torch.ones_like(p, memory_format=torch.contiguous_format) for p in entry]  # whose entries are set by number
    kept = nonzero(penalty.with_strength(1.0), ones)
    partition = declared.partition(penalty)
    place = next((i for i, k in enumerate(kept) if not bool(k.all())), None)
    if partition is None or place is None or sparsity.summary(ones if joint else ones[0], partition).groups < 2:
        return kept
    # A group with one huge entry is the only one that stays
    ones[place].view(-1)[int(kept[place].reshape(-1).int().argmin())] = PROBE**1.5
    first = nonzero(GroupL2(1.0, partition, weights="none"), ones)
    return [a | b for a, b in zip(kept, first)]


def _gathered(x: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
    return [sharding.gathered(t) for t in x] if isinstance(x, list) else sharding.gathered(x)


def _positive(strength: Any, number: int) -> float | Tensor:
    if not _largest(strength) > 0:
        raise ValueError(
            f"the strength of param group {number} must be > 0 when the budget is made, since it multiplies the strengths by one "
            f"factor, got {strength}; when you resume, make the budget before you load the states"
        )
    found: float | Tensor = strength.detach().clone() if isinstance(strength, Tensor) else float(strength)
    return found


def _largest(strength: float | Tensor) -> float:
    return float(strength.max()) if isinstance(strength, Tensor) else float(strength)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b.to(a))
    return bool(a == b)
