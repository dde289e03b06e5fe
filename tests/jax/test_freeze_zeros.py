"""freeze_zeros: zeros at init stay zero, and the other entries are trained as if the zeros had been removed."""

from __future__ import annotations

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from jax_cases import COLUMNS, RULES, regression, same, train, zeros

import proxopt_jax
from proxopt import GroupL2, Groups, Sphere

CLIP = optax.clip_by_global_norm(0.5)
OPTIMIZERS = {
    "clipped adam": lambda: optax.chain(CLIP, optax.adam(0.02)),
    "adam_hapg in a chain": lambda: optax.chain(CLIP, proxopt_jax.adam_hapg(0.02, None)),
    "prox_sgd with tau": lambda: proxopt_jax.prox_sgd(0.5, None, tau=20.0),
    "hapg in masked": lambda: optax.masked(proxopt_jax.hapg(0.02, None), {"w": True, "b": False}),
}


def pruned(dtype=jnp.float32):
    """Parameters with a column and an entry of zeros in w, and none elsewhere; the loss; which entries are nonzero."""
    params, loss = regression(dtype)
    params = {"w": params["w"].at[:, 3].set(0).at[1, 1].set(0), "b": params["b"] + 0.1}
    return params, loss, jax.tree.map(lambda x: x != 0, params)


def frozen_everywhere(tree, kept):
    return all((np.asarray(x)[~np.asarray(k)] == 0).all() for x, k in zip(jax.tree.leaves(tree), jax.tree.leaves(kept)))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_stay_and_the_rest_is_trained_as_if_they_had_been_removed(name):
    params, loss, kept = pruned()
    inner = OPTIMIZERS[name]()
    found, state = train(proxopt_jax.freeze_zeros(inner), params, loss, 12)
    removed = lambda p: loss(jax.tree.map(jnp.multiply, p, kept))
    expected, inner_state = train(inner, params, removed, 12)
    same(found, expected, rtol=1e-5, atol=1e-6)
    same(state.inner_state, inner_state, rtol=1e-4, atol=1e-6)
    point = proxopt_jax.prox_point(state, found)
    assert frozen_everywhere((found, point), (kept, kept))
    assert zeros(found) == zeros(point) == 7, "every other entry is nonzero"


def test_a_training_with_a_penalty_continues_without_it():
    params, loss = regression()
    make = proxopt_jax.hapg
    params, old = train(make(0.02, RULES), params, loss, 100)
    point = proxopt_jax.prox_point(old, params)
    kept = jax.tree.map(lambda x: x != 0, point)
    assert 0 < zeros(point) < 24
    tx = proxopt_jax.freeze_zeros(make(0.02, None))
    state = tx.init(point)._replace(inner_state=old)
    new, after = train(optax.GradientTransformation(lambda _: state, tx.update), params, loss, 5)
    assert frozen_everywhere((new, proxopt_jax.prox_point(after, new)), (kept, kept)) and zeros(new) == zeros(point)
    assert int(after.inner_state.count) == 105
    assert loss(new) < loss(point), "the remaining entries have lost the bias towards zero"
    updates, _ = make(0.02, None).update(jax.grad(loss)(new), after.inner_state, new)
    assert zeros(optax.apply_updates(new, updates)) == 0, "the inner optimizer and its state go on without frozen zeros"


def one_step(tx, params, loss):
    updates, state = tx.update(jax.grad(loss)(params), tx.init(params), params)
    return optax.apply_updates(params, updates), state


@pytest.mark.parametrize(
    ("where", "frozen"),
    [
        (None, {"w", "b", "c"}),
        ("w", {"w"}),
        (["b", "[cd]"], {"b", "c"}),
        (RULES, {"w"}),
        ({"w": None, "b": COLUMNS, "c": None, "n": None}, {"b"}),
    ],
)
def test_where_selects_the_leaves_whose_zeros_stay(where, frozen):
    half = jnp.array([1.0, 0.0])
    params = {"w": half, "b": half, "c": half.astype(jnp.bfloat16), "n": None}
    tx = proxopt_jax.freeze_zeros(optax.sgd(0.1), where)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    new = optax.apply_updates(params, updates)
    assert {name for name in "wbc" if new[name][1] == 0} == frozen
    assert all(new[name][0] != 1 and new[name].dtype == params[name].dtype for name in "wbc")


