"""Proximal gradient methods for min_x f(x) + penalty(x): ISTA and FISTA, deterministic and certified.

One problem, or a batch of them in which each has its own step length, its own restarts and its own end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from proxopt import _arrays, _checks
from proxopt._arrays import Array
from proxopt._loops import repeat_while
from proxopt.penalties.elementwise import L1, ElasticNet
from proxopt.solvers.result import report

if TYPE_CHECKING:
    from scipy.optimize import OptimizeResult

CHECK_EVERY = 10  # iterations between two looks at the certificate
HALVINGS = 60  # of the step, in one iteration


class State(NamedTuple):
    """x: prox point; y: search point; t: momentum; step; reached: the certificate; done; nit; count: iterations of the loop."""

    x: Array
    y: Array
    t: Array
    step: Array
    reached: Array
    done: Array
    nit: Array
    count: Any


def fista(
    f: Callable[[Array], tuple[Array, Array]],
    penalty: Any,
    x0: Array,
    *,
    step: float | None = None,
    tol: float = 1e-6,
    max_iter: int = 10_000,
    restart: bool = True,
) -> OptimizeResult:
    """min_x f(x) + penalty(x) by accelerated proximal gradient steps.

        x_k = prox(y_k - step grad f(y_k), step),    y_{k+1} = x_k + (t_k - 1) / t_{k+1} (x_k - x_{k-1})

    Args:
      f: x -> (f(x), gradient). A scalar value means one problem; values of shape (B, ...) a batch, the leading axes of x
        being those of the values. `LeastSquares(A, b)` is one.
      penalty: any object with `value(x)` and `prox(x, step)`. In a batch it applies to each problem alone; `L1` and `ElasticNet`
        may hold a strength for each, shaped to broadcast against x.
      x0: where to start, a floating-point array of NumPy, torch or JAX.
      step: None takes 1 / f.lipschitz() where f has that, and else halves from 1 until
        f(x) <= f(y) + <grad, x - y> + ||x - y||^2 / (2 step).
      tol: of the certificate. For `LeastSquares` with a penalty of proxopt (in a batch `L1` or `ElasticNet`) that is the duality
        gap, relative to the objective; otherwise the length of the prox-gradient ||x - prox(x - step grad, step)|| / step,
        relative to the length of the gradient.
      max_iter: the budget; when it ends first, a warning says what was reached.
      restart: forget the momentum where it points uphill, <y - x, x - x_before> > 0.

    Returns:
      A SciPy `OptimizeResult`: x, fun, `gap` or `residual` (the certificate, relative as above), nit, success, status, message;
      all but message with one entry for each problem. Under jax.jit nothing is warned of: look at `success`.

    Raises:
      TypeError, ValueError: x0 is not floating point, or an argument lies out of its domain.

    Sources: Beck and Teboulle, "A fast iterative shrinkage-thresholding algorithm", 2009; O'Donoghue and Candès, "Adaptive
    restart for accelerated gradient schemes", 2015.

    >>> import numpy as np
    >>> from proxopt import L1
    >>> from proxopt.solvers import LeastSquares
    >>> found = fista(LeastSquares(np.eye(2), np.array([3.0, 0.5])), L1(1.0), np.zeros(2))
    >>> found.x, bool(found.success)
    (array([2., 0.]), True)
    """
    return _solve(f, penalty, x0, step, tol, max_iter, True, restart)


def ista(
    f: Callable[[Array], tuple[Array, Array]],
    penalty: Any,
    x0: Array,
    *,
    step: float | None = None,
    tol: float = 1e-6,
    max_iter: int = 10_000,
) -> OptimizeResult:
    """min_x f(x) + penalty(x) by proximal gradient steps, x <- prox(x - step grad f(x), step). Arguments as in `fista`.

    Source: Daubechies, Defrise, De Mol, "An iterative thresholding algorithm for linear inverse problems", 2004; ISTA-NAS Eq. 7.

    >>> import numpy as np
    >>> from proxopt import GroupL2
    >>> from proxopt.solvers import LeastSquares
    >>> ista(LeastSquares(np.eye(2), np.array([3.0, 4.0])), GroupL2(1.0, weights="none"), np.zeros(2)).x
    array([2.4, 3.2])
    """
    return _solve(f, penalty, x0, step, tol, max_iter, False, False)


class _Problems:
    """f + penalty over a batch of problems, whose number f's value tells."""

    def __init__(self, f: Any, penalty: Any, x0: Array):
        self.f, self.penalty = f, penalty
        self.xp = _arrays.namespace(x0)
        values, gradient = f(x0)
        self.batch = tuple(getattr(values, "shape", ()))
        shape = tuple(x0.shape)
        if tuple(gradient.shape) != shape or shape[: len(self.batch)] != self.batch:
            raise ValueError(
                f"f must return values with the leading axes of x0 and a gradient of its shape {shape}, got shapes {self.batch}"
                f" and {tuple(gradient.shape)}"
            )
        self.axes = tuple(range(len(self.batch), x0.ndim))
        self.ones = self.sum(x0 * 0) + 1

    def wide(self, v: Array) -> Array:
        """One number for each problem, against x."""
        return self.xp.reshape(v, (*self.batch, *(1 for _ in self.axes)))

    def sum(self, x: Array) -> Array:
        return self.xp.sum(x, axis=self.axes) if self.axes else x

    def smooth(self, x: Array) -> tuple[Array, Array]:
        value, gradient = self.f(x)
        return value + 0 * self.ones, gradient

    def prox(self, x: Array, step: Array) -> Array:
        if not self.batch or isinstance(self.penalty, (L1, ElasticNet)):
            return self.penalty.prox(x, self.wide(step))
        return self._each(lambda a, s: self.penalty.prox(a, s), x, step)

    def value(self, x: Array) -> Array:
        """penalty(x), one number for each problem."""
        if not self.batch:
            return self.penalty.value(x) + 0 * self.ones
        if isinstance(self.penalty, (L1, ElasticNet)):
            return self.sum(self.penalty.entries(x))
        return self._each(lambda a, _: self.penalty.value(a), x, self.ones)

    def _each(self, work: Any, x: Array, step: Array) -> Array:
        rows = self.xp.reshape(x, (-1, *x.shape[len(self.batch) :]))
        steps = self.xp.reshape(step, (-1,))
        done = self.xp.stack([work(rows[i, ...], steps[i]) for i in range(rows.shape[0])])
        return self.xp.reshape(done, (*self.batch, *done.shape[1:]))

    def certificate(self, x: Array, step: Array) -> tuple[str, Array]:
        """Its name, and how far each problem is from the solution, relative to its size."""
        xp = self.xp
        tiny = float(xp.finfo(x.dtype).smallest_normal)
        value, gradient = self.smooth(x)
        penalty = self.value(x)
        gap = self.f.gap(x, self.penalty, penalty) if hasattr(self.f, "gap") else None
        if gap is not None:
            return "gap", gap / xp.where(value + penalty > tiny, value + penalty, tiny)
        move = (x - self.prox(x - self.wide(step) * gradient, step)) / self.wide(step)
        square = self.sum(gradient * gradient)
        return "residual", xp.sqrt(self.sum(move * move) / xp.where(square > tiny, square, tiny))


