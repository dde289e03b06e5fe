"""Inside optax's wrappers the transformations do what they do alone, and prox_point looks through them."""

from __future__ import annotations

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax_cases import COLUMNS, RULES, SHARED, WHOLE, alone, regression, same, train, zeros
from libraries import jax_precision

import proxopt_jax
from proxopt import L1, GroupL2, Groups, SparseGroupLasso
from proxopt import updates as core
from proxopt_jax.metric import has_trust_ratio

every = pytest.mark.parametrize("case", SHARED, ids=lambda c: c.name)
every_whole = pytest.mark.parametrize("case", WHOLE, ids=lambda c: c.name)
MASK = {"w": True, "b": False}


@every
def test_apply_if_finite_changes_nothing_while_all_is_finite_and_skips_a_step_with_nan_altogether(case):
    params, loss = regression()
    bare, bare_state = alone(case, 50)
    tx = optax.apply_if_finite(case.make(case.rate, RULES), 3)
    inside, state = train(tx, params, loss, 50)
    same(proxopt_jax.prox_point(state, inside), proxopt_jax.prox_point(bare_state, bare), rtol=1e-5, atol=1e-6)
    updates, after = jax.jit(tx.update)(jax.tree.map(lambda p: p * jnp.nan, params), state, inside)
    assert zeros(updates) == 28
    same(after.inner_state, state.inner_state)


@every
def test_multi_steps_takes_one_step_per_k_gradients(case):
    params, loss = regression()
    bare, state = alone(case, 10)
    several = optax.MultiSteps(case.make(case.rate, RULES), every_k_schedule=4)
    inside, inside_state = train(several, params, loss, 40)
    bare, inside = proxopt_jax.prox_point(state, bare), proxopt_jax.prox_point(inside_state, inside)
    same(bare, inside, rtol=1e-3, atol=1e-5)


@every
def test_masked_penalises_what_the_mask_shows_and_prox_point_keeps_the_rest(case):
    params, loss = regression()
    tx = optax.chain(optax.masked(case.make(case.rate, COLUMNS), MASK), optax.masked(optax.sgd(0.05), {"w": False, "b": True}))
    new, state = train(tx, params, loss, 200)
    point = proxopt_jax.prox_point(state, new)
    assert (np.asarray(point["w"])[:, 2:] == 0).all()
    np.testing.assert_array_equal(point["b"], new["b"])
    assert zeros(point["b"]) == 0


@every
def test_partition_gives_each_part_its_own_optimizer_and_prox_point_gathers_them(case):
    params, loss = regression()
    parts = {"sparse": case.make(case.rate, COLUMNS), "dense": proxopt_jax.hapg(0.05, L1(1e-3))}
    tx = optax.partition(parts, {"w": "sparse", "b": "dense"})
    new, state = train(tx, params, loss, 200)
    point = proxopt_jax.prox_point(state, new)
    assert (np.asarray(point["w"])[:, 2:] == 0).all()
    np.testing.assert_array_equal(point["b"], state.inner_states["dense"].inner_state.point["b"])


@every_whole
def test_prox_point_of_an_accelerated_method_is_in_its_state_and_else_the_parameters(case):
    new, state = alone(case, 20)
    point = proxopt_jax.prox_point(state, new)
    if getattr(state, "point", None) is None:
        same(point, new)
    else:
        same(point, state.point)
        assert not np.array_equal(point["w"], new["w"])


def test_prox_point_looks_through_wrappers_in_wrappers():
    params, loss = regression()
    sparse, dense = optax.masked(proxopt_jax.hapg(0.02, COLUMNS), MASK), optax.masked(optax.scale(-0.02), {"w": False, "b": True})
    inner = optax.chain(optax.clip_by_global_norm(10.0), sparse, dense)
    tx = optax.MultiSteps(optax.apply_if_finite(inner, 2), every_k_schedule=2)
    new, state = train(tx, params, loss, 300)
    assert (np.asarray(proxopt_jax.prox_point(state, new)["w"])[:, 2:] == 0).all()
    assert zeros(new["b"]) == 0


def test_prox_point_of_a_foreign_state_or_of_other_parameters_is_an_error():
    params, _ = regression()
    with pytest.raises(ValueError, match="state must hold the state of a proxopt_jax transformation"):
        proxopt_jax.prox_point(optax.adam(0.1).init(params), params)
    state = proxopt_jax.hapg(0.1, None).init(params)
    with pytest.raises(ValueError, match=r"'b' of shape \(4,\), got no such leaf"):
        proxopt_jax.prox_point(state, {"w": params["w"]})
    with pytest.raises(ValueError, match=r"'w' of shape \(6, 4\), got shape \(4, 6\)"):
        proxopt_jax.prox_point(state, {"w": params["w"].T, "b": params["b"]})


