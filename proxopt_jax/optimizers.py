"""ProxSGD, HAPG, ProxAdam and AdamHAPG as optax transformations.

The mathematics is that of ``proxopt.updates``: the states here are the states defined there, with trees in place of arrays. Its
pure functions are applied to each leaf of the parameters, or to each set of leaves that form a joint problem.
"""

# no deferred annotations in this module: tools for optax compare them with optax.ScalarOrSchedule

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from proxopt import _arrays, _checks, updates
from proxopt_jax.kernels import fused
from proxopt_jax.states import AdamHAPGState, ProxAdamState
from proxopt_jax.steps import (
    NO_PARAMS,
    any_sharding,
    as_array,
    at,
    difference,
    is_floating,
    like_state,
    warn_below_half_ulp,
)
from proxopt_jax.trees import Penalties, PenaltyTree, paths


def prox_sgd(
    learning_rate: optax.ScalarOrSchedule,
    penalty: PenaltyTree,
    rho: float | jax.Array = 0.8,
    tau: float | jax.Array | None = None,
    *,
    strength: optax.ScalarOrSchedule | None = None,
    joint: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Proximal SGD with momentum for min f(w) + penalty(w), with exact zeros.

    .. math::

        v_t &= (1 - \rho) v_{t-1} + \rho \, \nabla f(w_{t-1}) \\
        \text{without } \tau: \quad w_t &= \mathrm{prox}(w_{t-1} - \eta v_t, \; \eta) \\
        \text{with } \tau: \quad \hat w_t &= \mathrm{prox}(w_{t-1} - v_t / \tau, \; 1 / \tau), \quad
        w_t = w_{t-1} + \eta (\hat w_t - w_{t-1})

    with :math:`\eta` = ``learning_rate``. With ``tau=None`` the parameters themselves are sparse. With ``tau`` (GSparsity) they
    only decay towards zero, and ``prox_point`` returns the sparse :math:`\hat w_t`. The fixed points are exactly the stationary
    points of f + penalty.

    Args:
      learning_rate: a number >= 0 or a schedule; epsilon in GSparsity when ``tau`` is given.
      penalty: a penalty, a list of (path pattern, penalty), a tree of penalties, or None; see ``proxopt_jax.trees``.
      rho: weight of the new gradient, in (0, 1]; 1 is no momentum.
      tau: curvature of the quadratic model, > 0, or None.
      strength: a number or a schedule that replaces the strength of every penalty; None leaves them as they are.
      joint: treat the leaves that share one penalty object as one problem, so that ``Groups.whole()`` and ``Groups.labels``
        span them.

    Returns:
      An ``optax.GradientTransformationExtraArgs``, whose ``update`` needs ``params``. The state is float32 for half-precision
      parameters. Leaves of integers and of keys have no state and do not change.

    Raises:
      ValueError: an argument is out of its domain; at ``init``, groups do not fit a leaf or a pattern decides no leaf.
      TypeError: ``penalty`` is not a penalty; at ``init``, a leaf with a penalty is not floating point.

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
    penalty: PenaltyTree,
    extrapolation: str | float | jax.Array = updates.EXTRAPOLATION,
    *,
    strength: optax.ScalarOrSchedule | None = None,
    joint: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Hierarchical accelerated proximal gradient (HAPG) for min f(A) + penalty(A), with exact zeros.

    .. math::

        p_t &= \mathrm{prox}(A_{t-1} - \eta \, \nabla f(A_{t-1}), \; \eta) \\
        A_t &= p_t + u_t (p_t - p_{t-1}), \qquad
        u_t = \min\Big(\mathrm{cap}, \max\Big(0, \frac{t-2}{t+1}\Big)\Big)

    with :math:`\eta` = ``learning_rate``. The parameters are the search point A; ``prox_point`` returns p, which is exactly
    sparse: evaluate, report and prune that. A leaf without penalty follows the same recursion with the identity for the prox.
    The fixed points are exactly the stationary points of f + penalty.

    Args:
      learning_rate: a number >= 0 or a schedule.
      penalty: a penalty, a list of (path pattern, penalty), a tree of penalties, or None; see ``proxopt_jax.trees``.
      extrapolation: the cap, a number in [0, 1]; or "nesterov", the rule of the paper without a cap; or "as_printed", in which
        also u_1 = -1/2. Without a cap minibatch noise accumulates: the error that it causes does not fall with the learning
        rate. Use "nesterov" to reproduce the paper, or where gradients are exact and the problem is ill-conditioned.
      strength: a number or a schedule that replaces the strength of every penalty; None leaves them as they are.
      joint: treat the leaves that share one penalty object as one problem, so that ``Groups.whole()`` and ``Groups.labels``
        span them.

    Returns:
      An ``optax.GradientTransformationExtraArgs``, whose ``update`` needs ``params``. The state is float32 for half-precision
      parameters. Leaves of integers and of keys have no state and do not change.

    Raises:
      ValueError: an argument is out of its domain; at ``init``, groups do not fit a leaf or a pattern decides no leaf.
      TypeError: ``penalty`` is not a penalty; at ``init``, a leaf with a penalty is not floating point.

    Source: SparseNAS, Eq. 6-8.

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
    penalty: PenaltyTree,
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.999,
    eps: float | jax.Array = 1e-8,
    weight_decay: float | jax.Array = 0.0,
    *,
    strength: optax.ScalarOrSchedule | None = None,
    joint: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam or AdamW followed by the prox in Adam's own metric, with exact zeros: the everyday choice.

    .. math::

        z = (1 - \eta \, \mathrm{wd}) \, w_{t-1} - \eta_t \hat m_t, \qquad
        w_t = \mathrm{prox}(z, \eta_t), \qquad
        \eta_{t,i} = \frac{\eta}{\sqrt{\hat v_{t,i}} + \epsilon}

    with :math:`\eta` = ``learning_rate``, :math:`\mathrm{wd}` = ``weight_decay`` and the bias-corrected moments :math:`\hat m,
    \hat v` of Adam. The parameters themselves are sparse after each step. The fixed points are exactly the stationary points of
    f + penalty with the exact metric (the meaning of ``metric=None`` here) and without weight decay.

    Args:
      learning_rate: a number >= 0 or a schedule.
      penalty: a penalty, a list of (path pattern, penalty), a tree of penalties, or None; see ``proxopt_jax.trees``.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the root of the second moment, >= 0.
      weight_decay: decoupled, as in AdamW, >= 0.
      strength: a number or a schedule that replaces the strength of every penalty; None leaves them as they are.
      joint: treat the leaves that share one penalty object as one problem, so that ``Groups.whole()`` and ``Groups.labels``
        span them.

    Returns:
      An ``optax.GradientTransformationExtraArgs``, whose ``update`` needs ``params``. The state is float32 for half-precision
      parameters. Leaves of integers and of keys have no state and do not change.

    Raises:
      ValueError: an argument is out of its domain; at ``init``, groups do not fit a leaf or a pattern decides no leaf.
      TypeError: ``penalty`` is not a penalty; at ``init``, a leaf with a penalty is not floating point, or a leaf is complex.

    Source: Kingma and Ba, "Adam", 2015, Algorithm 1; Yun, Lozano, Yang, "Adaptive proximal gradient methods for structured neural
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
    penalty: PenaltyTree,
    b1: float | jax.Array = 0.5,
    b2: float | jax.Array = 0.999,
    eps: float | jax.Array = 1e-8,
    extrapolation: str | float | jax.Array = updates.EXTRAPOLATION,
    *,
    strength: optax.ScalarOrSchedule | None = None,
    joint: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""HAPG with the gradient step of Adam, for min f(A) + penalty(A), with exact zeros.

    .. math::

        p_t = \mathrm{prox}(A_{t-1} - \eta_t \hat m_t, \; \eta_t), \qquad
        A_t = p_t + u_t (p_t - p_{t-1}), \qquad
        \eta_{t,i} = \frac{\eta}{\sqrt{\hat v_{t,i}} + \epsilon}

    with :math:`\eta` = ``learning_rate``, the bias-corrected moments :math:`\hat m, \hat v` of Adam and :math:`u_t` as in
    ``hapg``. The parameters are the search point A; ``prox_point`` returns p, which is exactly sparse. A penalty with
    ``metric=None`` uses the "median" metric here, the published rule; with "exact" the fixed points are exactly the stationary
    points of f + penalty.

    Args:
      learning_rate: a number >= 0 or a schedule.
      penalty: a penalty, a list of (path pattern, penalty), a tree of penalties, or None; see ``proxopt_jax.trees``.
      b1: decay of the first moment, in [0, 1). The extrapolation already acts as momentum: b1 above 0.8 with uncapped
        extrapolation may diverge, and a warning is issued.
      b2: decay of the second moment, in [0, 1).
      eps: added to the root of the second moment, >= 0.
      extrapolation: the cap, a number in [0, 1]; or "nesterov", the rule of the paper without a cap; or "as_printed", in which
        also u_1 = -1/2. Without a cap minibatch noise accumulates without bound, at any learning rate. Use "nesterov" to
        reproduce the paper, or where gradients are exact and the problem is ill-conditioned.
      strength: a number or a schedule that replaces the strength of every penalty; None leaves them as they are.
      joint: treat the leaves that share one penalty object as one problem, so that ``Groups.whole()`` and ``Groups.labels``
        span them.

    Returns:
      An ``optax.GradientTransformationExtraArgs``, whose ``update`` needs ``params``. The state is float32 for half-precision
      parameters. Leaves of integers and of keys have no state and do not change.

    Raises:
      ValueError: an argument is out of its domain; at ``init``, groups do not fit a leaf or a pattern decides no leaf.
      TypeError: ``penalty`` is not a penalty; at ``init``, a leaf with a penalty is not floating point, or a leaf is complex.

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
            f"b1 = {b1} with uncapped extrapolation may diverge, as the extrapolation already acts as momentum: use b1=0.5",
            stacklevel=2,
        )
    options = {"betas": (b1, b2), "eps": eps, "extrapolation": extrapolation}
    penalties = Penalties(penalty, strength, joint, "median")
    return _optimizer(updates.adam_hapg, updates.AdamHAPGState, ("point", "mean", "square"), learning_rate, penalties, options)