def _solve(
    f: Any, penalty: Any, x0: Array, step: float | None, tol: float, max_iter: int, accelerated: bool, restart: bool
) -> OptimizeResult:
    (x0,), _ = _arrays.as_list(x0, "x0")
    check_budget(tol, max_iter)
    if step is not None:
        _checks.in_range("step", step, open_low=True)
    x0 = _arrays.detach(_arrays.widen(x0))
    problems = _Problems(f, penalty, x0)
    xp, ones = problems.xp, problems.ones
    searches = step is None and not hasattr(f, "lipschitz")
    if step is None and not searches:
        bound = f.lipschitz()
        first = 1 / xp.where(bound > 0, bound, 1.0) * ones
    else:
        first = ones * (1.0 if step is None else step)
    name, reached = problems.certificate(x0, first)
    no = ones != ones
    state = State(x0, x0, ones, first, reached, (reached <= tol) & ~_unsure(searches, no), xp.astype(no, xp.int32), 0)
    goes_on = lambda s: (s.count < max_iter) & ~xp.all(s.done)

    def advance(s: State) -> State:
        for _ in range(min(CHECK_EVERY, max_iter)):
            s = _iterate(problems, s, searches, accelerated, restart)
        reached = problems.certificate(s.x, s.step)[1]
        reached = xp.where(s.done, s.reached, reached)
        return s._replace(reached=reached, done=reached <= tol, count=s.count + CHECK_EVERY)

    end = repeat_while(goes_on, advance, state)
    fun = problems.smooth(end.x)[0] + problems.value(end.x)
    return report(end.x, fun, name, end.reached, end.done, end.nit, depth=4)


