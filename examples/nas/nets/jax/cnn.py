"""Convolutional networks of cells in JAX: the supernet of a search, and the network of a genotype.

    net = Supernet(get_space("darts"), channels=16, layers=8, classes=10, rngs=nnx.Rngs(0))
    graph, params = nnx.split(net, nnx.Param)
    logits = nnx.merge(graph, params)(images, {"normal": a, "reduce": b}, active)

    net = Network(genotype, channels=36, layers=20, classes=10, rngs=nnx.Rngs(0))
    logits, auxiliary = net(images)

Both compute what the PyTorch networks of the same names compute, for images (N, H, W, 3). The parameters of all paths of one
operation are one stack (`operations`); in a reduction cell those from the inputs, which have stride 2, are another.

Sources: Liu, Simonyan, Yang, "DARTS", 2019 (both networks); Wu et al., "Neural architecture search as sparse supernet",
2021 (linear weights, any number of paths).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from operator import or_
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from ...space.genotype import CELLS, NODES, Genotype, Path
from ...space.spaces import Masks, Space, Weights
from ..convolutional import cell_kinds
from .convolution_kernels import convolve_p
from .dense_convolution import dense_p
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

Flags = Sequence[bool] | Array | None
Place = tuple[tuple[str, ...], int]  # the path of a parameter in the state of a network, and an index of its first axis
STEPS = len(NODES) + 2  # inputs and nodes of a cell


@dataclass(frozen=True, eq=False)
class Stack:
    """Paths of one operation. indices: of the paths in their cell."""

    name: str
    operation: str
    indices: tuple[int, ...]
    paths: tuple[Path, ...]


@dataclass(frozen=True, eq=False)
class Part:
    """Edges (node, source) of a cell with the same stride, in an order in which each source is complete; and their paths."""

    stride: int
    edges: tuple[tuple[int, int], ...]
    stacks: tuple[Stack, ...]


def parts_of(kind: str, paths: Sequence[Path]) -> tuple[Part, ...]:
    """The edges of a cell: all, or in a reduction cell those from its inputs, of stride 2, and those from its nodes."""
    parts = []
    for number, sources in enumerate((range(2), range(2, STEPS)) if kind == "reduce" else (range(STEPS),)):
        own = sorted((path[:2], i) for i, path in enumerate(paths) if path.source in sources and path.operation != "none")
        stacks = []
        for name in dict.fromkeys(paths[i].operation for _, i in own):
            indices = tuple(i for _, i in own if paths[i].operation == name)
            stacks.append(Stack(f"{name}_{number}", name, indices, tuple(paths[i] for i in indices)))
        stride = 2 if kind == "reduce" and number == 0 else 1
        parts.append(Part(stride, tuple(dict.fromkeys(edge for edge, _ in own)), tuple(stacks)))
    return tuple(parts)


def computed_paths(paths: Sequence[Path], active: Sequence[bool] | Array | None) -> list[Any]:
    """Flags of the paths that are active and start in an input or in a node with such a path: Python's, or traced ones."""
    reached: dict[int, Any] = {0: True, 1: True}
    flags: list[Any] = [False] * len(paths)
    for node in NODES:
        into = [i for i, path in enumerate(paths) if path.node == node and path.operation != "none"]
        for i in into:
            flags[i] = reached[paths[i].source] & (True if active is None else active[i])
        reached[node] = reduce(or_, (flags[i] for i in into), False)
    return flags


@dataclass(frozen=True, eq=False)
class CellPlan:
    """What is fixed about a cell. eq=False: compared by identity, as a part of the static graph of a module."""

    kind: str
    paths: tuple[Path, ...]
    parts: tuple[Part, ...]
    channels: int


