"""Steps in JAX beside optax.adam, and their time to compile: python benchmarks/optimizer_step.py --framework jax

A step is one jitted function with ``optax.apply_updates``. It receives the gradients as arguments; parameters and state are
donated to it. The last links and the optimizers have the sparse group lasso on the rows (output channels) of the weights of
ResNet-18, and of each of many leaves of shape (4, 2).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import timings

BASELINE = "optax.adam"
RATE, STRENGTH = 1e-3, 1e-4


def on_one_thread(device: str) -> None:
    """Confine this process to one core, different processes to different ones. XLA reads the number of cores when it starts."""
    if device == "cpu" and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[os.getpid() % len(cores)]})


def backend() -> str:
    """The platform on which JAX computes: cpu, gpu or tpu."""
    import jax

    return jax.default_backend()


def device_name() -> str:
    """The kind of the first device of JAX."""
    import jax

    return jax.devices()[0].device_kind


def optimizers(params: list[Any]) -> dict[str, Callable[[], Any]]:
    """The transformations by name. Leaves with one axis have no penalty."""
    import jax
    import optax

    import proxopt_jax
    from proxopt import Groups, SparseGroupLasso

    def rows(metric: str | None = None) -> Any:
        penalties = {
            ndim: SparseGroupLasso(STRENGTH, groups=Groups.along(tuple(range(1, ndim))), metric=metric) for ndim in (2, 3, 4)
        }
        return jax.tree.map(lambda x: penalties.get(x.ndim), params)

    return {
        BASELINE: lambda: optax.adam(RATE),
        "chain(adam, link)": lambda: optax.chain(optax.adam(RATE), proxopt_jax.proximal(rows(), learning_rate=RATE)),
        "proximal(adam)": lambda: proxopt_jax.proximal(optax.adam(RATE), rows(), learning_rate=RATE),
        "hapg": lambda: proxopt_jax.hapg(RATE, rows()),
        "prox_sgd": lambda: proxopt_jax.prox_sgd(RATE, rows()),
        "prox_adam, metric=support": lambda: proxopt_jax.prox_adam(RATE, rows("support")),
        "prox_adam (exact)": lambda: proxopt_jax.prox_adam(RATE, rows()),
        "adam_hapg, metric=support": lambda: proxopt_jax.adam_hapg(RATE, rows("support")),
        "adam_hapg (median)": lambda: proxopt_jax.adam_hapg(RATE, rows()),
        "adam_hapg, metric=exact": lambda: proxopt_jax.adam_hapg(RATE, rows("exact")),
    }


class Step:
    """A compiled step with its parameters and state."""

    def __init__(self, transformation: Any, params: list[Any], grads: list[Any]) -> None:
        import jax
        import jax.numpy as jnp
        import optax

        def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
            updates, state = transformation.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        self.wait, self.grads = jax.block_until_ready, grads
        self.held = (jax.tree.map(jnp.copy, params), transformation.init(params))
        start = time.perf_counter()
        self.compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*self.held, grads).compile()
        self.compile_seconds = time.perf_counter() - start
        memory = self.compiled.memory_analysis()
        self.temporary_mib = memory.temp_size_in_bytes / 2**20 if memory else float("nan")

    def run(self) -> None:
        """Take one step and wait for it."""
        self.held = self.compiled(*self.held, self.grads)
        self.wait(self.held)


def measure(shapes: list[tuple[int, ...]], names: list[str], rounds: int, device: str) -> list[dict]:
    """One row for each transformation: time of a step and of compilation, as ratios to those of Adam, and temporary memory."""
    import jax.numpy as jnp
    import numpy as np

    rng = np.random.default_rng(0)
    params, grads = ([jnp.asarray(scale * rng.normal(size=s), jnp.float32) for s in shapes] for scale in (0.05, 0.01))
    made = optimizers(params)
    steps = {name: Step(made[name](), params, grads) for name in names}
    clock = time.process_time if device == "cpu" else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 2):
        for name, step in steps.items():
            start = clock()
            step.run()
            if turn >= 2:
                times[name].append(clock() - start)
    compile_base = steps[BASELINE].compile_seconds
    return [
        {
            **timings.summary(name, times[name], times[BASELINE], device),
            "temporary_mib": step.temporary_mib,
            "compile_s": step.compile_seconds,
            "compile_ratio": step.compile_seconds / compile_base,
        }
        for name, step in steps.items()
    ]


def measured(shapes: list[tuple[int, ...]], small: list[int], only: list[str], rounds: int, device: str) -> list[dict]:
    """The rows of all models, printed as they come."""
    import jax

    rows = []
    for model, leaves in {"ResNet-18": shapes, **{f"{n} leaves of (4, 2)": [(4, 2)] * n for n in small}}.items():
        names = [n for n in optimizers([]) if n == BASELINE or not only or any(o in n for o in only)]
        print(f"\n{model}, jax {jax.__version__} on {jax.default_backend()}")
        print(f"{'optimizer':28} {'ms':>8} {'/ Adam':>7}   range         temporary MiB  compile s  / Adam")
        for row in measure(leaves, names, rounds, device):
            rows.append({"model": model, **row})
            print(
                f"{row['optimizer']:28} {row[f'{device}_ms']:8.2f} {row['ratio']:7.2f}   {row['ratio_min']:5.2f} - "
                f"{row['ratio_max']:5.2f} {row['temporary_mib']:14.1f} {row['compile_s']:10.2f} {row['compile_ratio']:7.2f}",
                flush=True,
            )
    return rows
