"""Proximal gradient methods for min_x f(x) + penalty(x): ISTA and FISTA, deterministic and certified.

One problem, or a batch of them in which each has its own step length, its own restarts and its own end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from array_api_compat import is_jax_array

from proxopt import _arrays, _checks
from proxopt._arrays import Array
from proxopt._loops import repeat, repeat_while
from proxopt.solvers.derivatives import held_by, optimal_value_of
from proxopt.solvers.least_squares import LeastSquares, check_finite
from proxopt.solvers.result import report

if TYPE_CHECKING:
    from scipy.optimize import OptimizeResult

CHECK_EVERY = 10  # iterations between two looks at the certificate
HALVINGS = 60  # of the step, in one iteration


class State(NamedTuple):
    """x: prox point; change: from the one before; t: momentum, 0 for none; step; loose: the step may grow; reached: the
    certificate; over: it is reached, or no finite point or step length was found; nit; count: iterations of the loop."""

    x: Array
    change: Array
    t: Array
    step: Array
    loose: Array
    reached: Array
    over: Array
    nit: Array
    count: Any


def fista(
    f: Callable[[Array], tuple[Array, Array]],
    penalty: Any,
    x0: Array,
    *,
    step: float | None = None,
    tol: float | None = None,
    max_iter: int = 10_000,
    restart: bool = True,
) -> OptimizeResult:
    """min_x f(x) + penalty(x) by accelerated proximal gradient steps.

        y_k = x_{k-1} + (t_{k-1} - 1) / t_k (x_{k-1} - x_{k-2}),    x_k = prox(y_k - step_k grad f(y_k), step_k)
        t_k = (1 + sqrt(1 + 4 (step_{k-1} / step_k) t_{k-1}^2)) / 2,    t_1 = 1

    Args:
      f: x -> (f(x), gradient). A scalar value means one problem; values of shape (B, ...) a batch, the leading axes of x
        being those of the values. `LeastSquares(A, b)` is one.
      penalty: any object with `value(x)` and `prox(x, step)`. In a batch it applies to each problem alone; `L1` and `ElasticNet`
        may hold a strength for each, shaped to broadcast against x.
      x0: where to start, a floating-point array of NumPy, torch or JAX.
      step: None takes 1 / f.lipschitz() where f has that. Else the step is searched for from 1, for each problem: halved until
        f(x) <= f(y) + <grad f(y), x - y> + ||x - y||^2 / (2 step), and doubled after an iteration in which
        <grad f(x) - grad f(y), x - y> <= ||x - y||^2 / (2 step), so that twice the step would have done; where rounding hides
        the first, <grad f(x) - grad f(y), x - y> <= ||x - y||^2 / step takes its place.
      tol: of the certificate. None: 1e-6 in double precision, 1e-4 in single.
      max_iter: the budget; when it ends first, a warning says what was reached.
      restart: forget the momentum where it points uphill, <y_k - x_k, x_k - x_{k-1}> > 0.

    Returns:
      A SciPy `OptimizeResult`: x, fun, `gap` or `residual` (the certificate), nit, success, status, message; all but message
      with one entry for each problem. status is 0 for success, 1 where the budget ended first, 2 where numbers left the range of
      the dtype: the certificate is NaN then. Under jax.jit nothing is warned of: look at `success`.

      gap: for `LeastSquares` with a convex penalty of proxopt (in a batch `L1` or `ElasticNet`). A bound on the distance of the
      objective from its minimum, relative to the objective or, where that vanishes, to eps times the objective at 0. See
      `LeastSquares.gap` for what rounding does to it.

      residual: for all else, ||x - prox(x - s grad f(x), s)|| / (s G) + eps ||x|| / (s G), the length of a prox-gradient step of
      its own, relative to the length G of grad f(x), and a bound on what rounding hides of it. s = ||x|| / G for penalties that
      declare `convex = True`, as those of proxopt; for others s is the step of the solver if that is shorter; for all the step of
      the solver at x = 0. Where nothing is penalised the gradient vanishes at the solution: G is therefore taken to be at least
      eps^(1/4) times the length of grad f(x0) and, unless `step` is given, eps^(3/8) ||x|| / step.

    Derivatives: `fun` can be differentiated once, with respect to all that f and the penalty depend on, at a constant x (see
    `proxopt.solvers.derivatives`). Differentiating through x raises NotImplementedError where it is seen that x depends on what
    is differentiated: the arrays of a `LeastSquares`, tensors that are attributes of the penalty, x0, the gradient that f
    returns in torch, all that f returns in JAX. What the penalty's methods close over, and what f leaves out of its gradient
    (`torch.autograd.grad` without create_graph), is not seen; there x is a constant.

    Raises:
      TypeError: x0 is not floating point, or of another dtype than the gradient.
      ValueError: x0 does not fit f or is not finite, f(x0) is not finite, or an argument lies out of its domain. Arrays that JAX
        traces are not looked into.

    Sources: Beck and Teboulle, "A fast iterative shrinkage-thresholding algorithm", 2009; Scheinberg, Goldfarb, Bai, "Fast
    first-order methods for composite convex optimization with backtracking", 2014 (steps that grow, and t_k for them);
    O'Donoghue and Candès, "Adaptive restart for accelerated gradient schemes", 2015; Hager and Zhang, "A new conjugate gradient
    method with guaranteed descent and an efficient line search", 2005 (tests by gradients where rounding hides the values).

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
    tol: float | None = None,
    max_iter: int = 10_000,
) -> OptimizeResult:
    """min_x f(x) + penalty(x) by proximal gradient steps, x <- prox(x - step grad f(x), step). All else as in `fista`.

    Sources: Daubechies, Defrise, De Mol, "An iterative thresholding algorithm for linear inverse problems", 2004; ISTA-NAS Eq. 7.

    >>> import numpy as np
    >>> from proxopt import GroupL2
    >>> from proxopt.solvers import LeastSquares
    >>> ista(LeastSquares(np.eye(2), np.array([3.0, 4.0])), GroupL2(1.0, weights="none"), np.zeros(2)).x
    array([2.4, 3.2])
    """
    return _solve(f, penalty, x0, step, tol, max_iter, False, False)