def _optimizer(
    step: Callable[..., tuple[Any, Any]],
    state_type: Any,
    kept: tuple[str, ...],
    learning_rate: optax.ScalarOrSchedule,
    penalties: Penalties,
    options: dict[str, Any],
) -> optax.GradientTransformationExtraArgs:
    """Apply ``step`` of ``proxopt.updates`` to the leaves of a tree, storing the fields ``kept`` of its state."""
    if not callable(learning_rate):
        _checks.in_range("learning_rate", learning_rate)
    adam = "square" in kept
    # fields that are not stored hold None: the state of prox_sgd without tau needs no copy of the parameters
    state_of = partial(state_type, **dict.fromkeys(set(state_type._fields) - {*kept, "count"}))

    def init(params: optax.Params) -> optax.OptState:
        if adam:
            _check_real(params)
            warn_below_half_ulp(params, learning_rate)
        penalties.check(params, lambda problem, x: step(x, x, None, problem.penalty, lr=1.0, **options))
        fields = {f: jax.tree.map(_point if f == "point" else _zeros, params) for f in kept}
        state = state_of(**fields, count=jnp.zeros((), jnp.int32))
        return STATES.get(state_type, state_type)(*state)

    def update(
        grads: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        del extra
        if params is None:
            raise ValueError(NO_PARAMS)
        treedef: Any = jax.tree.structure(params)
        xs = [jnp.asarray(x) for x in jax.tree.leaves(params)]
        raw = treedef.flatten_up_to(grads)
        gs = [jnp.asarray(g) if g is not None and is_floating(x) else None for g, x in zip(raw, xs)]
        fields = {f: treedef.flatten_up_to(getattr(state, f)) for f in kept}
        deltas: list[Any] = [None if is_floating(x) else _pass(g, x) for g, x in zip(raw, xs)]
        count = optax.safe_increment(state.count)
        lr = at(learning_rate, state.count)
        for problem in penalties.stacks(params, state.count, gs):
            x, g = problem.take(xs), problem.take(gs)
            old = {f: problem.take(fields[f]) for f in kept}

            def one(
                x: Any, g: Any, old: dict[str, Any], penalty: Any, count: Any, lr: Any, options: dict[str, Any], stacked: bool
            ) -> tuple[Any, dict[str, Any]]:
                before = state_of(**old, count=like_state(count - 1, x))
                new, after = step(x, g, before, fused(penalty, stacked), lr=like_state(lr, x), **options)
                return new, {f: jax.tree.map(lambda n, o: n.astype(o.dtype), getattr(after, f), old[f]) for f in kept}

            new, after = any_sharding(one, (x, old), problem.penalty, count, lr, options, problem.stacked)(x, g, old)
            problem.put(deltas, jax.tree.map(difference, new, x, g))
            for f in kept:
                problem.put(fields[f], after[f])
        trees = {f: treedef.unflatten(fields[f]) for f in kept}
        return treedef.unflatten(deltas), type(state)(*state_of(**trees, count=count))

    return optax.GradientTransformationExtraArgs(init, update)


STATES: dict[Any, Any] = {
    updates.ProxAdamState: ProxAdamState,
    updates.AdamHAPGState: AdamHAPGState,
}


def _zeros(x: Any) -> Any:
    """Zeros for a leaf in the precision of states, also for an abstract leaf; nothing for a leaf that is not floating point."""
    x = as_array(x)
    if not is_floating(x):
        return optax.MaskedNode()
    return updates.zeros(x) if isinstance(x, jax.Array) else jnp.zeros_like(jax.eval_shape(updates.zeros, x))


def _point(x: Any) -> Any:
    """The prox point before the first step, which is a copy of the leaf: abstract for an abstract leaf."""
    x = as_array(x)
    if not is_floating(x):
        return optax.MaskedNode()
    return updates.start(x) if isinstance(x, jax.Array) else jax.eval_shape(updates.start, x)


def _pass(g: Any, x: jax.Array) -> Any:
    """The update of a leaf that is not floating point: 0, or its gradient if that has no number (None, float0)."""
    return jnp.zeros_like(x) if isinstance(g, jax.Array) and jnp.issubdtype(g.dtype, jnp.number) else g


def _check_real(params: optax.Params) -> None:
    for name, leaf in zip(paths(params), jax.tree.leaves(params)):
        x = as_array(leaf)
        if jnp.iscomplexobj(x):
            raise TypeError(f"params leaf {name!r} must be real for the moments of Adam, got {x.dtype}: use hapg or prox_sgd")


def _check_adam(b1: float | jax.Array, b2: float | jax.Array, eps: float | jax.Array) -> None:
    for name, beta in (("b1", b1), ("b2", b2)):
        _checks.in_range(name, beta, 0, 1)
        if _arrays.is_number(beta) and beta == 1:
            raise ValueError(f"{name} must lie in [0, 1), got {beta}")
    _checks.in_range("eps", eps)
