"""On a mesh of eight devices, groups that cross shards give the unsharded result, in automatic and in explicit mode."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import jax, jax.numpy as jnp, numpy as np, optax, proxopt_jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from proxopt import GroupL2, Groups, SparseGroupLasso

rng = np.random.default_rng(0)
params = {"w": jnp.asarray(rng.normal(size=(16, 8)), jnp.float32), "b": jnp.asarray(rng.normal(size=8), jnp.float32)}
params["w"] = params["w"].at[:, 4:].multiply(0.1)
grads = jax.tree.map(lambda a: 0.1 * a, params)
columns = [("w", SparseGroupLasso(0.3, groups=Groups.along(0)))]
rows = [("w", GroupL2(0.9, Groups.labels([k % 3 for k in range(16)])))]
units = proxopt_jax.tree_labels({"b": [k // 2 for k in range(8)], "w": [k // 2 for k in range(8)]}, {"b": 0, "w": 1})
transformations = {
    "hapg, columns": proxopt_jax.hapg(0.3, columns),
    "prox_adam, units": proxopt_jax.prox_adam(0.3, GroupL2(0.1, units), joint=True),
    "prox_sgd, rows": proxopt_jax.prox_sgd(0.3, rows, tau=2.0),
    "proximal adam": proxopt_jax.proximal(optax.adam(0.3), columns),
    "link": optax.chain(optax.sgd(0.3), proxopt_jax.sgl(0.3, groups=Groups.along(-1), learning_rate=0.3)),
    "adam_hapg, schedules": proxopt_jax.adam_hapg(optax.linear_schedule(0.3, 0.2, 3), columns, strength=lambda t: 0.3 * t),
}

def run(tx, p, g):
    state = tx.init(p)
    for _ in range(2):
        u, state = tx.update(g, state, p)
        p = optax.apply_updates(p, u)
    return p, proxopt_jax.prox_point(state, p)

assert jax.device_count() == 8
for name, tx in transformations.items():
    step = jax.jit(lambda p, g: run(tx, p, g))
    expected = step(params, grads)
    assert any((np.asarray(x) == 0).any() for x in jax.tree.leaves(expected)), name
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((4, 2), ("r", "c"), axis_types=(kind, kind))
        shards = {"w": NamedSharding(mesh, P("r", "c")), "b": NamedSharding(mesh, P("r"))}
        found = step(jax.device_put(params, shards), jax.device_put(grads, shards))
        assert found[0]["w"].sharding.spec == P("r", "c"), (name, found[0]["w"].sharding)
        for x, y in zip(jax.tree.leaves(expected), jax.tree.leaves(found)):
            np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=1e-5, atol=1e-6, err_msg=name)
            np.testing.assert_array_equal(np.asarray(x) == 0, np.asarray(y) == 0, err_msg=name)
print("all", len(transformations), "agree")
"""


