"""The strength from which a last link zeroes an update altogether, and its unit behind different optimizers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax_cases import regression, zeros

import proxopt
import proxopt_jax
from proxopt import L1, GroupL2, Groups, SparseGroupLasso

GROUPS = Groups.along(0)
RULES = [("w", SparseGroupLasso(0.0, groups=GROUPS))]


@pytest.mark.parametrize("base", [optax.sgd, optax.adam, optax.lion], ids=lambda f: f.__name__)
@pytest.mark.parametrize("at_zero", [True, False])
def test_it_is_the_smallest_strength_at_which_the_link_leaves_only_zeros(base, at_zero):
    params, loss = regression()
    if at_zero:
        params = optax.tree.zeros_like(params)
    grads, inner = jax.grad(loss)(params), base(0.1)
    updates, _ = inner.update(grads, inner.init(params), params)
    found = proxopt_jax.max_strength(updates, RULES, learning_rate=0.1, params=None if at_zero else params)

    def left(strength):
        tx = optax.chain(inner, proxopt_jax.proximal(RULES, learning_rate=0.1, strength=strength))
        return np.count_nonzero(optax.apply_updates(params, tx.update(grads, tx.init(params), params)[0])["w"])

    assert left(found * (1 + 1e-5)) == 0
    assert left(found * (1 - 1e-3)) > 0


def test_behind_sgd_it_is_that_of_the_gradient_and_behind_adam_and_lion_about_one():
    params, loss = regression()
    grads = jax.grad(loss)(params)
    expected = proxopt.max_strength(np.asarray(grads["w"]), RULES[0][1])
    assert np.isclose(proxopt_jax.max_strength(grads, RULES), expected)
    for scale in (1e-3, 1.0, 1e3):
        scaled = jax.tree.map(lambda g, scale=scale: scale * g, grads)
        for base, unit in ((optax.sgd(0.1), scale * expected), (optax.adam(0.1), 1.0), (optax.lion(0.1, weight_decay=0), 1.0)):
            updates, _ = base.update(scaled, base.init(params), params)
            assert np.isclose(proxopt_jax.max_strength(updates, RULES, learning_rate=0.1), unit, rtol=1e-3)


def test_the_largest_of_all_problems_counts_and_joint_leaves_are_one():
    updates = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    whole = GroupL2(1.0, weights="none")
    assert np.isclose(proxopt_jax.max_strength(updates, whole), 4.0)
    assert np.isclose(proxopt_jax.max_strength(updates, whole, joint=True), 5.0)
    assert np.isclose(proxopt_jax.max_strength(updates, [("a", L1(0.0))]), 3.0)
    half = {"a": updates["a"].astype(jnp.bfloat16)}
    assert np.isclose(proxopt_jax.max_strength(half, L1(1.0), learning_rate=2.0), 1.5)


def test_what_has_no_such_strength_is_refused():
    class Foreign:
        def value(self, x):
            return 0.0

        def prox(self, x, step=1.0):
            return x

    with pytest.raises(ValueError, match="penalty must apply to at least one leaf"):
        proxopt_jax.max_strength(jnp.ones(2), None)
    with pytest.raises(TypeError, match=r"penalty must be a proxopt\.Penalty"):
        proxopt_jax.max_strength(jnp.ones(2), Foreign())
    with pytest.raises(ValueError, match="learning_rate must be finite and > 0, got 0"):
        proxopt_jax.max_strength(jnp.ones(2), L1(1.0), learning_rate=0.0)
    with pytest.raises(TypeError, match=r"outside of jax\.jit"):
        jax.jit(lambda u: proxopt_jax.max_strength(u, L1(1.0)))(jnp.ones(2))


def test_after_adam_a_link_needs_a_strength_measured_against_its_steps():
    """The stationarity of a weight at 0: behind Adam |m_hat| / sqrt(v_hat), about 1, must not exceed the strength."""
    grads = jnp.array([1e-4, -1e-4])
    start = jnp.zeros(2)
    for strength, expected in ((2e-3, 0), (0.5, 0), (1.01, 2)):
        tx = optax.chain(optax.adam(1e-3), proxopt_jax.l1(strength, learning_rate=1e-3))
        updates, _ = tx.update(grads, tx.init(start), start)
        assert zeros(updates) == expected
    tx = proxopt_jax.proximal(optax.adam(1e-3), L1(2e-3))
    assert zeros(tx.update(grads, tx.init(start), start)[0]) == 2


class NonNegative(L1):
    """The L1 norm where all entries are >= 0, else infinite: not symmetric."""

    def _value(self, xs):
        return self.strength * sum(x.sum() if (x >= 0).all() else np.inf for x in xs)

    def _prox(self, xs, steps):
        return [(x - s * self.strength).clip(0) for x, s in zip(xs, steps)]


def test_the_sign_of_an_update_matters_where_a_penalty_is_not_symmetric():
    up, down = (proxopt_jax.max_strength({"w": jnp.array([u])}, NonNegative(1.0)) for u in (5.0, -5.0))
    assert up == 5.0 and down < 1e-300
