"""Networks of NAS-Bench-201: the supernet of a search, and the network of a cell.

    net = Supernet(get_space("nasbench201"), channels=16, layers=17, classes=10)
    logits = net(images, {"cell": a})                            # a: a weight for each path of the cell, which multiplies it
    logits = net(images, {"cell": a}, active)                    # active: a flag for each path; others are not computed

    net = Network(CellGenotype.from_string("|nor_conv_3x3~0|+|none~0|skip_connect~1|+|skip_connect~0|none~1|nor_conv_1x1~2|"))
    logits, _ = net(images)

A layer is the searched cell or, at one and two thirds of the depth, a residual block of stride 2 without paths, which doubles the
channels; 17 layers are the published three stages of N = 5 cells, 5 layers those of one cell.

Source: Dong, Yang, "NAS-Bench-201: Extending the scope of reproducible neural architecture search", ICLR 2020.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...space.genotype import CellGenotype, Path
from ...space.spaces import Masks, Space, Weights
from ..nasbench201 import KERNELS, LAST, PUBLISHED, Transition, layer_kinds, read_paths
from .cnn import conv3x3, drop, network_size, total
from .convolution_kernels import mean_of_pixels
from .operations import BatchNorm


class Supernet(nn.Module):
    r"""A network with all paths of a space in every cell.

    .. math:: x_j = \sum_{(i, o) \to j} w_{ijo} \, o(x_i)

    The weights of a call are a vector in the order of ``space.paths("cell")`` for all cells, or a matrix (cells, paths); None:
    all are 1. Every path has parameters of its own, but the active paths with the same source and kernel size are computed by
    one convolution and one batch norm, whose scale holds their weights. Batch norms of paths have no scale and shift otherwise;
    all others have both.

    Args:
      path_norm: whether all paths end in a batch norm, with their weight as its scale. False, as published: only convolutions do;
        skips and pools are multiplied by their weights.
      transition: the layers between stages. "residual": the published residual blocks of stride 2. "patch": a convolution of
        disjoint patches of 2x2 pixels and a batch norm, so that only the cells combine neighbouring pixels otherwise.
      drop_path: the probability in training mode; searches set the attribute. A number acts on the sum of the operations of each
        edge, a tensor on each operation.

    Raises:
      ValueError: too few layers for a cell.
    """

    def __init__(
        self,
        space: Space,
        channels: int = 16,
        layers: int = 17,
        classes: int = 10,
        image_channels: int = 3,
        path_norm: bool = False,
        transition: Transition = "residual",
        drop_path: float | Tensor = 0.0,
    ):
        super().__init__()
        self.space, self.channels, self.drop_path = space, channels, drop_path
        self.kinds = layer_kinds(layers)
        self.stem = nn.Sequential(conv3x3(image_channels, channels), BatchNorm(channels))
        made: list[nn.Module] = []
        width = channels
        for kind in self.kinds:
            cell = (space.paths("cell"), width, path_norm)
            made.append(self.make_cell(*cell) if kind == "cell" else TRANSITIONS[transition](width))
            width *= 1 if kind == "cell" else 2
        self.cells = nn.ModuleList(made)
        self.norm = BatchNorm(width)
        self.classifier = nn.Linear(width, classes)
        self.to(memory_format=torch.channels_last)

    def make_cell(self, *sizes: Any) -> MixedCell:
        return MixedCell(*sizes)

    def forward(self, images: Tensor, weights: Weights | None = None, active: Masks | None = None) -> Tensor:
        """Return the logits (N, classes) of images (N, image_channels, H, W), H and W divisible by 4.

        A path whose source has no active path is not computed, nor one into a node that is not read. The output of a cell in
        which no active path leads to node 3 is 0.
        """
        return self.outputs(images, weights, active)[0]

    def outputs(self, images: Tensor, weights: Weights | None = None, active: Masks | None = None) -> tuple[Tensor, None]:
        """The logits; and None, as the network has no auxiliary head."""
        rows = iter(self._rows(weights))
        mask = None if active is None else active["cell"]
        x = self.stem(images.contiguous(memory_format=torch.channels_last))
        for kind, cell in zip(self.kinds, self.cells):
            x = cell(x, next(rows), mask, self.drop_path) if kind == "cell" else cell(x)
        return self.classifier(mean_of_pixels(F.relu(self.norm(x)))), None

    def _rows(self, weights: Weights | None) -> Sequence[Tensor | None]:
        """The weights of the paths of each cell."""
        cells, paths = self.kinds.count("cell"), len(self.space.paths("cell"))
        if weights is None:
            return [None] * cells
        w = weights["cell"]
        if w.shape not in ((paths,), (cells, paths)):
            raise ValueError(f"cell: weights have shape ({paths},) or ({cells}, {paths}), got {tuple(w.shape)}")
        return [w] * cells if w.ndim == 1 else w.unbind()

    def path_parameters(self) -> dict[tuple[str, Path], list[nn.Parameter]]:
        """For each (cell type, path) its parameters in all cells; skips and pools have none."""
        searched = [cell for cell in self.cells if isinstance(cell, MixedCell)]
        return {
            ("cell", path): [p for cell in searched for p in cell.operation(i).parameters()]
            for i, path in enumerate(self.space.paths("cell"))
        }


class MixedCell(nn.Module):
    """A cell of the supernet: parameters path by path, computation by groups of paths with one source.

    The paths of a group have the same source and operation. Convolutions of a group run as one, and share a batch norm module
    with the channels of all its paths; a pool or skip is computed once for its group.
    """

    def __init__(self, paths: Sequence[Path], channels: int, path_norm: bool):
        super().__init__()
        self.paths, self.channels = tuple(paths), channels
        self.operations = nn.ModuleDict()
        self.groups: dict[tuple[int, str], list[int]] = {}
        self.norms = nn.ModuleDict()
        for i, path in enumerate(self.paths):
            if path.operation in KERNELS:
                kernel = KERNELS[path.operation]
                self.operations[str(i)] = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, bias=False)
            if path.operation != "none":
                self.groups.setdefault((path.source, path.operation), []).append(i)
        for (source, name), members in self.groups.items():
            if name in KERNELS:
                self.norms[f"{name}_from_{source}"] = PathNorm(len(members), channels)
            elif path_norm:
                self.norms[f"{name}_from_{source}"] = BatchNorm(channels, affine=False)

    def operation(self, path: int) -> nn.Module:
        """The module with the parameters of the path of this index."""
        return self.operations[str(path)] if str(path) in self.operations else nn.Identity()

    def forward(
        self, x: Tensor, weights: Tensor | None, active: Sequence[bool] | None, drop_path: float | Tensor = 0.0
    ) -> Tensor:
        """Return node 3. weights: of the paths, (paths,)."""
        computed = {i for i, read in enumerate(read_paths(self.paths, active)) if read}
        scales = None if weights is None else weights[:, None].expand(-1, self.channels)
        terms: dict[int, dict[int, list[Tensor]]] = {node: {} for node in CellGenotype.layout.nodes}  # by node and source
        for source in (0, *CellGenotype.layout.nodes[:-1]):
            found = x if source == 0 else self._sum(terms[source], drop_path)
            if found is None:
                continue
            rectified, seen = None, self.seen(found)
            results: dict[int, list[Tensor]] = {}  # by node
            for (start, name), members in self.groups.items():
                own = tuple(i for i in members if i in computed) if start == source else ()
                if not own:
                    continue
                if name in KERNELS:
                    rectified = F.relu(seen) if rectified is None else rectified
                    parts = self._convolved(rectified, name, source, own, scales)
                else:
                    parts = self._plain(seen, name, source, own, weights)
                for i, part in zip(own, parts):
                    results.setdefault(self.paths[i].node, []).append(part)
            for node, parts in results.items():
                terms[node][source] = self.edge(found, (node, source), parts, weights)
        out = self._sum(terms[LAST], drop_path)
        return torch.zeros_like(x) if out is None else out

    def seen(self, x: Tensor) -> Tensor:
        """The part of a source that the operations see: all of it."""
        return x

    def edge(self, x: Tensor, edge: tuple[int, int], parts: list[Tensor], weights: Tensor | None) -> list[Tensor]:
        """The terms of a node from the results of the operations of an edge (node, source): the same. x: the source."""
        return parts

    def _convolved(
        self, rectified: Tensor, name: str, source: int, own: tuple[int, ...], scales: Tensor | None
    ) -> Sequence[Tensor]:
        """The convolutions of the paths `own` from a source, each with its batch norm and weight."""
        members, norm = self.groups[source, name], self.norms[f"{name}_from_{source}"]
        kernels = torch.cat([self.operations[str(i)].weight for i in own])
        y = F.conv2d(rectified, kernels, padding=KERNELS[name] // 2)
        scale = None if scales is None else torch.cat([scales[i] for i in own])
        return norm.of(y, [members.index(i) for i in own], scale).chunk(len(own), 1)

    def _plain(self, x: Tensor, name: str, source: int, own: tuple[int, ...], weights: Tensor | None) -> Sequence[Tensor]:
        """A skip or pool, computed once and multiplied by the weight of each of the paths `own`."""
        y = x if name == "skip_connect" else F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        key = f"{name}_from_{source}"
        if key in self.norms:
            y = self.norms[key](y)
        return [y if weights is None else y * weights[i].to(y.dtype) for i in own]

    def _sum(self, edges: Mapping[int, Sequence[Tensor]], drop_path: float | Tensor) -> Tensor | None:
        """A node: the sum of the operations of its edges, after drop path."""
        if self.training and not isinstance(drop_path, Tensor) and drop_path > 0:
            parts = [drop(total(edge), drop_path) for edge in edges.values()]
        else:
            parts = [drop(y, drop_path) if self.training else y for edge in edges.values() for y in edge]
        return total(parts) if parts else None


class PathNorm(BatchNorm):
    """Batch norm without scale and shift for several paths of the same number of channels, of which some may be absent."""

    def __init__(self, paths: int, channels: int):
        super().__init__(paths * channels, affine=False)
        self.paths = paths

    def of(self, x: Tensor, present: Sequence[int], scale: Tensor | None) -> Tensor:
        """Normalise the channels of the paths `present`, and multiply them by `scale`."""
        mean, var = self._running()
        if len(present) == self.paths or mean is None or var is None:
            return self(x, scale)
        rows = [(mean.chunk(self.paths)[i], var.chunk(self.paths)[i]) for i in present]
        own_mean, own_var = torch.cat([m for m, _ in rows]), torch.cat([v for _, v in rows])
        y = F.batch_norm(x, own_mean, own_var, scale, None, self.training, self._momentum(), self.eps)
        if self.training:
            for (m, v), new_mean, new_var in zip(rows, own_mean.chunk(len(rows)), own_var.chunk(len(rows))):
                m.copy_(new_mean)
                v.copy_(new_var)
        return y


class ReluConvNorm(nn.Sequential):
    """ReLU, convolution, batch norm with scale and shift."""

    def __init__(self, channels_in: int, channels: int, kernel: int, stride: int = 1):
        conv = nn.Conv2d(channels_in, channels, kernel, stride, padding=kernel // 2, bias=False)
        super().__init__(nn.ReLU(), conv, BatchNorm(channels))


class ResidualBlock(nn.Module):
    """The published transition: 3x3 convolutions of strides 2 and 1, beside a mean of 2x2 pixels and a 1x1 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.first = ReluConvNorm(channels, 2 * channels, 3, stride=2)
        self.second = ReluConvNorm(2 * channels, 2 * channels, 3)
        self.shortcut = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(channels, 2 * channels, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) + self.shortcut(x)