@every_whole
def test_injected_numbers_and_schedules_give_the_plain_trajectory(case):
    params, loss = regression()
    factory = {
        "prox_sgd": proxopt_jax.prox_sgd,
        "hapg": proxopt_jax.hapg,
        "prox_adam": proxopt_jax.prox_adam,
        "adam_hapg": proxopt_jax.adam_hapg,
    }.get(case.name)
    if factory is None:
        pytest.skip("only the full optimizers have numbers to inject")
    fall = optax.linear_schedule(0.02, 0.01, 20)
    rise = optax.linear_schedule(0.0, 0.2, 20)
    plain, _ = train(factory(fall, RULES, strength=rise), params, loss, 40)
    injected, state = train(optax.inject_hyperparams(factory)(fall, RULES, strength=rise), params, loss, 40)
    same(plain, injected, rtol=1e-4, atol=1e-5)  # injected numbers are rounded to float32
    assert set(state.hyperparams) >= {"learning_rate", "strength"}
    assert ("extrapolation" in state.hyperparams) == ("hapg" in case.name), "the cap is a number like the others"


def test_injected_links_take_every_number_and_later_edits():
    params = {"w": jnp.ones((3, 2))}
    make = optax.inject_hyperparams(proxopt_jax.sgl)
    link = make(0.1, l1_ratio=0.5, groups=Groups.along(0), learning_rate=1.0)
    state = jax.jit(link.init)(params)
    step = jax.jit(link.update)
    updates, state = step(optax.tree.zeros_like(params), state, params)
    expected = SparseGroupLasso(0.1, 0.5, Groups.along(0)).prox(params["w"], 1.0)
    np.testing.assert_allclose(params["w"] + updates["w"], expected, rtol=1e-6)
    state.hyperparams["strength"] = jnp.asarray(100.0)
    updates, _ = step(optax.tree.zeros_like(params), state, params)
    assert zeros(params["w"] + updates["w"]) == 6


@every_whole
def test_schedules_count_the_steps_from_zero(case):
    params, loss = regression()
    until = lambda before, after: lambda t: jnp.where(t < 3, before, after)
    new, state = train(case.make(case.rate, RULES, strength=until(0.0, 1e6)), params, loss, 3)
    assert zeros(proxopt_jax.prox_point(state, new)["w"]) == 0
    rate = case.rate if "tau" in case.name else until(0.0, case.rate)  # with tau the rate does not scale the threshold
    new, state = train(case.make(rate, RULES, strength=until(0.0, 1e6)), params, loss, 4)
    assert zeros(proxopt_jax.prox_point(state, new)["w"]) == 24


FALL = optax.exponential_decay(0.05, 10, 0.8)


@cache
def by_prox_adam(rate):
    return train(proxopt_jax.prox_adam(rate, RULES), *regression(), 100)[0]


@pytest.mark.parametrize(
    "inner, rate",
    [
        (optax.adam, 0.02),
        (lambda lr: optax.adamw(lr, weight_decay=0.0), FALL),
        (lambda lr: optax.chain(optax.clip_by_global_norm(1e3), optax.adam(lr)), 0.02),
        (lambda lr: optax.inject_hyperparams(optax.adam)(lr), FALL),
        (lambda lr: optax.chain(optax.scale_by_adam(), optax.scale_by_learning_rate(lr)), FALL),
    ],
    ids=["adam", "adamw", "chain", "inject", "scale_by_adam"],
)
def test_proximal_behind_adam_takes_the_steps_of_prox_adam(inner, rate):
    params, loss = regression()
    expected = by_prox_adam(rate)
    assert zeros(expected["w"]) > 0
    for given in (None, rate):
        found, _ = train(proxopt_jax.proximal(inner(rate), RULES, given), params, loss, 100)
        same(found, expected, rtol=2e-3, atol=2e-5)
        np.testing.assert_array_equal(found["w"] == 0, expected["w"] == 0)


def test_the_learning_rate_is_measured_in_the_step_that_adam_took_without_its_decay():
    params, loss = regression()
    params["b"] = params["b"] + 3.0
    decayed = lambda lr: optax.adamw(lr, weight_decay=0.5)
    given, _ = train(proxopt_jax.proximal(decayed(0.02), RULES, 0.02), params, loss, 50)
    measured, _ = train(proxopt_jax.proximal(decayed(0.02), RULES), params, loss, 50)
    same(given, measured, rtol=1e-3, atol=1e-5)


