"""The steps that an optimizer took, read from its state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from proxopt import _arrays


class Adam(NamedTuple):
    """What Adam's state does not say of Adam."""

    b1: Any
    b2: Any
    eps: Any

    def steps(self, rate: Any, params: Any, state: Any, plain_update: Callable[[], Any]) -> list:
        """Per leaf of `params` learning_rate / (sqrt(nu_hat) + eps) where `state` holds its nu, else `rate`.

        Args:
          rate: the learning rate; None measures it in `plain_update()`, an update by Adam alone.
        """
        treedef: Any = jax.tree.structure(params)
        number = treedef.unflatten(range(treedef.num_leaves))
        steps = [rate] * treedef.num_leaves
        for moments in _nodes(state, _is_adam):
            owned = _owned(moments.nu, number)
            if not owned:
                continue
            known = self._injected(state)
            nu = {i: known._scale(v, moments.count) for i, v in owned.items()}
            here = rate
            if here is None:
                mu = {i: _debias(v, known.b1, moments.count) for i, v in _owned(moments.mu, number).items()}
                updates = treedef.flatten_up_to(plain_update())
                here = _measured([updates[i] for i in owned], [mu[i] / nu[i] for i in owned])
            for i, scale in nu.items():
                steps[i] = jnp.asarray(here, scale.dtype) / scale
        return steps

    def _scale(self, nu: jax.Array, count: Any) -> jax.Array:
        """sqrt(nu_hat) + eps"""
        return _arrays.root(_debias(nu, self.b2, count)) + self.eps

    def _injected(self, state: Any) -> Adam:
        """With the numbers that `optax.inject_hyperparams` holds, where it does."""
        told: dict = {}
        for node in _nodes(state, _is_injected):
            told |= {k: v for k, v in node.hyperparams.items() if k in self._fields}
        return self._replace(**told)


def injected_rate(state: Any) -> Any:
    """The one learning rate in states of `optax.inject_hyperparams`; None where there is none.

    Raises ValueError where there are several.
    """
    rates = [n.hyperparams["learning_rate"] for n in _nodes(state, _is_injected) if "learning_rate" in n.hyperparams]
    if len(rates) > 1:
        raise ValueError(f"learning_rate must be given: the state of the inner optimizer holds {len(rates)} of them")
    return rates[0] if rates else None


def _measured(updates: list, directions: list) -> jax.Array:
    """The rate for which -rate * directions is closest to updates; 0 where all directions are."""
    wide = [(_arrays.widen(jnp.asarray(u)), d) for u, d in zip(updates, directions)]
    square = sum(jnp.sum(d * d) for _, d in wide)
    return -sum(jnp.sum(u * d) for u, d in wide) / jnp.where(square > 0, square, 1)


def _debias(moment: jax.Array, decay: Any, count: Any) -> jax.Array:
    wide = _arrays.widen(jnp.asarray(moment))
    done = jnp.maximum(count, 1)  # at init no step was taken
    return wide / (1 - jnp.asarray(decay) ** done).astype(wide.dtype)


def _owned(moments: Any, number: Any) -> dict[int, jax.Array]:
    """Leaf number of params -> its moment; nothing where the moments have another structure."""
    found: dict[int, jax.Array] = {}
    try:
        jax.tree.map(lambda v, i: None if _is_masked(v) else found.setdefault(i, v), moments, number, is_leaf=_is_masked)
    except (ValueError, TypeError):
        return {}
    return found


def _nodes(state: Any, kind: Callable[[Any], bool]) -> list:
    """All nodes of that kind, also inside one another."""
    found = [n for n in jax.tree.leaves(state, is_leaf=kind) if kind(n)]
    return found + [m for n in found if not _is_adam(n) for m in _nodes(tuple(n), kind)]


def _is_adam(node: Any) -> bool:
    return isinstance(node, optax.ScaleByAdamState)


def _is_injected(node: Any) -> bool:
    return hasattr(node, "hyperparams") and hasattr(node, "inner_state")


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)
