"""The lasso by accelerated gradient steps that guess the support, and linear solves that finish it.

    min_z 1/2 ||A z - b||^2 + strength ||z||_1

Once the support and the signs are right, z solves a linear system; gradient steps find them long before z itself has
converged. From a wrong guess the columns that change sign leave, those that violate the optimality condition join, and the system
is solved again (a primal-dual active set, which is a semismooth Newton step). What does not converge so goes on with
gradient steps.

Sources: Beck and Teboulle, "A fast iterative shrinkage-thresholding algorithm", 2009; O'Donoghue and Candès, "Adaptive restart
for accelerated gradient schemes", 2015; Hintermüller, Ito, Kunisch, "The primal-dual active set strategy as a semismooth Newton
method", 2003.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from array_api_compat import is_jax_array

from proxopt import _arrays
from proxopt._arrays import Array
from proxopt._loops import repeat, repeat_each
from proxopt.solvers.least_squares import Dictionary
from proxopt.solvers.least_squares import gap as duality_gap

STEPS = 8  # gradient steps between two attempts to finish
ROUNDS = 5  # linear solves in an attempt
CHANGE = 0.3  # share of the support that may have changed since the last attempt for the next to be worth it


class Guess(NamedTuple):
    """Rows: own A, where each problem has one; b, strength, step 1/L; point z; search point y and momentum t of FISTA; signs at
    the last attempt; gap relative to the objective; gradient steps taken."""

    A: Array
    b: Array
    strength: Array
    step: Array
    z: Array
    y: Array
    t: Array
    signs: Array
    gap: Array
    steps: Array


class Attempt(NamedTuple):
    """Rows: own A, b, strength, step as before; signs of the active entries, 0 elsewhere; z and its relative gap; how many
    entries were wrong."""

    A: Array
    b: Array
    strength: Array
    step: Array
    signs: Array
    z: Array
    gap: Array
    wrong: Array


def relative_gap(A: Dictionary, b: Array, strength: Array, z: Array) -> tuple[Array, Array]:
    """(gap / objective, correlations of the columns with the residual) of each problem."""
    xp = A.xp
    residual = b - A.times(z)
    c = A.correlate(residual)
    top = xp.max(xp.abs(c), axis=1)
    size = strength * xp.sum(xp.abs(z), axis=1)
    scale = strength / xp.where(top <= strength, strength, top)  # NaN where top is
    found = duality_gap(xp, residual, size, scale, 0.0, xp.sum(z * c, axis=1))
    objective = 0.5 * xp.sum(residual * residual, axis=1) + size
    tiny = float(xp.finfo(b.dtype).smallest_normal)
    return found / xp.where(objective <= tiny, tiny, objective), c


def solve(A: Array, b: Array, strength: Array, tol: float, max_iter: int) -> tuple[Array, Array]:
    """(z, gradient steps): A (m, n) or (B, m, n), b (B, m), strength (B,) > 0, of one floating dtype; z (B, n)."""
    dictionary = Dictionary(A)
    xp, batch = dictionary.xp, b.shape[0]
    curvature = dictionary.largest_curvature()
    step = 1 / xp.where(curvature > 0, curvature, 1.0) + 0 * strength
    z = dictionary.correlate(b) * 0
    count = xp.astype(xp.argmax(z, axis=1) * 0, xp.int32)
    own = A if A.ndim == 3 else _arrays.full((batch, 0, 0), 0.0, A)
    gap, _ = relative_gap(dictionary, b, strength, z)
    guess = Guess(own, b, strength, step, z, z, 0 * strength + 1, xp.sign(z), gap, count)
    for steps, rounds in ((STEPS, max_iter // STEPS), (max_iter % STEPS, 1)):
        if steps and rounds:
            guess = repeat_each(lambda g: g.gap > tol, lambda g: _advance(dictionary, g, tol, steps), guess, rounds)  # noqa: B023
    return guess.z, guess.steps


def _of(dictionary: Dictionary, own: Array) -> Dictionary:
    """The dictionary of the rows at hand; `own` is empty where one serves all."""
    return dictionary if dictionary.shared else Dictionary(own)


def _advance(dictionary: Dictionary, guess: Guess, tol: float, steps: int) -> Guess:
    """So many gradient steps, then an attempt to finish the problems whose support has come to rest."""
    xp, A = dictionary.xp, _of(dictionary, guess.A)
    z, y, t = repeat(steps, lambda s: _fista_step(A, guess, *s), (guess.z, guess.y, guess.t))
    reached, _ = relative_gap(A, guess.b, guess.strength, z)
    signs = xp.sign(z)
    active = xp.sum(xp.abs(signs), axis=1)
    changed = xp.sum(xp.astype(signs != guess.signs, z.dtype), axis=1)
    most = min(dictionary.A.shape[-2:])
    ready = (active <= most) & ((changed <= CHANGE * active) | (changed <= 2)) & (reached > tol)
    attempt = Attempt(guess.A, guess.b, guess.strength, guess.step, signs, z, reached, xp.where(ready, math.inf, 0.0))
    attempt = attempt._replace(wrong=xp.astype(attempt.wrong, z.dtype))
    goes_on = lambda a: (a.gap > tol) & (a.wrong > 0)
    attempt = repeat_each(goes_on, lambda a: _solve_active(dictionary, a, most, goes_on(a)), attempt, ROUNDS)
    solved, finished = attempt.gap <= tol, guess.gap <= tol
    keep = lambda old, new: xp.where(finished[:, None] if new.ndim > 1 else finished, old, new)
    return guess._replace(
        z=keep(guess.z, xp.where(solved[:, None], attempt.z, z)),
        y=keep(guess.y, y),
        t=keep(guess.t, t),
        signs=signs,
        gap=keep(guess.gap, xp.where(solved, attempt.gap, reached)),
        steps=keep(guess.steps, guess.steps + steps),
    )


def _fista_step(A: Dictionary, guess: Guess, z: Array, y: Array, t: Array) -> tuple[Array, Array, Array]:
    xp = A.xp
    step, threshold = guess.step[:, None], (guess.step * guess.strength)[:, None]
    moved = y + step * A.correlate(guess.b - A.times(y))
    new = moved - xp.clip(moved, -threshold, threshold)
    uphill = xp.sum((y - new) * (new - z), axis=1) > 0
    longer = (1 + xp.sqrt(1 + 4 * t * t)) / 2
    momentum = xp.where(uphill, 0.0, (t - 1) / longer)
    return new, new + momentum[:, None] * (new - z), xp.where(uphill, 1.0, longer)


def _solve_active(dictionary: Dictionary, attempt: Attempt, most: int, goes_on: Array) -> Attempt:
    """Solve for the active entries at their signs; then correct the active set by what the solution says of it."""
    xp, A = dictionary.xp, _of(dictionary, attempt.A)
    dtype = attempt.z.dtype
    active = attempt.signs != 0
    if not is_jax_array(attempt.z):  # a trace needs one size for all rounds
        most = max(int(xp.max(xp.sum(xp.astype(active, xp.int32), axis=1))), 1)
    numbers = xp.argsort(xp.astype(active, xp.int8), axis=1, descending=True)[:, :most]
    signs = xp.take_along_axis(attempt.signs, numbers, axis=1)
    used = xp.abs(signs)
    columns = A.columns(numbers) * used[:, :, None]
    gram = xp.matmul(columns, xp.matrix_transpose(columns))
    ridge = 8 * float(xp.finfo(dtype).eps) / attempt.step  # keeps parallel columns solvable
    gram = _add_diagonal(xp, gram, (1 - used) + ridge[:, None])
    pull = (xp.matmul(columns, attempt.b[:, :, None])[:, :, 0] - attempt.strength[:, None] * signs) * used
    values = xp.linalg.solve(gram, pull[:, :, None])[:, :, 0]
    values = xp.where(values * signs > 0, values, 0.0)
    z = _spread(xp, numbers, values, attempt.z)
    relative, c = relative_gap(A, attempt.b, attempt.strength, z)
    flipped = active & (z == 0)
    violates = ~active & (xp.abs(c) > attempt.strength[:, None])
    signs = xp.where(violates, xp.sign(c), xp.where(flipped, 0.0, attempt.signs))
    wrong = xp.sum(xp.astype(flipped | violates, dtype), axis=1)
    fits = xp.sum(xp.abs(signs), axis=1) <= min(dictionary.A.shape[-2:])
    wrong = xp.where((wrong < attempt.wrong) & fits, wrong, 0.0)  # 0 ends the attempt
    row = goes_on[:, None]
    return attempt._replace(
        signs=xp.where(row, signs, attempt.signs),
        z=xp.where(row, z, attempt.z),
        gap=xp.where(goes_on & (relative == relative), relative, attempt.gap),
        wrong=xp.where(goes_on, wrong, attempt.wrong),
    )


def _spread(xp: Any, numbers: Array, values: Array, like: Array) -> Array:
    """(B, n) with the values at their numbers, 0 elsewhere."""
    if is_jax_array(like):
        rows = xp.arange(like.shape[0])[:, None]
        return xp.zeros_like(like).at[rows, numbers].set(values)
    out = xp.zeros_like(like)
    rows = xp.arange(like.shape[0], **_beside(like))[:, None]
    out[rows, numbers] = values
    return out


def _add_diagonal(xp: Any, matrices: Array, values: Array) -> Array:
    """Matrices (B, K, K), which may be written into, with values (B, K) added to their diagonals."""
    places = xp.arange(values.shape[1], **_beside(values))
    if is_jax_array(matrices):
        return matrices.at[:, places, places].add(values)
    matrices[:, places, places] += values
    return matrices


def _beside(x: Array) -> dict[str, Any]:
    return {"device": x.device} if _arrays.is_torch_array(x) else {}
