"""The prox in few passes over memory equals the prox of the penalties, in every zero too."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from libraries import jax_precision

import proxopt_jax
from proxopt import L1, GroupL2, Groups, SparseGroupLasso
from proxopt_jax import kernels

METRICS = ("exact", "median", "support")
SHAPES = [((6, 4), 1), ((6, 4), 0), ((3, 5, 2), (1, 2)), ((3, 5, 2), (0, 2)), ((7,), 0), ((2, 3, 4), 1)]


def drawn(shape, spread, seed, dtype=np.float64, scale=1.0):
    """Entries and steps, some of them zero entries, with steps that spread over ``spread`` natural logarithms."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) * rng.choice([0.0, 1.0], size=shape, p=[0.2, 0.8]) * scale
    return (x + 0.0).astype(dtype), (0.1 * np.exp(spread * rng.normal(size=shape))).astype(dtype)


def assert_same(found, expected, tolerance):
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.dtype == expected.dtype and found.shape == expected.shape
    np.testing.assert_array_equal(found == 0, expected == 0)
    assert not np.signbit(found[found == 0]).any()
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=0)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape, axes", SHAPES, ids=str)
def test_steps_for_each_entry(shape, axes, metric):
    with jax_precision():
        for penalty in (
            SparseGroupLasso(3.0, groups=Groups.along(axes), metric=metric),
            GroupL2(2.0, Groups.along(axes), "none", metric),
            SparseGroupLasso(1e-30, groups=Groups.along(axes), metric=metric),
        ):
            prox = jax.jit(kernels.fused(penalty).prox)
            for seed, spread in enumerate((0.0, 0.5, 2.0, 8.0)):
                x, step = drawn(shape, spread, seed)
                assert_same(prox(x, step), penalty.prox(x, step), 1e-9)


@pytest.mark.parametrize("step", [0.3, 0.0, 1e-30, 1e30])
def test_a_single_step_also_if_it_is_traced(step):
    with jax_precision():
        for scale in (1.0, 1e-30, 1e30):
            x, _ = drawn((5, 8), 0, 1, scale=scale)
            for penalty in (L1(1.0), GroupL2(1.0, Groups.along(1)), SparseGroupLasso(1.0, groups=Groups.along(0))):
                expected = penalty.prox(x, step)
                assert_same(jax.jit(lambda x, p=penalty: kernels.fused(p).prox(x, step))(x), expected, 1e-12)
                assert_same(jax.jit(lambda x, s, p=penalty: kernels.fused(p).prox(x, s))(x, step), expected, 1e-12)


@pytest.mark.parametrize("metric", METRICS)
def test_values_whose_squares_leave_the_range_of_float32(metric):
    penalty = SparseGroupLasso(1.0, groups=Groups.along(1), metric=metric)
    for scale in (1e-30, 1e25):
        x, step = drawn((6, 9), 0.5, 3, np.float32, scale)
        step *= np.float32(scale)
        found = jax.jit(kernels.fused(penalty).prox)(x, step)
        expected = penalty.prox(x.astype(float), step.astype(float))
        assert np.isfinite(found).all()
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6 * scale)


@pytest.mark.parametrize("metric", METRICS)
def test_nan_reaches_its_group_and_no_other(metric):
    penalty = GroupL2(0.1, Groups.along(1), metric=metric)
    for row, column in ((2, 3), (0, 0)):
        x, step = drawn((4, 6), 0.5, 4, np.float32)
        expected = penalty.prox(x, step)
        x[row, column] = step[row, column] = np.nan
        found = np.asarray(jax.jit(kernels.fused(penalty).prox)(x, step))
        assert np.isnan(found[row]).all()
        np.testing.assert_allclose(np.delete(found, row, 0), np.delete(expected, row, 0), rtol=2e-5)


@pytest.mark.parametrize("metric", METRICS)
def test_steps_of_zero_leave_every_entry(metric):
    penalty = SparseGroupLasso(1.0, groups=Groups.along(1), metric=metric)
    x, step = drawn((4, 6), 0.5, 5, np.float32)
    np.testing.assert_array_equal(jax.jit(kernels.fused(penalty).prox)(x, 0 * step), x)


@pytest.mark.parametrize("metric", [pytest.param(m, marks=pytest.mark.slow) if m == "exact" else m for m in METRICS])
def test_derivatives_are_those_of_the_penalty(metric):
    penalty = SparseGroupLasso(1.5, groups=Groups.along(1), metric=metric)
    with jax_precision():
        x, step = drawn((4, 5), 0.5, 6)
        weights = jnp.asarray(np.random.default_rng(7).normal(size=x.shape))

        def total(p, x, step):
            return (weights * p.prox(x, step) ** 2).sum()

        second = [] if metric == "median" else [lambda f, argnums: jax.hessian(f, argnums=argnums)]  # half a minute for it
        for order in (jax.grad, *second):
            for argument in (1, 2):
                expected = order(total, argnums=argument)(penalty, jnp.asarray(x), jnp.asarray(step))
                found = order(total, argnums=argument)(kernels.fused(penalty), jnp.asarray(x), jnp.asarray(step))
                np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)


