"""The transformations land on exact zeros, in every precision and under every transformation of JAX."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax_cases import CASES, COLUMNS, MAIN, RULES, SHARED, WHOLE, alone, regression, same, train, zeros

import proxopt_jax
from proxopt import L1, GroupL2, Groups, SparseGroupLasso

every = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
every_kind = pytest.mark.parametrize("case", MAIN, ids=lambda c: c.name)
every_shared = pytest.mark.parametrize("case", SHARED, ids=lambda c: c.name)
every_whole = pytest.mark.parametrize("case", WHOLE, ids=lambda c: c.name)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda d: d.__name__)
@every
def test_training_lands_on_exact_zeros_and_keeps_the_dtype(case, dtype):
    if dtype != jnp.float32 and case.name == "proximal injected adam":
        pytest.skip("optax.inject_hyperparams rounds b2 to half precision, where 0.999 is 1")
    params, loss = regression(dtype)
    params, state = alone(case, 200) if dtype == jnp.float32 else train(case.make(case.rate, RULES), params, loss, 200)
    point = proxopt_jax.prox_point(state, params)
    assert {x.dtype for x in jax.tree.leaves((params, point))} == {jnp.dtype(dtype)}
    assert (np.asarray(point["w"], np.float32)[:, 2:] == 0).all(), "the two idle columns"
    assert np.any(np.asarray(point["w"], np.float32)[:, :2])
    assert float(loss(point)) < float(loss(regression(dtype)[0]))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_a_last_link_lands_on_the_prox_of_what_the_chain_would_have_reached(dtype, jit):
    rng = np.random.default_rng(1)
    params, grads = (jnp.asarray(rng.normal(size=(40, 30)), dtype) for _ in range(2))
    penalty = SparseGroupLasso(1.0, groups=Groups.along(0))
    tx = optax.chain(optax.sgd(0.5), proxopt_jax.sgl(1.0, groups=Groups.along(0), learning_rate=0.5))

    def step(params, grads):
        return optax.apply_updates(params, tx.update(grads, tx.init(params), params)[0])

    new = (jax.jit(step) if jit else step)(params, grads)
    wide, slope = (np.asarray(v, np.float32) for v in (params, grads))
    u = np.asarray(jnp.asarray(-0.5 * slope).astype(dtype), np.float32)
    expected = penalty.prox(wide + u, 0.5)
    assert new.dtype == dtype
    assert 0 < zeros(expected) < expected.size
    assert (np.asarray(new)[expected == 0] == 0).all()
    np.testing.assert_allclose(np.asarray(new, np.float32), expected, atol=2 * float(jnp.finfo(dtype).eps))


def test_the_three_links_are_their_penalties():
    w = {"x": jnp.array([[3.0, 0.1], [4.0, 0.2]])}
    groups = Groups.along(0)
    pairs = [
        (proxopt_jax.l1(0.3, learning_rate=0.5), L1(0.3)),
        (proxopt_jax.group_l2(0.3, groups, "none", learning_rate=0.5), GroupL2(0.3, groups, "none")),
        (proxopt_jax.sgl(0.3, 0.25, groups, "none", learning_rate=0.5), SparseGroupLasso(0.3, 0.25, groups, "none")),
    ]
    for link, penalty in pairs:
        updates, _ = link.update(optax.tree.zeros_like(w), link.init(w), w)
        np.testing.assert_allclose(optax.apply_updates(w, updates)["x"], penalty.prox(w["x"], 0.5), rtol=1e-6)


def test_zeros_need_the_prox_to_be_the_last_link():
    params, loss = regression()
    link = proxopt_jax.proximal(RULES, learning_rate=0.05)
    last, _ = train(optax.chain(optax.sgd(0.05), link), params, loss, 200)
    first, _ = train(optax.chain(link, optax.sgd(0.05)), params, loss, 200)
    assert zeros(last["w"]) >= 12
    assert zeros(first["w"]) == 0


def test_behind_adam_with_full_gradients_a_link_finds_few_of_the_zeros_and_the_metric_finds_all():
    params, loss = regression()
    link, _ = train(optax.chain(optax.adam(0.01), proxopt_jax.proximal(RULES, learning_rate=0.01)), params, loss, 1000)
    metric, _ = train(proxopt_jax.proximal(optax.adam(0.01), RULES), params, loss, 1000)
    assert zeros(link["w"]) < zeros(metric["w"])
    assert (np.asarray(metric["w"])[:, 2:] == 0).all()


@every_shared
def test_jit_changes_nothing(case):
    params, loss = regression()
    tx = case.make(case.rate, RULES)
    grads = jax.grad(loss)(params)
    state = tx.init(params)
    same(jax.jit(tx.init)(params), state)
    same(jax.jit(tx.update)(grads, state, params), tx.update(grads, state, params), rtol=1e-5, atol=1e-6)


@every_kind
def test_a_gradient_flows_through_steps_with_zero_groups_and_is_finite(case):
    params, loss = regression()
    params = {**params, "w": params["w"].at[:, 3].set(0.0)}

    @jax.jit
    @jax.value_and_grad
    def after(strength):
        return loss(train(case.make(case.rate, [("w", COLUMNS.with_strength(strength))]), params, loss, 5)[0])

    step = 1e-3
    (low, _), (_, slope), (high, _) = (after(v) for v in (0.01 - step, 0.01, 0.01 + step))
    np.testing.assert_allclose(float(slope), float(high - low) / (2 * step), rtol=0.05, atol=2e-3)


@every_kind
def test_vmap_over_strengths_runs_a_whole_path_at_once(case):
    params, loss = regression()
    strengths = jnp.array([0.0, 0.1, COLUMNS.strength, 100.0])

    def sparse(strength):
        p, state = train(case.make(case.rate, [("w", COLUMNS.with_strength(strength))]), params, loss, 100)
        return proxopt_jax.prox_point(state, p)["w"]

    path = jax.vmap(sparse)(strengths)
    found = [zeros(w) for w in path]
    assert found[0] == 0
    assert found == sorted(found)
    assert found[-1] == 24
    params, state = alone(case, 100)
    np.testing.assert_allclose(path[2], proxopt_jax.prox_point(state, params)["w"], rtol=1e-4, atol=1e-5)


@every_shared
def test_donated_buffers_are_reused_without_a_warning(case):
    params, loss = regression()
    tx = case.make(case.rate, RULES)

    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    expected, _ = alone(case, 3)
    state = jax.jit(tx.init)(params)
    donating = jax.jit(step, donate_argnums=(0, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            params, state = donating(params, state)
    same(params, expected, rtol=1e-4, atol=1e-5)


@every_shared
def test_none_leaves_stay_none_and_change_nothing_else(case):
    params, loss = regression()
    tx = case.make(case.rate, RULES)
    plain, _ = alone(case, 3)
    with_none, state = train(tx, {**params, "frozen": None}, loss, 3)
    assert with_none.pop("frozen") is None
    assert proxopt_jax.prox_point(state, {**params, "frozen": None})["frozen"] is None
    same(with_none, plain, rtol=1e-5, atol=1e-6)


@every_whole
def test_states_of_half_precision_parameters_are_float32(case):
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
        params = {"w": jnp.ones((3, 2), dtype), "b": jnp.ones(2, dtype)}
        state = case.make(0.1, RULES).init(params)
        assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype(jnp.float32), jnp.dtype(jnp.int32)}


@every_shared
def test_half_precision_gradients_of_float32_parameters_reach_zeros_too(case):
    params, loss = regression()
    tx = case.make(case.rate, RULES)

    def half(p):
        grads = jax.grad(loss)(p)
        return jax.tree.map(lambda g: g.astype(jnp.bfloat16), grads)

    state = tx.init(params)
    for _ in range(5):
        updates, state = jax.jit(tx.update)(half(params), state, params)
        params = optax.apply_updates(params, updates)
    heavy = [("w", COLUMNS.with_strength(1e4))]
    tx = case.make(case.rate, heavy)
    updates, state = tx.update(half(params), tx.init(params), params)
    new = optax.apply_updates(params, updates)
    assert zeros(proxopt_jax.prox_point(state, new)["w"]) == 24
    assert params["w"].dtype == new["w"].dtype == jnp.float32


@every_whole
def test_a_zero_learning_rate_changes_nothing(case):
    if "tau" in case.name:
        pytest.skip("with tau the rate only scales the last step")
    params, loss = regression()
    new, state = train(case.make(0.0, RULES), params, loss, 3)
    same(new, params)
    same(proxopt_jax.prox_point(state, new), params)


def test_python_numbers_and_numpy_arrays_are_parameters_too():
    tx = proxopt_jax.prox_adam(0.1, L1(1.0))
    params = {"a": 1.0, "b": np.array([0.01, 2.0], np.float32)}
    updates, _ = tx.update({"a": 0.5, "b": np.ones(2, np.float32)}, tx.init(params), params)
    new = optax.apply_updates(params, updates)
    assert float(new["b"][0]) == 0
    assert 0 < float(new["a"]) < 1


def test_complex_entries_shrink_in_modulus():
    w = jnp.array([3.0 + 4.0j, 0.1j])
    tx = proxopt_jax.prox_sgd(1.0, L1(1.0), rho=1.0)
    updates, _ = tx.update(jnp.zeros_like(w), tx.init(w), w)
    np.testing.assert_allclose(optax.apply_updates(w, updates), [2.4 + 3.2j, 0], rtol=1e-6)
    with pytest.raises(TypeError, match="must be real for the moments of Adam"):
        proxopt_jax.prox_adam(0.1, L1(1.0)).init(w)
