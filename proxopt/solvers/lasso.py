"""Sparse codes of many signals at once."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from array_api_compat import is_jax_array

from proxopt import _arrays, _checks
from proxopt._arrays import Array
from proxopt.solvers import active_set, homotopy
from proxopt.solvers.active_set import relative_gap
from proxopt.solvers.gradient import check_budget
from proxopt.solvers.least_squares import Dictionary, check_pair
from proxopt.solvers.result import report

if TYPE_CHECKING:
    from scipy.optimize import OptimizeResult

METHODS = ("auto", "active_set", "homotopy")
SMALL = 16  # up to so many active columns a path costs less than gradient steps, and never fails to end


def sparse_code(
    A: Any, b: Any, strength: Any, *, tol: float | None = None, max_iter: int = 1000, method: str = "auto"
) -> OptimizeResult:
    """min_z 1/2 ||A z - b||^2 + strength ||z||_1, for many signals and dictionaries at once.

    Args:
      A: a dictionary (m, n), or (..., m, n) with one for each problem, or a list of K dictionaries (m, n_k) of different
        widths. NumPy, torch or JAX, real floating point.
      b: signals, (m,) or (..., m), of A's dtype; the leading axes of A and b broadcast. For a list of K dictionaries (K, m).
      strength: a number > 0, or an array with one for each problem.
      tol: of the duality gap, relative to the objective. None: 1e-6 in double precision, 1e-4 in single.
      max_iter: the budget of each problem: gradient steps, or kinks of its path. When it ends first, a warning says what was
        reached.
      method: "homotopy" follows the solution path, exact in finitely many steps, also where columns are nearly parallel;
        "active_set" lets accelerated gradient steps find the support and linear solves finish, fast for many signals in a large
        dictionary; "auto" takes the first where min(m, n) <= 16, else the second, and the other for what that leaves open.

    Returns:
      A SciPy `OptimizeResult`: x, the codes (..., n) with exact zeros, a list for a list of dictionaries; fun; gap (relative, as
      tol); nit; success; status; message; all but message with one entry for each problem. Codes are constants for automatic
      differentiation. Under jax.jit nothing is warned of: look at `success`.

    Raises:
      TypeError, ValueError: an array is not real floating point, shapes do not fit, or a number lies out of its domain.

    >>> import numpy as np
    >>> found = sparse_code(np.eye(3), np.array([3.0, 0.5, -2.0]), 1.0)
    >>> found.x, bool(found.success)
    (array([ 2.,  0., -1.]), True)
    """
    widths = None
    if isinstance(A, (list, tuple)):
        A, widths = _padded(A)
    xp = check_pair(A, b)
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    _checks.in_range("strength", strength, open_low=True)
    for name, v in (("A", A), ("b", b)):
        if _arrays.is_numpy_array(v) and not np.isfinite(v).all():
            raise ValueError(f"{name} must be finite, got {v[~np.isfinite(v)][0]}")
    A, b = (_arrays.detach(_arrays.widen(v)) for v in (A, b))
    if tol is None:
        tol = 1e-6 if float(xp.finfo(b.dtype).eps) < 1e-10 else 1e-4
    check_budget(tol, max_iter)
    batch = np.broadcast_shapes(tuple(A.shape[:-2]), tuple(b.shape[:-1]), np.shape(strength))
    m, n = A.shape[-2:]
    methods = [method] if method != "auto" else ["homotopy", "active_set"] if min(m, n) <= SMALL else ["active_set", "homotopy"]
    rows = math.prod(batch)
    signals = xp.reshape(xp.broadcast_to(b, (*batch, m)), (rows, m))
    strengths = xp.reshape(xp.broadcast_to(_arrays.like(strength, b) + 0 * b[..., 0], batch), (rows,))
    if A.ndim > 2:
        A = xp.reshape(xp.broadcast_to(A, (*batch, m, n)), (rows, m, n))
    if rows and m and n:
        solve = _jitted() if is_jax_array(b) else _solve
        z, fun, gap, count = solve(A, signals, strengths, tol, int(max_iter), tuple(methods))
    else:
        z = xp.zeros_like(xp.broadcast_to(signals[:, :1] * 0, (rows, n))) if m else xp.zeros((rows, n), dtype=b.dtype)
        fun = 0.5 * xp.sum(signals * signals, axis=1)
        gap, count = fun * 0, xp.astype(fun * 0, xp.int32)
    shaped = lambda v: xp.reshape(v, (*batch, *v.shape[1:]))
    x = shaped(z)
    codes = x if widths is None else [x[i, ..., :w] for i, w in enumerate(widths)]
    return report(codes, shaped(fun), "gap", shaped(gap), shaped(gap <= tol), shaped(count), depth=3)


def _solve(
    A: Array, b: Array, strength: Array, tol: float, max_iter: int, methods: tuple[str, ...]
) -> tuple[Array, Array, Array, Array]:
    """(z, objective, relative gap, count) of problems in rows; later methods take what earlier ones leave open."""
    xp = _arrays.namespace(b)
    first, *others = methods
    z, count = _by(first, A, b, strength, tol, max_iter)
    gap, _ = relative_gap(Dictionary(A), b, strength, z)
    for method in others:
        z, gap = _finish(method, A, b, strength, z, gap, tol, max_iter)
    residual = b - Dictionary(A).times(z)
    fun = 0.5 * xp.sum(residual * residual, axis=1) + strength * xp.sum(xp.abs(z), axis=1)
    return z, fun, gap, count


def _by(method: str, A: Array, b: Array, strength: Array, tol: float, max_iter: int) -> tuple[Array, Array]:
    if method == "active_set":
        return active_set.solve(A, b, strength, tol, max_iter)
    own = _arrays.namespace(A).broadcast_to(A, (b.shape[0], *A.shape[-2:]))
    return homotopy.solve(own, b, strength, max_iter)


def _finish(
    method: str, A: Array, b: Array, strength: Array, z: Array, gap: Array, tol: float, max_iter: int
) -> tuple[Array, Array]:
    """(z, relative gap), by another method where the gap is above the tolerance and that one does better."""
    xp = _arrays.namespace(b)

    def again(A: Array, b: Array, strength: Array, z: Array, gap: Array) -> tuple[Array, Array]:
        new, _ = _by(method, A, b, strength, tol, max_iter)
        reached, _ = relative_gap(Dictionary(A), b, strength, new)
        better = (reached < gap) | (gap != gap)
        return xp.where(better[:, None], new, z), xp.where(better, reached, gap)

    rest = ~(gap <= tol)
    if is_jax_array(b):
        import jax

        return jax.lax.cond(xp.any(rest), lambda: again(A, b, strength, z, gap), lambda: (z, gap))
    if bool(xp.any(rest)):
        rows = xp.nonzero(rest)[0]
        own = A if A.ndim == 2 else A[rows, ...]
        z[rows, :], gap[rows] = again(own, b[rows, :], strength[rows], z[rows, :], gap[rows])
    return z, gap


@functools.cache
def _jitted() -> Any:
    """`_solve` compiled once for each shape: traced anew at every call, its loops would cost more than what they compute."""
    import jax

    return jax.jit(_solve, static_argnums=(4, 5))


def _padded(dictionaries: Sequence[Array]) -> tuple[Array, list[int]]:
    """One array (K, m, n) with zero columns on the right, which no code uses, and the widths."""
    arrays, xp = _arrays.as_list(list(dictionaries), "A")
    for i, a in enumerate(arrays):
        if a.ndim != 2 or a.shape[0] != arrays[0].shape[0] or a.dtype != arrays[0].dtype:
            raise ValueError(
                f"A must hold matrices with one number of rows and one dtype, got {tuple(arrays[0].shape)} of {arrays[0].dtype}"
                f" and, as A[{i}], {tuple(a.shape)} of {a.dtype}"
            )
    widths = [a.shape[1] for a in arrays]
    widest = max(widths)
    fill = lambda a: xp.concat([a, _arrays.full((a.shape[0], widest - a.shape[1]), 0.0, a)], axis=1)
    return xp.stack([fill(a) for a in arrays]), widths
