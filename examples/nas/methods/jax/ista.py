"""Two-stage ISTA-NAS in JAX: Adam on compressed variables, from which the host recovers few paths. See `methods.ista`."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from ...space.genotype import AnyGenotype
from ...space.spaces import Masks, Space
from .. import recovery
from ..settings.ista import TwoStageSettings
from .darts import adam
from .numbers import shortest


class IstaState(NamedTuple):
    """All by cell: the compressed variables b (nodes, rows), and for each node its matrix A and its last code z.

    support, values, columns: of the last recovery, as in `recovery.Support`. gap: its largest duality gap. moved: the largest
    distance of a code from the one before, distance: the mean. steps: the number of updates. recovered: whether there was a
    recovery. gradient: of the last update.
    """

    variables: dict[str, Array]
    optimizer: Any
    matrices: dict[str, list[Array]]
    codes: dict[str, list[Array]]
    support: dict[str, Array]
    values: dict[str, Array]
    columns: dict[str, Array]
    gap: Array
    moved: Array
    distance: Array
    steps: Array
    recovered: Array
    gradient: dict[str, Array]


class Ista:
    """ISTA-NAS: a new support in every epoch or every n steps. The variables are b."""

    name = "ista"

    def __init__(self, space: Space, settings: TwoStageSettings, steps_per_epoch: int) -> None:
        self.space, self.settings, self.cells = space, settings, space.layout.cells
        self.clips_together = settings.clip_together
        self.members = recovery.members(space, settings.sparsity)
        self.optimizer = adam(settings.arch_lr, 0.5, settings.arch_decay)

    def init(self, key: Array) -> IstaState:
        s, nodes, many = self.settings, len(self.space.layout.nodes), recovery.kept(self.space, self.settings.sparsity)
        keys = dict(zip(self.cells, jax.random.split(key, len(self.cells))))
        variables = {cell: 1e-3 * jax.random.normal(k, (nodes, s.rows)) for cell, k in keys.items()}
        zeros = lambda *shape: {cell: jnp.zeros(shape) for cell in self.cells}
        return IstaState(
            variables=variables,
            optimizer=self.optimizer.init(variables),
            matrices={cell: self._matrices(cell, jax.random.fold_in(k, 1)) for cell, k in keys.items()},
            codes={cell: [jnp.zeros(len(own)) for own in self.members[cell]] for cell in self.cells},
            support={cell: jnp.zeros((nodes, many), jnp.int32) for cell in self.cells},
            values=zeros(nodes, many),
            columns=zeros(nodes, many, s.rows),
            gap=jnp.zeros(()),
            moved=jnp.zeros(()),
            distance=jnp.zeros(()),
            steps=jnp.zeros((), jnp.int32),
            recovered=jnp.asarray(False),
            gradient=jax.tree.map(jnp.zeros_like, variables),
        )

    def _matrices(self, cell: str, key: Array) -> list[Array]:
        shapes = [(self.settings.rows, len(own)) for own in self.members[cell]]
        keys = jax.random.split(key, len(shapes))
        if self.settings.matrix == "uniform":
            return [jax.random.uniform(k, shape) for k, shape in zip(keys, shapes)]
        drawn = [jax.random.normal(k, shape) for k, shape in zip(keys, shapes)]
        return [A / jnp.linalg.norm(A, axis=0) for A in drawn]

    def begin_epoch(self, state: IstaState, epoch: int) -> IstaState:
        return state if self.settings.recover_every and bool(state.recovered) else self.recover(state)

    def after_step(self, state: IstaState) -> IstaState:
        every = self.settings.recover_every
        return self.recover(state) if every and int(state.steps) % every == 0 else state

    def recover(self, state: IstaState) -> IstaState:
        """Recover the codes, supports and values at the current b, on the host.

        Raises ValueError if a compressed variable is not finite.
        """
        variables, matrices, last = (in_double(tree) for tree in (state.variables, state.matrices, state.codes))
        codes, gap = recovery.solve(matrices, variables, self.settings.strength)
        distances = recovery.distances(codes, last)
        edges = {cell: recovery.edges_of(self.space, cell) for cell in self.cells}
        supported = lambda c: recovery.support(
            self.members[c], codes[c], matrices[c], variables[c], self.settings.sparsity, edges[c]
        )
        found = {cell: supported(cell) for cell in self.cells}
        new = {
            "codes": codes,
            "support": {cell: f.paths for cell, f in found.items()},
            "values": {cell: f.values for cell, f in found.items()},
            "columns": {cell: f.columns for cell, f in found.items()},
            "gap": gap,
            "moved": max(map(max, distances.values())),
            "distance": recovery.mean_distance(distances),
            "recovered": True,
        }
        return state._replace(
            **{k: jax.tree.map(lambda n, o: jnp.asarray(n, o.dtype), v, getattr(state, k)) for k, v in new.items()}
        )

    def variables(self, state: IstaState) -> dict[str, Array]:
        return state.variables

    def weights(self, variables: dict[str, Array], state: IstaState) -> dict[str, Array]:
        """The weights of the paths of each cell, z_S + A_S^T (b - A_S z_S) in the support and exactly 0 outside of it."""
        out = {}
        for cell, b in variables.items():
            z, columns = state.values[cell], state.columns[cell]
            residual = b - (columns * z[..., None]).sum(1)
            w = z + (columns * residual[:, None]).sum(2)  # sums, as a TPU rounds the factors of products to bfloat16
            empty = jnp.zeros(len(self.space.paths(cell)), w.dtype)
            at = empty.at[state.support[cell].ravel()]
            # in NAS-Bench-201 a node may repeat a path, with the weight 0
            out[cell] = at.add(w.ravel()) if self.space.layout.last else at.set(w.ravel(), unique_indices=True)
        return out

    def is_active(self, state: IstaState) -> dict[str, Array]:
        return {
            cell: jnp.zeros(len(self.space.paths(cell)), bool).at[state.support[cell].ravel()].set(True) for cell in self.cells
        }

    def needs_zeroed_paths(self, step: int) -> bool:
        return False

    def update(self, grads: dict[str, Array], state: IstaState) -> IstaState:
        moved, optimizer = self.optimizer.update(grads, state.optimizer, state.variables)
        variables: Any = optax.apply_updates(state.variables, moved)
        return state._replace(variables=variables, optimizer=optimizer, steps=state.steps + 1, gradient=grads)

    def last_gradient(self, state: IstaState) -> dict[str, Array]:
        """The gradient of the last update, for steps that clip it together with that of the network weights."""
        return state.gradient

    def point(self, state: IstaState) -> dict[str, Array]:
        return self.weights(state.variables, state)

    def masks(self, state: IstaState) -> Masks:
        """Flags of the paths in the support."""
        return {cell: np.asarray(flags).tolist() for cell, flags in self.is_active(state).items()}

    def is_frozen(self, state: IstaState) -> bool:
        return False

    def genotype(self, state: IstaState) -> AnyGenotype:
        return self.space.genotype(self.masks(state))

    def log(self, state: IstaState) -> dict[str, float]:
        b = np.concatenate([np.asarray(v) for v in state.variables.values()])
        norm = float(np.linalg.norm(b, axis=1).mean())
        moved = {"moved": shortest(state.moved), "distance": shortest(state.distance)}
        return {"recovery_gap": shortest(state.gap), **moved, "b_norm": norm}


def in_double(tree: Any) -> Any:
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)
