"""The two trainings of the DIGITS ablation in JAX.

A training is one jitted program over one network, mapped with `vmap` over strengths and seeds, which runs a stretch of epochs in
a scan. Data, order of batches and start are those of the trainings in torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import proxopt_jax
from digits import problem, stages
from digits.problem import LAYERS, Arrays, Curve, Data, Settings

STRETCH = 25  # epochs a call, so that progress shows


def transformation(curve: Curve, strength: Any, settings: Settings, steps: int) -> Any:
    """The optimizer of a curve for one network; `steps` are those of an epoch."""
    if curve.method == "adam":
        return optax.adam(3e-4, 0.5, 0.999)
    cosine = lambda count: (1 + jnp.cos(jnp.pi * (count // steps) / settings.epochs)) / 2  # a step down each epoch
    if curve.method == "sgd":
        return optax.sgd(lambda count: 0.025 * cosine(count), momentum=0.9)
    penalty = [("weight*", curve.build(strength))]
    if curve.method == "hapg":
        return proxopt_jax.hapg(lambda count: 0.05 * cosine(count), penalty, extrapolation="nesterov")
    if curve.method == "adamhapg":
        return proxopt_jax.adam_hapg(3e-4, penalty, 0.5, 0.999, extrapolation="nesterov")
    return proxopt_jax.prox_adam(3e-4, penalty, 0.5, 0.999)


def logits(params: dict, x: jax.Array) -> jax.Array:
    for i in LAYERS:
        x = x @ params[f"weight{i}"].T + params[f"bias{i}"]
        x = jax.nn.leaky_relu(x, 0.01) if i < LAYERS[-1] else x
    return x


def stretch(
    make: Callable[[Any], Any],
    extra: Callable[[Any, dict], Any] | None,
    batch: int,
    carry: Any,
    strength: Any,
    mask: Any,
    data: Any,
) -> Any:
    """One network through the epochs whose orders are in `data`: its next parameters and optimizer state."""
    x, y, orders = data
    tx = make(strength)

    def loss(params: dict, part: jax.Array) -> jax.Array:
        fit = optax.softmax_cross_entropy_with_integer_labels(logits(params, x[part]), y[part]).mean()
        return fit if extra is None else fit + extra(strength, params)

    def step(carry: Any, part: jax.Array) -> Any:
        params, state = carry
        grads = jax.grad(loss)(params, part)
        grads = {k: g * mask[k] if mask and k in mask else g for k, g in grads.items()}
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    def epoch(carry: Any, order: jax.Array) -> Any:
        whole = len(order) // batch * batch
        carry, _ = jax.lax.scan(step, carry, order[:whole].reshape(-1, batch))
        return (step(carry, order[whole:]) if whole < len(order) else (carry, None))[0], None

    return jax.lax.scan(epoch, carry, orders)[0]


class Trainer:
    """All networks of one training: parameters and optimizer states are (seeds, nets, ...)."""

    def __init__(self, params: dict, strengths: Any, data: Data, make: Any, extra: Any = None, mask: dict | None = None) -> None:
        self.data, self.strengths, self.mask = data, jnp.asarray(strengths), mask
        self.x = jnp.asarray(data.images.swapaxes(1, 2))
        self.y = jnp.asarray(data.labels.astype(np.int32))
        start = jax.vmap(lambda p: jax.vmap(lambda q, s: make(s).init(q))(p, self.strengths))
        self.carry = (params, jax.jit(start)(params))
        one = partial(stretch, make, extra, data.batch)
        nets = jax.vmap(one, in_axes=(0, 0, 0, None))
        self.run = jax.jit(jax.vmap(nets, in_axes=(0, None, 0, 0)), donate_argnums=0)

    def epochs(self, first: int, last: int) -> Iterator[int]:
        """Train through epochs [first, last), yielding after each stretch how many are done."""
        for start in range(first, last, STRETCH):
            stop = min(start + STRETCH, last)
            orders = np.stack([self.data.order(e) for e in range(start, stop)], 1)
            inputs = (self.x, self.y, jnp.asarray(orders.astype(np.int32)))
            self.carry = jax.block_until_ready(self.run(self.carry, self.strengths, self.mask, inputs))
            yield stop

    def found(self, sparse: bool) -> Arrays:
        """The parameters, at the prox point where the optimizer has one (`sparse`)."""
        params, state = self.carry
        params = proxopt_jax.prox_point(state, params) if sparse else params
        return {k: np.asarray(v if "weight" in k else v[..., None]) for k, v in params.items()}


def initial(settings: Settings, nets: int, draw: int = 0) -> dict[str, jax.Array]:
    start = problem.initial(settings, nets, draw)
    return {k: jnp.asarray(v if "weight" in k else v[..., 0]) for k, v in start.items()}


def search(curve: Curve, settings: Settings, data: Data, bar: tqdm) -> Arrays:
    """Train all strengths and seeds of a curve with the penalty; weights below `curve.cut` become zero."""
    strengths = np.asarray(settings.strength_grid(), np.float32)
    extra = (lambda s, p: sum(curve.build(s).value(p[f"weight{i}"]) for i in LAYERS)) if curve.in_loss else None
    make = lambda s: transformation(curve, s, settings, len(data))
    trainer = Trainer(initial(settings, len(strengths)), strengths, data, make, extra)
    done = 0
    for stop in trainer.epochs(0, settings.epochs):
        bar.update((stop - done) * len(strengths) * settings.seeds * len(data))
        done = stop
    return curve.threshold(trainer.found(sparse=not curve.in_loss))


def retrain(masks: list[np.ndarray], settings: Settings, data: Data, bar: tqdm, checkpoint: Path) -> Arrays:
    """Train the networks that the masks leave from fresh weights.

    The state is written to `checkpoint` every 200 epochs; a stopped run continues from it bit for bit.
    """
    nets = masks[0].shape[1]
    mask = {f"weight{i}": jnp.asarray(m) for i, m in enumerate(masks)}
    params = {k: v * mask.get(k, 1) for k, v in initial(settings, nets, draw=1).items()}
    trainer = Trainer(params, np.zeros(nets, np.float32), data, lambda s: optax.adam(3e-4, 0.5, 0.999), mask=mask)
    done = 0
    leaves, treedef = jax.tree.flatten(trainer.carry)
    if checkpoint.exists():
        saved = stages.load(checkpoint, settings)
        done = int(saved["epoch"])
        trainer.carry = jax.tree.unflatten(treedef, [jnp.asarray(saved[f"leaf{i}"]) for i in range(len(leaves))])
    bar.update(done * nets * settings.seeds * len(data))
    for stop in trainer.epochs(settings.epochs + done, settings.epochs + settings.retrain_epochs):
        stop -= settings.epochs
        bar.update((stop - done) * nets * settings.seeds * len(data))
        done = stop
        if done % 200 == 0:
            state = {f"leaf{i}": np.asarray(v) for i, v in enumerate(jax.tree.leaves(trainer.carry))}
            stages.save(checkpoint, settings, state | {"epoch": np.array(done)})
    return trainer.found(sparse=False)
