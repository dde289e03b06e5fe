"""Penalties, one family per file: the equation, value, prox, declared properties.

``shrinkage`` and ``metric`` implement the thresholds that most of them share, ``dual`` what certificates of solutions need. The
rest of the package reads the properties of a penalty through ``declared``, so that other operators are served too; checkpoints
store penalties as ``plain`` data.
"""

from __future__ import annotations

from proxopt.penalties.base import Penalty, ProxOperator
from proxopt.penalties.dual import max_strength
from proxopt.penalties.elementwise import L1, ElasticNet
from proxopt.penalties.group import GroupL2
from proxopt.penalties.nested import Nested
from proxopt.penalties.nonnegative import NonNegative
from proxopt.penalties.plain import from_dict, plain_data
from proxopt.penalties.shrinkage import Shrinkage, soft_threshold
from proxopt.penalties.sparse_group import SparseGroupLasso

__all__ = [
    "L1",
    "ElasticNet",
    "GroupL2",
    "Nested",
    "NonNegative",
    "Penalty",
    "ProxOperator",
    "Shrinkage",
    "SparseGroupLasso",
    "from_dict",
    "max_strength",
    "plain_data",
    "soft_threshold",
]
