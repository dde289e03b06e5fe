"""The smooth part of sparse coding, 1/2 ||A x - b||^2, and the duality gap that certifies a solution."""

from __future__ import annotations

from typing import Any

from proxopt import _arrays
from proxopt._arrays import Array
from proxopt.penalties import Penalty
from proxopt.penalties.dual import dual_scale


class Dictionary:
    """Products with A and its transpose, for one A (m, n) of all problems or for one of each (B, m, n)."""

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
        """(B, K, m): of each problem the columns with its numbers (B, K)."""
        xp = self.xp
        rows = xp.matrix_transpose(self.A)
        if self.shared:
            return xp.reshape(xp.take(rows, xp.reshape(numbers, (-1,)), axis=0), (*numbers.shape, self.A.shape[0]))
        wide = xp.broadcast_to(numbers[:, :, None], (*numbers.shape, self.A.shape[1]))
        return xp.take_along_axis(rows, wide, axis=1)

    def largest_curvature(self) -> Array:
        """The largest eigenvalue of A^T A."""
        xp, A = self.xp, self.A
        A_T = xp.matrix_transpose(A)
        gram = xp.matmul(A, A_T) if A.shape[-2] <= A.shape[-1] else xp.matmul(A_T, A)
        return xp.linalg.eigvalsh(gram)[..., -1]


def gap(xp: Any, residual: Array, value: Array, scale: Array, conjugate: Any, inner: Array) -> Array:
    """objective(x) - dual(s (b - A x)), in a form without cancellation: with c = A^T (b - A x) and the penalty g,

        (1 - s)^2/2 ||b - A x||^2 + g(x) + g*(s c) - s <x, c>

    residual (..., m); value g(x), scale s, conjugate g*(s c) and inner <x, c> one for each problem.
    """
    found = 0.5 * (1 - scale) ** 2 * xp.sum(residual * residual, axis=-1) + value + conjugate - scale * inner
    return xp.where(found > 0, found, 0.0)


class LeastSquares:
    """f(x) = 1/2 ||A x - b||^2, called for (f(x), A^T (A x - b)).

    Args:
      A: (m, n), or (..., m, n) with a dictionary for each problem.
      b: (m,), or (..., m) for a batch of problems.

    Raises:
      TypeError, ValueError: A or b is no real floating-point array, or their shapes do not fit.

    >>> import numpy as np
    >>> f = LeastSquares(np.eye(2), np.array([1.0, 2.0]))
    >>> value, gradient = f(np.zeros(2))
    >>> float(value), gradient
    (2.5, array([-1., -2.]))
    """

    def __init__(self, A: Array, b: Array):
        self.xp = check_pair(A, b)
        self.A, self.b = A, b
        self.dictionary = Dictionary(A)

    def __call__(self, x: Array) -> tuple[Array, Array]:
        residual = self.dictionary.times(x) - self.b
        return 0.5 * self.xp.sum(residual * residual, axis=-1), self.dictionary.correlate(residual)

    def lipschitz(self) -> Array:
        """The smallest Lipschitz constant of the gradient: the largest eigenvalue of A^T A, one for each dictionary."""
        return self.dictionary.largest_curvature()

    def gap(self, x: Array, penalty: Penalty, value: Array) -> Array | None:
        """A bound on f(x) + penalty(x) - min (f + penalty) for each problem, from a dual point; None where the penalty has none.

        value: penalty(x), one for each problem.
        """
        residual = self.b - self.dictionary.times(x)
        c = self.dictionary.correlate(residual)
        found = dual_scale(penalty, c, problems=x.ndim - 1)
        if found is None:
            return None
        return gap(self.xp, residual, value, *found, self.xp.sum(x * c, axis=-1))


def check_pair(A: Any, b: Any) -> Any:
    """The namespace of a dictionary and signals that fit each other."""
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
