"""Genotypes: which paths live in the two cells. A search result is such a file; the published ones have names.

A cell has the inputs 0 (output of the cell before the previous one) and 1 (output of the previous cell) and the nodes 2 to 5. A
path (node, source, operation) adds operation(source) to the node. A node without paths is dead; the output of a cell is the
concatenation of its living nodes.
"""

from __future__ import annotations

import difflib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any, NamedTuple

CELLS = ("normal", "reduce")
NODES = (2, 3, 4, 5)
OPERATIONS = (
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
    "sep_conv_7x7",
    "conv_7x1_1x7",
    "noise",
)


class Path(NamedTuple):
    """One operation from `source` into `node`."""

    node: int
    source: int
    operation: str


Cell = dict[str, tuple[tuple[str, int], ...]]


@dataclass(frozen=True)
class Genotype:
    """The living paths of both cells: {"2": ((operation, source), ...), ..., "5": (...)} each.

    Any number of paths may enter a node, several of them along one edge; missing (or empty) nodes are dead. Lists, pairs as
    lists and whole-number keys are accepted and brought to this form; whatever does not describe a cell is a ValueError that
    says where.
    """

    normal: Cell
    reduce: Cell

    def __post_init__(self) -> None:
        for cell in CELLS:
            object.__setattr__(self, cell, _checked_cell(cell, getattr(self, cell)))

    @classmethod
    def from_paths(cls, normal: Iterable[Path], reduce: Iterable[Path]) -> Genotype:
        """The genotype with these living paths."""
        cells: dict[str, dict[str, list[tuple[str, int]]]] = {}
        for cell, paths in (("normal", normal), ("reduce", reduce)):
            nodes: dict[str, list[tuple[str, int]]] = {}
            for path in paths:
                nodes.setdefault(str(path.node), []).append((path.operation, path.source))
            cells[cell] = nodes
        return cls(**cells)  # type: ignore[arg-type]

    def paths(self, cell: str) -> tuple[Path, ...]:
        """The paths of the cell "normal" or "reduce", node by node."""
        return tuple(Path(int(node), source, op) for node, pairs in getattr(self, cell).items() for op, source in pairs)

    def living(self, cell: str) -> tuple[int, ...]:
        """The living nodes of a cell, in order: what its output concatenates."""
        return tuple(int(node) for node in getattr(self, cell))

    def clean(self) -> Genotype:
        """Without the paths that start in dead nodes, and the nodes that die of it, until nothing changes."""
        return Genotype(**{cell: _clean(getattr(self, cell)) for cell in CELLS})

    def to_json(self) -> str:
        """One line for each node."""
        cells = (
            f'  "{cell}": {{\n'
            + ",\n".join(f'    "{n}": {json.dumps(pairs)}' for n, pairs in getattr(self, cell).items())
            + "\n  }"
            for cell in CELLS
        )
        return "{\n" + ",\n".join(cells) + "\n}\n"

    def save(self, path: str | os.PathLike) -> None:
        """Write the JSON file: whoever reads it sees the old content or the new, never a part."""
        target = File(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(self.to_json())
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)  # a temporary file belongs to its owner alone; a result does not
            os.replace(name, target)
        except BaseException:
            File(name).unlink(missing_ok=True)
            raise


def load(name_or_path: str | os.PathLike) -> Genotype:
    """A published genotype by name (upper or lower case), or the one in a JSON file."""
    name = os.fspath(name_or_path)
    names = {n.lower(): n for n in (*PUBLISHED, *ALIASES)}
    if name.lower() in names:
        known = names[name.lower()]
        return PUBLISHED[ALIASES.get(known, known)]
    file = File(name)
    if file.is_file():
        return _read(file)
    if file.suffix or len(file.parts) > 1:
        raise FileNotFoundError(f"no genotype file {name!r}")
    close = [names[n] for n in difflib.get_close_matches(name.lower(), names)]
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    raise ValueError(f"unknown genotype {name!r}: no such file, and no such name; {hint}known names: {', '.join(names.values())}")


def _read(file: File) -> Genotype:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    try:
        if not isinstance(data, dict) or set(data) != set(CELLS):
            found = ", ".join(map(repr, data)) if isinstance(data, dict) else type(data).__name__
            raise ValueError(f"a genotype is an object with the keys 'normal' and 'reduce', got {found or 'none'}")
        return Genotype(**data)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _checked_cell(cell: str, nodes: Any) -> Cell:
    if not isinstance(nodes, Mapping):
        raise ValueError(f"{cell}: expected {{node: [[operation, source], ...]}}, got {nodes!r}")
    checked = {str(node): _checked_node(cell, node, pairs) for node, pairs in nodes.items()}
    if len(checked) < len(nodes):
        raise ValueError(f"{cell}: a node is named twice in {', '.join(map(repr, nodes))}")
    return {node: checked[node] for node in sorted(checked) if checked[node]}


