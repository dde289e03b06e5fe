"""A prox behind any optax optimizer."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from proxopt import _arrays, _checks
from proxopt.penalties import declared
from proxopt_jax import metric
from proxopt_jax.steps import NO_PARAMS, any_sharding, at, difference, like_state
from proxopt_jax.trees import Penalties, Problem, paths


class ProximalState(NamedTuple):
    """inner_state: of the optimizer in front of the prox. count: steps taken."""

    inner_state: Any
    count: Any


def proximal(
    inner: Any,
    penalty: Any = None,
    learning_rate: optax.ScalarOrSchedule | None = None,
    *,
    strength: Any = None,
    joint: bool = False,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    """Any optimizer, then the prox of a penalty: its update u of x becomes one that lands on the prox.

        x + u'  =  prox(x + u, eta)  =  argmin_z penalty(z) + sum((z - x - u)^2 / (2 eta))

    Where the inner state holds Adam's moments (`optax.ScaleByAdamState`, as in `optax.adam` and `optax.adamw`) eta is Adam's own
    step, one for each entry, and `proximal(optax.adam(lr), penalty)` takes the steps of `prox_adam(lr, penalty)`:

        eta_i = learning_rate / (sqrt(nu_i / (1 - b2^t)) + eps)

    Behind every other optimizer eta is `learning_rate` itself. Behind `optax.sgd(lr, momentum=m)` pass lr / (1 - m), the step
    that momentum takes in the long run: with lr it converges as if the strength were (1 - m) times as large. Without `inner`,
    `proximal(penalty, learning_rate=...)` is a last link for `optax.chain`, like `sgl`, for any penalty; it sees no moments.
    Nothing may scale the update after the prox.

    Args:
      inner: an optax optimizer. Accumulate outside, `MultiSteps(proximal(...))`, not inside: the prox acts in every call.
      penalty: a penalty, a list of (path pattern, penalty), a tree of penalties, or None; see `proxopt_jax.trees`. Its
        `metric=None` means "exact".
      learning_rate: that of `inner`: a number >= 0 or a schedule. None reads it from the state of `optax.inject_hyperparams` (and
        follows later edits there). Where there is none either, but Adam's moments are, it is measured: the number that
        explains Adam's update best, <-u, d> / <d, d> with d = mu_hat / (sqrt(nu_hat) + eps) and decay left out.
      strength: a number or a schedule that replaces the strength of every penalty.
      joint: leaves that share one penalty object are one problem: `Groups.whole()` and labels then span leaves.
      b1, b2, eps: those of `inner`, which its state does not hold; read from `optax.inject_hyperparams` where that is used.

    Returns:
      An `optax.GradientTransformationExtraArgs`, whose `update` needs `params`.

    Raises:
      ValueError: an argument out of its domain; at `init`, a learning rate that nothing tells, groups that do not fit a leaf, and
        patterns that decide none.
      TypeError: a penalty that is none; at `init`, a leaf with a penalty that is not floating point.

    Source: Parikh and Boyd, "Proximal algorithms", 2014, section 4.2; Yun, Lozano, Yang, "Adaptive proximal gradient methods for
    structured neural networks", 2021 (the prox in Adam's metric).

    >>> import jax.numpy as jnp, optax, proxopt_jax
    >>> from proxopt import L1
    >>> w = jnp.array([1.0, 0.01])
    >>> tx = proxopt_jax.proximal(optax.adam(0.1), L1(0.5))
    >>> update, state = tx.update(2 * w, tx.init(w), w)
    >>> optax.apply_updates(w, update).round(4)
    Array([0.875, 0.   ], dtype=float32)
    """
    if not (hasattr(inner, "init") and hasattr(inner, "update")):
        if penalty is not None or learning_rate is None:
            raise TypeError(
                "proximal without an inner optimizer takes a penalty and a keyword: proximal(penalty, learning_rate=...)"
            )
        inner, penalty = optax.identity(), inner
    if learning_rate is not None and not callable(learning_rate):
        _checks.in_range("learning_rate", learning_rate)
    inner = optax.with_extra_args_support(inner)
    penalties = Penalties(penalty, strength, joint)
    adam = metric.Adam(b1, b2, eps)

    def steps(rate: Any, params: Any, state: Any, plain_update: Callable[[], Any]) -> list:
        """Per leaf: a number, an array of steps, or None where nothing tells."""
        rate = metric.injected_rate(state) if rate is None else rate
        return adam.steps(rate, params, state, plain_update)

    def init(params: Any) -> ProximalState:
        inner_state = inner.init(params)
        count = jnp.zeros((), jnp.int32)
        known = steps(at(learning_rate, count), params, inner_state, lambda: optax.tree.zeros_like(params))
        names = paths(params)
        for problem in penalties.problems(params, count):
            for i in problem.where:
                if problem.penalty is not None and known[i] is None:
                    raise ValueError(
                        f"learning_rate must be given for the penalty on params leaf {names[i]!r}: the state of the inner "
                        "optimizer holds neither it nor Adam's moments. Pass learning_rate=, or use optax.inject_hyperparams"
                    )

        def attempt(problem: Problem, x: Any) -> Any:
            return exact(problem.penalty).prox(x, jax.tree.map(lambda eta: jnp.ones(jnp.shape(eta)), problem.take(known)))

        penalties.check(params, attempt)
        return ProximalState(inner_state, count)

    def update(updates: Any, state: ProximalState, params: Any = None, **extra: Any) -> tuple[Any, ProximalState]:
        if params is None:
            raise ValueError(NO_PARAMS)
        moved, inner_state = inner.update(updates, state.inner_state, params, **extra)

        def plain_update() -> Any:  # without decay, which acts on the parameters
            return inner.update(updates, state.inner_state, optax.tree.zeros_like(params), **extra)[0]

        etas = steps(at(learning_rate, state.count), params, inner_state, plain_update)
        treedef: Any = jax.tree.structure(params)
        xs = [jnp.asarray(x) for x in jax.tree.leaves(params)]
        us = treedef.flatten_up_to(moved)
        for problem in penalties.problems(params, state.count):
            if problem.penalty is None or any(us[i] is None for i in problem.where):
                continue
            x, u = problem.take(xs), problem.take(us)
            z = jax.tree.map(lambda a, b: _arrays.widen(a) + _arrays.widen(jnp.asarray(b)), x, u)
            eta = jax.tree.map(like_state, problem.take(etas), x)
            problem.put(us, jax.tree.map(difference, any_sharding(exact(problem.penalty).prox, x)(z, eta), x, u))
        return treedef.unflatten(us), ProximalState(inner_state, optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init, update)


def exact(penalty: Any) -> Any:
    """The penalty in the exact metric, unless it says otherwise."""
    return declared.with_metric(penalty, "exact")