class PlannedCell(nnx.Module):
    """The operations of a cell: preprocessing of both inputs, and a module for each stack of paths, under its name."""

    def __init__(self, plan: CellPlan, before: int, last: int, reduced: bool, form: Form, rngs: nnx.Rngs, dtype: Any):
        self.plan = plan
        affine, first = form == "evaluation", FactorizedReduce if reduced else ConvNorm
        self.preprocess0 = first(1, before, plan.channels, affine, rngs, dtype)
        self.preprocess1 = ConvNorm(1, last, plan.channels, affine, rngs, dtype)
        for part in plan.parts:
            for stack in part.stacks:
                setattr(self, stack.name, make(stack.operation, len(stack.paths), plan.channels, part.stride, form, rngs, dtype))

    @property
    def stacks(self) -> list[Stack]:
        """The stacks of all parts."""
        return [stack for part in self.plan.parts for stack in part.stacks]


class MixedCell(PlannedCell):
    """A cell of the supernet: node = sum of weight * operation(source), output = concatenation of its nodes.

    One edge after the other runs through the same compiled code, all operations of the edge: XLA compiles a loop over 14 edges
    in the time of one. Inactive paths are branches that are not taken.
    """

    def __call__(self, s0: Array, s1: Array, weights: Array | None, active: Flags, key: Array | None) -> Array:
        """s0, s1: outputs of the two cells before, (N, H, W, C). weights: (paths,) or None for 1."""
        flags = self._flags(active)
        x = jnp.concatenate([self.preprocess0(nnx.relu(s0)[None]), self.preprocess1(nnx.relu(s1)[None])])
        stride = self.plan.parts[0].stride
        half = jax.eval_shape(lambda x: x[0, :, ::stride, ::stride], x)
        nodes = jnp.zeros((len(NODES), *half.shape), x.dtype)
        # in a reduction cell the inputs have another size, and edges from them a part of their own
        steps = jnp.concatenate([x if stride == 1 else jnp.zeros((2, *half.shape), x.dtype), nodes])
        for part in self.plan.parts:
            steps = self._add_edges(part, x if part.stride > 1 else None, steps, weights, flags, key)
        return jnp.concatenate(list(steps[2:]), -1)

    def _flags(self, active: Flags) -> list[bool] | Array:
        """Which paths to compute: Python flags if `active` has them, else an array."""
        flags = computed_paths(self.plan.paths, active)
        if isinstance(active, jax.Array):
            return jnp.stack([jnp.asarray(flag) for flag in flags])
        if not any(flags):
            raise ValueError(f"no path is active in the {'reduction' if self.plan.kind == 'reduce' else 'normal'} cell")
        return flags

    def _add_edges(
        self,
        part: Part,
        inputs: Array | None,
        steps: Array,
        weights: Array | None,
        flags: list[bool] | Array,
        key: Array | None,
    ) -> Array:
        """Add the paths of these edges to the nodes.

        steps: (6, N, H, W, C), inputs and nodes of the cell. inputs: where the edges start, (2, N, 2 H, 2 W, C); None: in steps.
        """
        edges, run = self._edges(part, weights, flags, key)
        if run is None:
            return steps

        def add_edge(steps: Array, edge: tuple) -> tuple[Array, None]:
            (node, source), paths = edge
            return _add_at(steps, node, run((steps if inputs is None else inputs)[source], paths)), None

        return lax.scan(add_edge, steps, edges)[0]

    def _edges(self, part: Part, weights: Array | None, flags: list[bool] | Array, key: Array | None) -> tuple[Any, Any]:
        """What a loop over the edges needs of each, and the function (source, what it needs) -> sum of the paths of the edge.

        None for the function if no path is computed.
        """
        static = isinstance(flags, list)
        edges = [
            e
            for e in part.edges
            if not static or any(flags[i] for s in part.stacks for i, p in zip(s.indices, s.paths) if p[:2] == e)
        ]
        each, runs = [], []
        for stack in part.stacks:
            number = {path[:2]: row for row, path in enumerate(stack.paths)}
            rows = np.array([number.get(edge, 0) for edge in edges], int)
            there = np.array([edge in number for edge in edges], bool)
            indices = np.array(stack.indices)[rows]
            computed = there & np.array(flags)[indices] if static else jnp.asarray(there) & flags[indices]
            if static and not computed.any():
                continue
            graph, state = nnx.split(getattr(self, stack.name))
            whole = len(rows) == len(stack.paths) and bool(there.all())
            each.append(
                {
                    "state": jax.tree.map(lambda a: (a if whole else a[rows])[:, None], state),  # noqa: B023
                    "scale": None if weights is None else weights[indices][:, None],
                    "computed": None if static and computed.all() else jnp.asarray(computed),
                    "index": jnp.asarray(indices, jnp.int32),
                }
            )
            runs.append(partial(_run_path, graph, key))
        if not runs:
            return None, None

        def run(x: Array, paths: list[dict]) -> Array:
            rectified = nnx.relu(x)
            return _sum([one(x, rectified, path) for one, path in zip(runs, paths)])

        ends = jnp.asarray([(node, source) for node, source in edges], jnp.int32)
        return ((ends[:, 0], ends[:, 1]), each), run


