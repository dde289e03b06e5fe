"""Loops over batches of problems: traced by JAX, simply run elsewhere, where finished problems cost nothing more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from array_api_compat import is_jax_array

from proxopt import _arrays
from proxopt._arrays import Array

State = TypeVar("State", bound=tuple)


def repeat_while(condition: Callable[[State], Any], body: Callable[[State], State], state: State) -> State:
    """`state = body(state)` while `condition(state)`; `state` is a tuple of arrays."""
    if any(is_jax_array(leaf) for leaf in state):
        import jax

        return jax.lax.while_loop(condition, body, state)
    while bool(condition(state)):
        state = body(state)
    return state


def repeat(times: int, body: Callable[[State], State], state: State) -> State:
    """`state = body(state)`, so many times."""
    if any(is_jax_array(leaf) for leaf in state):
        import jax

        return jax.lax.fori_loop(0, times, lambda _, s: body(s), state)
    for _ in range(times):
        state = body(state)
    return state


def repeat_each(unfinished: Callable[[State], Array], body: Callable[[State], State], state: State, limit: int) -> State:
    """`state = body(state)` for the problems that are `unfinished(state)`, at most `limit` times.

    state: a named tuple of arrays with one row for each problem. Rows that are finished must stay as they are in `body`; outside
    JAX they are also left out of the batch as they become many.
    """
    if is_jax_array(state[0]):
        goes_on = lambda s: (s[0] < limit) & unfinished(s[1]).any()
        import jax

        return jax.lax.while_loop(goes_on, lambda s: (s[0] + 1, body(s[1])), (0, state))[1]
    xp = _arrays.namespace(state[0])
    whole, rows = None, None
    for _ in range(limit):
        open_rows = unfinished(state)
        count = int(xp.count_nonzero(open_rows))
        if count == 0:
            break
        if count <= 0.7 * open_rows.shape[0]:
            keep = xp.nonzero(open_rows)[0]
            whole = _put(whole, rows, state)
            rows = keep if rows is None else rows[keep]
            state = _make(state, [xp.take(a, keep, axis=0) for a in state])
        state = body(state)
    return state if rows is None else _put(whole, rows, state)


def _put(whole: Any, rows: Any, state: State) -> State:
    if rows is None:
        return _make(state, [_arrays.namespace(a).asarray(a, copy=True) for a in state])  # never write into what the caller holds
    for large, small in zip(whole, state):
        large[rows, ...] = small
    return whole


def _make(state: State, arrays: list[Array]) -> State:
    return type(state)._make(arrays)  # type: ignore[attr-defined]
