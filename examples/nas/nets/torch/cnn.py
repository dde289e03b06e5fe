"""Convolutional networks of cells: the supernet of a search, and the networks of a genotype.

    net = Supernet(get_space("darts"), channels=16, layers=8, classes=10)
    logits = net(images, {"normal": a, "reduce": b})            # a, b: a weight for each path of the cell, which multiplies it
    logits = net(images, {"normal": a, "reduce": b}, active)    # active: a flag for each path; others are not computed

    net = Network(genotype, channels=36, layers=20, classes=10)
    logits, auxiliary = net(images)

Sources: Liu, Simonyan, Yang, "DARTS", 2019 (both networks); Wu et al., "Neural architecture search as sparse supernet",
2021 (linear weights, any number of paths).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...space.genotype import CELLS, NODES, Genotype, Path
from ...space.spaces import Masks, Space, Weights
from ..convolutional import cell_kinds
from .convolution_kernels import mean_of_pixels
from .operations import (
    MAKE,
    BatchNorm,
    FactorizedReduce,
    Form,
    Identity,
    Pool,
    Rectified,
    last_norm,
    norms_of,
    relu_conv_norm,
    scaled,
)


class Supernet(nn.Module):
    """A network with all paths of a space in every cell: node = sum over its paths of weight * operation(source).

    weights: for each cell type a vector in the order of `space.paths(cell)`, shared by all cells of the type, or a matrix
    (cells of the type, paths); None: all 1. Batch norms, except that of the stem, have no scale and shift: the weights are
    their scale. In the one-stage form they have both, and drop path and the auxiliary head are as in an evaluation network.
    drop_path: in the search form a number acts on the sum of the operations of each edge, a tensor on each operation.
    path_norm: identities too are followed by a batch norm, so that every path ends in one.
    """

    def __init__(
        self,
        space: Space,
        channels: int = 16,
        layers: int = 8,
        classes: int = 10,
        form: Form = "search",
        auxiliary: bool = False,
        drop_path: float | Tensor = 0.0,
        image_channels: int = 3,
        path_norm: bool = False,
    ):
        super().__init__()
        self.path_norm = path_norm
        self.space, self.kinds = space, cell_kinds(layers)
        self.channels, self.form, self.drop_path = channels, form, drop_path
        stem, width = 3 * channels, channels
        self.stem = nn.Sequential(conv3x3(image_channels, stem), BatchNorm(stem))
        cells: list[MixedCell] = []
        before, last, reduced = stem, stem, False
        for kind in self.kinds:
            width *= 2 if kind == "reduce" else 1
            cells.append(self.make_cell(space.paths(kind), before, last, width, kind == "reduce", reduced, form))
            before, last, reduced = last, len(NODES) * width, kind == "reduce"
        self.cells = nn.ModuleList(cells)
        self.auxiliary_after = 2 * layers // 3
        wide = len(NODES) * cells[self.auxiliary_after].channels
        self.auxiliary = auxiliary_head(wide, classes, stride=3, last_norm=True) if auxiliary else None
        self.classifier = nn.Linear(last, classes)
        self.to(memory_format=torch.channels_last)

    def make_cell(self, *sizes: Any) -> MixedCell:
        return MixedCell(*sizes, path_norm=self.path_norm)

    def forward(self, images: Tensor, weights: Weights | None = None, active: Masks | None = None) -> Tensor:
        """Return the logits (N, classes) of images (N, image_channels, H, W), H and W divisible by 4.

        Paths whose source has no active path are not computed: their output is a constant of their batch norms.
        """
        return self.outputs(images, weights, active)[0]

    def outputs(
        self, images: Tensor, weights: Weights | None = None, active: Masks | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The logits, and those of the auxiliary head in training mode if the network has one."""
        scales = self._scales(weights)
        auxiliary = None
        s0 = s1 = Source(self.stem(images.contiguous(memory_format=torch.channels_last)))
        for i, (kind, cell) in enumerate(zip(self.kinds, self.cells)):
            mask = None if active is None else active[kind]
            last = i + 1 == len(self.cells)
            s0, s1 = s1, Source(cell(s0, s1, next(scales[kind]), mask, self.drop_path, last), rectified=not last)
            if i == self.auxiliary_after and self.auxiliary is not None and self.training:
                auxiliary = self.auxiliary(s1.x)
        return self.classifier(mean_of_pixels(s1.x)), auxiliary

    def _scales(self, weights: Weights | None) -> dict[str, Any]:
        """For each cell type an iterator over its cells, with a vector (channels,) for each path, or None for 1."""
        scales = {}
        for kind in CELLS:
            cells = [cell for k, cell in zip(self.kinds, self.cells) if k == kind]
            paths = len(self.space.paths(kind))
            if weights is None:
                rows = [[None] * paths for _ in cells]
            else:
                w = weights[kind]
                if w.shape not in ((paths,), (len(cells), paths)):
                    raise ValueError(f"{kind}: weights have shape ({paths},) or ({len(cells)}, {paths}), got {tuple(w.shape)}")
                rows = _rows(w, [cell.channels for cell in cells])
            scales[kind] = iter(rows)
        return scales

    def path_parameters(self) -> dict[tuple[str, Path], list[nn.Parameter]]:
        """For each (cell type, path) its parameters in all cells of the type."""
        return {
            (kind, path): [p for k, cell in zip(self.kinds, self.cells) if k == kind for p in cell.operation(i).parameters()]
            for kind in CELLS
            for i, path in enumerate(self.space.paths(kind))
        }