def _run_path(graph: Any, key: Array | None, x: Array, rectified: Array, path: dict) -> Array:
    """The weighted output of a path from x (N, H, W, C)."""

    # For the gradient only results of convolutions are kept, and norms, pools and ReLUs computed again: writing all
    # intermediate results takes longer, and twice the memory.
    @partial(jax.checkpoint, policy=_is_convolution, prevent_cse=False)  # within a loop XLA cannot undo it
    def compute(x: Array, rectified: Array, state: Any, scale: Array | None) -> Array:
        operation = nnx.merge(graph, state)
        if isinstance(operation, Rectified):
            return operation(rectified[None], None, scale)[0]
        if isinstance(operation, Pool):
            return operation(x[None], scale)[0]
        if isinstance(operation, Noise):
            if key is None:
                raise ValueError("key must be a jax.random key where noise operations are active, got None")
            return _scaled(operation(x, jax.random.fold_in(key, path["index"])), scale)
        return _scaled(x, scale)

    inputs = x, rectified, path["state"], path["scale"]
    if path["computed"] is None:
        return compute(*inputs)
    return lax.cond(path["computed"], compute, lambda *_: jnp.zeros_like(jax.eval_shape(compute, *inputs)), *inputs)


def _is_convolution(primitive: Any, *_: Any, **params: Any) -> bool:
    return primitive in (convolve_p, lax.dot_general_p, lax.conv_general_dilated_p)


def _add_at(steps: Array, index: Array, y: Array) -> Array:
    """Add y to an entry of the first axis; `steps.at[index].add(y)` takes longer on a CPU."""
    return lax.dynamic_update_index_in_dim(steps, lax.dynamic_index_in_dim(steps, index, 0, False) + y, index, 0)


def _sum(terms: Sequence[Array]) -> Array:
    return sum(terms[1:], terms[0])


def _scaled(x: Array, scale: Array | None) -> Array:
    return x if scale is None else x * scale[0].astype(x.dtype)


