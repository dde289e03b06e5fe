"""The step of each entry, read from the state of an optimizer: Adam scales every entry on its own."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from proxopt import _arrays
from proxopt_jax.steps import as_array, is_floating


class Adam(NamedTuple):
    """The hyperparameters of Adam, which its state does not hold."""

    b1: Any
    b2: Any
    eps: Any

    def steps(
        self,
        rate: Any,
        params: optax.Params,
        state: optax.OptState,
        plain_update: Callable[[], optax.Updates],
        each: bool = False,
    ) -> list[Any]:
        """For each leaf lr / (sqrt(nu_hat) + eps) where ``state`` holds its nu, else ``rate``.

        Args:
          rate: the learning rate lr; None estimates it from ``plain_update()``, an update by Adam alone.
          params: the parameters.
          state: the state of the optimizer, in which the states of Adam are searched for.
          plain_update: returns the update of the optimizer without weight decay.
          each: estimate one rate for each leaf instead of one for all.
        """
        treedef: Any = jax.tree.structure(params)
        leaves = jax.tree.leaves(params)
        numbers = treedef.unflatten(range(treedef.num_leaves))
        steps = [rate] * treedef.num_leaves
        foreign = _projected(state, numbers)
        for moments in _nodes(state, _is_adam):
            second = {i: v for i, v in _by_leaf(moments.nu, numbers).items() if i not in foreign and _fits(v, leaves[i])}
            if not second:
                continue
            adam = self._injected(state)
            scales = {i: adam._scale(v, moments.count) for i, v in second.items()}
            rates = [rate] * len(second)
            if rate is None:
                mean = _by_leaf(moments.mu, numbers)
                updates = treedef.flatten_up_to(plain_update())
                directions = [_debias(mean[i], adam.b1, moments.count) / scales[i] for i in second]
                rates = _estimated_rates([updates[i] for i in second], directions, each)
            for i, lr in zip(second, rates):
                steps[i] = jnp.asarray(lr, scales[i].dtype) / scales[i]
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


def holds_adam(state: optax.OptState) -> bool:
    """Whether there are moments of Adam in the state."""
    return bool(_nodes(state, _is_adam))


def injected_rate(state: optax.OptState) -> Any:
    """The learning rate in the states of ``optax.inject_hyperparams``; None if there is none.

    Raises:
      ValueError: there are several.
    """
    rates = [n.hyperparams["learning_rate"] for n in _nodes(state, _is_injected) if "learning_rate" in n.hyperparams]
    if len(rates) > 1:
        raise ValueError(f"learning_rate must be given: the state of the inner optimizer holds {len(rates)} of them")
    return rates[0] if rates else None


def has_trust_ratio(transformation: Any) -> bool:
    """Whether ``optax.scale_by_trust_ratio`` is part of a transformation, as in ``lamb``, ``lars`` and ``fromage``.

    It has no state. It is found among the functions that those of the transformation close over or name.
    """
    seen: set[int] = set()
    waiting = [transformation]
    while waiting:
        v = waiting.pop()
        if id(v) in seen:
            continue
        seen.add(id(v))
        if isinstance(v, (tuple, list)):
            waiting += v
        elif isinstance(v, dict):
            waiting += v.values()
        elif isinstance(v, functools.partial):
            waiting += [v.func, *v.args, *v.keywords.values()]
        elif isinstance(v, types.MethodType):
            waiting += [v.__func__, v.__self__]
        elif isinstance(v, types.FunctionType):
            if _names_trust_ratio(v):
                return True
            for cell in v.__closure__ or ():
                with contextlib.suppress(ValueError):  # a cell that is empty so far
                    waiting.append(cell.cell_contents)
        elif type(v).__module__.startswith("optax."):  # a wrapper that is a class, as MultiSteps
            waiting += getattr(v, "__dict__", {}).values()
    return False


TRUST_RATIO = ("scale_by_trust_ratio", "lamb", "lars", "fromage")


def _names_trust_ratio(f: types.FunctionType) -> bool:
    """Whether f belongs to a function of optax with a trust ratio, or calls one by a global name."""
    if (f.__module__ or "").startswith("optax.") and f.__qualname__.split(".")[0] in TRUST_RATIO:
        return True
    called = set(f.__code__.co_names)
    own = [f.__globals__.get(name) for name in called]
    return any(v is getattr(optax, name) for v in own if v is not None for name in TRUST_RATIO) or (
        optax in own and not called.isdisjoint(TRUST_RATIO)
    )


def _estimated_rates(updates: list[Any], directions: list[jax.Array], each: bool) -> list[jax.Array]:
    """For each leaf the number r >= 0 that minimises ||u + r d||, summed over all leaves unless ``each``.

    A leaf with d = 0 has no rate of its own, and takes that of all; if all are 0, it is 0.
    """
    pairs = [(_arrays.widen(jnp.asarray(u)), d) for u, d in zip(updates, directions)]
    squares = [jnp.sum(d * d) for _, d in pairs]
    inners = [-jnp.sum(u * d) for u, d in pairs]
    # a reduction behind a barrier: XLA would compile a chain of sums into the step of every leaf
    total = jax.lax.optimization_barrier((jnp.stack(inners), jnp.stack(squares)))  # type: ignore[no-untyped-call]
    common = _ratio(jnp.sum(total[0]), jnp.sum(total[1]), 0)
    return [_ratio(a, b, common) for a, b in zip(inners, squares)] if each else [common] * len(pairs)


def _ratio(inner: Any, square: Any, otherwise: Any) -> jax.Array:
    return jnp.where(square > 0, jnp.maximum(inner, 0) / jnp.where(square > 0, square, 1), otherwise)


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


def _fits(moment: Any, x: Any) -> bool:
    """Whether a moment is that of the entries of the leaf x."""
    return is_floating(as_array(x)) and jnp.shape(moment) == jnp.shape(x)


def _projected(state: optax.OptState, numbers: Any) -> set[int]:
    """The numbers of the leaves whose moments are those of projected gradients, as in ``optax.contrib.galore``.

    They may have the shape of the leaf, but belong to other coordinates.
    """
    found = [_by_leaf(node.projector, numbers) for node in _nodes(state, _is_projecting)]
    return {i for projectors in found for i, p in projectors.items() if p.size}


def _nodes(state: optax.OptState, kind: Callable[[Any], bool]) -> list[Any]:
    """All nodes for which ``kind`` holds, also those inside one another."""
    found = [n for n in jax.tree.leaves(state, is_leaf=kind) if kind(n)]
    return found + [m for n in found if not _is_adam(n) for m in _nodes(tuple(n), kind)]


def _is_adam(node: Any) -> bool:
    return isinstance(node, optax.ScaleByAdamState)


def _is_injected(node: Any) -> bool:
    return hasattr(node, "hyperparams") and hasattr(node, "inner_state")


def _is_projecting(node: Any) -> bool:
    return hasattr(node, "projector") and hasattr(node, "_fields")


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)
