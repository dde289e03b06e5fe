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

    paths, values: (nodes, sparsity). columns: (nodes, sparsity, rows).
    """

    paths: np.ndarray
    values: np.ndarray
    columns: np.ndarray


def members(space: Space, sparsity: int) -> dict[str, list[list[int]]]:
    """For each node of each cell the indices of its paths. ValueError if there are fewer than `sparsity`."""
    found = {}
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


def support(
    own: Sequence[Sequence[int]],
    codes: Sequence[np.ndarray],
    matrices: Sequence[np.ndarray],
    variables: np.ndarray,
    sparsity: int,
) -> Support:
    """The support of each node of a cell. own: the indices of the paths into each node, from `members`."""
    chosen = [largest_entries(*one, sparsity) for one in zip(codes, matrices, variables)]
    return Support(
        np.array([[m[i] for i in s] for m, s in zip(own, chosen)]),
        np.stack([z[s] for z, s in zip(codes, chosen)]),
        np.stack([A[:, s].T for A, s in zip(matrices, chosen)]),
    )


def largest_entries(code: np.ndarray, A: np.ndarray, b: np.ndarray, sparsity: int) -> list[int]:
    """Indices of the `sparsity` largest entries of a code, and of the columns most correlated with b if fewer are nonzero."""
    order = np.lexsort((-np.abs(A.T @ b), -np.abs(code)))
    return sorted(int(i) for i in order[:sparsity])
