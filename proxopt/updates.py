"""One step of ProxSGD, HAPG, ProxAdam and AdamHAPG as pure functions of arrays.

Each function takes the point ``x``, the gradient ``grad`` at that point, the state returned by the previous step (None before
the first) and a penalty, and returns the next ``x`` and the next state. Arrays are those of any array API library; a list of
arrays is one joint problem. Half precision is computed in float32, and its states are float32. The field ``count`` of a state
is the number of steps taken; JAX may trace it.

The torch optimizers and the optax transformations apply these functions; fused implementations there must equal them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from proxopt import _arrays, _checks
from proxopt._arrays import Array, ArrayOrList
from proxopt.penalties import ProxOperator, declared

EXTRAPOLATION = 0.9
"""Default cap of the extrapolation u_t in HAPG and AdamHAPG, in torch and JAX too: without a cap minibatch noise accumulates."""


class ProxSGDState(NamedTuple):
    """State of ``prox_sgd``.

    Attributes:
      velocity: the smoothed gradient v.
      point: the prox point w_hat, exactly sparse.
      count: the number of steps taken.
    """

    velocity: Any
    point: Any
    count: Any

    @classmethod
    def init(cls, x: ArrayOrList, count: Any = 0) -> ProxSGDState:
        """The state before the first step from ``x``."""
        return cls(zeros(x), start(x), count)


class HAPGState(NamedTuple):
    """State of ``hapg``.

    Attributes:
      point: the prox point p_t, exactly sparse.
      count: the number of steps taken, t.
    """

    point: Any
    count: Any

    @classmethod
    def init(cls, x: ArrayOrList, count: Any = 0) -> HAPGState:
        """The state before the first step from ``x``."""
        return cls(start(x), count)


class ProxAdamState(NamedTuple):
    """State of ``prox_adam``.

    Attributes:
      mean: Adam's first moment, without bias correction.
      square: Adam's second moment, without bias correction.
      count: the number of steps taken.
    """

    mean: Any
    square: Any
    count: Any

    @classmethod
    def init(cls, x: ArrayOrList, count: Any = 0) -> ProxAdamState:
        """The state before the first step from ``x``."""
        return cls(zeros(x), zeros(x), count)


class AdamHAPGState(NamedTuple):
    """State of ``adam_hapg``.

    Attributes:
      point: the prox point p_t, exactly sparse.
      mean: Adam's first moment, without bias correction.
      square: Adam's second moment, without bias correction.
      count: the number of steps taken, t.
    """

    point: Any
    mean: Any
    square: Any
    count: Any

    @classmethod
    def init(cls, x: ArrayOrList, count: Any = 0) -> AdamHAPGState:
        """The state before the first step from ``x``."""
        return cls(start(x), zeros(x), zeros(x), count)


def prox_sgd(
    x: ArrayOrList,
    grad: ArrayOrList,
    state: ProxSGDState | None,
    penalty: ProxOperator | None,
    *,
    lr: float | Array,
    rho: float | Array = 0.8,
    tau: float | Array | None = None,
) -> tuple[Any, ProxSGDState]:
    r"""One step of proximal SGD with momentum.

    .. math::

        v_t &= (1 - \rho) v_{t-1} + \rho \, \nabla f(w_{t-1}) \\
        \hat w_t &= \mathrm{prox}(w_{t-1} - v_t / \tau, \; 1 / \tau) \\
        w_t &= w_{t-1} + \eta (\hat w_t - w_{t-1})

    with :math:`\eta` = ``lr``. Here w only decays towards zero; the sparse iterate is ``state.point``, which is :math:`\hat w`.
    With ``tau=None`` the full step is taken, :math:`w_t = \hat w_t = \mathrm{prox}(w_{t-1} - \eta v_t, \eta)`: proximal SGD
    with momentum 1 - rho.

    Args:
      x: the parameters w, an array or a list of arrays (one joint problem).
      grad: the gradient of f at x.
      state: what the previous step returned; None before the first.
      penalty: an object with ``prox(x, step)``; None for the identity. A penalty whose metric is None uses "exact".
      lr: the learning rate, a number or an array that broadcasts against x; epsilon in GSparsity when ``tau`` is given.
      rho: weight of the new gradient, in (0, 1]; 1 is no momentum.
      tau: curvature of the quadratic model, > 0, or None.

    Returns:
      The next x, in its dtype and container, and the next state.

    Source: GSparsity, Eq. 1; Yang et al., "ProxSGD", ICLR 2020.

    >>> import numpy as np
    >>> from proxopt import L1
    >>> x, state = np.array([1.0, 0.05]), None
    >>> x, state = prox_sgd(x, 2 * x, state, L1(1.0), lr=0.1, rho=1.0)
    >>> x
    array([0.7, 0. ])
    """
    state = state or ProxSGDState.init(x)
    velocity = _each(lambda v, g: (1 - rho) * v + rho * g, state.velocity, _wide(grad))
    w = _wide(x)
    if tau is None:
        point = _prox(penalty, _each(lambda wi, v: wi - lr * v, w, velocity), lr, "exact")
        new = point
    else:
        point = _prox(penalty, _each(lambda wi, v: wi - v / tau, w, velocity), 1 / tau, "exact")
        new = _each(lambda wi, p: wi + lr * (p - wi), w, point)
    return _cast(new, x), ProxSGDState(velocity, point, state.count + 1)


def hapg(
    x: ArrayOrList,
    grad: ArrayOrList,
    state: HAPGState | None,
    penalty: ProxOperator | None,
    *,
    lr: float | Array,
    extrapolation: str | float | Array = EXTRAPOLATION,
) -> tuple[Any, HAPGState]:
    r"""One step of HAPG, the hierarchical accelerated proximal gradient method.

    .. math::

        p_t &= \mathrm{prox}(A_{t-1} - \eta \, \nabla f(A_{t-1}), \; \eta) \\
        A_t &= p_t + u_t (p_t - p_{t-1}), \qquad
        u_t = \min\Big(\mathrm{cap}, \max\Big(0, \frac{t-2}{t+1}\Big)\Big)

    with :math:`\eta` = ``lr``. x is the search point A, and ``state.point`` the sparse prox point p. This equals the recursion
    printed in the paper. It stores p in place of the paper's v, so that zeros stay exact under fused multiply-add.

    Args:
      x: the search point A, an array or a list of arrays (one joint problem).
      grad: the gradient of f at x.
      state: what the previous step returned; None before the first.
      penalty: an object with ``prox(x, step)``; None for the identity.
      lr: the learning rate, a number or an array that broadcasts against x.
      extrapolation: the cap, a number in [0, 1]; or "nesterov", the rule of the paper without a cap; or "as_printed", in which
        also u_1 = -1/2. Under gradient noise of variance s^2 and curvature h, the stationary variance is about lr s^2 / (2 h (1
        - cap)); without a cap it tends to s^2 / (2 h^2) for every lr. Use "nesterov" to reproduce the paper, or where gradients
        are exact and the problem is ill-conditioned.

    Returns:
      The next x, in its dtype and container, and the next state.

    Raises:
      ValueError: ``extrapolation`` is out of its domain.

    Source: SparseNAS, Eq. 6-8.

    >>> import numpy as np
    >>> from proxopt import L1
    >>> x, state = np.array([1.0, 0.05]), None
    >>> for _ in range(100):
    ...     x, state = hapg(x, x - 0.5, state, L1(0.2), lr=0.1)
    >>> state.point.round(3)
    array([0.3, 0.3])
    """
    state = state or HAPGState.init(x)
    count = state.count + 1
    z = _each(lambda a, g: a - lr * g, _wide(x), _wide(grad))
    point = _prox(penalty, z, lr, "exact")
    return _cast(_extrapolate(point, state.point, count, extrapolation), x), HAPGState(point, count)


def prox_adam(
    x: ArrayOrList,
    grad: ArrayOrList,
    state: ProxAdamState | None,
    penalty: ProxOperator | None,
    *,
    lr: float | Array,
    betas: tuple[float | Array, float | Array] = (0.9, 0.999),
    eps: float | Array = 1e-8,
    weight_decay: float | Array = 0.0,
) -> tuple[Any, ProxAdamState]:
    r"""One step of Adam or AdamW, followed by the prox in Adam's own metric.

    .. math::

        z = (1 - \eta \, \mathrm{wd}) \, x_{t-1} - \eta_t \hat m_t, \qquad
        x_t = \mathrm{prox}(z, \eta_t), \qquad
        \eta_{t,i} = \frac{\eta}{\sqrt{\hat v_{t,i}} + \epsilon}

    with :math:`\eta` = ``lr``, :math:`\mathrm{wd}` = ``weight_decay`` and the bias-corrected moments :math:`\hat m, \hat v` of
    Adam.

    Args:
      x: the parameters, an array or a list of arrays (one joint problem).
      grad: the gradient of f at x.
      state: what the previous step returned; None before the first.
      penalty: an object with ``prox(x, step)``; None for the identity. A penalty whose metric is None uses "exact".
      lr: the learning rate, a number or an array that broadcasts against x.
      betas: the decay of the two moments, each in [0, 1).
      eps: added to the root of the second moment, >= 0.
      weight_decay: decoupled weight decay, >= 0.

    Returns:
      The next x, in its dtype and container, and the next state.

    Source: Kingma and Ba, "Adam", 2015, Algorithm 1; Yun, Lozano, Yang, "Adaptive proximal gradient methods for structured neural
    networks", 2021.

    >>> import numpy as np
    >>> from proxopt import L1
    >>> x, _ = prox_adam(np.array([1.0, 0.05]), np.array([1.0, 1.0]), None, L1(1.0), lr=0.1)
    >>> x.round(6)
    array([0.8, 0. ])
    """
    state = state or ProxAdamState.init(x)
    mean, square, count, eta, m_hat = _adam(grad, state, lr, betas, eps)
    z = _each(lambda w, e, m: w * (1 - lr * weight_decay) - e * m, _wide(x), eta, m_hat)
    return _cast(_prox(penalty, z, eta, "exact"), x), ProxAdamState(mean, square, count)


def adam_hapg(
    x: ArrayOrList,
    grad: ArrayOrList,
    state: AdamHAPGState | None,
    penalty: ProxOperator | None,
    *,
    lr: float | Array,
    betas: tuple[float | Array, float | Array] = (0.5, 0.999),
    eps: float | Array = 1e-8,
    extrapolation: str | float | Array = EXTRAPOLATION,
) -> tuple[Any, AdamHAPGState]:
    r"""One step of HAPG with the gradient step of Adam.

    .. math::

        p_t = \mathrm{prox}(A_{t-1} - \eta_t \hat m_t, \; \eta_t), \qquad
        A_t = p_t + u_t (p_t - p_{t-1}), \qquad
        \eta_{t,i} = \frac{\eta}{\sqrt{\hat v_{t,i}} + \epsilon}

    with :math:`\eta` = ``lr``, the bias-corrected moments :math:`\hat m, \hat v` of Adam and :math:`u_t` as in ``hapg``.

    Args:
      x: the search point A, an array or a list of arrays (one joint problem).
      grad: the gradient of f at x.
      state: what the previous step returned; None before the first.
      penalty: an object with ``prox(x, step)``; None for the identity. A penalty whose metric is None uses "median", as
        published: the step of each entry in the soft threshold, the median step of the group in the group shrinkage.
      lr: the learning rate, a number or an array that broadcasts against x.
      betas: the decay of the two moments, each in [0, 1).
      eps: added to the root of the second moment, >= 0.
      extrapolation: as in ``hapg``. Without a cap the error under gradient noise grows without bound: for u = 1 and beta_1 =
        1/2 the lag of the first moment cancels the damping by the gradient step.

    Returns:
      The next x, in its dtype and container, and the next state.

    Raises:
      ValueError: ``extrapolation`` is out of its domain.

    Source: SparseNAS, section "Hierarchical Proximal Optimization".

    >>> import numpy as np
    >>> from proxopt import L1
    >>> x, state = adam_hapg(np.array([1.0, 0.05]), np.array([1.0, 1.0]), None, L1(1.0), lr=0.1)
    >>> state.point.round(6)
    array([0.8, 0. ])
    """
    state = state or AdamHAPGState.init(x)
    mean, square, count, eta, m_hat = _adam(grad, state, lr, betas, eps)
    z = _each(lambda a, e, m: a - e * m, _wide(x), eta, m_hat)
    point = _prox(penalty, z, eta, "median")
    return _cast(_extrapolate(point, state.point, count, extrapolation), x), AdamHAPGState(point, mean, square, count)


def momentum(count: Any, extrapolation: str | float | Array = EXTRAPOLATION) -> Any:
    r"""The extrapolation coefficient u_t of HAPG at step t.

    .. math:: u_t = \min\Big(\mathrm{cap}, \max\Big(0, \frac{t-2}{t+1}\Big)\Big)

    Args:
      count: the number t of the step, from 1; JAX may trace it.
      extrapolation: the cap; "nesterov" for none; "as_printed" for none, and without the lower bound 0.

    Raises:
      ValueError: ``extrapolation`` is out of its domain.

    Source: SparseNAS, Eq. 6-8.

    >>> momentum(10), momentum(100), momentum(1, "as_printed")
    (0.7272727272727273, 0.9, -0.5)
    """
    check_extrapolation(extrapolation)
    u = (count - 2) / (count + 1)
    if isinstance(extrapolation, str):
        return u if extrapolation == "as_printed" else _at_least_0(u)
    return _at_most(_at_least_0(u), extrapolation)


def check_extrapolation(extrapolation: Any) -> None:
    """Raise an error unless ``extrapolation`` is "nesterov", "as_printed" or a number in [0, 1]."""
    if isinstance(extrapolation, str):
        _checks.one_of("extrapolation", extrapolation, ("nesterov", "as_printed"))
    else:
        _checks.in_range("extrapolation", extrapolation, 0, 1)


def zeros(x: ArrayOrList) -> Any:
    """Zeros of the shape of x, in the precision of states."""
    return _each(lambda a: _arrays.namespace(a).zeros_like(a), _wide(x))


def start(x: ArrayOrList) -> Any:
    """The prox point p_0 = A_0 before the first step: a copy of x in the precision of states."""
    return _each(lambda a: a * 1, _wide(x))


def _adam(grad: Any, state: Any, lr: Any, betas: tuple[Any, Any], eps: Any) -> tuple[Any, Any, Any, Any, Any]:
    """(mean, square, count, eta, m_hat): Adam's moments, the step of each entry and the bias-corrected first moment."""
    b1, b2 = betas
    count = state.count + 1
    grad = _wide(grad)
    mean = _each(lambda m, g: b1 * m + (1 - b1) * g, state.mean, grad)
    square = _each(lambda v, g: b2 * v + (1 - b2) * (g * g), state.square, grad)
    eta = _each(lambda v: lr / (_arrays.root(v / (1 - b2**count)) + eps), square)
    return mean, square, count, eta, _each(lambda m: m / (1 - b1**count), mean)