def test_large_arrays_are_divided_into_blocks(monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", 64)
    for shape, axes in (((40, 10), 1), ((10, 40), 0), ((8, 10, 6), 1), ((37, 11), 1)):
        x, step = drawn(shape, 0.5, 8, np.float32)
        for metric in ("exact", "median"):
            penalty = SparseGroupLasso(3.0, groups=Groups.along(axes), metric=metric)
            found = jax.jit(lambda x, s, p=penalty: kernels.fused(p).prox(x, s))(x, step)
            expected = penalty.prox(x.astype(float), step.astype(float)).astype(np.float32)
            np.testing.assert_array_equal(np.asarray(found) == 0, expected == 0)
            np.testing.assert_allclose(found, expected, rtol=3e-5)


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_median_of_equal_and_of_infinite_numbers(size):
    rng = np.random.default_rng(9)
    for x in (rng.integers(0, 3, (20, size)), np.full((1, size), np.inf), rng.lognormal(0, 30, (20, size))):
        x = x.astype(np.float32)
        np.testing.assert_array_equal(np.ravel(kernels.median(x, (-1,))), np.median(x, axis=1))


def test_under_vmap_every_problem_has_its_own_result():
    xs, steps = drawn((5, 4, 6), 1.0, 10, np.float32)
    for metric in METRICS:
        penalty = SparseGroupLasso(3.0, groups=Groups.along(1), metric=metric)
        found = jax.vmap(kernels.fused(penalty).prox)(xs, steps)
        for k in range(5):
            np.testing.assert_allclose(found[k], kernels.fused(penalty).prox(xs[k], steps[k]), rtol=1e-6)


class Foreign:
    """A penalty without a declared form, for which nothing can be stacked."""

    def value(self, x):
        return L1(0.5).value(x)

    def prox(self, x, step=1.0):
        return L1(0.5).prox(x, step)


@pytest.mark.parametrize("make", [proxopt_jax.prox_sgd, proxopt_jax.hapg, proxopt_jax.prox_adam, proxopt_jax.adam_hapg])
@pytest.mark.parametrize(
    "penalty", [SparseGroupLasso(0.5, groups=Groups.along(1)), L1(0.5), Foreign()], ids=lambda p: type(p).__name__
)
def test_many_small_leaves_are_stacked_and_equal_single_ones(make, penalty):
    rng = np.random.default_rng(11)
    params = {f"{i:02d}": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32) for i in range(40)}
    params |= {"other": jnp.ones(3), "integer": jnp.arange(3), "half": jnp.ones((4, 3), jnp.bfloat16)}
    rules = [("other", None), ("integer", None), ("*", penalty)]
    tx = make(0.1, rules)
    grads = jax.tree.map(lambda x: (0.3 * x).astype(x.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else None, params)
    grads["07"] = None  # a leaf without gradient stays, and so do the others of its shape that have one

    @jax.jit
    def step(params, state):
        updates, state = tx.update(grads, state, params)
        updates = {k: jnp.zeros_like(params[k]) if u is None else u for k, u in updates.items()}
        return optax.apply_updates(params, updates), state

    together, state = params, tx.init(params)
    alone = {k: (params[k], make(0.1, penalty).init(params[k])) for k in ("00", "31", "half")}
    for _ in range(5):
        together, state = step(together, state)
        for k, (x, s) in alone.items():
            u, s = make(0.1, penalty).update(grads[k], s, x)
            alone[k] = optax.apply_updates(x, u), s
    for k, (x, _) in alone.items():
        np.testing.assert_array_equal(np.asarray(together[k]) == 0, np.asarray(x) == 0)
        np.testing.assert_allclose(np.asarray(together[k], float), np.asarray(x, float), rtol=1e-2 if k == "half" else 1e-5)
    np.testing.assert_array_equal(together["07"], params["07"])
    np.testing.assert_array_equal(together["integer"], params["integer"])


def test_one_compiled_step_serves_all_learning_rates_and_strengths():
    params = {"a": jnp.ones((4, 3)), "b": jnp.ones((4, 3))}
    rate, strength = optax.linear_schedule(0.0, 0.1, 10), optax.linear_schedule(0.0, 1.0, 10)
    tx = proxopt_jax.prox_adam(rate, SparseGroupLasso(1.0, groups=Groups.along(1)), strength=strength)
    traces = []

    @jax.jit
    def step(params, state):
        traces.append(None)
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    first, state = step(params, state)
    np.testing.assert_array_equal(first["a"], params["a"])  # the learning rate is 0
    for _ in range(5):
        first, state = step(first, state)
    assert len(traces) == 1 and np.isfinite(first["a"]).all()


def test_stacks_are_differentiable():
    params = [jnp.asarray(np.random.default_rng(i).normal(size=(4, 3)), jnp.float32) for i in range(3)]
    link = proxopt_jax.sgl(0.5, groups=Groups.along(1), learning_rate=0.1)

    def loss(scale):
        updates, _ = link.update([scale * 0.1 * p for p in params], link.init(params), params)
        return sum((u**2).sum() for u in updates)

    step = 1e-2
    slope = float((loss(1.0 + step) - loss(1.0 - step)) / (2 * step))
    assert float(jax.grad(loss)(1.0)) == pytest.approx(slope, rel=1e-3)
