"""Proximal gradient methods for min f(x) + penalty(x): ISTA and FISTA, deterministic and with a certificate.

They solve one problem, or a batch in which each problem has its own step length, restarts and end.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from array_api_compat import is_jax_array

from proxopt import _arrays, _checks
from proxopt._arrays import Array
from proxopt._loops import repeat, repeat_while
from proxopt.penalties import ProxOperator
from proxopt.penalties.declared import has_dual
from proxopt.solvers.derivatives import arrays_of, optimal_value_of
from proxopt.solvers.least_squares import LeastSquares, check_finite
from proxopt.solvers.result import OptimizeResult, report

CHECK_EVERY = 10  # iterations between two evaluations of the certificate
MAX_HALVINGS = 60  # of the step, in one iteration


class State(NamedTuple):
    """State of the iteration, with one row or number for each problem.

    Attributes:
      x: the prox point.
      change: x minus the previous prox point.
      t: the momentum parameter t_k; 0 for no momentum.
      step: the step length.
      may_grow: whether twice the step would have satisfied the bound too.
      reached: the certificate.
      done: whether the certificate is within its tolerance, or no finite point or step length was found.
      nit: the number of iterations of the problem.
      count: the number of iterations of the loop.
    """

    x: Array
    change: Array
    t: Array
    step: Array
    may_grow: Array
    reached: Array
    done: Array
    nit: Array
    count: Any


def fista(
    f: Callable[[Array], tuple[Array, Array]],
    penalty: ProxOperator,
    x0: Array,
    *,
    step: float | None = None,
    tol: float | None = None,
    max_iter: int = 10_000,
    restart: bool = True,
) -> OptimizeResult:
    r"""Minimise f(x) + penalty(x) by accelerated proximal gradient steps (FISTA).

    .. math::

        y_k &= x_{k-1} + \frac{t_{k-1} - 1}{t_k} (x_{k-1} - x_{k-2}) \\
        x_k &= \mathrm{prox}(y_k - s_k \nabla f(y_k), \; s_k) \\
        t_k &= \tfrac{1}{2} \Big(1 + \sqrt{1 + 4 (s_{k-1} / s_k) \, t_{k-1}^2}\Big), \qquad t_1 = 1

    with the step length :math:`s_k`.

    Args:
      f: function from x to (f(x), gradient), such as ``LeastSquares(A, b)`` or, in JAX, ``jax.value_and_grad(scalar_f)``. A
        scalar value means one problem; values of shape (B, ...) mean a batch, whose axes are the leading axes of x.
      penalty: any object with ``value(x)`` and ``prox(x, step)``. In a batch it applies to each problem separately; one that
        acts on entries, such as ``L1``, may have a strength for each problem, in a shape that broadcasts against x.
      x0: the starting point, a floating-point array of NumPy, torch or JAX.
      step: the step length. None takes 1 / f.lipschitz() if f has that method, and otherwise a line search, described below.
      tol: the tolerance of the certificate. None means 1e-6 in double precision, 1e-4 in single precision.
      max_iter: the iteration budget. If it is exhausted first, a warning reports the certificate that was reached.
      restart: whether to discard the momentum when it points uphill, <y_k - x_k, x_k - x_{k-1}> > 0.

    Returns:
      A SciPy ``OptimizeResult`` with ``x``, ``fun``, ``gap`` or ``residual`` (the certificate), ``nit``, ``success``,
      ``status`` and ``message``; all but the message have one entry for each problem. The status is 0 for success, 1 if the
      budget was exhausted, 2 if numbers left the range of the dtype, in which case the certificate is NaN. Under ``jax.jit``
      there are no warnings: check ``success``.

    Raises:
      TypeError: x0 is not one floating-point array, its dtype is not that of the gradient, or f does not return a pair.
      ValueError: x0 does not fit f or is not finite, f(x0) is not finite, or an argument is out of its domain. Values that JAX
        traces cannot be checked.

    **Compilation.** Outside of ``jax.jit`` a solve in JAX is compiled once for each program and shape. Numbers that f closes
    over are part of the program, arrays of JAX and the strength are not.

    **Line search.** From 1, each problem halves its step until

    .. math:: f(x) \le f(y) + \langle \nabla f(y), x - y \rangle + \frac{1}{2 s} \|x - y\|^2

    and doubles it after an iteration with :math:`\langle \nabla f(x) - \nabla f(y), x - y \rangle \le \|x - y\|^2 / (2 s)`, in
    which twice the step would have been accepted. Where rounding errors dominate the first inequality,
    :math:`\langle \nabla f(x) - \nabla f(y), x - y \rangle \le \|x - y\|^2 / s` replaces it.

    **Certificates.** ``gap``, for ``LeastSquares`` with a penalty that has a dual (in a batch one that acts on entries, such
    as ``L1``), is an upper bound on the distance of the objective from its minimum, relative to the objective, or to eps times
    the objective at 0 if that is larger. ``LeastSquares.gap`` states the effect of rounding.

    ``residual``, for everything else, is the length of a prox-gradient step with a step length s of its own, plus a bound on
    rounding errors, relative to the gradient:

    .. math:: \frac{\|x - \mathrm{prox}(x - s \nabla f(x), s)\|}{s G} + \frac{\epsilon \|x\|}{s G}, \qquad s = \|x\| / G

    Here :math:`G = \|\nabla f(x)\|`. For penalties that do not declare ``convex = True``, s is at most the step length of the
    solver; at x = 0 it is that step length. If nothing is penalised, the gradient vanishes at the solution. Therefore G is at
    least :math:`\epsilon^{1/4}` times the length of the gradient at x0 and, unless ``step`` is given,
    :math:`\epsilon^{3/8} \|x\|` / step.

    **Derivatives.** ``fun`` can be differentiated once with respect to everything that f and the penalty depend on, with x
    constant (see ``proxopt.solvers.derivatives``). Differentiating through x raises NotImplementedError if x is seen to depend
    on what is differentiated: the arrays of a ``LeastSquares``, tensors that are attributes of the penalty, x0, the gradient
    that f returns in torch, everything that f returns in JAX. Variables that the methods of the penalty close over, and those
    that the gradient of f does not track (``torch.autograd.grad`` without ``create_graph``), cannot be detected; with respect
    to them x is a constant.

    Sources: Beck and Teboulle, "A fast iterative shrinkage-thresholding algorithm", 2009, Eq. 4.1-4.3; Scheinberg, Goldfarb,
    Bai, "Fast first-order methods for composite convex optimization with backtracking", 2014 (growing steps, and t_k for them);
    O'Donoghue and Candès, "Adaptive restart for accelerated gradient schemes", 2015; Hager and Zhang, "A new conjugate gradient
    method with guaranteed descent and an efficient line search", 2005 (acceptance by gradients where rounding dominates the
    values).

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
    penalty: ProxOperator,
    x0: Array,
    *,
    step: float | None = None,
    tol: float | None = None,
    max_iter: int = 10_000,
) -> OptimizeResult:
    r"""Minimise f(x) + penalty(x) by proximal gradient steps (ISTA).

    .. math:: x_k = \mathrm{prox}(x_{k-1} - s_k \nabla f(x_{k-1}), \; s_k)

    with the step length :math:`s_k`. Line search, certificates and derivatives are those of ``fista``.

    Args:
      f: function from x to (f(x), gradient). A scalar value means one problem; values of shape (B, ...) mean a batch, whose
        axes are the leading axes of x. ``LeastSquares(A, b)`` is such a function.
      penalty: any object with ``value(x)`` and ``prox(x, step)``. In a batch it applies to each problem separately; one that
        acts on entries, such as ``L1``, may have a strength for each problem, in a shape that broadcasts against x.
      x0: the starting point, a floating-point array of NumPy, torch or JAX.
      step: the step length. None takes 1 / f.lipschitz() if f has that method, and otherwise a line search.
      tol: the tolerance of the certificate. None means 1e-6 in double precision, 1e-4 in single precision.
      max_iter: the iteration budget. If it is exhausted first, a warning reports the certificate that was reached.

    Returns:
      A SciPy ``OptimizeResult``, as ``fista`` does.

    Raises:
      TypeError: x0 is not one floating-point array, its dtype is not that of the gradient, or f does not return a pair.
      ValueError: x0 does not fit f or is not finite, f(x0) is not finite, or an argument is out of its domain. Values that JAX
        traces cannot be checked.

    Sources: Daubechies, Defrise, De Mol, "An iterative thresholding algorithm for linear inverse problems", 2004; ISTA-NAS, Eq.
    7.

    >>> import numpy as np
    >>> from proxopt import GroupL2
    >>> from proxopt.solvers import LeastSquares
    >>> ista(LeastSquares(np.eye(2), np.array([3.0, 4.0])), GroupL2(1.0, weights="none"), np.zeros(2)).x
    array([2.4, 3.2])
    """
    return _solve(f, penalty, x0, step, tol, max_iter, False, False)


