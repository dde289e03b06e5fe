"""Zeros that stay zero: training after the penalty has chosen which entries are zero."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from proxopt import L1
from proxopt_jax.point import map_points
from proxopt_jax.states import FreezeZerosState
from proxopt_jax.steps import NO_PARAMS, as_array, is_floating
from proxopt_jax.trees import Penalties, PyTree, paths

SELECTED = L1(0.0)  # marks leaves in a list of (path pattern, penalty); any penalty would do


def freeze_zeros(inner: optax.GradientTransformation, where: PyTree = None) -> optax.GradientTransformationExtraArgs:
    r"""Any optax optimizer, keeping the zeros that the parameters have at ``init``.

    With Z the set of these zeros, the gradient g that ``inner`` receives is set to 0 in Z, and its update u is replaced by u':

    .. math::

        g_i = 0, \quad x_i + u'_i = 0 \quad (i \in Z); \qquad u'_i = u_i \quad (i \notin Z)

    Use it to finish a training without the bias of the penalty towards zero. Norms of gradients, as for
    ``optax.clip_by_global_norm`` inside ``inner``, are those of the other entries, so that training continues as it would after
    removing the zeros. In the states of ``hapg``, ``adam_hapg`` and ``prox_sgd`` with ``tau`` the entries of the prox point are
    kept at zero too. The penalty is not switched off here: pass an ``inner`` without one.

    - To start a new training at the sparse parameters, pass them to ``init``, and not the search point of an accelerated method::

          params = prox_point(state, params)
          tx = freeze_zeros(optax.adam(lr))
          state = tx.init(params)

    - To continue with the moments and counts of a training by ``prox_adam(lr, penalty)``, give its state to the same optimizer
      without penalty. The parameters may remain at the search point; the first update makes the frozen entries zero::

          tx = freeze_zeros(prox_adam(lr, None))
          state = tx.init(prox_point(state, params))._replace(inner_state=state)

    - To let zeros become nonzero again, continue with ``inner`` and ``state.inner_state``. To freeze new zeros too, call ``init``
      again and keep the inner state: ``tx.init(prox_point(state, params))._replace(inner_state=state.inner_state)``.

    Args:
      inner: an optax optimizer. No transformation may scale or average its update afterwards: this is the outermost one, except
        for ``optax.masked`` and ``partition``, ``MultiSteps``, and ``projected``, which belong outside.
      where: the leaves whose zeros stay: a path pattern, a list of them, or the argument ``penalty`` of the training before, for
        the leaves that have one; see ``proxopt_jax.trees``. None means all leaves, among them biases and scales: exclude those
        that are zero only because they were never trained. Zeros of other leaves may become nonzero. Leaves that are not floating
        point are never selected.

    Returns:
      An ``optax.GradientTransformationExtraArgs``, whose ``update`` needs ``params``. Its state holds ``inner_state`` and
      ``zeros``, one byte for each parameter.

    Raises:
      TypeError: ``inner`` is not an optimizer, or ``where`` is none of these.
      ValueError: at ``init``, a pattern decides no leaf, or ``update`` is called without ``params``.

    Warns:
      UserWarning: at ``init`` with ``where=None``, a leaf holds only zeros.

    Source: Meinshausen, "Relaxed lasso", 2007 (training without penalty on the support that a penalty has chosen); Han, Pool,
    Tran, Dally, "Learning both weights and connections for efficient neural networks", 2015, section 3.

    >>> import jax.numpy as jnp, optax, proxopt_jax
    >>> w = jnp.array([1.0, 0.0])
    >>> tx = proxopt_jax.freeze_zeros(optax.sgd(0.1))
    >>> update, state = tx.update(w - 2, tx.init(w), w)
    >>> optax.apply_updates(w, update)
    Array([1.1, 0. ], dtype=float32)
    """
    if not (hasattr(inner, "init") and hasattr(inner, "update")):
        raise TypeError(f"inner must be an optax optimizer, got {type(inner).__name__}")
    optimizer: Any = optax.with_extra_args_support(cast(optax.GradientTransformation, inner))
    leaves_of = _selection(where)

    def init(params: optax.Params) -> FreezeZerosState:
        treedef: Any = jax.tree.structure(params)
        selected = _selected(leaves_of, params)
        zeros = [_zeros(x, chosen) for x, chosen in zip(jax.tree.leaves(params), selected)]
        if where is None:
            _warn_of_leaves_of_zeros(params, zeros)
        return FreezeZerosState(optimizer.init(params), treedef.unflatten(zeros))

    def update(
        updates: optax.Updates, state: FreezeZerosState, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, FreezeZerosState]:
        if params is None:
            raise ValueError(NO_PARAMS)
        treedef: Any = jax.tree.structure(params)
        masks = treedef.flatten_up_to(state.zeros)
        masks = [mask if chosen else None for mask, chosen in zip(masks, _selected(leaves_of, params))]
        gs = [_replaced(mask, 0, g) for mask, g in zip(masks, treedef.flatten_up_to(updates))]
        moved, inner_state = optimizer.update(treedef.unflatten(gs), state.inner_state, params, **extra)
        to_zero = [None if mask is None else -jnp.asarray(x) for mask, x in zip(masks, jax.tree.leaves(params))]
        us = [_replaced(mask, minus_x, u) for mask, minus_x, u in zip(masks, to_zero, treedef.flatten_up_to(moved))]
        inner_state = map_points(partial(_with_zeros, dict(zip(paths(params), masks))), inner_state)
        return treedef.unflatten(us), FreezeZerosState(inner_state, state.zeros)

    return optax.GradientTransformationExtraArgs(init, update)


def _replaced(mask: Any, new: Any, v: Any) -> Any:
    """The array v with ``new`` where the mask is True; v itself if it or the mask is None."""
    return v if mask is None or v is None else jnp.where(mask, new, v)


def _zeros(x: Any, selected: bool) -> jax.Array:
    """The mask of a leaf; abstract leaves, which have no values, give one that is False."""
    if not selected or isinstance(x, jax.ShapeDtypeStruct):
        return jnp.zeros_like(x, dtype=bool)
    return jnp.asarray(x) == 0


def _with_zeros(masks: dict[str, Any], point: PyTree) -> PyTree:
    """The prox point with the frozen zeros; by path, as a wrapper may have masked some of the leaves."""
    treedef: Any = jax.tree.structure(point)
    return treedef.unflatten([_replaced(masks.get(path), 0, p) for path, p in zip(paths(point), jax.tree.leaves(point))])


def _selection(where: PyTree) -> Penalties:
    """The argument ``where`` in the form of penalties: a leaf is selected if it has one."""
    patterns = [where] if isinstance(where, str) else where
    if where is None:
        return Penalties(SELECTED, name="where")
    if isinstance(patterns, (list, tuple)) and patterns and all(isinstance(pattern, str) for pattern in patterns):
        return Penalties([(pattern, SELECTED) for pattern in patterns], name="where")
    try:
        return Penalties(where, name="where")
    except TypeError:
        raise TypeError(
            "where must be a path pattern, a list of path patterns, the argument penalty of a transformation, or None, "
            f"got {where!r}"
        ) from None


def _selected(leaves_of: Penalties, params: optax.Params) -> list[bool]:
    floating = [is_floating(as_array(x)) for x in jax.tree.leaves(params)]
    return [a and b for a, b in zip(leaves_of.selected(params), floating)]


def _warn_of_leaves_of_zeros(params: optax.Params, zeros: list[jax.Array]) -> None:
    """Warn of leaves without a nonzero entry, which may be at their first value; abstract and traced ones have no values."""
    known = [
        (path, mask)
        for path, x, mask in zip(paths(params), jax.tree.leaves(params), zeros)
        if isinstance(x, (jax.Array, np.ndarray)) and not isinstance(x, jax.core.Tracer) and mask.size
    ]
    found = [path for path, mask in known if bool(mask.all())]
    if found:
        names = ", ".join(map(repr, found[:10])) + (", ..." if len(found) > 10 else "")
        warnings.warn(
            f"params hold only zeros in the leaves {names}, and all of them stay zero. If no penalty zeroed them, as for biases "
            "that were never trained, pass where= without them",
            stacklevel=3,
        )