def test_leaves_that_are_not_floating_point_are_never_selected():
    params = {"w": jnp.array([1.0, 0.0]), "n": jnp.zeros(2, jnp.int32), "key": jax.random.key(0)}
    tx = proxopt_jax.freeze_zeros(optax.masked(optax.sgd(0.1), {"w": True, "n": False, "key": False}))
    grads = {"w": jnp.ones(2), "n": jnp.ones(2, jnp.int32), "key": None}
    updates, _ = tx.update(grads, tx.init(params), params)
    assert updates["w"][1] == 0 and (updates["n"] == 1).all() and updates["key"] is None


def test_a_leaf_of_zeros_warns_unless_where_selects_it(recwarn):
    params = {"w": jnp.array([1.0, 0.0]), "b": jnp.zeros(2)}
    with pytest.warns(UserWarning, match="params hold only zeros in the leaves 'b', and all of them stay zero"):
        proxopt_jax.freeze_zeros(optax.sgd(0.1)).init(params)
    for where in ("w", ["b", "w"]):
        proxopt_jax.freeze_zeros(optax.sgd(0.1), where).init(params)
    jax.eval_shape(proxopt_jax.freeze_zeros(optax.sgd(0.1)).init, params)
    assert not [w for w in recwarn if "only zeros" in str(w.message)]


def test_gradients_at_frozen_zeros_do_not_count_even_if_they_are_not_finite():
    params = jnp.array([1.0, 0.0])
    tx = proxopt_jax.freeze_zeros(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0)))
    updates, _ = tx.update(jnp.array([0.5, jnp.nan]), tx.init(params), params)
    same(updates, jnp.array([-0.5, 0.0]))


WRAPPED = {
    "multi steps": (lambda tx: optax.MultiSteps(tx, 2), 2),
    "masked": (lambda tx: optax.masked(tx, {"w": True, "b": False}), 1),
    "partition": (lambda tx: optax.partition({"a": tx, "b": optax.sgd(0.1)}, {"w": "a", "b": "b"}), 1),
    "projected": (lambda tx: proxopt_jax.projected(tx, [("w", Sphere(Groups.along(0)))]), 1),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_inside_wrappers(name):
    params, loss, kept = pruned()
    wrap, every = WRAPPED[name]
    tx = wrap(proxopt_jax.freeze_zeros(proxopt_jax.hapg(0.02, None)))
    new, state = train(tx, params, loss, 4 * every)
    assert frozen_everywhere((new, proxopt_jax.prox_point(state, new)), (kept, kept))
    assert zeros(new) == 7 and (new["w"] != params["w"]).sum() == 17 and (new["b"] != params["b"]).all()


def test_around_multi_steps_and_injected_numbers_that_change_later():
    params, loss, kept = pruned()
    inner = optax.MultiSteps(optax.inject_hyperparams(optax.adam)(0.02), 2)
    tx = proxopt_jax.freeze_zeros(inner)
    state, grads = tx.init(params), jax.grad(loss)(params)
    _, state = tx.update(grads, state, params)
    state.inner_state.inner_opt_state.hyperparams["learning_rate"] = jnp.asarray(1.0)
    updates, _ = tx.update(grads, state, params)
    assert frozen_everywhere(updates, kept) and np.allclose(np.abs(updates["b"]), 1, rtol=1e-3)
    injected = optax.inject_hyperparams(lambda learning_rate: proxopt_jax.freeze_zeros(optax.adam(learning_rate)))(1.0)
    same(one_step(injected, params, loss)[0], one_step(proxopt_jax.freeze_zeros(optax.adam(1.0)), params, loss)[0], rtol=1e-6)


def test_vmap_over_networks_keeps_the_zeros_of_each():
    tx = proxopt_jax.freeze_zeros(optax.adam(0.1))
    starts = jnp.array([[1.0, 0.0, 2.0], [0.0, 0.0, 1.0]])
    found = jax.jit(jax.vmap(lambda x: train(tx, x, lambda x: jnp.sum((x - 3) ** 2), 3)[0]))(starts)
    np.testing.assert_array_equal(found == 0, starts == 0)


def test_the_penalty_of_the_inner_optimizer_still_applies_and_may_zero_more():
    params, loss, kept = pruned()
    tx = proxopt_jax.freeze_zeros(proxopt_jax.proximal(optax.adam(0.05), [("w", GroupL2(50.0, Groups.along(0)))]))
    new, _ = train(tx, params, loss, 20)
    assert frozen_everywhere(new, kept) and zeros(new["w"]) == 24


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.complex64], ids=lambda d: d.__name__)
def test_dtypes_and_the_structure_of_the_state_stay(dtype):
    params = {"w": jnp.array([[0.5, 0.0], [-1.0, 2.0]], dtype)}
    tx = proxopt_jax.freeze_zeros(proxopt_jax.hapg(0.1, None))
    state = tx.init(params)
    updates, after = tx.update(params, state, params)
    new = optax.apply_updates(params, updates)["w"]
    assert new.dtype == dtype and ((new == 0) == (params["w"] == 0)).all()
    spec = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert spec(after) == spec(state) == spec(tx.init(jax.eval_shape(lambda: params)))


