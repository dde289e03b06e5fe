"""Deterministic solvers with optimality certificates.

``ista`` and ``fista`` minimise a smooth function plus a penalty; ``sparse_code`` solves batches of lasso problems.
"""

from proxopt.solvers.gradient import fista, ista
from proxopt.solvers.lasso import sparse_code
from proxopt.solvers.least_squares import LeastSquares
from proxopt.solvers.result import ConvergenceWarning

__all__ = ["ConvergenceWarning", "LeastSquares", "fista", "ista", "sparse_code"]
