"""The step of each entry, read from the state of an optimizer: Adam scales every entry on its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from proxopt import _arrays


class Adam(NamedTuple):
    """The hyperparameters of Adam, which its state does not hold."""

    b1: Any
    b2: Any
    eps: Any

    def steps(
        self, rate: Any, params: optax.Params, state: optax.OptState, plain_update: Callable[[], optax.Updates]
    ) -> list[Any]:
        """For each leaf lr / (sqrt(nu_hat) + eps) where ``state`` holds its nu, else ``rate``.

        Args:
          rate: the learning rate lr; None estimates it from ``plain_update()``, an update by Adam alone.
          params: the parameters.
          state: the state of the optimizer, in which the states of Adam are searched for.
          plain_update: returns the update of the optimizer without weight decay.
        """
        treedef: Any = jax.tree.structure(params)
        numbers = treedef.unflatten(range(treedef.num_leaves))
        steps = [rate] * treedef.num_leaves
        for moments in _nodes(state, _is_adam):
            second = _by_leaf(moments.nu, numbers)
            if not second:
                continue
            adam = self._injected(state)
            scales = {i: adam._scale(v, moments.count) for i, v in second.items()}
            lr = rate
            if lr is None:
                first = {i: _debias(v, adam.b1, moments.count) for i, v in _by_leaf(moments.mu, numbers).items()}
                updates = treedef.flatten_up_to(plain_update())
                lr = _estimated_rate([updates[i] for i in second], [first[i] / scales[i] for i in second])
            for i, scale in scales.items():
                steps[i] = jnp.asarray(lr, scale.dtype) / scale
        return steps

    def _scale(self, nu: jax.Array, count: jax.Array) -> jax.Array:
        """sqrt(nu_hat) + eps"""
        scale: jax.Array = _arrays.root(_debias(nu, self.b2, count)) + self.eps
        return scale

    def _injected(self, state: optax.OptState) -> Adam:
        """Replace those hyperparameters that ``optax.inject_hyperparams`` holds in the state."""
        injected: dict[str, Any] = {}
        for node in _nodes(state, _is_injected):
            injected |= {k: v for k, v in node.hyperparams.items() if k in self._fields}
        return self._replace(**injected)


def injected_rate(state: optax.OptState) -> Any:
    """The learning rate in the states of ``optax.inject_hyperparams``; None if there is none.

    Raises:
      ValueError: there are several.
    """
    rates = [n.hyperparams["learning_rate"] for n in _nodes(state, _is_injected) if "learning_rate" in n.hyperparams]
    if len(rates) > 1:
        raise ValueError(f"learning_rate must be given: the state of the inner optimizer holds {len(rates)} of them")
    return rates[0] if rates else None


def _estimated_rate(updates: list[Any], directions: list[jax.Array]) -> jax.Array:
    """The number r that minimises ||updates + r directions||; 0 if all directions are 0."""
    pairs = [(_arrays.widen(jnp.asarray(u)), d) for u, d in zip(updates, directions)]
    square = sum(jnp.sum(d * d) for _, d in pairs)
    inner = sum(jnp.sum(u * d) for u, d in pairs)
    return -inner / jnp.where(square > 0, square, 1)


def _debias(moment: jax.Array, decay: Any, count: jax.Array) -> jax.Array:
    """moment / (1 - decay^count)"""
    wide: jax.Array = _arrays.widen(jnp.asarray(moment))
    steps = jnp.maximum(count, 1)  # at init no step was taken, and 0 / 0 would result
    return wide / (1 - jnp.asarray(decay) ** steps).astype(wide.dtype)


def _by_leaf(moments: Any, numbers: Any) -> dict[int, jax.Array]:
    """Map the number of each leaf of the parameters to its moment; empty if the moments have another structure."""
    found: dict[int, jax.Array] = {}
    try:
        jax.tree.map(lambda v, i: None if _is_masked(v) else found.setdefault(i, v), moments, numbers, is_leaf=_is_masked)
    except (ValueError, TypeError):
        return {}
    return found


def _nodes(state: optax.OptState, kind: Callable[[Any], bool]) -> list[Any]:
    """All nodes for which ``kind`` holds, also those inside one another."""
    found = [n for n in jax.tree.leaves(state, is_leaf=kind) if kind(n)]
    return found + [m for n in found if not _is_adam(n) for m in _nodes(tuple(n), kind)]


def _is_adam(node: Any) -> bool:
    return isinstance(node, optax.ScaleByAdamState)


def _is_injected(node: Any) -> bool:
    return hasattr(node, "hyperparams") and hasattr(node, "inner_state")


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)
