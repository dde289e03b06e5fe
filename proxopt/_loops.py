"""Loops over batches of problems: JAX traces them; elsewhere they are ordinary loops that skip finished problems."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from array_api_compat import is_jax_array

from proxopt import _arrays
from proxopt._arrays import Array

State = TypeVar("State", bound=tuple[Any, ...])


def repeat_while(condition: Callable[[State], Any], body: Callable[[State], State], state: State) -> State:
    """Repeat ``state = body(state)`` while ``condition(state)`` holds; ``state`` is a tuple of arrays."""
    if any(is_jax_array(leaf) for leaf in state):
        import jax

        return jax.lax.while_loop(condition, body, state)
    while bool(condition(state)):
        state = body(state)
    return state


def repeat(times: Any, body: Callable[[State], State], state: State) -> State:
    """Repeat ``state = body(state)`` for ``times`` times, a number that JAX may trace; ``state`` is a tuple of arrays."""
    if any(is_jax_array(leaf) for leaf in state):
        import jax

        return cast(State, jax.lax.fori_loop(0, times, lambda _, s: body(s), state))
    for _ in range(times):
        state = body(state)
    return state


def repeat_each(unfinished: Callable[[State], Array], body: Callable[[State], State], state: State, limit: int) -> State:
    """Repeat ``state = body(state)`` for the problems that are ``unfinished(state)``, at most ``limit`` times.

    Outside JAX the rows of finished problems are removed from the batch once they are 30 % of it: fewer would not repay the copy.

    Args:
      unfinished: returns one boolean for each problem.
      body: one iteration of all problems in ``state``. It must leave the rows of finished problems as they are.
      state: a named tuple of arrays with one row for each problem.
      limit: the largest number of iterations.
    """
    if is_jax_array(state[0]):
        import jax

        goes_on = lambda s: (s[0] < limit) & unfinished(s[1]).any()
        return jax.lax.while_loop(goes_on, lambda s: (s[0] + 1, body(s[1])), (0, state))[1]
    xp = _arrays.namespace(state[0])
    # once rows were removed, `whole` holds all problems, and `rows` the places in it of those that `state` still holds
    whole: State | None = None
    rows: Array = None
    for _ in range(limit):
        active = unfinished(state)
        count = int(xp.count_nonzero(active))
        if count == 0:
            break
        if count <= 0.7 * active.shape[0]:
            remaining = xp.nonzero(active)[0]
            whole = _write_back(xp, whole, rows, state)
            rows = remaining if rows is None else rows[remaining]
            state = _make(state, [xp.take(a, remaining, axis=0) for a in state])
        state = body(state)
    return state if rows is None else _write_back(xp, whole, rows, state)


def _write_back(xp: Any, whole: State | None, rows: Array, state: State) -> State:
    """Write the rows of ``state`` to their places in ``whole``, which at first is a copy: the arrays may be the caller's."""
    if whole is None:
        return _make(state, [xp.asarray(a, copy=True) for a in state])
    for large, small in zip(whole, state):
        large[rows, ...] = small
    return whole


def _make(state: State, arrays: list[Array]) -> State:
    """A named tuple of the type of ``state``."""
    return cast(State, type(state)._make(arrays))  # type: ignore[attr-defined]
