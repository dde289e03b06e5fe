"""Proximal optimisation: write the penalty once, get exact zeros in NumPy, torch and JAX."""

from proxopt import schedules, sparsity, testing, updates
from proxopt._version import __version__
from proxopt.groups import Groups
from proxopt.penalties import L1, ElasticNet, GroupL2, Nested, Penalty, SparseGroupLasso, max_strength, soft_threshold

__all__ = [
    "L1",
    "ElasticNet",
    "GroupL2",
    "Groups",
    "Nested",
    "Penalty",
    "SparseGroupLasso",
    "__version__",
    "max_strength",
    "schedules",
    "soft_threshold",
    "sparsity",
    "testing",
    "updates",
]
