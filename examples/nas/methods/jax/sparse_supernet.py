"""SparseNAS in JAX: architecture weights under a sparse group lasso, updated by HAPG or AdamHAPG. See `methods.sparse_supernet`.

The strength and the learning rate are arrays of the state, so that no epoch compiles the update again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import proxopt_jax
from proxopt import Groups, SparseGroupLasso, schedules

from ...engine.settings import cosine
from ...space.genotype import AnyGenotype
from ...space.spaces import Masks, Space
from .guard import Guard
from .numbers import shortest


class SparseState(NamedTuple):
    """arch: the architecture weights at the search point A, a vector for each cell. optimizer: with the prox point.

    strength, lr: of this epoch. frozen: whether the architecture is final.
    """

    arch: dict[str, Array]
    optimizer: Any
    strength: Array
    lr: Array
    frozen: Array


class SparseSupernet:
    """SparseNAS. The variables are the architecture weights."""

    name = "sparse_supernet"

    def __init__(self, space: Space, settings: Any, steps_per_epoch: int) -> None:
        self.space, self.settings, self.cells = space, settings, space.layout.cells
        s = settings
        self.lr = s.arch_lr if s.arch_lr is not None else s.usual_lr[s.optimizer]
        self.strength = schedules.linear(s.strength_step)
        metric = s.metric if s.optimizer == "adamhapg" else None
        of_nodes: dict[Any, SparseGroupLasso] = {}  # cells with equal groups share a penalty, and are updated as one array
        for cell in self.cells:
            nodes = tuple(space.nodes(cell))
            of_nodes.setdefault(nodes, SparseGroupLasso(0.0, s.l1_ratio, Groups.labels(nodes), metric=metric))
        self.penalties = {cell: of_nodes[tuple(space.nodes(cell))] for cell in self.cells}
        self.guards = {cell: Guard(space, cell) for cell in self.cells}

    def _optimizer(self, lr: Any, strength: Any) -> optax.GradientTransformationExtraArgs:
        # as published, without a cap on the momentum
        make = proxopt_jax.adam_hapg if self.settings.optimizer == "adamhapg" else proxopt_jax.hapg
        return make(lr, self.penalties, extrapolation="nesterov", strength=strength)

    def init(self, key: Array) -> SparseState:
        keys = jax.random.split(key, len(self.cells))
        start = lambda cell, key: self.settings.init + 1e-3 * jax.random.normal(key, (len(self.space.paths(cell)),))
        arch = {cell: start(cell, key) for cell, key in zip(self.cells, keys)}
        number = lambda value: jnp.asarray(value, arch[self.cells[0]].dtype)
        optimizer = self._optimizer(self.lr, 0.0).init(arch)
        return SparseState(arch, optimizer, number(0), number(self.lr), jnp.asarray(False))

    def begin_epoch(self, state: SparseState, epoch: int) -> SparseState:
        lr = self.lr
        if self.settings.optimizer == "hapg":
            lr *= cosine(epoch / self.settings.epochs)
        number = lambda value: jnp.asarray(value, state.lr.dtype)
        return state._replace(strength=number(self.strength(epoch)), lr=number(lr))

    def after_step(self, state: SparseState) -> SparseState:
        return state

    def variables(self, state: SparseState) -> dict[str, Array]:
        return state.arch

    def weights(self, variables: dict[str, Array], state: SparseState) -> dict[str, Array]:
        return variables

    def is_active(self, state: SparseState) -> dict[str, Array]:
        return {cell: a != 0 for cell, a in state.arch.items()}

    def needs_zeroed_paths(self, step: int) -> bool:
        return step % self.settings.probe_every == 0

    def update(self, grads: dict[str, Array], state: SparseState) -> SparseState:
        moved, optimizer = self._optimizer(state.lr, state.strength).update(grads, state.optimizer, state.arch)
        arch: Any = optax.apply_updates(state.arch, moved)
        before = self.point(state)
        found = {cell: self.guards[cell](arch[cell], optimizer.point[cell], before[cell]) for cell in self.cells}
        arch, point = ({cell: found[cell][i] for cell in self.cells} for i in range(2))
        frozen = state.frozen
        if self.settings.target_paths:
            left = sum(mask.sum() for mask in self._nonzero(point).values())
            frozen = frozen | (left <= self.settings.target_paths)
            arch = {cell: jnp.where(frozen, point[cell], arch[cell]) for cell in self.cells}
        new = state._replace(arch=arch, optimizer=optimizer._replace(point=point), frozen=frozen)
        return jax.tree.map(lambda old, new: jnp.where(state.frozen, old, new), state, new)

    def point(self, state: SparseState) -> dict[str, Array]:
        return state.optimizer.point

    def _nonzero(self, point: dict[str, Array]) -> dict[str, Array]:
        """Flags of the paths in the genotype."""
        return {cell: jnp.abs(p) > self.settings.cut * jnp.abs(p).max() for cell, p in point.items()}

    def masks(self, state: SparseState) -> Masks:
        """Flags of the nonzero paths at the prox point."""
        return {cell: np.asarray(mask).tolist() for cell, mask in self._nonzero(self.point(state)).items()}

    def is_frozen(self, state: SparseState) -> bool:
        return bool(state.frozen)

    def genotype(self, state: SparseState) -> AnyGenotype:
        return self.space.genotype(self.masks(state)).clean()

    def log(self, state: SparseState) -> dict[str, float]:
        strength = shortest(state.strength)
        point = {cell: np.asarray(p) for cell, p in self.point(state).items()}
        value = sum(float(self.penalties[cell].with_strength(strength).value(p)) for cell, p in point.items())
        largest = max(float(np.abs(np.asarray(a)).max()) for a in state.arch.values())
        return {"strength": strength, "penalty": value, "largest_weight": largest}
