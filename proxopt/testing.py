"""The laws that make a proximal operator right, for our penalties and for anybody's."""

from __future__ import annotations

from typing import Any

import numpy as np

from proxopt import _arrays
from proxopt.penalties.dual import to_numpy


def check_prox(penalty: Any, x: Any, step: Any = 1.0, *, tolerance: float | None = None, seed: int = 0) -> None:
    """Raise AssertionError, naming the law and the gap, where `penalty.prox(x, step)` breaks one.

    With p = prox(x, step) and u = (x - p) / step the laws are:
      type         p has the library, dtype and shape of x; x itself is left as it was; two calls agree
      objective    f(z) + sum((z - x)^2 / (2 step)) is nowhere below its value at p, for z near and far
      subgradient  f(z) >= f(p) + <u, z - p> for all z tried          (only if penalty.convex)
      firm         <prox(x) - prox(y), x - y>_{1/step} >= ||prox(x) - prox(y)||^2_{1/step}     (only if penalty.convex)
      moreau       f(p) = <u, p>: x / step - u lies in the dual ball, the other half of Moreau's identity
                   (only if penalty.homogeneous)
      origin       prox(0) = 0, for any step
      identity     step 0 changes nothing

    Args:
      penalty: an object with `value(x)` and `prox(x, step)`; `convex` and `homogeneous` count as True unless declared otherwise.
      x: a floating-point array, or a list of arrays.
      step: a number >= 0, or an array of x's shape (a list for a list).
      tolerance: allowed relative gap; by default 100 rounding units of x's dtype.
      seed: of the random points.

    >>> import numpy as np
    >>> from proxopt import L1
    >>> check_prox(L1(0.3), np.array([1.0, -0.2, 0.0]), step=0.5)
    """
    rng = np.random.default_rng(seed)
    arrays, xp = _arrays.as_list(x)
    before = [to_numpy(a).copy() for a in arrays]
    p = penalty.prox(x, step)
    points, _ = _arrays.as_list(p, "prox(x)")
    for a, b, old, again in zip(arrays, points, before, _arrays.as_list(penalty.prox(x, step))[0]):
        _law("type", type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape, f"{type(b).__name__} {b.dtype} {b.shape}")
        _law("type", np.array_equal(to_numpy(a), old, equal_nan=True), "x was changed in place")
        _law("type", np.array_equal(to_numpy(b), to_numpy(again), equal_nan=True), "two calls differ")
    for a, b in zip(arrays, _arrays.as_list(penalty.prox(x, 0.0))[0]):
        _law("identity", np.array_equal(to_numpy(a), to_numpy(b), equal_nan=True), "prox(x, 0) != x")
    for b in _arrays.as_list(penalty.prox(_like(x, [a * 0 for a in before]), step))[0]:
        _law("origin", not np.any(to_numpy(b)), "prox(0) != 0")

    eps = float(xp.finfo(arrays[0].dtype).eps)
    tolerance = 100 * eps if tolerance is None else tolerance
    steps = step if isinstance(step, (list, tuple)) else [step] * len(arrays)
    steps = [
        np.broadcast_to(np.asarray(s if isinstance(s, (int, float)) else to_numpy(s), float), b.shape)
        for s, b in zip(steps, before)
    ]
    moves = [s > 0 for s in steps]
    if not any(m.any() for m in moves):
        return
    inverse = [np.divide(1.0, s, out=np.zeros(s.shape), where=m) for s, m in zip(steps, moves)]
    here = [to_numpy(b) for b in points]
    u = [(b - q) * i for b, q, i in zip(before, here, inverse)]

    def f(z: list[np.ndarray]) -> float:
        return float(to_numpy(penalty.value(_like(x, z))))

    def objective(z: list[np.ndarray]) -> float:
        return f(z) + sum(float(np.sum((a - b) ** 2 * i)) / 2 for a, b, i in zip(z, before, inverse))

    largest = max(float(np.max(np.abs(b), initial=0.0)) for b in before) or 1.0
    f_here, best = f(here), objective(here)
    for scale in (1e-6, 1e-3, 1e-1, 1.0, 10.0):
        z = [q + m * scale * largest * rng.normal(size=q.shape) for q, m in zip(here, moves)]
        z = [to_numpy(a) for a in _arrays.as_list(_like(x, z))[0]]  # as the dtype of x holds it
        value = objective(z)
        _law(
            "objective", best <= value + tolerance * (abs(value) + abs(best)), f"{best!r} at the prox, {value!r} at scale {scale}"
        )
        if getattr(penalty, "convex", True):
            lower = f_here + sum(float(np.sum(ui * (a - q))) for ui, a, q in zip(u, z, here))
            room = tolerance * (
                abs(f_here) + sum(float(np.sum(np.abs(ui) * (np.abs(a) + np.abs(q)))) for ui, a, q in zip(u, z, here))
            )
            _law("subgradient", f(z) >= lower - room, f"f = {f(z)!r} < {lower!r} at scale {scale}")
            y = [b + m * scale * largest * rng.normal(size=b.shape) for b, m in zip(before, moves)]
            y = [to_numpy(a) for a in _arrays.as_list(_like(x, y))[0]]
            there = [to_numpy(a) for a in _arrays.as_list(penalty.prox(_like(x, y), step))[0]]
            cross = sum(float(np.sum((q - t) * (b - a) * i)) for q, t, b, a, i in zip(here, there, before, y, inverse))
            square = sum(float(np.sum((q - t) ** 2 * i)) for q, t, i in zip(here, there, inverse))
            room = tolerance * sum(float(np.sum((np.abs(b) + np.abs(a)) ** 2 * i)) for b, a, i in zip(before, y, inverse))
            _law("firm", cross >= square - room, f"{cross!r} < {square!r}")
    if getattr(penalty, "homogeneous", True):
        inner = sum(float(np.sum(ui * q)) for ui, q in zip(u, here))
        room = tolerance * sum(float(np.sum(np.abs(b) * (np.abs(b) + np.abs(q)) * i)) for b, q, i in zip(before, here, inverse))
        if all(m.all() for m in moves):
            _law("moreau", abs(f_here - inner) <= room + tolerance * f_here, f"f(p) = {f_here!r}, <u, p> = {inner!r}")


def _like(x: Any, values: list[np.ndarray]) -> Any:
    arrays, _ = _arrays.as_list(x)
    made = []
    for a, v in zip(arrays, values):
        xp = _arrays.namespace(a)
        made.append(xp.asarray(v, dtype=a.dtype, device=a.device) if _arrays.is_torch_array(a) else xp.asarray(v, dtype=a.dtype))
    return _arrays.like_input(x, made)


def _law(name: str, holds: bool, found: str) -> None:
    if not holds:
        raise AssertionError(f"law {name!r} of the prox is broken: {found}")