class Stem(nnx.Module):
    """3x3 convolution, batch norm with scale and shift. running: whether the norm has running statistics."""

    def __init__(self, channels: int, running: bool, rngs: nnx.Rngs, dtype: Any, image_channels: int = 3):
        self.kernel = uniform((3, 3, image_channels, channels), 9 * image_channels, rngs, dtype)
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
        image_channels: int = 3,
    ):
        stored, kinds = jnp.promote_types(dtype, jnp.float32), cell_kinds(layers)
        parts = {kind: parts_of(kind, space.paths(kind)) for kind in CELLS}
        stem, width = 3 * channels, channels
        self.dtype, self.stem = dtype, Stem(stem, False, rngs, stored, image_channels)
        plans = []
        before, last, reduced = stem, stem, False
        for i, kind in enumerate(kinds):
            width *= 2 if kind == "reduce" else 1
            plans.append(CellPlan(kind, space.paths(kind), parts[kind], width))
            setattr(self, f"cell{i}", MixedCell(plans[-1], before, last, reduced, "search", rngs, stored))
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
          active: for each cell type a flag of each path, whether to compute it; None: all. Python flags are compiled into the
            program, and a jax array of them is an input of it: one program for all, which takes as long as one with these flags.
          key: a `jax.random` key for noise operations, in the spaces that have them. Each draws the same numbers for the same
            key, whichever others are active.

        Raises:
          ValueError: weights of another shape, a cell without active path, or noise without key.
        """
        rows = self._rows(weights)
        s0 = s1 = self.stem(images.astype(self.dtype))
        for i, kind in enumerate(self.kinds):
            mask = None if active is None else active[kind]
            own = None if key is None else jax.random.fold_in(key, i)
            s0, s1 = s1, getattr(self, f"cell{i}")(s0, s1, rows[i], mask, own)
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
            for part in cell.parts
            for stack in part.stacks
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

        True for the parameters on which the logits depend: those of active paths that start in an input or in a node with such a
        path, and all others but for cells and their inputs that no computed path uses.

        is_active: for each cell type a flag of each path, (paths,); may be traced.
        """
        flags, uses = {}, {}
        for kind in CELLS:
            paths = self.space.paths(kind)
            found = computed_paths(paths, jnp.asarray(is_active[kind], bool))
            uses[kind] = [reduce(or_, (flag for flag, path in zip(found, paths) if path.source == s), False) for s in (0, 1)]
            flags[kind] = jnp.stack([jnp.asarray(flag) for flag in found])
        used = [jnp.asarray(False)] * (len(self.kinds) + 2)  # the stem as both inputs of the first cell, then the cells
        used[-1] = jnp.asarray(True)
        for i in reversed(range(len(self.kinds))):
            for source in (0, 1):
                used[i + source] |= used[i + 2] & uses[self.kinds[i]][source]
        stacks = self._stacks()

        def flag(name: tuple[str, ...], leaf: Array) -> Array:
            part, shape = name[0], (1,) * leaf.ndim
            if part == "stem":
                return (used[0] | used[1]).reshape(shape)
            if part == "classifier":
                return jnp.ones(shape, bool)
            i = int(part.removeprefix("cell"))
            if name[:2] not in stacks:  # preprocess0 or preprocess1
                return (used[i + 2] & uses[self.kinds[i]][int(name[1][-1])]).reshape(shape)
            cell, stack = stacks[name[:2]]
            return used[i + 2] & flags[cell.kind][np.array(stack.indices)].reshape(-1, *shape[1:])

        params = nnx.state(self, nnx.Param)
        return _like(params, {name: flag(name, leaf) for name, leaf in _flat(params).items()})


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


class Cell(PlannedCell):
    """A cell of an evaluation network: node = sum of operation(source), output = concatenation of its nodes.

    Paths of one operation from sources that are complete at the same time are computed together.
    """

    def __call__(self, s0: Array, s1: Array, dropping: Dropping) -> Array:
        x = {0: self.preprocess0(nnx.relu(s0)[None])[0], 1: self.preprocess1(nnx.relu(s1)[None])[0]}
        into = {node: sum(path.node == node for path in self.plan.paths) for node in NODES}
        terms: dict[int, list[Array]] = {node: [] for node in NODES if into[node]}
        started: set[tuple[str, int]] = set()
        while len(x) < 2 + len(terms):
            for stack in self.stacks:
                rows = [r for r, p in enumerate(stack.paths) if p.source in x and (stack.name, r) not in started]
                if rows:
                    started |= {(stack.name, row) for row in rows}
                    for row, y in zip(rows, self._run(stack, rows, x, dropping)):
                        terms[stack.paths[row].node].append(y)
            x |= {node: _sum(found) for node, found in terms.items() if node not in x and len(found) == into[node]}
        return jnp.concatenate([x[node] for node in sorted(terms)], -1)

    def _run(self, stack: Stack, rows: list[int], x: Mapping[int, Array], dropping: Dropping) -> list[Array]:
        """The outputs of these paths of a stack, each (N, H, W, C)."""
        operation = getattr(self, stack.name)
        sources = [stack.paths[row].source for row in rows]
        if isinstance(operation, Identity):
            return [x[source] for source in sources]
        if isinstance(operation, Rectified):
            rectified = {source: nnx.relu(x[source]) for source in set(sources)}
            outputs = list(operation(jnp.stack([rectified[source] for source in sources]), rows))
        elif isinstance(operation, Noise):
            outputs = [operation(x[source], dropping.next_key("noise operations")) for source in sources]
        else:
            pooled = {source: operation(x[source][None])[0] for source in set(sources)}
            outputs = [pooled[source] for source in sources]
        return dropping(outputs)


