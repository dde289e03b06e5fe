"""Penalties, one family per file: the equation, value, prox, declared properties."""

from __future__ import annotations

from typing import Any

from proxopt import _checks
from proxopt.penalties.base import Penalty
from proxopt.penalties.dual import max_strength
from proxopt.penalties.elementwise import L1, ElasticNet, soft_threshold
from proxopt.penalties.group import GroupL2
from proxopt.penalties.nested import Nested
from proxopt.penalties.sparse_group import SparseGroupLasso

KINDS: dict[str, type[Penalty]] = {c.__name__: c for c in (L1, ElasticNet, GroupL2, SparseGroupLasso, Nested)}


def from_dict(data: dict, strength: Any) -> Penalty:
    """The penalty that `Penalty.to_dict` described, at the given strength."""
    _checks.one_of("penalty kind", data.get("kind"), tuple(KINDS))
    return KINDS[data["kind"]]._from_dict(data, strength)


__all__ = ["L1", "ElasticNet", "GroupL2", "Nested", "Penalty", "SparseGroupLasso", "from_dict", "max_strength", "soft_threshold"]
