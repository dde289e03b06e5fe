"""Proximal optimisation: write the penalty once, get exact zeros in NumPy, torch and JAX."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from proxopt import schedules, sparsity, updates
from proxopt._version import __version__
from proxopt.groups import Groups
from proxopt.penalties import (
    L1,
    ElasticNet,
    GroupL2,
    Nested,
    NonNegative,
    Penalty,
    ProxOperator,
    Shrinkage,
    SparseGroupLasso,
    max_strength,
    soft_threshold,
)
from proxopt.projections import Sphere

if TYPE_CHECKING:
    from proxopt import solvers, testing
    from proxopt.solvers import sparse_code

__all__ = [
    "L1",
    "ElasticNet",
    "GroupL2",
    "Groups",
    "Nested",
    "NonNegative",
    "Penalty",
    "ProxOperator",
    "Shrinkage",
    "SparseGroupLasso",
    "Sphere",
    "__version__",
    "max_strength",
    "schedules",
    "soft_threshold",
    "solvers",
    "sparse_code",
    "sparsity",
    "testing",
    "updates",
]


def __getattr__(name: str) -> Any:
    """Import the solvers and the laws when they are first used: SciPy takes longer to import than all the rest."""
    if name not in ("solvers", "sparse_code", "testing"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    if name == "testing":
        return importlib.import_module("proxopt.testing")
    solvers = importlib.import_module("proxopt.solvers")
    return solvers if name == "solvers" else solvers.sparse_code
