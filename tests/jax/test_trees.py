"""Path patterns, trees of penalties and labels decide which leaves a penalty sees; what does not fit is an error at init."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax_cases import CASES, LINKS, WHOLE, regression, same, train, zeros

import proxopt_jax
from proxopt import L1, GroupL2, Groups, Nested, SparseGroupLasso
from proxopt_jax.trees import paths

HUGE = L1(1e6)
PARAMS = {"fc1": {"b": jnp.ones(3), "w": jnp.ones((4, 3))}, "fc2": [jnp.ones(2), jnp.ones((3, 2))]}
every = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)


def dead(penalty, params=PARAMS, **options) -> list[str]:
    """Paths of the leaves that one step of a strong penalty zeroes."""
    tx = proxopt_jax.proximal(penalty, learning_rate=1.0, **options)
    updates, _ = tx.update(optax.tree.zeros_like(params), tx.init(params), params)
    new = optax.apply_updates(params, updates)
    return [name for name, x in zip(paths(new), jax.tree.leaves(new)) if zeros(x) == x.size]


def test_a_path_is_the_keys_joined_by_slashes():
    assert paths(PARAMS) == ["fc1/b", "fc1/w", "fc2/0", "fc2/1"]
    assert paths(jnp.ones(2)) == [""]
    assert paths(optax.ScaleByAdamState(jnp.ones(()), {"a": jnp.ones(1)}, None)) == ["count", "mu/a"]


@pytest.mark.parametrize(
    "penalty, expected",
    [
        (HUGE, ["fc1/b", "fc1/w", "fc2/0", "fc2/1"]),
        (None, []),
        ([("fc1/w", HUGE)], ["fc1/w"]),
        ([("*/[wb]", HUGE)], ["fc1/b", "fc1/w"]),
        ([("fc1/b", None), ("*1*", HUGE)], ["fc1/w", "fc2/1"]),
        ([["fc1/*", L1(0.0)], ["*", HUGE]], ["fc2/0", "fc2/1"]),
        ({"fc1": HUGE, "fc2": None}, ["fc1/b", "fc1/w"]),
        ({"fc1": {"b": None, "w": HUGE}, "fc2": [HUGE, None]}, ["fc1/w", "fc2/0"]),
        ({"fc1": None, "fc2": (None, HUGE)}, None),
    ],
    ids=["one", "none", "path", "glob", "first pattern wins", "pairs as lists", "prefix tree", "full tree", "other containers"],
)
def test_a_penalty_reaches_the_leaves_that_it_names(penalty, expected):
    if expected is None:
        with pytest.raises(ValueError, match="penalty must be a tree with the structure of params"):
            dead(penalty)
    else:
        assert dead(penalty) == expected


def test_leaves_without_a_penalty_take_the_plain_step():
    params, loss = regression()
    plain, _ = train(optax.sgd(0.05), params, loss, 10)
    link, _ = train(optax.chain(optax.sgd(0.05), proxopt_jax.proximal([("w", None)], learning_rate=0.05)), params, loss, 10)
    same(plain, link)
    adam, _ = train(optax.adam(0.05), params, loss, 10)
    same(train(proxopt_jax.prox_adam(0.05, None), params, loss, 10)[0], adam, rtol=1e-4, atol=1e-6)


def test_each_leaf_is_its_own_problem_unless_joint():
    params = {"a": jnp.array([3.0]), "b": jnp.array([0.1])}
    assert dead(GroupL2(1.0, weights="none"), params) == ["b"]
    assert dead(GroupL2(1.0, weights="none"), params, joint=True) == []
    assert dead(GroupL2(3.1, weights="none"), params, joint=True) == ["a", "b"]


def test_joint_leaves_are_those_that_share_one_penalty_object():
    strong, weak = GroupL2(3.1, weights="none"), GroupL2(3.1, weights="none")
    params = {"a": jnp.array([3.0]), "b": jnp.array([0.1]), "c": jnp.array([9.0])}
    assert dead([("[ab]", strong), ("c", weak)], params, joint=True) == ["a", "b"]
    assert dead({"a": strong, "b": weak, "c": weak}, params, joint=True) == ["a"]


@every
def test_labelled_groups_that_span_leaves_live_and_die_together(case):
    params, loss = regression()
    units = Groups.labels([range(4), range(4)], axis=(0, 1))
    assert proxopt_jax.tree_labels({"b": list(range(4)), "w": np.arange(4)}, axis={"b": 0, "w": 1}) == units
    if case in LINKS:
        make = {
            "proximal link": lambda p: optax.chain(optax.sgd(0.05), proxopt_jax.proximal(p, learning_rate=0.05, joint=True)),
            "proximal sgd": lambda p: proxopt_jax.proximal(optax.sgd(0.05), p, 0.05, joint=True),
            "proximal adam": lambda p: proxopt_jax.proximal(optax.adam(0.05), p, joint=True),
        }.get(case.name)
        if make is None:
            pytest.skip("behind an injected adam joint groups are those behind adam")
        tx = make(GroupL2(0.3, units))
    else:
        tx = case.make(case.rate, GroupL2(0.3, units), joint=True)
    point = proxopt_jax.prox_point(*reversed(train(tx, params, loss, 300)))
    lives = np.any(np.asarray(point["w"]), axis=0)
    np.testing.assert_array_equal(lives, np.asarray(point["b"]) != 0)
    np.testing.assert_array_equal(lives, [True, True, False, False])


def test_label_trees_take_strings_and_one_axis_for_all():
    groups = proxopt_jax.tree_labels({"a": ["x", "y"], "b": ("y", "z", "z")})
    assert groups == Groups.labels([["x", "y"], ["y", "z", "z"]])
    assert groups.names == ("x", "y", "z")


@pytest.mark.parametrize(
    "labels, axis, error, text",
    [
        ({}, 0, ValueError, "labels must hold at least one leaf"),
        ({"a": 3}, 0, TypeError, "labels must hold ints or strings for each leaf, got 3"),
        ({"a": [1, 2]}, {"b": 0}, ValueError, "axis must be an int or a tree like labels"),
    ],
)
def test_labels_that_make_no_tree_are_refused(labels, axis, error, text):
    with pytest.raises(error, match=text):
        proxopt_jax.tree_labels(labels, axis)


@every
@pytest.mark.parametrize(
    "penalty, error, text",
    [
        ([("fc9/*", HUGE)], ValueError, r"decide at least one leaf, got 'fc9/\*' \(pattern 0\); leaves: 'fc1/b', 'fc1/w'"),
        ([("*", HUGE), ("fc1/*", HUGE)], ValueError, r"decide at least one leaf, got 'fc1/\*' \(pattern 1\)"),
        (GroupL2(1.0, Groups.along(1)), ValueError, "must fit params leaf 'fc1/b': axis of Groups.along must exist"),
        ([("fc1/w", GroupL2(1.0, Groups.labels([0, 1, 1])))], ValueError, "must fit params leaf 'fc1/w': labels must hold one"),
        ({"fc1": HUGE}, ValueError, "penalty must be a tree with the structure of params or a prefix"),
    ],
    ids=["no leaf", "shadowed", "axis", "labels", "tree"],
)
def test_what_does_not_fit_is_an_error_at_init_that_names_the_leaf(case, penalty, error, text):
    tx = case.make(0.1, penalty)
    for init in (tx.init, jax.jit(tx.init)):
        with pytest.raises(error, match=text):
            init(PARAMS)


@every
def test_a_leaf_that_is_not_floating_point_cannot_have_a_penalty(case):
    params = {"w": jnp.ones(3), "steps": jnp.zeros((), jnp.int32)}
    with pytest.raises(TypeError, match="'steps' must be floating point"):
        case.make(0.1, L1(1.0)).init(params)


def test_integer_leaves_without_a_penalty_pass_through_a_link():
    params = {"w": jnp.array([0.01, 3.0]), "steps": jnp.array(3)}
    link = proxopt_jax.proximal([("w", L1(1.0))], learning_rate=1.0)
    updates = {"w": jnp.zeros(2), "steps": np.zeros((), jax.dtypes.float0)}
    out, _ = link.update(updates, link.init(params), params)
    assert out["steps"] is updates["steps"]
    assert zeros(params["w"] + out["w"]) == 1


LINK = lambda lr, penalty: proxopt_jax.proximal(penalty, learning_rate=lr)


@pytest.mark.parametrize("make", [*(c.make for c in WHOLE), LINK], ids=[*(c.name for c in WHOLE), "link"])
def test_integers_and_keys_without_a_penalty_pass_and_have_no_state(make):
    params = {"w": jnp.ones(3), "steps": jnp.zeros((), jnp.int32), "key": jax.random.key(0)}
    tx = make(0.1, [("w", L1(1.0))])
    grads = jax.grad(lambda p: jnp.sum(p["w"] ** 2), allow_int=True)(params)
    updates, state = jax.jit(tx.update)(grads, jax.jit(tx.init)(params), params)
    assert updates["steps"].dtype == updates["key"].dtype == jax.dtypes.float0
    alone = make(0.1, L1(1.0))
    expected, _ = alone.update(grads["w"], alone.init(params["w"]), params["w"])
    same(updates["w"], expected, rtol=1e-6)
    point = proxopt_jax.prox_point(state, params)
    assert point["key"] is params["key"]
    assert point["steps"] is params["steps"]
    updates, _ = tx.update({**grads, "steps": jnp.zeros((), jnp.int32)}, state, params)
    assert zeros(updates["steps"]) == 1


def test_integers_and_keys_pass_behind_an_optimizer_that_is_masked_or_takes_zeros_for_their_gradients():
    params = {"w": jnp.ones(3), "steps": jnp.zeros((), jnp.int32), "key": jax.random.key(0)}
    masked = optax.masked(optax.adam(0.1), {"w": True, "steps": False, "key": False})
    tx = proxopt_jax.proximal(masked, [("w", L1(1.0))])
    grads = jax.grad(lambda p: jnp.sum(p["w"] ** 2), allow_int=True)(params)
    updates, _ = tx.update(grads, tx.init(params), params)
    same(updates["w"], jnp.full(3, -0.15), rtol=1e-5)
    assert updates["key"].dtype == jax.dtypes.float0
    del params["key"], grads["key"]
    tx = proxopt_jax.proximal(optax.adam(0.1), [("w", L1(1.0))])
    updates, _ = tx.update({**grads, "steps": jnp.zeros((), jnp.int32)}, tx.init(params), params)
    same(updates["w"], jnp.full(3, -0.15), rtol=1e-5)


@every
def test_missing_parameters_are_an_error_that_says_so(case):
    params, loss = regression()
    tx = case.make(0.1, L1(1.0))
    with pytest.raises(ValueError, match="requires the current value of parameters, but you are not passing `params`"):
        tx.update(jax.grad(loss)(params), tx.init(params))


@pytest.mark.parametrize("case", WHOLE, ids=lambda c: c.name)
def test_what_is_no_penalty_and_numbers_out_of_range_are_refused_at_once(case):
    for bad in (0.1, [("w", 0.1)], {"w": "L1"}, [L1(1.0), 3]):
        with pytest.raises(TypeError, match="penalty must be a penalty, a list of"):
            case.make(0.1, bad)
    with pytest.raises(ValueError, match="learning_rate must be finite and >= 0, got -1"):
        case.make(-1.0, HUGE)
    with pytest.raises(ValueError, match="strength must be finite and >= 0, got -1"):
        case.make(0.1, HUGE, strength=-1.0)


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda: proxopt_jax.prox_sgd(0.1, HUGE, rho=0.0), ValueError, "rho must lie in|rho must"),
        (lambda: proxopt_jax.prox_sgd(0.1, HUGE, tau=0.0), ValueError, "tau must be finite and > 0"),
        (lambda: proxopt_jax.hapg(0.1, HUGE, "newton"), ValueError, "extrapolation must be one of"),
        (lambda: proxopt_jax.adam_hapg(0.1, HUGE, b2=1.0), ValueError, r"b2 must lie in \[0, 1\), got 1"),
        (lambda: proxopt_jax.prox_adam(0.1, HUGE, eps=-1.0), ValueError, "eps must be finite and >= 0"),
        (lambda: proxopt_jax.prox_adam(0.1, HUGE, weight_decay=-1.0), ValueError, "weight_decay must be finite"),
        (lambda: proxopt_jax.sgl(0.1, l1_ratio=2, learning_rate=0.1), ValueError, r"l1_ratio must lie in \[0, 1\], got 2"),
        (lambda: proxopt_jax.sgl(0.1), TypeError, "learning_rate"),
        (lambda: proxopt_jax.l1(-0.1, learning_rate=0.1), ValueError, "strength must be finite and >= 0"),
        (lambda: proxopt_jax.proximal(HUGE), TypeError, r"proximal\(penalty, learning_rate=...\)"),
        (lambda: proxopt_jax.proximal(HUGE, 0.1), TypeError, r"proximal\(penalty, learning_rate=...\)"),
    ],
)
def test_arguments_out_of_their_domain_are_refused(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_two_group_levels_in_adams_exact_metric_are_refused_at_init_and_allowed_with_a_scalar_step():
    levels = Nested(GroupL2(0.1, Groups.along(1)), GroupL2(0.1))
    params = {"w": jnp.ones((3, 2))}
    with pytest.raises(ValueError, match="leaf 'w': metric='exact' is not the prox of two group levels"):
        proxopt_jax.prox_adam(0.1, levels).init(params)
    proxopt_jax.hapg(0.1, levels).init(params)
    proxopt_jax.adam_hapg(0.1, levels).init(params)


class Foreign:
    """Half the squared norm, from elsewhere."""

    def value(self, x):
        return (x**2).sum() / 2

    def prox(self, x, step):
        return x / (1 + step)


@every
def test_an_object_with_value_and_prox_serves_as_a_penalty(case):
    params, loss = regression()
    new, _ = train(case.make(case.rate, [("w", Foreign())]), params, loss, 3)
    assert not np.array_equal(new["w"], train(case.make(case.rate, None), params, loss, 3)[0]["w"])
    with pytest.raises(TypeError, match="strength must be None for a penalty without with_strength, got Foreign"):
        proxopt_jax.hapg(0.1, Foreign(), strength=1.0)


def test_group_weights_and_strengths_per_entry_are_arrays():
    w = jnp.array([[1.0, 1.0], [1.0, 1.0]])
    link = proxopt_jax.group_l2(1.0, Groups.along(0), weights=np.array([0.0, 9.0]), learning_rate=1.0)
    updates, _ = link.update(jnp.zeros((2, 2)), link.init(w), w)
    np.testing.assert_array_equal(w + updates, [[1, 0], [1, 0]])
    tx = proxopt_jax.prox_sgd(1.0, L1(np.array([[0.0, 9.0], [9.0, 0.0]])))
    updates, _ = tx.update(jnp.zeros((2, 2)), tx.init(w), w)
    np.testing.assert_array_equal(w + updates, [[1, 0], [0, 1]])


def test_a_sparse_group_lasso_on_every_leaf_needs_no_groups():
    point = dead(SparseGroupLasso(1e6))
    assert point == ["fc1/b", "fc1/w", "fc2/0", "fc2/1"]
