"""The result of a solver: a SciPy ``OptimizeResult`` with the solution and its certificate."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from array_api_compat import is_jax_array

from proxopt import _arrays
from proxopt._arrays import Array
from proxopt.penalties.dual import to_numpy
from proxopt.solvers.derivatives import is_differentiated, is_traced, undifferentiable

if TYPE_CHECKING:

    class OptimizeResult(dict[str, Any]):
        """``scipy.optimize.OptimizeResult``, of which SciPy gives no types."""

        def __getattr__(self, name: str) -> Any: ...

else:
    from scipy.optimize import OptimizeResult

CONVERGED, BUDGET_EXHAUSTED, NOT_FINITE = 0, 1, 2  # values of `status`


class ConvergenceWarning(UserWarning):
    """The iteration budget was exhausted before the tolerance was met, or an iteration diverged."""


class _Deferred(NamedTuple):
    """An entry of a ``Solution`` that is computed when it is read."""

    make: Callable[[], Any]


class Solution(OptimizeResult):
    """An ``OptimizeResult`` whose entries may be computed when they are read.

    Forward-mode differentiation computes the derivative of every array together with the array. The derivative of x raises an
    error: if x were computed with the result, ``fun`` could not be differentiated either.
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
    sources: Sequence[Array],
    shape: Callable[[Array], Any],
    fun: Array,
    name: str,
    reached: Array,
    ok: Array,
    nit: Array,
    depth: int,
) -> OptimizeResult:
    """Make the result, and warn if the certificate of a problem is above its tolerance.

    Values that JAX traces are not inspected, and cause no warning.

    Args:
      x: the solution.
      sources: the arrays of the library of x on which it depends.
      shape: function from x to the entry ``x`` of the result.
      fun: the objective, one number for each problem.
      name: the name of the certificate.
      reached: the certificate of each problem; NaN if there is none.
      ok: whether it is within its tolerance.
      nit: the number of iterations for each problem.
      depth: ``stacklevel`` of the warning, such that it points to the caller of the public function.
    """
    xp = _arrays.namespace(ok)
    traced = is_traced(ok)
    all_ok = traced or bool(xp.all(ok))
    message = "" if traced else f"every {name} is within its tolerance" if all_ok else _failures(name, reached, ok)
    if not all_ok:
        warnings.warn(message, ConvergenceWarning, stacklevel=depth)
    status = xp.where(ok, CONVERGED, xp.where(reached == reached, BUDGET_EXHAUSTED, NOT_FINITE))
    guarded = is_differentiated(sources)
    entry = _Deferred(lambda: shape(undifferentiable(x, sources))) if guarded else shape(x)
    fields = {"x": entry, "fun": fun, name: reached, "nit": nit, "success": ok, "status": xp.astype(status, xp.int32)}
    kind = _traceable() if is_jax_array(ok) else Solution if guarded else OptimizeResult
    return kind(message=message, **fields)


def _failures(name: str, reached: Array, ok: Array) -> str:
    """The message about problems that have not converged."""
    numbers, failed = to_numpy(reached).reshape(-1), to_numpy(ok).reshape(-1) == 0
    not_finite = failed & np.isnan(numbers)
    exhausted = failed & ~not_finite
    parts = []
    if exhausted.any():
        worst = f"{name} up to {numbers[exhausted].max():.3g}"
        parts.append(f"max_iter ended {exhausted.sum()} of {failed.size} problems before their tolerance: {worst}")
    if not_finite.any():
        parts.append(
            f"{not_finite.sum()} of {failed.size} problems have no {name}, as numbers left the range of the floating-point type:"
            " the step is too long, or the data are too large or too small"
        )
    return "; ".join(parts)


@functools.cache
def _traceable() -> type[OptimizeResult]:
    """The type of results that are JAX pytrees, so that a jitted function can return them."""
    import jax

    class Result(Solution):
        pass

    def flatten(r: Result) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        names = tuple(k for k in r if k != "message")
        return tuple(r[k] for k in names), (names, r["message"])

    def unflatten(static: tuple[Any, ...], values: Any) -> Result:
        names, message = static
        return Result(message=message, **dict(zip(names, values)))

    jax.tree_util.register_pytree_node(Result, flatten, unflatten)
    return Result