def _pair(returned: Any) -> tuple[Array, Array]:
    """The value and the gradient that f returned."""
    if isinstance(returned, (tuple, list)) and len(returned) == 2:
        return returned[0], returned[1]
    kind = f"a {type(returned).__name__} of {len(returned)}" if isinstance(returned, (tuple, list)) else type(returned).__name__
    raise TypeError(f"f must return (value, gradient), got {kind}: in JAX pass jax.value_and_grad(f) for a scalar f")


class _Problems:
    """A batch of problems min f + penalty, whose shape is that of the value of f.

    All results are constants for automatic differentiation, except for that of ``objective``.
    """

    def __init__(self, f: Any, penalty: Any, x0: Array):
        values, gradient = _pair(f(_arrays.detach(x0)))  # f may set requires_grad on what it gets
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
        self.max_step = float(self.xp.finfo(self.x0.dtype).max) ** 0.5  # for a linear f any step is accepted
        self.initial = self.norm(_arrays.detach(gradient))
        self.part = self.f.unpenalised(penalty, x0) if isinstance(f, LeastSquares) else None
        self.resolved = self.ones == 1
        if hasattr(f, "gap"):
            self.smallest_objective, self.resolved = self._smallest_objective()

    def expand(self, v: Array) -> Array:
        """One number for each problem, in a shape that broadcasts against x."""
        return self.xp.reshape(v, (*self.batch, *(1 for _ in self.axes)))

    def sum(self, x: Array) -> Array:
        """The sum of the entries of each problem."""
        return self.xp.sum(x, axis=self.axes) if self.axes else x

    def norm(self, x: Array) -> Array:
        """||x|| of each problem, scaled such that squares neither overflow nor underflow."""
        xp = self.xp
        if not _arrays.size(x):
            return 0 * self.ones
        largest = xp.max(xp.abs(x), axis=self.axes) if self.axes else xp.abs(x)
        unit = xp.where((largest > 0) & (largest < math.inf), largest, 1.0)
        return unit * xp.sqrt(self.sum((x / self.expand(unit)) ** 2))

    def smooth(self, x: Array) -> tuple[Array, Array]:
        """(f(x), gradient), with one value for each problem."""
        if self.part is not None:
            return self.f(x)
        value, gradient = self.f(_arrays.detach(x))
        return _arrays.detach(value) + 0 * self.ones, _arrays.detach(gradient)

    def prox(self, x: Array, step: Array) -> Array:
        """The prox of the penalty in each problem, with one step for each."""
        if not self.batch or getattr(self.penalty, "elementwise", False):
            return _arrays.detach(self.penalty.prox(x, self.expand(step)))
        return self._each(lambda a, s: _arrays.detach(self.penalty.prox(a, s)), x, step)

    def value(self, x: Array) -> Array:
        """penalty(x), one number for each problem."""
        return _arrays.detach(self._value(x))

    def objective(self, x: Array) -> Array:
        """f(x) + penalty(x), which can be differentiated with respect to everything that they depend on."""
        return self.original(x)[0] + self._value(x)

    def _value(self, x: Array) -> Array:
        if not self.batch:
            return self.penalty.value(x) + 0 * self.ones
        entries = self.penalty.entries(x) if hasattr(self.penalty, "entries") else None
        if entries is not None:
            return self.sum(entries)
        return self._each(lambda a, _: self.penalty.value(a), x, self.ones)

    def _each(self, work: Callable[[Array, Array], Array], x: Array, step: Array) -> Array:
        """Apply ``work(x, step)`` to one problem after another, as a penalty does not support batches."""
        rows = self.xp.reshape(x, (-1, *x.shape[len(self.batch) :]))
        steps = self.xp.reshape(step, (-1,))
        results = self.xp.stack([work(rows[i, ...], steps[i]) for i in range(rows.shape[0])])
        return self.xp.reshape(results, (*self.batch, *results.shape[1:]))

    def _smallest_objective(self) -> tuple[Array, Array]:
        """A lower bound of the objective for relative gaps, as its minimum may be 0; and whether squares suffice for a gap."""
        value, gradient = self.smooth(self.xp.zeros_like(self.x0))
        return self.eps * value, (value >= self.tiny / self.eps) | (self.norm(gradient) == 0)

    def certificate(self, x: Array, step: Array, trusted: Array) -> tuple[str, Array]:
        """The name and the value of the certificate of each problem.

        Args:
          x: the point.
          step: the step length of the solver.
          trusted: whether the step length is known to be about the inverse of the curvature.
        """
        xp = self.xp
        value, gradient = self.smooth(x)
        penalty = self.value(x)
        gap = self._gap(x, penalty)
        if gap is not None:
            size = xp.where(value + penalty < self.smallest_objective, self.smallest_objective, value + penalty)
            size = xp.where(size < math.inf, size, 1.0)  # at a point outside the domain of the penalty, where the gap is infinite
            relative = gap / xp.where(size <= self.tiny, self.tiny, size)
            return "gap", xp.where(self.resolved, relative, math.nan)
        return "residual", self._residual(x, gradient, step, trusted)

    def _gap(self, x: Array, penalty: Array) -> Array | None:
        if not hasattr(self.f, "gap"):
            return None
        gap = self.f.gap(x, self.penalty, penalty, self.part) if self.part is not None else self.f.gap(x, self.penalty, penalty)
        return None if gap is None else _arrays.detach(gap)

    def _residual(self, x: Array, gradient: Array, step: Array, trusted: Array) -> Array:
        """The residual ||x - prox(x - s gradient, s)|| / (s G) defined in ``fista``, plus a bound on its rounding error.

        s is not the step length of the solver: if that is too short, x does not change because of rounding; if it is too long,
        a point far from the solution may return to it, and the distance is small relative to the step.
        """
        xp = self.xp
        length, slope = self.norm(x), self.norm(gradient)
        least, by_length = self.eps**0.25 * self.initial, self.eps**0.375 * length / step
        least = xp.where(trusted & (by_length > least), by_length, least)
        slope = xp.where(slope < least, least, slope)
        flat = slope == 0  # f is stationary at x and x0: x is a solution if the prox does not change it for the longest step
        s = xp.where(flat, self.max_step, length / xp.where(flat, 1.0, slope))
        s = xp.where((s > 0) & (s <= self.max_step), s, step)
        if not getattr(self.penalty, "convex", False):  # other penalties may have no prox for long steps
            s = xp.where(s < step, s, step)
        size = xp.where(flat, length, s * slope)
        move = self.norm(x - self.prox(x - self.expand(s) * gradient, s)) + self.eps * length
        return move / xp.where(size <= self.tiny, self.tiny, size)


