"""NumPy, torch and JAX run the same trajectories, and all rest at the stationary points of f + penalty."""

from __future__ import annotations

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from libraries import jax_precision

import proxopt_jax
from proxopt import L1, ElasticNet, GroupL2, Groups, SparseGroupLasso, updates

STEPS = 300
RNG = np.random.default_rng(5)
A = RNG.normal(size=(40, 6)) * np.array([2.0, 1.0, 0.5, 1.0, 0.3, 1.0])
Y = A @ (RNG.normal(size=(6, 4)) * (np.arange(4) < 2)) + 0.1 * RNG.normal(size=(40, 4))
W = RNG.normal(size=(6, 4))
FAST = {"prox_sgd": 0.1, "hapg": 0.1, "prox_adam": 0.05, "adam_hapg": 0.02}
OPTIMIZERS = [
    ("prox_sgd", {}),
    ("prox_sgd", {"rho": 1.0}),
    ("prox_sgd", {"tau": 8.0}),
    ("hapg", {}),
    ("hapg", {"extrapolation": "as_printed"}),
    ("hapg", {"extrapolation": "nesterov"}),
    ("prox_adam", {}),
    ("prox_adam", {"weight_decay": 0.1}),
    ("adam_hapg", {}),
    ("adam_hapg", {"extrapolation": "nesterov"}),
    ("adam_hapg", {"b1": 0.9, "extrapolation": 0.7}),
]
PENALTIES = {
    "none": None,
    "L1": L1(0.3),
    "ElasticNet": ElasticNet(0.3, 0.7),
    "columns": SparseGroupLasso(0.2, 0.3, Groups.along(0)),
    "rows, support": GroupL2(0.2, Groups.along(1), metric="support"),
    "labels": GroupL2(0.2, Groups.labels(["a", "b", "c", "c"], axis=1)),
    "columns, exact": SparseGroupLasso(0.2, 0.3, Groups.along(0), metric="exact"),
}
each_optimizer = pytest.mark.parametrize(
    "name, options", OPTIMIZERS, ids=lambda v: "-".join(map(str, v.values())) if isinstance(v, dict) else v
)


def gradient(w):
    return A.T @ (A @ w - Y) / len(A)


def rate(name: str, options: dict) -> float:
    return 0.5 if "tau" in options else FAST[name]


def core_options(options: dict) -> dict:
    """The keywords of `proxopt.updates` for those of optax."""
    betas = {"betas": (options.get("b1", 0.9), 0.999)} if "b1" in options else {}
    return {**{k: v for k, v in options.items() if k != "b1"}, **betas}


def in_numpy(name: str, options: dict, penalty) -> tuple[np.ndarray, np.ndarray]:
    """Every iterate and every prox point, by the pure functions of the core."""
    step, x, state, xs, points = getattr(updates, name), W, None, [], []
    for _ in range(STEPS):
        x, state = step(x, gradient(x), state, penalty, lr=rate(name, options), **core_options(options))
        xs.append(x)
        points.append(getattr(state, "point", x))
    return np.stack(xs), np.stack(points)


def in_jax(name: str, options: dict, penalty) -> tuple[np.ndarray, np.ndarray]:
    with jax_precision():
        tx = getattr(proxopt_jax, name)(rate(name, options), penalty, **options)
        a, y, w = jnp.asarray(A), jnp.asarray(Y), jnp.asarray(W)

        @jax.jit
        def run(w):
            def step(carry, _):
                x, state = carry
                u, state = tx.update(a.T @ (a @ x - y) / len(a), state, x)
                x = optax.apply_updates(x, u)
                return (x, state), (x, proxopt_jax.prox_point(state, x))

            return jax.lax.scan(step, (w, tx.init(w)), length=STEPS)[1]

        return tuple(np.asarray(v) for v in run(w))


def in_torch(name: str, options: dict, penalty) -> tuple[np.ndarray, np.ndarray]:
    torch = pytest.importorskip("torch")
    proxopt_torch = pytest.importorskip("proxopt_torch")
    kind = {"prox_sgd": "ProxSGD", "hapg": "HAPG", "prox_adam": "ProxAdam", "adam_hapg": "AdamHAPG"}[name]
    keywords = core_options(options) | ({"decoupled_weight_decay": True} if "weight_decay" in options else {})
    w = torch.nn.Parameter(torch.tensor(W))
    optimizer = getattr(proxopt_torch, kind)([{"params": [w], "penalty": penalty}], lr=rate(name, options), **keywords)
    xs, points = [], []
    for _ in range(STEPS):
        w.grad = torch.tensor(gradient(w.detach().numpy()))
        optimizer.step()
        xs.append(w.detach().numpy().copy())
        with optimizer.at_prox_point():
            points.append(w.detach().numpy().copy())
    return np.stack(xs), np.stack(points)


@cache
def reference(name: str, options: tuple, key: str) -> tuple[np.ndarray, np.ndarray]:
    return in_numpy(name, dict(options), PENALTIES[key])