class _Problems:
    """f + penalty over a batch of problems, whose number f's value tells. All that it returns is a constant for differentiation,
    except for `objective`."""

    def __init__(self, f: Any, penalty: Any, x0: Array):
        values, gradient = f(_arrays.detach(x0))  # f may set requires_grad on what it gets
        self.xp = _arrays.namespace(x0)
        self.batch = tuple(getattr(values, "shape", ()))
        shape = tuple(x0.shape)
        if tuple(gradient.shape) != shape or shape[: len(self.batch)] != self.batch:
            raise ValueError(
                f"f must return values with the leading axes of x0 and a gradient of its shape {shape}, got shapes {self.batch}"
                f" and {tuple(gradient.shape)}"
            )
        check_finite("f(x0)", values)
        check_finite("the gradient of f at x0", gradient)
        self.original, self.penalty = f, penalty
        self.f = f.constant() if isinstance(f, LeastSquares) else f
        self.x0 = self.xp.astype(x0, self.xp.result_type(x0, gradient))
        self.sources = _sources(f, penalty, values, gradient)
        self.axes = tuple(range(len(self.batch), x0.ndim))
        self.ones = _arrays.full(self.batch, 1.0, self.x0)
        self.eps = float(self.xp.finfo(self.x0.dtype).eps)
        self.tiny = float(self.xp.finfo(self.x0.dtype).smallest_normal)
        self.longest = float(self.xp.finfo(self.x0.dtype).max) ** 0.5  # step: f may be linear, and let it grow for ever
        self.initial = self.norm(_arrays.detach(gradient))
        self.part = self.f.unpenalised(penalty, x0) if isinstance(f, LeastSquares) else None
        self.resolved = self.ones == 1
        if hasattr(f, "gap"):
            self.least, self.resolved = self._smallest_objective()

    def wide(self, v: Array) -> Array:
        """One number for each problem, against x."""
        return self.xp.reshape(v, (*self.batch, *(1 for _ in self.axes)))

    def sum(self, x: Array) -> Array:
        return self.xp.sum(x, axis=self.axes) if self.axes else x

    def norm(self, x: Array) -> Array:
        """||x|| of each problem, whose squares neither overflow nor underflow."""
        xp = self.xp
        if not _arrays.size(x):
            return 0 * self.ones
        largest = xp.max(xp.abs(x), axis=self.axes) if self.axes else xp.abs(x)
        unit = xp.where((largest > 0) & (largest < math.inf), largest, 1.0)
        return unit * xp.sqrt(self.sum((x / self.wide(unit)) ** 2))

    def smooth(self, x: Array) -> tuple[Array, Array]:
        if self.part is not None:
            return self.f(x)
        value, gradient = self.f(_arrays.detach(x))
        return _arrays.detach(value) + 0 * self.ones, _arrays.detach(gradient)

    def prox(self, x: Array, step: Array) -> Array:
        if not self.batch or getattr(self.penalty, "elementwise", False):
            return _arrays.detach(self.penalty.prox(x, self.wide(step)))
        return self._each(lambda a, s: _arrays.detach(self.penalty.prox(a, s)), x, step)

    def value(self, x: Array) -> Array:
        """penalty(x), one number for each problem."""
        return _arrays.detach(self._value(x))

    def objective(self, x: Array) -> Array:
        """f(x) + penalty(x), as a function of all that they depend on."""
        return self.original(x)[0] + self._value(x)

    def _value(self, x: Array) -> Array:
        if not self.batch:
            return self.penalty.value(x) + 0 * self.ones
        entries = self.penalty.entries(x) if hasattr(self.penalty, "entries") else None
        if entries is not None:
            return self.sum(entries)
        return self._each(lambda a, _: self.penalty.value(a), x, self.ones)

    def _each(self, work: Any, x: Array, step: Array) -> Array:
        rows = self.xp.reshape(x, (-1, *x.shape[len(self.batch) :]))
        steps = self.xp.reshape(step, (-1,))
        done = self.xp.stack([work(rows[i, ...], steps[i]) for i in range(rows.shape[0])])
        return self.xp.reshape(done, (*self.batch, *done.shape[1:]))

    def _smallest_objective(self) -> tuple[Array, Array]:
        """What a gap is at least relative to, where the minimum is 0; and where squares are too small to compute a gap."""
        value, gradient = self.smooth(self.xp.zeros_like(self.x0))
        return self.eps * value, (value >= self.tiny / self.eps) | (self.norm(gradient) == 0)

    def certificate(self, x: Array, step: Array, trusted: Array) -> tuple[str, Array]:
        """Its name, and how far each problem is from the solution, relative to its size.

        trusted: whether the step is about the inverse of the curvature.
        """
        xp = self.xp
        value, gradient = self.smooth(x)
        penalty = self.value(x)
        gap = self._gap(x, penalty)
        if gap is not None:
            size = xp.where(value + penalty < self.least, self.least, value + penalty)
            relative = gap / xp.where(size <= self.tiny, self.tiny, size)
            return "gap", xp.where(self.resolved, relative, math.nan)
        return "residual", self._residual(x, gradient, step, trusted)

    def _gap(self, x: Array, penalty: Array) -> Array | None:
        if not hasattr(self.f, "gap"):
            return None
        gap = self.f.gap(x, self.penalty, penalty, self.part) if self.part is not None else self.f.gap(x, self.penalty, penalty)
        return None if gap is None else _arrays.detach(gap)

    def _residual(self, x: Array, gradient: Array, step: Array, trusted: Array) -> Array:
        """||x - prox(x - s gradient, s)|| / (s G) as `fista` defines it, and what rounding may have hidden of it.

        With the step of the solver for s, one that is too short would let x stay by rounding alone, and one that is too long
        would bring a point far from the solution back to it and call the way short, compared with the step.
        """
        xp = self.xp
        length, slope = self.norm(x), self.norm(gradient)
        least, by_length = self.eps**0.25 * self.initial, self.eps**0.375 * length / step
        least = xp.where(trusted & (by_length > least), by_length, least)
        slope = xp.where(slope < least, least, slope)
        flat = slope == 0  # f is stationary at x and at x0: the prox alone must let x be, with a step as long as can be
        s = xp.where(flat, self.longest, length / xp.where(flat, 1.0, slope))
        s = xp.where((s > 0) & (s <= self.longest), s, step)
        if not getattr(self.penalty, "convex", False):  # the prox of others may not exist for long steps
            s = xp.where(s < step, s, step)
        size = xp.where(flat, length, s * slope)
        move = self.norm(x - self.prox(x - self.wide(s) * gradient, s)) + self.eps * length
        return move / xp.where(size <= self.tiny, self.tiny, size)


