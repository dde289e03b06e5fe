"""The exactly sparse parameters that belong to the state of an optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from proxopt import updates
from proxopt_jax import states
from proxopt_jax.proximal import ProximalState
from proxopt_jax.trees import PyTree, paths

OWN = (states.AdamHAPGState, updates.HAPGState, states.ProxAdamState, updates.ProxSGDState, ProximalState)
EARLIER = (updates.AdamHAPGState, updates.ProxAdamState)  # of release 0.1
AVERAGING = {  # by name, as optax.contrib need not be imported
    "ScheduleFreeState": "optax.contrib.schedule_free",
    "MechanicState": "optax.contrib.mechanize",
    "LookaheadState": "optax.lookahead",
}


def prox_point(state: optax.OptState, params: optax.Params) -> PyTree:
    """The parameters at the prox point, exactly sparse: evaluate, report, save and prune these.

    For ``hapg``, ``adam_hapg`` and ``prox_sgd`` with ``tau`` it is the last output of the prox, p_t or w_hat, which the state
    holds. For all other transformations, and for other optimizers inside ``freeze_zeros``, the parameters themselves are that
    point. Leaves that a mask excludes are returned as they are.

    Wrappers that average or rescale the parameters after the prox undo the zeros: ``optax.contrib.schedule_free``,
    ``optax.contrib.mechanize``, ``optax.lookahead``, and ``optax.ema`` as a later link of a chain. They are refused where the
    state shows them. An average of the parameters that is kept outside the optimizer, as by ``optax.incremental_update``, is
    not sparse either.

    Args:
      state: the state of the optimizer, also inside ``optax.chain``, ``masked``, ``partition``, ``inject_hyperparams``,
        ``MultiSteps``, ``apply_if_finite`` and other wrappers.
      params: the present parameters.

    Returns:
      A tree like ``params``, in their dtypes. It shares no memory with the state, so that both can be donated to ``jax.jit``.

    Raises:
      ValueError: the state contains no state of a transformation of proxopt_jax, belongs to other parameters, or contains one of
        those wrappers.

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
    if not _is_sparse(state):
        raise ValueError(f"state must hold the state of a proxopt_jax transformation, got {jax.tree.structure(state)}")
    _refuse_averages(state)
    for s in _own_states(state):
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


def _refuse_averages(state: optax.OptState) -> None:
    """Raise an error if a wrapper or a later transformation moves the parameters away from the prox point."""

    def undone(node: Any) -> str | None:
        name = type(node).__name__
        if name in AVERAGING and _is_sparse(tuple(node)):
            return f"{name} of {AVERAGING[name]}"
        if type(node) is tuple:  # the states of optax.chain, in its order
            last = max((k for k, part in enumerate(node) if _is_sparse(part)), default=len(node))
            if any(isinstance(part, optax.EmaState) for part in node[last + 1 :]):
                return "EmaState of optax.ema"
        return None

    wrappers: list[str] = []

    def visit(node: Any) -> bool:
        wrappers.extend(filter(None, [undone(node)]))
        return False  # go on to the nodes inside

    jax.tree.leaves(state, is_leaf=visit)
    if wrappers:
        raise ValueError(
            f"state holds the {wrappers[0]}, which averages or scales the updates after the prox and undoes the zeros: apply it"
            " before the prox, or leave it out"
        )


def _own_states(tree: Any) -> list[Any]:
    return [node for node in jax.tree.leaves(tree, is_leaf=is_own_state) if is_own_state(node)]


def _is_sparse(tree: Any) -> bool:
    """Whether a tree of states holds one of this package: that of a prox or of ``freeze_zeros``."""

    def is_sparse(node: Any) -> bool:
        return is_own_state(node) or isinstance(node, states.FreezeZerosState)

    return any(map(is_sparse, jax.tree.leaves(tree, is_leaf=is_sparse)))


def is_own_state(node: Any) -> bool:
    """Whether a node of a tree of states is the state of a method of this package that applies a prox."""
    return isinstance(node, OWN + EARLIER)


def map_points(f: Callable[[PyTree], PyTree], state: optax.OptState) -> optax.OptState:
    """The state with ``f(point)`` in place of each prox point that it holds."""

    def changed(node: Any) -> Any:
        point = getattr(node, "point", None) if is_own_state(node) else None
        return node if point is None else node._replace(point=f(point))

    return jax.tree.map(changed, state, is_leaf=is_own_state)
