"""What a strength means in `proximal(adam, ...)` and in `chain(optimizer, link)`: zeros and accuracy on the digits.

    python benchmarks/link_strength.py         # a few minutes of CPU time; writes benchmarks/results/link_strength.csv

A network 64-40-20-10 learns scikit-learn's 8x8 digits in batches of 64 under a sparse group lasso on its weights, in which the
outgoing weights of a pixel or neuron are a group. All strengths and seeds of an optimizer are one jitted program. The tables
show the zeros among the weights and the test accuracy, mean and standard deviation over the seeds. `max_strength` is that of
the first update of the optimizer.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import proxopt_jax
from proxopt import Groups, SparseGroupLasso

WIDTHS = (64, 40, 20, 10)
BATCH = 64
OUTGOING = SparseGroupLasso(0.0, groups=Groups.along(1))
RULES = [("*/w", OUTGOING)]
IN_METRIC = (2e-5, 2e-4, 2e-3, 1e-2)
IN_GRADIENTS = (2e-4, 2e-3, 5e-3, 1e-2, 2e-2)
IN_STEPS = (2e-4, 2e-3, 0.02, 0.1, 0.2, 0.5)
IN_SIGNS = (2e-3, 0.1, 0.5, 0.7, 0.9, 1.1)
Params = list[dict[str, jax.Array]]


def linked(base: Any, rate: float) -> Callable[[Any], Any]:
    """A chain of an optimizer and the penalty as last link, for a strength."""
    return lambda strength: optax.chain(base, proxopt_jax.proximal(RULES, learning_rate=rate, strength=strength))


LION = optax.lion(1e-3, weight_decay=0.0)
CURVES = {
    "proximal(adam(1e-3), ...)": (
        optax.adam(1e-3),
        1e-3,
        lambda s: proxopt_jax.proximal(optax.adam(1e-3), RULES, strength=s),
        IN_METRIC,
    ),
    "chain(sgd(0.1), link)": (optax.sgd(0.1), 0.1, linked(optax.sgd(0.1), 0.1), IN_GRADIENTS),
    "chain(adam(1e-3), link)": (optax.adam(1e-3), 1e-3, linked(optax.adam(1e-3), 1e-3), IN_STEPS),
    "chain(lion(1e-3), link)": (LION, 1e-3, linked(LION, 1e-3), IN_SIGNS),
}


def initial(key: jax.Array) -> Params:
    keys = jax.random.split(key, len(WIDTHS) - 1)
    make = jax.nn.initializers.he_normal()
    return [{"w": make(k, (a, b)), "b": jnp.zeros(b)} for k, a, b in zip(keys, WIDTHS, WIDTHS[1:])]


def logits(params: Params, x: jax.Array) -> jax.Array:
    *hidden, last = params
    for layer in hidden:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ last["w"] + last["b"]


def loss(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y).mean()


def train(make: Callable[[Any], Any], strength: jax.Array, key: jax.Array, data: tuple, epochs: int) -> Params:
    x, y = data
    tx = make(strength)

    def step(carry: tuple, batch: jax.Array) -> tuple:
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params, x[batch], y[batch]), state, params)
        return (optax.apply_updates(params, updates), state), None

    def epoch(carry: tuple, key: jax.Array) -> tuple:
        order = jax.random.permutation(key, len(x))[: len(x) // BATCH * BATCH]
        return jax.lax.scan(step, carry, order.reshape(-1, BATCH))

    start, shuffle = jax.random.split(key)
    params = initial(start)
    return jax.lax.scan(epoch, (params, tx.init(params)), jax.random.split(shuffle, epochs))[0][0]


def largest_strength(base: Any, rate: float, data: tuple) -> float:
    """`max_strength` of the first update of an optimizer."""
    params = initial(jax.random.key(0))
    x, y = data
    updates, _ = base.update(jax.grad(loss)(params, x[:BATCH], y[:BATCH]), base.init(params), params)
    return proxopt_jax.max_strength(updates, RULES, learning_rate=rate)


def main(out: Path = Path("benchmarks/results/link_strength.csv"), epochs: int = 150, seeds: int = 3) -> None:
    """Measure and print.

    Args:
      out: the table, as CSV.
      epochs: of each training.
      seeds: initial weights and orders of the data.
    """
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images.astype(np.float32) / 16, labels, test_size=0.3, random_state=0, stratify=labels)
    x, x_test, y, y_test = map(jnp.asarray, split)
    keys = jax.vmap(jax.random.key)(jnp.arange(seeds))
    rows: list[dict[str, Any]] = []
    for name, (base, rate, make, strengths) in CURVES.items():
        one = lambda s, key, make=make: train(make, s, key, (x, y), epochs)
        over = jax.vmap(jax.vmap(one, (None, 0)), (0, None))
        params = jax.jit(over)(jnp.asarray(strengths), keys)
        evaluate = lambda p: (logits(p, x_test).argmax(-1) == y_test).mean()
        accuracy = 100 * np.asarray(jax.vmap(jax.vmap(evaluate))(params))
        weights = [np.asarray(layer["w"]) for layer in params]
        total = sum(w[0, 0].size for w in weights)
        zeros = 100 * sum((w == 0).sum((-1, -2)) for w in weights) / total
        largest = None if name.startswith("proximal") else largest_strength(base, rate, (x, y))
        print(f"\n{name}" + ("" if largest is None else f", max_strength of its first update {largest:.3g}"))
        print("| strength | " + " | ".join(f"{s:g}" for s in strengths) + " |")
        print("| --- |" + " --- |" * len(strengths))
        for kind, found in (("zero weights %", zeros), ("accuracy %", accuracy)):
            print(f"| {kind} | " + " | ".join(f"{v.mean():.1f} ± {v.std():.1f}" for v in found) + " |", flush=True)
        rows += [
            {
                "optimizer": name,
                "strength": s,
                "seed": seed,
                "zero_weights_percent": zeros[i, seed],
                "accuracy_percent": accuracy[i, seed],
                "max_strength": largest,
            }
            for i, s in enumerate(strengths)
            for seed in range(seeds)
        ]
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    tyro.cli(main)
