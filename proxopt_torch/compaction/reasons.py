"""Why units stay although their weights, or some of them, are zero."""

from __future__ import annotations

import numpy as np
from torch import Tensor, nn

from proxopt_torch.compaction import slicing
from proxopt_torch.dependencies import Dependencies


def joined(reasons: list[str]) -> str:
    """Each reason once, with the number of units where there are several."""
    counts = {reason: reasons.count(reason) for reason in dict.fromkeys(reasons)}
    return "; ".join(f"{reason} ({count} of them)" if count > 1 else reason for reason, count in counts.items())


def of_zeroed_units(dependencies: Dependencies, model: nn.Module, gone: np.ndarray) -> dict[int, str]:
    """Reasons for the units with zeros that are not removed.

    Those are units that all their layers compute from zeros alone, or read with zeros alone; a unit of which one layer computes
    only zeros, although others do not; and a unit of several channels, such as a head, some of which are zero.
    """
    size = 1 + max(
        (int(u.max()) for places in dependencies.places.values() for u in places if u is not None and u.size), default=-1
    )
    count = {role: np.zeros(size, np.int64) for role in ("computes", "reads")}
    zeros = {role: np.zeros(size, np.int64) for role in ("computes", "reads")}
    partly, elsewhere = np.zeros(size, bool), np.zeros(size, bool)
    tensors = _tensors(model)
    for (name, dimension), role in dependencies.roles.items():
        tensor, units = tensors.get(name), dependencies.places.get(name, ())
        at = units[dimension] if dimension < len(units) else None
        if tensor is None or tensor.ndim < 2 or at is None or role not in count:
            continue
        others = [d for d in range(tensor.ndim) if d != dimension]
        zero = (~tensor.detach().ne(0).sum(others).bool()).cpu().numpy()
        here, of_them = np.bincount(at, minlength=size), np.bincount(at[zero], minlength=size)
        count[role] += here
        zeros[role] += of_them
        partly |= (of_them > 0) & (of_them < here)
        if role == "computes":
            elsewhere |= (of_them > 0) & (of_them == here)
    whole = np.zeros(size, bool)
    for role in count:
        whole |= (zeros[role] > 0) & (zeros[role] == count[role])
    out: dict[int, str] = {}
    computed = count["computes"] > 0  # not features of the input
    for found, reason in (
        (whole, "its value is used"),
        (elsewhere, "another layer computes it too"),
        (partly, "only a part of it is zero"),
    ):
        for unit in np.setdiff1d(np.flatnonzero(found & computed), gone).tolist():
            out.setdefault(unit, dependencies.kept.get(unit, reason))
    return out


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers by their first names."""
    members = {name: places[0] for name, places in slicing.slots(model).items()}
    return {name: getattr(module, leaf) for name, (module, leaf) in members.items()}
