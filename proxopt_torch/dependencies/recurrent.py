"""Rules and values of LSTM, GRU and RNN layers.

A hidden unit is its rows of all gates, its column of the weights of the recurrence, and what reads it. PyTorch has one hidden
size for all layers and directions, so all of them lose equally many units.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from .flow import Even, Flow, Step, call, where
from .rules import RESULTS, RULES, argument, base_name, channels
from .trace import args_of
from .units import Block, Ints, Link

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
# The gate that is the new content of the state: if it is zero, a state that starts at zero stays zero.
CONTENT = {"lstm": 2, "gru": 2, "rnn_tanh": 0, "rnn_relu": 0}
Flags = NDArray[np.bool_]


@dataclass
class Layer:
    """One layer. source, columns: block of its input with the features, and its positions. weights: for each direction the input
    weight, the recurrent weight and the biases."""

    node: fx.Node
    source: int | None
    columns: Ints
    weights: list[list[fx.Node]]
    gates: int
    content: int
    zero_start: bool
    block: int | None = None


def recurrent(flow: Flow, node: fx.Node) -> None:
    """Each layer becomes a node of its own, whose output holds the units of all its directions."""
    x, states, stored = args_of(node)[:3]
    biases, count, both = argument(node, "has_biases"), argument(node, "num_layers"), argument(node, "bidirectional")
    per = 4 if biases else 2
    directions = 2 if both else 1
    if not isinstance(stored, (list, tuple)) or len(stored) != per * count * directions or any(not flow.name(w) for w in stored):
        return flow.barrier(node)
    states = list(states) if isinstance(states, (list, tuple)) else [states]
    zero = all(base_name(s) in ("zeros", "zeros_like", "new_zeros") for s in states)
    hidden = flow.shape(stored[1])[1]
    units, layers = [], []
    for k in range(count):
        weights = [list(stored[(k * directions + d) * per : (k * directions + d + 1) * per]) for d in range(directions)]
        x, atoms = _layer(flow, node, x, weights, hidden, zero)
        units += atoms
        layers.append(x)
    every = np.concatenate(units)
    if len(units) > 1:
        reason = f"{where(node)} has one hidden size for all layers and directions"
        flow.even.append(Even(every, 0, [hidden * (k + 1) for k in range(len(units))], reason))
    for s in states:
        for block in flow.blocks(s):
            if zero and block.dims == (len(flow.shape(s)) - 1,) and len(units) == 1:
                flow.atoms.unite(block.atoms, units[0])
            elif not zero:
                flow.atoms.pin(block.atoms, f"{where(node)} takes them as initial state")
    if not zero:
        flow.atoms.pin(every, f"{where(node)} takes an initial state of fixed size")
    step = flow.step(node)
    step.operands = layers


def _layer(
    flow: Flow, node: fx.Node, x: fx.Node, weights: list[list[fx.Node]], hidden: int, zero: bool
) -> tuple[fx.Node, list[Ints]]:
    """The node of one layer, and the atoms of the units of each direction."""
    width = hidden * len(weights)
    with flow.trace.graph.inserting_before(node):
        made = flow.trace.graph.call_function(call(node), args_of(node), node.kwargs)
    made.meta = {**node.meta, "val": torch.empty((*flow.shape(x)[:-1], width), device="meta")}
    step = flow.step(made, "recurrent")
    gates = GATES[base_name(node)]
    source, columns = channels(flow, step, x, len(flow.shape(x)) - 1, frozenset())
    atoms = [_direction(flow, node, w, gates, hidden) for w in weights]
    for w in weights:
        flow.role(w[0], 1, "reads")
        taken = next((b.atoms for b in flow.blocks(w[0]) if b.dims == (1,)), None)
        if taken is None:
            continue
        if source is None:
            flow.atoms.pin(taken, f"{where(node)} reads the input of the model, or a tensor that cannot be cut")
        else:
            flow.atoms.unite(flow.blocks(x)[source].atoms.ravel()[columns], taken[:, None])
    layer = Layer(x, source, columns, weights, gates, CONTENT[base_name(node)], zero)
    layer.block = flow.add(step, Block((len(flow.shape(x)) - 1,), np.concatenate(atoms)))
    step.operands = [layer]
    return made, atoms


def _direction(flow: Flow, node: fx.Node, weights: list[fx.Node], gates: int, hidden: int) -> Ints:
    """Unite the rows of all gates, the biases and the column of the recurrence; the atoms of the units."""
    units = flow.atoms.new(hidden)
    for w in weights:
        for block in flow.blocks(w):
            if block.dims == (0,):
                flow.atoms.unite(block.atoms.reshape(gates, hidden), units)
                flow.role(w, 0, "computes")
            elif w is weights[1]:
                flow.atoms.unite(block.atoms, units)
                flow.role(w, 1, "reads")
    flow.atoms.mark(units, "recurrent units")
    return units


def _result(flow: Flow, node: fx.Node) -> None:
    """The outputs of the last layer, or the last states of all layers."""
    whole, k = args_of(node)
    layers = flow.steps[whole].operands
    step = flow.step(node, "same")
    if not layers:
        return  # a barrier pinned the inputs
    if k == 0:
        for source, block in enumerate(flow.blocks(layers[-1])):
            flow.take(step, layers[-1], source, block.dims, np.arange(block.atoms.size).reshape(block.atoms.shape))
    elif node.users:
        _states(flow, step, layers)


def _states(flow: Flow, step: Step, layers: list[fx.Node]) -> None:
    """A block over layers (with directions) and units."""
    shape = flow.shape(step.node)
    found = [flow.steps[x].operands[0] for x in layers]
    if any(layer.block is None for layer in found):
        return
    arrays = [flow.blocks(x)[layer.block].atoms.reshape(-1, shape[-1]) for x, layer in zip(layers, found)]
    atoms = np.concatenate(arrays)
    index = flow.add(step, Block((0, len(shape) - 1), atoms))
    start = 0
    for x, layer, array in zip(layers, found, arrays):
        here = np.arange(array.size)
        if index is not None and layer.block is not None:
            step.links.append(Link(x, layer.block, here, index, here + start))
        start += array.size


def zero_units(layer: Layer, flow: Flow, inputs: NDArray[np.float64]) -> Flags:
    """The units of a layer whose state is always zero. inputs: the constant of each feature of the input, NaN where it varies."""
    found = []
    for weights in layer.weights:
        numbers = [flow.numeric(w) for w in weights]
        rows = [_content(layer, n) for n in numbers]
        bias = sum(rows[2:]) if layer.gates != 3 else np.abs(rows[2:]).sum(0)  # a GRU scales one of the two
        zero = ~((rows[0] != 0) & (inputs != 0)).any(1) & ~(rows[1] != 0).any(1) & (np.asarray(bias) == 0)
        found.append(zero & layer.zero_start)
    return np.concatenate(found)


def _content(layer: Layer, weight: Any) -> NDArray[np.float64]:
    hidden = len(weight) // layer.gates
    rows: NDArray[np.float64] = weight[layer.content * hidden : (layer.content + 1) * hidden].double().cpu().numpy()
    return rows


def used_units(layer: Layer, flow: Flow, used: Flags, zero: Flags) -> tuple[Flags, Flags]:
    """The units that others use, through the recurrence too, and the input features that they use."""
    hidden = used.size // len(layer.weights)
    result, features = [], np.zeros(len(layer.columns), bool)
    for k, weights in enumerate(layer.weights):
        mine, none = used[k * hidden :][:hidden].copy(), zero[k * hidden :][:hidden]
        reads_input, reads_units = (_nonzero(flow.numeric(w), layer.gates) for w in weights[:2])
        while True:
            more = (mine | reads_units[mine].any(0)) & ~none
            if (more == (mine & ~none)).all():
                break
            mine = more
        mine &= ~none
        result.append(mine)
        features |= reads_input[mine].any(0)
    return np.concatenate(result), features


def _nonzero(weight: Any, gates: int) -> Flags:
    found: Flags = (weight != 0).reshape(gates, -1, weight.shape[1]).any(0).cpu().numpy()
    return found


for name in GATES:
    RULES[name] = recurrent
    RESULTS[name] = _result
