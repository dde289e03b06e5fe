"""What optax asks of every optimizer that joins it, asked of every public transformation (after its contributors' tests)."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from jax_cases import CASES, WHOLE, same, train
from libraries import jax_precision

import proxopt_jax
from proxopt import L1, GroupL2, Groups, SparseGroupLasso

# not behind optax.inject_hyperparams(optax.adam), which itself fails in half precision
every = pytest.mark.parametrize("case", [c for c in CASES if "injected" not in c.name], ids=lambda c: c.name)
PENALTY = SparseGroupLasso(1e-4)
DTYPES = [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64]


def parabola(dtype):
    final = jnp.array([1.0, -1.0, 1.0], dtype)
    return jnp.array([-1.0, 10.0, 1.0], dtype), final, lambda p: jnp.sum((p - final) ** 2)


def matrix_parabola(dtype):
    final = jnp.array([[3.0, -2.0], [1.0, 4.0]], dtype)
    return jnp.zeros((2, 2), dtype), final, lambda p: jnp.sum((p - final) ** 2)


def rosenbrock(dtype):
    return jnp.zeros(2, dtype), jnp.ones(2, dtype), lambda p: (1 - p[0]) ** 2 + 100 * (p[1] - p[0] ** 2) ** 2


def mixed(dtype):
    first, second = jnp.array([1.0, -1.0, 2.0], dtype), jnp.array([[1.0, 0.0], [-1.0, 1.0]], dtype)
    loss = lambda p: jnp.sum((p[0] - first) ** 2) + jnp.sum((p[1] - second) ** 2)
    return (jnp.zeros(3, dtype), jnp.zeros((2, 2), dtype)), (first, second), loss


@every
def test_unknown_extra_arguments_are_swallowed(case):
    params, _, loss = parabola(jnp.float32)
    tx = case.make(0.01, PENALTY)
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    grads, state = jax.grad(loss)(params), tx.init(params)
    same(tx.update(grads, state, params, nobody_knows_this=1), tx.update(grads, state, params))


@every
def test_the_second_call_does_not_compile_again(case):
    params, _, loss = parabola(jnp.float32)
    tx = case.make(0.01, PENALTY)
    traced = []

    @jax.jit
    def step(params, state):
        traced.append(1)
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(3):
        params, state = step(params, state)
    assert len(traced) == 1


@pytest.mark.parametrize("target", [parabola, matrix_parabola, mixed, rosenbrock], ids=lambda t: t.__name__)
@every
def test_with_hardly_any_penalty_the_minimum_of_the_loss_is_reached(case, target):
    params, final, loss = target(jnp.float32)
    rate = case.rate / 60 if target is rosenbrock and "adam" not in case.name else case.rate / 2
    found, state = train(case.make(rate, L1(1e-5)), params, loss, 20_000 if target is rosenbrock else 3_000)
    same(proxopt_jax.prox_point(state, found), final, rtol=3e-2, atol=3e-2)


@every
def test_map_params_finds_the_parameters_in_the_state(case):
    params = {"a": jnp.ones(3), "b": jnp.ones((2, 2))}
    tx = case.make(0.01, [("b", PENALTY)])
    state = tx.init(params)
    same(optax.tree.map_params(tx, lambda v: v, state), state)
    shapes = [x.shape for x in jax.tree.leaves(optax.tree.map_params(tx, lambda v: v[None], state))]
    kept = [x.shape for x in jax.tree.leaves(state)]
    assert shapes == [(1, *s) if s else s for s in kept]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=lambda d: d.__name__)
@every
def test_updates_have_the_dtype_of_the_parameters(case, dtype):
    params = jnp.array([1.0, 2.0], dtype)
    tx = case.make(0.01, PENALTY)
    updates, _ = jax.eval_shape(lambda p: tx.update(2 * p, tx.init(p), p), params)
    assert updates.dtype == dtype


@every
def test_gradients_can_be_accumulated_in_half_precision(case):
    params = jnp.array([1.0, 2.0], jnp.bfloat16)
    tx = optax.MultiSteps(case.make(0.01, PENALTY), every_k_schedule=4)
    updates, _ = jax.jit(tx.update)(2 * params, jax.jit(tx.init)(params), params)
    same(updates, jnp.zeros_like(params))


@pytest.mark.parametrize("dtype", [jnp.complex64, jnp.complex128], ids=lambda d: d.__name__)
@pytest.mark.parametrize("case", [c for c in CASES if "adam" not in c.name], ids=lambda c: c.name)
def test_complex_parameters_keep_their_dtypes_and_reach_the_minimum(case, dtype):
    with jax_precision(dtype == jnp.complex128):
        final = jnp.array([1 + 2j, 0.5j, -1.0], dtype)
        tx = case.make(case.rate / 2, L1(1e-5))

        def step(carry, _):
            p, state = carry
            updates, state = tx.update(2 * (p - final), state, p)  # the conjugate of what jax.grad returns
            return (optax.apply_updates(p, updates), state), None

        start = jnp.zeros(3, dtype)
        (found, state), _ = jax.lax.scan(step, (start, tx.init(start)), length=2_000)
        same(proxopt_jax.prox_point(state, found), final, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.__name__)
@every
def test_states_keep_their_structure_shapes_and_dtypes(case, dtype):
    with jax_precision(dtype == jnp.float64):
        params, _, loss = parabola(dtype)
        schedule = optax.linear_schedule(0.01, 0.001, 10)
        for rate in (0.01, schedule):
            tx = case.make(rate, PENALTY)
            state = tx.init(params)
            specs = jax.eval_shape(lambda p, s, tx=tx: tx.update(jax.grad(loss)(p), s, p), params, state)
            assert specs[0].dtype == dtype
            assert jax.tree.map(lambda x: (x.shape, x.dtype), specs[1]) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
            # lax.cond refuses branches of other types
            jax.eval_shape(
                lambda p, s, tx=tx: jax.lax.cond(p[0] > 0, lambda: tx.update(jax.grad(loss)(p), s, p), lambda: (p, s)),
                params,
                state,
            )


@pytest.mark.parametrize(
    "factory",
    [proxopt_jax.prox_sgd, proxopt_jax.hapg, proxopt_jax.prox_adam, proxopt_jax.adam_hapg, proxopt_jax.sgl, proxopt_jax.l1],
    ids=lambda f: f.__name__,
)
def test_the_learning_rate_is_annotated_as_schedule_and_every_number_can_be_injected(factory):
    rate = inspect.signature(factory).parameters["learning_rate"]
    assert rate.annotation == optax.ScalarOrSchedule
    link = rate.kind is inspect.Parameter.KEYWORD_ONLY
    first = (1e-3,) if link else (0.01, PENALTY)
    options = {"learning_rate": 0.01} if link else {"strength": 1e-3}
    plain, injected = factory(*first, **options), optax.inject_hyperparams(factory)(*first, **options)
    params = [-jnp.ones((2, 3)), jnp.ones((2, 5, 2))]
    grads = jax.tree.map(jnp.negative, params)
    updates, state = jax.jit(plain.update)(grads, jax.jit(plain.init)(params), params)
    injected_updates, injected_state = jax.jit(injected.update)(grads, jax.jit(injected.init)(params), params)
    same(injected_updates, updates, rtol=1e-4, atol=1e-7)
    same(injected_state.inner_state, state, rtol=1e-4, atol=1e-7)


@every
def test_a_constant_schedule_is_the_constant(case):
    params, _, loss = parabola(jnp.float32)
    number, _ = train(case.make(1e-3, PENALTY), params, loss, 10)
    schedule, _ = train(case.make(optax.constant_schedule(1e-3), PENALTY), params, loss, 10)
    same(number, schedule, rtol=1e-5)


CONTRIB = {
    "mechanize": lambda tx: optax.contrib.mechanize(tx, weight_decay=0.0),
    "schedule_free": lambda tx: optax.contrib.schedule_free(tx, learning_rate=0.01),
    "reduce_on_plateau": lambda tx: optax.chain(tx, optax.contrib.reduce_on_plateau()),
}


@pytest.mark.parametrize("wrapper", CONTRIB)
@pytest.mark.parametrize("case", [c for c in CASES if c.name in ("prox_adam", "proximal sgd")], ids=lambda c: c.name)
def test_inside_the_wrappers_of_contrib_the_minimum_of_the_loss_is_reached(case, wrapper):
    params, final, loss = matrix_parabola(jnp.float32)
    # mechanize finds the scale of the updates itself, from that of the optimizer with learning rate 1
    tx = CONTRIB[wrapper](case.make(1.0 if wrapper == "mechanize" else 0.01, L1(1e-5)))

    def step(carry, _):
        p, state = carry
        value, grads = jax.value_and_grad(loss)(p)
        updates, state = tx.update(grads, state, p, value=value, nobody_knows_this=1)
        return (optax.apply_updates(p, updates), state), None

    (found, state), _ = jax.lax.scan(step, (params, tx.init(params)), length=5_000)
    found = optax.contrib.schedule_free_eval_params(state, found) if wrapper == "schedule_free" else found
    same(found, final, rtol=3e-2, atol=3e-2)
    same(optax.tree.map_params(tx, lambda v: v, state), state)


@pytest.mark.parametrize("case", WHOLE, ids=lambda c: c.name)
def test_the_step_count_stops_at_its_largest_value_instead_of_turning_negative(case):
    params, _, loss = parabola(jnp.float32)
    tx = case.make(0.01, PENALTY)
    last = jnp.iinfo(jnp.int32).max
    state = tx.init(params)._replace(count=jnp.asarray(last, jnp.int32))
    updates, state = tx.update(jax.grad(loss)(params), state, params)
    assert int(state.count) == last
    assert np.isfinite(np.asarray(updates)).all()


@every
def test_init_takes_abstract_parameters(case):
    params = {"w": jax.ShapeDtypeStruct((4, 2), jnp.bfloat16), "b": jax.ShapeDtypeStruct((2,), jnp.float32)}
    tx = case.make(0.01, [("w", PENALTY)])
    spec = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    state = tx.init(params)
    assert spec(state) == spec(tx.init(optax.tree.zeros_like(params)))
    if getattr(state, "point", None) is None:
        same(state, tx.init(optax.tree.zeros_like(params)))
    with pytest.raises(ValueError, match="must fit params leaf 'b'"):
        case.make(0.01, GroupL2(1.0, Groups.along(1))).init(params)


@pytest.mark.parametrize("case", WHOLE, ids=lambda c: c.name)
def test_state_prox_point_and_parameters_can_be_donated_together(case):
    params = jnp.array([-1.0, 10.0, 1.0])
    tx = case.make(0.01, PENALTY)
    state = tx.init(params)
    step = jax.jit(lambda p, s, q: (q, *tx.update(p + q, s, p)), donate_argnums=(0, 1, 2))
    for _ in range(2):
        point = jnp.copy(params) if getattr(state, "point", None) is None else proxopt_jax.prox_point(state, params)
        _, params, state = step(params, state, point)