def _rows(weights: Tensor, channels: Sequence[int]) -> list[Sequence[Tensor]]:
    """A vector (channels,) for each cell and path, shared by cells of the same width and weights."""
    made: dict[int, Sequence[Tensor]] = {}
    rows = []
    for i, width in enumerate(channels):
        key = width if weights.ndim == 1 else -i - 1
        if key not in made:
            row = weights if weights.ndim == 1 else weights[i]
            made[key] = row[:, None].expand(-1, width).contiguous().unbind()
        rows.append(made[key])
    return rows


class Source:
    """The output of a cell or node. Results that several cells or paths need are computed once and kept.

    rectified: whether x has passed a ReLU.
    """

    def __init__(self, x: Tensor, rectified: bool = False):
        self.x = x
        self._made: dict[Any, Tensor] = {"relu": x} if rectified else {}

    def rectified(self) -> Tensor:
        return self._once("relu", F.relu)

    def through(self, operation: nn.Module) -> Tensor:
        return self._once(operation, operation)

    def _once(self, key: Any, make: Any) -> Tensor:
        if key not in self._made:
            self._made[key] = make(self.x)
        return self._made[key]


class MixedCell(nn.Module):
    """A cell of the supernet. Pools from one source share a module and its output, and so do identities with a batch norm.

    part: operations have `channels` divided by this. path_norm: as in `Supernet`.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        before: int,
        last: int,
        channels: int,
        reduction: bool,
        reduced: bool,
        form: Form,
        part: int = 1,
        path_norm: bool = False,
    ):
        super().__init__()
        self.paths, self.channels, self.reduction, self.form = tuple(paths), channels, reduction, form
        self.preprocess0, self.preprocess1 = preprocess(before, last, channels, reduced, affine=form != "search")
        self.operations = nn.ModuleDict()
        self.keys: list[str] = []
        for path in self.paths:
            stride = 2 if reduction and path.source < 2 else 1
            made = nn.Identity() if path.operation == "none" else MAKE[path.operation](channels // part, stride, form)
            if path_norm and isinstance(made, Identity):
                made = Identity(channels // part, form, normed=True)
            shared = form == "search" and (isinstance(made, Pool) or (isinstance(made, Identity) and made.norm is not None))
            key = f"{path.operation}_from_{path.source}" + ("" if shared else f"_to_{path.node}")
            if key not in self.operations:
                self.operations[key] = made
            self.keys.append(key)
        # Does not depend on the active paths: a pool computes the same to the last bit whether other paths use it or not.
        self.is_shared = [self.keys.count(key) > 1 for key in self.keys]

    def operation(self, path: int) -> nn.Module:
        """The module of the path with this index."""
        return self.operations[self.keys[path]]

    def forward(
        self,
        s0: Source,
        s1: Source,
        scales: Sequence[Tensor | None],
        active: Sequence[bool] | None,
        drop_path: float | Tensor = 0.0,
        last: bool = False,
    ) -> Tensor:
        """Return the nodes, concatenated; rectified, as the next cells need them, except those of the last cell."""
        first, second = self.preprocess0.body(s0.rectified()), self.preprocess1.body(s1.rectified())
        sources: list[Source | None] = [Source(first), Source(second)]
        # a search by two levels drops the sums of edges; otherwise each operation is dropped
        drops_edges = self.form == "search" and self.training and not isinstance(drop_path, Tensor) and drop_path > 0
        computed = [i for i, path in enumerate(self.paths) if path.operation != "none" and (active is None or active[i])]
        for node in NODES:
            terms: list[Tensor] = []
            edges: dict[int, list[Tensor]] = {}
            for i in computed:
                path = self.paths[i]
                source = sources[path.source] if path.node == node else None
                if source is None:
                    continue
                y = self._run(i, source, scales[i])
                if drops_edges:
                    edges.setdefault(path.source, []).append(y)
                else:
                    terms.append(drop(y, drop_path) if self.training else y)
            terms += [drop(total(edge), drop_path) for edge in edges.values()]
            sources.append(Source(total(terms)) if terms else None)
        nodes = sources[2:]
        template = next((node.x for node in nodes if node is not None), None)
        if template is None:
            raise ValueError(f"no path is active in the {'reduction' if self.reduction else 'normal'} cell")
        return torch.cat([_output(node, template, last) for node in nodes], 1)

    def _run(self, path: int, source: Source, scale: Tensor | None) -> Tensor:
        operation = self.operation(path)
        if self.is_shared[path]:
            return scaled(source.through(operation), scale)
        if isinstance(operation, Rectified):
            return operation.body(source.rectified(), scale)
        return operation(source.x, scale)


def total(terms: Sequence[Tensor]) -> Tensor:
    """The sum of the paths into a node, which are kept."""
    if len(terms) == 1:
        return terms[0]
    out = terms[0] + terms[1]
    for term in terms[2:]:
        out += term
    return out


def _output(node: Source | None, template: Tensor, last: bool) -> Tensor:
    """What a node contributes to the output of its cell: zeros of this shape if it has no paths."""
    if node is None:
        return torch.zeros_like(template)
    return node.x if last else node.rectified()


def preprocess(before: int, last: int, channels: int, reduced: bool, affine: bool) -> tuple[Rectified, Rectified]:
    """Map both inputs of a cell to `channels`; the older one is halved in size if the cell between them is a reduction."""
    first: Rectified
    first = FactorizedReduce(before, channels, affine) if reduced else relu_conv_norm(before, channels, affine)
    return first, relu_conv_norm(last, channels, affine)


class Cell(nn.Module):
    """A cell of given paths: node = sum of operation(source), output = concatenation of its nodes.

    nodes: the nodes of the output; by default those with paths. A node without paths is a tensor of zeros, smaller than the
    inputs by the factor `shrinks`. drops_edges: whether drop path acts on the sum of the operations from each source, and not on
    each operation but identities.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        operations: Sequence[nn.Module],
        preprocess: Sequence[nn.Module],
        nodes: Sequence[int] | None = None,
        shrinks: int = 1,
        drops_edges: bool = False,
    ):
        super().__init__()
        self.paths, self.shrinks, self.drops_edges = tuple(paths), shrinks, drops_edges
        self.active_nodes = tuple(sorted({path.node for path in paths}) if nodes is None else nodes)
        self.preprocess0, self.preprocess1 = preprocess
        self.operations = nn.ModuleList(operations)

    def forward(self, s0: Source, s1: Source, drop_path: float | Tensor = 0.0, last: bool = False) -> Tensor:
        """Return the nodes, concatenated; rectified, as the next cells need them, except those of the last cell."""
        first, second = self.preprocess0.body(s0.rectified()), self.preprocess1.body(s1.rectified())
        nodes = {0: Source(first), 1: Source(second)}
        for node in self.active_nodes:
            terms = (self._edges if self.drops_edges else self._operations)(node, nodes, drop_path)
            nodes[node] = Source(total(terms) if terms else self._zeros(first))
        return torch.cat([nodes[node].x if last else nodes[node].rectified() for node in self.active_nodes], 1)

    def _operations(self, node: int, nodes: dict[int, Source], drop_path: float | Tensor) -> list[Tensor]:
        """The results of the operations into a node."""
        into = [(nodes[path.source], operation) for path, operation in zip(self.paths, self.operations) if path.node == node]
        return [self._run(operation, source, drop_path) for source, operation in into]

    def _edges(self, node: int, nodes: dict[int, Source], drop_path: float | Tensor) -> list[Tensor]:
        """The sums of the operations on each edge into a node, after drop path."""
        edges: dict[int, list[Tensor]] = {}
        for path, operation in zip(self.paths, self.operations):
            if path.node == node:
                edges.setdefault(path.source, []).append(self._run(operation, nodes[path.source], 0.0))
        return [drop(total(edge), drop_path) if self.training else total(edge) for edge in edges.values()]

    def _zeros(self, like: Tensor) -> Tensor:
        return torch.zeros_like(like[:, :, :: self.shrinks, :: self.shrinks])

    def _run(self, operation: nn.Module, source: Source, drop_path: float | Tensor) -> Tensor:
        if isinstance(operation, Identity) and operation.norm is None:
            return source.x
        y = operation.body(source.rectified()) if isinstance(operation, Rectified) else operation(source.x)
        return drop(y, drop_path) if self.training else y


