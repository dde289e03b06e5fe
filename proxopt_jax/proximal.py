"""A prox after any optax optimizer."""

# no deferred annotations in this module: tools for optax compare them with optax.ScalarOrSchedule

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from proxopt import _arrays, _checks
from proxopt_jax import metric
from proxopt_jax.kernels import fused
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
from proxopt_jax.trees import Penalties, PenaltyTree, Problem, paths


class ProximalState(NamedTuple):
    """State of ``proximal``.

    Attributes:
      inner_state: the state of the optimizer before the prox.
      count: the number of steps taken, a 0-dimensional integer array.
    """

    inner_state: optax.OptState
    count: Any  # an array; the name is also a method of tuples, of another type


def proximal(
    inner: optax.GradientTransformation | PenaltyTree,
    penalty: PenaltyTree = None,
    learning_rate: optax.ScalarOrSchedule | None = None,
    *,
    strength: optax.ScalarOrSchedule | None = None,
    joint: bool = False,
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.999,
    eps: float | jax.Array = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    r"""Any optax optimizer followed by the prox of a penalty.

    The update u of ``inner`` is replaced by u', with which ``optax.apply_updates`` yields the prox:

    .. math::

        x + u' = \mathrm{prox}(x + u, \eta)
               = \mathrm{argmin}_z \; \mathrm{penalty}(z) + \sum_i \frac{(z_i - x_i - u_i)^2}{2 \eta_i}

    If the inner state holds the moments of Adam (``optax.ScaleByAdamState``, as in ``optax.adam`` and ``optax.adamw``),
    :math:`\eta` is Adam's own step, one for each entry, and ``proximal(optax.adam(lr), penalty)`` takes the steps of
    ``prox_adam(lr, penalty)``:

    .. math::

        \eta_i = \frac{\mathrm{lr}}{\sqrt{\nu_i / (1 - b_2^t)} + \epsilon}

    For every other optimizer :math:`\eta` = ``learning_rate``, and for moments of Adam that are not those of the entries, as in
    ``optax.contrib.galore``. With ``optax.sgd(lr, momentum=m)`` pass ``lr / (1 - m)``, the effective step of momentum: with
    ``lr`` it converges as if the strength were (1 - m) times as large. Without ``inner``, ``proximal(penalty,
    learning_rate=...)`` is the last link of an ``optax.chain``, like ``sgl``, for any penalty; it has no access to moments. No
    transformation may scale or average the update after the prox: ``optax.contrib.schedule_free`` and ``mechanize``,
    ``optax.lookahead`` and ``optax.ema`` around or behind it undo the zeros.

    Args:
      inner: an optax optimizer. To accumulate gradients, wrap the result, ``MultiSteps(proximal(...))``, not ``inner``: the
        prox is applied at every call.
      penalty: a penalty, a list of (path pattern, penalty), a tree of penalties, or None; see ``proxopt_jax.trees``. Its
        ``metric=None`` means "exact".
      learning_rate: that of ``inner``: a number >= 0 or a schedule. None reads it from the state of
        ``optax.inject_hyperparams`` (and follows later changes there). If that is not used but Adam's moments are present, it
        is estimated by least squares from Adam's update: <-u, d> / <d, d> with d = mu_hat / (sqrt(nu_hat) + eps), without
        weight decay. Behind ``optax.scale_by_trust_ratio``, as in ``optax.lamb``, it is always estimated, and separately for each
        leaf.
      strength: a number or a schedule that replaces the strength of every penalty; None leaves them as they are.
      joint: treat the leaves that share one penalty object as one problem, so that ``Groups.whole()`` and ``Groups.labels``
        span them.
      b1: decay of the first moment of ``inner``, which its state does not hold; read from ``optax.inject_hyperparams`` if that
        is used.
      b2: decay of the second moment of ``inner``; likewise.
      eps: added to the root of the second moment in ``inner``, 1e-6 in ``optax.lamb``; likewise.

    Returns:
      An ``optax.GradientTransformationExtraArgs``, whose ``update`` needs ``params``.

    Raises:
      ValueError: an argument is out of its domain; at ``init``, the learning rate cannot be determined, as behind a trust ratio
        without Adam (``lars``), groups do not fit a leaf, or a pattern decides no leaf.
      TypeError: ``penalty`` is not a penalty; at ``init``, a leaf with a penalty is not floating point.

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
                "proximal without an inner optimizer takes a penalty and the keyword learning_rate: "
                "proximal(penalty, learning_rate=...)"
            )
        inner, penalty = optax.identity(), inner
    if learning_rate is not None and not callable(learning_rate):
        _checks.in_range("learning_rate", learning_rate)
    optimizer: Any = optax.with_extra_args_support(cast(optax.GradientTransformation, inner))
    penalties = Penalties(penalty, strength, joint)
    adam = metric.Adam(b1, b2, eps)
    trusts = metric.has_trust_ratio(inner)

    def steps(rate: Any, params: optax.Params, state: optax.OptState, plain_update: Callable[[], optax.Updates]) -> list[Any]:
        """For each leaf a number or an array of steps, or None if the learning rate cannot be determined."""
        if trusts:  # a rate that does not contain the ratio of the leaf leads to another stationary point
            return adam.steps(None, params, state, plain_update, each=True)
        rate = metric.injected_rate(state) if rate is None else rate
        return adam.steps(rate, params, state, plain_update)

    def init(params: optax.Params) -> ProximalState:
        inner_state = optimizer.init(params)
        count = jnp.zeros((), jnp.int32)
        found = steps(at(learning_rate, count), params, inner_state, lambda: _map_floating(jnp.zeros_like, params))
        if metric.holds_adam(inner_state) and not trusts:
            rate = metric.injected_rate(inner_state) if learning_rate is None else learning_rate
            warn_below_half_ulp(params, rate)
        names, leaves = paths(params), jax.tree.leaves(params)
        for problem in penalties.problems(params, count):
            for i in problem.where:
                if problem.penalty is None or found[i] is not None or not is_floating(as_array(leaves[i])):
                    continue
                if trusts:
                    raise ValueError(
                        f"a trust ratio scales the steps of {names[i]!r} by a number that the inner optimizer does not store, "
                        "and without the moments of Adam it cannot be measured: use lamb, or an optimizer without "
                        "scale_by_trust_ratio"
                    )
                raise ValueError(
                    f"learning_rate must be given for the penalty on params leaf {names[i]!r}: the state of the inner "
                    "optimizer holds neither it nor the moments of Adam. Pass learning_rate=, or use optax.inject_hyperparams"
                )

        def attempt(problem: Problem, x: Any) -> Any:
            return problem.penalty.prox(x, jax.tree.map(lambda eta: jnp.ones(jnp.shape(eta)), problem.take(found)))

        penalties.check(params, attempt)
        return ProximalState(inner_state, count)

    def update(
        updates: optax.Updates, state: ProximalState, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, ProximalState]:
        if params is None:
            raise ValueError(NO_PARAMS)
        moved, inner_state = optimizer.update(updates, state.inner_state, params, **extra)

        def plain_update() -> optax.Updates:
            if not trusts:  # at parameters 0, where weight decay adds nothing
                return optimizer.update(updates, state.inner_state, _map_floating(jnp.zeros_like, params), **extra)[0]
            # a trust ratio needs the norms of the parameters; weight decay cancels in the mean over both signs
            mirrored, _ = optimizer.update(updates, state.inner_state, _map_floating(jnp.negative, params), **extra)
            return jax.tree.map(lambda a, b: a if a is None else (a + b) / 2, moved, mirrored, is_leaf=lambda v: v is None)

        etas = steps(at(learning_rate, state.count), params, inner_state, plain_update)
        treedef: Any = jax.tree.structure(params)
        xs = [jnp.asarray(x) for x in jax.tree.leaves(params)]
        us = treedef.flatten_up_to(moved)
        for problem in penalties.stacks(params, state.count, us):
            if problem.penalty is None:
                continue
            x, u = problem.take(xs), problem.take(us)
            z = jax.tree.map(lambda a, b: _arrays.widen(a) + _arrays.widen(jnp.asarray(b)), x, u)
            eta = jax.tree.map(like_state, problem.take(etas), x)
            prox = any_sharding(lambda z, eta, *how: fused(*how).prox(z, eta), x, problem.penalty, problem.stacked)
            problem.put(us, jax.tree.map(difference, prox(z, eta), x, u))
        return treedef.unflatten(us), ProximalState(inner_state, optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init, update)


def _map_floating(f: Callable[[Any], Any], params: optax.Params) -> optax.Params:
    """Apply f to the leaves that are floating point."""
    return jax.tree.map(lambda x: f(x) if is_floating(as_array(x)) else x, params)