def patches(channels: int) -> nn.Sequential:
    """A convolution of disjoint patches of 2x2 pixels, and a batch norm."""
    return nn.Sequential(nn.Conv2d(channels, 2 * channels, 2, 2, bias=False), BatchNorm(2 * channels))


TRANSITIONS = {"residual": ResidualBlock, "patch": patches}


class Cell(nn.Module):
    """The cell of a genotype: node = sum of operation(source); the output is node 3. A node without paths is 0."""

    def __init__(self, paths: Sequence[Path], channels: int):
        super().__init__()
        self.paths = tuple(paths)
        self.operations = nn.ModuleList(
            ReluConvNorm(channels, channels, KERNELS[path.operation])
            if path.operation in KERNELS
            else nn.AvgPool2d(3, 1, 1, count_include_pad=False)
            if path.operation == "avg_pool_3x3"
            else nn.Identity()
            for path in self.paths
        )

    def forward(self, x: Tensor, drop_path: float | Tensor = 0.0) -> Tensor:
        nodes = {0: x}
        for node in CellGenotype.layout.nodes:
            into = [(path, operation) for path, operation in zip(self.paths, self.operations) if path.node == node]
            terms = [operation(nodes[path.source]) for path, operation in into]
            if self.training:
                terms = [y if isinstance(op, nn.Identity) else drop(y, drop_path) for y, (_, op) in zip(terms, into)]
            nodes[node] = total(terms) if terms else torch.zeros_like(x)
        return nodes[LAST]


