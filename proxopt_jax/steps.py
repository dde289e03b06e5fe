"""Helpers shared by the transformations: schedules, dtypes of states, exact differences, sharding."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from proxopt import _arrays

R = TypeVar("R")

NO_PARAMS = (
    "You are using a transformation that requires the current value of parameters, but you are not passing `params` when "
    "calling `update`: write tx.update(grads, state, params)"
)


def at(value: Any, count: Any) -> Any:
    """Evaluate a schedule at step ``count``; return a number as it is."""
    return value(count) if callable(value) else value


def like_state(v: Any, x: Any) -> Any:
    """Return a Python number as a float, and a traced one in the precision in which x (an array or a list) is computed."""
    if _arrays.is_number(v):
        return float(v)
    return jnp.asarray(v, jnp.real(_arrays.widen(jax.tree.leaves(x)[0])).dtype)


def as_array(x: Any) -> Any:
    """Return a leaf of the parameters as an array; an abstract one, a ``jax.ShapeDtypeStruct``, as it is."""
    return x if isinstance(x, jax.ShapeDtypeStruct) else jnp.asarray(x)


def is_floating(x: Any) -> bool:
    """Whether a leaf is real or complex floating point; keys of random numbers and abstract leaves have a dtype too."""
    return bool(jnp.issubdtype(x.dtype, jnp.inexact))


def difference(new: jax.Array, x: jax.Array, u: jax.Array) -> jax.Array:
    """new - x, to be added to x by ``optax.apply_updates``: exactly -x where new is 0.

    The result has the dtype of the update u, or that of x if it is wider: a narrower dtype could not represent -x.
    """
    wide = jnp.promote_types(new.dtype, jnp.promote_types(x.dtype, jnp.float32))
    return (new.astype(wide) - x.astype(wide)).astype(jnp.promote_types(x.dtype, jnp.asarray(u).dtype))


def warn_below_half_ulp(params: Any, rate: Any) -> None:
    """Warn if steps of the size ``rate``, about those of Adam, are rounded away in most entries of a half-precision leaf.

    Abstract and traced parameters have no values yet, and cause no warning.
    """
    for path, x in jax.tree_util.tree_flatten_with_path(params)[0]:
        if isinstance(x, jax.core.Tracer) or getattr(x, "dtype", None) not in (jnp.float16, jnp.bfloat16) or not _has_values(x):
            continue
        largest = _largest(rate)
        if largest is None:
            return
        _, exponent = jnp.frexp(x.astype(jnp.float32))
        ulp = float(jnp.finfo(x.dtype).eps) * 2.0 ** (exponent - 1)  # type: ignore[no-untyped-call]
        rounded_away = jnp.sum((x != 0) & (largest < ulp / 2)) / jnp.maximum(jnp.sum(x != 0), 1)
        if float(rounded_away) > 0.5:
            warnings.warn(
                f"params leaf {path_name(path)!r} is {x.dtype}, and the learning rate {largest:g}, about the size of a step of "
                f"Adam, is less than half an ulp of {float(rounded_away):.0%} of its entries: they may never change. Keep the "
                "parameters in float32 and cast them in the forward pass",
                stacklevel=3,
            )
            return


def _has_values(x: Any) -> bool:
    return isinstance(x, (jax.Array, np.ndarray)) and x.size > 0


def _largest(rate: Any) -> float | None:
    """The learning rate, or the largest that a schedule takes at a few steps; None if it is 0, or has no value."""
    rates = [at(rate, jnp.asarray(count, jnp.int32)) for count in ((0, 1, 10, 100, 1000, 10_000) if callable(rate) else (0,))]
    if any(r is None or isinstance(r, jax.core.Tracer) or jnp.ndim(r) for r in rates):
        return None
    return max(float(r) for r in rates) or None


def path_name(path: Any) -> str:
    """The keys of a path joined by "/"."""
    return "/".join(map(_key, path))


def _key(entry: Any) -> str:
    for name in ("key", "name", "idx"):
        if hasattr(entry, name):
            return str(getattr(entry, name))
    return str(entry)


def any_sharding(f: Callable[..., R], like: Any, *others: Any) -> Callable[..., R]:
    """The function ``f(*args, *others)`` of ``args``, which may be on a mesh with explicit axes: XLA chooses the sharding inside.

    Groups may extend over several shards, and the operations used on groups (sort, concatenate, gather) have no unique sharding
    that could be stated. The results are sharded as the tree ``like``.

    Args:
      f: the function. It must close over no arrays: under ``jax.set_mesh`` they are on the explicit mesh, not on that inside.
      like: a tree of arrays like the results.
      others: further arguments of f: trees of numbers, arrays, and penalties, in whose fields there may be arrays.
    """
    if not any(map(is_explicit, jax.tree.leaves(like))):
        return lambda *args: f(*args, *others)
    arrays: list[Any] = []

    def note(a: Any) -> Any:
        arrays.append(a)
        return a

    jax.tree.map(partial(_replaced, note), others)

    def inside(moved: list[Any], *args: Any) -> R:
        waiting = iter(moved)
        return f(*args, *jax.tree.map(partial(_replaced, lambda _: next(waiting)), others))

    out_sharding = jax.tree.map(lambda a: jax.typeof(a).sharding, like)
    return partial(jax.sharding.auto_axes(inside, out_sharding=out_sharding), arrays)


def _replaced(new: Callable[[Any], Any], v: Any) -> Any:
    """Replace an array on an explicit mesh by ``new`` of it, or all such arrays in the fields of a penalty."""
    if isinstance(v, jax.Array):
        return new(v) if is_explicit(v) else v
    if not hasattr(v, "prox"):
        return v
    fields = getattr(v, "__dict__", {})
    found = {name: jax.tree.map(partial(_replaced, new), field) for name, field in fields.items()}
    changed = {name: field for name, field in found.items() if not _same_leaves(field, fields[name])}
    other = copy.copy(v) if changed else v
    for name, field in changed.items():
        object.__setattr__(other, name, field)  # penalties are frozen dataclasses
    return other


def _same_leaves(a: Any, b: Any) -> bool:
    return all(x is y for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


def varying_axes(a: Any) -> frozenset[str]:
    """The axes of a mesh over which an array inside of ``jax.shard_map`` differs."""
    kind = jax.typeof(a)
    manual = getattr(kind, "manual_axis_type", None)  # since JAX 0.9; before, the attribute was vma
    return frozenset(getattr(kind, "vma", ()) if manual is None else manual.varying)


def is_explicit(a: Any) -> bool:
    mesh = getattr(getattr(jax.typeof(a), "sharding", None), "mesh", None)
    return any("Explicit" in str(kind) for kind in getattr(mesh, "axis_types", None) or ())
