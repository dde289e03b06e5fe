"""Batches of lasso problems: the sparse codes of many signals at once."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from array_api_compat import is_jax_array

from proxopt import _arrays, _checks
from proxopt._arrays import Array
from proxopt.penalties.dual import to_numpy
from proxopt.solvers import active_set, homotopy
from proxopt.solvers.active_set import relative_gap
from proxopt.solvers.derivatives import is_differentiated, is_traced, optimal_value
from proxopt.solvers.gradient import check_budget, default_tolerance
from proxopt.solvers.least_squares import Dictionary, check_finite, check_pair
from proxopt.solvers.result import OptimizeResult, report

METHODS = ("auto", "active_set", "homotopy")
UNSCALED = 1e9  # signals are scaled unless their largest entry lies between the inverse of this and this
SMALL = 16  # up to this number of active columns a path costs less than gradient steps, and always ends


def sparse_code(
    A: Array | Sequence[Array],
    b: Array,
    strength: float | Array,
    *,
    tol: float | None = None,
    max_iter: int = 1000,
    method: str = "auto",
) -> OptimizeResult:
    r"""Solve lasso problems, for many signals and dictionaries at once.

    .. math:: \min_z \; \tfrac{1}{2} \|A z - b\|^2 + \lambda \|z\|_1

    with :math:`\lambda` = ``strength``.

    Args:
      A: a dictionary (m, n), or (..., m, n) with one for each problem, or a list of K dictionaries (m, n_k) of different
        widths. NumPy, torch or JAX, real floating point.
      b: the signals, (m,) or (..., m), in the dtype of A; the leading axes of A and b broadcast. For a list of K dictionaries
        (K, m).
      strength: a number > 0, or an array with one for each problem.
      tol: the tolerance of the duality gap, relative to the objective. None means 1e-6 in double precision, 1e-4 in single
        precision.
      max_iter: the budget of each method for a problem: gradient steps, or kinks of its path. If it is exhausted first, a warning
        reports the gap that was reached.
      method: "homotopy" follows the solution path, exactly and in finitely many steps, also if columns are nearly parallel;
        "active_set" finds the support by accelerated gradient steps and completes the solution by linear solves, which is fast
        for many signals in a large dictionary; "auto" uses the former if min(m, n) <= 16 and otherwise the latter, then the
        other one for the problems left unsolved.

    Returns:
      A SciPy ``OptimizeResult`` with ``x``, the codes (..., n) with exact zeros, or a list of them for a list of dictionaries;
      ``fun``; ``gap``, relative like ``tol``; ``nit``, of the method that found the code; ``success``; ``status`` (0 success, 1
      the budget was exhausted, 2 no gap, as numbers left the range of the dtype); and ``message``. All but the message have one
      entry for each problem. Under ``jax.jit`` there are no warnings: check ``success``.

    Raises:
      TypeError: an array is not real floating point, or the dtypes of A and b differ.
      ValueError: shapes do not fit, an entry is not finite, or a number is out of its domain. Values that JAX traces cannot be
        checked: ``success`` is False for problems that are not finite.

    **Derivatives.** ``fun`` can be differentiated once with respect to A, b and strength, in torch and JAX, in reverse and
    forward mode. At a code z the derivatives are :math:`-(b - A z) z^\top`, :math:`b - A z` and :math:`\|z\|_1`.
    Differentiating through x raises NotImplementedError: solve for constant inputs to use the codes as constants.

    Sources: those of the two methods, ``proxopt.solvers.active_set`` and ``proxopt.solvers.homotopy``; the problem is ISTA-NAS,
    Eq. 5.

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
    tol = default_tolerance(b) if tol is None else tol
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
    if is_differentiated(sources):
        fun = optimal_value(objective, z, sources)

    def unflatten(v: Array) -> Array:
        return xp.reshape(v, (*batch, *v.shape[1:]))

    def codes(z: Array) -> Any:
        x = unflatten(z)
        return x if widths is None else [x[i, ..., :w] for i, w in enumerate(widths)]

    ok = unflatten(gap <= tol)
    return report(z, sources, codes, unflatten(fun), "gap", unflatten(gap), ok, unflatten(count), depth=3)


def _check_values(A: Array, b: Array, strength: Any) -> None:
    """Raise an error for values out of their domains; those that JAX traces cannot be checked."""
    check_finite("A", A)
    check_finite("b", b)
    _checks.in_range("strength", strength, open_low=True)
    if hasattr(strength, "ndim") and not isinstance(strength, (np.ndarray, np.number)) and not is_traced(strength):
        _checks.in_range("strength", to_numpy(strength), open_low=True)


