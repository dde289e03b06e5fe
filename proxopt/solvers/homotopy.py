r"""The lasso by its solution path: exact in finitely many steps, also if columns are nearly parallel.

.. math:: \min_z \; \tfrac{1}{2} \|A z - b\|^2 + \lambda \|z\|_1

The minimiser is a piecewise linear function of the strength :math:`\lambda`. The path is followed from the strength at which z
= 0 downwards; at each of its kinks one column joins or leaves the active set. All problems of a batch are advanced together,
each from one of its kinks to the next.

If several columns reach the strength at once, the kinks are not well defined. Therefore the path is followed for columns whose
lengths are perturbed by a relative 1e-9, and the result is then solved for with the original columns. A column in the span of
the active ones is skipped until one of these leaves.

Sources: Osborne, Presnell, Turlach, "A new approach to variable selection in least squares problems", 2000; Efron, Hastie,
Johnstone, Tibshirani, "Least angle regression", 2004.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from proxopt import _arrays
from proxopt._arrays import Array
from proxopt._loops import repeat_each

PERTURBATION = 1e-9  # of the lengths of the columns, relative, in double precision


class Path(NamedTuple):
    """The positions of B problems on their paths.

    A column and its negative are two candidates. At most K = min(m, n) candidates are active; they are stored in slots, and
    what is stored for an empty slot is 0.

    Attributes:
      candidates: (B, 2n, m), the rows of [A, -A]^T.
      target: (B,), the strength at which the path ends.
      strength: (B,), the strength that was reached.
      correlations: (B, 2n), of the candidates with the residual.
      taken: (B, 2n), whether a candidate or its negative is active.
      spanned: (B, 2n), whether a candidate was found to lie in the span of the active ones.
      left: (B,), the number of the candidate that left last, or -1.
      columns: (B, K, m), the active candidates.
      values: (B, K), the absolute values of their entries of z.
      inverse: (B, K, K), the inverse of their Gram matrix.
      slot: (B, K), their numbers; -1 for an empty slot.
      kinks: (B,), the number of kinks passed.
    """

    candidates: Array
    target: Array
    strength: Array
    correlations: Array
    taken: Array
    spanned: Array
    left: Array
    columns: Array
    values: Array
    inverse: Array
    slot: Array
    kinks: Array


def solve(A: Array, b: Array, strength: Array, max_kinks: int) -> tuple[Array, Array]:
    """Solve a batch of problems.

    Args:
      A: (B, m, n).
      b: (B, m), in the dtype of A.
      strength: (B,), > 0, in the dtype of A.
      max_kinks: the largest number of kinks of a path.

    Returns:
      The codes z (B, n) and the number of kinks (B,).
    """
    xp = _arrays.namespace(A, b)
    path = _start(xp, A, b, strength)
    path = repeat_each(lambda p: p.strength > p.target, lambda p: _next_kink(xp, p), path, max_kinks)
    return _entries(xp, A, b, path), path.kinks


def _start(xp: Any, A: Array, b: Array, target: Array) -> Path:
    """The path at z = 0, and then with its first column."""
    batch, m, n = A.shape
    k = min(m, n)

    def zeros(*shape: int) -> Array:
        return _arrays.full(shape, 0.0, b)

    number = _arange(xp, n, xp.argmax(A, axis=2))
    # multiples of the golden ratio modulo 1: any two columns are perturbed differently
    fraction = xp.astype(number, A.dtype) * ((math.sqrt(5) - 1) / 2)
    fraction = fraction - xp.floor(fraction)
    rows = xp.matrix_transpose(A * (1 + max(PERTURBATION, 16 * float(xp.finfo(A.dtype).eps)) * fraction))
    candidates = xp.concat([rows, -rows], axis=1)
    correlations = _product(xp, candidates, b)
    none = xp.argmin(zeros(batch, k, 1), axis=2) - 1  # -1, in the integer type and on the device of the library
    top = xp.max(correlations, axis=1)
    path = Path(
        candidates=candidates,
        target=target,
        strength=xp.where(top > target, top, target),
        correlations=correlations,
        taken=correlations != correlations,
        spanned=correlations != correlations,
        left=none[:, 0],
        columns=zeros(batch, k, m),
        values=zeros(batch, k),
        inverse=zeros(batch, k, k),
        slot=none,
        kinks=none[:, 0] + 1,
    )
    starts = top > target
    return _change(xp, path, xp.argmax(correlations, axis=1), none[:, 0] + 1, starts, starts)


def _next_kink(xp: Any, path: Path) -> Path:
    """Follow each path to the next strength at which a column joins or leaves, or to the target."""
    eps = float(xp.finfo(path.values.dtype).eps)
    direction = xp.sum(path.inverse, axis=2)  # of the values, per unit of strength
    change = xp.matmul(direction[:, None, :], path.columns)[:, 0, :]  # of A z
    slope = _product(xp, path.candidates, change)  # of the correlations
    remaining = path.strength - path.target

    room = 1 - slope
    full = xp.all(path.slot >= 0, axis=1)[:, None]
    not_just_left = _arange(xp, room.shape[1], path.slot)[None, :] != path.left[:, None]
    may_join = (room > 8 * eps) & ~path.taken & ~path.spanned & not_just_left & ~full
    gaps = (path.strength[:, None] - path.correlations) / xp.where(may_join, room, 1.0)
    gaps = xp.where(may_join, gaps, math.inf)
    to_join = xp.min(gaps, axis=1)

    decreases = (path.slot >= 0) & (direction < 0)
    to_zero = xp.where(decreases, path.values / xp.where(decreases, -direction, 1.0), math.inf)
    to_leave = xp.min(to_zero, axis=1)

    joins = to_join <= to_leave
    nearest = xp.where(joins, to_join, to_leave)
    changes = nearest < remaining
    distance = xp.where(changes, nearest, remaining)
    distance = xp.where(distance < 0, 0.0, distance)[:, None]  # by rounding, a kink may lie at a larger strength; NaN stays NaN
    path = path._replace(
        strength=xp.where(changes, path.strength - distance[:, 0], path.target),
        correlations=path.correlations - distance * slope,
        values=path.values + distance * direction,
        kinks=path.kinks + xp.astype(changes, path.kinks.dtype),
    )
    place = xp.where(joins, xp.argmin(path.slot, axis=1), xp.argmin(to_zero, axis=1))  # an empty slot holds -1
    return _change(xp, path, xp.argmin(gaps, axis=1), place, changes, joins)


def _change(xp: Any, path: Path, number: Array, place: Array, changes: Array, joins: Array) -> Path:
    """Update the active set: candidate ``number`` joins in slot ``place``, or the one in that slot leaves.

    Args:
      xp: the namespace.
      path: the paths, at a kink.
      number: (B,), the candidate that joins.
      place: (B,), the slot in which it joins, or from which the candidate leaves.
      changes: (B,), whether the active set of the problem changes.
      joins: (B,), whether a candidate joins; otherwise one leaves.
    """
    dtype = path.values.dtype
    rows = _arange(xp, number.shape[0], number)
    # joining: the inverse Gram matrix gains an outer product of p, from the part of the column orthogonal to the others
    column = path.candidates[rows, number, :]
    weights = _product(xp, path.inverse, _product(xp, path.columns, column))
    distance = column - xp.matmul(weights[:, None, :], path.columns)[:, 0, :]
    pivot = xp.sum(distance * distance, axis=1)
    inside = joins & (pivot <= (1e4 * float(xp.finfo(dtype).eps)) ** 2 * xp.sum(column * column, axis=1))
    skips, changes = changes & inside, changes & ~inside

    chosen = (_arange(xp, path.slot.shape[1], place)[None, :] == place[:, None]) & changes[:, None]
    one = xp.astype(chosen, dtype)
    others = 1 - one
    columns = path.columns * others[:, :, None]
    # leaving: the inverse Gram matrix loses an outer product of p
    row = xp.matmul(one[:, None, :], path.inverse)[:, 0, :]
    joins_ = joins[:, None]
    p = xp.where(joins_, one - weights, row)
    pivot = xp.where(joins, pivot, xp.sum(row * one, axis=1))
    tiny = float(xp.finfo(dtype).smallest_normal)
    scale = (2 * xp.astype(joins, dtype) - 1) / xp.where(pivot > tiny, pivot, tiny)
    scale = xp.where(changes, scale, 0.0)
    kept = xp.where(joins_, 1.0, others)
    inverse = (path.inverse + (scale[:, None] * p)[:, :, None] * p[:, None, :]) * kept[:, :, None] * kept[:, None, :]

    leaves = changes & ~joins
    number = xp.where(joins, number, path.slot[rows, place])
    n = path.candidates.shape[1] // 2
    same = (_arange(xp, 2 * n, number) % n)[None, :] == (number % n)[:, None]
    pair = same & changes[:, None]
    return path._replace(
        columns=columns + (one * xp.astype(joins_, dtype))[:, :, None] * column[:, None, :],
        values=path.values * others,
        inverse=xp.astype(inverse, dtype),
        slot=xp.where(chosen, xp.where(joins, number, -1)[:, None], path.slot),
        taken=xp.where(pair, joins_, path.taken),
        spanned=(path.spanned | (same & skips[:, None])) & ~leaves[:, None],
        left=xp.where(leaves, number, -1),
    )


def _entries(xp: Any, A: Array, b: Array, path: Path) -> Array:
    """z at the end of the path, with its active entries computed anew, as rounding errors have accumulated along the path."""
    n = path.candidates.shape[1] // 2
    active = path.slot >= 0
    used = xp.astype(active, b.dtype)
    rows = _arange(xp, b.shape[0], path.slot)[:, None]
    number = xp.where(active, path.slot, 0)
    signs = xp.where(number < n, used, -used)
    columns = xp.matrix_transpose(A)[rows, number % n, :] * signs[:, :, None]
    gram = xp.matmul(columns, xp.matrix_transpose(columns))
    places = _arange(xp, used.shape[1], path.slot)
    diagonal = (places[:, None] == places[None, :])[None, :, :]
    ridge = 8 * float(xp.finfo(b.dtype).eps) * xp.max(gram, axis=(1, 2))  # makes the system of nearly parallel columns solvable
    gram = xp.where(diagonal, gram + xp.where(active, ridge[:, None], 1.0)[:, :, None], gram)
    values = path.values * used
    for _ in range(3):  # refinement removes the errors due to the ridge and the conditioning
        residual = b - xp.matmul(values[:, None, :], columns)[:, 0, :]
        violation = (_product(xp, columns, residual) - path.target[:, None]) * used
        values = values + xp.linalg.solve(gram, violation[:, :, None])[:, :, 0]
    values = xp.where(active & (values > 0), values, 0.0)
    positions = _arange(xp, 2 * n, path.slot)[None, None, :] == path.slot[:, :, None]
    both = xp.sum(xp.where(positions, values[:, :, None], 0.0), axis=1)
    return both[:, :n] - both[:, n:]


def _product(xp: Any, matrices: Array, vectors: Array) -> Array:
    """The product of each matrix (B, k, l) with its vector (B, l)."""
    return xp.matmul(matrices, vectors[:, :, None])[:, :, 0]


def _arange(xp: Any, n: int, beside: Array) -> Array:
    """0, 1, ..., n - 1 in the dtype and on the device of an array of integers."""
    return xp.arange(n, dtype=beside.dtype, **({"device": beside.device} if _arrays.is_torch_array(beside) else {}))
