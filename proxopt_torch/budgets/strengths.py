"""The strengths of an optimizer's penalties, multiplied by one common factor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from proxopt import GroupL2, sparsity
from proxopt.penalties import declared
from proxopt.penalties.dual import PROBE, zeroing_strength
from proxopt_torch import param_groups, report, sharding
from proxopt_torch.frozen_zeros import FROZEN
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

    @contextmanager
    def kept_on_error(self) -> Iterator[None]:
        """Give the param groups their present strengths back if the ``with`` block raises."""
        saved = {number: self.optimizer.param_groups[number]["strength"] for number in self.own}
        try:
            yield
        except BaseException:
            for number, strength in saved.items():
                self.optimizer.param_groups[number]["strength"] = strength
            raise

    @property
    def frozen(self) -> bool:
        """Whether the zeros of the parameters with these penalties are frozen, so that the strengths have no effect."""
        return all(group.get(FROZEN) for group, _ in self.groups())

    def checked(self, own: Mapping[Any, Any]) -> dict[int, float | Tensor]:
        """Strengths at construction from a state. Raises ValueError or TypeError where they are none of these param groups."""
        found = {int(number): strength for number, strength in own.items()}
        if found.keys() != self.own.keys():
            raise ValueError(
                f"state_dict must be of an optimizer whose param groups {list(self.own)} have penalties, got {list(found)}"
            )
        for number, strength in found.items():
            if getattr(strength, "shape", ()) != getattr(self.own[number], "shape", ()) or not 0 < _largest(strength) < math.inf:
                raise ValueError(f"state_dict must hold a strength > 0 for param group {number}, got {strength!r}")
        return found

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
            problems = [(report.gathered(x), penalty) for x, penalty in report.group_problems(self.optimizer, group)]
            try:
                found += [zeroing_strength(problems) / _largest(own)] if problems else []
            except (TypeError, ValueError):  # a gradient that is not finite, or a penalty of others without a dual
                continue
        return max(found) if found and max(found) > 0 else None

    def leave_ratios_open(self) -> bool:
        """Whether all strengths are equal, and there are several, all of penalties of groups."""
        numbers = {float(own) for own in self.own.values() if not isinstance(own, Tensor) or own.numel() == 1}
        grouped = all(declared.partition(self.optimizer.penalty_of(group)) is not None for group, _ in self.groups())
        return len(self.own) > 1 and len(numbers) == 1 and grouped

    def follow_costs(self, share: Callable[[], float]) -> None:
        """Set the ratios of the strengths: the mean penalty of a group is proportional to what its removal saves.

        It is measured by removing every second group. The value of all penalties together stays. Groups whose removal saves
        nothing count as the cheapest of the others.
        Raises ValueError where penalties have no groups, parameters are all zero, or no group saves anything.
        """
        dense, savings, penalties, counts = share(), {}, {}, {}
        for number in self.own:
            penalties[number], counts[number] = self._mean_penalty(number)
            # Half of the groups rather than one: a single head of a fused attention saves less than what separating it adds
            with self._zeroed(number, _every_second_group):
                savings[number] = 2 * (dense - share()) / counts[number]
        positive = [saving for saving in savings.values() if saving > 0]
        if not positive:
            raise ValueError("by_cost must be False where the removal of groups makes nothing smaller: see groups.coupled")
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
            raise ValueError(f"by_cost must be False where a penalty has no groups, got {penalty!r} in param group {number}")
        count = 0
        for entry in param_groups.entries(group):
            tensors = [sharding.gathered(p.detach()) for p in entry]
            count += sparsity.summary(tensors if group["joint"] else tensors[0], partition).groups
        value = self._value(group, self.own[number])
        if not value > 0 or not count:
            raise ValueError(f"by_cost must be False where parameters are all zero, as those of param group {number} are")
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
    def _zeroed(self, number: int, entries_of: Callable[[Any, Entry, bool], list[Tensor]]) -> Iterator[None]:
        """Zero entries of a param group for the time of a ``with`` block."""
        saved: list[tuple[Tensor, Tensor]] = []
        group = self.optimizer.param_groups[number]
        penalty = self.optimizer.penalty_of(group)
        with torch.no_grad():
            try:
                for entry in param_groups.entries(group):
                    for p, zero in zip(entry, entries_of(penalty, entry, group["joint"])):
                        saved.append((p, p.detach().clone()))
                        p.masked_fill_(zero, 0)
                yield
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
    ones = [torch.ones_like(p, memory_format=torch.contiguous_format) for p in entry]  # whose entries are set by number
    can = [x == 0 for x in _prox(penalty.with_strength(1.0), ones, joint)]
    partition = declared.partition(penalty)
    place = next((i for i, zero in enumerate(can) if bool(zero.any())), None)
    if partition is None or place is None:
        return [torch.zeros_like(p, dtype=torch.bool) for p in entry]
    # A group with one huge entry is the only one that stays
    ones[place].view(-1)[int(can[place].reshape(-1).int().argmax())] = PROBE**1.5
    left = _prox(GroupL2(1.0, partition, weights="none"), ones, joint)
    return [(x != 0) & zero for x, zero in zip(left, can)]


def _every_second_group(penalty: Any, entry: Entry, joint: bool) -> list[Tensor]:
    """The entries of the first, third, ... of the groups of a problem, where the penalty can zero them."""
    ones = [torch.ones_like(p) for p in entry]
    partition: Any = declared.partition(penalty)
    sizes = partition.norms(ones)
    odd = torch.arange(sizes.numel(), device=sizes.device).reshape(sizes.shape) % 2
    can = _prox(penalty.with_strength(1.0), ones, joint)
    return [(x == 0) & (keep == 0) for x, keep in zip(can, partition.spread(odd.to(sizes.dtype), ones))]


def _prox(operator: Any, x: list[Tensor], joint: bool) -> list[Tensor]:
    """The prox with a step at which all is zero but what has a huge entry or no penalty."""
    found = operator.prox(x if joint else x[0], PROBE)
    return found if joint else [found]


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
