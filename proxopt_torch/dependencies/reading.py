"""Reading the operators of a graph in order."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx

from . import rules
from .flow import Flow, Step
from .trace import Trace, args_of
from .units import Block, Read

VIEWS = {"view", "reshape", "slice", "select", "narrow", "transpose", "permute", "t", "unsqueeze", "squeeze", "expand", "chunk"}
VIEWS |= {"split", "split_with_sizes", "unbind", "getitem", "flatten", "unflatten", "detach", "alias", "movedim", "numpy_T"}
VIEWS |= {"diagonal", "as_strided", "view_as", "reshape_as", "swapaxes", "mT", "unfold", "contiguous", "to"}


def read_graph(trace: Trace, inputs: bool = False) -> Flow:
    """Apply the rules of all operators.

    inputs: track the features of the first input.
    """
    flow = Flow(trace)
    flow.volatile = _changed_through_views(trace.graph)
    _functional(trace.graph)
    for node in trace.graph.nodes:
        if node in trace.names:
            flow.leaf(node)
        elif node.op == "placeholder":
            flow.steps[node] = Step(node)
            if inputs and trace.inputs and node is trace.inputs[0]:
                _track_input(flow, node)
        elif node.op == "output":
            _output(flow, node)
        elif node.op == "call_function":
            rules.apply(flow, node)
    return flow


def _track_input(flow: Flow, node: fx.Node) -> None:
    shape = flow.shape(node)
    dims = tuple(d for d in range(1, len(shape)) if shape[d] > 1)
    if dims:
        atoms = flow.atoms.new(*(shape[d] for d in dims))
        flow.atoms.mark(atoms, "input features")
        flow.steps[node].blocks.append(Block(dims, atoms))


def _output(flow: Flow, node: fx.Node) -> None:
    step = flow.step(node)
    for x in dict.fromkeys(flow.tensors(node)):
        for source, block in enumerate(flow.blocks(x)):
            flow.atoms.pin(block.atoms, "they are an output of the model")
            step.reads.append(Read(x, source, np.arange(block.atoms.size)))


def _in_place(node: fx.Node) -> bool:
    return bool(getattr(getattr(node.target, "_schema", None), "is_mutable", False))


def _changed_through_views(graph: fx.Graph) -> set[fx.Node]:
    """All tensors that share memory with one that an operator changes in place, where the result alone does not stand for it."""
    base: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        first: Any = args_of(node)[0] if args_of(node) else None
        shares = node.op == "call_function" and isinstance(first, fx.Node)
        if shares and (rules.base_name(node) in VIEWS or _in_place(node)):
            base[node] = base.get(first, first)
        else:
            base[node] = node
    members: dict[fx.Node, list[fx.Node]] = {}
    for node, root in base.items():
        members.setdefault(root, []).append(node)
    order = {node: k for k, node in enumerate(graph.nodes)}
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op != "call_function" or not _in_place(node) or not isinstance(args_of(node)[0], fx.Node):
            continue
        family = members[base[node]]
        others = [m for m in family if order[m] < order[node] and _identity(m) is not _identity(node)]
        seen = any(order[user] > order[node] for m in others for user in m.users)
        if seen or rules.base_name(node) in ("copy", "index_put", "fill", "zero", "masked_scatter", "scatter"):
            found.update(family)
    return found


def _functional(graph: fx.Graph) -> None:
    """Let what follows an operator that works in place use its result instead of the tensor that it changes."""
    order = {node: k for k, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if node.op == "call_function" and _in_place(node) and isinstance(args_of(node)[0], fx.Node):
            for user in list(args_of(node)[0].users):
                if order[user] > order[node]:
                    user.replace_input_with(args_of(node)[0], node)


def _identity(node: fx.Node) -> fx.Node:
    """The tensor that a chain of operators changes in place."""
    while node.op == "call_function" and _in_place(node) and isinstance(args_of(node)[0], fx.Node):
        node = args_of(node)[0]
    return node
