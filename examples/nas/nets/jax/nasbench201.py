"""Networks of NAS-Bench-201 in JAX: the supernet of a search, and the network of a cell.

    net = Supernet(get_space("nasbench201"), channels=16, layers=17, classes=10, rngs=nnx.Rngs(0))
    graph, params = nnx.split(net, nnx.Param)
    logits = nnx.merge(graph, params)(images, {"cell": a}, active)

Both compute what the PyTorch networks of the same names compute, for images (N, H, W, 3). All paths with the same source and
kernel size are one convolution and one batch norm. Under `jax.vmap` the networks of several seeds run in one program.

Source: Dong, Yang, "NAS-Bench-201: Extending the scope of reproducible neural architecture search", ICLR 2020.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from ...space.genotype import CellGenotype, Path
from ...space.spaces import Masks, Space, Weights
from ..nasbench201 import KERNELS, LAST, PUBLISHED, Transition, layer_kinds, read_paths
from . import cnn
from .cnn import Flags, Linear, Place, _flat, _like
from .convolution_kernels import avg_pool
from .dense_convolution import convolve
from .operations import EPS, BatchNorm, uniform


@dataclass(frozen=True, eq=False)
class Group:
    """Paths of one operation from one source. indices: of the paths in their cell. nodes: into which they lead."""

    name: str
    operation: str
    source: int
    indices: tuple[int, ...]
    nodes: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class CellPlan:
    """What is fixed about a searched cell. eq=False: compared by identity, as a part of the static graph of a module."""

    paths: tuple[Path, ...]
    groups: tuple[Group, ...]
    channels: int
    path_norm: bool


def groups_of(paths: Sequence[Path]) -> tuple[Group, ...]:
    """The paths of a cell by source and operation, without those of the zero operation."""
    members: dict[tuple[int, str], list[int]] = {}
    for i, path in enumerate(paths):
        if path.operation != "none":
            members.setdefault((path.source, path.operation), []).append(i)
    return tuple(
        Group(f"{name}_from_{source}", name, source, tuple(own), tuple(paths[i].node for i in own))
        for (source, name), own in sorted(members.items())
    )


class Kernels(nnx.Module):
    """The kernels of the convolutions of a group of paths, stacked along the first axis."""

    def __init__(self, paths: int, size: int, channels: int, rngs: nnx.Rngs, dtype: Any):
        self.kernel = uniform((paths, size, size, channels, channels), size**2 * channels, rngs, dtype)

    def __call__(self, rectified: Array, rows: Sequence[int]) -> Array:
        """The convolutions of these paths, one after the other along the channels: (N, H, W, len(rows) * C)."""
        kernels = self.kernel[...]
        chosen = kernels if len(rows) == len(kernels) else kernels[np.array(rows)]
        joined = chosen.transpose(1, 2, 3, 0, 4)
        return convolve(rectified, joined.reshape(*joined.shape[:3], -1))


def normalised(x: Array, scale: Array | None = None) -> Array:
    """Batch norm of each channel without shift, (N, H, W, C), in float32 or wider. scale: (C,) or None for 1."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = wide.mean((0, 1, 2))
    factor = lax.rsqrt(jnp.square(wide - mean).mean((0, 1, 2)) + EPS)
    return ((wide - mean) * (factor if scale is None else factor * scale)).astype(x.dtype)