def test_a_gradient_in_a_narrower_dtype_leaves_exact_zeros():
    params = jnp.array([0.1, 1.0])
    tx = proxopt_jax.freeze_zeros(optax.identity())
    state = tx.init(jnp.array([0.0, 1.0]))  # params are at a search point
    updates, _ = tx.update(jnp.ones(2, jnp.bfloat16), state, params)
    same(optax.apply_updates(params, updates), jnp.array([0.0, 2.0]))


@pytest.mark.parametrize("how", ["pickle", "orbax"])
def test_a_checkpoint_resumes_bit_for_bit(how, tmp_path):
    params, loss, kept = pruned()
    tx = proxopt_jax.freeze_zeros(proxopt_jax.adam_hapg(0.02, None))
    step = jax.jit(lambda p, s: tx.update(jax.grad(loss)(p), s, p))
    updates, state = step(params, tx.init(params))
    params = optax.apply_updates(params, updates)
    if how == "pickle":
        loaded = pickle.loads(pickle.dumps({"params": params, "state": state}))
    else:
        ocp = pytest.importorskip("orbax.checkpoint")
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "one", {"params": params, "state": state})
            checkpointer.wait_until_finished()
            empty = jax.tree.map(jnp.zeros_like, {"params": params, "state": state})
            loaded = checkpointer.restore(tmp_path / "one", empty)
    same(loaded["state"], state)
    same(step(loaded["params"], loaded["state"]), step(params, state))
    assert frozen_everywhere(params, kept)


def test_optax_finds_the_parameters_and_the_zeros_in_the_state():
    params, _, kept = pruned()
    tx = proxopt_jax.freeze_zeros(optax.adam(0.1), "w")
    state = tx.init(params)
    same(optax.tree.get(state, "zeros"), {"w": ~kept["w"], "b": jnp.zeros(4, bool)})
    spec = optax.tree.map_params(tx, lambda x, p: (x.shape, p.shape), state, params)
    assert spec.zeros == spec.inner_state[0].mu == {"w": ((6, 4), (6, 4)), "b": ((4,), (4,))}


def test_the_prox_point_is_refused_where_an_average_undoes_the_zeros():
    params, _, _ = pruned()
    tx = proxopt_jax.freeze_zeros(optax.adam(0.1))
    same(proxopt_jax.prox_point(tx.init(params), params), params)
    for wrapped in (optax.contrib.mechanize(tx), optax.chain(tx, optax.ema(0.9))):
        with pytest.raises(ValueError, match="undoes the zeros"):
            proxopt_jax.prox_point(wrapped.init(params), params)


@pytest.mark.parametrize(
    ("where", "error", "message"),
    [
        (3, TypeError, "where must be a path pattern, a list of path patterns, the argument penalty .*, got 3"),
        (["w", 3], TypeError, r"where must be .*, got \['w', 3\]"),
        ("z", ValueError, "where pattern must decide at least one leaf, got 'z'"),
        ([], ValueError, "where must be a tree with the structure of params"),
    ],
)
def test_errors_name_the_argument(where, error, message):
    with pytest.raises(error, match=message):
        proxopt_jax.freeze_zeros(optax.sgd(0.1), where).init({"w": jnp.ones(3)})


def test_the_inner_optimizer_and_params_are_needed():
    with pytest.raises(TypeError, match="inner must be an optax optimizer, got str"):
        proxopt_jax.freeze_zeros("w")
    tx = proxopt_jax.freeze_zeros(optax.sgd(0.1))
    with pytest.raises(ValueError, match="you are not passing `params`"):
        tx.update(jnp.ones(3), tx.init(jnp.ones(3)))