@pytest.mark.parametrize("other", [in_jax, in_torch], ids=["jax", "torch"])
@each_optimizer
def test_300_steps_in_float64_are_those_of_numpy_and_have_the_same_zeros(name, options, other):
    same_run(name, options, "columns", other)


@pytest.mark.parametrize("key", [k for k in PENALTIES if k != "columns"])
@pytest.mark.parametrize("name", ["prox_adam", "adam_hapg"])
def test_every_penalty_and_metric_runs_as_in_numpy(name, key):
    same_run(name, {}, key, in_jax)


def same_run(name, options, key, other):
    xs, points = reference(name, tuple(options.items()), key)
    found_xs, found_points = other(name, options, PENALTIES[key])
    np.testing.assert_allclose(found_xs, xs, rtol=0, atol=1e-10)
    np.testing.assert_allclose(found_points, points, rtol=0, atol=1e-10)
    np.testing.assert_array_equal(found_points == 0, points == 0)
    if key != "none":
        assert (points[-1] == 0).any()


def stationarity(penalty, w) -> float:
    """||w - prox(w - g)||: 0 exactly at the stationary points of f + penalty."""
    return float(np.abs(w - penalty.prox(w - gradient(w), 1.0)).max())


COLUMNS = SparseGroupLasso(0.2, 0.3, Groups.along(0), metric="exact")
each_exact = pytest.mark.parametrize("penalty", [L1(0.3), COLUMNS], ids=["L1", "columns"])


@each_exact
@pytest.mark.parametrize(
    "name, options",
    [("prox_sgd", {}), ("prox_sgd", {"tau": 8.0}), ("hapg", {}), ("prox_adam", {}), ("adam_hapg", {"extrapolation": 0.5})],
)
def test_the_limit_is_a_stationary_point_of_f_plus_penalty(name, options, penalty):
    limit = run_long(lambda lr: getattr(proxopt_jax, name)(lr, penalty, **options), rate(name, options))
    assert stationarity(penalty, limit) < 1e-6
    assert (limit == 0).any()


@each_exact
@each_optimizer
def test_a_stationary_point_is_a_rest_point(name, options, penalty):
    if name == "prox_sgd" and options.get("rho") != 1.0:
        options = {**options, "rho": 1.0}  # the velocity starts at 0, not at the gradient
    if "weight_decay" in options:
        pytest.skip("weight decay moves the stationary point")
    with jax_precision():
        rest = jnp.asarray(solution(penalty.__class__))
        assert stationarity(penalty, np.asarray(rest)) < 1e-12
        tx = getattr(proxopt_jax, name)(rate(name, options), penalty, **options)
        x, state = rest, tx.init(rest)
        for _ in range(4):
            u, state = jax.jit(tx.update)(jnp.asarray(gradient(np.asarray(x))), state, x)
            x = optax.apply_updates(x, u)
        np.testing.assert_allclose(x, rest, rtol=0, atol=1e-9)


@cache
def solution(kind: type) -> np.ndarray:
    """The minimiser, by many plain proximal gradient steps."""
    penalty, w = COLUMNS if kind is SparseGroupLasso else L1(0.3), W
    for _ in range(5000):
        w = penalty.prox(w - 0.1 * gradient(w), 0.1)
    return w


@pytest.mark.parametrize("given", [True, False], ids=["given", "measured"])
def test_the_limit_behind_adam_in_its_metric_is_stationary_too_and_that_of_a_link_or_of_the_median_is_not(given):
    penalty = SparseGroupLasso(0.2, 0.3, Groups.along(0))
    exact = run_long(lambda lr: proxopt_jax.proximal(optax.adam(lr), penalty, lr if given else None), 0.05)
    assert stationarity(penalty, exact) < 1e-6
    if given:
        median = run_long(lambda lr: proxopt_jax.adam_hapg(lr, penalty), 0.02)
        link = run_long(lambda lr: optax.chain(optax.adam(lr), proxopt_jax.proximal(penalty, learning_rate=lr)), 0.05)
        assert stationarity(penalty, median) > 1e-4
        assert stationarity(penalty, link) > 1e-2


def run_long(make, lr: float) -> np.ndarray:
    """The prox point after many steps under a learning rate that falls to almost nothing, in float64."""
    with jax_precision():
        tx = make(optax.exponential_decay(lr, 1000, 0.5, transition_begin=2000))
        a, y = jnp.asarray(A), jnp.asarray(Y)

        @jax.jit
        def run(w):
            def step(carry, _):
                x, state = carry
                u, state = tx.update(a.T @ (a @ x - y) / len(a), state, x)
                return (optax.apply_updates(x, u), state), None

            (x, state), _ = jax.lax.scan(step, (w, tx.init(w)), length=20_000)
            return proxopt_jax.prox_point(state, x)

        return np.asarray(run(jnp.asarray(W)))
