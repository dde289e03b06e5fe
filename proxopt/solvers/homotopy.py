"""The lasso by its solution path: exact in finitely many steps, also where columns are nearly parallel.

    min_z 1/2 ||A z - b||^2 + strength ||z||_1

The minimiser is piecewise linear in the strength. From the strength at which z = 0 the path is followed downwards; at each of
its kinks one column joins or leaves. All problems of a batch walk side by side, each from kink to kink of its own.

Where several columns reach the strength at once, none of the kinks would be well defined: the columns are followed with lengths
that differ by a part in 10^9, and the result is solved for with the columns as they are. A column in the span of the active ones
is passed over until one of them leaves.

Sources: Osborne, Presnell, Turlach, "A new approach to variable selection in least squares problems", 2000; Efron, Hastie,
Johnstone, Tibshirani, "Least angle regression", 2004.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from proxopt import _arrays
from proxopt._arrays import Array
from proxopt._loops import repeat_each

SPREAD = 1e-9  # of the lengths, in double precision


class Path(NamedTuple):
    """Where each of B problems stands on its path. A column and its negative are two candidates; at most K = min(m, n) are
    active.

    candidates (B, 2n, m), the rows of [A, -A]^T; target (B,), the strength wanted; strength (B,), the one reached;
    correlations (B, 2n) of the candidates with the residual; taken (B, 2n), whether a candidate or its negative is active;
    spanned (B, 2n), whether it was found in the span of the active ones;
    left (B,), the candidate that left last, or -1. Active ones fill slots, free slots are 0: columns (B, K, m); values (B, K),
    their entries of z, without sign; inverse (B, K, K) of their Gram matrix; slot (B, K), their numbers, or -1.
    kinks (B,) so far.
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
    """(z, kinks): A (B, m, n), b (B, m), strength (B,) > 0, all of one floating dtype; z (B, n), kinks (B,)."""
    xp = _arrays.namespace(A, b)
    path = _start(xp, A, b, strength)
    path = repeat_each(lambda p: p.strength > p.target, lambda p: _next_kink(xp, p), path, max_kinks)
    return _entries(xp, A, b, path), path.kinks


def _start(xp: Any, A: Array, b: Array, target: Array) -> Path:
    batch, m, n = A.shape
    k = min(m, n)
    zeros = lambda *shape: _arrays.full(shape, 0.0, b)
    number = _counting(xp, n, xp.argmax(A, axis=2))
    apart = xp.astype(number, A.dtype) * ((math.sqrt(5) - 1) / 2)
    apart = 1 + max(SPREAD, 16 * float(xp.finfo(A.dtype).eps)) * (apart - xp.floor(apart))
    rows = xp.matrix_transpose(A * apart)
    candidates = xp.concat([rows, -rows], axis=1)
    correlations = _product(xp, candidates, b)
    none = xp.argmin(zeros(batch, k, 1), axis=2) - 1
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
    """Down to the next strength at which a column joins or leaves, or to the target."""
    eps = float(xp.finfo(path.values.dtype).eps)
    direction = xp.sum(path.inverse, axis=2)  # of the values, per unit of strength
    towards = xp.matmul(direction[:, None, :], path.columns)[:, 0, :]
    slope = _product(xp, path.candidates, towards)  # of the correlations
    rest = path.strength - path.target

    room = 1 - slope
    full = xp.all(path.slot >= 0, axis=1)[:, None]
    others = _counting(xp, room.shape[1], path.slot)[None, :] != path.left[:, None]
    may_join = (room > 8 * eps) & ~path.taken & ~path.spanned & others & ~full
    gaps = (path.strength[:, None] - path.correlations) / xp.where(may_join, room, 1.0)
    gaps = xp.where(may_join, gaps, math.inf)
    to_join = xp.min(gaps, axis=1)

    falls = (path.slot >= 0) & (direction < 0)
    ways = xp.where(falls, path.values / xp.where(falls, -direction, 1.0), math.inf)
    to_leave = xp.min(ways, axis=1)

    joins = to_join <= to_leave
    nearest = xp.where(joins, to_join, to_leave)
    walks = nearest < rest
    way = xp.where(walks, nearest, rest)
    way = xp.where(way > 0, way, 0.0)[:, None]  # rounding may put a kink behind us
    path = path._replace(
        strength=xp.where(walks, path.strength - way[:, 0], path.target),
        correlations=path.correlations - way * slope,
        values=path.values + way * direction,
        kinks=path.kinks + xp.astype(walks, path.kinks.dtype),
    )
    place = xp.where(joins, xp.argmin(path.slot, axis=1), xp.argmin(ways, axis=1))  # free slots hold -1
    return _change(xp, path, xp.argmin(gaps, axis=1), place, walks, joins)


