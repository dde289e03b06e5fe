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
from proxopt.penalties.dual import to_numpy
from proxopt.solvers import active_set, homotopy
from proxopt.solvers.active_set import relative_gap
from proxopt.solvers.derivatives import is_traced, optimal_value, watched
from proxopt.solvers.gradient import check_budget, usual_tolerance
from proxopt.solvers.least_squares import Dictionary, check_finite, check_pair
from proxopt.solvers.result import report

if TYPE_CHECKING:
    from scipy.optimize import OptimizeResult

METHODS = ("auto", "active_set", "homotopy")
USUAL = 1e9  # signals whose largest entry lies below this, and above its inverse, are solved for as they are
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
      max_iter: the budget that each method has for a problem: gradient steps, or kinks of its path. When it ends first, a warning
        says what was reached.
      method: "homotopy" follows the solution path, exact in finitely many steps, also where columns are nearly parallel;
        "active_set" lets accelerated gradient steps find the support and linear solves finish, fast for many signals in a large
        dictionary; "auto" takes the first where min(m, n) <= 16, else the second, and the other for what that leaves open.

    Returns:
      A SciPy `OptimizeResult`: x, the codes (..., n) with exact zeros, a list for a list of dictionaries; fun; gap (relative, as
      tol); nit, of the method that found the code; success; status (0 success, 1 the budget ended, 2 no gap, as numbers left the
      range of the dtype); message; all but message with one entry for each problem. Under jax.jit nothing is warned of: look at
      `success`.

    Derivatives: `fun` can be differentiated once with respect to A, b and strength, in torch and JAX, in reverse and
    forward mode. At a code z that is -(b - A z) z^T for A, b - A z for b, ||z||_1 for strength. Differentiating through x raises
    NotImplementedError: solve for constant inputs to use codes as constants.

    Raises:
      TypeError, ValueError: an array is not real floating point, shapes do not fit, an entry is not finite, or a number lies out
        of its domain. Arrays that JAX traces are not looked into: success is False for what is not finite there.

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
    _check_values(A, b, strength)
    check_budget(tol, max_iter)
    A, b = _arrays.widen(A), _arrays.widen(b)
    strength = _arrays.like(strength, b)
    tol = usual_tolerance(b) if tol is None else tol
    batch = np.broadcast_shapes(tuple(A.shape[:-2]), tuple(b.shape[:-1]), np.shape(strength))
    m, n = A.shape[-2:]
    methods = [method] if method != "auto" else ["homotopy", "active_set"] if min(m, n) <= SMALL else ["active_set", "homotopy"]
    rows = math.prod(batch)
    signals = xp.reshape(xp.broadcast_to(b, (*batch, m)), (rows, m))
    strengths = xp.reshape(xp.broadcast_to(strength + _arrays.full(b.shape[:-1], 0.0, b), batch), (rows,))
    if A.ndim > 2:
        A = xp.reshape(xp.broadcast_to(A, (*batch, m, n)), (rows, m, n))
    sources = [v for v in (A, signals, strengths) if not _arrays.is_numpy_array(v)]
    A_, signals_, strengths_ = (_arrays.detach(v) for v in (A, signals, strengths))
    if rows and m and n:
        solve = _jitted() if is_jax_array(b) else _solve
        z, fun, gap, count = solve(A_, signals_, strengths_, tol, int(max_iter), tuple(methods))
    else:
        z = xp.zeros_like(xp.broadcast_to(signals_[:, :1] * 0, (rows, n))) if m else xp.zeros((rows, n), dtype=b.dtype)
        fun = objective(z, A_, signals_, strengths_)
        gap, count = fun * 0, xp.astype(fun * 0, xp.int32)
    if watched(sources):
        fun = optimal_value(objective, z, sources)
    shaped = lambda v: xp.reshape(v, (*batch, *v.shape[1:]))

    def codes(z: Array) -> Any:
        x = shaped(z)
        return x if widths is None else [x[i, ..., :w] for i, w in enumerate(widths)]

    return report(z, sources, codes, shaped(fun), "gap", shaped(gap), shaped(gap <= tol), shaped(count), depth=3)


def _check_values(A: Array, b: Array, strength: Any) -> None:
    """Refuse values out of their domains, as far as they are known."""
    check_finite("A", A)
    check_finite("b", b)
    _checks.in_range("strength", strength, open_low=True)
    if hasattr(strength, "ndim") and not isinstance(strength, (np.ndarray, np.number)) and not is_traced(strength):
        _checks.in_range("strength", to_numpy(strength), open_low=True)


def objective(z: Array, A: Array, b: Array, strength: Array) -> Array:
    """1/2 ||A z - b||^2 + strength ||z||_1 of problems in rows."""
    xp = _arrays.namespace(z)
    residual = b - Dictionary(A).times(z)
    return 0.5 * xp.sum(residual * residual, axis=1) + strength * xp.sum(xp.abs(z), axis=1)


def _solve(
    A: Array, b: Array, strength: Array, tol: float, max_iter: int, methods: tuple[str, ...]
) -> tuple[Array, Array, Array, Array]:
    """(z, objective, relative gap, count) of problems in rows; later methods take what earlier ones leave open."""
    xp = _arrays.namespace(b)
    largest = xp.max(xp.abs(b), axis=1)
    unit = xp.where((largest > 1 / USUAL) & (largest < USUAL), 1.0, largest)  # else squares might leave the range of the dtype
    unit = xp.where(unit > 0, unit, 1.0)
    b, strength = b / unit[:, None], strength / unit
    first, *others = methods
    z, count = _by(first, A, b, strength, tol, max_iter)
    gap, _ = relative_gap(Dictionary(A), b, strength, z)
    for method in others:
        z, gap, count = _finish(method, A, b, strength, z, gap, count, tol, max_iter)
    gap = xp.where(strength > 0, gap, math.nan)
    return z * unit[:, None], objective(z, A, b, strength) * unit * unit, gap, count


def _by(method: str, A: Array, b: Array, strength: Array, tol: float, max_iter: int) -> tuple[Array, Array]:
    if method == "active_set":
        return active_set.solve(A, b, strength, tol, max_iter)
    own = _arrays.namespace(A).broadcast_to(A, (b.shape[0], *A.shape[-2:]))
    return homotopy.solve(own, b, strength, max_iter)


def _finish(
    method: str, A: Array, b: Array, strength: Array, z: Array, gap: Array, count: Array, tol: float, max_iter: int
) -> tuple[Array, Array, Array]:
    """(z, relative gap, count), by another method where the gap is above the tolerance and that one does better."""
    xp = _arrays.namespace(b)

    def again(A: Array, b: Array, strength: Array, z: Array, gap: Array, count: Array) -> tuple[Array, Array, Array]:
        new, counted = _by(method, A, b, strength, tol, max_iter)
        reached, _ = relative_gap(Dictionary(A), b, strength, new)
        better = (reached < gap) | (gap != gap)
        counted = xp.where(better, xp.astype(counted, count.dtype), count)
        return xp.where(better[:, None], new, z), xp.where(better, reached, gap), counted

    rest = ~(gap <= tol)
    if is_jax_array(b):
        import jax

        return jax.lax.cond(xp.any(rest), lambda: again(A, b, strength, z, gap, count), lambda: (z, gap, count))
    if bool(xp.any(rest)):
        rows = xp.nonzero(rest)[0]
        own = A if A.ndim == 2 else A[rows, ...]
        z[rows, :], gap[rows], count[rows] = again(own, b[rows, :], strength[rows], z[rows, :], gap[rows], count[rows])
    return z, gap, count


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
