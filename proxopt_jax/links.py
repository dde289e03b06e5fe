"""Last links of an `optax.chain`: sparse group lasso, lasso, group lasso."""

from typing import Any

import optax

from proxopt import L1, GroupL2, Groups, SparseGroupLasso
from proxopt_jax.proximal import proximal


def sgl(
    strength: Any,
    l1_ratio: Any = 0.5,
    groups: Groups | None = None,
    weights: Any = "sqrt_size",
    *,
    learning_rate: optax.ScalarOrSchedule,
    joint: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """The sparse group lasso as last link of an `optax.chain`: turns an update u of x into prox(x + u) - x.

        penalty(x) = strength * (l1_ratio * ||x||_1 + (1 - l1_ratio) * sum_g w_g ||x_g||_2)
        x + u'     = argmin_z penalty(z) + ||z - (x + u)||^2 / (2 learning_rate)

    `optax.apply_updates` then lands exactly on the zeros of the prox. It must come last: whatever scales updates after it
    undoes the zeros.NOTE

    Args:
      strength: a number >= 0, a traced number or a schedule.
      l1_ratio: share of the L1 part, in [0, 1].
      groups: a `proxopt.Groups`; None makes each leaf one group.
      weights: w_g: "sqrt_size", "inverse_sqrt_size", "none", or an array with one number per group.SHARED

    Source: Simon, Friedman, Hastie, Tibshirani, "A sparse-group lasso", 2013; SparseNAS Eq. 3, 9, 10.

    A badly scaled regression with full gradients, where the link behind Adam finds few of the zeros and `prox_adam` all:

    >>> import jax, jax.numpy as jnp, optax, proxopt_jax
    >>> from proxopt import SparseGroupLasso
    >>> scale = jnp.array([1.0, 0.1, 0.1, 0.1, 0.1, 0.1])
    >>> grad = lambda w: scale * (scale * w - jnp.array([1.0, 0.1, -0.1, 0.1, -0.1, 0.1]))
    >>> def zeros(tx):
    ...     def step(carry, _):
    ...         w, state = carry
    ...         update, state = tx.update(grad(w), state, w)
    ...         return (optax.apply_updates(w, update), state), None
    ...     (w, _), _ = jax.lax.scan(step, (jnp.ones(6), tx.init(jnp.ones(6))), length=3000)
    ...     return int((w == 0).sum())
    >>> zeros(optax.chain(optax.adam(0.01), proxopt_jax.sgl(0.02, l1_ratio=1.0, learning_rate=0.01)))
    0
    >>> zeros(proxopt_jax.prox_adam(0.01, SparseGroupLasso(0.02, l1_ratio=1.0)))
    5
    """
    penalty = SparseGroupLasso(0.0, l1_ratio=l1_ratio, groups=groups, weights=weights)
    return proximal(penalty, learning_rate=learning_rate, strength=strength, joint=joint)


def l1(strength: Any, *, learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    """The lasso as last link of an `optax.chain`: turns an update u of x into soft_threshold(x + u) - x.

        penalty(x) = strength * ||x||_1
        x + u'     = sign(x + u) max(|x + u| - learning_rate * strength, 0)

    `optax.apply_updates` then lands exactly on zeros. It must come last.NOTE

    Args:
      strength: a number >= 0, a traced number or a schedule.SHARED

    Source: Tibshirani, "Regression shrinkage and selection via the lasso", 1996; SparseNAS Eq. 9.

    >>> import jax.numpy as jnp, optax, proxopt_jax
    >>> w = jnp.array([1.0, 0.01])
    >>> tx = optax.chain(optax.sgd(0.1), proxopt_jax.l1(0.5, learning_rate=0.1))
    >>> update, state = tx.update(2 * w, tx.init(w), w)
    >>> optax.apply_updates(w, update)
    Array([0.75, 0.  ], dtype=float32)
    """
    return proximal(L1(0.0), learning_rate=learning_rate, strength=strength)


def group_l2(
    strength: Any,
    groups: Groups | None = None,
    weights: Any = "sqrt_size",
    *,
    learning_rate: optax.ScalarOrSchedule,
    joint: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """The group lasso as last link of an `optax.chain`: turns an update u of x into prox(x + u) - x.

        penalty(x)  = strength * sum_g w_g ||x_g||_2
        (x + u')_g  = max(1 - learning_rate * strength * w_g / ||(x + u)_g||, 0) (x + u)_g

    `optax.apply_updates` then lands exactly on groups of zeros. It must come last.NOTE

    Args:
      strength: a number >= 0, a traced number or a schedule.
      groups: a `proxopt.Groups`; None makes each leaf one group.
      weights: w_g: "sqrt_size", "inverse_sqrt_size", "none", or an array with one number per group.SHARED

    Source: Yuan and Lin, "Model selection and estimation in regression with grouped variables", 2006.

    >>> import jax.numpy as jnp, optax, proxopt_jax
    >>> from proxopt import Groups
    >>> w = jnp.array([[3.0, 0.1], [4.0, 0.1]])
    >>> tx = optax.chain(optax.sgd(1.0), proxopt_jax.group_l2(1.0, Groups.along(0), "none", learning_rate=1.0))
    >>> update, state = tx.update(jnp.zeros((2, 2)), tx.init(w), w)
    >>> optax.apply_updates(w, update)
    Array([[2.4, 0. ],
           [3.2, 0. ]], dtype=float32)
    """
    penalty = GroupL2(0.0, groups=groups, weights=weights)
    return proximal(penalty, learning_rate=learning_rate, strength=strength, joint=joint)


_NOTE = """

    The link sees the learning rate, not Adam's metric. Behind SGD it is the exact proximal gradient step. Behind Adam, whose own
    steps are larger where gradients are small, the threshold is too small there: with full gradients few or no zeros may
    come at strengths where `prox_adam` and `proximal(optax.adam(...), penalty)` give many."""
_SHARED = """
      learning_rate: the learning rate of the optimizer in front, a number >= 0 or the same schedule.
      joint: all leaves are one problem: `Groups.whole()` and labels then span them. Each leaf is its own otherwise.

    Returns:
      An `optax.GradientTransformationExtraArgs`, whose `update` needs `params`. For a penalty on some leaves only, see
      `proximal` with path patterns, or `optax.masked`.

    Raises:
      ValueError: an argument out of its domain; at `init`, groups that do not fit a leaf, named by its path.
      TypeError: at `init`, a leaf that is not floating point."""

for _f in (sgl, l1, group_l2):
    shared = _SHARED if _f is not l1 else "\n".join(line for line in _SHARED.split("\n") if "joint:" not in line)
    _f.__doc__ = (_f.__doc__ or "").replace("NOTE", _NOTE).replace("SHARED", shared)
