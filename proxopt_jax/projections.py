"""A projection of the parameters after the step of any optax optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from proxopt import _arrays
from proxopt.penalties import declared
from proxopt_jax.point import map_points
from proxopt_jax.steps import NO_PARAMS, any_sharding, difference
from proxopt_jax.trees import Penalties, PyTree, is_rules, paths


def projected(
    inner: optax.GradientTransformation, projection: PyTree, *, joint: bool = False
) -> optax.GradientTransformationExtraArgs:
    r"""Any optax optimizer followed by a projection of the parameters, and of the prox point where its state holds one.

    The update u of ``inner`` is replaced by u', with which ``optax.apply_updates`` yields the projection:

    .. math::

        x + u' = \mathrm{project}(x + u)

    In the states of ``hapg``, ``adam_hapg`` and ``prox_sgd`` with ``tau`` the prox point is replaced by its projection too, so
    that the next step extrapolates from projected points and ``prox_point`` returns one. Zeros of the prox stay exact if the
    projection maps zeros to zeros, as that of ``proxopt.Sphere`` does. The state is that of ``inner``.

    Args:
      inner: an optax optimizer. No transformation may scale or average its update afterwards: this is the outermost one, except
        for ``optax.masked`` and ``partition``, and for ``MultiSteps``, which belongs outside.
      projection: an object with a method ``project(x)``, such as ``proxopt.Sphere``, or a function from an array to an array of
        its shape, which JAX can trace; a list of (path pattern, projection); a tree of projections; or None. See
        ``proxopt_jax.trees``, with projections in place of penalties.
      joint: treat the leaves that share one projection as one problem: it is called with the list of them, and returns a list.

    Returns:
      An ``optax.GradientTransformationExtraArgs``, whose ``update`` needs ``params``.

    Raises:
      TypeError: ``projection`` is none of these; at ``init``, a leaf with a projection is not floating point.
      ValueError: at ``init``, a projection does not fit a leaf or returns another shape, or a pattern decides no leaf.

    Source: the projected gradient method, Bertsekas, "Nonlinear programming", 2016, section 3.3.

    >>> import jax.numpy as jnp, optax, proxopt_jax
    >>> from proxopt import L1, NonNegative, Sphere
    >>> w = jnp.array([0.6, 0.8, 0.01])
    >>> tx = proxopt_jax.projected(proxopt_jax.hapg(0.1, NonNegative(L1(0.5))), Sphere())
    >>> update, state = tx.update(jnp.array([-0.5, 0.5, 0.0]), tx.init(w), w)
    >>> optax.apply_updates(w, update).round(4)
    Array([0.6508, 0.7593, 0.    ], dtype=float32)
    """
    if not (hasattr(inner, "init") and hasattr(inner, "update")):
        raise TypeError(f"inner must be an optax optimizer, got {type(inner).__name__}")
    optimizer: Any = optax.with_extra_args_support(cast(optax.GradientTransformation, inner))
    projections = Penalties(_as_operators(projection), joint=joint, name="projection")

    def init(params: optax.Params) -> optax.OptState:
        projections.check(params, lambda problem, x: problem.penalty.prox(x))
        return optimizer.init(params)

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        if params is None:
            raise ValueError(NO_PARAMS)
        moved, state = optimizer.update(updates, state, params, **extra)
        treedef: Any = jax.tree.structure(params)
        xs = [jnp.asarray(x) for x in jax.tree.leaves(params)]
        us = treedef.flatten_up_to(moved)
        for problem in projections.problems(params, 0):
            if problem.penalty is None or any(us[i] is None for i in problem.where):
                continue
            x, u = problem.take(xs), problem.take(us)
            z = jax.tree.map(lambda a, b: _arrays.widen(a) + _arrays.widen(jnp.asarray(b)), x, u)
            new = any_sharding(problem.penalty.prox, x)(z)
            problem.put(us, jax.tree.map(difference, new, x, u))
        return treedef.unflatten(us), map_points(partial(_projected, projections, params), state)

    return optax.GradientTransformationExtraArgs(init, update)


def _projected(projections: Penalties, params: optax.Params, point: PyTree) -> PyTree:
    """The projection of a prox point."""
    treedef: Any = jax.tree.structure(point)
    leaves = jax.tree.leaves(point)
    place = {path: i for i, path in enumerate(paths(point))}  # a wrapper may have masked some of the leaves of params
    names = paths(params)
    for problem in projections.problems(params, 0):
        if problem.penalty is None or any(names[i] not in place for i in problem.where):
            continue
        there = [place[names[i]] for i in problem.where]
        p = [leaves[k] for k in there] if problem.joint else leaves[there[0]]
        new = any_sharding(problem.penalty.prox, p)(p)
        for k, value in zip(there, new if problem.joint else [new]):
            leaves[k] = value
    return treedef.unflatten(leaves)


@dataclass(frozen=True, eq=False)
class Projection:
    """A projection in the form of a penalty: the indicator function of a set."""

    projection: Any

    def value(self, x: Any) -> float:
        """0: x is taken to be in the set."""
        del x
        return 0.0

    def prox(self, x: Any, step: Any = 1.0) -> Any:
        """The projection of an array, or of a list of arrays that are one problem."""
        del step
        method = getattr(self.projection, "project", None)
        found = (method if callable(method) else self.projection)(x)
        xs, results = ([x], [found]) if not isinstance(x, list) else (x, found)
        if not isinstance(results, (list, tuple)) or len(results) != len(xs):
            raise ValueError(f"it must return a list of one array for each of {len(xs)} leaves, got {type(results).__name__}")
        for r, a in zip(results, xs):
            if jnp.shape(r) != jnp.shape(a):
                raise ValueError(f"it must return an array of shape {jnp.shape(a)}, got {jnp.shape(r)}")
            if jnp.iscomplexobj(r) and not jnp.iscomplexobj(a):
                raise TypeError(f"it must return a real array for one of {a.dtype}, got {jnp.result_type(r)}")
        return list(results) if isinstance(x, list) else results[0]

    def _check(self, xs: list[Any]) -> None:
        declared.check_fit(self.projection, xs)


def _as_operators(spec: PyTree) -> PyTree:
    """The argument ``projection`` with each projection in the form of a penalty, one object for each different one."""
    made: dict[int, Projection] = {}

    def operator(projection: Any) -> Projection | None:
        if projection is None:
            return None
        if not _is_projection(projection):
            raise TypeError(
                "projection must be an object with a method project(x), a function, a list of (path pattern, projection), a tree "
                f"of projections, or None, got {projection!r} of type {type(projection).__name__}"
            )
        return made.setdefault(id(projection), Projection(projection))

    if is_rules(spec):
        return [(pattern, operator(projection)) for pattern, projection in spec]
    return jax.tree.map(operator, spec, is_leaf=lambda p: p is None or _is_projection(p))


def _is_projection(p: Any) -> bool:
    if isinstance(p, type):
        return False
    if callable(getattr(p, "project", None)):
        return True
    return callable(p) and jax.tree_util.all_leaves([p])  # a module of parameters may be callable, and is a tree
