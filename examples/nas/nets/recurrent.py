"""What the recurrent networks of all libraries share: dropout probabilities, and which paths into a node are computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..space.genotype import RecurrentGenotype
from ..space.spaces import Space

CELL = "recurrent"
OPERATIONS = RecurrentGenotype.layout.operations
RANGE = 0.04  # initial weights are uniform in [-RANGE, RANGE]


@dataclass(frozen=True)
class Drops:
    """Dropout probabilities: of words of the vocabulary, of entries of the embedded word, of the same entries as input of the
    cell, of the states that enter a product, and of the output."""

    words: float = 0.0
    embedding: float = 0.0
    input: float = 0.0
    hidden: float = 0.0
    output: float = 0.0

    @classmethod
    def of(cls, settings: Any) -> Drops:
        """The probabilities in the settings of a language model."""
        s = settings
        return cls(s.drop_words, s.drop_embedding, s.drop_input, s.drop_hidden, s.drop_output)


class Dropped(NamedTuple):
    """Dropout masks of a batch as factors: (vocabulary, 1) for words, else (batch, hidden); None: no dropout."""

    words: Any = None
    embedding: Any = None
    input: Any = None
    hidden: Any = None
    output: Any = None


class NodePaths(NamedTuple):
    """The computed paths into a node: its sources, the index of each path (source, operation), and the operations in use.

    paths: a row for each source and a column for each of OPERATIONS; None: no such path.
    """

    node: int
    sources: tuple[int, ...]
    paths: tuple[tuple[int | None, ...], ...]
    used: tuple[int, ...]


def supernet_paths(space: Space, active: Sequence[bool] | None = None) -> tuple[NodePaths, ...]:
    """The paths of a supernet that are computed: those active whose source is the input or has a computed path.

    Raises ValueError if there are none.
    """
    found, computed = [], list(space.layout.inputs)
    for n in space.layout.nodes:
        own = {
            (path.source, OPERATIONS.index(path.operation)): i
            for i, path in enumerate(space.paths(CELL))
            if path.node == n and path.source in computed and path.operation != "none" and (active is None or active[i])
        }
        if own:
            found.append(_node_paths(n, own))
            computed.append(n)
    if not found:
        raise ValueError("no path is active in the recurrent cell")
    return tuple(found)


def genotype_paths(genotype: RecurrentGenotype) -> tuple[NodePaths, ...]:
    """The paths of a genotype without its dead ends. Raises ValueError if there are none."""
    genotype = genotype.clean()
    paths = genotype.paths(CELL)
    if not paths:
        raise ValueError("no path of the genotype reaches the input of the recurrent cell")
    own = lambda n: {(path.source, OPERATIONS.index(path.operation)): i for i, path in enumerate(paths) if path.node == n}
    return tuple(_node_paths(n, own(n)) for n in genotype.active_nodes(CELL))


def _node_paths(node: int, own: dict[tuple[int, int], int]) -> NodePaths:
    sources = tuple(sorted({source for source, _ in own}))
    rows = tuple(tuple(own.get((source, o)) for o in range(len(OPERATIONS))) for source in sources)
    return NodePaths(node, sources, rows, tuple(sorted({o for _, o in own})))