def drop(x: Tensor, probability: float | Tensor) -> Tensor:
    """Drop path: set samples of x to 0 with this probability, and scale the others up. A tensor avoids synchronisation."""
    if not isinstance(probability, Tensor) and probability == 0:
        return x
    keep = 1 - probability
    return x * ((torch.rand(len(x), 1, 1, 1, device=x.device) < keep) / keep).to(x.dtype)


class Discrete(nn.Module):
    """A network of given paths: stem, cells, classifier, and an auxiliary head, which is used in training mode only.

    Returns (logits, auxiliary logits or None). drop_path: the probability in training mode; the training loop sets it.
    """

    def __init__(
        self,
        stem: nn.Module,
        cells: Sequence[Cell],
        classifier: nn.Linear,
        stem1: nn.Module | None = None,
        auxiliary: nn.Module | None = None,
        drop_path: float | Tensor = 0.0,
    ):
        super().__init__()
        self.stem, self.stem1, self.cells, self.classifier = stem, stem1, nn.ModuleList(cells), classifier
        self.auxiliary, self.auxiliary_after = auxiliary, 2 * len(cells) // 3
        self.drop_path = drop_path
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        s0 = s1 = Source(self.stem(images.contiguous(memory_format=torch.channels_last)))
        if self.stem1 is not None:
            s1 = Source(self.stem1(s0.x))
        auxiliary = None
        for i, cell in enumerate(self.cells):
            last = i + 1 == len(self.cells)
            s0, s1 = s1, Source(cell(s0, s1, self.drop_path, last), rectified=not last)
            if i == self.auxiliary_after and self.auxiliary is not None and self.training:
                auxiliary = self.auxiliary(s1.x)
        return self.classifier(mean_of_pixels(s1.x)), auxiliary


