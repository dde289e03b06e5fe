"""Reports of the zeros in a model, and the strength from which on everything is zero."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from proxopt import Groups, Penalty, sparsity
from proxopt.penalties import declared
from proxopt.penalties.dual import PROBE, zeroing_strength
from proxopt_torch import sharding
from proxopt_torch.param_groups import ParamGroup, entries
from proxopt_torch.penalised import Penalised, as_penalised, not_penalised

Problem: TypeAlias = tuple[Tensor | list[Tensor], Any]  # gradients and the penalty of their parameters
Source: TypeAlias = nn.Module | Optimizer | Tensor | Iterable[Tensor]


@dataclass(frozen=True)
class Row:
    """Counts of one parameter, or of the parameters of a joint group.

    entries, zeros: the number of entries, and of those that equal 0. groups, living: the number of groups of the penalty, and of
    those that are not zero; None without groups.
    """

    name: str
    shape: str
    entries: int
    zeros: int
    groups: int | None = None
    living: int | None = None


@dataclass(frozen=True)
class SparsityReport:
    """One row for each parameter or joint group, and their sums. ``str`` makes a table of it."""

    rows: tuple[Row, ...]

    @property
    def entries(self) -> int:
        """The number of entries."""
        return sum(r.entries for r in self.rows)

    @property
    def zeros(self) -> int:
        """The number of entries that equal 0."""
        return sum(r.zeros for r in self.rows)

    @property
    def share(self) -> float:
        """Share of zero entries, in [0, 1]."""
        return self.zeros / self.entries if self.entries else 0.0

    def __str__(self) -> str:
        head = ("parameter", "shape", "zeros", "share", "nonzero groups")
        lines = [_cells(r) for r in self.rows] + [_cells(Row("total", "", self.entries, self.zeros))]
        widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
        form = [f"{{:<{widths[0]}}}", f"{{:<{widths[1]}}}", *(f"{{:>{w}}}" for w in widths[2:])]
        return "\n".join("  ".join(form).format(*line).rstrip() for line in [head, *lines])


def sparsity_report(source: nn.Module | Penalised) -> SparsityReport:
    """Count the zeros in the parameters of a model or of an optimizer.

    Sharded parameters (DTensor) are gathered, one at a time, and counted as a whole: call it on every rank, and all get the same
    report.

    Args:
      source: a module, whose parameters are counted as they are; or an optimizer of proxopt_torch, whose parameters are counted
        at the prox point, with the nonzero groups of its penalties.

    Raises:
      TypeError: ``source`` is neither.

    >>> import torch
    >>> from proxopt import GroupL2, Groups
    >>> from proxopt_torch import ProxAdam, sparsity_report
    >>> net = torch.nn.Linear(3, 2)
    >>> optimizer = ProxAdam([{"params": [("weight", net.weight)], "penalty": GroupL2(1e3, Groups.along(0))}])
    >>> net(torch.ones(3)).sum().backward(); optimizer.step()
    >>> print(sparsity_report(optimizer))
    parameter  shape  zeros   share  nonzero groups
    weight     2x3    6 / 6  100.0%           0 / 3
    total             6 / 6  100.0%
    """
    if isinstance(source, nn.Module):
        return SparsityReport(tuple(_row(name, [p], None) for name, p in source.named_parameters()))
    optimizer = as_penalised("source", source, "a module or ")
    with optimizer.at_prox_point():
        return SparsityReport(tuple(_optimizer_rows(optimizer)))


def max_strength(source: Source, penalty: Penalty | None = None) -> float:
    r"""The smallest strength at which zero is a stationary point, by the gradients of the last backward pass.

    .. math::

        \lambda_{\max} = \min \{\lambda \ge 0 : \operatorname{prox}_{\lambda R}(g_j) = 0 \text{ for all } j\}

    for the penalty R at strength 1 and the gradients :math:`g_j` of the problems, which stand for the gradients at zero. It
    gives the scale of useful strengths: take 1e-3 to 1e-1 of it. The equation holds in the dtype of the gradients, not just up
    to rounding. Groups with the weight 0 in the penalties of an optimizer, such as the units that ``groups.coupled`` leaves out,
    are not counted. Sharded gradients (DTensor) are gathered: call it on every rank.

    Args:
      source: an optimizer of proxopt_torch, with its own penalties; a module, of which each parameter with two or more axes is a
        problem; or parameters, of which each is a problem.
      penalty: a penalty for the parameters of a module, or for the given ones; its strength is ignored. None for an optimizer.

    Raises:
      TypeError: ``source`` is another optimizer, or ``penalty`` is no ``proxopt.Penalty``.
      ValueError: no parameter has a gradient, a gradient is not finite, or an optimizer and a penalty are given.

    >>> import torch
    >>> from proxopt import L1
    >>> from proxopt_torch import max_strength
    >>> w = torch.nn.Parameter(torch.zeros(2))
    >>> (w * torch.tensor([3.0, -5.0])).sum().backward()
    >>> max_strength([w], L1(1.0))
    5.0
    """
    problems = [(gathered(x), operator) for x, operator in _problems(source, penalty)]
    if not problems:
        raise ValueError("source must hold a penalised parameter with a gradient, got none: call loss.backward() first")
    return zeroing_strength(problems)


def gathered(x: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
    """The whole tensors of a problem; a collective where they are sharded."""
    return [sharding.gathered(t) for t in x] if isinstance(x, list) else sharding.gathered(x)


def _problems(source: Source, penalty: Penalty | None) -> Iterator[Problem]:
    if isinstance(source, Penalised):
        if penalty is not None:
            raise ValueError("penalty must be None for an optimizer, which has its own")
        for group in source.param_groups:
            yield from group_problems(source, group)
        return
    if isinstance(source, Optimizer):
        raise not_penalised("source", source, "a module, parameters or ")
    if not hasattr(penalty, "with_strength"):
        raise TypeError(f"penalty must be a proxopt.Penalty, got {penalty!r}")
    if isinstance(source, nn.Module):
        params: Iterable[Tensor] = (p for p in source.parameters() if p.ndim >= 2)  # no biases and norms
    elif isinstance(source, Tensor):
        params = [source]
    else:
        params = source
    for p in params:
        if p.grad is not None:
            yield p.grad, penalty


def group_problems(optimizer: Penalised, group: ParamGroup) -> Iterator[Problem]:
    """The gradients and the penalty of each problem of a param group, where all gradients exist."""
    penalty: Any = optimizer.penalty_of(group)
    for entry in entries(group) if hasattr(penalty, "with_strength") else []:
        grads = [p.grad for p in entry if p.grad is not None]
        if len(grads) == len(entry):
            found = grads if group["joint"] else grads[0]
            yield (found if isinstance(getattr(penalty, "weights", ""), str) else _penalised(found, penalty)), penalty


def _penalised(gradient: Tensor | list[Tensor], penalty: Any) -> Tensor | list[Tensor]:
    """The gradient with zeros in the groups that have the weight 0, which no strength zeroes."""
    ones = [torch.ones_like(g) for g in gradient] if isinstance(gradient, list) else torch.ones_like(gradient)
    kept = penalty.with_strength(1.0).prox(ones, PROBE)
    if isinstance(gradient, list):
        return [g.masked_fill(k != 0, 0.0) for g, k in zip(gradient, kept)]
    return gradient.masked_fill(kept != 0, 0.0)


def _optimizer_rows(optimizer: Penalised) -> Iterator[Row]:
    for number, group in enumerate(optimizer.param_groups):
        names = group.get("param_names") or [f"group {number}, {i}" for i in range(len(group["params"]))]
        groups = declared.partition(optimizer.penalty_of(group))
        bundles = [names] if group["joint"] else [[n] for n in names]
        for labels, entry in zip(bundles, entries(group)):
            yield _row(" + ".join(labels), entry, groups)


def _row(name: str, tensors: list[Tensor], groups: Groups | None) -> Row:
    shape = " + ".join("x".join(map(str, t.shape)) or "1" for t in tensors)
    tensors = [sharding.gathered(t.detach()) for t in tensors]
    if groups is None:
        return Row(name, shape, sum(t.numel() for t in tensors), sparsity.zeros(tensors))
    found = sparsity.summary(tensors if len(tensors) > 1 else tensors[0], groups)
    return Row(name, shape, found.entries, found.zeros, found.groups, found.living)


def _cells(row: Row) -> tuple[str, ...]:
    share = f"{100 * row.zeros / row.entries if row.entries else 0:.1f}%"
    return (
        row.name,
        row.shape,
        f"{row.zeros} / {row.entries}",
        share,
        "" if row.groups is None else f"{row.living} / {row.groups}",
    )