SET_MESH = """
import jax, jax.numpy as jnp, numpy as np, optax, proxopt_jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from proxopt import L1, GroupL2, Groups, SparseGroupLasso

COLUMNS = SparseGroupLasso(0.3, groups=Groups.along(-1))
DECAY = optax.linear_schedule(0.3, 0.2, 3)
INJECTED = {"strength": 0.3, "weight_decay": 0.1}
transformations = {
    "prox_sgd": lambda: proxopt_jax.prox_sgd(0.3, COLUMNS, tau=2.0),
    "adam_hapg, schedules": lambda: proxopt_jax.adam_hapg(DECAY, COLUMNS, strength=lambda t: 0.3 * t),
    "proximal adam, schedule": lambda: proxopt_jax.proximal(optax.adam(0.3), COLUMNS, strength=lambda t: 0.3 * t),
    "injected": lambda: optax.inject_hyperparams(proxopt_jax.prox_adam)(0.3, COLUMNS, **INJECTED),
    "link, schedule": lambda: optax.chain(optax.sgd(DECAY), proxopt_jax.sgl(lambda t: 0.3 * t, learning_rate=DECAY)),
    "array strength": lambda: proxopt_jax.hapg(0.3, L1(jnp.linspace(0, 1, 4))),
    "freeze_zeros": lambda: proxopt_jax.freeze_zeros(proxopt_jax.hapg(0.3, None)),
    "labels": lambda: proxopt_jax.prox_adam(0.3, GroupL2(0.3, Groups.labels([k % 3 for k in range(8)], axis=1))),
}
types = lambda tree: jax.tree.map(jax.typeof, tree)
set_mesh = getattr(jax, "set_mesh", None) or jax.sharding.use_mesh  # its name before JAX 0.8
if not hasattr(jax, "set_mesh"):
    del transformations["labels"]  # JAX 0.7 has no sharding rule for scatter_max
start = np.random.default_rng(0).normal(size=(2, 8, 4)).astype(np.float32)


def two_steps(tx, p):
    state = tx.init(p)
    for _ in range(2):
        u, state = tx.update(0.1 * p, state, p)
        p = optax.apply_updates(p, u)
    return p, proxopt_jax.prox_point(state, p)


assert jax.device_count() == 8
mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
for name, make in transformations.items():
    expected = jax.jit(lambda p: two_steps(make(), p))(jnp.asarray(start))
    with set_mesh(mesh):
        p, tx = jax.device_put(start, NamedSharding(mesh, P(None, "x"))), make()
        found = jax.jit(lambda p: two_steps(tx, p))(p)
        for x, y in zip(expected, found):
            np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=1e-5, atol=1e-6, err_msg=name)
        assert types(found[0]) == types(p), (name, found[0].sharding)
        half = p.astype(jnp.float16)
        state = tx.init(half)
        assert types(state) == types(jax.jit(tx.init)(half)), name
        jitted = jax.jit(tx.update)(half, state, half)
        assert types(jitted[1]) == types(state), name
        if name in ("prox_sgd", "link, schedule"):  # the others would compile many operations one by one
            assert types(tx.update(half, state, half)) == types(jitted), name
print("all agree")
"""


SHARD_MAP = """
import jax, jax.numpy as jnp, numpy as np, optax, proxopt_jax
from jax.sharding import PartitionSpec as P
from proxopt import L1, GroupL2, Groups

mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(16, 3)), jnp.float32)}


def one_step(tx, spec, **options):
    step = lambda p: optax.apply_updates(p, tx.update(jax.tree.map(lambda a: 0.1 * a, p), tx.init(p), p)[0])
    return jax.jit(jax.shard_map(step, mesh=mesh, in_specs=spec, out_specs=spec, **options))(params), step(params)


for make in (proxopt_jax.prox_adam, proxopt_jax.hapg, lambda lr, p: proxopt_jax.proximal(optax.sgd(lr), p, lr)):
    for penalty, spec, options in (
        (L1(0.5), P("x"), {}),  # entries need no neighbours
        (GroupL2(0.5, Groups.along(0)), P(), {}),  # the same parameters everywhere, as in data parallel training
        (GroupL2(0.5, Groups.along(1)), P("x"), {"check_vma": False}),  # every group in one shard
    ):
        found, expected = one_step(make(0.3, penalty), spec, **options)
        np.testing.assert_allclose(found["w"], expected["w"], rtol=1e-5, atol=1e-6)
    try:
        one_step(make(0.3, GroupL2(0.5, Groups.along(0))), P("x"))
    except ValueError as error:
        assert "params leaf 'w' varies over the axis 'x' of a shard_map" in str(error), error
    else:
        raise AssertionError("a group across shards was not refused")
print("all agree")
"""


@pytest.mark.commands
def test_in_a_shard_map_groups_across_shards_are_refused():
    assert "all agree" in on_eight_devices(SHARD_MAP)


@pytest.mark.commands
def test_under_set_mesh_with_explicit_axes_everything_is_as_without_and_keeps_its_sharding():
    assert "all agree" in on_eight_devices(SET_MESH)


@pytest.mark.commands
def test_groups_that_cross_shards_give_the_unsharded_result():
    assert "all 6 agree" in on_eight_devices(SCRIPT)


def on_eight_devices(script: str) -> str:
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
