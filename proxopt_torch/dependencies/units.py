"""Units: the indices of dimensions that can only be removed together.

Each index of each dimension of a parameter or buffer is an *atom*, a number. While the operators of a graph are read, atoms that
must be removed together are united; a class of united atoms is a unit: a channel, an attention head, a hidden unit.

A tensor of the graph holds *blocks*: sets of its dimensions with an array of atoms over these dimensions. A view of
(heads * size) as (heads, size) yields one block over both dimensions, so whether whole heads or single features can be removed is
left to the operators that follow. Dimensions without block (batch, sequence, space) are not tracked.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import fx

Ints: TypeAlias = NDArray[np.int64]


@dataclass
class Block:
    """dims: dimensions of a tensor, ascending. atoms: an array over these dimensions."""

    dims: tuple[int, ...]
    atoms: Ints


@dataclass
class Link:
    """Positions of a block of an input and the positions of a block of the output that depend on them and share their unit.

    block: index of the block of the output.
    """

    node: fx.Node
    source: int
    positions: Ints
    block: int
    targets: Ints


@dataclass
class Read:
    """Positions of a block of an input that the operator reads, whatever the output is used for.

    product: a zero there has no effect, as in a product that is summed.
    """

    node: fx.Node
    source: int
    positions: Ints
    product: bool = False


class Atoms:
    """The atoms, the pairs that are united, and the reasons why some can never be removed."""

    def __init__(self) -> None:
        self.count = 0
        self._pairs: list[tuple[Ints, Ints]] = []
        self.pins: list[tuple[Ints, str]] = []
        self.marks: list[tuple[Ints, str]] = []

    def new(self, *shape: int) -> Ints:
        size = int(np.prod(shape))
        self.count += size
        return np.arange(self.count - size, self.count).reshape(shape)

    def unite(self, a: Ints, b: Ints) -> None:
        """Remove the atoms a and b together, elementwise; both are broadcast to a common shape."""
        a, b = np.broadcast_arrays(a, b)
        if a.size:
            self._pairs.append((a.ravel(), b.ravel()))

    def collapse(self, block: Block, dims: set[int]) -> None:
        """Unite the atoms along dimensions of a block: only slices across all of them can be removed."""
        for axis, dim in enumerate(block.dims):
            if dim in dims:
                self.unite(block.atoms.take([0], axis), block.atoms)

    def pin(self, atoms: Ints, reason: str) -> None:
        """Never remove these atoms."""
        self.pins.append((np.unique(atoms), reason))

    def pinned(self, atoms: Ints) -> bool:
        """Whether none of these atoms can ever be removed."""
        return bool(self.pins) and bool(np.isin(atoms, np.concatenate([pinned for pinned, _ in self.pins])).all())

    def mark(self, atoms: Ints, kind: str) -> None:
        """Record what kind of units the atoms belong to."""
        self.marks.append((np.unique(atoms), kind))

    def units(self) -> Ints:
        """The unit of each atom."""
        if not self._pairs:
            return np.arange(self.count)
        rows = np.concatenate([a for a, _ in self._pairs])
        columns = np.concatenate([b for _, b in self._pairs])
        graph = coo_matrix((np.ones(len(rows), bool), (rows, columns)), (self.count, self.count))
        labels: Ints = connected_components(graph, directed=False)[1].astype(np.int64)
        return labels


@dataclass(eq=False)
class Piece:
    """A block of one operand, in the dimensions of a joint index space. at: positions in the block, shaped like the atoms."""

    operand: int
    source: int
    block: Block
    at: Ints


@dataclass
class Joined:
    """A block of the joint index space of several operands, and the pieces that share it."""

    block: Block
    pieces: list[Piece] = field(default_factory=list)

    def reduced(self, dims: set[int]) -> tuple[Block, list[tuple[Piece, Ints, Ints]]]:
        """The block without some dimensions, and for each piece its positions in its own block and in the reduced block."""
        kept = tuple(d for d in self.block.dims if d not in dims)
        shape = self.block.atoms.shape
        lines = [np.arange(n) if d in kept else np.zeros(n, np.int64) for d, n in zip(self.block.dims, shape)]
        sizes = [n if d in kept else 1 for d, n in zip(self.block.dims, shape)]
        targets = np.ravel_multi_index(np.meshgrid(*lines, indexing="ij"), sizes)
        first = tuple(slice(None) if d in kept else 0 for d in self.block.dims)
        links = [(p, spread(p.at, p.block.dims, self.block).ravel(), targets.ravel()) for p in self.pieces]
        return Block(kept, self.block.atoms[first]), links


def spread(array: Ints, dims: tuple[int, ...], over: Block) -> Ints:
    """An array over some dimensions of a block, repeated along the others."""
    shape = [n if d in dims else 1 for d, n in zip(over.dims, over.atoms.shape)]
    return np.broadcast_to(array.reshape(shape), over.atoms.shape)


def align(
    atoms: Atoms, pieces: list[Piece], sizes: list[tuple[int, ...]], reason: str, summed: frozenset[int]
) -> tuple[list[Joined], list[Piece]]:
    """Unite the blocks of operands that meet in the same dimensions.

    Args:
      pieces: the blocks of all operands, in the dimensions of the joint index space.
      sizes: for each operand its size in each of these dimensions, 1 where it is broadcast.
      summed: dimensions over which products are summed, along which nothing is removed alone if that can be avoided.
      reason: why indices that meet an untracked dimension cannot be removed.

    Returns:
      The blocks of the joint index space, and the pieces that belong to none of them (their atoms are pinned).
    """
    joined, lost = [], []
    for members in _components(pieces):
        found, separate = _join(atoms, members, sizes, reason, summed)
        for p in separate:
            atoms.pin(p.block.atoms, reason)
        joined += found
        lost += separate
    return joined, lost


def _join(
    atoms: Atoms, members: list[Piece], sizes: list[tuple[int, ...]], reason: str, summed: frozenset[int]
) -> tuple[list[Joined], list[Piece]]:
    """``align`` for pieces that are connected by shared dimensions."""
    dims = tuple(sorted({d for p in members for d in p.block.dims}))
    whole = [p for p in members if p.block.dims == dims]
    if not whole:
        return [], members
    block = whole[0].block
    for p in whole[1:]:
        atoms.unite(block.atoms, p.block.atoms)
    free = _removable_dims(members, block, sizes, summed)
    if not free:
        atoms.pin(block.atoms, reason)
    share = [p for p in members if free and free <= set(p.block.dims)]
    for p in share:
        atoms.collapse(p.block, set(p.block.dims) - free)
        atoms.unite(spread(p.block.atoms, p.block.dims, block), block.atoms)
    kept = [p for p in members if p in whole or p in share]
    return [Joined(block, kept)], [p for p in members if p not in whole and p not in share]


def _components(pieces: list[Piece]) -> list[list[Piece]]:
    """The pieces, in sets that share dimensions."""
    found: list[tuple[set[int], list[Piece]]] = []
    for piece in pieces:
        dims, members = set(piece.block.dims), [piece]
        for other in [f for f in found if f[0] & dims]:
            found.remove(other)
            dims, members = dims | other[0], other[1] + members
        found.append((dims, members))
    return [sorted(members, key=lambda p: p.operand) for _, members in found]


def _removable_dims(members: list[Piece], block: Block, sizes: list[tuple[int, ...]], summed: frozenset[int]) -> set[int]:
    """The dimensions of the block along which slices can be removed."""
    dims = set(block.dims)
    for operand, shape in enumerate(sizes):
        tracked = {d for p in members if p.operand == operand for d in p.block.dims}
        dims -= {d for d in block.dims if shape[d] > 1 and d not in tracked}
    part = [set(p.block.dims) for p in members if set(p.block.dims) != set(block.dims)]
    if not part or not dims:
        return dims
    outer = dims - summed
    if outer and outer != dims and all(outer <= p or not outer & p for p in part):
        return outer  # whole heads, not features of a head
    shared = dims.intersection(*part)
    # A part over the leading dimension: one value per channel, or per head. A part over the others only: one value per feature
    # of a head, the same for all heads (rotary embeddings, norms of queries), so that the heads can be removed and the features
    # cannot.
    if block.dims[0] in shared:
        return shared
    return dims - set().union(*part) or {min(dims)}