def test_each_of_several_adams_has_its_own_rate():
    params, loss = regression()
    parts = optax.partition({"fast": optax.adam(0.05), "slow": optax.adam(0.001)}, {"w": "fast", "b": "slow"})
    penalty = [("w", COLUMNS), ("b", L1(0.1))]
    found, _ = train(proxopt_jax.proximal(parts, penalty), params, loss, 50)
    alone = optax.partition(
        {"fast": proxopt_jax.prox_adam(0.05, COLUMNS), "slow": proxopt_jax.prox_adam(0.001, L1(0.1))}, {"w": "fast", "b": "slow"}
    )
    same(found, train(alone, params, loss, 50)[0], rtol=1e-3, atol=1e-5)


def test_adams_other_numbers_are_keywords_or_read_from_injected_ones():
    params, loss = regression()
    numbers = {"b1": 0.5, "b2": 0.9, "eps": 1e-3}
    expected, _ = train(proxopt_jax.prox_adam(0.02, RULES, **numbers), params, loss, 50)
    told, _ = train(proxopt_jax.proximal(optax.adam(0.02, **numbers), RULES, **numbers), params, loss, 50)
    read, _ = train(proxopt_jax.proximal(optax.inject_hyperparams(optax.adam)(0.02, **numbers), RULES), params, loss, 50)
    same(told, expected, rtol=1e-3, atol=1e-5)
    same(read, expected, rtol=1e-3, atol=1e-5)


def test_behind_other_optimizers_the_step_is_the_learning_rate_given_or_injected():
    params, loss = regression()
    for make in (optax.sgd, optax.lion, optax.rmsprop):
        given, _ = train(proxopt_jax.proximal(make(0.01), RULES, 0.01), params, loss, 30)
        chained, _ = train(optax.chain(make(0.01), proxopt_jax.proximal(RULES, learning_rate=0.01)), params, loss, 30)
        same(given, chained, rtol=1e-5, atol=1e-6)
    injected = proxopt_jax.proximal(optax.inject_hyperparams(optax.sgd)(0.01), RULES)
    new, state = train(injected, params, loss, 30)
    same(new, train(proxopt_jax.proximal(optax.sgd(0.01), RULES, 0.01), params, loss, 30)[0], rtol=1e-5, atol=1e-6)
    state.inner_state.hyperparams["learning_rate"] = jnp.asarray(1e6)
    updates, _ = injected.update(optax.tree.zeros_like(params), state, new)
    assert zeros(new["w"] + updates["w"]) == 24


def test_a_learning_rate_that_nothing_tells_or_several_tell_is_an_error_at_init():
    params, _ = regression()
    with pytest.raises(ValueError, match="learning_rate must be given for the penalty on params leaf 'w'"):
        proxopt_jax.proximal(optax.sgd(0.1), RULES).init(params)
    proxopt_jax.proximal(optax.sgd(0.1), None).init(params)
    sgd = optax.inject_hyperparams(optax.sgd)
    two = optax.partition({"a": sgd(0.1), "b": sgd(0.2)}, {"w": "a", "b": "b"})
    with pytest.raises(ValueError, match="learning_rate must be given: the state of the inner optimizer holds 2"):
        proxopt_jax.proximal(two, RULES).init(params)


def lasso(seed=1):
    """Parameters, loss, and the residual of stationarity of a lasso in two leaves, of very different norms."""
    rng = np.random.default_rng(seed)
    a = jnp.asarray(rng.normal(size=(40, 8)))
    y = a @ jnp.array([3.0, -2.0, 0.0, 0.0, 0.05, 0.1, 0.0, 0.0]) + 0.1 * jnp.asarray(rng.normal(size=40))
    loss = lambda p: jnp.mean((a @ jnp.concatenate([p["large"], p["small"]]) - y) ** 2) / 2

    def stationarity(penalty, p):
        grads = jax.grad(loss)(p)
        return max(float(jnp.abs(p[k] - penalty.prox(p[k] - grads[k], 1.0)).max()) for k in p)

    return {"large": jnp.ones(4), "small": jnp.full(4, 0.1)}, loss, stationarity


@pytest.mark.parametrize(
    "inner, options",
    [
        (optax.lamb, {}),
        (optax.lamb, {"learning_rate": optax.exponential_decay(0.01, 200, 0.5, transition_begin=1000)}),
        (optax.inject_hyperparams(optax.lamb), {}),
        (lambda lr: optax.masked(optax.lamb(lr), {"large": True, "small": True}), {}),
    ],
    ids=["lamb", "given", "injected", "masked"],
)
def test_behind_a_trust_ratio_the_step_is_measured_for_each_leaf(inner, options):
    with jax_precision():
        params, loss, stationarity = lasso()
        decay = optax.exponential_decay(0.01, 200, 0.5, transition_begin=1000)
        found, _ = train(proxopt_jax.proximal(inner(decay), L1(0.02), **options), params, loss, 5000)
        assert stationarity(L1(0.02), found) < 1e-5
        assert 0 < zeros(found) < 8


