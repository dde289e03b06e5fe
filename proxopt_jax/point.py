"""The exactly sparse parameters behind a state."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from proxopt.updates import AdamHAPGState, HAPGState, ProxAdamState, ProxSGDState
from proxopt_jax.proximal import ProximalState
from proxopt_jax.trees import paths

STATES = (AdamHAPGState, HAPGState, ProxAdamState, ProxSGDState, ProximalState)


def prox_point(state: Any, params: Any) -> Any:
    """The parameters at the prox point, exactly sparse: what to evaluate, report, save and prune.

    For `hapg`, `adam_hapg` and `prox_sgd` with tau it is the last output of the prox, p_t or w_hat, which the state holds. For
    all others the parameters are that already. Leaves that a mask hides from the optimizer stay as they are.

    Args:
      state: the optimizer's state, also inside `optax.chain`, `masked`, `partition`, `inject_hyperparams`, `MultiSteps`,
        `apply_if_finite` and other wrappers.
      params: the present parameters.

    Returns:
      A tree like `params`, in their dtypes.

    Raises:
      ValueError: there is no transformation of proxopt_jax in the state, or it belongs to other parameters.

    Source: SparseNAS, Eq. 6-8 (p_t); GSparsity, Eq. 1 (w_hat).

    >>> import jax.numpy as jnp, optax, proxopt_jax
    >>> from proxopt import L1
    >>> w = jnp.array([1.0, 0.01])
    >>> tx = optax.chain(optax.clip_by_global_norm(1.0), proxopt_jax.hapg(0.1, L1(1.0)))
    >>> state = tx.init(w)
    >>> for _ in range(5):
    ...     update, state = tx.update(w - 1, state, w)
    ...     w = optax.apply_updates(w, update)
    >>> prox_point(state, w).round(3)
    Array([0.537, 0.   ], dtype=float32)
    """
    found = [s for s in jax.tree.leaves(state, is_leaf=_is_ours) if _is_ours(s)]
    if not found:
        raise ValueError(f"state must hold the state of a proxopt_jax transformation, got {jax.tree.structure(state)}")
    for s in found:
        point = getattr(s, "point", None)
        if point is not None:
            params = _laid_over(point, params)
    return params


def _laid_over(point: Any, params: Any) -> Any:
    """`point` where it has leaves, else `params`; by path, since wrappers may hold the point in containers of their own."""
    leaves, treedef = jax.tree.flatten(params)
    here = dict(zip(paths(params), leaves))
    there = dict(zip(paths(point), jax.tree.leaves(point)))
    for path, p in there.items():
        if path not in here or jnp.shape(p) != jnp.shape(here[path]):
            found = f"shape {jnp.shape(here[path])}" if path in here else "no such leaf"
            raise ValueError(f"params must be like those of the state, with {path!r} of shape {jnp.shape(p)}, got {found}")
    return jax.tree.unflatten(treedef, [_like(there.get(path, x), x) for path, x in here.items()])


def _like(p: Any, x: Any) -> jax.Array:
    return jnp.asarray(p).astype(jnp.asarray(x).dtype)


def _is_ours(node: Any) -> bool:
    return isinstance(node, STATES)
