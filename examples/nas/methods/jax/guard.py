"""The guard of `methods.sparse_supernet` as a pure function."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from proxopt import Sphere

from ...space.spaces import Space


class Guard:
    """Keeps a cell connected: if no path from an input is left after a prox step, its strongest route is restored.

    Batch norms make the loss independent of the common scale of all weights, so a growing strength can zero a whole cell. sphere:
    where norms are held, the weights of the restored route have them too.
    """

    def __init__(self, space: Space, cell: str, sphere: Sphere | None = None) -> None:
        paths, layout, self.sphere = space.paths(cell), space.layout, sphere
        self.nodes = np.array(layout.nodes)
        self.source = np.array([p.source for p in paths])
        self.into = np.array([p.node for p in paths])[None] == self.nodes[:, None]  # (nodes, paths)
        self.into &= np.array([p.operation != "none" for p in paths])
        numbers = range(max(layout.nodes) + 1)
        self.is_output = np.isin(self.nodes, layout.outputs)
        self.is_input = np.array([n in layout.inputs for n in numbers])
        self.row = np.array([layout.nodes.index(n) if n in layout.nodes else 0 for n in numbers])  # of a node in `nodes`

    def reachable(self, point: Array) -> Array:
        """Flags (nodes, paths) of the nonzero paths into each node whose source is an input or has such a path."""
        nonzero = self.into & (point != 0)

        def reach(_: int, reached: Array) -> Array:
            return reached.at[self.nodes].set((nonzero & reached[self.source]).any(1))

        return nonzero & lax.fori_loop(0, len(self.nodes), reach, jnp.asarray(self.is_input))[self.source]

    def backbone(self, point: Array) -> Array:
        """Flags of the strongest route: the strongest path into the strongest node, then into its source, up to an input."""
        reachable = self.reachable(point)
        norms = jnp.where(self.is_output, jnp.sqrt(jnp.where(reachable, point * point, 0).sum(1)), -1)
        best = jnp.where(reachable, jnp.abs(point), -1).argmax(1)  # of each node
        chosen = reachable & (jnp.arange(len(point)) == best[:, None])

        def follow(_: int, found: tuple[Array, Array]) -> tuple[Array, Array]:
            kept, number = found
            here = jnp.where(jnp.asarray(self.is_input)[number], False, chosen[jnp.asarray(self.row)[number]])
            source = jnp.asarray(self.source)[best[jnp.asarray(self.row)[number]]]
            return kept | here, jnp.where(here.any(), source, number)

        strongest = jnp.asarray(self.nodes)[norms.argmax()]
        return lax.fori_loop(0, len(self.nodes), follow, (jnp.zeros(point.shape, bool), strongest))[0]

    def connects(self, point: Array) -> Array:
        """Whether a nonzero path leads from an input to a node of the output."""
        return self.reachable(point)[self.is_output].any()

    def __call__(self, search: Array, point: Array, before: Array) -> tuple[Array, Array, Array]:
        """Return both points, with the strongest route of `before`, the last prox point, if `point` is not connected.

        The third result is whether it was not.
        """
        connected = self.connects(point)
        repaired = jnp.where(self.backbone(before), before, 0)
        if self.sphere is not None:
            repaired = self.sphere.project(repaired)
        return jnp.where(connected, search, repaired), jnp.where(connected, point, repaired), ~connected
