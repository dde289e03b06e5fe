"""Convolutional networks of cells in JAX: the supernet of a search, and the network of a genotype.

    net = Supernet(get_space("darts"), channels=16, layers=8, classes=10, rngs=nnx.Rngs(0))
    graph, params = nnx.split(net, nnx.Param)
    logits = nnx.merge(graph, params)(images, {"normal": a, "reduce": b}, active)

    net = Network(genotype, channels=36, layers=20, classes=10, rngs=nnx.Rngs(0))
    logits, auxiliary = net(images)

Both compute what the PyTorch networks of the same names compute, for images (N, H, W, 3). The paths of an operation whose sources
are known at the same time are one stack (`operations`): those from both inputs of a cell, and those from each node.

Sources: Liu, Simonyan, Yang, "DARTS", 2019 (both networks); Wu et al., "Neural architecture search as sparse supernet",
2021 (linear weights, any number of paths).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from ...space.genotype import CELLS, NODES, Path
from ...space.spaces import Masks, Space, Weights
from .operations import (
    BatchNorm,
    ConvNorm,
    FactorizedReduce,
    Form,
    Identity,
    Noise,
    Pool,
    Rectified,
    convolve,
    make,
    uniform,
)

GROUPS = ((0, 1), (2,), (3,), (4,))  # sources whose outputs are known at the same time
Place = tuple[tuple[str, ...], int]  # the path of a parameter in the state of a network, and an index of its first axis


def cell_kinds(layers: int) -> list[str]:
    """The cell type of each layer: reduction at one third and two thirds of the depth."""
    return ["reduce" if i in (layers // 3, 2 * layers // 3) else "normal" for i in range(layers)]


@dataclass(frozen=True, eq=False)
class Stack:
    """Paths of one operation from one group of sources. indices: of the paths in their cell."""

    name: str
    operation: str
    indices: tuple[int, ...]
    paths: tuple[Path, ...]


def stacks_of(paths: Sequence[Path]) -> tuple[tuple[Stack, ...], ...]:
    """The stacks of a cell for each group of sources; within a stack paths are ordered by source, then by node."""
    groups = []
    for sources in GROUPS:
        own = sorted((path.source, path.node, i) for i, path in enumerate(paths) if path.source in sources)
        names = dict.fromkeys(path.operation for path in paths if path.source in sources and path.operation != "none")
        stacks = []
        for name in names:
            indices = tuple(i for _, _, i in own if paths[i].operation == name)
            stacks.append(Stack(f"{name}_from_{sources[0]}", name, indices, tuple(paths[i] for i in indices)))
        groups.append(tuple(stacks))
    return tuple(groups)


def computed_paths(paths: Sequence[Path], active: Sequence[bool] | None) -> list[bool]:
    """Flags of the paths that are active and start in an input or in a node with such a path."""
    reached, flags = {0, 1}, [False] * len(paths)
    for i, path in sorted(enumerate(paths), key=lambda item: item[1].node):
        if path.operation != "none" and path.source in reached and (active is None or active[i]):
            flags[i] = True
            reached.add(path.node)
    return flags


@dataclass(frozen=True, eq=False)
class CellPlan:
    """What is fixed about a cell. eq=False: compared by identity, as a part of the static graph of a module."""

    kind: str
    paths: tuple[Path, ...]
    stacks: tuple[tuple[Stack, ...], ...]
    channels: int
    nodes: tuple[int, ...]

    @property
    def stride(self) -> int:
        return 2 if self.kind == "reduce" else 1


class Cell(nnx.Module):
    """A cell of given paths: node = sum of weight * operation(source), output = concatenation of its nodes."""

    def __init__(self, plan: CellPlan, before: int, last: int, reduced: bool, form: Form, rngs: nnx.Rngs, dtype: Any):
        self.plan, self.form = plan, form
        affine, first = form == "evaluation", FactorizedReduce if reduced else ConvNorm
        self.preprocess0 = first(1, before, plan.channels, affine, rngs, dtype)
        self.preprocess1 = ConvNorm(1, last, plan.channels, affine, rngs, dtype)
        for sources, stacks in zip(GROUPS, plan.stacks):
            stride = plan.stride if sources == (0, 1) else 1
            for stack in stacks:
                made = make(stack.operation, len(stack.paths), plan.channels, stride, form, rngs, dtype)
                setattr(self, stack.name, made)

    def __call__(self, s0: Array, s1: Array, weights: Array | None, active: Sequence[bool] | None, draws: Draws) -> Array:
        """s0, s1: outputs of the two cells before, (N, H, W, C). weights: (paths,) or None for 1."""
        computed = computed_paths(self.plan.paths, active)
        sources = {0: self.preprocess0(nnx.relu(s0)[None])[0], 1: self.preprocess1(nnx.relu(s1)[None])[0]}
        terms: dict[int, list[Array]] = {node: [] for node in NODES}
        for group, stacks in zip(GROUPS, self.plan.stacks):
            for source in group:
                if terms.get(source):
                    sources[source] = _sum(terms[source])
            rectified = {source: nnx.relu(sources[source]) for source in group if source in sources}
            for stack in stacks:
                rows = [row for row, i in enumerate(stack.indices) if computed[i]]
                if rows:
                    outputs = self._run(stack, rows, sources, rectified, weights, draws)
                    for row, y in zip(rows, outputs):
                        terms[stack.paths[row].node].append(y)
        template = next((found[0] for found in terms.values() if found), None)
        if template is None:
            raise ValueError(f"no path is active in the {'reduction' if self.plan.kind == 'reduce' else 'normal'} cell")
        # the sum of a node that is a source has been computed already
        nodes = [sources.get(node) if node in sources else _sum(terms[node]) for node in self.plan.nodes]
        return jnp.concatenate([jnp.zeros_like(template) if x is None else x for x in nodes], -1)

    def _run(
        self,
        stack: Stack,
        rows: list[int],
        sources: Mapping[int, Array],
        rectified: Mapping[int, Array],
        weights: Array | None,
        draws: Draws,
    ) -> list[Array]:
        """The weighted outputs of these paths of a stack, each (N, H, W, C)."""
        operation = getattr(self, stack.name)
        paths = [stack.paths[row] for row in rows]
        scale = None if weights is None else weights[np.array([stack.indices[row] for row in rows])]
        if isinstance(operation, Rectified):
            made: Sequence[Array] = operation(_stacked(rectified, paths), rows, scale)
            return draws.dropped(list(made))
        if isinstance(operation, Identity):
            return _scaled([sources[path.source] for path in paths], scale)
        if isinstance(operation, Noise):
            return _scaled(operation(sources[paths[0].source], draws.keys([stack.indices[row] for row in rows])), scale)
        assert isinstance(operation, Pool)
        order = sorted({path.source for path in paths})
        pooled = operation(jnp.stack([sources[source] for source in order]))
        return draws.dropped(_scaled([pooled[order.index(path.source)] for path in paths], scale))


class Draws:
    """The random numbers of one pass over a network: noise operations and drop path. key None: no random operation may run."""

    def __init__(self, key: Array | None, drop_path: Array | float | None = None):
        self.key, self.drop_path, self.cell, self.count = key, drop_path, 0, 0

    def keys(self, numbers: Sequence[int]) -> list[Array]:
        """A key for each noise operation: the same whichever others are active."""
        if self.key is None:
            raise ValueError("key must be a jax.random key where noise operations are active, got None")
        return [jax.random.fold_in(jax.random.fold_in(self.key, self.cell), number) for number in numbers]

    def dropped(self, outputs: list[Array]) -> list[Array]:
        """Drop path: set samples of each output to 0 with this probability, and scale the others up."""
        if self.drop_path is None:
            return outputs
        if self.key is None:
            raise ValueError("key must be a jax.random key where drop_path is used, got None")
        self.count += 1
        key = jax.random.fold_in(jax.random.fold_in(self.key, self.cell), self.count)
        keep = 1 - jnp.asarray(self.drop_path, jnp.float32)
        masks = jax.random.uniform(key, (len(outputs), len(outputs[0]), 1, 1, 1)) < keep
        return [x * (mask / keep).astype(x.dtype) for x, mask in zip(outputs, masks)]


def _sum(terms: Sequence[Array]) -> Array | None:
    return sum(terms[1:], terms[0]) if terms else None


def _stacked(sources: Mapping[int, Array], paths: Sequence[Path]) -> Array:
    """The source of each path, (paths, N, H, W, C). Paths are ordered by source."""
    counts = {source: sum(path.source == source for path in paths) for source in sources}
    parts = [jnp.broadcast_to(x[None], (counts[source], *x.shape)) for source, x in sources.items() if counts[source]]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def _scaled(outputs: Sequence[Array], scale: Array | None) -> list[Array]:
    return list(outputs) if scale is None else [x * scale[i].astype(x.dtype) for i, x in enumerate(outputs)]


class Stem(nnx.Module):
    """3x3 convolution, batch norm with scale and shift. running: whether the norm has running statistics."""

    def __init__(self, channels: int, running: bool, rngs: nnx.Rngs, dtype: Any):
        self.kernel = uniform((3, 3, 3, channels), 27, rngs, dtype)
        self.norm = BatchNorm(1, channels, True, dtype, running)

    def __call__(self, images: Array) -> Array:
        return self.norm(convolve(images, self.kernel[...])[None])[0]


class Linear(nnx.Module):
    """A linear layer, initialised as PyTorch does; the result is float32 or wider."""

    def __init__(self, inputs: int, outputs: int, rngs: nnx.Rngs, dtype: Any):
        self.kernel = uniform((inputs, outputs), inputs, rngs, dtype)
        self.bias = uniform((outputs,), inputs, rngs, dtype)

    def __call__(self, x: Array) -> Array:
        wide = jnp.promote_types(x.dtype, jnp.float32)
        return jnp.matmul(x, self.kernel[...].astype(x.dtype), preferred_element_type=wide) + self.bias[...].astype(wide)


@dataclass(frozen=True, eq=False)
class Plan:
    """What is fixed about a supernet."""

    space: Space
    cells: tuple[CellPlan, ...]


class Supernet(nnx.Module):
    """A network with all paths of a space in every cell: node = sum over its paths of weight * operation(source).

    All batch norms use the statistics of the batch. Those of the cells have no scale and shift: the weights are their scale.

    space: a convolutional search space. dtype: of the computation; parameters and statistics are float32 (float64 if it is).
    """

    def __init__(
        self,
        space: Space,
        channels: int = 16,
        layers: int = 8,
        classes: int = 10,
        *,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
    ):
        stored, kinds = jnp.promote_types(dtype, jnp.float32), cell_kinds(layers)
        stacks = {kind: stacks_of(space.paths(kind)) for kind in CELLS}
        stem, width = 3 * channels, channels
        self.dtype, self.stem = dtype, Stem(stem, False, rngs, stored)
        plans = []
        before, last, reduced = stem, stem, False
        for i, kind in enumerate(kinds):
            width *= 2 if kind == "reduce" else 1
            plans.append(CellPlan(kind, space.paths(kind), stacks[kind], width, NODES))
            setattr(self, f"cell{i}", Cell(plans[-1], before, last, reduced, "search", rngs, stored))
            before, last, reduced = last, len(NODES) * width, kind == "reduce"
        self.plan = Plan(space, tuple(plans))
        self.classifier = Linear(last, classes, rngs, stored)

    @property
    def space(self) -> Space:
        """The search space."""
        return self.plan.space

    @property
    def kinds(self) -> list[str]:
        """The cell type of each layer."""
        return [cell.kind for cell in self.plan.cells]

    def __call__(
        self,
        images: Array,
        weights: Weights | None = None,
        active: Masks | None = None,
        key: Array | None = None,
    ) -> Array:
        """Return the logits (N, classes), float32 or wider.

        Paths whose source has no active path are not computed: their output is a constant of their batch norms.

        Args:
          images: (N, H, W, 3), H and W divisible by 4.
          weights: for each cell type a weight of each path, in the order of `space.paths(cell)`: (paths,), shared by all
            cells of the type, or (cells of the type, paths). None: all 1.
          active: for each cell type a Python flag of each path, whether to compute it; None: all.
          key: a `jax.random` key for noise operations, in the spaces that have them. Each draws the same numbers for the same
            key, whichever others are active.

        Raises:
          ValueError: weights of another shape, a cell without active path, or noise without key.
        """
        rows, draws = self._rows(weights), Draws(key)
        s0 = s1 = self.stem(images.astype(self.dtype))
        for i, kind in enumerate(self.kinds):
            draws.cell = i
            mask = None if active is None else active[kind]
            s0, s1 = s1, getattr(self, f"cell{i}")(s0, s1, rows[i], mask, draws)
        return self.classifier(s1.mean((1, 2)))

    def _rows(self, weights: Weights | None) -> list[Array | None]:
        """The weights of the paths of each cell."""
        rows: list[Array | None] = [None] * len(self.kinds)
        for kind in CELLS if weights is not None else ():
            cells = [i for i, other in enumerate(self.kinds) if other == kind]
            paths, given = len(self.space.paths(kind)), jnp.asarray(weights[kind])  # type: ignore[index]
            if given.shape not in ((paths,), (len(cells), paths)):
                raise ValueError(f"{kind}: weights have shape ({paths},) or ({len(cells)}, {paths}), got {given.shape}")
            for number, i in enumerate(cells):
                rows[i] = given if given.ndim == 1 else given[number]
        return rows

    def _stacks(self) -> dict[tuple[str, str], tuple[CellPlan, Stack]]:
        """The stack of the parameters whose path in the state begins with (cell, stack)."""
        return {
            (f"cell{i}", stack.name): (cell, stack)
            for i, cell in enumerate(self.plan.cells)
            for stacks in cell.stacks
            for stack in stacks
        }

    def path_parameters(self) -> dict[tuple[str, Path], list[Place]]:
        """For each (cell type, path) the places of its parameters in all cells of the type.

        A place is the path of a leaf in `nnx.to_flat_state(nnx.state(net, nnx.Param))`, and an index of its first axis.
        """
        places: dict[tuple[str, Path], list[Place]] = {(kind, path): [] for kind in CELLS for path in self.space.paths(kind)}
        stacks = self._stacks()
        for name in sorted(_flat(nnx.state(self, nnx.Param))):
            cell, stack = stacks.get(name[:2], (None, None))
            for row, path in enumerate(stack.paths if stack else ()):
                places[cell.kind, path].append((name, row))  # type: ignore[union-attr]
        return places

    def trained(self, is_active: Mapping[str, Array]) -> nnx.State:
        """Which parameters a weight step updates: flags that broadcast against the parameters, in a state of their structure.

        True for the parameters of a path that is active and starts in an input or in a node with such a path, and for all
        parameters outside of the paths.

        is_active: for each cell type a flag of each path, (paths,); may be traced.
        """
        flags = {kind: _reached(self.space.paths(kind), jnp.asarray(is_active[kind], bool)) for kind in CELLS}
        stacks = self._stacks()

        def flag(name: tuple[str, ...], leaf: Array) -> Array:
            if name[:2] not in stacks:
                return jnp.ones((1,) * leaf.ndim, bool)
            cell, stack = stacks[name[:2]]
            return flags[cell.kind][np.array(stack.indices)].reshape(-1, *(1,) * (leaf.ndim - 1))

        params = nnx.state(self, nnx.Param)
        return _like(params, {name: flag(name, leaf) for name, leaf in _flat(params).items()})


def _reached(paths: Sequence[Path], active: Array) -> Array:
    """`computed_paths` of traced flags."""
    reached = {0: jnp.asarray(True), 1: jnp.asarray(True)}
    flags: list[Array] = [jnp.asarray(False)] * len(paths)
    for node in NODES:
        into = [(i, path) for i, path in enumerate(paths) if path.node == node and path.operation != "none"]
        for i, path in into:
            flags[i] = active[i] & reached[path.source]
        reached[node] = jnp.stack([flags[i] for i, _ in into]).any() if into else jnp.asarray(False)
    return jnp.stack(flags)


def _flat(state: nnx.State) -> dict[tuple[str, ...], Array]:
    """The arrays of a state by their paths."""
    return {tuple(map(str, name)): variable[...] for name, variable in nnx.to_flat_state(state)}


def _like(state: nnx.State, values: Mapping[tuple[str, ...], Array]) -> nnx.State:
    """A state of the same structure with these arrays."""
    names = [tuple(map(str, name)) for name, _ in nnx.to_flat_state(state)]
    return jax.tree.unflatten(jax.tree.structure(state), [values[name] for name in names])


Vectors = dict[tuple[str, Path], Array]


def split_paths(net: Supernet, params: nnx.State) -> tuple[Vectors, dict[tuple[str, ...], Array]]:
    """The parameters of each path in all cells of its type as one vector, and all other parameters.

    Paths without parameters have no vector. The inverse is `join_paths`.
    """
    flat, places = _flat(params), net.path_parameters()
    vectors = {key: jnp.concatenate([flat[name][row].ravel() for name, row in where]) for key, where in places.items() if where}
    inside = {name for where in places.values() for name, _ in where}
    return vectors, {name: leaf for name, leaf in flat.items() if name not in inside}


def join_paths(net: Supernet, vectors: Vectors, rest: Mapping[tuple[str, ...], Array]) -> nnx.State:
    """The state of parameters that `split_paths` has split."""
    params = nnx.state(net, nnx.Param)
    shapes, rows = _flat(params), {}
    for key, where in net.path_parameters().items():
        start = 0
        for name, row in where:
            shape = shapes[name].shape[1:]
            rows[name, row] = vectors[key][start : start + math.prod(shape)].reshape(shape)
            start += math.prod(shape)
    stacked = {
        name: rest[name] if name in rest else jnp.stack([rows[name, row] for row in range(len(leaf))])
        for name, leaf in shapes.items()
    }
    return _like(params, stacked)
