"""Genotypes: the paths of each cell of a network. A search writes one as a JSON file; published ones have names.

A path (node, source, operation) adds operation(source) to the node. A node is active if it has at least one path.

A convolutional network has a normal and a reduction cell, with inputs 0 (output of the cell before the previous one) and 1
(output of the previous cell) and nodes 2 to 5; the output of a cell is the concatenation of its active nodes. A recurrent
network has one cell, with input 0 (computed from the word and the last hidden state) and nodes 1 to 8; the hidden state is the
mean of the active nodes. A network of NAS-Bench-201 has one cell, with input 0 (output of the previous cell) and nodes 1 to 3;
its output is node 3. Cells of that space are also read and written as the strings of its publication (`CellGenotype`).
"""

from __future__ import annotations

import ast
import difflib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any, ClassVar, NamedTuple, TypeVar

from .files import write_text


@dataclass(frozen=True)
class Layout:
    """The cells of a kind of network, the inputs and nodes of each cell, and the operations allowed on an edge.

    printed: the fields of the published named tuple: for each cell its paths, then its output nodes. printed_paths: the number
    of paths into each node there. last: the output of a cell is its last node; otherwise it is computed from all active nodes.
    """

    name: str
    cells: tuple[str, ...]
    inputs: tuple[int, ...]
    nodes: tuple[int, ...]
    operations: tuple[str, ...]
    printed: tuple[str, ...]
    printed_paths: int
    last: bool = False

    @property
    def outputs(self) -> tuple[int, ...]:
        """The nodes from which the output of a cell is computed, as far as they are active."""
        return self.nodes[-1:] if self.last else self.nodes

    @property
    def edges(self) -> tuple[tuple[int, int], ...]:
        """(node, source) of every edge, ordered by node, then by source."""
        return tuple((node, source) for node in self.nodes for source in range(node))


CONVOLUTIONAL = Layout(
    "convolutional",
    ("normal", "reduce"),
    (0, 1),
    (2, 3, 4, 5),
    (
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
    ),
    ("normal", "normal_concat", "reduce", "reduce_concat"),
    2,
)
RECURRENT = Layout(
    "recurrent",
    ("recurrent",),
    (0,),
    tuple(range(1, 9)),
    ("tanh", "relu", "sigmoid", "identity"),
    ("recurrent", "concat"),
    1,
)
NASBENCH201 = Layout(
    "nasbench201",
    ("cell",),
    (0,),
    (1, 2, 3),
    ("skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3"),
    (),
    0,
    last=True,
)
CELLS, NODES = CONVOLUTIONAL.cells, CONVOLUTIONAL.nodes


def cell_name(cell: str) -> str:
    """The name of a cell in a text: normal cell, reduce cell, recurrent cell, cell."""
    return cell if cell == "cell" else f"{cell} cell"


class Path(NamedTuple):
    """One operation from `source` into `node`."""

    node: int
    source: int
    operation: str


Cell = dict[str, tuple[tuple[str, int], ...]]


