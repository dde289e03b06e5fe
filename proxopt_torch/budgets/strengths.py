"""The strengths of an optimizer's penalties, multiplied by one common factor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
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
        return sum(self._value(group, own) for group, own in self.groups())

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

    def follow_costs(self, share: Callable[[], float]) -> None:
        """Set the ratios of the strengths: the mean penalty of a group is proportional to what its removal alone saves.

        The value of all penalties together stays. A group whose removal alone saves nothing counts as the cheapest of the others.
        """
        dense, savings, penalties, counts = share(), {}, {}, {}
        for number in self.own:
            with self._zeroed(number, _one_group) as problems:
                savings[number] = (dense - share()) / problems
            penalties[number], counts[number] = self._mean_penalty(number)
        positive = [saving for saving in savings.values() if saving > 0]
        if not positive:
            raise ValueError("by_cost needs groups whose removal makes the model smaller, got none: see groups.coupled")
        costs = {number: max(saving, min(positive)) for number, saving in savings.items()}
        scale = sum(counts[i] * penalties[i] for i in self.own) / sum(counts[i] * costs[i] for i in self.own)
        self.own = {i: own * (scale * costs[i] / penalties[i]) for i, own in self.own.items()}
        self.set(self.factor)

    def _mean_penalty(self, number: int) -> tuple[float, int]:
        """The mean penalty of a group with the strength at construction, and the number of groups."""
        group = self.optimizer.param_groups[number]
        penalty: Any = self.optimizer.penalty_of(group)
        partition = declared.partition(penalty)
        if partition is None:
            raise ValueError(f"by_cost needs penalties of groups, got {penalty!r} in param group {number}")
        count = 0
        for entry in param_groups.entries(group):
            tensors = [sharding.gathered(p.detach()) for p in entry]
            count += sparsity.summary(tensors if group["joint"] else tensors[0], partition).groups
        value = self._value(group, self.own[number])
        if not value > 0 or not count:
            raise ValueError(f"by_cost needs parameters that are not zero, got those of param group {number}, all zero")
        return value / count, count

    def _value(self, group: ParamGroup, strength: float | Tensor) -> float:
        """The value of the penalty of a param group with this strength."""
        penalty: Any = self.optimizer.penalty_of(group)
        penalty = penalty.with_strength(strength)
        with torch.no_grad():
            problems = [[sharding.gathered(p) for p in entry] for entry in param_groups.entries(group)]
            found = [penalty.value(tensors if group["joint"] else tensors[0]) for tensors in problems]
        return float(sum(v.detach().double().cpu() if isinstance(v, Tensor) else v for v in found))

    @contextmanager
    def almost_all_zeroed(self) -> Iterator[None]:
        """Zero what the penalties can zero, but for one group of each problem, for the time of a ``with`` block.

        A network without any unit in a layer would be constant, and say nothing of the size of the others.
        """
        with ExitStack() as stack:
            for number in self.own:
                stack.enter_context(self._zeroed(number, _all_but_one_group))
            yield

    @contextmanager
    def _zeroed(self, number: int, entries_of: Callable[[Any, Entry, bool], list[Tensor]]) -> Iterator[int]:
        """Zero entries of a param group for the time of a ``with`` block; yields the number of its problems."""
        saved: list[tuple[Tensor, Tensor]] = []
        group = self.optimizer.param_groups[number]
        penalty, problems = self.optimizer.penalty_of(group), param_groups.entries(group)
        with torch.no_grad():
            try:
                for entry in problems:
                    for p, zero in zip(entry, entries_of(penalty, entry, group["joint"])):
                        saved.append((p, p.detach().clone()))
                        p.masked_fill_(zero, 0)
                yield len(problems)
            finally:
                for p, values in saved:
                    p.copy_(values)


def _all_but_one_group(penalty: Any, entry: Entry, joint: bool) -> list[Tensor]:
    """Which entries of a problem the penalty can zero, but for those of one group, if it has several."""
    ones = [torch.ones_like(p) for p in entry]
    can = [x == 0 for x in _prox(penalty.with_strength(1.0), ones, joint)]
    partition = declared.partition(penalty)
    if partition is None or sparsity.summary(ones if joint else ones[0], partition).groups < 2:
        return can
    return [zero & ~one for zero, one in zip(can, _one_group(penalty, entry, joint))]


def _one_group(penalty: Any, entry: Entry, joint: bool) -> list[Tensor]:
    """The entries of one of the groups of a problem that the penalty can zero; of none if it has none."""
    ones = [torch.ones_like(p) for p in entry]
    can = [x == 0 for x in _prox(penalty.with_strength(1.0), ones, joint)]
    partition = declared.partition(penalty)
    place = next((i for i, zero in enumerate(can) if bool(zero.any())), None)
    if partition is None or place is None:
        return [torch.zeros_like(p, dtype=torch.bool) for p in entry]
    # A group with one huge entry is the only one that stays
    ones[place].view(-1)[int(can[place].reshape(-1).int().argmax())] = PROBE**1.5
    left = _prox(GroupL2(1.0, partition, weights="none"), ones, joint)
    return [(x != 0) & zero for x, zero in zip(left, can)]


def _prox(operator: Any, x: list[Tensor], joint: bool) -> list[Tensor]:
    """The prox with a step at which all is zero but what has a huge entry or no penalty."""
    found = operator.prox(x if joint else x[0], PROBE)
    return found if joint else [found]


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
