"""Gradients of architecture weights A in min_A L_val(w*(A), A), w*(A) = argmin_w L_train(w, A), as pure functions of pytrees.

The formulas are those of `bilevel.gradients`. First order approximates w* by w, second order by one step of the weight optimizer,
w' = w - lr d(w, A):

    dA = grad_A L_val(w', A) - lr grad_A <grad_w L_train(w, A), v>,    v = grad_w' L_val(w', A)

Losses are functions (A, w) -> L or (A, w) -> (L, aux), where aux is a tree of arrays such as the last hidden state of a text.
A compiled second-order gradient contains the network three times: the gradients of L_train and L_val, and the last term.

Source: Liu, Simonyan, Yang, "DARTS", 2019, Eq. 5-8; SparseNAS, Eq. 11-13.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from ..settings import HESSIANS, RADIUS

Tree = Any  # a pytree of arrays
Loss = Callable[[Tree, Tree], Any]


def first_order(arch: Tree, params: Tree, valid_loss: Loss) -> tuple[Tree, Any]:
    """Compute grad_A L_val(w, A).

    Args:
      arch: the architecture weights A.
      params: the network weights w.
      valid_loss: L_val as a function (A, w).

    Returns:
      The gradient, a tree like `arch`, and the aux of the loss (None if it has none).
    """
    return jax.grad(_with_aux(valid_loss), has_aux=True)(arch, params)


def second_order(
    arch: Tree,
    params: Tree,
    train_loss: Loss,
    valid_loss: Loss,
    lr: float | Array,
    direction: Callable[[Tree], Tree] = lambda grads: grads,
    hessian: str = "difference",
    clip: float = 0.0,
) -> tuple[Tree, Any]:
    """Compute the second-order gradient above.

    Args:
      arch: the architecture weights A.
      params: the network weights w.
      train_loss, valid_loss: L_train and L_val as functions (A, w).
      lr: learning rate of the step to w'.
      direction: computes d(w, A) from grad_w L_train(w, A): adds momentum and weight decay of the weight optimizer.
      hessian: "difference", by two gradients at w +- 0.01 v / ||v||, or "exact".
      clip: clipping threshold of the norms of grad_w L_train and v; 0: no clipping.

    Returns:
      The gradient, a tree like `arch`, and the aux of the validation loss at w' (None if it has none).

    Raises:
      ValueError: an unknown `hessian`.
    """
    if hessian not in HESSIANS:
        raise ValueError(f"hessian must be one of {', '.join(HESSIANS)}, got {hessian!r}")
    train = lambda a, w: _with_aux(train_loss)(a, w)[0]
    grads, factor = clipped(jax.grad(train, 1)(arch, params), clip)
    moved = jax.tree.map(lambda w, d: (w - lr * d).astype(w.dtype), params, direction(grads))
    (outer, v), aux = jax.grad(_with_aux(valid_loss), (0, 1), has_aux=True)(arch, moved)
    v, _ = clipped(v, clip)
    inner = (_exact if hessian == "exact" else _difference)(arch, params, train, v)
    return jax.tree.map(lambda o, i: (o - lr * factor * i).astype(o.dtype), outer, inner), aux


def clipped(grads: Tree, clip: float) -> tuple[Tree, float | Array]:
    """Clip the gradients to the norm `clip` (0: no clipping); return them and the factor."""
    if not clip:
        return grads, 1.0
    factor = jnp.minimum(clip / (norm(grads) + 1e-6), 1.0)
    return jax.tree.map(lambda g: (g * factor).astype(g.dtype), grads), factor


def norm(tree: Tree) -> Array:
    """The Euclidean norm of all entries of a tree, in float32 or wider."""
    wide = [leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)) for leaf in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(jnp.vdot(x, x) for x in wide))


def _difference(arch: Tree, params: Tree, loss: Loss, v: Tree) -> Tree:
    size = norm(v)
    eps = jnp.where(size > 0, RADIUS / jnp.where(size > 0, size, 1), 0)

    def at(sign: Array) -> Tree:
        return jax.grad(loss)(arch, jax.tree.map(lambda w, d: (w + sign * eps * d).astype(w.dtype), params, v))

    # a loop over both signs: two calls would compile the network twice, and vmap would make convolutions grouped ones
    both = lax.map(at, jnp.array([1, -1], size.dtype))
    return jax.tree.map(lambda g: jnp.where(eps > 0, (g[0] - g[1]) / (2 * jnp.where(eps > 0, eps, 1)), 0), both)


def _exact(arch: Tree, params: Tree, loss: Loss, v: Tree) -> Tree:
    # Forward over reverse takes two thirds of the time of the reverse gradient of <grad_w L, v>. The reverse gradient inside is
    # that of both arguments, as the outer jvp must not meet a jax.custom_vjp itself; XLA drops the part that is not returned.
    return jax.jvp(lambda w: jax.grad(loss, (0, 1))(arch, w)[0], (params,), (v,))[1]


def _with_aux(loss: Loss) -> Callable[[Tree, Tree], tuple[Array, Any]]:
    def both(arch: Tree, params: Tree) -> tuple[Array, Any]:
        found = loss(arch, params)
        return found if isinstance(found, tuple) else (found, None)

    return both