def _unsure(searches: bool, no: Array) -> Array:
    """Whether the first certificate cannot be trusted: its step has not been searched for yet."""
    return ~no if searches else no


def _iterate(problems: _Problems, s: State, searches: bool, accelerated: bool, restart: bool) -> State:
    xp, wide = problems.xp, problems.wide
    value, gradient = problems.smooth(s.y)
    step = _search(problems, s.y, value, gradient, s.step) if searches else s.step
    x = problems.prox(s.y - wide(step) * gradient, step)
    if accelerated:
        y, t = accelerated_by(xp, x, x - s.x, s.y, s.t, problems.sum, wide, restart)
    else:
        y, t = x, s.t
    frozen = wide(s.done)
    return s._replace(
        x=xp.where(frozen, s.x, x),
        y=xp.where(frozen, s.y, y),
        t=xp.where(s.done, s.t, t),
        step=xp.where(s.done, s.step, step),
        nit=s.nit + xp.astype(~s.done, s.nit.dtype),
    )


def accelerated_by(
    xp: Any, x: Array, change: Array, y: Array, t: Array, total: Callable, wide: Callable, restart: bool = True
) -> tuple[Array, Array]:
    """The next search point and momentum of FISTA, from the prox point x, its change, and the search point it came from.

    total, wide: sum over the entries of each problem, and one number for each against x.
    """
    uphill = (total((y - x) * change) > 0) & restart
    longer = (1 + xp.sqrt(1 + 4 * t * t)) / 2
    momentum = xp.where(uphill, 0.0, (t - 1) / longer)
    return x + wide(momentum) * change, xp.where(uphill, 1.0, longer)


class _Trial(NamedTuple):
    step: Array
    fits: Array
    count: Any


def _search(problems: _Problems, y: Array, value: Array, gradient: Array, step: Array) -> Array:
    """The step, halved for each problem until the quadratic bound with it lies above f."""
    xp, wide = problems.xp, problems.wide
    slack = 10 * float(xp.finfo(y.dtype).eps) * xp.abs(value)

    def halve(trial: _Trial) -> _Trial:
        x = problems.prox(y - wide(trial.step) * gradient, trial.step)
        move = x - y
        bound = value + problems.sum(gradient * move) + problems.sum(move * move) / (2 * trial.step)
        fits = problems.smooth(x)[0] <= bound + slack
        return _Trial(xp.where(fits, trial.step, trial.step / 2), fits, trial.count + 1)

    start = _Trial(step, step != step, 0)
    return repeat_while(lambda trial: (trial.count < HALVINGS) & ~xp.all(trial.fits), halve, start).step


def check_budget(tol: float, max_iter: int) -> None:
    """Refuse a tolerance or a budget out of its domain."""
    _checks.in_range("tol", tol)
    if isinstance(max_iter, bool) or int(max_iter) != max_iter or max_iter < 1:
        raise ValueError(f"max_iter must be a whole number >= 1, got {max_iter!r}")