def _change(xp: Any, path: Path, number: Array, place: Array, walks: Array, joins: Array) -> Path:
    """One column of each problem that `walks` changes: candidate `number` joins in slot `place`, or what is there leaves."""
    dtype = path.values.dtype
    rows = _counting(xp, number.shape[0], number)
    # what joins: the inverse grows by the outer product of p, from the part of the column outside the span of the others
    column = path.candidates[rows, number, :]
    weights = _product(xp, path.inverse, _product(xp, path.columns, column))
    distance = column - xp.matmul(weights[:, None, :], path.columns)[:, 0, :]
    pivot = xp.sum(distance * distance, axis=1)
    inside = joins & (pivot <= (1e4 * float(xp.finfo(dtype).eps)) ** 2 * xp.sum(column * column, axis=1))
    passes, walks = walks & inside, walks & ~inside

    chosen = (_counting(xp, path.slot.shape[1], place)[None, :] == place[:, None]) & walks[:, None]
    one = xp.astype(chosen, dtype)
    rest = 1 - one
    others = path.columns * rest[:, :, None]
    # what leaves: the inverse loses the outer product of p
    row = xp.matmul(one[:, None, :], path.inverse)[:, 0, :]
    joins_ = joins[:, None]
    p = xp.where(joins_, one - weights, row)
    pivot = xp.where(joins, pivot, xp.sum(row * one, axis=1))
    tiny = float(xp.finfo(dtype).smallest_normal)
    scale = (2 * xp.astype(joins, dtype) - 1) / xp.where(pivot > tiny, pivot, tiny)
    scale = xp.where(walks, scale, 0.0)
    kept = xp.where(joins_, 1.0, rest)
    inverse = (path.inverse + (scale[:, None] * p)[:, :, None] * p[:, None, :]) * kept[:, :, None] * kept[:, None, :]

    leaves = walks & ~joins
    number = xp.where(joins, number, path.slot[rows, place])
    n = path.candidates.shape[1] // 2
    same = (_counting(xp, 2 * n, number) % n)[None, :] == (number % n)[:, None]
    pair = same & walks[:, None]
    return path._replace(
        columns=others + (one * xp.astype(joins_, dtype))[:, :, None] * column[:, None, :],
        values=path.values * rest,
        inverse=xp.astype(inverse, dtype),
        slot=xp.where(chosen, xp.where(joins, number, -1)[:, None], path.slot),
        taken=xp.where(pair, joins_, path.taken),
        spanned=(path.spanned | (same & passes[:, None])) & ~leaves[:, None],
        left=xp.where(leaves, number, -1),
    )


def _entries(xp: Any, A: Array, b: Array, path: Path) -> Array:
    """z at the end of the path, its active entries solved for afresh: the walk has gathered rounding."""
    n = path.candidates.shape[1] // 2
    active = path.slot >= 0
    used = xp.astype(active, b.dtype)
    rows = _counting(xp, b.shape[0], path.slot)[:, None]
    number = xp.where(active, path.slot, 0)
    signs = xp.where(number < n, used, -used)
    columns = xp.matrix_transpose(A)[rows, number % n, :] * signs[:, :, None]
    gram = xp.matmul(columns, xp.matrix_transpose(columns))
    places = _counting(xp, used.shape[1], path.slot)
    diagonal = (places[:, None] == places[None, :])[None, :, :]
    ridge = 8 * float(xp.finfo(b.dtype).eps) * xp.max(gram, axis=(1, 2))  # nearly parallel columns stay solvable
    gram = xp.where(diagonal, gram + xp.where(active, ridge[:, None], 1.0)[:, :, None], gram)
    values = path.values * used
    for _ in range(3):  # later passes take out what the ridge and the conditioning cost the first
        residual = b - xp.matmul(values[:, None, :], columns)[:, 0, :]
        slack = (_product(xp, columns, residual) - path.target[:, None]) * used
        values = values + xp.linalg.solve(gram, slack[:, :, None])[:, :, 0]
    values = xp.where(active & (values > 0), values, 0.0)
    positions = _counting(xp, 2 * n, path.slot)[None, None, :] == path.slot[:, :, None]
    both = xp.sum(xp.where(positions, values[:, :, None], 0.0), axis=1)
    return both[:, :n] - both[:, n:]


def _product(xp: Any, matrices: Array, vectors: Array) -> Array:
    return xp.matmul(matrices, vectors[:, :, None])[:, :, 0]


def _counting(xp: Any, n: int, beside: Array) -> Array:
    """0, 1, ..., n - 1 beside an array of integers."""
    return xp.arange(n, dtype=beside.dtype, **({"device": beside.device} if _arrays.is_torch_array(beside) else {}))