def test_a_trust_ratio_is_found_wherever_it_is_and_not_where_a_name_is_like_it():
    lamb = 0.5
    with_it = [
        optax.lars(0.1),
        optax.chain(optax.clip(1.0), optax.scale_by_trust_ratio()),
        optax.inject_hyperparams(optax.fromage)(0.1),
        optax.inject_hyperparams(lambda learning_rate: optax.lamb(learning_rate))(0.1),
        optax.partition({"a": optax.sgd(0.1), "b": optax.lamb(0.1)}, {"large": "a", "small": "b"}),
        optax.MultiSteps(optax.lamb(0.1), 2),
    ]
    without = [optax.adamw(0.1), optax.sgd(lambda count: lamb * count), optax.inject_hyperparams(optax.lion)(0.1)]
    for inner in with_it:
        assert has_trust_ratio(optax.with_extra_args_support(inner))
    for inner in without:
        assert not has_trust_ratio(optax.with_extra_args_support(inner))


def test_a_trust_ratio_without_the_moments_of_adam_is_refused():
    params, _, _ = lasso()
    for inner in (optax.lars(0.1), optax.inject_hyperparams(optax.lars)(0.1), optax.fromage(0.1)):
        with pytest.raises(ValueError, match="a trust ratio scales the steps of 'large'"):
            proxopt_jax.proximal(inner, L1(0.1), 0.1).init(params)
    proxopt_jax.proximal(optax.lars(0.1), None).init(params)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_measured_rate_of_a_leaf_with_one_entry_is_that_of_adam_also_with_weight_decay(decay):
    params = {"w": jnp.array([[2.0]]), "b": jnp.array([1.0, -2.0])}
    loss = lambda p: jnp.sum((p["w"] - 1) ** 2) + jnp.sum((p["b"] - 1) ** 2)
    inner = optax.adamw(0.02, weight_decay=decay)
    given, _ = train(proxopt_jax.proximal(inner, L1(0.1), 0.02), params, loss, 20)
    measured, _ = train(proxopt_jax.proximal(inner, L1(0.1)), params, loss, 20)
    same(given, measured, rtol=1e-5, atol=1e-6)


def test_a_leaf_without_gradient_takes_the_rate_of_the_others():
    params = {"w": jnp.array([2.0]), "unused": jnp.array([1.0])}
    loss = lambda p: jnp.sum((p["w"] - 1) ** 2) + 0 * jnp.sum(p["unused"])
    found, _ = train(proxopt_jax.proximal(optax.adam(0.02), L1(0.1)), params, loss, 3)
    expected, _ = train(proxopt_jax.prox_adam(0.02, L1(0.1)), params, loss, 3)
    same(found, expected, rtol=1e-5)


def test_moments_in_the_subspace_of_galore_are_not_taken_for_those_of_the_entries():
    galore = pytest.importorskip("optax.contrib").__dict__.get("galore")
    if galore is None:
        pytest.skip("this optax has no galore")
    params = {"tall": jnp.ones((6, 3)), "square": jnp.ones((3, 3)), "bias": jnp.ones(3)}
    inner = galore(0.01, rank=3)
    with pytest.raises(ValueError, match="learning_rate must be given for the penalty on params leaf 'square'"):
        proxopt_jax.proximal(inner, [("square", L1(0.1))]).init(params)
    proxopt_jax.proximal(inner, [("bias", L1(0.1))]).init(params)
    tx = proxopt_jax.proximal(inner, L1(0.1), 0.01)
    updates, _ = tx.update(params, tx.init(params), params)
    moved, _ = inner.update(params, inner.init(params), params)
    same(updates["tall"], L1(0.1).prox(params["tall"] + moved["tall"], 0.01) - params["tall"], atol=1e-6)