def _sources(f: Any, penalty: Any, values: Any, gradient: Array) -> list[Array]:
    """The arrays of f and the penalty that may be differentiated, as far as they can be found."""
    if _arrays.is_torch_array(gradient):
        parts = [f.A, f.b] if isinstance(f, LeastSquares) else [gradient]
        return parts + [a for a in arrays_of(penalty) if _arrays.is_torch_array(a)]
    if _arrays.is_numpy_array(gradient) or not is_jax_array(gradient):
        return []
    return [a for a in (gradient, values, *arrays_of(penalty)) if is_jax_array(a)]


def _solve(
    f: Any, penalty: Any, x0: Array, step: float | None, tol: float | None, max_iter: int, accelerated: bool, restart: bool
) -> OptimizeResult:
    if isinstance(x0, (list, tuple, dict)) or x0 is None:
        size = "" if x0 is None else f" of {len(x0)}"
        raise TypeError(
            f"x0 must be one array, got a {type(x0).__name__}{size}: concatenate the arrays, in JAX with"
            " jax.flatten_util.ravel_pytree; Groups.labels may give the entries of each a group"
        )
    (origin,), _ = _arrays.as_list(x0, "x0")
    x0 = _arrays.detach(_arrays.widen(origin))
    check_budget(tol, max_iter)
    if step is not None:
        _checks.in_range("step", step, open_low=True)
    if isinstance(f, LeastSquares):
        f.check_start(x0)
    check_finite("x0", x0)
    problems = _Problems(f, penalty, x0)
    xp, tol = problems.xp, default_tolerance(problems.x0) if tol is None else tol
    searches = step is None and not hasattr(f, "lipschitz")
    first = _first_step(problems, step, searches)
    name, state = _start(problems, first, step is None and not searches, tol)
    inner = _with_array_strength(problems) if is_jax_array(problems.x0) else problems
    goes_on = lambda s: (s.count < max_iter) & ~xp.all(s.done)

    def advance(s: State) -> State:
        times, done = _minimum(CHECK_EVERY, int(max_iter) - s.count), s.done
        s = repeat(times, lambda s: _iterate(inner, s, searches, accelerated, restart), s)
        trusted = ~s.may_grow if step is None else done & ~done
        reached = xp.where(done, s.reached, inner.certificate(s.x, s.step, trusted)[1])
        done = (reached <= tol) | s.done | (problems.sum(s.x * 0) != 0)
        return s._replace(reached=reached, done=done, count=s.count + times)

    end = repeat_while(goes_on, advance, state)
    ok = end.reached <= tol
    reached = xp.where(end.done & ~ok, math.nan, end.reached)
    sources = [*([] if _arrays.is_numpy_array(origin) else [origin]), *problems.sources]
    fun = optimal_value_of(problems.objective, end.x, sources)
    return report(end.x, sources, lambda x: x, fun, name, reached, ok, end.nit, depth=4)