class AnyGenotype:
    """The paths of all cells of a layout: an attribute {node: ((operation, source), ...)} for each cell.

    Any number of paths may enter a node, several of them along one edge; a node that is missing or empty is not active. Lists,
    pairs as lists and integer keys are accepted and converted.

    Raises:
      ValueError: an attribute does not describe a cell; the message gives the place.
    """

    layout: ClassVar[Layout]

    def __post_init__(self) -> None:
        for cell in self.layout.cells:
            object.__setattr__(self, cell, _checked_cell(self.layout, cell, getattr(self, cell)))

    @classmethod
    def from_paths(cls: type[G], **cells: Iterable[Path]) -> G:
        """The genotype with these paths, given for each cell by name."""
        made: dict[str, dict[str, list[tuple[str, int]]]] = {}
        for cell, paths in cells.items():
            nodes: dict[str, list[tuple[str, int]]] = {}
            for path in paths:
                nodes.setdefault(str(path.node), []).append((path.operation, path.source))
            made[cell] = nodes
        return cls(**made)

    def paths(self, cell: str) -> tuple[Path, ...]:
        """The paths of the cell of this name, ordered by node."""
        return tuple(Path(int(node), source, op) for node, pairs in getattr(self, cell).items() for op, source in pairs)

    def active_nodes(self, cell: str) -> tuple[int, ...]:
        """The nodes of a cell that have paths, in order."""
        return tuple(int(node) for node in getattr(self, cell))

    def output_nodes(self, cell: str) -> tuple[int, ...]:
        """The active nodes from which the output of a cell is computed."""
        return tuple(node for node in self.active_nodes(cell) if node in self.layout.outputs)

    def clean(self: G) -> G:
        """Remove paths whose source has no paths itself, repeatedly, until every path starts in an input or an active node."""
        inputs = self.layout.inputs
        return type(self)(**{cell: _clean(getattr(self, cell), inputs) for cell in self.layout.cells})

    def to_json(self) -> str:
        """JSON text with one line for each node."""
        cells = (
            f'  "{cell}": {{\n'
            + ",\n".join(f'    "{n}": {json.dumps(pairs)}' for n, pairs in getattr(self, cell).items())
            + "\n  }"
            for cell in self.layout.cells
        )
        return "{\n" + ",\n".join(cells) + "\n}\n"

    def save(self, path: str | os.PathLike) -> None:
        """Write the JSON file atomically: a reader sees the old content or the new one, never a part."""
        target = File(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_text(target, self.to_json())


G = TypeVar("G", bound=AnyGenotype)


@dataclass(frozen=True)
class Genotype(AnyGenotype):
    """The genotype of a convolutional network."""

    layout: ClassVar[Layout] = CONVOLUTIONAL
    normal: Cell
    reduce: Cell


@dataclass(frozen=True)
class RecurrentGenotype(AnyGenotype):
    """The genotype of a recurrent network."""

    layout: ClassVar[Layout] = RECURRENT
    recurrent: Cell


@dataclass(frozen=True)
class CellGenotype(AnyGenotype):
    """The cell of a network of NAS-Bench-201.

    The published string lists for each node the operation on the edge from each source, and none where there is no path:

        |nor_conv_3x3~0|+|none~0|skip_connect~1|+|avg_pool_3x3~0|none~1|nor_conv_1x1~2|

    Source: Dong, Yang, "NAS-Bench-201: Extending the scope of reproducible neural architecture search", ICLR 2020.
    """

    layout: ClassVar[Layout] = NASBENCH201
    cell: Cell

    def to_string(self) -> str:
        """The published string. ValueError for an edge with several operations, which it cannot express."""
        named: dict[tuple[int, int], str] = {}
        for node, source, operation in self.paths("cell"):
            if (node, source) in named:
                both = f"{named[node, source]} and {operation}"
                raise ValueError(f"the string of a cell names one operation for each edge, got {both} from {source} to {node}")
            named[node, source] = operation
        sources = ((node, range(node)) for node in self.layout.nodes)
        return "+".join("|" + "".join(f"{named.get((node, s), 'none')}~{s}|" for s in each) for node, each in sources)

    @classmethod
    def from_string(cls, text: str) -> CellGenotype:
        """The cell of a published string. ValueError for any other text."""
        layout, nodes = cls.layout, text.strip().split("+")
        known = ("none", *layout.operations)
        paths = []
        for node, part in zip(layout.nodes, nodes):
            found = re.findall(r"\|(\w+)~([0-9])(?=\|)", part)
            whole = "|" + "".join(f"{operation}~{source}|" for operation, source in found)
            if part != whole or [int(source) for _, source in found] != list(range(node)):
                raise ValueError(f"node {node} must be |operation~source|...| with the sources 0 to {node - 1}, got {part!r}")
            for operation, _ in found:
                if operation not in known:
                    close = similar(operation, known)
                    hint = f"did you mean {close[0]!r}? " if close else ""
                    raise ValueError(f"node {node}: unknown operation {operation!r}; {hint}known: {', '.join(known)}")
            paths += [Path(node, int(source), operation) for operation, source in found if operation != "none"]
        if len(nodes) != len(layout.nodes):
            raise ValueError(f"a cell must be {len(layout.nodes)} nodes separated by '+', got {len(nodes)}: {text!r}")
        return cls.from_paths(cell=paths)


def load_genotype(name_or_path: str | os.PathLike, kind: type[G] = Genotype) -> G:  # type: ignore[assignment]
    """Return a published genotype by name (case is ignored), read one from a file, or parse a printed one.

    A file contains the JSON of `to_json`, or one genotype as the published code prints it, with or without a name before it:

        Genotype(normal=[('sep_conv_3x3', 0), ...], normal_concat=range(2, 6), reduce=[...], reduce_concat=range(2, 6))
        Genotype(recurrent=[('sigmoid', 0), ...], concat=range(1, 9))

    A printed genotype lists two paths for each node of a convolutional cell and one for each node of a recurrent cell. It is
    parsed, never executed. A cell of NAS-Bench-201 (`CellGenotype`) is printed as its string.

    Args:
      name_or_path: a name, a path, or the printed genotype itself.
      kind: the class of genotype to return.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: there is no such name, or the content does not describe a genotype of this kind.
    """
    name = os.fspath(name_or_path)
    if kind is CellGenotype and name.lstrip().startswith("|"):
        return CellGenotype.from_string(name)  # type: ignore[return-value]
    published, aliases = PUBLISHED.get(kind.layout.name, {}), ALIASES if kind is Genotype else {}
    names = {n.lower(): n for n in (*published, *aliases)}
    if name.lower() in names:
        known = names[name.lower()]
        return published[aliases.get(known, known)]  # type: ignore[return-value]
    if re.match(rf"\s*(\w+\s*=\s*)?{_PRINTED}", name):
        return _from_printed(name, kind)
    file = File(name)
    if _is_file(file):
        return _read(file, kind)
    if file.suffix or len(file.parts) > 1:
        raise FileNotFoundError(f"no genotype file {name!r}")
    close = similar(name, names.values())
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    raise ValueError(f"unknown genotype {name!r}: no such file, and no such name; {hint}known names: {', '.join(names.values())}")


def load_image_genotype(name_or_path: str | os.PathLike) -> Genotype | CellGenotype:
    """Return the genotype of a convolutional network: what `load_genotype` takes, or a cell of NAS-Bench-201.

    Such a cell is the published string or a file, with JSON or the string. Errors as those of `load_genotype`.
    """
    name = os.fspath(name_or_path)
    is_cell = _CELL.match(name) or (
        _is_file(File(name)) and _CELL.match(File(name).read_text(encoding="utf-8-sig", errors="replace"))
    )
    return load_genotype(name, CellGenotype if is_cell else Genotype)


_CELL = re.compile(r"\s*(\||{\s*\"cell\"\s*:)")  # how a cell of NAS-Bench-201 begins, as a string or as JSON


def similar(word: str, known: Iterable[str]) -> list[str]:
    """The known words that `word` may be a misspelling of, closest first; case is ignored."""
    by_lower = {k.lower(): k for k in known}
    return [
        by_lower[m] for m in difflib.get_close_matches(word.lower(), by_lower, cutoff=0.75)
    ]  # high enough that 'none' does not suggest 'noise'


def _is_file(file: File) -> bool:
    try:
        return file.is_file()
    except OSError:  # too long for a file name
        return False


def _read(file: File, kind: type[G]) -> G:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} must be UTF-8 text, but {error}") from None
    try:
        if kind is CellGenotype and text.lstrip().startswith("|"):
            return CellGenotype.from_string(text)  # type: ignore[return-value]
        if re.search(_PRINTED, text) and not text.lstrip().startswith(("{", "[")):
            return _from_printed(text, kind)
        return _from_json(text, kind)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _from_json(text: str, kind: type[G]) -> G:
    data = json.loads(text)
    cells = kind.layout.cells
    if not isinstance(data, dict) or set(data) != set(cells):
        found = ", ".join(map(repr, data)) if isinstance(data, dict) else type(data).__name__
        keys = f"key{'s' if len(cells) > 1 else ''} {' and '.join(map(repr, cells))}"
        raise ValueError(f"a {kind.layout.name} genotype is an object with the {keys}, got {found or 'none'}")
    return kind(**data)


