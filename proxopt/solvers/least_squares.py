"""The least-squares term 1/2 ||A x - b||^2 of sparse coding, and the duality gap that certifies a solution."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import is_jax_array

from proxopt import _arrays
from proxopt._arrays import Array
from proxopt.penalties import Penalty
from proxopt.penalties.declared import has_dual
from proxopt.solvers.derivatives import is_traced


class Dictionary:
    """Products with A and its transpose, for one A (m, n) shared by all problems or one A for each (B, m, n)."""

    def __init__(self, A: Array):
        self.xp = _arrays.namespace(A)
        self.A, self.shared = A, A.ndim == 2

    def times(self, x: Array) -> Array:
        """A x: (..., n) -> (..., m)."""
        return x @ self.A.T if self.shared else self.xp.matmul(self.A, x[..., None])[..., 0]

    def correlate(self, r: Array) -> Array:
        """A^T r: (..., m) -> (..., n)."""
        return r @ self.A if self.shared else self.xp.matmul(r[..., None, :], self.A)[..., 0, :]

    def columns(self, numbers: Array) -> Array:
        """The columns with the given numbers (B, K) of each problem, as rows (B, K, m)."""
        xp = self.xp
        rows = xp.matrix_transpose(self.A)
        if self.shared:
            return xp.reshape(xp.take(rows, xp.reshape(numbers, (-1,)), axis=0), (*numbers.shape, self.A.shape[0]))
        wide = xp.broadcast_to(numbers[:, :, None], (*numbers.shape, self.A.shape[1]))
        return xp.take_along_axis(rows, wide, axis=1)

    def largest_curvature(self) -> Array:
        """The largest eigenvalue of A^T A."""
        xp, A = self.xp, self.A
        if not _arrays.size(A):
            return _arrays.full(tuple(A.shape[:-2]), 0.0, A)
        largest = xp.max(xp.abs(A), axis=(-2, -1), keepdims=True)
        scale = xp.where(largest > 0, largest, 1.0)  # eigenvalue solvers raise errors if the Gram matrix overflows
        A = A / scale
        A_T = xp.matrix_transpose(A)
        gram = xp.matmul(A, A_T) if A.shape[-2] <= A.shape[-1] else xp.matmul(A_T, A)
        return xp.linalg.eigvalsh(gram)[..., -1] * scale[..., 0, 0] ** 2


def gap(
    xp: Any, residual: Array, value: Array, scale: Array, conjugate: Any, inner: Array, direction: Array | None = None
) -> Array:
    r"""The duality gap objective(x) - dual(s d) at a dual point s d, in a form without cancellation.

    .. math::

        \tfrac{1}{2} \|b - A x - s d\|^2 + g(x) + g^*(s c) - s \langle x, c \rangle, \qquad c = A^\top d

    for the penalty g. Rounding may make it negative, which is returned as 0. It is NaN if any of the arguments is.

    Args:
      xp: the namespace of the arrays.
      residual: b - A x, (..., m).
      value: g(x), one number for each problem.
      scale: s, one number for each problem.
      conjugate: g*(s c), one number for each problem.
      inner: <x, c>, one number for each problem.
      direction: d, (..., m); None for the residual.
    """
    if direction is None:
        square = (1 - scale) ** 2 * xp.sum(residual * residual, axis=-1)
    else:
        square = xp.sum((residual - scale[..., None] * direction) ** 2, axis=-1)
    found = 0.5 * square + value + conjugate - scale * inner
    found = xp.where(found < 0, 0.0, found)
    return xp.where(value < 0, math.nan, found)  # a negative strength is not a penalty


class Unpenalised(NamedTuple):
    """The entries of x that the penalty does not depend on, and the span of the columns that belong to them.

    Attributes:
      mask: marks the unpenalised entries of x; None if there are none.
      bases: pairs of the numbers of problems (None: all problems) and an orthonormal basis (..., m, k) of the span of their
        unpenalised columns, padded with zeros.
    """

    mask: Array | None = None
    bases: tuple[tuple[Any, Array], ...] = ()

    def project_out(self, residual: Array) -> Array:
        """The part of residuals (..., m) that is orthogonal to the unpenalised columns."""
        if not self.bases:
            return residual
        xp = _arrays.namespace(residual)
        rows = xp.reshape(residual, (-1, residual.shape[-1]))
        for numbers, basis in self.bases:
            if numbers is None:
                rows = _project_out(xp, rows, basis)
            else:
                rows = _put(xp, rows, numbers, _project_out(xp, rows[numbers, :], basis))
        return xp.reshape(rows, residual.shape)

    def clear(self, c: Array) -> Array:
        """Set the correlations with the unpenalised columns, which are rounding errors after ``project_out``, to 0."""
        if self.mask is None:
            return c
        xp = _arrays.namespace(c)
        mask = _arrays.index(self.mask, c) if isinstance(self.mask, np.ndarray) else self.mask
        return xp.where(mask, 0.0, c)


class LeastSquares:
    r"""The least-squares term of sparse coding, a smooth function for ``ista`` and ``fista``.

    .. math:: f(x) = \tfrac{1}{2} \|A x - b\|^2, \qquad \nabla f(x) = A^\top (A x - b)

    A call ``f(x)`` returns the value and the gradient.

    Args:
      A: dictionary (m, n), or (..., m, n) with one for each problem. Half precision is computed in single precision.
      b: signal (m,), or (..., m) for a batch of problems.

    Raises:
      TypeError: A or b is not a real floating-point array, or their dtypes differ.
      ValueError: their shapes do not fit, or an entry is not finite. Values that JAX traces cannot be checked: solvers report
        failure for them.

    >>> import numpy as np
    >>> f = LeastSquares(np.eye(2), np.array([1.0, 2.0]))
    >>> value, gradient = f(np.zeros(2))
    >>> float(value), gradient
    (2.5, array([-1., -2.]))
    """

    def __init__(self, A: Array, b: Array):
        self.xp = check_pair(A, b)
        check_finite("A", A)
        check_finite("b", b)
        self.A, self.b = _arrays.widen(A), _arrays.widen(b)
        self.dictionary = Dictionary(self.A)

    def __call__(self, x: Array) -> tuple[Array, Array]:
        """(f(x), gradient), with one value for each problem."""
        residual = self.dictionary.times(x) - self.b
        return 0.5 * self.xp.sum(residual * residual, axis=-1), self.dictionary.correlate(residual)

    def lipschitz(self) -> Array:
        """The Lipschitz constant of the gradient, which is the largest eigenvalue of A^T A, for each dictionary."""
        return self.dictionary.largest_curvature()

    def constant(self) -> LeastSquares:
        """The same function, as a constant for automatic differentiation."""
        other = object.__new__(LeastSquares)
        other.xp, other.A, other.b = self.xp, _arrays.detach(self.A), _arrays.detach(self.b)
        other.dictionary = Dictionary(other.A)
        return other

    def check_start(self, x0: Array) -> None:
        """Raise an error if the shape or the dtype of the starting point x0 does not fit."""
        batch = np.broadcast_shapes(tuple(self.A.shape[:-2]), tuple(self.b.shape[:-1]))
        expected, shape = (*batch, self.A.shape[-1]), tuple(x0.shape)
        if len(shape) < len(expected) or shape[-1] != expected[-1] or not _extends(shape[:-1], batch):
            raise ValueError(f"x0 must have shape {expected} for A of shape {tuple(self.A.shape)} and b of shape"
                             f" {tuple(self.b.shape)}, got {shape}")  # fmt: skip
        if x0.dtype != self.A.dtype and not _arrays.is_numpy_array(x0):  # NumPy promotes
            raise TypeError(f"x0 must have the dtype of A, {self.A.dtype}, got {x0.dtype}")

    def unpenalised(self, penalty: Penalty, x: Array) -> Unpenalised:
        """The entries of an x of this shape that the penalty does not depend on, for ``gap``."""
        mask = penalty.unpenalised(x) if has_dual(penalty, x.ndim - 1) else None
        return Unpenalised() if mask is None else Unpenalised(mask, tuple(_bases(self.A, mask)))

    def gap(self, x: Array, penalty: Penalty, value: Array, part: Unpenalised | None = None) -> Array | None:
        r"""An upper bound on f(x) + penalty(x) - min (f + penalty) for each problem, from a dual point.

        The dual point is the residual b - A x, minus its projection on the columns that the penalty does not depend on, scaled
        into the dual ball of the penalty. It is feasible up to rounding: with unpenalised columns :math:`A_U`, solution
        :math:`x^*` and machine precision :math:`\epsilon`, the bound may be too small by about

        .. math:: \epsilon \max(m, n) \, \|A_U\| \, \|b - A x\| \, \|x_U - x^*_U\|.

        Args:
          x: the point, (..., n).
          penalty: a penalty of proxopt.
          value: penalty(x), one number for each problem.
          part: the result of ``unpenalised(penalty, x)``, if it is known.

        Returns:
          One number for each problem; None if the penalty has no dual.
        """
        if not has_dual(penalty, x.ndim - 1):
            return None
        part = self.unpenalised(penalty, x) if part is None else part
        residual = self.b - self.dictionary.times(x)
        direction = part.project_out(residual)
        c = part.clear(self.dictionary.correlate(direction))
        scale, conjugate = penalty.dual(c, x.ndim - 1)
        inner = self.xp.sum(x * c, axis=-1)
        return gap(self.xp, residual, value, scale, conjugate, inner, None if part.mask is None else direction)


def _extends(shape: tuple[int, ...], batch: tuple[int, ...]) -> bool:
    """Whether arrays of the shape ``batch`` broadcast to ``shape``."""
    try:
        return np.broadcast_shapes(shape, batch) == shape
    except ValueError:
        return False


def _bases(A: Array, mask: Array) -> Iterator[tuple[Any, Array]]:
    """The bases of ``Unpenalised``, for A (..., m, n) and mask (..., n)."""
    xp = _arrays.namespace(A)
    m, n = A.shape[-2:]
    rows = math.prod(mask.shape[:-1])
    own = None if A.ndim == 2 else xp.reshape(xp.broadcast_to(A, (*mask.shape[:-1], m, n)), (rows, m, n))
    if not isinstance(mask, np.ndarray):  # shapes cannot depend on a traced mask: penalised columns are set to zero instead
        flat = xp.astype(xp.reshape(mask, (rows, n)), A.dtype)[:, None, :]
        yield None, _traced_basis(xp, (A if own is None else own) * flat)
        return
    patterns, which = np.unique(mask.reshape(rows, n), axis=0, return_inverse=True)
    for number, pattern in enumerate(patterns):
        if pattern.any():
            numbers = None if len(patterns) == 1 else np.flatnonzero(which.reshape(-1) == number)
            chosen = A if own is None else own if numbers is None else own[_arrays.index(numbers, A), ...]
            yield (
                (None if numbers is None else _arrays.index(numbers, A)),
                _basis(xp, xp.take(chosen, _arrays.index(np.flatnonzero(pattern), A), axis=-1)),
            )


def _basis(xp: Any, columns: Array) -> Array:
    """An orthonormal basis (..., m, k) of the span of the columns (..., m, k), padded with zeros if they are linearly dependent.

    The columns are scaled to length 1. Singular values of the result below eps max(m, k) count as 0.
    """
    m, k = columns.shape[-2:]
    largest = xp.max(xp.abs(columns), axis=-2, keepdims=True)
    columns = columns / xp.where(largest > 0, largest, 1.0)
    length = xp.sqrt(xp.sum(columns * columns, axis=-2, keepdims=True))
    columns = columns / xp.where(length > 0, length, 1.0)
    basis, sizes, _ = xp.linalg.svd(columns, full_matrices=False)
    kept = sizes > float(xp.finfo(columns.dtype).eps) * max(m, k)
    return basis * xp.astype(kept, columns.dtype)[..., None, :]


def _traced_basis(xp: Any, columns: Array) -> Array:
    """``_basis``, without the decomposition at run time if all columns are 0."""
    import jax

    *batch, m, n = columns.shape
    nothing = xp.zeros((*batch, m, min(m, n)), dtype=columns.dtype)
    return jax.lax.cond(xp.any(columns != 0), lambda: _basis(xp, columns), lambda: nothing)


def _project_out(xp: Any, rows: Array, basis: Array) -> Array:
    """Rows (B, m) minus their projections on an orthonormal basis (m, k) or (B, m, k)."""
    for _ in range(2):  # the second pass removes the rounding errors of the first
        if basis.ndim == 2:
            rows = rows - (rows @ basis) @ basis.T
        else:
            inside = xp.matmul(rows[:, None, :], basis)
            rows = rows - xp.matmul(inside, xp.matrix_transpose(basis))[:, 0, :]
    return rows


def _put(xp: Any, rows: Array, numbers: Array, values: Array) -> Array:
    """A copy of ``rows`` in which those with the given numbers are replaced."""
    if is_jax_array(rows):
        return rows.at[numbers, :].set(values)
    out = xp.asarray(rows, copy=True)
    out[numbers, :] = values
    return out


def check_finite(name: str, x: Array) -> None:
    """Raise an error if an entry of x is not finite; arrays that JAX traces cannot be checked."""
    if _arrays.is_torch_array(x):
        finite = x.detach().isfinite()
        if not bool(finite.all()):
            raise ValueError(f"{name} must be finite, got {float(x.detach()[~finite][0])}")
    elif not is_traced(x) and getattr(x, "is_fully_addressable", True):
        values = np.asarray(x)
        finite = np.isfinite(values)
        if not finite.all():
            raise ValueError(f"{name} must be finite, got {values[~finite][0]}")


def check_pair(A: Any, b: Any) -> Any:
    """Check the types and shapes of a dictionary and its signals, and return their namespace."""
    for name, x, least in (("A", A, 2), ("b", b, 1)):
        _arrays.as_list(x, name)
        if isinstance(x, (list, tuple)) or _arrays.is_complex(x):
            raise TypeError(f"{name} must be a real array, got {getattr(x, 'dtype', type(x).__name__)}")
        if x.ndim < least:
            raise ValueError(f"{name} must have at least {least} axes, got shape {tuple(x.shape)}")
    if A.dtype != b.dtype:
        raise TypeError(f"A and b must have one dtype, got {A.dtype} and {b.dtype}")
    if A.shape[-2] != b.shape[-1]:
        raise ValueError(f"A (..., m, n) and b (..., m) must agree in m, got shapes {tuple(A.shape)} and {tuple(b.shape)}")
    return _arrays.namespace(A, b)
