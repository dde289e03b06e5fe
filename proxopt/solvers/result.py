"""What a solver returns."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import is_jax_array
from scipy.optimize import OptimizeResult

from proxopt import _arrays
from proxopt._arrays import Array
from proxopt.penalties.dual import to_numpy
from proxopt.solvers.derivatives import is_traced, undifferentiable, watched

REACHED, ENDED, LOST = 0, 1, 2  # values of `status`


class ConvergenceWarning(UserWarning):
    """The budget of iterations ended before the tolerance was met, or an iteration diverged."""


class _Deferred(NamedTuple):
    """An entry of a `Solution` that is made when it is read."""

    make: Callable[[], Any]


class Solution(OptimizeResult):
    """An `OptimizeResult` in which entries may be made when they are read.

    In forward mode a derivative is carried along with every array that is computed: an x whose derivative raises must not be
    computed before somebody wants it, or `fun` could not be differentiated either.
    """

    def __getitem__(self, key: Any) -> Any:
        value = super().__getitem__(key)
        return value.make() if isinstance(value, _Deferred) else value

    def __iter__(self) -> Iterator[Any]:  # with this, dict(solution) and **solution read by `__getitem__`
        return iter(self.keys())

    def get(self, key: Any, default: Any = None) -> Any:
        if key not in self:
            return default
        return self[key]

    def pop(self, key: Any, *default: Any) -> Any:
        value = super().pop(key, *default)
        return value.make() if isinstance(value, _Deferred) else value

    def values(self) -> Any:
        return [self[key] for key in self.keys()]

    def items(self) -> Any:
        return [(key, self[key]) for key in self.keys()]


def report(
    x: Array,
    sources: list[Array],
    shape: Callable[[Array], Any],
    fun: Array,
    name: str,
    reached: Array,
    ok: Array,
    nit: Array,
    depth: int,
) -> OptimizeResult:
    """The result, after a warning where a problem did not get there.

    x, sources: the solution, and the arrays of its library that it depends on. shape: makes the entry `x` of the result of it.
    name: of the certificate, which `reached` holds, one number for each problem. depth: how many callers up the user stands.
    Nothing that JAX traces is looked at.
    """
    xp = _arrays.namespace(ok)
    traced = is_traced(ok)
    good = traced or bool(xp.all(ok))
    message = "" if traced else f"every {name} is within its tolerance" if good else _shortfall(name, reached, ok)
    if not good:
        warnings.warn(message, ConvergenceWarning, stacklevel=depth)
    status = xp.where(ok, REACHED, xp.where(reached == reached, ENDED, LOST))
    guarded = watched(sources)
    entry = _Deferred(lambda: shape(undifferentiable(x, sources))) if guarded else shape(x)
    fields = {"x": entry, "fun": fun, name: reached, "nit": nit, "success": ok, "status": xp.astype(status, xp.int32)}
    kind = _traceable() if is_jax_array(ok) else Solution if guarded else OptimizeResult
    return kind(message=message, **fields)


def _shortfall(name: str, reached: Array, ok: Array) -> str:
    numbers, missed = to_numpy(reached).reshape(-1), to_numpy(ok).reshape(-1) == 0
    lost = missed & np.isnan(numbers)
    ended = missed & ~lost
    parts = []
    if ended.any():
        worst = f"{name} up to {numbers[ended].max():.3g}"
        parts.append(f"max_iter ended {ended.sum()} of {missed.size} problems before their tolerance: {worst}")
    if lost.any():
        parts.append(
            f"{lost.sum()} of {missed.size} problems have no {name}, as numbers left the range of the floating-point type:"
            " the step is too long, or the data are too large or too small"
        )
    return "; ".join(parts)


@functools.cache
def _traceable() -> type[OptimizeResult]:
    """The result as a JAX pytree, so that a jitted function can return it."""
    import jax

    class Result(Solution):
        pass

    def flatten(r: Result) -> tuple[tuple, tuple]:
        names = tuple(k for k in r if k != "message")
        return tuple(r[k] for k in names), (names, r["message"])

    def unflatten(known: tuple, values: Any) -> Result:
        return Result(message=known[1], **dict(zip(known[0], values)))

    jax.tree_util.register_pytree_node(Result, flatten, unflatten)
    return Result
