"""The recovery of ISTA-NAS in NumPy, the same in every library: from compressed variables to codes, supports and columns.

See `methods.ista` for the equations. Arrays are float64. Codes and measurement matrices are lists by node, in a dict by cell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from proxopt import sparse_code

from ..space.spaces import Space

Codes = dict[str, list[np.ndarray]]


class Support(NamedTuple):
    """The paths of a cell that a recovery keeps: their indices, codes z_S and columns A_S.

    paths, values: (nodes, n). columns: (nodes, n, rows). n is the largest number of paths into a node; nodes with fewer repeat
    one of theirs with value 0 and column 0, which adds 0 to its weight.
    """

    paths: np.ndarray
    values: np.ndarray
    columns: np.ndarray


def members(space: Space, sparsity: int) -> dict[str, list[list[int]]]:
    """For each node of each cell the indices of its paths. ValueError if there are fewer than `sparsity`."""
    found: dict[str, list[list[int]]] = {}
    if space.layout.last and sparsity != 1:
        raise ValueError(f"sparsity must be 1 in {space.name}, where an edge has one operation, got {sparsity}")
    for cell in space.layout.cells:
        paths = space.paths(cell)
        found[cell] = [[i for i, p in enumerate(paths) if p.node == n and p.operation != "none"] for n in space.layout.nodes]
        for node, own in zip(space.layout.nodes, found[cell]):
            if len(own) < sparsity:
                raise ValueError(
                    f"sparsity must be at most {len(own)}, the paths into node {node} of the {cell} cell of"
                    f" {space.name}, got {sparsity}"
                )
    return found


def solve(matrices: Codes, variables: Mapping[str, np.ndarray], strength: float) -> tuple[Codes, float]:
    """Solve for the codes of all nodes of all cells in one batch; return them and the largest certified duality gap.

    Raises ValueError if a variable is not finite.
    """
    b = np.concatenate([variables[cell] for cell in matrices])
    if not np.isfinite(b).all():
        raise ValueError(f"the compressed variables must be finite, got {b[~np.isfinite(b)][0]}: a lower arch_lr may help")
    found = sparse_code([A for of_cell in matrices.values() for A in of_cell], b, strength)
    many = len(b) // len(matrices)
    return {cell: found.x[i * many : (i + 1) * many] for i, cell in enumerate(matrices)}, float(found.gap.max())


def distances(codes: Codes, last: Codes) -> dict[str, list[float]]:
    """The distance of the code of each node from the last one."""
    return {cell: [float(np.linalg.norm(z - old)) for z, old in zip(codes[cell], last[cell])] for cell in codes}


def mean_distance(found: Mapping[str, Sequence[float]]) -> float:
    """The mean of the distances of all nodes of all cells."""
    return float(np.mean([d for of_cell in found.values() for d in of_cell]))


def kept(space: Space, sparsity: int) -> int:
    """The largest number of paths that a recovery keeps of a node: 3 in NAS-Bench-201, whose nodes have 1, 2 and 3 edges."""
    return len(space.layout.nodes) if space.layout.last else sparsity


def edges_of(space: Space, cell: str) -> list[int] | None:
    """The edge of each path where `support` has one path of each edge; None where it has the largest entries of a node."""
    return space.edges(cell) if space.layout.last else None


def support(
    own: Sequence[Sequence[int]],
    codes: Sequence[np.ndarray],
    matrices: Sequence[np.ndarray],
    variables: np.ndarray,
    sparsity: int,
    edges: Sequence[int] | None = None,
) -> Support:
    """The support of each node of a cell: its `sparsity` largest entries.

    Args:
      own: the indices of the paths into each node, from `members`.
      edges: the edge of each path of a cell of NAS-Bench-201, of which each has the support of its largest entry; None: others.
    """
    chosen = [
        largest_entries(*one, sparsity) if edges is None else largest_by_edge(*one, [edges[i] for i in m])
        for m, *one in zip(own, codes, matrices, variables)
    ]
    most, rows = max(map(len, chosen)), variables.shape[1]
    paths = np.array([[m[i] for i in s] + [m[s[0]]] * (most - len(s)) for m, s in zip(own, chosen)])
    values, columns = np.zeros(paths.shape), np.zeros((*paths.shape, rows))
    for node, (z, A, s) in enumerate(zip(codes, matrices, chosen)):
        values[node, : len(s)], columns[node, : len(s)] = z[s], A[:, s].T
    return Support(paths, values, columns)


def largest_by_edge(code: np.ndarray, A: np.ndarray, b: np.ndarray, edges: Sequence[int]) -> list[int]:
    """The index of the largest entry of a code on each edge, by the order of `largest_entries`. edges: of the entries."""
    found: dict[int, int] = {}
    for i in strongest_first(code, A, b):
        found.setdefault(edges[i], int(i))
    return sorted(found.values())


def largest_entries(code: np.ndarray, A: np.ndarray, b: np.ndarray, sparsity: int) -> list[int]:
    """Indices of the `sparsity` largest entries of a code, and of the columns most correlated with b if fewer are nonzero."""
    return sorted(int(i) for i in strongest_first(code, A, b)[:sparsity])


def strongest_first(code: np.ndarray, A: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Indices of the entries of a code by size, and those of size 0 by the correlation of their columns with b."""
    return np.lexsort((-np.abs(A.T @ b), -np.abs(code)))