def _at_least_0(u: Any) -> Any:
    return max(float(u), 0.0) if _arrays.is_number(u) else _arrays.namespace(u).where(u > 0, u, 0 * u)


def _at_most(u: Any, cap: Any) -> Any:
    """min(u, cap); JAX may trace either."""
    arrays = [v for v in (u, cap) if not _arrays.is_number(v)]
    if not arrays:
        return min(u, float(cap))
    xp = _arrays.namespace(*arrays)
    one = xp.ones_like(arrays[0])
    return xp.where(u < cap, u * one, cap * one)


def _extrapolate(point: Any, previous: Any, count: Any, extrapolation: Any) -> Any:
    """p_t + u_t (p_t - p_{t-1})"""
    u = momentum(count, extrapolation)
    return _each(lambda p, q: p + _arrays.like(u, p) * (p - q), point, previous)


def _prox(penalty: ProxOperator | None, z: Any, step: Any, metric: str) -> Any:
    """The prox of the penalty at z, with ``metric`` where it leaves the metric to its caller."""
    if penalty is None:
        return z
    return declared.with_metric(penalty, metric).prox(z, step)


def _each(f: Callable[..., Any], first: Any, *rest: Any) -> Any:
    """Apply f to arrays, or to the corresponding arrays of lists."""
    return [f(*xs) for xs in zip(first, *rest)] if isinstance(first, (list, tuple)) else f(first, *rest)


def _wide(x: Any) -> Any:
    """x with half precision in float32."""
    return _each(_arrays.widen, x)


def _cast(new: Any, x: Any) -> Any:
    """``new`` in the dtypes and the container of x."""
    return type(x)(_each(_arrays.cast, new, x)) if isinstance(x, (list, tuple)) else _arrays.cast(new, x)
