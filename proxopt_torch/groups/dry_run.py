"""The table that ``print`` shows of ``ParamGroups``: what is penalised, how strongly, and what is not and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from proxopt import ProxOperator
from proxopt.penalties import declared
from proxopt_torch import param_groups, sharding
from proxopt_torch.param_groups import ParamGroup

if TYPE_CHECKING:
    from proxopt_torch.groups.result import ParamGroups

HEAD = ("kind", "layer", "tensors", "groups", "entries", "weight", "strength", "share")
NAMES = 4  # so many names of parameters, or of layers, are shown of a longer list


@dataclass(frozen=True)
class _Row:
    """One penalised problem. ``value``: its penalty at the present weights; None where they hold no numbers (meta device)."""

    kind: str
    layer: str
    tensors: str
    groups: str
    entries: str
    weight: str
    strength: str
    value: float | None


def table(found: ParamGroups) -> str:
    """One line for each penalised problem, then the parameters without penalty, then the units left out."""
    rows = [row for group in found for row in _rows(found, group)]
    known = all(row.value is not None for row in rows)
    total = sum(row.value or 0.0 for row in rows)
    lines = [(*_cells(row), _share(row.value, total, known)) for row in rows]
    lines.append(
        (
            "total",
            "",
            str(sum(int(row.tensors) for row in rows)),
            str(sum(int(row.groups or 0) for row in rows)),
            "",
            "",
            "",
            _share(total, total, known),
        )
    )
    widths = [max(len(line[i]) for line in [HEAD, *lines]) for i in range(len(HEAD))]
    form = "  ".join([f"{{:<{w}}}" for w in widths[:2]] + [f"{{:>{w}}}" for w in widths[2:]])
    text = [form.format(*line).rstrip() for line in [HEAD, *lines]] if rows else []
    return "\n".join([*text, *_without_penalty(found), *_left_out(found)])


def _rows(found: ParamGroups, group: ParamGroup) -> Iterator[_Row]:
    penalty = penalty_of(group)
    if penalty is None:
        return
    named = _named(group)
    for problem in [named] if group.get("joint") else [[pair] for pair in named]:
        tensors = [t.detach() for _, t in problem]
        units = found.units.get(problem[0][0], ())
        kind = " and ".join(dict.fromkeys(u.kind for u in units)) or type(penalty).__name__
        layers = list(dict.fromkeys(u.layer for u in units)) or [problem[0][0]]
        yield _Row(
            kind,
            _listed(layers, 2),
            str(len(tensors)),
            *_counts(penalty, tensors),
            _number(getattr(penalty, "strength", None)),
            _value(penalty, tensors),
        )


def penalty_of(group: ParamGroup) -> ProxOperator | None:
    """The penalty of a param group with its strength, before or after an optimizer has turned it into plain data."""
    penalty: Any = group.get("penalty")
    if isinstance(penalty, dict):
        return param_groups.rebuild(group)
    operator: ProxOperator | None = penalty
    return operator


def _counts(penalty: ProxOperator, tensors: list[Tensor]) -> tuple[str, str, str]:
    """The number of groups that have a weight, and the range of their sizes and weights."""
    groups = declared.partition(penalty)
    if groups is None:
        return "", "", ""
    shapes = [np.broadcast_to(np.float64(0.0), tuple(t.shape)) for t in tensors]  # arrays of these shapes without memory
    count, sizes = groups.count(shapes), np.asarray(groups.sizes(shapes))
    rule = getattr(declared.levels(penalty)[-1], "weights", None)
    if rule is None:
        return str(count), _range(sizes), ""
    weights = np.asarray(groups.weights(shapes, _on_cpu(rule)), dtype=float)
    penalised = np.broadcast_to(weights.reshape(-1) != 0, count)
    sizes = np.broadcast_to(sizes, count)[penalised]
    return str(int(penalised.sum())), _range(sizes), _range(np.broadcast_to(weights.reshape(-1), count)[penalised])


def _on_cpu(weights: Any) -> Any:
    return weights.detach().cpu().numpy() if isinstance(weights, Tensor) else weights


def _value(penalty: Any, tensors: list[Tensor]) -> float | None:
    if any(t.is_meta for t in tensors):
        return None
    whole = [sharding.gathered(t) for t in tensors]
    with torch.no_grad():
        return float(penalty.value(whole if len(whole) > 1 else whole[0]))


def _named(group: ParamGroup) -> list[tuple[str, Tensor]]:
    """The parameters of a group with their names; those without one are named by their shape."""
    params, names = group["params"], group.get("param_names")
    params = [params] if isinstance(params, Tensor) else list(params)
    if names:
        return list(zip(names, params))
    return [p if isinstance(p, tuple) else ("x".join(map(str, p.shape)) or "scalar", p) for p in params]


def _cells(row: _Row) -> tuple[str, ...]:
    return row.kind, row.layer, row.tensors, row.groups, row.entries, row.weight, row.strength


def _share(value: float | None, total: float, known: bool) -> str:
    return f"{100 * value / total:.1f}%" if known and value is not None and total > 0 else ""


def _range(values: np.ndarray) -> str:
    if not values.size:
        return ""
    low, high = _number(values.min()), _number(values.max())
    return low if low == high else f"{low} to {high}"


def _number(value: Any) -> str:
    try:
        return f"{float(value):.3g}" if float(value) != int(value) else f"{int(value)}"
    except (TypeError, ValueError, RuntimeError):  # an array, or a penalty without a strength
        return ""


def _without_penalty(found: ParamGroups) -> list[str]:
    rest = [pair for group in found if group.get("penalty") is None for pair in _named(group)]
    if not rest:
        return []
    return [f"without penalty: {sum(t.numel() for _, t in rest)} entries in {_listed([name for name, _ in rest])}"]


def _left_out(found: ParamGroups) -> list[str]:
    """One line for each reason, with the layers to whose units it applies."""
    by_reason: dict[str, list[str]] = {}
    for units, reason in found.left_out.items():
        by_reason.setdefault(reason, []).append(str(units))
    return [f"left out: {_listed(items)}: {reason}" for reason, items in by_reason.items()]


def _listed(items: Sequence[str], shown: int = NAMES) -> str:
    more = len(items) - shown
    return ", ".join(items[:shown]) + (f" and {more} more" if more > 0 else "")