class Network(Discrete):
    """The evaluation network of a genotype for CIFAR.

    All batch norms have scale and shift; pools are followed by one in the one-stage form and in that of GSparsity, identities in
    the one-stage form only. In GSparsity's form drop path acts on the sums of edges, and nodes without paths are zero channels.
    """

    def __init__(
        self,
        genotype: Genotype | Sequence[Genotype],
        channels: int = 36,
        layers: int = 20,
        classes: int = 10,
        auxiliary: bool = True,
        drop_path: float | Tensor = 0.0,
        form: Form = "evaluation",
        image_channels: int = 3,
    ):
        width = 3 * channels
        stem = nn.Sequential(conv3x3(image_channels, width), BatchNorm(width))
        cells, widths = cells_of(genotype, channels, layers, width, reduced=False, form=form)
        head = auxiliary_head(widths[2 * layers // 3], classes, stride=3, last_norm=True) if auxiliary else None
        super().__init__(stem, cells, nn.Linear(widths[-1], classes), auxiliary=head, drop_path=drop_path)


class ImageNetNetwork(Discrete):
    """The network of a genotype in the mobile setting, for 224x224 images: three stem convolutions of stride 2."""

    def __init__(
        self,
        genotype: Genotype,
        channels: int = 48,
        layers: int = 14,
        classes: int = 1000,
        auxiliary: bool = True,
        drop_path: float | Tensor = 0.0,
    ):
        half = channels // 2
        halves = [conv3x3(3, half, 2), BatchNorm(half), nn.ReLU(inplace=True), conv3x3(half, channels, 2), BatchNorm(channels)]
        stem1 = nn.Sequential(nn.ReLU(), conv3x3(channels, channels, 2), BatchNorm(channels))
        cells, widths = cells_of(genotype, channels, layers, channels, reduced=True)
        head = auxiliary_head(widths[2 * layers // 3], classes, stride=2, last_norm=False) if auxiliary else None
        super().__init__(nn.Sequential(*halves), cells, nn.Linear(widths[-1], classes), stem1, head, drop_path)


def conv3x3(channels_in: int, channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)


def cells_of(
    genotype: Genotype | Sequence[Genotype], channels: int, layers: int, stem: int, reduced: bool, form: Form = "evaluation"
) -> tuple[list[Cell], list[int]]:
    """Build the evaluation cells of a genotype (or of one for each layer) without dead ends; return them and their widths.

    reduced: whether the older input of the first cell has twice the size of the other.
    """
    each = [genotype] * layers if isinstance(genotype, Genotype) else list(genotype)
    if len(each) != layers:
        raise ValueError(f"genotypes must be one or one for each of {layers} layers, got {len(each)}")
    cells, widths = [], []
    before = last = stem
    for kind, genotype in zip(cell_kinds(layers), [g.clean() for g in each]):
        if not genotype.active_nodes(kind):
            raise ValueError(f"no path of the genotype reaches an input of the {kind} cell")
        channels *= 2 if kind == "reduce" else 1
        paths = genotype.paths(kind)
        strides = [2 if kind == "reduce" and path.source < 2 else 1 for path in paths]
        operations = [MAKE[path.operation](channels, stride, form) for path, stride in zip(paths, strides)]
        pre = preprocess(before, last, channels, reduced, affine=True)
        nodes = genotype.active_nodes(kind)
        if form == "gsparsity":  # nodes without paths are zeros behind the others
            nodes = (*nodes, *(node for node in NODES if node not in nodes))
        cells.append(Cell(paths, operations, pre, nodes, 2 if kind == "reduce" else 1, drops_edges=form == "gsparsity"))
        before, last, reduced = last, channels * len(nodes), kind == "reduce"
        widths.append(last)
    return cells, widths


def auxiliary_head(channels: int, classes: int, stride: int, last_norm: bool) -> nn.Sequential:
    """A second classifier on an 8x8 (stride 3) or 7x7 (stride 2) map; its loss is added in training."""
    return nn.Sequential(
        nn.ReLU(),
        nn.AvgPool2d(5, stride, count_include_pad=False),
        nn.Conv2d(channels, 128, 1, bias=False),
        BatchNorm(128),
        nn.ReLU(inplace=True),
        nn.Conv2d(128, 768, 2, bias=False),
        BatchNorm(768) if last_norm else nn.Identity(),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(768, classes),
    )


class Weighted(nn.Module):
    """A copy of a supernet operation, multiplied by its architecture weight, a constant for each channel."""

    def __init__(self, operation: nn.Module, scale: Tensor | None):
        super().__init__()
        self.operation = copy.deepcopy(operation)
        self.register_buffer("scale", None if scale is None else scale.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.operation(x, self.scale)


def restricted(net: Supernet, genotype: Genotype, weights: Weights | None = None) -> Discrete:
    """The supernet restricted to the paths of a genotype, as a network without the others.

    Parameters and statistics are copied. If the cleaned genotype has all nodes of the mask,
    `restricted(net, genotype, weights)` and `net(images, weights, space.masks(genotype))` give the same logits.
    """
    genotype = genotype.clean()
    scales = net._scales(weights)
    cells = []
    columns: list[Tensor | None] = [None, None]  # indices of the remaining channels of the two previous outputs
    for kind, mixed in zip(net.kinds, net.cells):
        number = {path: i for i, path in enumerate(mixed.paths)}
        row, paths = next(scales[kind]), genotype.paths(kind)
        operations = [Weighted(mixed.operation(number[path]), row[number[path]]) for path in paths]
        pre = [keep_inputs(m, c) for m, c in zip((mixed.preprocess0, mixed.preprocess1), columns)]
        cells.append(Cell(paths, operations, pre))
        nodes = torch.tensor([node - NODES[0] for node in genotype.active_nodes(kind)])
        columns = [columns[1], (nodes[:, None] * mixed.channels + torch.arange(mixed.channels)).flatten()]
    return Discrete(copy.deepcopy(net.stem), cells, keep_inputs(net.classifier, columns[1]))


def absorbed(net: Supernet, genotype: Genotype, weights: Weights) -> Network:
    """The one-stage supernet restricted to the paths of a genotype, as a network without architecture weights.

    The scale and shift of the batch norm at the end of each path are multiplied by its weight. Parameters and statistics are
    copied; `net(images, weights, space.masks(genotype))` and the network give the same logits to rounding.

    Source: ISTA-NAS, Eq. 12.
    """
    if net.form != "one_stage":
        raise ValueError(
            f"form of the supernet must be 'one_stage', where each path ends in a scale of its own, got {net.form!r}"
        )
    if any(genotype.active_nodes(cell) != NODES for cell in CELLS):
        raise ValueError("every node of the genotype must have a path")
    auxiliary = net.auxiliary is not None
    sizes = (net.channels, len(net.kinds), net.classifier.out_features, auxiliary)
    out = Network(genotype, *sizes, form="one_stage", image_channels=net.stem[0].in_channels)
    out.to(net.classifier.weight)  # its device and precision
    for name in ("stem", "classifier", *(["auxiliary"] if auxiliary else [])):
        getattr(out, name).load_state_dict(getattr(net, name).state_dict())
    for kind, mixed, cell in zip(net.kinds, net.cells, out.cells):
        for name in ("preprocess0", "preprocess1"):
            getattr(cell, name).load_state_dict(getattr(mixed, name).state_dict())
        for path, operation in zip(cell.paths, cell.operations):
            number = mixed.paths.index(path)
            operation.load_state_dict(mixed.operation(number).state_dict())
            norm = last_norm(operation)
            if norm is None:
                raise ValueError(f"{path.operation} ends in no batch norm that could absorb a weight")
            with torch.no_grad():
                norm.weight.mul_(weights[kind][number])
                norm.bias.mul_(weights[kind][number])
    return out


def keep_inputs(module: Any, columns: Tensor | None) -> Any:
    """A copy of a module whose first layers use these channels of the input only."""
    module = copy.deepcopy(module)
    for layer in module.modules() if columns is not None else ():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.weight = nn.Parameter(layer.weight.detach()[:, columns].clone())
            setattr(layer, "in_channels" if isinstance(layer, nn.Conv2d) else "in_features", len(columns))
    return module


def network_size(model: nn.Module, input_shape: Sequence[int]) -> dict[str, int]:
    """Count the parameters and the multiply-adds of convolutions and linear layers for one image, without the auxiliary head.

    input_shape: (C, H, W). Returns {"parameters": ..., "macs": ...}. The model is copied to the meta device: nothing is
    computed.
    """
    parameters = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("auxiliary."))
    macs = 0

    def add(module: Any, inputs: Any, output: Tensor) -> None:
        nonlocal macs
        macs += output.numel() * (module.weight.numel() // len(module.weight))

    meta = copy.deepcopy(model).to("meta").eval()
    for norm in norms_of(meta):  # they keep shapes, and are slow on the meta device
        norm.forward = lambda x, scale=None: x  # type: ignore[method-assign]
    for module in meta.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(add)
    with torch.no_grad():
        meta(torch.empty(1, *input_shape, device="meta"))
    return {"parameters": parameters, "macs": macs}


def genotype_size(found: Genotype) -> dict[str, int]:
    """The parameters and multiply-adds of the network of 20 cells and 36 channels of a genotype, for an image of CIFAR."""
    with torch.device("meta"):
        net = Network(found, auxiliary=False)
    return network_size(net, (3, 32, 32))
