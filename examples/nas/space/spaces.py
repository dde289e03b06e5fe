"""Search spaces as data: the names of the operations on each edge of each cell.

Edges (node, source) are ordered by node, then by source: (2, 0), (2, 1), (3, 0), ..., (5, 4), 14 in total, in a convolutional
cell, (1, 0), (2, 0), (2, 1), ..., (8, 7), 36 in total, in a recurrent one, and (1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2) in
NAS-Bench-201. The paths of a cell, and so the entries of an architecture vector, are ordered by edge, and within an edge as its
operations are listed. "none" is the zero operation: it receives a share of a softmax but computes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .genotype import AnyGenotype, CellGenotype, Genotype, Layout, Path, RecurrentGenotype, similar

IMAGES: tuple[type[AnyGenotype], ...] = (Genotype, CellGenotype)  # the kinds of convolutional networks
DARTS = ("max_pool_3x3", "avg_pool_3x3", "skip_connect", "sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5")

Edges = tuple[tuple[str, ...], ...]
Masks = Mapping[str, Sequence[bool]]  # by cell: a flag for each path, whether it is active
Weights = Mapping[str, Any]  # by cell: a vector with an entry for each path


@dataclass(frozen=True)
class Space:
    """The names of the candidate operations on each edge of each cell. kind: the class of the genotypes of the space."""

    name: str
    operations: Mapping[str, Edges]
    kind: type[AnyGenotype] = Genotype

    def __post_init__(self) -> None:
        edges = self.layout.edges
        for cell in self.layout.cells:
            if len(self.operations[cell]) != len(edges):
                raise ValueError(f"{self.name}, {cell}: {len(edges)} edges need operations, got {len(self.operations[cell])}")
            for edge, names in zip(edges, self.operations[cell]):
                unknown = [n for n in names if n not in ("none", *self.layout.operations)]
                if unknown or len(set(names)) < len(names):
                    raise ValueError(f"{self.name}, {cell}, edge {edge}: {names!r} is not a set of known operations")

    def __hash__(self) -> int:
        return hash((self.name, self.kind))  # the operations are a dict

    @property
    def layout(self) -> Layout:
        """The cells, nodes and edges."""
        return self.kind.layout

    @cached_property
    def _paths(self) -> dict[str, tuple[Path, ...]]:
        edges = self.layout.edges
        return {
            cell: tuple(Path(*edge, name) for edge, names in zip(edges, self.operations[cell]) for name in names)
            for cell in self.layout.cells
        }

    def paths(self, cell: str) -> tuple[Path, ...]:
        """All paths of a cell, in the order of the entries of its architecture vector."""
        return self._paths[cell]

    def nodes(self, cell: str) -> list[int]:
        """The node of each path: labels of the node groups for `Groups.labels`.

        The groups have 14, 21, 28 and 35 paths in `darts`, and 4, 8, ..., 32 in `recurrent`.
        """
        return [path.node for path in self.paths(cell)]

    def edges(self, cell: str) -> list[int]:
        """The index of the edge of each path."""
        return [edge for edge, names in enumerate(self.operations[cell]) for _ in names]

    def masks(self, genotype: AnyGenotype) -> dict[str, tuple[bool, ...]]:
        """Flags of the paths of the space that are in the genotype. ValueError for a path that is not in the space."""
        masks = {}
        for cell in self.layout.cells:
            wanted = set(genotype.paths(cell))
            foreign = wanted - set(self.paths(cell))
            if foreign:
                raise ValueError(f"{cell}: space {self.name!r} has no path {tuple(min(foreign))}")
            masks[cell] = tuple(path in wanted for path in self.paths(cell))
        return masks

    def genotype(self, masks: Masks) -> Any:
        """The genotype of the active paths, dead ends included; `Genotype.clean` removes those."""
        chosen = {}
        for cell in self.layout.cells:
            paths, mask = self.paths(cell), masks[cell]
            if len(mask) != len(paths):
                raise ValueError(f"{cell}: a mask has one entry for each of {len(paths)} paths, got {len(mask)}")
            chosen[cell] = [path for path, is_active in zip(paths, mask) if is_active and path.operation != "none"]
        return self.kind.from_paths(**chosen)


def everywhere(name: str, *operations: Sequence[str], kind: type[AnyGenotype] = Genotype) -> Space:
    """A space with the same operations on every edge of a cell: one list of names for each cell, or one for all cells."""
    layout = kind.layout
    each = operations * len(layout.cells) if len(operations) == 1 else operations
    return Space(name, {cell: (tuple(names),) * len(layout.edges) for cell, names in zip(layout.cells, each, strict=True)}, kind)


def get_space(name: str, kind: type[AnyGenotype] = Genotype) -> Space:
    """The space of this name. kind: of its genotypes; by default any kind of convolutional network, which the name decides.

    Raises ValueError for an unknown name.
    """
    kinds = IMAGES if kind is Genotype else (kind,)
    known = [n for n, space in SPACES.items() if space.kind in kinds]
    if name not in known:
        close = similar(name, known)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"unknown {kind.layout.name} space {name!r}; {hint}known: {', '.join(known)}")
    return SPACES[name]


def discrete(space: Space, genotype: AnyGenotype, point: Mapping[str, Any]) -> Any:
    """The genotype that a search writes: in NAS-Bench-201 with one operation on each edge, otherwise as it is."""
    return one_per_edge(space, genotype, point) if space.kind is CellGenotype else genotype


def one_per_edge(space: Space, genotype: AnyGenotype, point: Mapping[str, Any]) -> Any:
    """The genotype with one operation on each edge: of its paths there, the one with the largest absolute weight.

    point: for each cell the weights of all paths of the space, in arrays of NumPy, torch or JAX. Of equal weights the first path
    counts.
    """
    chosen = {}
    for cell in space.layout.cells:
        weights = dict(zip(space.paths(cell), point[cell].tolist(), strict=True))
        best: dict[tuple[int, int], Path] = {}
        for path in genotype.paths(cell):
            edge = path.node, path.source
            if edge not in best or abs(weights[path]) > abs(weights[best[edge]]):
                best[edge] = path
        chosen[cell] = [best[edge] for edge in space.layout.edges if edge in best]
    return space.kind.from_paths(**chosen)


def _edges(text: str) -> Edges:
    """Parse 'sk+d3, sk+d5, ...', the operations on the 14 edges."""
    names = {"sk": "skip_connect", "mx": "max_pool_3x3", "av": "avg_pool_3x3"}
    names |= {"s3": "sep_conv_3x3", "d3": "dil_conv_3x3", "d5": "dil_conv_5x5"}
    return tuple(tuple(names[n] for n in edge.split("+")) for edge in text.split(", "))


SPACES = {
    space.name: space
    for space in (
        everywhere("darts", DARTS),  # SparseNAS, ISTA-NAS, GSparsity: without zero
        everywhere("darts_zero", ("none", *DARTS)),  # Liu et al., 2019
        everywhere("cherry", ("sep_conv_3x3", "skip_connect"), ("skip_connect", "max_pool_3x3")),  # SparseNAS, cherry-picked
        Space(  # S1 to S4: Zela et al., "Understanding and robustifying differentiable architecture search", 2020
            "S1",
            {
                "normal": _edges(
                    "sk+d3, sk+d5, sk+d5, sk+s3, sk+d3, mx+sk, sk+s3, sk+s3, sk+d3, sk+s3, mx+sk, sk+d3, d3+d5, d3+d5"
                ),
                "reduce": _edges(
                    "mx+av, mx+d3, mx+av, mx+av, sk+d5, mx+av, mx+s3, sk+d3, sk+d5, mx+av, mx+av, sk+d5, sk+d5, sk+d5"
                ),
            },
        ),
        everywhere("S2", ("skip_connect", "sep_conv_3x3")),
        everywhere("S3", ("none", "skip_connect", "sep_conv_3x3")),
        everywhere("S4", ("noise", "sep_conv_3x3")),
        # Dong, Yang, "NAS-Bench-201", 2020, with the operations in the published order
        everywhere("nasbench201", ("none", *CellGenotype.layout.operations), kind=CellGenotype),
        everywhere("nasbench201_nonzero", CellGenotype.layout.operations, kind=CellGenotype),  # for methods with exact zeros
        everywhere("recurrent", RecurrentGenotype.layout.operations, kind=RecurrentGenotype),  # SparseNAS: without zero
        everywhere("recurrent_zero", ("none", *RecurrentGenotype.layout.operations), kind=RecurrentGenotype),  # DARTS
    )
}