def _with_array_strength(problems: _Problems) -> _Problems:
    """The same problems with an array as strength, so that JAX need not compile them again for another strength."""
    strength = getattr(problems.penalty, "strength", None)
    if strength is None or not _arrays.is_number(strength) or not hasattr(problems.penalty, "with_strength"):
        return problems
    other = copy.copy(problems)
    other.penalty = problems.penalty.with_strength(_arrays.full((), float(strength), problems.x0))
    batch = len(problems.batch)
    if has_dual(other.penalty, batch) != has_dual(problems.penalty, batch):  # the certificate would be another one
        return problems
    return other


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
    if name == "residual" and not trusted:  # at x0 = 0 it may depend on a step length not yet accepted
        reached = xp.where(reached <= tol, math.inf, reached)
    done = (reached <= tol) | (problems.sum(x0 * 0) != 0)
    return name, State(
        x=x0,
        change=x0 * 0,
        t=ones * 0,
        step=step,
        may_grow=no,
        reached=reached,
        done=done | ~problems.resolved if name == "gap" else done,
        nit=xp.astype(no, xp.int32),
        count=0,
    )


def _minimum(a: int, b: Any) -> Any:
    """min(a, b); JAX may trace b."""
    return min(a, b) if isinstance(b, int) else _arrays.namespace(b).minimum(b, a)


