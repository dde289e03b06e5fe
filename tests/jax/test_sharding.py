"""On a mesh of eight devices, groups that cross shards give the unsharded result, in automatic and in explicit mode."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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


def test_groups_that_cross_shards_give_the_unsharded_result():
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "all 6 agree" in done.stdout