def objective(z: Array, A: Array, b: Array, strength: Array) -> Array:
    """1/2 ||A z - b||^2 + strength ||z||_1 for each row."""
    xp = _arrays.namespace(z)
    residual = b - Dictionary(A).times(z)
    return 0.5 * xp.sum(residual * residual, axis=1) + strength * xp.sum(xp.abs(z), axis=1)


def _solve(
    A: Array, b: Array, strength: Array, tol: float, max_iter: int, methods: tuple[str, ...]
) -> tuple[Array, Array, Array, Array]:
    """(z, objective, relative gap, count) for each row; later methods solve the problems that the previous ones did not."""
    xp = _arrays.namespace(b)
    largest = xp.max(xp.abs(b), axis=1)
    # squares of the others might leave the range of the dtype
    unit = xp.where((largest > 1 / UNSCALED) & (largest < UNSCALED), 1.0, largest)
    unit = xp.where(unit > 0, unit, 1.0)
    b, strength = b / unit[:, None], strength / unit
    first, *others = methods
    z, count = _apply(first, A, b, strength, tol, max_iter)
    gap, _ = relative_gap(Dictionary(A), b, strength, z)
    for method in others:
        z, gap, count = _improve(method, A, b, strength, z, gap, count, tol, max_iter)
    gap = xp.where(strength > 0, gap, math.nan)
    return z * unit[:, None], objective(z, A, b, strength) * unit * unit, gap, count


def _apply(method: str, A: Array, b: Array, strength: Array, tol: float, max_iter: int) -> tuple[Array, Array]:
    """(z, count) by one method."""
    if method == "active_set":
        return active_set.solve(A, b, strength, tol, max_iter)
    own = _arrays.namespace(A).broadcast_to(A, (b.shape[0], *A.shape[-2:]))
    return homotopy.solve(own, b, strength, max_iter)


def _improve(
    method: str, A: Array, b: Array, strength: Array, z: Array, gap: Array, count: Array, tol: float, max_iter: int
) -> tuple[Array, Array, Array]:
    """(z, relative gap, count): apply another method where the gap is above the tolerance, and keep the better result."""
    xp = _arrays.namespace(b)

    def again(A: Array, b: Array, strength: Array, z: Array, gap: Array, count: Array) -> tuple[Array, Array, Array]:
        new, counted = _apply(method, A, b, strength, tol, max_iter)
        reached, _ = relative_gap(Dictionary(A), b, strength, new)
        better = (reached < gap) | (gap != gap)
        counted = xp.where(better, xp.astype(counted, count.dtype), count)
        return xp.where(better[:, None], new, z), xp.where(better, reached, gap), counted

    unsolved = ~(gap <= tol)  # also where the gap is NaN
    if is_jax_array(b):
        import jax

        z, gap, count = jax.lax.cond(xp.any(unsolved), lambda: again(A, b, strength, z, gap, count), lambda: (z, gap, count))
    elif bool(xp.any(unsolved)):
        rows = xp.nonzero(unsolved)[0]
        own = A if A.ndim == 2 else A[rows, ...]
        z[rows, :], gap[rows], count[rows] = again(own, b[rows, :], strength[rows], z[rows, :], gap[rows], count[rows])
    return z, gap, count


@functools.cache
def _jitted() -> Any:
    """``_solve`` compiled once for each shape: tracing its loops at every call would cost more than running them."""
    import jax

    return jax.jit(_solve, static_argnums=(4, 5))


def _padded(dictionaries: Sequence[Array]) -> tuple[Array, list[int]]:
    """The dictionaries as one array (K, m, n), padded on the right with zero columns, which no code uses; and their widths."""
    arrays, xp = _arrays.as_list(list(dictionaries), "A")
    for i, a in enumerate(arrays):
        if a.ndim != 2 or a.shape[0] != arrays[0].shape[0] or a.dtype != arrays[0].dtype:
            raise ValueError(
                f"A must hold matrices with one number of rows and one dtype, got {tuple(arrays[0].shape)} of {arrays[0].dtype}"
                f" and, as A[{i}], {tuple(a.shape)} of {a.dtype}"
            )
    widths = [a.shape[1] for a in arrays]
    widest = max(widths)
    padding = [_arrays.full((a.shape[0], widest - a.shape[1]), 0.0, a) for a in arrays]
    return xp.stack([xp.concat([a, zeros], axis=1) for a, zeros in zip(arrays, padding)]), widths
