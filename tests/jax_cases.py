"""Every public transformation of proxopt_jax under one name each, and how tests run them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import proxopt_jax
from proxopt import Groups, SparseGroupLasso


class Case(NamedTuple):
    """A transformation with all its numbers but the strength: `make(learning_rate, penalty)`."""

    name: str
    make: Callable[..., Any]
    rate: float = 0.05


def _link(make: Callable[..., Any]) -> Callable[..., Any]:
    """A last link behind plain SGD."""
    return lambda learning_rate, penalty: optax.chain(optax.sgd(learning_rate), make(learning_rate, penalty))


WHOLE = [
    Case("prox_sgd", proxopt_jax.prox_sgd),
    Case(
        "prox_sgd with tau", lambda learning_rate, penalty, **k: proxopt_jax.prox_sgd(learning_rate, penalty, tau=20.0, **k), 0.5
    ),
    Case("hapg", proxopt_jax.hapg, 0.02),
    Case("prox_adam", proxopt_jax.prox_adam),
    Case("adam_hapg", proxopt_jax.adam_hapg, 0.02),
]
LINKS = [
    Case("proximal link", _link(lambda lr, penalty: proxopt_jax.proximal(penalty, learning_rate=lr))),
    Case("proximal sgd", lambda lr, penalty: proxopt_jax.proximal(optax.sgd(lr), penalty, learning_rate=lr)),
    Case("proximal adam", lambda lr, penalty: proxopt_jax.proximal(optax.adam(lr), penalty)),
    Case("proximal injected adam", lambda lr, penalty: proxopt_jax.proximal(optax.inject_hyperparams(optax.adam)(lr), penalty)),
]
CASES = WHOLE + LINKS
MAIN = [c for c in CASES if c.name not in ("prox_sgd", "proximal sgd", "proximal injected adam")]  # one of each kind
# For what wrappers and JAX's transformations do with it, which the methods share: a state with a point, one with moments, a link,
# an optimizer inside.
SHARED = [c for c in MAIN if c.name in ("hapg", "prox_adam", "proximal link", "proximal adam")]
COLUMNS = SparseGroupLasso(0.3, l1_ratio=0.5, groups=Groups.along(0))
RULES = [("w", COLUMNS)]


def regression(dtype: Any = jnp.float32) -> tuple[dict, Callable[[dict], jax.Array]]:
    """Parameters and loss of a regression in which two of four columns do nothing."""
    rng = np.random.default_rng(0)
    a = rng.normal(size=(30, 6))
    y = a @ (rng.normal(size=(6, 4)) * (np.arange(4) < 2)) + 0.1 * rng.normal(size=(30, 4))
    params = {"w": jnp.asarray(rng.normal(size=(6, 4)) * 0.3, dtype), "b": jnp.zeros(4, dtype)}
    a, y = jnp.asarray(a, dtype), jnp.asarray(y, dtype)
    return params, lambda p: jnp.mean((a @ p["w"] + p["b"] - y) ** 2)


def train(tx: Any, params: Any, loss: Callable[[Any], jax.Array], steps: int) -> tuple[Any, Any]:
    """Parameters and state after `steps`, in one lax.scan."""

    def step(carry: tuple, _: None) -> tuple:
        p, state = carry
        updates, state = tx.update(jax.grad(loss)(p), state, p)
        return (optax.apply_updates(p, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), length=steps)[0]


def alone(case: Case, steps: int) -> tuple[Any, Any]:
    """Parameters and state of a case with RULES after `steps` on the float32 regression: one compilation a case for all tests."""
    params, _ = regression()
    return _runner(case)(params, steps)


@cache
def _runner(case: Case) -> Callable[[Any, Any], tuple[Any, Any]]:
    tx, loss = case.make(case.rate, RULES), regression()[1]

    def step(_: Any, carry: tuple) -> tuple:
        p, state = carry
        updates, state = tx.update(jax.grad(loss)(p), state, p)
        return optax.apply_updates(p, updates), state

    return jax.jit(lambda params, steps: jax.lax.fori_loop(0, steps, step, (params, tx.init(params))))


def zeros(tree: Any) -> int:
    return sum(int((np.asarray(x) == 0).sum()) for x in jax.tree.leaves(tree))


def same(a: Any, b: Any, **tolerance: float) -> None:
    """Assert that two trees have one structure, the same dtypes, and equal (or, with rtol and atol, close) numbers."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype
        wide = np.complex128 if jnp.iscomplexobj(x) else np.float64
        np.testing.assert_allclose(np.asarray(x, wide), np.asarray(y, wide), **{"rtol": 0, "atol": 0, **tolerance})