def _sources(f: Any, penalty: Any, values: Any, gradient: Array) -> list[Array]:
    """What of f and the penalty may be differentiated, as far as it shows."""
    if _arrays.is_torch_array(gradient):
        parts = [f.A, f.b] if isinstance(f, LeastSquares) else [gradient]
        return parts + [a for a in held_by(penalty) if _arrays.is_torch_array(a)]
    if _arrays.is_numpy_array(gradient) or not is_jax_array(gradient):
        return []
    return [a for a in (gradient, values, *held_by(penalty)) if is_jax_array(a)]


def _solve(
    f: Any, penalty: Any, x0: Array, step: float | None, tol: float | None, max_iter: int, accelerated: bool, restart: bool
) -> OptimizeResult:
    if isinstance(x0, (list, tuple)):
        raise TypeError(f"x0 must be one array, got a {type(x0).__name__} of {len(x0)}")
    (origin,), _ = _arrays.as_list(x0, "x0")
    x0 = _arrays.detach(_arrays.widen(origin))
    check_budget(tol, max_iter)
    if step is not None:
        _checks.in_range("step", step, open_low=True)
    if isinstance(f, LeastSquares):
        f.check_start(x0)
    check_finite("x0", x0)
    problems = _Problems(f, penalty, x0)
    xp, tol = problems.xp, usual_tolerance(problems.x0) if tol is None else tol
    searches = step is None and not hasattr(f, "lipschitz")
    first = _first_step(problems, step, searches)
    name, state = _start(problems, first, step is None and not searches, tol)
    goes_on = lambda s: (s.count < max_iter) & ~xp.all(s.over)

    def advance(s: State) -> State:
        times, over = _least(CHECK_EVERY, int(max_iter) - s.count), s.over
        s = repeat(times, lambda s: _iterate(problems, s, searches, accelerated, restart), s)
        trusted = ~s.loose if step is None else over & ~over
        reached = xp.where(over, s.reached, problems.certificate(s.x, s.step, trusted)[1])
        over = (reached <= tol) | s.over | (problems.sum(s.x * 0) != 0)
        return s._replace(reached=reached, over=over, count=s.count + times)

    end = repeat_while(goes_on, advance, state)
    ok = end.reached <= tol
    reached = xp.where(end.over & ~ok, math.nan, end.reached)
    sources = [*([] if _arrays.is_numpy_array(origin) else [origin]), *problems.sources]
    fun = optimal_value_of(problems.objective, end.x, sources)
    return report(end.x, sources, lambda x: x, fun, name, reached, ok, end.nit, depth=4)


