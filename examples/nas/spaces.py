"""Search spaces as data: the names of the operations on each edge of the normal and the reduction cell.

Edges run node by node, source by source: (2, 0), (2, 1), (3, 0), (3, 1), (3, 2), ..., (5, 4): fourteen. The paths of a cell,
and with them the entries of an architecture vector, run edge by edge, and along an edge in the order of the names. "none" is
the zero operation: it takes a share in a softmax, and nothing else.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from .genotype import CELLS, NODES, OPERATIONS, Genotype, Path

EDGES = tuple((node, source) for node in NODES for source in range(node))
DARTS = ("max_pool_3x3", "avg_pool_3x3", "skip_connect", "sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5")

Edges = tuple[tuple[str, ...], ...]
Masks = Mapping[str, Sequence[bool]]


@dataclass(frozen=True)
class Space:
    """Candidate operations: `normal` and `reduce` hold for each of the 14 edges the names of its operations."""

    name: str
    normal: Edges
    reduce: Edges

    def __post_init__(self) -> None:
        for cell in CELLS:
            edges = getattr(self, cell)
            if len(edges) != len(EDGES):
                raise ValueError(f"{self.name}, {cell}: {len(EDGES)} edges need operations, got {len(edges)}")
            for edge, names in zip(EDGES, edges):
                unknown = [n for n in names if n not in ("none", *OPERATIONS)]
                if unknown or len(set(names)) < len(names):
                    raise ValueError(f"{self.name}, {cell}, edge {edge}: {names!r} is not a set of known operations")

    @cached_property
    def _paths(self) -> dict[str, tuple[Path, ...]]:
        return {
            cell: tuple(Path(*edge, name) for edge, names in zip(EDGES, getattr(self, cell)) for name in names) for cell in CELLS
        }

    def paths(self, cell: str) -> tuple[Path, ...]:
        """All paths of a cell: what the entries of its architecture vector stand for."""
        return self._paths[cell]

    def nodes(self, cell: str) -> list[int]:
        """The node of each path: the labels of the node groups (`Groups.labels`), 14, 21, 28 and 35 paths in `darts`."""
        return [path.node for path in self.paths(cell)]

    def edges(self, cell: str) -> list[int]:
        """The number (0 to 13) of the edge of each path."""
        return [edge for edge, names in enumerate(getattr(self, cell)) for _ in names]

    def masks(self, genotype: Genotype) -> dict[str, tuple[bool, ...]]:
        """Which paths of the space live in the genotype; a path that the space does not have is an error."""
        masks = {}
        for cell in CELLS:
            wanted = set(genotype.paths(cell))
            foreign = wanted - set(self.paths(cell))
            if foreign:
                raise ValueError(f"{cell}: space {self.name!r} has no path {tuple(min(foreign))}")
            masks[cell] = tuple(path in wanted for path in self.paths(cell))
        return masks

    def genotype(self, masks: Masks) -> Genotype:
        """The genotype of the paths that live, as they are: see `Genotype.clean`."""
        chosen = {}
        for cell in CELLS:
            paths, mask = self.paths(cell), masks[cell]
            if len(mask) != len(paths):
                raise ValueError(f"{cell}: a mask has one entry for each of {len(paths)} paths, got {len(mask)}")
            chosen[cell] = [path for path, lives in zip(paths, mask) if lives and path.operation != "none"]
        return Genotype.from_paths(**chosen)


def everywhere(name: str, normal: Sequence[str], reduce: Sequence[str] | None = None) -> Space:
    """The same operations on every edge of a cell (`reduce=None`: of both)."""
    edges = len(EDGES)
    return Space(name, (tuple(normal),) * edges, (tuple(normal if reduce is None else reduce),) * edges)


def get(name: str) -> Space:
    """A space of this file by its name."""
    if name not in SPACES:
        close = difflib.get_close_matches(name, SPACES, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"unknown space {name!r}; {hint}known: {', '.join(SPACES)}")
    return SPACES[name]


def _edges(text: str) -> Edges:
    """'sk+d3, sk+d5, ...' for the 14 edges."""
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
            _edges("sk+d3, sk+d5, sk+d5, sk+s3, sk+d3, mx+sk, sk+s3, sk+s3, sk+d3, sk+s3, mx+sk, sk+d3, d3+d5, d3+d5"),
            _edges("mx+av, mx+d3, mx+av, mx+av, sk+d5, mx+av, mx+s3, sk+d3, sk+d5, mx+av, mx+av, sk+d5, sk+d5, sk+d5"),
        ),
        everywhere("S2", ("skip_connect", "sep_conv_3x3")),
        everywhere("S3", ("none", "skip_connect", "sep_conv_3x3")),
        everywhere("S4", ("noise", "sep_conv_3x3")),
    )
}
