"""DARTS in JAX: a softmax over the operations of each edge, whose logits are trained by Adam. See `methods.darts`."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from ...space.genotype import AnyGenotype
from ...space.spaces import Space
from ..edges import strongest_genotype
from ..settings.darts import LogitSettings


class DartsState(NamedTuple):
    """logits: of the paths, a vector for each cell. optimizer: the moments of Adam."""

    logits: dict[str, Array]
    optimizer: Any


class Darts:
    """DARTS. The variables are the logits."""

    name = "darts"

    def __init__(self, space: Space, settings: LogitSettings, steps_per_epoch: int) -> None:
        self.space, self.cells = space, space.layout.cells
        self.optimizer = adam(settings.arch_lr, settings.arch_beta1, settings.arch_decay)
        self.edges = {cell: EdgeSoftmax(space, cell) for cell in self.cells}

    def init(self, key: Array) -> DartsState:
        keys = jax.random.split(key, len(self.cells))
        logits = {c: 1e-3 * jax.random.normal(k, (len(self.space.paths(c)),)) for c, k in zip(self.cells, keys)}
        return DartsState(logits, self.optimizer.init(logits))

    def begin_epoch(self, state: DartsState, epoch: int) -> DartsState:
        return state

    def after_step(self, state: DartsState) -> DartsState:
        return state

    def variables(self, state: DartsState) -> dict[str, Array]:
        return state.logits

    def weights(self, variables: dict[str, Array], state: DartsState) -> dict[str, Array]:
        return {cell: self.edges[cell](logits) for cell, logits in variables.items()}

    def is_active(self, state: DartsState) -> dict[str, Array]:
        return {cell: jnp.ones(logits.shape, bool) for cell, logits in state.logits.items()}

    def needs_zeroed_paths(self, step: int) -> bool:
        return True

    def update(self, grads: dict[str, Array], state: DartsState) -> DartsState:
        moved, optimizer = self.optimizer.update(grads, state.optimizer, state.logits)
        logits: Any = optax.apply_updates(state.logits, moved)
        return DartsState(logits, optimizer)

    def point(self, state: DartsState) -> dict[str, Array]:
        return self.weights(state.logits, state)

    def is_frozen(self, state: DartsState) -> bool:
        return False

    def genotype(self, state: DartsState) -> AnyGenotype:
        return strongest_genotype(self.space, {cell: np.asarray(w).tolist() for cell, w in self.point(state).items()})

    def log(self, state: DartsState) -> dict[str, float]:
        edges, point = len(self.space.layout.edges), {cell: np.asarray(w) for cell, w in self.point(state).items()}
        entropy = {cell: float(-(w * np.log(np.maximum(w, 1e-30))).sum()) / edges for cell, w in point.items()}
        return {f"entropy_{cell}": e for cell, e in entropy.items()}


def adam(lr: float, beta1: float, decay: float) -> optax.GradientTransformation:
    """Adam as in torch, whose weight decay is added to the gradient."""
    return optax.chain(optax.add_decayed_weights(decay), optax.adam(lr, beta1, 0.999, eps=1e-8))


class EdgeSoftmax:
    """A softmax over the paths of each edge of a cell: of logits (paths,) or (cells, paths)."""

    def __init__(self, space: Space, cell: str) -> None:
        sizes = [len(names) for names in space.operations[cell]]
        self.paths = sum(sizes)
        row, column = (np.array(v) for v in zip(*((e, o) for e, size in enumerate(sizes) for o in range(size))))
        self.place = row * max(sizes) + column  # of each path in a table of edges, whose rows have the length of the longest one
        self.table = np.full(len(sizes) * max(sizes), self.paths)  # its entries, `paths` where there is none
        self.table[self.place] = np.arange(self.paths)
        self.shape = (len(sizes), max(sizes))

    def __call__(self, logits: Array) -> Array:
        padded = jnp.concatenate([logits, jnp.full((*logits.shape[:-1], 1), -jnp.inf, logits.dtype)], -1)
        table = padded[..., self.table].reshape(*logits.shape[:-1], *self.shape)
        return jax.nn.softmax(table, -1).reshape(*logits.shape[:-1], -1)[..., self.place]
