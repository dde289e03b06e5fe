"""What the transformations share: numbers that may be schedules, and updates that land exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from proxopt import _arrays

NO_PARAMS = (
    "You are using a transformation that requires the current value of parameters, but you are not passing `params` when "
    "calling `update`: write tx.update(grads, state, params)"
)


def at(value: Any, count: Any) -> Any:
    """A number as it is, a schedule at step `count`."""
    return value(count) if callable(value) else value


def like_state(v: Any, x: Any) -> Any:
    """A number stays one, a traced number comes to the precision in which x (an array or a list) is computed."""
    if _arrays.is_number(v):
        return float(v)
    return jnp.asarray(v, jnp.real(_arrays.widen(jax.tree.leaves(x)[0])).dtype)


def difference(new: jax.Array, x: jax.Array, u: jax.Array) -> jax.Array:
    """new - x, which `optax.apply_updates` adds to x: exactly -x where new is 0.

    In the dtype of the update u, or of x where that is wider: a narrower one could not hold -x.
    """
    wide = jnp.promote_types(new.dtype, jnp.promote_types(x.dtype, jnp.float32))
    return (new.astype(wide) - x.astype(wide)).astype(jnp.promote_types(x.dtype, jnp.asarray(u).dtype))


def any_sharding(f: Callable[..., Any], like: Any) -> Callable[..., Any]:
    """f, also for arrays on a mesh with explicit axes: XLA shards inside, the results are sharded as the tree `like`.

    Groups may lie across shards; sorting, joining and spreading over groups have no sharding of their own to state.
    """
    if not any(map(_is_explicit, jax.tree.leaves(like))):
        return f
    return jax.sharding.auto_axes(f, out_sharding=jax.tree.map(lambda a: jax.typeof(a).sharding, like))


def _is_explicit(a: Any) -> bool:
    if not hasattr(jax, "typeof"):  # an older JAX, without explicit axes
        return False
    mesh = getattr(getattr(jax.typeof(a), "sharding", None), "mesh", None)
    return any("Explicit" in str(kind) for kind in getattr(mesh, "axis_types", None) or ())
