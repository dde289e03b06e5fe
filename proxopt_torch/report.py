"""What became zero in a model, and at which strength everything would."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from proxopt import Groups, sparsity
from proxopt.penalties import declared
from proxopt.penalties.dual import zeroing_strength
from proxopt_torch import sharding
from proxopt_torch.base import Penalised, check_optimizer, entries


@dataclass(frozen=True)
class Row:
    """One parameter, or one joint entry: its name, shapes, zeros, and how many of its groups live (None: no groups)."""

    name: str
    shape: str
    entries: int
    zeros: int
    groups: int | None = None
    living: int | None = None


@dataclass(frozen=True)
class SparsityReport:
    """The rows of a report, their sums, and a readable table as `str`."""

    rows: tuple[Row, ...]

    @property
    def entries(self) -> int:
        return sum(r.entries for r in self.rows)

    @property
    def zeros(self) -> int:
        return sum(r.zeros for r in self.rows)

    @property
    def share(self) -> float:
        """Share of zero entries, in [0, 1]."""
        return self.zeros / self.entries if self.entries else 0.0

    def __str__(self) -> str:
        head = ("parameter", "shape", "zeros", "share", "living groups")
        lines = [_cells(r) for r in self.rows] + [_cells(Row("total", "", self.entries, self.zeros))]
        widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
        form = [f"{{:<{widths[0]}}}", f"{{:<{widths[1]}}}", *(f"{{:>{w}}}" for w in widths[2:])]
        return "\n".join("  ".join(form).format(*line).rstrip() for line in [head, *lines])


def sparsity_report(source: nn.Module | Any) -> SparsityReport:
    """Count the zeros of a model, or of what an optimizer of proxopt_torch steps.

    Sharded parameters (DTensor) are gathered, one at a time, and counted as a whole: call it on every rank, all get the
    same report.

    Args:
      source: a module (its parameters as they are), or an optimizer: read at the prox point, with the living groups
        of its penalties.

    >>> import torch
    >>> from proxopt import GroupL2, Groups
    >>> from proxopt_torch import ProxAdam, sparsity_report
    >>> net = torch.nn.Linear(3, 2)
    >>> optimizer = ProxAdam([{"params": [("weight", net.weight)], "penalty": GroupL2(1e3, Groups.along(0))}])
    >>> net(torch.ones(3)).sum().backward(); optimizer.step()
    >>> print(sparsity_report(optimizer))
    parameter  shape  zeros   share  living groups
    weight     2x3    6 / 6  100.0%          0 / 3
    total             6 / 6  100.0%
    """
    if isinstance(source, nn.Module):
        return SparsityReport(tuple(_row(name, [p], None) for name, p in source.named_parameters()))
    check_optimizer("source", source, "a module or ")
    with source.at_prox_point():
        return SparsityReport(tuple(_optimizer_rows(source)))


def max_strength(source: Any, penalty: Any = None) -> float:
    """The smallest strength that zeroes everything, given the gradients that the last backward pass left.

    It is the strength from which 0 is a stationary point when the gradient at 0 is the present one: the number to scale
    from. Take 1e-3 to 1e-1 of it. The prox of each of the gradients at this strength is all zeros in its own dtype.

    Args:
      source: an optimizer of proxopt_torch (its own penalties), a module (each parameter with two or more axes is a problem
        of its own under `penalty`), or parameters (likewise, all of them).
      penalty: a penalty of proxopt; its strength is ignored. Not for optimizers.

    Raises:
      ValueError: no parameter has a gradient, or one is not finite.

    >>> import torch
    >>> from proxopt import L1
    >>> from proxopt_torch import max_strength
    >>> w = torch.nn.Parameter(torch.zeros(2))
    >>> (w * torch.tensor([3.0, -5.0])).sum().backward()
    >>> max_strength([w], L1(1.0))
    5.0
    """
    problems = list(_problems(source, penalty))
    if not problems:
        raise ValueError("source must hold a penalised parameter with a gradient, got none: call loss.backward() first")
    return zeroing_strength(problems)


def _problems(source: Any, penalty: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(source, Penalised):
        if penalty is not None:
            raise ValueError("penalty must be None for an optimizer, which has its own")
        for group in source.param_groups:
            own = source.penalty_of(group)
            for entry in entries(group) if hasattr(own, "with_strength") else []:
                if all(p.grad is not None for p in entry):
                    grads = [p.grad for p in entry]
                    yield (grads if group["joint"] else grads[0]), own
        return
    if isinstance(source, Optimizer):
        check_optimizer("source", source, "a module, parameters or ")
    if not hasattr(penalty, "with_strength"):
        raise TypeError(f"penalty must be a proxopt.Penalty, got {penalty!r}")
    if isinstance(source, nn.Module):
        params: Iterable[Tensor] = (p for p in source.parameters() if p.ndim >= 2)
    else:
        params = [source] if isinstance(source, Tensor) else source
    for p in params:
        if p.grad is not None:
            yield p.grad, penalty


def _optimizer_rows(optimizer: Any) -> Iterator[Row]:
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