def test_prox_point_refuses_wrappers_that_move_the_parameters_away_from_the_zeros():
    contrib = pytest.importorskip("optax.contrib")
    params, _ = regression()
    tx = proxopt_jax.prox_adam(0.02, RULES)
    averaged = optax.chain(proxopt_jax.prox_sgd(0.02, RULES), optax.ema(0.9))
    for name, wrapped in {
        "ScheduleFreeState": contrib.schedule_free(tx, 0.02),
        "MechanicState": contrib.mechanize(tx),
        "EmaState": averaged,
    }.items():
        state = optax.chain(optax.clip(1.0), wrapped).init(params)
        with pytest.raises(ValueError, match=rf"{name} .*undoes the zeros"):
            proxopt_jax.prox_point(state, params)
    lookahead = optax.lookahead(tx, 5, 0.5)
    pair = optax.LookaheadParams.init_synced(params)
    with pytest.raises(ValueError, match=r"LookaheadState .*undoes the zeros"):
        proxopt_jax.prox_point(lookahead.init(pair), pair)
    before = optax.chain(optax.ema(0.9), tx)
    same(proxopt_jax.prox_point(before.init(params), params), params)
    reduced = optax.chain(tx, contrib.reduce_on_plateau())
    same(proxopt_jax.prox_point(reduced.init(params), params), params)


@pytest.mark.parametrize("case", [c for c in WHOLE if "adam" in c.name], ids=lambda c: c.name)
def test_optax_tree_get_finds_the_moments_of_adam(case):
    params, _ = regression()
    state = optax.chain(optax.clip(1.0), case.make(0.01, RULES)).init(params)
    for name in ("mu", "nu"):
        same(optax.tree.get(state, name), optax.tree.zeros_like(params))
    changed = optax.tree.set(state, nu=params)
    same(optax.tree.get(changed, "nu"), params)


@pytest.mark.parametrize("case", [c for c in WHOLE if "adam" in c.name], ids=lambda c: c.name)
def test_states_of_the_first_release_whose_moments_have_other_names_go_on(case):
    params, loss = regression()
    tx = case.make(0.01, RULES)
    params, state = train(tx, params, loss, 3)
    kind = core.AdamHAPGState if "hapg" in case.name else core.ProxAdamState
    old = kind(*state)
    assert old.square is state.nu
    grads = jax.grad(loss)(params)
    expected, after = tx.update(grads, state, params)
    found, old_after = tx.update(grads, old, params)
    same(found, expected)
    assert type(old_after) is kind
    same(tuple(old_after), tuple(after))
    same(proxopt_jax.prox_point(old, params), proxopt_jax.prox_point(state, params))


HALF = {"w": jnp.linspace(0.5, 2.0, 12, dtype=jnp.bfloat16).reshape(3, 4)}


@pytest.mark.parametrize(
    "make",
    [
        lambda lr: proxopt_jax.prox_adam(lr, None),
        lambda lr: proxopt_jax.adam_hapg(lr, None),
        lambda lr: proxopt_jax.proximal(optax.adam(1.0), None, lr),
    ],
    ids=["prox_adam", "adam_hapg", "proximal"],
)
def test_steps_below_half_an_ulp_of_half_precision_parameters_warn_at_init(make, recwarn):
    for lr in (0.0, 0.1, optax.warmup_constant_schedule(0.0, 0.1, 50)):
        make(lr).init(HALF)
        make(lr).init({"w": jnp.ones(3)})
    jax.jit(make(1e-4).init)(HALF)
    make(1e-4).init(jax.eval_shape(lambda: HALF))
    make(1e-4).init({"w": jnp.zeros(3, jnp.bfloat16)})
    make(1e-4).init({"w": jnp.ones(3), "n": jnp.ones(3, jnp.int32)})
    assert not [w for w in recwarn if "ulp" in str(w.message)]
    for lr in (1e-4, optax.constant_schedule(1e-4)):
        with pytest.warns(UserWarning, match="params leaf 'w' is bfloat16.*half an ulp"):
            make(lr).init(HALF)


def test_multi_steps_around_proximal_adam_takes_whole_steps():
    params, loss = regression()
    tx = proxopt_jax.proximal(optax.adam(0.02), GroupL2(0.3, Groups.along(-1)))
    alone, _ = train(tx, params, loss, 10)
    several, _ = train(optax.MultiSteps(tx, 3), params, loss, 30)
    same(alone, several, rtol=1e-3, atol=1e-5)


def test_momentum_on_top_of_uncapped_extrapolation_warns():
    for rule in ("nesterov", "as_printed"):
        with pytest.warns(UserWarning, match=r"b1 = 0.9 with uncapped extrapolation may diverge"):
            proxopt_jax.adam_hapg(0.1, None, b1=0.9, extrapolation=rule)


def test_momentum_under_a_capped_extrapolation_does_not_warn(recwarn):
    proxopt_jax.adam_hapg(0.1, None, b1=0.9)
    proxopt_jax.adam_hapg(0.1, None, extrapolation="nesterov")
    assert not recwarn
