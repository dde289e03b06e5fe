"""ProxSGD, HAPG, ProxAdam and AdamHAPG as optax transformations.

The maths is `proxopt.updates`: its states are the states here, with trees for arrays. Each leaf of the parameters, or each
joint set of leaves, goes through its pure function.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from proxopt import _arrays, _checks, updates
from proxopt_jax.steps import NO_PARAMS, any_sharding, at, difference, like_state
from proxopt_jax.trees import Penalties, paths


def prox_sgd(
    learning_rate: optax.ScalarOrSchedule,
    penalty: Any,
    rho: Any = 0.8,
    tau: Any = None,
    *,
    strength: Any = None,
    joint: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Proximal SGD with momentum: minimises f(w) + penalty(w), with exact zeros.

        v <- (1 - rho) v + rho g
        tau=None:  w <- prox(w - lr v, lr)
        tau > 0:   w_hat = prox(w - v / tau, 1 / tau),   w <- w + lr (w_hat - w)

    With `tau=None` the parameters themselves are sparse. With `tau` (GSparsity) w only decays towards zero, and `prox_point`
    gives w_hat. At rest exactly at the stationary points of f + penalty.

    Args:
      learning_rate: a number >= 0 or a schedule; epsilon in GSparsity when tau is given.
      rho: weight of the new gradient, in (0, 1]; 1 is no momentum.
      tau: curvature of the model step, > 0, or None.SHARED

    Source: GSparsity, Eq. 1; Yang et al., "ProxSGD", ICLR 2020.

    >>> import jax.numpy as jnp, optax, proxopt_jax
    >>> from proxopt import L1
    >>> w = jnp.array([1.0, 0.01])
    >>> tx = proxopt_jax.prox_sgd(0.1, L1(0.5))
    >>> update, state = tx.update(2 * w, tx.init(w), w)
    >>> optax.apply_updates(w, update).round(3)
    Array([0.79, 0.  ], dtype=float32)
    """
    _checks.in_range("rho", rho, 0, 1, open_low=True)
    if tau is not None:
        _checks.in_range("tau", tau, open_low=True)
    kept = ("velocity",) if tau is None else ("velocity", "point")
    options = {"rho": rho, "tau": tau}
    return _optimizer(updates.prox_sgd, updates.ProxSGDState, kept, learning_rate, Penalties(penalty, strength, joint), options)


