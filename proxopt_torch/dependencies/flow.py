"""What the rules of the operators share: the blocks of each tensor of the graph, and how they depend on those of its inputs."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, fx

from .trace import Trace, module_path, shape_of
from .units import Atoms, Block, Ints, Joined, Link, Piece, Read, align

Operand: TypeAlias = tuple[fx.Node, tuple[int, ...]]  # a tensor, and for each of its dimensions one of a joint index space


@dataclass
class Affine:
    """A linear map of channels: ``output[row] = sum over columns and taps of matrix * input[column] + bias[row]``.

    source: block of the input with the channels, None where they are untracked. columns: positions in this block, one row
    for each input channel. rows: block of the output, None where untracked. weight, order: the tensor, and a function that
    arranges it as (groups, rows, columns, taps). padded: constants become different at the border. fold: the bias that can
    take constants, by its name or, where the layer has none, by the path of the layer; "" where there is none.
    """

    node: fx.Node
    source: int | None
    columns: Ints
    rows: int | None
    weight: fx.Node
    order: Callable[[Tensor], Tensor]
    bias: fx.Node | None = None
    padded: bool = False
    fold: str = ""


@dataclass
class Step:
    """One operator: the blocks of its output and how they depend on those of its inputs.

    value: how constants pass, a key of ``values.CONSTANTS``.
    """

    node: fx.Node
    blocks: list[Block] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    value: str = "varies"
    affine: Affine | None = None
    operands: list[Any] = field(default_factory=list)


@dataclass
class Even:
    """Parts of an axis of a block, ended by these indices, that must keep equal sizes. reason: why."""

    atoms: Ints
    axis: int
    ends: list[int]
    reason: str

    def parts(self, unit: Ints) -> list[Ints]:
        """The units of each slice, for each part."""
        units = np.moveaxis(unit[self.atoms], self.axis, 0)
        return [part.reshape(len(part), -1) for part in np.split(units, self.ends[:-1])]


class Flow:
    """All that is found while the operators of a graph are read in order."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.atoms = Atoms()
        self.steps: dict[fx.Node, Step] = {}
        self.leaves: dict[str, list[Ints | None]] = {}
        self.roles: dict[tuple[str, int], str] = {}
        self.unknown: dict[str, str] = {}
        self.views: list[fx.Node] = []
        self.rigid: list[tuple[Ints, int]] = []  # slices along an axis of a block that must all keep something
        self.even: list[Even] = []
        self.volatile: set[fx.Node] = set()  # tensors that are changed through another name
        self._starts: list[int] = []
        self._owners: list[tuple[str, int]] = []
        self._numeric: dict[fx.Node, Tensor | None] = {}
        self._origins: dict[fx.Node, frozenset[str]] = {}

    # The inputs of an operator.

    def blocks(self, x: Any) -> list[Block]:
        step = self.steps.get(x) if isinstance(x, fx.Node) else None
        return step.blocks if step else []

    def shape(self, x: fx.Node) -> tuple[int, ...]:
        return shape_of(x) or ()

    def tensors(self, node: fx.Node) -> list[fx.Node]:
        """The tensors that an operator takes, those in lists included."""
        return [x for x in node.all_input_nodes if shape_of(x) is not None]

    def origins(self, node: fx.Node) -> frozenset[str]:
        """What a tensor is computed from: "input", "parameter", "buffer"."""
        if node not in self._origins:
            if node.op == "placeholder":
                name = self.trace.names.get(node)
                trained = name is not None and isinstance(self.trace.tensors[name], torch.nn.Parameter)
                fixed = name is not None or node in self.trace.constants
                kind = {"parameter"} if trained else {"buffer"} if fixed else {"input"}
            else:
                kind = set().union(*(self.origins(x) for x in node.all_input_nodes)) or {"input"}
            self._origins[node] = frozenset(kind)
        return self._origins[node]

    def stored(self, node: Any) -> bool:
        """Whether a tensor depends on parameters and buffers only."""
        return isinstance(node, fx.Node) and "input" not in self.origins(node)

    def numeric(self, node: Any) -> Tensor | None:
        """The numbers of a tensor that depends on parameters and buffers only; None for others."""
        if not isinstance(node, fx.Node) or not self.stored(node):
            return None
        if node not in self._numeric:
            self._numeric[node] = self._compute(node)
        return self._numeric[node]

    def forget_numbers(self) -> None:
        """Read the weights anew: they may have changed."""
        self._numeric.clear()

    def _compute(self, node: fx.Node) -> Tensor | None:
        if node in self.trace.names:
            return self.trace.tensors[self.trace.names[node]].detach()
        if node in self.trace.constants:
            return self.trace.constants[node].detach()
        if node.op != "call_function" or node in self.volatile:
            return None
        found = {x: self.numeric(x) for x in node.all_input_nodes}
        if any(value is None for value in found.values()):
            return None
        if getattr(getattr(node.target, "_schema", None), "is_mutable", False):
            return None  # would change the parameters
        with torch.no_grad():
            result = call(node)(*fx.map_arg(node.args, found.__getitem__), **fx.map_arg(node.kwargs, found.__getitem__))
        return result if isinstance(result, Tensor) else None

    def name(self, node: Any) -> str | None:
        """The name of a parameter or buffer that a rule reads directly."""
        return self.trace.names.get(node) if isinstance(node, fx.Node) else None

    # The blocks of an output.

    def leaf(self, node: fx.Node) -> None:
        """A parameter or buffer: one block for each dimension."""
        name, shape = self.trace.names[node], self.shape(node)
        if name not in self.leaves:
            self.leaves[name] = []
            for dim, size in enumerate(shape):
                self._starts.append(self.atoms.count)
                self._owners.append((name, dim))
                self.leaves[name].append(self.atoms.new(size) if size > 1 else None)
        blocks = [Block((dim,), atoms) for dim, atoms in enumerate(self.leaves[name]) if atoms is not None]
        self.steps[node] = Step(node, blocks, value="stored")

    def owner(self, atom: int) -> tuple[str, int]:
        """The parameter and the dimension that an atom stands for."""
        return self._owners[bisect_right(self._starts, atom) - 1]

    def role(self, node: Any, dim: int, role: str) -> None:
        """Record what the indices of a dimension of a parameter do with a unit."""
        for block in self.blocks(node) if self.stored(node) else []:
            if block.dims == (dim,):
                self.roles.setdefault(self.owner(int(block.atoms.flat[0])), role)

    def step(self, node: fx.Node, value: str = "varies") -> Step:
        self.steps[node] = Step(node, value=value)
        return self.steps[node]

    def add(self, step: Step, block: Block) -> int | None:
        """Add a block to the output; the index of the block, None where it has one position (which always stays)."""
        kept = [axis for axis, size in enumerate(block.atoms.shape) if size > 1]
        if not kept:
            self.atoms.pin(block.atoms, f"{where(step.node)} needs at least one")
            return None
        dims = tuple(block.dims[axis] for axis in kept)
        step.blocks.append(Block(dims, block.atoms.reshape([block.atoms.shape[axis] for axis in kept])))
        return len(step.blocks) - 1

    def take(self, step: Step, x: fx.Node, source: int, dims: Sequence[int], at: Ints) -> None:
        """A block of the output that holds positions ``at`` of a block of an input, in any order of its dimensions."""
        old = self.blocks(x)[source]
        order = np.argsort(dims)
        at = at.transpose(order)
        index = self.add(step, Block(tuple(int(dims[i]) for i in order), old.atoms.ravel()[at]))
        if index is None:
            step.reads.append(Read(x, source, at.ravel()))
        else:
            step.links.append(Link(x, source, at.ravel(), index, np.arange(at.size)))

    def lose(self, step: Step, x: fx.Node, source: int, reason: str, product: bool = False) -> None:
        """Pin a block of an input, which the output does not hold."""
        block = self.blocks(x)[source]
        self.atoms.pin(block.atoms, reason)
        step.reads.append(Read(x, source, np.arange(block.atoms.size), product))

    def barrier(self, node: fx.Node, reason: str | None = None) -> None:
        """Pin all blocks of all inputs."""
        step = self.step(node)
        if reason is None:
            if any(self.blocks(x) for x in self.tensors(node)):
                self.unknown.setdefault(str(node.target), module_path(node))
            reason = f"{where(node)} has no rule"
        for x in self.tensors(node):
            for source in range(len(self.blocks(x))):
                self.lose(step, x, source, reason)

    def pieces(self, operands: Sequence[Operand]) -> list[Piece]:
        """The blocks of all operands, in the dimensions of a joint index space."""
        found = []
        for k, (x, labels) in enumerate(operands):
            for source, block in enumerate(self.blocks(x)):
                dims = [labels[d] for d in block.dims]
                order = np.argsort(dims)
                at = np.arange(block.atoms.size).reshape(block.atoms.shape).transpose(order)
                joint = Block(tuple(int(dims[i]) for i in order), block.atoms.transpose(order))
                found.append(Piece(k, source, joint, at))
        return found

    def sizes(self, operands: Sequence[Operand], count: int) -> list[tuple[int, ...]]:
        found = []
        for x, labels in operands:
            size = [1] * count
            for label, n in zip(labels, self.shape(x), strict=True):
                size[label] = n
            found.append(tuple(size))
        return found

    def join(
        self,
        step: Step,
        operands: Sequence[Operand],
        count: int,
        pieces: list[Piece] | None = None,
        summed: frozenset[int] = frozenset(),
    ) -> list[Joined]:
        """Unite the blocks of operands in a joint index space of ``count`` dimensions. summed: see ``align``."""
        pieces = self.pieces(operands) if pieces is None else pieces
        reason = (
            f"{where(step.node)} combines them with a tensor that is not cut there: an input, a constant, or one that they share"
        )
        joined, lost = align(self.atoms, pieces, self.sizes(operands, count), reason, summed)
        for p in lost:
            step.reads.append(Read(operands[p.operand][0], p.source, p.at.ravel()))
        return joined

    def put(
        self,
        step: Step,
        operands: Sequence[Operand],
        joined: Joined,
        dims: dict[int, int],
        pin: str = "",
    ) -> None:
        """Add a block of the joint index space to the output.

        dims: for each dimension of the index space that the output has, the dimension of the output; the block is collapsed along
        the others. pin: why the indices are never removed where the output has none of the dimensions.
        """
        gone = {d for d in joined.block.dims if d not in dims}
        block, links = joined.reduced(gone)
        if block.dims:
            self.atoms.collapse(joined.block, gone)
            order = np.argsort([dims[d] for d in block.dims])
            numbers = np.arange(block.atoms.size).reshape(block.atoms.shape).transpose(order)
            rank = np.empty(block.atoms.size, np.int64)
            rank[numbers.ravel()] = np.arange(block.atoms.size)
            out = Block(tuple(sorted(dims[d] for d in block.dims)), block.atoms.transpose(order))
            index = self.add(step, out)
        else:
            index = None
            if pin:
                self.atoms.pin(joined.block.atoms, pin)
        for piece, positions, targets in links:
            x = operands[piece.operand][0]
            if index is None:
                step.reads.append(Read(x, piece.source, positions, product=not pin))
            else:
                step.links.append(Link(x, piece.source, positions, index, rank[targets]))


def call(node: fx.Node) -> Callable[..., Any]:
    """The operator of a node."""
    assert callable(node.target)
    return node.target


def where(node: fx.Node) -> str:
    """The operator and the module that runs it, for messages."""
    name = str(getattr(node.target, "__name__", node.target)).split(".")[0]
    path = module_path(node)
    return f"{name} in {path}" if path else f"{name} in forward of the model"
