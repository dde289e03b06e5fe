"""One step of ProxSGD, HAPG, ProxAdam and AdamHAPG as pure functions of arrays.

Each takes the point `x` where the gradient `grad` was taken, the state of the last step (None before the first), a
penalty (None means none), and returns the next `x` and the next state. Arrays are of any array API library; a
list of arrays is one joint problem. Half precision is computed in float32, states are float32 then. `lr` is a number or
an array that broadcasts; `count` in a state counts the steps taken and may be traced.

The torch optimizers and the optax transformations are these functions; whatever is faster there must equal them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from proxopt import _arrays, _checks
from proxopt.penalties import declared

EXTRAPOLATION = 0.9
"""Default of HAPG and AdamHAPG here, in torch and in JAX: u_t is capped, because without a cap minibatch noise accumulates."""


class ProxSGDState(NamedTuple):
    """velocity: smoothed gradient v. point: prox point w_hat."""

    velocity: Any
    point: Any
    count: Any

    @classmethod
    def init(cls, x: Any, count: Any = 0) -> ProxSGDState:
        return cls(zeros(x), start(x), count)


class HAPGState(NamedTuple):
    """point: prox point p_t, exactly sparse. count: t."""

    point: Any
    count: Any

    @classmethod
    def init(cls, x: Any, count: Any = 0) -> HAPGState:
        return cls(start(x), count)


class ProxAdamState(NamedTuple):
    """mean, square: Adam's moments, not bias-corrected."""

    mean: Any
    square: Any
    count: Any

    @classmethod
    def init(cls, x: Any, count: Any = 0) -> ProxAdamState:
        return cls(zeros(x), zeros(x), count)


class AdamHAPGState(NamedTuple):
    """point: prox point p_t, exactly sparse. mean, square: Adam's moments. count: t."""

    point: Any
    mean: Any
    square: Any
    count: Any

    @classmethod
    def init(cls, x: Any, count: Any = 0) -> AdamHAPGState:
        return cls(start(x), zeros(x), zeros(x), count)


def prox_sgd(
    x: Any, grad: Any, state: ProxSGDState | None, penalty: Any, *, lr: Any, rho: Any = 0.8, tau: Any = None
) -> tuple[Any, ProxSGDState]:
    """v <- (1 - rho) v + rho g,   w_hat = prox(w - v / tau, 1 / tau),   w <- w + lr (w_hat - w)

    With `tau=None` the full step: w <- prox(w - lr v, lr), plain proximal SGD with momentum 1 - rho. Otherwise w only
    decays towards zero, and `state.point`, which is w_hat, is the sparse iterate.

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
    x: Any, grad: Any, state: HAPGState | None, penalty: Any, *, lr: Any, extrapolation: str | float = EXTRAPOLATION
) -> tuple[Any, HAPGState]:
    """p_t = prox(A_{t-1} - lr g_{t-1}, lr),   A_t = p_t + u_t (p_t - p_{t-1}),   u_t = min(cap, max(0, (t-2)/(t+1)))

    x is the search point A, `state.point` the sparse prox point p. It equals the recursion printed in the paper, with p in
    place of v, so that zeros stay exact under fused multiply-add.

    Args:
      extrapolation: the cap, a number in [0, 1]; or "nesterov", the rule of the paper without a cap; or "as_printed", which has
        u_1 = -1/2 as well. With gradient noise of variance s^2 and curvature h, the stationary variance is about
        lr s^2 / (2 h (1 - cap)); without a cap it tends to s^2 / (2 h^2), whatever the lr. Pass "nesterov" to reproduce the
        paper, or where gradients are exact and the problem is ill-conditioned.

    Source: SparseNAS Eq. 6-8.

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
    x: Any,
    grad: Any,
    state: ProxAdamState | None,
    penalty: Any,
    *,
    lr: Any,
    betas: tuple[Any, Any] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: Any = 0.0,
) -> tuple[Any, ProxAdamState]:
    """z = (1 - lr weight_decay) x - eta m_hat,   x <- prox(z, eta),   eta_i = lr / (sqrt(v_hat_i) + eps)

    Adam (AdamW with decay), then the prox in Adam's own metric, exact unless the penalty says otherwise.

    Source: Kingma and Ba, "Adam", 2015, Algorithm 1; Yun, Lozano, Yang, "Adaptive proximal gradient methods", 2021.

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
    x: Any,
    grad: Any,
    state: AdamHAPGState | None,
    penalty: Any,
    *,
    lr: Any,
    betas: tuple[Any, Any] = (0.5, 0.999),
    eps: float = 1e-8,
    extrapolation: str | float = EXTRAPOLATION,
) -> tuple[Any, AdamHAPGState]:
    """p_t = prox(A_{t-1} - eta m_hat, eta),   A_t = p_t + u_t (p_t - p_{t-1}),   eta_i = lr / (sqrt(v_hat_i) + eps)

    HAPG with Adam's gradient step. Unless the penalty says otherwise its metric is "median", as published: each entry's own
    step in the soft threshold, the group's median step in the group shrink.

    Args:
      extrapolation: as in `hapg`. Without a cap the error under gradient noise grows without bound: at u = 1 and b1 = 1/2 the lag
        of the first moment cancels the damping that the gradient step gives.

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