def _checked_node(cell: str, node: Any, pairs: Any) -> tuple[tuple[str, int], ...]:
    if str(node) not in map(str, NODES):
        raise ValueError(f"{cell}: nodes are {', '.join(map(str, NODES))}, got {node!r}")
    where = f"{cell}, node {node}"
    if not _is_list(pairs):
        raise ValueError(f"{where}: expected a list of [operation, source], got {pairs!r}")
    checked = tuple(_checked_pair(where, int(node), pair) for pair in pairs)
    twice = next((pair for pair in checked if checked.count(pair) > 1), None)
    if twice:
        raise ValueError(f"{where}: {list(twice)!r} appears twice")
    return checked


def _checked_pair(where: str, node: int, pair: Any) -> tuple[str, int]:
    if not _is_list(pair) or len(pair) != 2:
        raise ValueError(f"{where}: expected [operation, source], got {pair!r}")
    operation, source = pair
    if operation not in OPERATIONS:
        close = difflib.get_close_matches(str(operation), OPERATIONS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"{where}: unknown operation {operation!r}; {hint}known: {', '.join(OPERATIONS)}")
    if not isinstance(source, int) or isinstance(source, bool) or not 0 <= source < node:
        raise ValueError(f"{where}: the source of {operation} must be one of 0 to {node - 1}, got {source!r}")
    return operation, source


def _is_list(x: Any) -> bool:
    return isinstance(x, Sequence) and not isinstance(x, str)


def _clean(cell: Cell) -> Cell:
    while True:
        kept = {node: tuple((op, s) for op, s in pairs if s < 2 or str(s) in cell) for node, pairs in cell.items()}
        kept = {node: pairs for node, pairs in kept.items() if pairs}
        if kept == cell:
            return kept
        cell = kept


_SHORT = {
    "s3": "sep_conv_3x3",
    "s5": "sep_conv_5x5",
    "d3": "dil_conv_3x3",
    "d5": "dil_conv_5x5",
    "sk": "skip_connect",
    "mx": "max_pool_3x3",
    "av": "avg_pool_3x3",
}


def _parse(text: str) -> Cell:
    """'s3 1, s3 0 | ...': the paths into nodes 2, 3, 4, 5."""
    cell = {}
    for node, pairs in zip(NODES, text.split("|"), strict=True):
        words = (pair.split() for pair in pairs.split(","))
        cell[str(node)] = tuple((_SHORT[op], int(source)) for op, source in words)
    return cell


# Liu, Simonyan, Yang (DARTS); Chen, Xie, Wu, Tian (P-DARTS); Xu et al. (PC-DARTS); Yang et al. (ISTA-NAS): the published code.
PUBLISHED = {
    name: Genotype(_parse(normal), _parse(reduce))
    for name, normal, reduce in (
        (
            "DARTS_V1",
            "s3 1, s3 0 | sk 0, s3 1 | sk 0, s3 1 | s3 0, sk 2",
            "mx 0, mx 1 | sk 2, mx 0 | mx 0, sk 2 | sk 2, av 0",
        ),
        (
            "DARTS_V2",
            "s3 0, s3 1 | s3 0, s3 1 | s3 1, sk 0 | sk 0, d3 2",
            "mx 0, mx 1 | sk 2, mx 1 | mx 0, sk 2 | sk 2, mx 1",
        ),
        (
            "PDARTS",
            "sk 0, d3 1 | sk 0, s3 1 | s3 1, s3 3 | s3 0, d5 4",
            "av 0, s5 1 | s3 0, d5 2 | mx 0, d3 1 | d3 1, d5 3",
        ),
        (
            "PC_DARTS_cifar",
            "s3 1, sk 0 | s3 0, d3 1 | s5 0, s3 1 | av 0, d3 1",
            "s5 1, mx 0 | s5 1, s5 2 | s3 0, s3 3 | s3 1, s3 2",
        ),
        (
            "PC_DARTS_image",
            "sk 1, s3 0 | s3 0, sk 1 | s3 1, s3 3 | s3 1, d5 4",
            "s3 0, sk 1 | d5 2, mx 1 | s3 2, s3 1 | s5 0, s3 3",
        ),
        (
            "ISTA_twostage",
            "sk 0, d3 1 | s5 0, d3 2 | d3 1, s3 0 | s3 2, sk 0",
            "av 0, s5 1 | d5 2, mx 1 | d5 3, s3 1 | d5 4, s5 1",
        ),
        (
            "ISTA_onestage",
            "sk 0, d3 1 | s3 1, d5 2 | av 3, s3 1 | s5 1, s3 2",
            "av 0, mx 1 | sk 0, mx 1 | s5 1, av 0 | mx 0, d5 2",
        ),
        (
            "ISTA_ImageNet",
            "s3 1, s3 0 | s3 1, sk 2 | s3 1, s3 0 | s3 1, d5 4",
            "sk 0, s3 1 | d5 2, s3 0 | s3 0, sk 2 | s3 2, sk 3",
        ),
    )
}
ALIASES = {
    "DARTS": "DARTS_V2",
    "PC_DARTS": "PC_DARTS_cifar",
    "PC_DARTS_ImageNet": "PC_DARTS_image",
    "ISTA": "ISTA_twostage",
}
