"""The exactly sparse parameters that belong to the state of an optimizer."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from proxopt.updates import AdamHAPGState, HAPGState, ProxAdamState, ProxSGDState
from proxopt_jax.proximal import ProximalState
from proxopt_jax.trees import PyTree, paths

STATES = (AdamHAPGState, HAPGState, ProxAdamState, ProxSGDState, ProximalState)


def prox_point(state: optax.OptState, params: optax.Params) -> PyTree:
    """The parameters at the prox point, exactly sparse: evaluate, report, save and prune these.

    For ``hapg``, ``adam_hapg`` and ``prox_sgd`` with ``tau`` it is the last output of the prox, p_t or w_hat, which the state
    holds. For all other transformations the parameters themselves are that point. Leaves that a mask excludes are returned as
    they are.

    Args:
      state: the state of the optimizer, also inside ``optax.chain``, ``masked``, ``partition``, ``inject_hyperparams``,
        ``MultiSteps``, ``apply_if_finite`` and other wrappers.
      params: the present parameters.

    Returns:
      A tree like ``params``, in their dtypes.

    Raises:
      ValueError: the state contains no state of a transformation of proxopt_jax, or belongs to other parameters.

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
    found = [s for s in jax.tree.leaves(state, is_leaf=_is_state) if _is_state(s)]
    if not found:
        raise ValueError(f"state must hold the state of a proxopt_jax transformation, got {jax.tree.structure(state)}")
    for s in found:
        point = getattr(s, "point", None)
        if point is not None:
            params = _overlay(point, params)
    return params


def _overlay(point: PyTree, params: PyTree) -> PyTree:
    """Replace the leaves of ``params`` that ``point`` has too, by path: wrappers may hold the point in other containers."""
    leaves, treedef = jax.tree.flatten(params)
    here = dict(zip(paths(params), leaves))
    there = dict(zip(paths(point), jax.tree.leaves(point)))
    for path, p in there.items():
        if path not in here or jnp.shape(p) != jnp.shape(here[path]):
            found = f"shape {jnp.shape(here[path])}" if path in here else "no such leaf"
            raise ValueError(f"params must be like those of the state, with {path!r} of shape {jnp.shape(p)}, got {found}")
    # a copy, as callers donate the point and the state to a jitted function together
    merged = [jnp.array(there[path], jnp.result_type(x)) if path in there else x for path, x in here.items()]
    return jax.tree.unflatten(treedef, merged)


def _is_state(node: Any) -> bool:
    return isinstance(node, STATES)