_PRINTED = r"\b(Recurrent)?Genotype\("


def _from_printed(text: str, kind: type[G]) -> G:
    """Parse a text that contains a printed named tuple or a printed object of this module."""
    layout, fields = kind.layout, _fields(text)
    if set(fields) == set(layout.cells):  # an object of this module
        return kind(**fields)
    if set(fields) != set(layout.printed):
        raise ValueError(f"a printed {layout.name} genotype has the fields {', '.join(layout.printed)}, got {', '.join(fields)}")
    made = kind(**{cell: _by_node(layout, cell, fields[cell]) for cell in layout.cells})
    for cell, field in zip(layout.cells, layout.printed[1::2]):
        if not _is_list(fields[field]) or sorted(map(str, fields[field])) != [str(n) for n in made.active_nodes(cell)]:
            nodes = ", ".join(map(str, made.active_nodes(cell)))
            raise ValueError(f"{field} must hold all nodes with paths, {nodes}: others cannot be built, got {fields[field]!r}")
    return made


def _fields(text: str) -> dict[str, Any]:
    """The fields of the one printed genotype in a text, by name."""
    starts = [match.start() for match in re.finditer(_PRINTED, text)]
    if len(starts) > 1:
        raise ValueError(f"one printed genotype is read at a time, got {len(starts)}")
    try:
        call = ast.parse(text[starts[0] :].strip(), mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            raise ValueError("something follows it")
        if call.args or any(k.arg is None for k in call.keywords):
            raise ValueError("not all of its fields have names")
        return {str(k.arg): _literal(k.value) for k in call.keywords}
    except (SyntaxError, ValueError, TypeError, OverflowError, MemoryError, RecursionError) as error:
        what = error.msg if isinstance(error, SyntaxError) else error
        raise ValueError(f"a printed genotype must be Genotype(field=..., ...) of lists, pairs and ranges, but {what}") from None


def _literal(node: ast.expr) -> Any:
    """Evaluate a literal, or the numbers of a range."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "range":
        numbers = range(*map(_literal, node.args))
        if node.keywords or len(numbers) > 99:
            raise ValueError(f"{ast.unparse(node)} is no range of nodes")
        return list(numbers)
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise ValueError(f"{ast.unparse(node)} is none of them") from None


def _by_node(layout: Layout, cell: str, pairs: Any) -> dict[int, list]:
    """Convert the printed list of the pairs of all nodes to {node: pairs}."""
    each = layout.printed_paths
    if not _is_list(pairs) or len(pairs) % each:
        raise ValueError(f"{cell}: expected a list of (operation, source), {each} for each node, got {pairs!r}")
    return {layout.nodes[0] + i // each: list(pairs[i : i + each]) for i in range(0, len(pairs), each)}


def _checked_cell(layout: Layout, cell: str, nodes: Any) -> Cell:
    if not isinstance(nodes, Mapping):
        raise ValueError(f"{cell}: expected {{node: [[operation, source], ...]}}, got {nodes!r}")
    checked = {str(node): _checked_node(layout, cell, node, pairs) for node, pairs in nodes.items()}
    if len(checked) < len(nodes):
        raise ValueError(f"{cell}: a node is named twice in {', '.join(map(repr, nodes))}")
    return {node: checked[node] for node in sorted(checked) if checked[node]}


def _checked_node(layout: Layout, cell: str, node: Any, pairs: Any) -> tuple[tuple[str, int], ...]:
    if str(node) not in map(str, layout.nodes):
        raise ValueError(f"{cell}: nodes are {', '.join(map(str, layout.nodes))}, got {node!r}")
    where = f"{cell}, node {node}"
    if not _is_list(pairs):
        raise ValueError(f"{where}: expected a list of [operation, source], got {pairs!r}")
    checked = tuple(_checked_pair(layout.operations, where, int(node), pair) for pair in pairs)
    twice = next((pair for pair in checked if checked.count(pair) > 1), None)
    if twice:
        raise ValueError(f"{where}: {list(twice)!r} appears twice")
    return checked


def _checked_pair(operations: Sequence[str], where: str, node: int, pair: Any) -> tuple[str, int]:
    if not _is_list(pair) or len(pair) != 2:
        raise ValueError(f"{where}: expected [operation, source], got {pair!r}")
    operation, source = pair
    if operation == "none":
        raise ValueError(f"{where}: 'none' means that there is no path, and a genotype lists existing paths only")
    if operation not in operations:
        close = similar(str(operation), operations)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"{where}: unknown operation {operation!r}; {hint}known: {', '.join(operations)}")
    if not isinstance(source, int) or isinstance(source, bool) or not 0 <= source < node:
        raise ValueError(f"{where}: the source of {operation} must be one of 0 to {node - 1}, got {source!r}")
    return operation, source


def _is_list(x: Any) -> bool:
    return isinstance(x, Sequence) and not isinstance(x, str)


def _clean(cell: Cell, inputs: Sequence[int]) -> Cell:
    while True:
        kept = {node: tuple((op, s) for op, s in pairs if s in inputs or str(s) in cell) for node, pairs in cell.items()}
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
    """Parse 's3 1, s3 0 | ...', the paths into nodes 2, 3, 4 and 5."""
    cell = {}
    for node, pairs in zip(NODES, text.split("|"), strict=True):
        words = (pair.split() for pair in pairs.split(","))
        cell[str(node)] = tuple((_SHORT[op], int(source)) for op, source in words)
    return cell


# From the published code of DARTS (Liu et al.), P-DARTS (Chen et al.), PC-DARTS (Xu et al.) and ISTA-NAS (Yang et al.).
_CONVOLUTIONAL = {
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
_RECURRENT = {
    name: RecurrentGenotype({str(node): ((word[:-1], int(word[-1])),) for node, word in enumerate(text.split(), 1)})
    for name, text in (
        ("DARTS_V1", "relu0 relu1 tanh2 relu3 relu4 identity1 relu5 relu1"),
        ("DARTS_V2", "sigmoid0 relu1 relu1 identity1 tanh2 sigmoid5 tanh3 relu5"),
    )
}
PUBLISHED: dict[str, Mapping[str, AnyGenotype]] = {"convolutional": _CONVOLUTIONAL, "recurrent": _RECURRENT}
ALIASES = {
    "DARTS": "DARTS_V2",
    "PC_DARTS": "PC_DARTS_cifar",
    "PC_DARTS_ImageNet": "PC_DARTS_image",
    "ISTA": "ISTA_twostage",
}