def momentum(count: Any, extrapolation: str | float = EXTRAPOLATION) -> Any:
    """u_t of SparseNAS: max(0, (t-2)/(t+1)) with a cap, or without ("nesterov"), or as printed (u_1 = -1/2)."""
    check_extrapolation(extrapolation)
    u = (count - 2) / (count + 1)
    if isinstance(extrapolation, str):
        return u if extrapolation == "as_printed" else _at_least_0(u)
    return _at_most(_at_least_0(u), extrapolation)


def check_extrapolation(extrapolation: Any) -> None:
    """Raise unless it is "nesterov", "as_printed" or a number in [0, 1]."""
    if isinstance(extrapolation, str):
        _checks.one_of("extrapolation", extrapolation, ("nesterov", "as_printed"))
    else:
        _checks.in_range("extrapolation", extrapolation, 0, 1)


def zeros(x: Any) -> Any:
    """Zeros of x's shape in the precision that states have."""
    return _each(lambda a: _arrays.namespace(a).zeros_like(a), _wide(x))


def start(x: Any) -> Any:
    """p_0 = A_0, a copy in the precision that states have."""
    return _each(lambda a: a * 1, _wide(x))


def _adam(grad: Any, state: Any, lr: Any, betas: tuple[Any, Any], eps: float) -> tuple[Any, Any, Any, Any, Any]:
    """Adam's moments, the step of each entry, and the bias-corrected mean."""
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
    """min(u, cap), where either may be a traced array."""
    arrays = [v for v in (u, cap) if not _arrays.is_number(v)]
    if not arrays:
        return min(u, float(cap))
    xp = _arrays.namespace(*arrays)
    one = xp.ones_like(arrays[0])
    return xp.where(u < cap, u * one, cap * one)


def _extrapolate(point: Any, last: Any, count: Any, extrapolation: str | float) -> Any:
    u = momentum(count, extrapolation)
    return _each(lambda p, q: p + _arrays.like(u, p) * (p - q), point, last)


def _prox(penalty: Any, z: Any, step: Any, metric: str) -> Any:
    if penalty is None:
        return z
    return declared.with_metric(penalty, metric).prox(z, step)


def _each(f: Callable[..., Any], first: Any, *rest: Any) -> Any:
    """f of an array, or of the arrays of matching lists."""
    return [f(*xs) for xs in zip(first, *rest)] if isinstance(first, (list, tuple)) else f(first, *rest)


def _wide(x: Any) -> Any:
    return _each(_arrays.widen, x)


def _cast(new: Any, x: Any) -> Any:
    return type(x)(_each(_arrays.cast, new, x)) if isinstance(x, (list, tuple)) else _arrays.cast(new, x)
