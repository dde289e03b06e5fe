"""With orbax, flax nnx and equinox; and what is said where JAX is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax_cases import MAIN, RULES, regression, same, train, zeros

import proxopt_jax
from proxopt import L1, Groups, SparseGroupLasso

INPUTS = jnp.asarray(np.random.default_rng(0).normal(size=(1024, 8)), jnp.float32)
CLASSES = (INPUTS[:, 0] + INPUTS[:, 1] > 0).astype(jnp.int32)


@pytest.mark.commands
@pytest.mark.parametrize("case", MAIN, ids=lambda c: c.name)
def test_a_checkpoint_resumes_bit_for_bit(case, tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    params, loss = regression()
    tx = case.make(case.rate, RULES)
    params, state = train(tx, params, loss, 20)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "at20", {"params": params, "state": state})
        checkpointer.wait_until_finished()
        fresh = {"params": jax.tree.map(jnp.zeros_like, params), "state": tx.init(params)}
        loaded = checkpointer.restore(tmp_path / "at20", fresh)
    same(loaded["state"], state)
    same(proxopt_jax.prox_point(loaded["state"], loaded["params"]), proxopt_jax.prox_point(state, params))
    step = jax.jit(lambda p, s: tx.update(jax.grad(loss)(p), s, p))
    same(step(loaded["params"], loaded["state"]), step(params, state))


def test_a_flax_nnx_model_trains_to_fewer_inputs_and_its_prox_point_goes_back_into_the_model():
    nnx = pytest.importorskip("flax.nnx")

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.hidden = nnx.Linear(8, 16, rngs=rngs)
            self.out = nnx.Linear(16, 2, rngs=rngs)

        def __call__(self, x):
            return self.out(nnx.relu(self.hidden(x)))

    def loss(net):
        return optax.softmax_cross_entropy_with_integer_labels(net(INPUTS), CLASSES).mean()

    @nnx.jit
    def step(net, optimizer):
        value, grads = nnx.value_and_grad(loss)(net)
        optimizer.update(net, grads)
        return value

    net = Net(nnx.Rngs(0))
    inputs = SparseGroupLasso(0.05, groups=Groups.along(1))
    optimizer = nnx.Optimizer(net, proxopt_jax.adam_hapg(1e-2, [("hidden/kernel*", inputs)]), wrt=nnx.Param)
    first = float(loss(net))
    for _ in range(200):
        step(net, optimizer)
    nnx.update(net, proxopt_jax.prox_point(optimizer.opt_state, nnx.state(net, nnx.Param)))
    assert float(loss(net)) < 0.8 * first
    living = np.any(np.asarray(net.hidden.kernel[...]), axis=1)
    np.testing.assert_array_equal(living, np.arange(8) < 2)


@pytest.mark.parametrize("pattern", ["l/0/kernel", "*/kernel", "l/*/kernel", "l/0/kernel*", "l/0/kernel/value"])
def test_patterns_name_the_parameters_of_nnx_as_its_users_do(pattern):
    nnx = pytest.importorskip("flax.nnx")

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.l = getattr(nnx, "List", list)([nnx.Linear(3, 2, rngs=rngs)])  # flax 0.11 has lists of Python only

    net = Net(nnx.Rngs(0))
    for params in (nnx.state(net, nnx.Param), net):
        tx = proxopt_jax.proximal([(pattern, L1(1e6))], learning_rate=1.0)
        updates, _ = tx.update(optax.tree.zeros_like(params), tx.init(params), params)
        assert zeros(optax.apply_updates(params, updates)) == 6 + 2  # the bias is 0 from the start
        with pytest.raises(ValueError, match="leaves: 'l/0/bias', 'l/0/kernel'"):
            proxopt_jax.proximal([("l/1/kernel", L1(1.0))], learning_rate=1.0).init(params)


def test_an_equinox_model_trains_to_fewer_inputs():
    eqx = pytest.importorskip("equinox")
    net = eqx.nn.MLP(8, 2, 16, 1, key=jax.random.key(0))

    @eqx.filter_value_and_grad
    def loss(net):
        return optax.softmax_cross_entropy_with_integer_labels(jax.vmap(net)(INPUTS), CLASSES).mean()

    inputs = SparseGroupLasso(0.02, groups=Groups.along(0))
    tx = optax.chain(optax.clip_by_global_norm(1.0), proxopt_jax.prox_adam(1e-2, [("layers/0/weight", inputs)]))

    @eqx.filter_jit
    def step(net, state):
        value, grads = loss(net)
        updates, state = tx.update(grads, state, eqx.filter(net, eqx.is_inexact_array))
        return eqx.apply_updates(net, updates), state, value

    state = tx.init(eqx.filter(net, eqx.is_inexact_array))
    first = float(loss(net)[0])
    for _ in range(400):
        net, state, _ = step(net, state)
    assert float(loss(net)[0]) < 0.8 * first
    living = np.any(np.asarray(net.layers[0].weight), axis=0)
    np.testing.assert_array_equal(living, np.arange(8) < 2)


@pytest.mark.parametrize("missing", ["jax", "jaxlib", "optax"])
def test_a_missing_framework_is_an_import_error_that_says_what_to_install(missing):
    code = f"""
import sys
sys.modules[{missing!r}] = None
try:
    import proxopt_jax
except ImportError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120
    )
    assert 'pip install "proxopt[jax]"' in done.stdout, done.stderr


def test_an_import_error_inside_the_package_is_not_taken_for_a_missing_framework():
    code = """
import sys
sys.modules["proxopt_jax.trees"] = None
try:
    import proxopt_jax
except ImportError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120
    )
    assert "proxopt_jax.trees" in done.stdout
    assert "pip install" not in done.stdout