class _Trial(NamedTuple):
    """A step length and the iteration that it yields.

    Attributes:
      step: the step length.
      t: the momentum parameter.
      y: the search point.
      x: the prox point.
      accepted: whether the quadratic bound holds.
      may_grow: whether it would also hold for twice the step length.
      count: the number of trials.
    """

    step: Array
    t: Array
    y: Array
    x: Array
    accepted: Array
    may_grow: Array
    count: Any


def _iterate(problems: _Problems, s: State, searches: bool, accelerated: bool, restart: bool) -> State:
    xp, done = problems.xp, s.done
    if searches:
        step, t, y, x, accepted, may_grow, _ = _search(problems, s, accelerated)
        s = s._replace(step=step, may_grow=may_grow, done=done | ~accepted)
        stays = problems.expand(s.done)
    else:
        t, y, _, _, x = _prox_step(problems, s, None, accelerated)
        stays = problems.expand(done)
    change = x - s.x
    if accelerated:
        t = xp.where((problems.sum((y - x) * change) > 0) & restart, 0.0, t)
    return s._replace(x=xp.where(stays, s.x, x), change=change, t=t, nit=s.nit + xp.astype(~done, s.nit.dtype))


def _prox_step(problems: _Problems, s: State, step: Array | None, accelerated: bool) -> tuple[Array, Array, Array, Array, Array]:
    """(t, y, f(y), grad f(y), prox(y - step grad f(y), step)): an iteration of ``fista``; None means the previous step length."""
    xp, expand, t, y = problems.xp, problems.expand, s.t, s.x
    if accelerated:
        square = s.t * s.t if step is None else s.step / step * (s.t * s.t)
        t = (1 + xp.sqrt(1 + 4 * square)) / 2
        y = s.x + expand(xp.where(s.t > 0, (s.t - 1) / t, 0.0)) * s.change
    step = s.step if step is None else step
    value, gradient = problems.smooth(y)
    return t, y, value, gradient, problems.prox(y - expand(step) * gradient, step)


