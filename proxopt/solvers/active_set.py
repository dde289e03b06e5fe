r"""The lasso by an active set: accelerated gradient steps estimate the support, linear solves complete the solution.

.. math:: \min_z \; \tfrac{1}{2} \|A z - b\|^2 + \lambda \|z\|_1

Once the support and the signs are known, z is the solution of a linear system, and gradient steps identify them long before z
itself has converged. If the estimate was wrong, the entries whose sign changes leave the active set, those that violate the
optimality condition join it, and the system is solved again (a primal-dual active set method, which is a semismooth Newton
method). Problems for which this does not converge continue with gradient steps.

Sources: Beck and Teboulle, "A fast iterative shrinkage-thresholding algorithm", 2009, Eq. 4.1-4.3; O'Donoghue and Candès,
"Adaptive restart for accelerated gradient schemes", 2015; Hintermüller, Ito, Kunisch, "The primal-dual active set strategy as a
semismooth Newton method", 2003.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

from array_api_compat import is_jax_array

from proxopt import _arrays
from proxopt._arrays import Array
from proxopt._loops import repeat, repeat_each
from proxopt.solvers.least_squares import Dictionary
from proxopt.solvers.least_squares import gap as duality_gap

STEPS = 8  # gradient steps between two attempts to complete the solution
MAX_SOLVES = 5  # linear solves in an attempt
MAX_CHANGE = 0.3  # share of the support that may have changed since the previous attempt for another to be worthwhile


class Iterate(NamedTuple):
    """State of the gradient steps, with one row for each problem.

    Attributes:
      A: the dictionary of each problem; empty if all share one.
      b: the signals.
      strength: the strengths.
      step: the step length 1 / L.
      z: the point.
      y: the search point of FISTA.
      t: its momentum parameter.
      signs: the signs of z at the previous attempt.
      gap: the duality gap, relative to the objective.
      steps: the number of gradient steps taken.
    """

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
    """State of an attempt to complete the solution, with one row for each problem.

    Attributes:
      A: as in ``Iterate``; likewise b, strength and step.
      b: the signals.
      strength: the strengths.
      step: the step length 1 / L.
      signs: the signs of the active entries, 0 for the others.
      z: the point.
      gap: its relative duality gap.
      wrong: how many entries of the active set were wrong.
    """

    A: Array
    b: Array
    strength: Array
    step: Array
    signs: Array
    z: Array
    gap: Array
    wrong: Array


def relative_gap(A: Dictionary, b: Array, strength: Array, z: Array) -> tuple[Array, Array]:
    """(gap / objective, correlations of the columns with the residual) for each problem."""
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
    """Solve a batch of problems.

    Args:
      A: (m, n) or (B, m, n).
      b: (B, m), in the dtype of A.
      strength: (B,), > 0, in the dtype of A.
      tol: the tolerance of the relative duality gap.
      max_iter: the largest number of gradient steps for a problem.

    Returns:
      The codes z (B, n) and the number of gradient steps (B,).
    """
    dictionary = Dictionary(A)
    xp, batch = dictionary.xp, b.shape[0]
    curvature = dictionary.largest_curvature()
    step = 1 / xp.where(curvature > 0, curvature, 1.0) + 0 * strength
    z = dictionary.correlate(b) * 0
    count = xp.astype(xp.argmax(z, axis=1) * 0, xp.int32)
    own = A if A.ndim == 3 else _arrays.full((batch, 0, 0), 0.0, A)
    gap, _ = relative_gap(dictionary, b, strength, z)
    iterate = Iterate(own, b, strength, step, z, z, 0 * strength + 1, xp.sign(z), gap, count)
    for steps, rounds in ((STEPS, max_iter // STEPS), (max_iter % STEPS, 1)):
        if steps and rounds:
            advance = partial(_advance, dictionary, tol=tol, steps=steps)
            iterate = repeat_each(lambda it: it.gap > tol, advance, iterate, rounds)
    return iterate.z, iterate.steps


def _of(dictionary: Dictionary, own: Array) -> Dictionary:
    """The dictionary of the remaining rows; ``own`` is empty if all problems share one."""
    return dictionary if dictionary.shared else Dictionary(own)


def _advance(dictionary: Dictionary, iterate: Iterate, *, tol: float, steps: int) -> Iterate:
    """Take gradient steps, then attempt to complete the solution of the problems whose support has settled."""
    xp, A = dictionary.xp, _of(dictionary, iterate.A)
    z, y, t = repeat(steps, lambda s: _fista_step(A, iterate, *s), (iterate.z, iterate.y, iterate.t))
    reached, _ = relative_gap(A, iterate.b, iterate.strength, z)
    signs = xp.sign(z)
    active = xp.sum(xp.abs(signs), axis=1)
    changed = xp.sum(xp.astype(signs != iterate.signs, z.dtype), axis=1)
    most = min(dictionary.A.shape[-2:])
    settled = (active <= most) & ((changed <= MAX_CHANGE * active) | (changed <= 2)) & (reached > tol)
    wrong = xp.astype(xp.where(settled, math.inf, 0.0), z.dtype)
    attempt = Attempt(iterate.A, iterate.b, iterate.strength, iterate.step, signs, z, reached, wrong)

    def unfinished(a: Attempt) -> Array:
        return (a.gap > tol) & (a.wrong > 0)

    def keep(old: Array, new: Array) -> Array:
        return xp.where(finished[:, None] if new.ndim > 1 else finished, old, new)

    attempt = repeat_each(unfinished, lambda a: _solve_active(dictionary, a, most, unfinished(a)), attempt, MAX_SOLVES)
    solved, finished = attempt.gap <= tol, iterate.gap <= tol
    return iterate._replace(
        z=keep(iterate.z, xp.where(solved[:, None], attempt.z, z)),
        y=keep(iterate.y, y),
        t=keep(iterate.t, t),
        signs=signs,
        gap=keep(iterate.gap, xp.where(solved, attempt.gap, reached)),
        steps=keep(iterate.steps, iterate.steps + steps),
    )


def _fista_step(A: Dictionary, iterate: Iterate, z: Array, y: Array, t: Array) -> tuple[Array, Array, Array]:
    """The next (z, y, t), with a restart where the momentum points uphill."""
    xp = A.xp
    step, threshold = iterate.step[:, None], (iterate.step * iterate.strength)[:, None]
    moved = y + step * A.correlate(iterate.b - A.times(y))
    new = moved - xp.clip(moved, -threshold, threshold)
    uphill = xp.sum((y - new) * (new - z), axis=1) > 0
    next_t = (1 + xp.sqrt(1 + 4 * t * t)) / 2
    momentum = xp.where(uphill, 0.0, (t - 1) / next_t)
    return new, new + momentum[:, None] * (new - z), xp.where(uphill, 1.0, next_t)


def _solve_active(dictionary: Dictionary, attempt: Attempt, most: int, unfinished: Array) -> Attempt:
    """Solve for the active entries with their signs, then correct the active set by the signs and correlations found."""
    xp, A = dictionary.xp, _of(dictionary, attempt.A)
    dtype = attempt.z.dtype
    active = attempt.signs != 0
    if not is_jax_array(attempt.z):  # a traced loop needs one size for all iterations
        most = max(int(xp.max(xp.sum(xp.astype(active, xp.int32), axis=1))), 1)
    numbers = xp.argsort(xp.astype(active, xp.int8), axis=1, descending=True)[:, :most]
    signs = xp.take_along_axis(attempt.signs, numbers, axis=1)
    used = xp.abs(signs)
    columns = A.columns(numbers) * used[:, :, None]
    gram = xp.matmul(columns, xp.matrix_transpose(columns))
    ridge = 8 * float(xp.finfo(dtype).eps) / attempt.step  # makes the system of parallel columns solvable
    gram = _add_diagonal(xp, gram, (1 - used) + ridge[:, None])
    right = (xp.matmul(columns, attempt.b[:, :, None])[:, :, 0] - attempt.strength[:, None] * signs) * used
    values = xp.linalg.solve(gram, right[:, :, None])[:, :, 0]
    values = xp.where(values * signs > 0, values, 0.0)
    z = _scatter(xp, numbers, values, attempt.z)
    relative, c = relative_gap(A, attempt.b, attempt.strength, z)
    flipped = active & (z == 0)
    violates = ~active & (xp.abs(c) > attempt.strength[:, None])
    signs = xp.where(violates, xp.sign(c), xp.where(flipped, 0.0, attempt.signs))
    wrong = xp.sum(xp.astype(flipped | violates, dtype), axis=1)
    fits = xp.sum(xp.abs(signs), axis=1) <= min(dictionary.A.shape[-2:])
    wrong = xp.where((wrong < attempt.wrong) & fits, wrong, 0.0)  # 0 ends the attempt
    row = unfinished[:, None]
    return attempt._replace(
        signs=xp.where(row, signs, attempt.signs),
        z=xp.where(row, z, attempt.z),
        gap=xp.where(unfinished & (relative == relative), relative, attempt.gap),
        wrong=xp.where(unfinished, wrong, attempt.wrong),
    )


def _scatter(xp: Any, numbers: Array, values: Array, like: Array) -> Array:
    """An array (B, n) with the values (B, K) at the given numbers of each row, and 0 elsewhere."""
    if is_jax_array(like):
        rows = xp.arange(like.shape[0])[:, None]
        return xp.zeros_like(like).at[rows, numbers].set(values)
    out = xp.zeros_like(like)
    rows = xp.arange(like.shape[0], **_device_of(like))[:, None]
    out[rows, numbers] = values
    return out


def _add_diagonal(xp: Any, matrices: Array, values: Array) -> Array:
    """Add values (B, K) to the diagonals of matrices (B, K, K), in place where the library permits it."""
    places = xp.arange(values.shape[1], **_device_of(values))
    if is_jax_array(matrices):
        return matrices.at[:, places, places].add(values)
    matrices[:, places, places] += values
    return matrices


def _device_of(x: Array) -> dict[str, Any]:
    """The keyword that creates an array on the device of x; only torch needs it."""
    return {"device": x.device} if _arrays.is_torch_array(x) else {}