def _first_step(problems: _Problems, step: float | None, searches: bool) -> Array:
    if step is not None or searches:
        return problems.ones * (1.0 if step is None else step)
    bound = _arrays.detach(problems.f.lipschitz())
    return 1 / problems.xp.where(bound > 0, bound, 1.0) * problems.ones


def _start(problems: _Problems, step: Array, trusted: bool, tol: float) -> tuple[str, State]:
    """The name of the certificate, and the state before the first iteration."""
    xp, x0, ones = problems.xp, problems.x0, problems.ones
    no = ones != ones
    name, reached = problems.certificate(x0, step, ~no if trusted else no)
    if name == "residual" and not trusted:  # at x0 = 0 it may depend on a step that is not known to fit
        reached = xp.where(reached <= tol, math.inf, reached)
    over = (reached <= tol) | (problems.sum(x0 * 0) != 0)
    return name, State(
        x=x0,
        change=x0 * 0,
        t=ones * 0,
        step=step,
        loose=no,
        reached=reached,
        over=over | ~problems.resolved if name == "gap" else over,
        nit=xp.astype(no, xp.int32),
        count=0,
    )


def _least(a: int, b: Any) -> Any:
    """min(a, b), where JAX may trace b."""
    return min(a, b) if isinstance(b, int) else _arrays.namespace(b).minimum(b, a)


class _Trial(NamedTuple):
    """A step and what comes of it: momentum t, search point y, prox point x; whether the bound of the step holds, and would hold
    for a step of twice the length; count of trials."""

    step: Array
    t: Array
    y: Array
    x: Array
    fits: Array
    loose: Array
    count: Any


