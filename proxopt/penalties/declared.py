"""The declared properties of any operator: those of ``Penalty``, with a default for an object that does not have them."""

from __future__ import annotations

from collections.abc import Sequence

from proxopt._arrays import Array
from proxopt.groups import Groups
from proxopt.penalties.base import ProxOperator
from proxopt.penalties.shrinkage import Shrinkage


def shrinkage(operator: ProxOperator) -> Shrinkage | None:
    """Its form as a soft threshold of entries and groups, if it has one."""
    return operator.shrinkage() if hasattr(operator, "shrinkage") else None


def partition(operator: ProxOperator | None) -> Groups | None:
    """The groups of entries that it zeroes together; None where it declares none."""
    return getattr(operator, "partition", None)


def batched(operator: ProxOperator, ndim: int) -> ProxOperator | None:
    """The operator for stacks of arrays with `ndim` axes; None where it declares none."""
    return operator.batched(ndim) if hasattr(operator, "batched") else None


def with_metric(operator: ProxOperator, default: str) -> ProxOperator:
    """The operator, with `default` where it leaves its metric to the caller."""
    return operator.with_metric(default) if hasattr(operator, "with_metric") else operator


def has_dual(operator: ProxOperator, problems: int = 0) -> bool:
    """Whether it has a `dual` for arrays whose first `problems` axes are a batch."""
    return bool(operator.has_dual(problems)) if hasattr(operator, "has_dual") else False


def check_fit(operator: ProxOperator, arrays: Sequence[Array]) -> None:
    """Raise where it does not fit the arrays, if it has such a check."""
    if hasattr(operator, "_check"):
        operator._check(arrays)
