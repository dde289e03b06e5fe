"""The scale of strengths: from which one the update of an optimizer is zeroed altogether."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from proxopt import _arrays, _checks
from proxopt.penalties.dual import zeroing_strength
from proxopt_jax.trees import Penalties


def max_strength(
    updates: optax.Updates, penalty: Any, *, learning_rate: float = 1.0, params: optax.Params | None = None, joint: bool = False
) -> float:
    r"""The smallest strength at which a last link turns an update into exact zeros, the scale on which to choose its strength.

    .. math::

        \min \{ \lambda \ge 0 : \mathrm{prox}_{\eta \lambda f}(x + u) = 0 \}

    for the update u of the transformations before the link, :math:`\eta` = ``learning_rate`` and, by default, x = 0: parameters
    that are 0 stay 0 from this strength on. With x = ``params`` it is the strength that zeroes all parameters in this one step.

    The unit of a strength is that of :math:`u / \eta`. Behind SGD this is the gradient, and the result is
    ``proxopt.max_strength`` of the gradient: start at 1e-3 to 1e-1 of it. Behind Adam and Lion, whose steps are about as long as
    the learning rate, it is about 1 whatever the loss: start at a tenth to a half of it behind Adam. Behind Lion, all of whose
    steps are equally long, few zeros last below it.

    Args:
      updates: the update of the transformations before the link, a tree of arrays; or, with ``learning_rate=1``, a
        negative gradient.
      penalty: a penalty, a list of (path pattern, penalty), a tree of penalties, or None; see ``proxopt_jax.trees``. Its
        strength is ignored.
      learning_rate: that of the link, > 0.
      params: the parameters x; None means 0.
      joint: treat the leaves that share one penalty object as one problem.

    Returns:
      The largest of the strengths of all leaves with a penalty, as a float. It is computed in NumPy, outside of ``jax.jit``.

    Raises:
      ValueError: no leaf has a penalty, an update is not finite, no strength zeroes it, or ``learning_rate`` is not > 0.
      TypeError: a penalty is none of proxopt, or arrays are traced.

    Source: the optimality condition of the lasso at 0, as in Friedman, Hastie, Tibshirani, "Regularization paths for generalized
    linear models via coordinate descent", 2010, section 2.5.

    >>> import jax.numpy as jnp, optax, proxopt_jax
    >>> from proxopt import SparseGroupLasso
    >>> grads = {"w": jnp.array([0.02, -0.001]), "b": jnp.array([0.5])}
    >>> for base in (optax.sgd(0.1), optax.adam(0.1), optax.lion(0.1)):
    ...     updates, _ = base.update(grads, base.init(grads), grads)
    ...     round(proxopt_jax.max_strength(updates, [("w", SparseGroupLasso(0.0))], learning_rate=0.1), 3)
    0.017
    1.0
    1.0
    """
    _checks.in_range("learning_rate", learning_rate, open_low=True)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((updates, params))):
        raise TypeError("max_strength must be called outside of jax.jit, got traced arrays")
    treedef: Any = jax.tree.structure(updates)
    moved = [_arrays.widen(jnp.asarray(u)) for u in jax.tree.leaves(updates)]
    if params is not None:
        moved = [u + jnp.asarray(x) for u, x in zip(moved, treedef.flatten_up_to(params))]
    problems = [p for p in Penalties(penalty, None, joint).problems(updates, 0) if p.penalty is not None]
    if not problems:
        raise ValueError("penalty must apply to at least one leaf, got none")
    for p in problems:
        if not hasattr(p.penalty, "with_strength"):
            raise TypeError(f"penalty must be a proxopt.Penalty, got {p.penalty!r}")
    scaled = [-u / learning_rate for u in moved]  # an update descends: its negative takes the place of the gradient
    return zeroing_strength([(p.take(scaled), p.penalty) for p in problems])