def _search(problems: _Problems, s: State, accelerated: bool) -> _Trial:
    """Halve the step length, from twice the previous one if that may grow, until the quadratic bound holds in every problem."""
    xp = problems.xp

    def attempt(trial: _Trial) -> _Trial:
        t, y, value, gradient, x = _prox_step(problems, s, trial.step, accelerated)
        accepted, may_grow = _quadratic_bound(problems, y, value, gradient, x, trial.step)
        accepted = accepted | s.done
        half = xp.where(trial.step > 2 * problems.tiny, trial.step / 2, trial.step)
        return _Trial(xp.where(accepted, trial.step, half), t, y, x, accepted, may_grow, trial.count + 1)

    step = xp.where(s.may_grow & (s.step < problems.max_step), 2 * s.step, s.step)
    start = _Trial(step, s.t, s.x, s.x, s.done & ~s.done, s.may_grow, 0)
    return repeat_while(lambda trial: (trial.count < MAX_HALVINGS) & ~xp.all(trial.accepted), attempt, start)


def _quadratic_bound(problems: _Problems, y: Array, value: Array, gradient: Array, x: Array, step: Array) -> tuple[Array, Array]:
    """Whether f(x) <= f(y) + <grad f(y), x - y> + ||x - y||^2 / (2 step), and whether twice the step would be accepted too."""
    xp, eps, total = problems.xp, problems.eps, problems.sum
    value_at_x, gradient_at_x = problems.smooth(x)
    move = x - y
    square = total(move * move)
    remainder = value_at_x - value - total(gradient * move)
    curvature = total((gradient_at_x - gradient) * move)  # along the move, times its squared length
    noise = 10 * eps * (xp.abs(value) + xp.abs(value_at_x))
    curvature_noise = 10 * eps * xp.sqrt(square * total(gradient * gradient + gradient_at_x * gradient_at_x))
    bound = square / (2 * step)
    by_gradients = bound <= 10 * noise  # rounding errors of the values dominate
    accepted = xp.where(by_gradients, curvature <= 2 * bound + curvature_noise, remainder <= bound + noise)
    accepted = accepted & (bound < math.inf) & (xp.abs(value_at_x) < math.inf)
    return accepted, accepted & (curvature + curvature_noise <= bound)


def default_tolerance(x: Array) -> float:
    """A tolerance that can always be reached in the dtype of x: 1e-6 in double precision, 1e-4 in single precision."""
    return 1e-6 if float(_arrays.namespace(x).finfo(x.dtype).eps) < 1e-10 else 1e-4


def check_budget(tol: float | None, max_iter: int) -> None:
    """Raise an error if the tolerance or the iteration budget is out of its domain."""
    if tol is not None:
        _checks.in_range("tol", tol)
    if isinstance(max_iter, bool) or int(max_iter) != max_iter or max_iter < 1:
        raise ValueError(f"max_iter must be a whole number >= 1, got {max_iter!r}")
