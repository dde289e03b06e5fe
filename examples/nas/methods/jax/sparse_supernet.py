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
from proxopt import Groups, NonNegative, SparseGroupLasso

from ...engine.settings import cosine
from ...space.genotype import AnyGenotype
from ...space.spaces import Masks, Space
from ..connected import check_connected
from ..sparse_rules import spheres, strengths
from .darts import adam
from .guard import Guard
from .numbers import shortest


class SparseState(NamedTuple):
    """arch: the architecture weights at the search point A, a vector for each cell. optimizer: with the prox point.

    strength, lr: of this epoch. frozen: whether the architecture is final. waits: whether its first step is still to come.
    guarded: the restorations by the guard in this epoch.
    """

    arch: dict[str, Array]
    optimizer: Any
    strength: Array
    lr: Array
    frozen: Array
    waits: Array
    guarded: dict[str, Array]


class SparseSupernet:
    """SparseNAS. The variables are the architecture weights."""

    name = "sparse_supernet"

    def __init__(self, space: Space, settings: Any, steps_per_epoch: int) -> None:
        self.space, self.settings, self.cells = space, settings, space.layout.cells
        s = settings
        self.lr = s.arch_lr if s.arch_lr is not None else s.usual_lr[s.optimizer]
        self.strength, self.spheres = strengths(s), spheres(space, s.hold_norm)
        metric = s.metric if s.optimizer == "adamhapg" else None
        of_nodes: dict[Any, SparseGroupLasso | NonNegative] = {}  # cells with equal groups share a penalty, and one update
        for cell in self.cells:
            nodes = tuple(space.nodes(cell))
            penalty = SparseGroupLasso(0.0, s.l1_ratio, Groups.labels(nodes), metric=metric)
            of_nodes.setdefault(nodes, NonNegative(penalty) if s.nonnegative else penalty)
        self.penalties = {cell: of_nodes[tuple(space.nodes(cell))] for cell in self.cells}
        self.guards = {cell: Guard(space, cell, self.spheres.get(cell)) for cell in self.cells}
        self._kept = jax.jit(self._kept_of, static_argnums=0)  # loops outside of jit would be compiled in every call

    def _optimizer(self, lr: Any, strength: Any) -> Any:
        if self.settings.optimizer == "adam":
            return adam(self.lr, 0.5, 0.0)
        make = proxopt_jax.adam_hapg if self.settings.optimizer == "adamhapg" else proxopt_jax.hapg
        cap: Any = self.settings.cap if self.settings.cap < 1 else "nesterov"
        found = make(lr, self.penalties, extrapolation=cap, strength=strength)
        return proxopt_jax.projected(found, self.spheres) if self.spheres else found

    def init(self, key: Array) -> SparseState:
        keys = jax.random.split(key, len(self.cells))
        start = lambda cell, key: self.settings.init + 1e-3 * jax.random.normal(key, (len(self.space.paths(cell)),))
        arch = {cell: start(cell, key) for cell, key in zip(self.cells, keys)}
        if self.spheres:
            arch = {cell: self.spheres[cell].project(a) for cell, a in arch.items()}
        number = lambda value: jnp.asarray(value, arch[self.cells[0]].dtype)
        optimizer = self._optimizer(self.lr, 0.0).init(arch)
        flags = {"frozen": jnp.asarray(False), "waits": jnp.asarray(self.settings.frozen_epochs > 0)}
        return SparseState(arch, optimizer, number(0), number(self.lr), **flags, guarded=self._none_guarded())

    def _none_guarded(self) -> dict[str, Array]:
        return {cell: jnp.zeros((), jnp.int32) for cell in self.cells}

    def begin_epoch(self, state: SparseState, epoch: int) -> SparseState:
        lr = self.lr
        if self.settings.optimizer == "hapg" and not self.settings.constant_arch_lr:
            lr *= cosine(epoch / self.settings.epochs)
        number = lambda value: jnp.asarray(value, state.lr.dtype)
        waits = jnp.asarray(epoch < self.settings.frozen_epochs)
        numbers = {"strength": number(self.strength(epoch)), "lr": number(lr)}
        return state._replace(**numbers, waits=waits, guarded=self._none_guarded())

    def after_step(self, state: SparseState) -> SparseState:
        if not self.settings.guard:
            masks = {cell: np.asarray(flags).tolist() for cell, flags in self.is_active(state).items()}
            check_connected(self.space.genotype(masks).clean(), shortest(state.strength))
        return state

    def variables(self, state: SparseState) -> dict[str, Array]:
        return state.arch

    def weights(self, variables: dict[str, Array], state: SparseState) -> dict[str, Array]:
        return variables

    def is_active(self, state: SparseState) -> dict[str, Array]:
        return {cell: a != 0 for cell, a in state.arch.items()}

    def needs_zeroed_paths(self, step: int) -> bool:
        every = self.settings.probe_every
        return every > 0 and step % every == 0

    def update(self, grads: dict[str, Array], state: SparseState) -> SparseState:
        adam = self.settings.optimizer == "adam"
        if adam:  # the symmetric subgradient of the penalty, 0 at 0
            of_penalty = jax.grad(lambda arch: sum(self.penalties[c].with_strength(1.0).value(a) for c, a in arch.items()))
            grads = jax.tree.map(lambda g, p: g + state.strength * p, grads, of_penalty(state.arch))
        moved, optimizer = self._optimizer(state.lr, state.strength).update(grads, state.optimizer, state.arch)
        new = state._replace(arch=optax.apply_updates(state.arch, moved), optimizer=optimizer)
        if self.settings.guard and not adam:
            new = self._guarded(new, self.point(state))
        if not self.settings.probe_every and not adam:  # extrapolation would make the search point of a new zero nonzero
            point = self.point(new)
            new = new._replace(arch={cell: jnp.where(point[cell] == 0, 0, a) for cell, a in new.arch.items()})
        if self.settings.target_paths:
            point = self.point(new)
            kept = {cell: self._kept(cell, p)[0] for cell, p in point.items()}
            frozen = state.frozen | (sum(mask.sum() for mask in kept.values()) <= self.settings.target_paths)
            final = {cell: jnp.where(kept[cell], p, 0) if adam else p for cell, p in point.items()}
            arch = {cell: jnp.where(frozen, final[cell], a) for cell, a in new.arch.items()}
            new = new._replace(arch=arch, frozen=frozen)
        return jax.tree.map(lambda old, new: jnp.where(state.frozen | state.waits, old, new), state, new)

    def _guarded(self, state: SparseState, before: dict[str, Array]) -> SparseState:
        """The state in which every cell is connected. before: the last prox point."""
        found = {c: self.guards[c](a, state.optimizer.point[c], before[c]) for c, a in state.arch.items()}
        arch, point, restored = ({cell: found[cell][i] for cell in self.cells} for i in range(3))
        guarded = {cell: count + restored[cell] for cell, count in state.guarded.items()}
        return state._replace(arch=arch, optimizer=state.optimizer._replace(point=point), guarded=guarded)

    def point(self, state: SparseState) -> dict[str, Array]:
        return state.arch if self.settings.optimizer == "adam" else state.optimizer.point

    def _kept_of(self, cell: str, point: Array) -> tuple[Array, Array]:
        """Flags of the paths in the genotype, and whether it is the guard that keeps them."""
        s, guard = self.settings, self.guards[cell]
        kept = jnp.abs(point) > jnp.maximum(s.cut * jnp.abs(point).max(), s.hard_threshold)
        lost = ~guard.connects(jnp.where(kept, point, 0))
        return (jnp.where(lost, guard.backbone(point), kept) if s.guard else kept), lost

    def masks(self, state: SparseState) -> Masks:
        """Flags of the nonzero paths at the prox point."""
        return {cell: np.asarray(self._kept(cell, p)[0]).tolist() for cell, p in self.point(state).items()}

    def is_frozen(self, state: SparseState) -> bool:
        return bool(state.frozen | state.waits)

    def genotype(self, state: SparseState) -> AnyGenotype:
        found = self.space.genotype(self.masks(state)).clean()
        check_connected(found, shortest(state.strength))
        return found

    def log(self, state: SparseState) -> dict[str, float]:
        strength = shortest(state.strength)
        point = {cell: np.asarray(p) for cell, p in self.point(state).items()}
        value = sum(float(self.penalties[cell].with_strength(strength).value(p)) for cell, p in point.items())
        largest = max(float(np.abs(np.asarray(a)).max()) for a in state.arch.values())
        guarded = {f"guarded_{c}": int(state.guarded[c] + self._kept(c, p)[1]) for c, p in self.point(state).items()}
        return {"strength": strength, "penalty": value, "largest_weight": largest} | guarded