def _iterate(problems: _Problems, s: State, searches: bool, accelerated: bool, restart: bool) -> State:
    xp, over = problems.xp, s.over
    if searches:
        step, t, y, x, fits, loose, _ = _search(problems, s, accelerated)
        s = s._replace(step=step, loose=loose, over=over | ~fits)
        stays = problems.wide(s.over)
    else:
        t, y, _, _, x = _prox_step(problems, s, None, accelerated)
        stays = problems.wide(over)
    change = x - s.x
    if accelerated:
        t = xp.where((problems.sum((y - x) * change) > 0) & restart, 0.0, t)
    return s._replace(x=xp.where(stays, s.x, x), change=change, t=t, nit=s.nit + xp.astype(~over, s.nit.dtype))


def _prox_step(problems: _Problems, s: State, step: Array | None, accelerated: bool) -> tuple[Array, Array, Array, Array, Array]:
    """(t, y, f(y), grad f(y), prox(y - step grad f(y), step)): an iteration as `fista` states it; None is the step before."""
    xp, wide, t, y = problems.xp, problems.wide, s.t, s.x
    if accelerated:
        square = s.t * s.t if step is None else s.step / step * (s.t * s.t)
        t = (1 + xp.sqrt(1 + 4 * square)) / 2
        y = s.x + wide(xp.where(s.t > 0, (s.t - 1) / t, 0.0)) * s.change
    step = s.step if step is None else step
    value, gradient = problems.smooth(y)
    return t, y, value, gradient, problems.prox(y - wide(step) * gradient, step)


def _search(problems: _Problems, s: State, accelerated: bool) -> _Trial:
    """The first of twice the last step, if that may grow, and its halves for which the quadratic bound lies above f."""
    xp = problems.xp

    def attempt(trial: _Trial) -> _Trial:
        t, y, value, gradient, x = _prox_step(problems, s, trial.step, accelerated)
        fits, loose = _bound(problems, y, value, gradient, x, trial.step)
        fits = fits | s.over
        half = xp.where(trial.step > 2 * problems.tiny, trial.step / 2, trial.step)
        return _Trial(xp.where(fits, trial.step, half), t, y, x, fits, loose, trial.count + 1)

    start = _Trial(
        xp.where(s.loose & (s.step < problems.longest), 2 * s.step, s.step), s.t, s.x, s.x, s.over & ~s.over, s.loose, 0
    )
    return repeat_while(lambda trial: (trial.count < HALVINGS) & ~xp.all(trial.fits), attempt, start)


def _bound(problems: _Problems, y: Array, value: Array, gradient: Array, x: Array, step: Array) -> tuple[Array, Array]:
    """Whether f(x) <= f(y) + <grad f(y), x - y> + ||x - y||^2 / (2 step), and whether the step may be doubled."""
    xp, eps, total = problems.xp, problems.eps, problems.sum
    after, gradient_after = problems.smooth(x)
    move = x - y
    square = total(move * move)
    ahead = after - value - total(gradient * move)
    turn = total((gradient_after - gradient) * move)  # the curvature along the move, times its square
    noise = 10 * eps * (xp.abs(value) + xp.abs(after))
    noise_of_turn = 10 * eps * xp.sqrt(square * total(gradient * gradient + gradient_after * gradient_after))
    room = square / (2 * step)
    hidden = room <= 10 * noise
    fits = xp.where(hidden, turn <= 2 * room + noise_of_turn, ahead <= room + noise)
    fits = fits & (room < math.inf) & (xp.abs(after) < math.inf)
    return fits, fits & (turn + noise_of_turn <= room)


def usual_tolerance(x: Array) -> float:
    """What is reached in x's dtype with certainty: 1e-6 in double precision, 1e-4 in single."""
    return 1e-6 if float(_arrays.namespace(x).finfo(x.dtype).eps) < 1e-10 else 1e-4


def check_budget(tol: float | None, max_iter: int) -> None:
    """Refuse a tolerance or a budget out of its domain."""
    if tol is not None:
        _checks.in_range("tol", tol)
    if isinstance(max_iter, bool) or int(max_iter) != max_iter or max_iter < 1:
        raise ValueError(f"max_iter must be a whole number >= 1, got {max_iter!r}")