class Dropping:
    """Drop path, and the random numbers of one pass over a network. probability None: no path is dropped."""

    def __init__(self, probability: Array | float | None, key: Array | None):
        self.probability, self.key, self.count = probability, key, 0

    def next_key(self, use: str) -> Array:
        if self.key is None:
            raise ValueError(f"key must be a jax.random key for {use}, got None")
        self.count += 1
        return jax.random.fold_in(self.key, self.count)

    def __call__(self, outputs: list[Array]) -> list[Array]:
        """Set samples of each output to 0 with the probability, and scale the others up."""
        if self.probability is None:
            return outputs
        keep = 1 - jnp.asarray(self.probability, jnp.float32)
        drawn = jax.random.uniform(self.next_key("drop_path"), (len(outputs), len(outputs[0]), 1, 1, 1), jnp.float32)
        return [x * ((u < keep) / keep).astype(x.dtype) for x, u in zip(outputs, drawn)]


class AuxiliaryHead(nnx.Module):
    """A second classifier on an 8x8 map; its loss is added in training."""

    def __init__(self, channels: int, classes: int, rngs: nnx.Rngs, dtype: Any):
        self.narrow = ConvNorm(1, channels, 128, True, rngs, dtype)
        self.kernel = uniform((2, 2, 128, 768), 4 * 128, rngs, dtype)
        self.norm = BatchNorm(1, 768, True, dtype)
        self.classifier = Linear(768, classes, rngs, dtype)

    def __call__(self, x: Array) -> Array:
        """Return the logits of a map (N, H, W, C); raise ValueError if it is not 8x8, which a network has for 32x32 images."""
        if x.shape[1:3] != (8, 8):
            raise ValueError(f"images must be 32x32 for the auxiliary head, got {4 * x.shape[1]}x{4 * x.shape[2]}")
        x = nnx.relu(x)
        pooled = jnp.stack([x[:, i : i + 5, j : j + 5].mean((1, 2)) for i in (0, 3) for j in (0, 3)], 1)
        x = nnx.relu(self.narrow(pooled.reshape(1, len(x), 2, 2, -1))[0])
        x = jnp.einsum("nhwc,hwcd->nd", x, self.kernel[...].astype(x.dtype))
        return self.classifier(nnx.relu(self.norm(x[None, :, None, None])[0, :, 0, 0]))


