"""projected(): prox points and parameters on the set after each step, behind every kind of optimizer; with NonNegative."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax_cases import regression, train
from libraries import jax_precision
from plain import along, capped_hapg

import proxopt_jax
from proxopt import Groups, NonNegative, SparseGroupLasso, Sphere

ROWS = Groups.along(1)
PENALTY = NonNegative(SparseGroupLasso(0.3, 0.5, ROWS, weights="none"))
RULES = [("w", PENALTY)]
OPTIMIZERS = {
    "hapg": lambda: proxopt_jax.hapg(0.05, RULES, 0.4),
    "adam_hapg in a chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), proxopt_jax.adam_hapg(0.05, RULES)),
    "hapg in a partition": lambda: optax.partition(
        {"prox": proxopt_jax.hapg(0.05, PENALTY), "sgd": optax.sgd(0.1)}, {"w": "prox", "b": "sgd"}
    ),
    "proximal": lambda: proxopt_jax.proximal(optax.adam(0.05), RULES),
}


def on_spheres(w, radius=1.0):
    norms = np.linalg.norm(np.asarray(w, np.float64), axis=1)
    return (np.isclose(norms, radius, rtol=1e-6) | (norms == 0)).all()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parameters_and_prox_points_are_projected(name):
    params, loss = regression()
    w, state = train(proxopt_jax.projected(OPTIMIZERS[name](), [("w", Sphere(ROWS))]), params, loss, 6)
    point = proxopt_jax.prox_point(state, w)["w"]
    assert on_spheres(w["w"]) and on_spheres(point)
    assert (point >= 0).all() and (point == 0).any() and (w["b"] != 0).all()
    assert jax.tree.structure(state) == jax.tree.structure(OPTIMIZERS[name]().init(params))


def test_hapg_is_the_plain_recursion():
    rng = np.random.default_rng(0)
    start, target = rng.random((6, 5)), rng.normal(size=(6, 5))
    with jax_precision():
        tx = proxopt_jax.projected(proxopt_jax.hapg(0.3, PENALTY, 0.4), Sphere(ROWS, 2.0))
        x, state = train(tx, jnp.asarray(start), lambda x: jnp.sum((x - target) ** 2) / 2, 9)
        x, point = map(np.asarray, (x, proxopt_jax.prox_point(state, x)))
    expected = capped_hapg(start.ravel(), lambda z: z - target.ravel(), 9, 0.3, 0.4, 0.15, 0.15, along((1,), (6, 5)), 2.0)
    for found, plain in zip((x, point), expected):
        np.testing.assert_allclose(np.ravel(found), plain, rtol=1e-12, atol=1e-14)
    assert (point == 0).any() and ((np.ravel(point) == 0) == (expected[1] == 0)).all()


def test_vmap_over_seeds_is_one_run_after_the_other():
    tx = proxopt_jax.projected(proxopt_jax.hapg(0.1, PENALTY), Sphere(ROWS))

    @jax.jit
    def run(start):
        return train(tx, start, lambda x: jnp.sum((x - jnp.arange(5.0) / 5) ** 2), 4)[0]

    starts = jax.random.uniform(jax.random.key(0), (3, 4, 5))
    np.testing.assert_allclose(jax.vmap(run)(starts), jnp.stack([run(s) for s in starts]), rtol=1e-5, atol=1e-6)


def test_half_precision_keeps_its_dtypes_and_zeros():
    params, loss = regression(jnp.bfloat16)
    tx = proxopt_jax.projected(proxopt_jax.hapg(0.05, RULES), [("w", Sphere(ROWS))])
    w, state = train(tx, params, loss, 4)
    assert w["w"].dtype == jnp.bfloat16 and state.point["w"].dtype == jnp.float32
    assert on_spheres(state.point["w"]) and (state.point["w"] == 0).any()
    norms = np.linalg.norm(np.asarray(w["w"], np.float32), axis=1)
    assert (np.isclose(norms, 1, rtol=2e-2) | (norms == 0)).all()


def test_leaves_may_be_one_problem_and_any_function_serves():
    params = {"a": jnp.array([[1.0, 2.0], [0.5, 0.0]]), "b": jnp.array([-2.0, 3.0])}
    sphere = Sphere(proxopt_jax.tree_labels({"a": range(2), "b": range(2)}))
    zero = optax.tree.zeros_like(params)
    for make, check in (
        (sphere, lambda p: np.allclose((p["a"] ** 2).sum(1) + p["b"] ** 2, 1)),
        (lambda xs: [jnp.maximum(x, 0) for x in xs], lambda p: (p["b"] == jnp.array([0.0, 3.0])).all()),
    ):
        tx = proxopt_jax.projected(optax.sgd(0.1), make, joint=True)
        updates, _ = tx.update(zero, tx.init(params), params)
        assert check(optax.apply_updates(params, updates))
    tx = proxopt_jax.projected(optax.sgd(0.1), {"a": None, "b": jnp.abs})
    updates, _ = tx.update(zero, tx.init(params), params)
    new = optax.apply_updates(params, updates)
    assert (new["a"] == params["a"]).all() and (new["b"] == abs(params["b"])).all()


@pytest.mark.parametrize(
    ("projection", "error", "message"),
    [
        (3, TypeError, "projection must be an object with a method project.*, got 3 of type int"),
        (Sphere, TypeError, "projection must be an object .* got <class"),
        ([("z", Sphere())], ValueError, "projection pattern must decide at least one leaf, got 'z'"),
        (Sphere(Groups.along(4)), ValueError, "projection must fit params leaf 'w': axis of Groups.along must exist"),
        (jnp.sum, ValueError, r"projection must fit params leaf 'w': it must return an array of shape \(3,\), got \(\)"),
        (lambda x: x * 1j, TypeError, "projection must fit params leaf 'w': it must return a real array for one of float32"),
        ({"v": None}, ValueError, "projection must be a tree with the structure of params"),
    ],
)
def test_errors_name_the_argument(projection, error, message):
    with pytest.raises(error, match=message):
        proxopt_jax.projected(optax.sgd(0.1), projection).init({"w": jnp.ones(3)})


def test_the_inner_optimizer_and_params_are_needed():
    with pytest.raises(TypeError, match="inner must be an optax optimizer, got Sphere"):
        proxopt_jax.projected(Sphere(), None)
    tx = proxopt_jax.projected(optax.sgd(0.1), Sphere())
    with pytest.raises(ValueError, match="you are not passing `params`"):
        tx.update(jnp.ones(3), tx.init(jnp.ones(3)))
