"""The declared properties of any operator: those of ``Penalty``, with a default for an object that does not have them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from proxopt._arrays import Array
from proxopt.groups import Groups
from proxopt.penalties.base import Penalty, ProxOperator
from proxopt.penalties.shrinkage import Shrinkage


def call(operator: ProxOperator | None, method: str, *arguments: Any, default: Any = None) -> Any:
    """What the method returns; ``default`` for an operator that has no such method."""
    function = getattr(operator, method, None)
    return function(*arguments) if callable(function) else default


def shrinkage(operator: ProxOperator) -> Shrinkage | None:
    """Its form as a soft threshold of entries and groups, if it has one."""
    form: Shrinkage | None = call(operator, "_form" if isinstance(operator, Penalty) else "shrinkage")
    return form


def partition(operator: ProxOperator | None) -> Groups | None:
    """The groups of entries that it zeroes together; None where it declares none."""
    return getattr(operator, "partition", None)


def batched(operator: ProxOperator, ndim: int) -> ProxOperator | None:
    """The operator for stacks of arrays with `ndim` axes; None where it declares none."""
    stacked: ProxOperator | None = call(operator, "batched", ndim)
    return stacked


def levels(operator: Any) -> list[Any]:
    """The penalties that it is composed of: the levels of a hierarchy, what a restricted penalty restricts; else itself."""
    parts = [*getattr(operator, "penalties", ()), getattr(operator, "penalty", None)]
    return [level for part in parts if callable(getattr(part, "prox", None)) for level in levels(part)] or [operator]


def on_positive_part(operator: Any) -> ProxOperator | None:
    """The operator whose prox at max(x, 0) is its prox at x, if it declares one."""
    return getattr(operator, "on_positive_part", None)


def with_metric(operator: ProxOperator, default: str) -> ProxOperator:
    """The operator, with `default` where it leaves its metric to the caller."""
    found: ProxOperator = call(operator, "with_metric", default, default=operator)
    return found


def has_dual(operator: ProxOperator, problems: int = 0) -> bool:
    """Whether it has a `dual` for arrays whose first `problems` axes are a batch."""
    return bool(call(operator, "has_dual", problems))


def check_fit(operator: ProxOperator, arrays: Sequence[Array]) -> None:
    """Raise where it does not fit the arrays, if it has such a check."""
    call(operator, "_check", arrays)
