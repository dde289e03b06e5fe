"""What a solver returns."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import numpy as np
from array_api_compat import is_jax_array
from scipy.optimize import OptimizeResult

from proxopt import _arrays
from proxopt._arrays import Array
from proxopt.penalties.dual import to_numpy


class ConvergenceWarning(UserWarning):
    """The budget of iterations ended before the tolerance was met."""


def report(x: Any, fun: Array, certificate: str, reached: Array, ok: Array, nit: Array, depth: int) -> OptimizeResult:
    """The result, after a warning where a problem did not get there.

    certificate: name of what `reached`, one number for each problem, holds. depth: how many callers up the user stands. Nothing
    that JAX traces is looked at.
    """
    traced = _is_traced(ok)
    good = traced or bool(_arrays.namespace(ok).all(ok))
    message = "" if traced else f"every {certificate} is within its tolerance" if good else _shortfall(certificate, reached, ok)
    if not good:
        warnings.warn(message, ConvergenceWarning, stacklevel=depth)
    fields = {"x": x, "fun": fun, certificate: reached, "nit": nit, "success": ok, "status": 1 - _whole(ok)}
    kind = _traceable() if is_jax_array(ok) else OptimizeResult
    return kind(message=message, **fields)


def _shortfall(certificate: str, reached: Array, ok: Array) -> str:
    missed = to_numpy(ok).reshape(-1) == 0
    worst = float(np.max(to_numpy(reached).reshape(-1)[missed]))
    return f"max_iter ended {missed.sum()} of {missed.size} problems before their tolerance: {certificate} up to {worst:.3g}"


def _whole(ok: Array) -> Array:
    xp = _arrays.namespace(ok)
    return xp.astype(ok, xp.int32)


def _is_traced(x: Array) -> bool:
    if not is_jax_array(x):
        return False
    import jax

    return isinstance(x, jax.core.Tracer)


@functools.cache
def _traceable() -> type[OptimizeResult]:
    """The result as a JAX pytree, so that a jitted function can return it."""
    import jax

    class Result(OptimizeResult):
        pass

    def flatten(r: Result) -> tuple[tuple, tuple]:
        names = tuple(k for k in r if k != "message")
        return tuple(r[k] for k in names), (names, r["message"])

    def unflatten(known: tuple, values: Any) -> Result:
        return Result(message=known[1], **dict(zip(known[0], values)))

    jax.tree_util.register_pytree_node(Result, flatten, unflatten)
    return Result
