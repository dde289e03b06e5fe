"""PC-DARTS: DARTS in which the operations of an edge see one quarter of the channels, with a learnt weight for each edge.

    edge = beta * shuffle(concat(sum_o p_o o(x_quarter), x_rest)),    node = sum of its edges

p is the softmax of the logits of an edge, beta the softmax over the edges into a node; at stride 2 the rest passes a 2x2 max
pool. The channels of the quarters are then interleaved. Logits and edge logits are trained by Adam after `frozen_epochs` epochs.
The weight of a path is beta p_o, so that beta is the sum over the paths of its edge; the genotype keeps the two strongest edges
of each node, as in DARTS. In NAS-Bench-201 all edges stay, as in DARTS there.

Source: Xu, Xie, Zhang, Chen, Qi, Tian, Xiong, "PC-DARTS", ICLR 2020, and its code, from which the settings are. The architecture
batches are a permutation of the validation half in each epoch, where the published code draws them with replacement.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..nets.torch import cnn, nasbench201
from ..space.genotype import NODES, AnyGenotype, CellGenotype, Genotype, Path
from ..space.spaces import Space, Weights
from .darts import Darts, edge_softmax
from .settings.darts import PartialSettings

SHARE = 4  # operations see one of so many parts of the channels


class PartialSupernet(cnn.Supernet):
    """The supernet of PC-DARTS. weights: beta p_o of each path of a cell type, zero operations included."""

    def make_cell(self, *sizes: Any) -> PartialCell:
        return PartialCell(*sizes)


class PartialCell(cnn.MixedCell):
    """A cell in which the operations see a quarter of the channels."""

    def __init__(self, *sizes: Any) -> None:
        super().__init__(*sizes, part=SHARE)
        self.edges: dict[tuple[int, int], list[int]] = {}  # for each edge the indices of its paths
        for i, path in enumerate(self.paths):
            self.edges.setdefault((path.node, path.source), []).append(i)

    def forward(
        self,
        s0: cnn.Source,
        s1: cnn.Source,
        scales: Sequence[Tensor | None],
        active: Sequence[bool] | None,
        drop_path: float | Tensor = 0.0,
        last: bool = False,
    ) -> Tensor:
        nodes = {0: self.preprocess0.body(s0.rectified()), 1: self.preprocess1.body(s1.rectified())}
        quarters = {node: self._quarter(x) for node, x in nodes.items()}
        for node in NODES:
            total = None
            for (target, source), paths in self.edges.items():
                computed = [i for i in paths if self.paths[i].operation != "none" and (active is None or active[i])]
                if target == node and source in nodes and computed:
                    y = self._edge(nodes[source], quarters[source], paths, computed, scales, self.reduction and source < 2)
                    y = cnn.drop(y, drop_path) if self.training else y
                    total = y if total is None else total + y
            if total is not None:
                nodes[node], quarters[node] = total, self._quarter(total)
        found = [nodes.get(node) for node in NODES]
        template = next((x for x in found if x is not None), None)
        if template is None:
            raise ValueError(f"no path is active in the {'reduction' if self.reduction else 'normal'} cell")
        outputs = [torch.zeros_like(template) if x is None else x for x in found]
        return torch.cat(outputs if last else [F.relu(x) for x in outputs], 1)

    def _quarter(self, x: Tensor) -> cnn.Source:
        return cnn.Source(x[:, : self.channels // SHARE].contiguous(memory_format=torch.channels_last))

    def _edge(
        self,
        x: Tensor,
        quarter: cnn.Source,
        paths: Sequence[int],
        computed: Sequence[int],
        scales: Sequence[Tensor | None],
        halves: bool,
    ) -> Tensor:
        """The result of an edge. paths: all of the edge, whose weights add up to beta."""
        seen = self.channels // SHARE
        of = [scales[i] for i in paths]
        own = [None if scale is None else scale[:seen] for scale in scales]
        mixed = sum(self._run(i, quarter, own[i]) for i in computed)
        rest = x[:, seen:]
        rest = F.max_pool2d(rest, 2, 2) if halves else rest
        if of[0] is not None:
            rest = rest * torch.stack(of)[:, seen:].sum(0)[:, None, None]  # type: ignore[arg-type]
        return shuffled(torch.cat([mixed, rest], 1))  # type: ignore[list-item]


class PartialCellSupernet(nasbench201.Supernet):
    """The supernet of PC-DARTS for NAS-Bench-201. weights: beta p_o of each path, zero operations included."""

    def make_cell(self, *sizes: Any) -> OneInputCell:
        return OneInputCell(*sizes)


class OneInputCell(nasbench201.MixedCell):
    """A cell of NAS-Bench-201 in which the operations see a quarter of the channels."""

    def __init__(self, paths: Sequence[Path], channels: int, path_norm: bool) -> None:
        super().__init__(paths, channels // SHARE, path_norm)
        self.edges: dict[tuple[int, int], list[int]] = {}  # for each edge the indices of its paths
        for i, path in enumerate(self.paths):
            self.edges.setdefault((path.node, path.source), []).append(i)

    def seen(self, x: Tensor) -> Tensor:
        return x[:, : self.channels].contiguous(memory_format=torch.channels_last)

    def edge(self, x: Tensor, edge: tuple[int, int], parts: list[Tensor], weights: Tensor | None) -> list[Tensor]:
        rest = x[:, self.channels :]
        if weights is not None:
            rest = rest * torch.stack([weights[i] for i in self.edges[edge]]).sum().to(x.dtype)
        return [shuffled(torch.cat([cnn.total(parts), rest], 1))]


def shuffled(x: Tensor) -> Tensor:
    """Interleave the quarters of the channels."""
    n, channels, height, width = x.shape
    mixed = x.view(n, SHARE, channels // SHARE, height, width).transpose(1, 2).reshape(x.shape)
    return mixed.contiguous(memory_format=torch.channels_last)


class PartialDarts(Darts):
    """PC-DARTS. parameters: the logits of the paths and those of the edges, a vector of each for each cell."""

    name = "pc_darts"
    supernets: ClassVar[Mapping[type[AnyGenotype], Any]] = {Genotype: PartialSupernet, CellGenotype: PartialCellSupernet}

    def __init__(self, space: Space, settings: PartialSettings, device: torch.device) -> None:
        super().__init__(space, settings, device)
        self.frozen_epochs = settings.frozen_epochs
        self.logits = self.parameters
        self.edge_logits = [nn.Parameter((1e-3 * torch.randn(len(space.layout.edges))).to(device)) for _ in self.cells]
        self.parameters = [*self.logits, *self.edge_logits]
        self.optimizer.add_param_group({"params": self.edge_logits})
        self.edge_of = {cell: torch.tensor(space.edges(cell), device=device) for cell in self.cells}
        self.into = [sum(node == n for n, _ in space.layout.edges) for node in space.layout.nodes]

    def begin_epoch(self, epoch: int) -> None:
        self.frozen = epoch < self.frozen_epochs

    def weights(self) -> Weights:
        shares = edge_softmax(self.space, dict(zip(self.cells, self.logits)))
        return {c: shares[c] * self._betas(b)[self.edge_of[c]] for c, b in zip(self.cells, self.edge_logits)}

    def _betas(self, logits: Tensor) -> Tensor:
        """The softmax over the edges into each node."""
        return torch.cat([part.softmax(0) for part in logits.split(self.into)])

    @torch.no_grad()
    def log(self) -> dict[str, float]:
        """Mean entropies of the operations on an edge and of the edges into a node, for each cell."""
        edges, nodes, out = len(self.space.layout.edges), len(self.space.layout.nodes), {}
        shares = edge_softmax(self.space, dict(zip(self.cells, self.logits)))
        for cell, logits in zip(self.cells, self.edge_logits):
            betas = self._betas(logits)
            out[f"entropy_{cell}"] = float(-(shares[cell] * shares[cell].clamp_min(1e-30).log()).sum()) / edges
            out[f"edge_entropy_{cell}"] = float(-(betas * betas.clamp_min(1e-30).log()).sum()) / nodes
        return out

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "frozen": self.frozen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.frozen = state["frozen"]
