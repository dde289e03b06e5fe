"""Loops over batches of problems: JAX traces them; elsewhere they are ordinary loops that skip finished problems."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
from array_api_compat import is_jax_array

from proxopt import _arrays
from proxopt._arrays import Array

State = TypeVar("State", bound=tuple[Any, ...])


def repeat_while(condition: Callable[[State], Any], body: Callable[[State], State], state: State) -> State:
    """Repeat ``state = body(state)`` while ``condition(state)`` holds; ``state`` is a tuple of arrays."""
    if any(is_jax_array(leaf) for leaf in state):
        return cast(State, _looped_in_jax(_while(condition, body), state))
    while bool(condition(state)):
        state = body(state)
    return state


def repeat(times: Any, body: Callable[[State], State], state: State) -> State:
    """Repeat ``state = body(state)`` for ``times`` times, a number that JAX may trace; ``state`` is a tuple of arrays."""
    if any(is_jax_array(leaf) for leaf in state):
        import jax

        def loop(s: State) -> Any:
            return jax.lax.fori_loop(0, times, lambda _, inner: body(inner), s)

        return cast(State, loop(state) if isinstance(times, jax.core.Tracer) else _looped_in_jax(loop, state))
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
        goes_on = lambda s: (s[0] < limit) & unfinished(s[1]).any()
        return cast(State, _looped_in_jax(_while(goes_on, lambda s: (s[0] + 1, body(s[1]))), (0, state))[1])
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


def _while(condition: Callable[[Any], Any], body: Callable[[Any], Any]) -> Callable[[Any], Any]:
    import jax

    return lambda state: jax.lax.while_loop(condition, body, state)


def _looped_in_jax(loop: Callable[[Any], Any], state: Any) -> Any:
    """``loop(state)``, a loop of ``jax.lax``, which outside of ``jax.jit`` is compiled once for all equal programs.

    JAX itself would compile it in each call, because the functions of the loop are new ones every time. Here it is traced in
    each call, and programs are equal if their traces are, with the arrays that they close over as arguments.
    """
    import jax

    leaves, treedef = jax.tree.flatten(state)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return loop(state)
    trace = jax.make_jaxpr(loop)(state)
    key = _program_key(trace)
    if key is None or any(isinstance(c, jax.core.Tracer) for c in trace.consts):
        return loop(state)
    if key not in _programs:
        if len(_programs) == MAX_PROGRAMS:
            del _programs[next(iter(_programs))]
        _programs[key] = _compile(trace.jaxpr)
    return jax.tree.unflatten(treedef, _programs[key](trace.consts, leaves))


MAX_PROGRAMS = 128
_programs: dict[Any, Callable[[Any, Any], Any]] = {}  # the oldest is removed first


def _compile(jaxpr: Any) -> Callable[[Any, Any], Any]:
    import jax
    from jax.extend import core

    # without the constants of the trace, which the program need not keep alive
    return jax.jit(lambda constants, leaves: core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, constants))(*leaves))


def _program_key(trace: Any) -> Any:
    """What distinguishes a program from others: its text and its scalar constants; None if it contains constant arrays."""
    constants: list[bytes] = []
    waiting = [trace.jaxpr]
    while waiting:
        jaxpr = waiting.pop()
        for equation in jaxpr.eqns:
            for v in equation.invars:
                value = getattr(v, "val", None)  # of a literal; its text may be rounded
                if value is not None and np.ndim(value):
                    return None
                constants.append(b"" if value is None else np.asarray(value).tobytes())
            for parameter in equation.params.values():
                for part in parameter if isinstance(parameter, (tuple, list)) else (parameter,):
                    if len(getattr(part, "consts", ())):
                        return None
                    inner = getattr(part, "jaxpr", part)
                    if hasattr(inner, "eqns"):
                        waiting.append(inner)
    return str(trace.jaxpr), tuple(constants)


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