class Network(nn.Module):
    """The network of a cell. It returns (logits, None), as it has no auxiliary head.

    Its parameters and multiply-adds are those of the benchmark, which counts operations whose result is 0 or is not used too.
    drop_path: the probability in training mode, on each operation but skips; 0 in the benchmark.
    """

    def __init__(
        self,
        genotype: CellGenotype,
        channels: int = PUBLISHED["channels"],
        layers: int = PUBLISHED["layers"],
        classes: int = 10,
        drop_path: float | Tensor = 0.0,
        image_channels: int = 3,
    ):
        super().__init__()
        self.drop_path, self.kinds = drop_path, layer_kinds(layers)
        self.stem = nn.Sequential(conv3x3(image_channels, channels), BatchNorm(channels))
        made: list[nn.Module] = []
        width = channels
        for kind in self.kinds:
            made.append(Cell(genotype.paths("cell"), width) if kind == "cell" else ResidualBlock(width))
            width *= 1 if kind == "cell" else 2
        self.cells = nn.ModuleList(made)
        self.norm = BatchNorm(width)
        self.classifier = nn.Linear(width, classes)
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        x = self.stem(images.contiguous(memory_format=torch.channels_last))
        for kind, cell in zip(self.kinds, self.cells):
            x = cell(x, self.drop_path) if kind == "cell" else cell(x)
        return self.classifier(mean_of_pixels(F.relu(self.norm(x)))), None


def genotype_size(found: CellGenotype) -> dict[str, int]:
    """The parameters and multiply-adds of the published network of a cell, for an image of CIFAR-10."""
    with torch.device("meta"):
        net = Network(found)
    return network_size(net, (3, 32, 32))
