"""The two trainings of the DIGITS ablation in JAX: python benchmarks/digits_ablation.py --framework jax

A curve is one jitted program over one network, mapped with `vmap` over strengths and seeds, which runs a stretch of epochs in a
scan. Same data, order of batches, start and settings as the torch ones in `digits_ablation`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import digits_ablation as ablation
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from tqdm import tqdm

import proxopt_jax

STRETCH = 25  # epochs a call, so that progress shows


def transformation(curve: ablation.Curve, strength: Any, settings: ablation.Settings, steps: int) -> Any:
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
    last = len(params) // 2 - 1
    for i in range(last + 1):
        x = x @ params[f"weight{i}"].T + params[f"bias{i}"]
        x = jax.nn.leaky_relu(x, 0.01) if i < last else x
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

    def __init__(
        self, params: dict, strengths: Any, data: ablation.Data, make: Any, extra: Any = None, mask: dict | None = None
    ) -> None:
        self.data, self.strengths, self.mask = data, jnp.asarray(strengths), mask
        self.x = jnp.asarray(data.images.transpose(1, 2).numpy())
        self.y = jnp.asarray(data.labels.numpy())
        start = jax.vmap(lambda p: jax.vmap(lambda q, s: make(s).init(q))(p, self.strengths))
        self.carry = (params, jax.jit(start)(params))
        one = partial(stretch, make, extra, data.batch)
        nets = jax.vmap(one, in_axes=(0, 0, 0, None))
        self.run = jax.jit(jax.vmap(nets, in_axes=(0, None, 0, 0)), donate_argnums=0)

    def epochs(self, first: int, last: int) -> Iterator[int]:
        """Train through epochs [first, last), yielding after each stretch how many are done."""
        for start in range(first, last, STRETCH):
            stop = min(start + STRETCH, last)
            orders = np.stack([self.data.order(e).numpy() for e in range(start, stop)], 1)
            inputs = (self.x, self.y, jnp.asarray(orders.astype(np.int32)))
            self.carry = jax.block_until_ready(self.run(self.carry, self.strengths, self.mask, inputs))
            yield stop

    def found(self, sparse: bool) -> dict[str, torch.Tensor]:
        """The parameters, at the prox point where the optimizer has one (`sparse`)."""
        params, state = self.carry
        params = proxopt_jax.prox_point(state, params) if sparse else params
        return {k: torch.tensor(np.asarray(v if "weight" in k else v[..., None])) for k, v in params.items()}


def initial(settings: ablation.Settings, nets: int, draw: int = 0) -> dict[str, jax.Array]:
    weights, biases = ablation.initial(settings, nets, draw)
    params = {f"weight{i}": jnp.asarray(w.detach().numpy()) for i, w in enumerate(weights)}
    return params | {f"bias{i}": jnp.asarray(b.detach().squeeze(-1).numpy()) for i, b in enumerate(biases)}


def search(curve: ablation.Curve, settings: ablation.Settings, data: ablation.Data, bar: tqdm) -> dict[str, torch.Tensor]:
    """As `digits_ablation.search`."""
    strengths = np.asarray(settings.strength_grid(), np.float32)
    params = initial(settings, len(strengths))
    in_loss = curve.method in ("sgd", "adam")
    extra = (lambda s, p: sum(curve.build(s).value(p[f"weight{i}"]) for i in range(len(params) // 2))) if in_loss else None
    trainer = Trainer(params, strengths, data, lambda s: transformation(curve, s, settings, len(data)), extra)
    done = 0
    for stop in trainer.epochs(0, settings.epochs):
        bar.update((stop - done) * len(strengths) * settings.seeds * len(data))
        done = stop
    found = trainer.found(sparse=not in_loss)
    return {k: torch.where(v.abs() < curve.cut, 0, v) if "weight" in k else v for k, v in found.items()}


def retrain(
    masks: list[torch.Tensor], settings: ablation.Settings, data: ablation.Data, bar: tqdm, checkpoint: Path
) -> torch.Tensor:
    """As `digits_ablation.retrain`."""
    nets = masks[0].shape[1]
    mask = {f"weight{i}": jnp.asarray(m.numpy()) for i, m in enumerate(masks)}
    params = {k: v * mask.get(k, 1) for k, v in initial(settings, nets, draw=1).items()}
    trainer = Trainer(params, np.zeros(nets, np.float32), data, lambda s: optax.adam(3e-4, 0.5, 0.999), mask=mask)
    done = 0
    treedef = jax.tree.structure(trainer.carry)
    if checkpoint.exists():
        saved = ablation.load(checkpoint, settings)
        done = saved["epoch"]
        trainer.carry = jax.tree.unflatten(treedef, [jnp.asarray(v.numpy()) for v in saved["leaves"]])
    bar.update(done * nets * settings.seeds * len(data))
    for stop in trainer.epochs(settings.epochs + done, settings.epochs + settings.retrain_epochs):
        stop -= settings.epochs
        bar.update((stop - done) * nets * settings.seeds * len(data))
        done = stop
        if done % 200 == 0:
            tensors = [torch.tensor(np.asarray(v)) for v in jax.tree.leaves(trainer.carry)]
            ablation.save(checkpoint, settings, {"epoch": done, "leaves": tensors})
    found = trainer.found(sparse=False)
    return ablation.accuracy(data, *ablation.split(found))