class Network(nnx.Module):
    """The evaluation network of a genotype for CIFAR.

    All batch norms have scale and shift, and running statistics, which a pass in training mode updates (`nnx.BatchStat`).
    `net.train()` and `net.eval()` set the mode.
    """

    def __init__(
        self,
        genotype: Genotype,
        channels: int = 36,
        layers: int = 20,
        classes: int = 10,
        auxiliary: bool = True,
        *,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        image_channels: int = 3,
    ):
        stored, kinds, genotype = jnp.promote_types(dtype, jnp.float32), cell_kinds(layers), genotype.clean()
        stem = 3 * channels
        self.dtype, self.layers, self.deterministic = dtype, layers, False
        self.stem = Stem(stem, True, rngs, stored, image_channels)
        before = last = stem
        reduced = False
        for i, kind in enumerate(kinds):
            if not genotype.active_nodes(kind):
                raise ValueError(f"no path of the genotype reaches an input of the {kind} cell")
            channels *= 2 if kind == "reduce" else 1
            paths = genotype.paths(kind)
            plan = CellPlan(kind, paths, parts_of(kind, paths), channels)
            setattr(self, f"cell{i}", Cell(plan, before, last, reduced, "evaluation", rngs, stored))
            before, last, reduced = last, channels * len(genotype.active_nodes(kind)), kind == "reduce"
            if i == 2 * layers // 3 and auxiliary:
                self.auxiliary = AuxiliaryHead(last, classes, rngs, stored)
        self.classifier = Linear(last, classes, rngs, stored)

    def __call__(
        self, images: Array, drop_path: Array | float | None = None, key: Array | None = None
    ) -> tuple[Array, Array | None]:
        """Return the logits (N, classes) and those of the auxiliary head, or None in evaluation mode or if there is none.

        Args:
          images: (N, H, W, 3), H and W divisible by 4, and 32 if the auxiliary head is used.
          drop_path: probability of drop path in training mode, for each path and sample; may be traced. None: none.
          key: a `jax.random` key for drop path.

        Raises:
          ValueError: drop path without key, or images of another size with an auxiliary head.
        """
        dropping, auxiliary = Dropping(None if self.deterministic else drop_path, key), None
        s0 = s1 = self.stem(images.astype(self.dtype))
        for i in range(self.layers):
            s0, s1 = s1, getattr(self, f"cell{i}")(s0, s1, dropping)
            if i == 2 * self.layers // 3 and hasattr(self, "auxiliary") and not self.deterministic:
                auxiliary = self.auxiliary(s1)
        return self.classifier(s1.mean((1, 2))), auxiliary


def genotype_size(found: Genotype) -> dict[str, int]:
    """The parameters and multiply-adds of the network of 20 cells and 36 channels of a genotype, for an image of CIFAR."""
    return network_size(nnx.eval_shape(lambda: Network(found, auxiliary=False, rngs=nnx.Rngs(0))))


def network_size(net: nnx.Module, input_shape: Sequence[int] = (32, 32, 3)) -> dict[str, int]:
    """Count the parameters and the multiply-adds of convolutions and linear layers for one image, without the auxiliary head.

    Nothing is computed: the network may be abstract, as `nnx.eval_shape(lambda: Network(genotype, rngs=nnx.Rngs(0)))` makes it.

    input_shape: (H, W, 3). Returns {"parameters": ..., "macs": ...}.
    """
    graph, state = nnx.split(net)

    def logits(state: nnx.State, images: Array) -> Any:
        whole = nnx.merge(graph, state)
        whole.eval()
        return whole(images)

    jaxpr = jax.make_jaxpr(logits)(state, jax.ShapeDtypeStruct((1, *input_shape), jnp.float32))
    params = nnx.to_flat_state(nnx.state(net, nnx.Param))
    counted = [variable.get_value() for name, variable in params if name[0] != "auxiliary"]
    return {"parameters": sum(math.prod(p.shape) for p in counted), "macs": _macs(jaxpr.jaxpr)}


def _macs(jaxpr: Any) -> int:
    """The multiply-adds of the matrix products and convolutions of a program."""
    total = 0
    for equation in jaxpr.eqns:
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for inner in jax.tree.leaves(list(equation.params.values())):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                total += times * _macs(getattr(inner, "jaxpr", inner))
        outputs, shapes = equation.outvars[0].aval.shape, [v.aval.shape for v in equation.invars]
        if equation.primitive.name == "dot_general":
            contracted = equation.params["dimension_numbers"][0][0]
            total += math.prod(outputs) * math.prod(shapes[0][axis] for axis in contracted)
        elif equation.primitive.name == "conv_general_dilated":
            features = shapes[1][equation.params["dimension_numbers"].rhs_spec[0]]
            total += math.prod(outputs) * math.prod(shapes[1]) // features
        elif equation.primitive is convolve_p:
            total += math.prod(outputs) * shapes[1][1] ** 2
        elif equation.primitive is dense_p:
            total += math.prod(outputs) * math.prod(shapes[1][1:4])
    return total