class MixedCell(nnx.Module):
    """A cell of the supernet: node = sum of weight * operation(source); the output is node 3."""

    def __init__(self, plan: CellPlan, rngs: nnx.Rngs, dtype: Any):
        self.plan = plan
        for group in plan.groups:
            if group.operation in KERNELS:
                setattr(self, group.name, Kernels(len(group.indices), KERNELS[group.operation], plan.channels, rngs, dtype))

    def __call__(self, x: Array, weights: Array | None, active: Flags) -> Array:
        """Return node 3. weights: of the paths, (paths,), or None for 1. active: as in `Supernet`."""
        plan = self.plan
        if isinstance(active, jax.Array):  # flags that the program does not contain multiply the weights
            weights = active.astype(x.dtype) if weights is None else jnp.where(active, weights, 0)
            active = None
        computed = read_paths(plan.paths, active)
        nodes: dict[int, Array] = {0: x}
        for source in (0, *CellGenotype.layout.nodes[:-1]):
            own = {
                group: [row for row, i in enumerate(group.indices) if computed[i]]
                for group in plan.groups
                if group.source == source and any(computed[i] for i in group.indices)
            }
            for group, row, y in self._outputs(own, nodes[source], weights) if own else ():
                node = group.nodes[row]
                nodes[node] = nodes[node] + y if node in nodes else y
        return nodes.get(LAST, jnp.zeros_like(x))

    def _outputs(self, groups: Mapping[Group, list[int]], x: Array, weights: Array | None) -> list[tuple[Group, int, Array]]:
        """The weighted outputs of paths from one source: (group, row in the group, output).

        One batch norm normalises the channels of all paths, as XLA compiles each for a long time.
        """
        channels, path_norm = self.plan.channels, self.plan.path_norm
        rectified = nnx.relu(x)
        maps, scales, found = [], [], []
        for group, rows in groups.items():
            own = None if weights is None else weights[np.array(group.indices)[rows]]
            if group.operation in KERNELS:
                maps.append(getattr(self, group.name)(rectified, rows))
                scales.append(None if own is None else jnp.repeat(own, channels))
                continue
            y = x if group.operation == "skip_connect" else avg_pool(x, 1)
            if path_norm:
                maps.append(y)
                scales.append(None if own is None else jnp.ones(channels, own.dtype))
            else:
                found += [(group, row, _scaled(y, own, k)) for k, row in enumerate(rows)]
        if not maps:
            return found
        y = normalised(jnp.concatenate(maps, -1), None if weights is None else jnp.concatenate(scales))
        parts = iter(jnp.split(y, y.shape[-1] // channels, -1))
        for group, rows in groups.items():
            if group.operation in KERNELS:
                found += [(group, row, next(parts)) for row in rows]
            elif path_norm:
                part = next(parts)
                own = None if weights is None else weights[np.array(group.indices)[rows]]
                found += [(group, row, _scaled(part, own, k)) for k, row in enumerate(rows)]
        return found


def _scaled(x: Array, weights: Array | None, index: int) -> Array:
    return x if weights is None else x * weights[index].astype(x.dtype)


class Stem(cnn.Stem):
    """The stem of `cnn`, by a convolution that is fast under `jax.vmap`."""

    def __call__(self, images: Array) -> Array:
        return self.norm(convolve(images, self.kernel[...])[None])[0]


class ReluConvNorm(nnx.Module):
    """ReLU, convolution, batch norm with scale and shift."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int, running: bool, rngs: nnx.Rngs, dtype: Any):
        self.kernel = uniform((size, size, inputs, outputs), size**2 * inputs, rngs, dtype)
        self.norm = BatchNorm(1, outputs, True, dtype, running)
        self.stride = stride

    def __call__(self, x: Array) -> Array:
        return self.norm(convolve(nnx.relu(x), self.kernel[...], self.stride)[None])[0]


class ResidualBlock(nnx.Module):
    """The published transition: two 3x3 convolutions, the first of stride 2, beside a 2x2 mean and a 1x1 convolution."""

    def __init__(self, channels: int, running: bool, rngs: nnx.Rngs, dtype: Any):
        self.first = ReluConvNorm(channels, 2 * channels, 3, 2, running, rngs, dtype)
        self.second = ReluConvNorm(2 * channels, 2 * channels, 3, 1, running, rngs, dtype)
        self.shortcut = uniform((1, 1, channels, 2 * channels), channels, rngs, dtype)

    def __call__(self, x: Array) -> Array:
        return self.second(self.first(x)) + convolve(_squares(x).mean(-2), self.shortcut[...])


class Patches(nnx.Module):
    """A convolution of disjoint patches of 2x2 pixels, and a batch norm with scale and shift."""

    def __init__(self, channels: int, running: bool, rngs: nnx.Rngs, dtype: Any):
        self.kernel = uniform((2, 2, channels, 2 * channels), 4 * channels, rngs, dtype)
        self.norm = BatchNorm(1, 2 * channels, True, dtype, running)

    def __call__(self, x: Array) -> Array:
        pixels, kernel = _squares(x), self.kernel[...]
        return self.norm(convolve(pixels.reshape(*pixels.shape[:3], -1), kernel.reshape(1, 1, -1, kernel.shape[-1]))[None])[0]


TRANSITIONS = {"residual": ResidualBlock, "patch": Patches}


def _squares(x: Array) -> Array:
    """The pixels of disjoint squares of two by two, (N, H, W, C) -> (N, H / 2, W / 2, 4, C)."""
    images, height, width, channels = x.shape
    squares = x.reshape(images, height // 2, 2, width // 2, 2, channels).transpose(0, 1, 3, 2, 4, 5)
    return squares.reshape(images, height // 2, width // 2, 4, channels)


@dataclass(frozen=True, eq=False)
class Plan:
    """What is fixed about a supernet. kinds: of the layers."""

    space: Space
    kinds: tuple[str, ...]


class Supernet(nnx.Module):
    """A network with all paths of a space in every cell: node = sum over its paths of weight * operation(source).

    All batch norms use the statistics of the batch.

    Args:
      space: a space of cells of NAS-Bench-201.
      dtype: of the computation; parameters and statistics are float32 (float64 if it is).
      path_norm: every path ends in a batch norm without scale and shift, and its weight is the scale of that norm. False, as
        published: convolutions only; skips and pools are multiplied by their weights.
      transition: the layers between stages. "residual": the published residual blocks of stride 2. "patch": a convolution of
        disjoint patches of 2x2 pixels and a batch norm, so that only the cells combine neighbouring pixels otherwise.
    """

    def __init__(
        self,
        space: Space,
        channels: int = 16,
        layers: int = 17,
        classes: int = 10,
        *,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        image_channels: int = 3,
        path_norm: bool = False,
        transition: Transition = "residual",
    ):
        stored = jnp.promote_types(dtype, jnp.float32)
        self.dtype, self.plan = dtype, Plan(space, tuple(layer_kinds(layers)))
        self.stem = Stem(channels, False, rngs, stored, image_channels)
        paths, width = space.paths("cell"), channels
        groups = groups_of(paths)
        for i, kind in enumerate(self.kinds):
            if kind == "cell":
                made: nnx.Module = MixedCell(CellPlan(paths, groups, width, path_norm), rngs, stored)
            else:
                made = TRANSITIONS[transition](width, False, rngs, stored)
                width *= 2
            setattr(self, f"cell{i}", made)
        self.norm = BatchNorm(1, width, True, stored, False)
        self.classifier = Linear(width, classes, rngs, stored)

    @property
    def space(self) -> Space:
        """The search space."""
        return self.plan.space

    @property
    def kinds(self) -> list[str]:
        """The kind of each layer, "cell" or "reduce"."""
        return list(self.plan.kinds)

    def __call__(
        self, images: Array, weights: Weights | None = None, active: Masks | None = None, key: Array | None = None
    ) -> Array:
        """Return the logits (N, classes), float32 or wider.

        A path whose source has no active path is not computed, nor one into a node that is not read. The output of a cell in
        which no active path leads to node 3 is 0.

        Args:
          images: (N, H, W, 3), H and W divisible by 4.
          weights: {"cell": (paths,)} in the order of `space.paths("cell")`, shared by all cells, or (cells, paths). None: all 1.
          active: {"cell": a flag of each path}; None: all. Python flags are compiled into the program, which then lacks the
            other paths. A jax array of them is an input of it: the program computes all paths, and weights of others are 0.
          key: not used, as the space has no noise operation.

        Raises:
          ValueError: weights of another shape.
        """
        del key
        rows = iter(self._rows(weights))
        mask = None if active is None else active["cell"]
        x = self.stem(images.astype(self.dtype))
        for i, kind in enumerate(self.kinds):
            layer = getattr(self, f"cell{i}")
            x = layer(x, next(rows), mask) if kind == "cell" else layer(x)
        return self.classifier(nnx.relu(self.norm(x[None])[0]).mean((1, 2)))

    def _rows(self, weights: Weights | None) -> Sequence[Array | None]:
        """The weights of the paths of each cell."""
        cells, paths = self.kinds.count("cell"), len(self.space.paths("cell"))
        if weights is None:
            return [None] * cells
        given = jnp.asarray(weights["cell"])
        if given.shape not in ((paths,), (cells, paths)):
            raise ValueError(f"cell: weights have shape ({paths},) or ({cells}, {paths}), got {given.shape}")
        return [given] * cells if given.ndim == 1 else list(given)

    def _groups(self) -> dict[tuple[str, str], Group]:
        """The group whose kernels have a path in the state that begins with (cell, group)."""
        cells = [i for i, kind in enumerate(self.kinds) if kind == "cell"]
        return {(f"cell{i}", group.name): group for i in cells for group in getattr(self, f"cell{i}").plan.groups}

    def path_parameters(self) -> dict[tuple[str, Path], list[Place]]:
        """For each (cell type, path) the places of its parameters in all cells.

        A place is the path of a leaf in `nnx.to_flat_state(nnx.state(net, nnx.Param))`, and an index of its first axis.
        """
        paths, groups = self.space.paths("cell"), self._groups()
        places: dict[tuple[str, Path], list[Place]] = {("cell", path): [] for path in paths}
        for name in sorted(_flat(nnx.state(self, nnx.Param))):
            for row, i in enumerate(groups[name[:2]].indices if name[:2] in groups else ()):
                places["cell", paths[i]].append((name, row))
        return places

    def trained(self, is_active: Mapping[str, Array]) -> nnx.State:
        """Which parameters a weight step updates: flags that broadcast against the parameters, in a state of their structure.

        True for the parameters on which the logits depend: those of active paths on a way from input to output, and all others.
        Without such a way the logits depend on the layers after the last cell only.

        is_active: {"cell": a flag of each path, (paths,)}; may be traced.
        """
        read = read_paths(self.space.paths("cell"), jnp.asarray(is_active["cell"], bool))
        flags, groups = jnp.stack([jnp.asarray(flag) for flag in read]), self._groups()
        last = max(i for i, kind in enumerate(self.kinds) if kind == "cell")
        behind = {"norm", "classifier", *(f"cell{i}" for i in range(last + 1, len(self.kinds)))}

        def flag(name: tuple[str, ...], leaf: Array) -> Array:
            shape = (1,) * leaf.ndim
            if name[:2] in groups:
                return flags[np.array(groups[name[:2]].indices)].reshape(-1, *shape[1:])
            return jnp.full(shape, True) if name[0] in behind else flags.any().reshape(shape)

        params = nnx.state(self, nnx.Param)
        return _like(params, {name: flag(name, leaf) for name, leaf in _flat(params).items()})


class Cell(nnx.Module):
    """The cell of a genotype: node = sum of operation(source); the output is node 3. A node without paths is 0."""

    def __init__(self, paths: tuple[Path, ...], channels: int, rngs: nnx.Rngs, dtype: Any):
        self.plan = CellPlan(paths, (), channels, False)
        for i, path in enumerate(paths):
            if path.operation in KERNELS:
                made = ReluConvNorm(channels, channels, KERNELS[path.operation], 1, True, rngs, dtype)
                setattr(self, f"path{i}", made)

    def __call__(self, x: Array) -> Array:
        nodes = {0: x}
        for node in CellGenotype.layout.nodes:
            terms = [self._run(i, nodes[path.source]) for i, path in enumerate(self.plan.paths) if path.node == node]
            nodes[node] = sum(terms[1:], terms[0]) if terms else jnp.zeros_like(x)
        return nodes[LAST]

    def _run(self, path: int, x: Array) -> Array:
        operation = self.plan.paths[path].operation
        if operation in KERNELS:
            return getattr(self, f"path{path}")(x)
        return avg_pool(x, 1) if operation == "avg_pool_3x3" else x


class Network(nnx.Module):
    """The network of a cell. It returns (logits, None), as it has no auxiliary head.

    Its parameters and multiply-adds are those of the benchmark, which counts operations whose result is 0 or is not used too.
    All batch norms have scale and shift, and running statistics, which a pass in training mode updates (`nnx.BatchStat`).
    """

    def __init__(
        self,
        genotype: CellGenotype,
        channels: int = PUBLISHED["channels"],
        layers: int = PUBLISHED["layers"],
        classes: int = 10,
        *,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        image_channels: int = 3,
    ):
        stored = jnp.promote_types(dtype, jnp.float32)
        self.dtype, self.layers = dtype, layers
        self.stem = Stem(channels, True, rngs, stored, image_channels)
        for i, kind in enumerate(layer_kinds(layers)):
            if kind == "cell":
                made: nnx.Module = Cell(genotype.paths("cell"), channels, rngs, stored)
            else:
                made = ResidualBlock(channels, True, rngs, stored)
                channels *= 2
            setattr(self, f"cell{i}", made)
        self.norm = BatchNorm(1, channels, True, stored)
        self.classifier = Linear(channels, classes, rngs, stored)

    def __call__(self, images: Array) -> tuple[Array, None]:
        """Return the logits (N, classes) of images (N, H, W, 3), H and W divisible by 4, and None."""
        x = self.stem(images.astype(self.dtype))
        for i in range(self.layers):
            x = getattr(self, f"cell{i}")(x)
        return self.classifier(nnx.relu(self.norm(x[None])[0]).mean((1, 2))), None


def genotype_size(found: CellGenotype) -> dict[str, int]:
    """The parameters and multiply-adds of the published network of a cell, for an image of CIFAR-10."""
    return cnn.network_size(nnx.eval_shape(lambda: Network(found, rngs=nnx.Rngs(0))))