def hapg(
    learning_rate: optax.ScalarOrSchedule,
    penalty: Any,
    extrapolation: Any = updates.EXTRAPOLATION,
    *,
    strength: Any = None,
    joint: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Hierarchical accelerated proximal gradient: minimises f(A) + penalty(A), with exact zeros.

        p_t = prox(A_{t-1} - lr g_{t-1}, lr),   A_t = p_t + u_t (p_t - p_{t-1}),   u_t = min(cap, max(0, (t-2)/(t+1)))

    The parameters are the search point A; `prox_point` gives p, which is exactly sparse: evaluate, report and prune that. A
    leaf without penalty follows the same recursion with prox = identity. At rest exactly at the stationary points of f + penalty.

    Args:
      learning_rate: a number >= 0 or a schedule.
      extrapolation: the cap, a number in [0, 1]; or "nesterov", the rule of the paper without a cap; or "as_printed", which has
        u_1 = -1/2 as well. Without a cap minibatch noise accumulates: the error it leaves does not fall with the lr. Pass
        "nesterov" to reproduce the paper, or where gradients are exact and the problem is ill-conditioned.SHARED

    Source: SparseNAS Eq. 6-8.

    >>> import jax.numpy as jnp, optax, proxopt_jax
    >>> from proxopt import GroupL2, Groups
    >>> w = {"kernel": jnp.array([[1.0, 0.1], [1.0, 0.1]]), "bias": jnp.zeros(2)}
    >>> tx = proxopt_jax.hapg(0.1, [("kernel", GroupL2(2.0, Groups.along(0)))])
    >>> update, state = tx.update(w, tx.init(w), w)
    >>> point = proxopt_jax.prox_point(state, optax.apply_updates(w, update))
    >>> point["kernel"] == 0
    Array([[False,  True],
           [False,  True]], dtype=bool)
    """
    updates.check_extrapolation(extrapolation)
    options = {"extrapolation": extrapolation}
    return _optimizer(updates.hapg, updates.HAPGState, ("point",), learning_rate, Penalties(penalty, strength, joint), options)


def prox_adam(
    learning_rate: optax.ScalarOrSchedule,
    penalty: Any,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
    *,
    strength: Any = None,
    joint: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Adam or AdamW, then the prox in Adam's own metric: exact zeros, the everyday choice.

        z = (1 - lr weight_decay) w - eta m_hat,   w <- prox(z, eta),   eta_i = lr / (sqrt(v_hat_i) + eps)

    The parameters themselves are sparse after each step. At rest exactly at the stationary points of f + penalty with the exact
    metric (what a penalty's `metric=None` means here) and no decay.

    Args:
      learning_rate: a number >= 0 or a schedule.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the root of the second moment, >= 0.
      weight_decay: decoupled, as in AdamW.SHARED

    Source: Kingma and Ba, "Adam", 2015; Yun, Lozano, Yang, "Adaptive proximal gradient methods for structured neural
    networks", 2021.

    >>> import jax.numpy as jnp, optax, proxopt_jax
    >>> from proxopt import L1
    >>> w = jnp.array([1.0, 0.01])
    >>> tx = proxopt_jax.prox_adam(0.1, L1(0.5))
    >>> update, state = tx.update(2 * w, tx.init(w), w)
    >>> [round(float(v), 3) for v in optax.apply_updates(w, update)]
    [0.875, 0.0]
    """
    _check_adam(b1, b2, eps)
    _checks.in_range("weight_decay", weight_decay)
    options = {"betas": (b1, b2), "eps": eps, "weight_decay": weight_decay}
    penalties = Penalties(penalty, strength, joint)
    return _optimizer(updates.prox_adam, updates.ProxAdamState, ("mean", "square"), learning_rate, penalties, options)


def adam_hapg(
    learning_rate: optax.ScalarOrSchedule,
    penalty: Any,
    b1: Any = 0.5,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    extrapolation: Any = updates.EXTRAPOLATION,
    *,
    strength: Any = None,
    joint: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """HAPG with Adam's gradient step: minimises f(A) + penalty(A), with exact zeros.

        p_t = prox(A_{t-1} - eta m_hat, eta),   A_t = p_t + u_t (p_t - p_{t-1}),   eta_i = lr / (sqrt(v_hat_i) + eps)

    The parameters are the search point A; `prox_point` gives p, which is exactly sparse. A penalty's `metric=None` means
    "median" here, the published rule; with "exact" the method rests exactly at the stationary points of f + penalty.

    Args:
      learning_rate: a number >= 0 or a schedule.
      b1: decay of the first moment, in [0, 1). The extrapolation is momentum already: b1 above 0.8 with uncapped extrapolation
        warns, it may diverge.
      b2: decay of the second moment, in [0, 1).
      eps: added to the root of the second moment, >= 0.
      extrapolation: the cap, a number in [0, 1]; or "nesterov", the rule of the paper without a cap; or "as_printed", which has
        u_1 = -1/2 as well. Without a cap minibatch noise accumulates without bound, at any lr. Pass "nesterov" to reproduce the
        paper, or where gradients are exact and the problem is ill-conditioned.SHARED

    Source: SparseNAS, section "Hierarchical Proximal Optimization".

    >>> import jax.numpy as jnp, optax, proxopt_jax
    >>> from proxopt import SparseGroupLasso
    >>> w = {"alpha": jnp.array([1.0, 0.01]), "beta": jnp.array([0.02, 0.01])}
    >>> tx = proxopt_jax.adam_hapg(0.1, SparseGroupLasso(1.0))
    >>> update, state = tx.update(w, tx.init(w), w)
    >>> sum(int((p == 0).sum()) for p in proxopt_jax.prox_point(state, w).values())
    4
    """
    _check_adam(b1, b2, eps)
    updates.check_extrapolation(extrapolation)
    if _arrays.is_number(b1) and b1 > 0.8 and isinstance(extrapolation, str):
        warnings.warn(
            f"b1 = {b1} with uncapped extrapolation may diverge, the extrapolation is momentum already: take b1=0.5",
            stacklevel=2,
        )
    options = {"betas": (b1, b2), "eps": eps, "extrapolation": extrapolation}
    penalties = Penalties(penalty, strength, joint)
    return _optimizer(updates.adam_hapg, updates.AdamHAPGState, ("point", "mean", "square"), learning_rate, penalties, options)


def _optimizer(
    step: Callable[..., tuple[Any, Any]],
    state_type: Any,
    kept: tuple[str, ...],
    learning_rate: Any,
    penalties: Penalties,
    options: dict,
) -> optax.GradientTransformationExtraArgs:
    """`step` of `proxopt.updates` over the leaves of a tree; of its state the fields in `kept` are stored."""
    if not callable(learning_rate):
        _checks.in_range("learning_rate", learning_rate)
    adam = "square" in kept
    state_of = partial(state_type, **dict.fromkeys(set(state_type._fields) - {*kept, "count"}))

    def init(params: Any) -> Any:
        _check_dtypes(params, real=adam)
        penalties.check(params, lambda problem, x: step(x, x, None, problem.penalty, lr=1.0, **options))
        arrays = jax.tree.map(jnp.asarray, params)
        fields = {f: jax.tree.map(updates.start if f == "point" else updates.zeros, arrays) for f in kept}
        return state_of(**fields, count=jnp.zeros((), jnp.int32))

    def update(grads: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        del extra
        if params is None:
            raise ValueError(NO_PARAMS)
        treedef: Any = jax.tree.structure(params)
        xs = [jnp.asarray(x) for x in jax.tree.leaves(params)]
        gs = [None if g is None else jnp.asarray(g) for g in treedef.flatten_up_to(grads)]
        fields = {f: treedef.flatten_up_to(getattr(state, f)) for f in kept}
        deltas: list = [None] * len(xs)
        count = optax.safe_increment(state.count)
        lr = at(learning_rate, state.count)
        for problem in penalties.problems(params, state.count):
            if any(gs[i] is None for i in problem.where):
                continue
            x, g = problem.take(xs), problem.take(gs)
            old = {f: problem.take(fields[f]) for f in kept}

            def one(x: Any, g: Any, old: dict, penalty: Any = problem.penalty) -> tuple[Any, dict]:
                before = state_of(**old, count=like_state(count - 1, x))
                new, after = step(x, g, before, penalty, lr=like_state(lr, x), **options)
                return new, {f: jax.tree.map(lambda n, o: n.astype(o.dtype), getattr(after, f), old[f]) for f in kept}

            new, after = any_sharding(one, (x, old))(x, g, old)
            problem.put(deltas, jax.tree.map(difference, new, x, g))
            for f in kept:
                problem.put(fields[f], after[f])
        trees = {f: treedef.unflatten(fields[f]) for f in kept}
        return treedef.unflatten(deltas), state_of(**trees, count=count)

    return optax.GradientTransformationExtraArgs(init, update)


def _check_dtypes(params: Any, *, real: bool) -> None:
    for name, leaf in zip(paths(params), jax.tree.leaves(params)):
        x = jnp.asarray(leaf)
        if not _arrays.is_floating(x):
            raise TypeError(f"params leaf {name!r} must be floating point, got {x.dtype}: hide it with optax.masked")
        if real and _arrays.is_complex(x):
            raise TypeError(f"params leaf {name!r} must be real for Adam's moments, got {x.dtype}: take hapg or prox_sgd")


def _check_adam(b1: Any, b2: Any, eps: Any) -> None:
    for name, beta in (("b1", b1), ("b2", b2)):
        _checks.in_range(name, beta, 0, 1)
        if _arrays.is_number(beta) and beta == 1:
            raise ValueError(f"{name} must lie in [0, 1), got {beta}")
    _checks.in_range("eps", eps)


_SHARED = """
      penalty: a penalty, a list of (path pattern, penalty), a tree of penalties, or None; see `proxopt_jax.trees`.
      strength: a number or a schedule that replaces the strength of every penalty.
      joint: leaves that share one penalty object are one problem: `Groups.whole()` and labels then span leaves.

    Returns:
      An `optax.GradientTransformationExtraArgs`, whose `update` needs `params`. States are float32 for half-precision parameters.

    Raises:
      ValueError: an argument out of its domain; at `init`, groups that do not fit a leaf and patterns that decide none.
      TypeError: a penalty that is none; at `init`, a leaf that is not floating point."""

for _f in (prox_sgd, hapg, prox_adam, adam_hapg):
    _f.__doc__ = (_f.__doc__ or "").replace("SHARED", _SHARED)
