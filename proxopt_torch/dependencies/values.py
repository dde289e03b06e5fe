"""Which units can be removed with the weights that a model has now.

Forward: for each position of each block the number that the tensor holds there for any input, or NaN where it varies. Nothing
is read from the example, so a constant example or a batch of one proves nothing. Backward: which positions are used, that is,
read by something other than a weight that is zero or a layer whose bias can take the constant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from .flow import Affine, Flow, Step
from .recurrent import Layer, used_units, zero_units
from .rules import argument, base_name
from .trace import args_of, shape_of

Floats: TypeAlias = NDArray[np.float64]
Flags: TypeAlias = NDArray[np.bool_]


@dataclass
class Values:
    """constants, used: for each tensor one flat array for each block. linked: tensors whose constants others need."""

    flow: Flow
    linked: set[fx.Node]
    constants: dict[fx.Node, list[Floats]] = field(default_factory=dict)
    used: dict[fx.Node, list[Flags]] = field(default_factory=dict)
    _nonzero: dict[fx.Node, Tensor] = field(default_factory=dict)

    def nonzero(self, layer: Affine, weight: Tensor) -> Tensor:
        """Which of the (groups, rows, columns) of a weight hold a number that is not zero."""
        if layer.weight not in self._nonzero:
            found = layer.order(weight) != 0
            self._nonzero[layer.weight] = found[..., 0] if found.shape[-1] == 1 else found.any(-1)
        return self._nonzero[layer.weight]


def evaluate(flow: Flow) -> Values:
    """The constants and the positions that are used."""
    values = Values(flow, {link.node for step in flow.steps.values() for link in step.links})
    for node, step in flow.steps.items():
        values.constants[node] = CONSTANTS[step.value](values, step)
        values.used[node] = [np.zeros(block.atoms.size, bool) for block in step.blocks]
    for step in reversed(flow.steps.values()):
        _use(values, step)
    return values


# Backward.


def _use(values: Values, step: Step) -> None:
    """Mark the positions of the inputs that an operator uses."""
    if step.value == "recurrent":
        return _use_recurrent(values, step)
    for read in step.reads:
        positions = read.positions
        if read.product:
            positions = positions[values.constants[read.node][read.source][positions] != 0]
        values.used[read.node][read.source][positions] = True
    for link in step.links:
        needed = values.used[step.node][link.block] & np.isnan(values.constants[step.node][link.block])
        values.used[link.node][link.source][link.positions[needed[link.targets]]] = True
    if step.affine is not None and step.affine.source is not None:
        _use_columns(values, step, step.affine)


def _use_columns(values: Values, step: Step, layer: Affine) -> None:
    """A channel is used where a weight of an output that is used reads it, unless it is a constant for the bias."""
    numeric = values.flow.numeric(layer.weight)
    if numeric is None:
        values.used[layer.node][layer.source or 0][:] = True
        return
    nonzero = values.nonzero(layer, numeric)
    if layer.rows is not None:
        used = torch.from_numpy(values.used[step.node][layer.rows]).reshape(*nonzero.shape[:2], 1).to(nonzero.device)
        nonzero = nonzero if bool(used.all()) else nonzero & used
    read = nonzero.any(1).flatten().cpu().numpy()
    constant = _column_constants(values, layer)
    free = constant == 0
    if layer.fold and not layer.padded:
        free |= np.isfinite(constant)
    at = layer.columns[read & ~free]
    values.used[layer.node][layer.source or 0][at.ravel()] = True


def _use_recurrent(values: Values, step: Step) -> None:
    """Hidden units use each other, and the features of the input."""
    (layer,) = step.operands
    size = layer.weights[0][1].meta["val"].shape[1] * len(layer.weights)
    out = np.ones(size, bool) if layer.block is None else values.used[step.node][layer.block]
    zero = zero_units(layer, values.flow, _column_constants(values, layer))
    used, features = used_units(layer, values.flow, out, zero)
    if layer.block is not None:
        values.used[step.node][layer.block] = out | used
    if layer.source is not None:
        at = layer.columns[features & (_column_constants(values, layer) != 0)]
        values.used[layer.node][layer.source][at.ravel()] = True
    for read in step.reads:
        values.used[read.node][read.source][read.positions] = True


def _column_constants(values: Values, layer: Affine | Layer) -> Floats:
    """The constant of each input channel; NaN where its positions differ."""
    if layer.source is None:
        return np.full(len(layer.columns), np.nan)
    found = values.constants[layer.node][layer.source][layer.columns]
    return np.where((found == found[:, :1]).all(1), found[:, 0], np.nan)


# Forward: how constants pass, by Step.value.


def _varies(values: Values, step: Step) -> list[Floats]:
    return [np.full(block.atoms.size, np.nan) for block in step.blocks]


def _stored(values: Values, step: Step) -> list[Floats]:
    """A parameter or buffer: slices that hold one number."""
    if step.node in values.flow.volatile or step.node not in values.linked:
        return _varies(values, step)
    tensor = values.flow.trace.tensors[values.flow.trace.names[step.node]].detach()
    if not tensor.dtype.is_floating_point:
        return _varies(values, step)
    found = []
    for block in step.blocks:
        rows = tensor.movedim(block.dims[0], 0).reshape(len(block.atoms), -1)
        same = (rows == rows[:, :1]).all(1)
        found.append(torch.where(same, rows[:, 0].double(), torch.nan).cpu().numpy())
    return found


def _gathered(values: Values, step: Step, node: fx.Node | None = None) -> list[Floats]:
    """The constant of each position of the output from its links (only those to ``node``); NaN where they differ."""
    found = []
    for index, block in enumerate(step.blocks):
        low, high = np.full(block.atoms.size, np.inf), np.full(block.atoms.size, -np.inf)
        for link in step.links:
            if link.block == index and (node is None or link.node is node):
                value = values.constants[link.node][link.source][link.positions]
                value = np.where(np.isfinite(value), value, np.nan)
                with np.errstate(invalid="ignore"):
                    np.minimum.at(low, link.targets, value)
                    np.maximum.at(high, link.targets, value)
        found.append(np.where(low == high, low, np.nan))
    return found


def _zero(values: Values, step: Step) -> list[Floats]:
    return [np.where(value == 0, 0.0, np.nan) for value in _gathered(values, step)]


def _product(values: Values, step: Step) -> list[Floats]:
    """A product is zero where one factor is."""
    result = _varies(values, step)
    for node in dict.fromkeys(link.node for link in step.links):
        for out, value in zip(result, _gathered(values, step, node)):
            out[value == 0] = 0
    return result


def _attention(values: Values, step: Step) -> list[Floats]:
    """The weights of the values sum to 1."""
    return _gathered(values, step, step.operands[0])


def _masked_attention(values: Values, step: Step) -> list[Floats]:
    """Where a row is masked entirely, the weights sum to 0."""
    return [np.where(value == 0, 0.0, np.nan) for value in _attention(values, step)]


def _elementwise(values: Values, step: Step) -> list[Floats]:
    """The operator itself, on the constants."""
    node = step.node
    if base_name(node) in ("dropout", "alpha_dropout", "feature_dropout") and argument(node, "train"):
        return _zero(values, step)
    tensors = values.flow.tensors(node)
    gathered = {x: _gathered(values, step, x) for x in dict.fromkeys(tensors)}
    found = []
    for index, block in enumerate(step.blocks):
        size = block.atoms.size
        operands = {x: gathered[x][index] for x in gathered}
        for x in operands:
            alone = values.flow.numeric(x) if int(np.prod(shape_of(x) or ())) == 1 else None
            if alone is not None and alone.dtype.is_floating_point:
                operands[x] = np.full(size, float(alone))
        found.append(_call(values.flow, node, operands, size))
    return found


def _call(flow: Flow, node: fx.Node, operands: dict[fx.Node, Floats], size: int) -> Floats:
    varies = np.zeros(size, bool)
    for value in operands.values():
        varies |= np.isnan(value)
    result = np.full(size, np.nan)
    if not varies.all() and not any(shape_of(x) is None for x in node.all_input_nodes):
        given = {x: torch.from_numpy(v[~varies]).to(x.meta["val"].dtype) for x, v in operands.items()}
        replace: Callable[[Any], Any] = lambda x: given[x].clone()
        try:
            with torch.no_grad():
                out = node.target(*fx.map_arg(args_of(node), replace), **fx.map_arg(node.kwargs, replace))  # type: ignore[operator]
            numbers = isinstance(out, Tensor) and (out.dtype.is_floating_point or out.dtype == torch.bool)
            if numbers and out.shape == (int((~varies).sum()),):
                result[~varies] = out.double().cpu().numpy()
        except (RuntimeError, TypeError, ValueError, IndexError):
            pass  # an argument that does not fit flat arrays: not constant
    if base_name(node) == "mul":
        for value in operands.values():
            result[value == 0] = 0
    return np.where(np.isfinite(result), result, np.nan)


def _batch_norm(values: Values, step: Step) -> list[Floats]:
    """Constants stay constants, and a scale of zero leaves the shift."""
    node = step.node
    x = args_of(node)[0]
    found = _gathered(values, step, x)
    for index, block in enumerate(step.blocks):
        if block.dims != (1,):
            found[index][:] = np.nan
            continue
        weight, bias, mean, var = (_vector(values.flow, a, block.atoms.size) for a in args_of(node)[1:5])
        batch = argument(node, "training") or argument(node, "use_input_stats")
        scale = np.ones(block.atoms.size) if weight is None else weight
        shift = np.zeros(block.atoms.size) if bias is None else bias
        if batch or mean is None or var is None:
            value = np.where(np.isfinite(found[index]), shift, np.nan)
        else:
            value = (found[index] - mean) / np.sqrt(var + argument(node, "eps")) * scale + shift
        found[index] = np.where(scale == 0, shift, value)
    return found


def _norm(values: Values, step: Step) -> list[Floats]:
    """A scale of zero leaves the shift."""
    given = [a for a in args_of(step.node)[2:4] if isinstance(a, fx.Node)]
    if not given:
        return _varies(values, step)
    scale = _gathered(values, step, given[0])
    shift = _gathered(values, step, given[1]) if len(given) > 1 else [np.zeros_like(s) for s in scale]
    return [np.where(a == 0, b, np.nan) for a, b in zip(scale, shift)]


def _group_norm(values: Values, step: Step) -> list[Floats]:
    """A group of channels that are all zero leaves the shift, too."""
    x, shift = args_of(step.node)[0], argument(step.node, "bias")
    found = _norm(values, step)
    shifts = _gathered(values, step, shift) if shift is not None else [np.zeros_like(f) for f in found]
    return [np.where(value == 0, b, a) for a, b, value in zip(found, shifts, _gathered(values, step, x))]


def _prelu(values: Values, step: Step) -> list[Floats]:
    """A constant, times the slope where it is negative."""
    x, weight = args_of(step.node)[:2]
    slopes = _gathered(values, step, weight)
    if int(np.prod(shape_of(weight) or ())) == 1:
        alone = values.flow.numeric(weight)
        slopes = [np.full_like(s, np.nan if alone is None else float(alone)) for s in slopes]
    return [np.where(value >= 0, value, value * slope) for value, slope in zip(_gathered(values, step, x), slopes)]


def _glu(values: Values, step: Step) -> list[Floats]:
    """A zero in the first half gives zero, whatever the gate is."""
    found = _zero(values, step)
    for index in range(len(step.blocks)):
        parts = [link for link in step.links if link.block == index]
        if len(parts) == 2:
            first = parts[0]
            value = values.constants[first.node][first.source][first.positions]
            found[index][first.targets[value == 0]] = 0
    return found


def _vector(flow: Flow, node: Any, size: int) -> Floats | None:
    """The numbers of a weight; NaN where they are not fixed; None for an argument that is absent."""
    if node is None:
        return None
    numeric = flow.numeric(node)
    if numeric is None or numeric.numel() != size:
        return np.full(size, np.nan)
    found: Floats = numeric.double().cpu().numpy().ravel()
    return found


def _affine(values: Values, step: Step) -> list[Floats]:
    """Rows that are zero, except on constants, give a constant."""
    layer = step.affine
    result = _gathered(values, step) if layer is None or layer.rows is None else _varies(values, step)
    if layer is None or layer.rows is None:
        return _varies(values, step)
    numeric = values.flow.numeric(layer.weight)
    size = step.blocks[layer.rows].atoms.size
    bias = _vector(values.flow, layer.bias, size)
    if numeric is None:
        return result
    weight = layer.order(numeric)
    nonzero = values.nonzero(layer, numeric)
    groups, _, columns = nonzero.shape
    constant = _column_constants(values, layer).reshape(groups, 1, columns)
    varies = np.isnan(constant) | (layer.padded & (constant != 0))
    if not varies.all():
        nonzero = nonzero & torch.from_numpy(varies).to(nonzero.device)
    fixed = ~nonzero.any(2).flatten().cpu().numpy()
    out = np.where(fixed, 0.0 if bias is None else bias, np.nan)
    return _with(result, layer.rows, out + _constant_part(weight, np.where(varies, 0.0, constant)))


def _constant_part(weight: Tensor, constant: Floats) -> Floats:
    """What constant columns add to each row. weight: (groups, rows, columns, taps). constant: (groups, 1, columns)."""
    where = np.flatnonzero((constant != 0).any((0, 1)))
    if not where.size:
        return np.zeros(weight.shape[0] * weight.shape[1])
    total = weight[:, :, torch.from_numpy(where).to(weight.device)].double().sum(-1).cpu().numpy()
    found: Floats = (total * constant[:, :, where]).sum(2).ravel()
    return found


def _with(result: list[Floats], index: int, value: Floats) -> list[Floats]:
    result[index] = value
    return result


def _recurrent(values: Values, step: Step) -> list[Floats]:
    (layer,) = step.operands
    found = _varies(values, step)
    if layer.block is not None:
        found[layer.block][zero_units(layer, values.flow, _column_constants(values, layer))] = 0
    return found


def _filled(values: Values, step: Step) -> list[Floats]:
    """Zeros and ones; other numbers may be computed from a size."""
    number = 0.0 if "zeros" in base_name(step.node) else 1.0 if "ones" in base_name(step.node) else np.nan
    return [np.full(block.atoms.size, number) for block in step.blocks]


CONSTANTS: dict[str, Callable[[Values, Step], list[Floats]]] = {
    "varies": _varies,
    "stored": _stored,
    "same": _gathered,
    "zero": _zero,
    "product": _product,
    "attention": _attention,
    "attention with mask": _masked_attention,
    "elementwise": _elementwise,
    "batch_norm": _batch_norm,
    "norm": _norm,
    "group_norm": _group_norm,
    "prelu": _prelu,
    "glu": _glu,
    "filled": _filled,
    "recurrent": _recurrent,
    "affine": _affine,
}


# The units that can be removed.


@dataclass
class Removal:
    """Units that can be removed, with what must be added to biases.

    units: their ids, ascending. shifts: name of a bias, or path of a layer without one -> tensor of the full number of outputs to
    add to it (a new bias). kept: unit -> why it stays, although it is zero or nothing reads it.
    """

    units: NDArray[np.int64]
    shifts: dict[str, Tensor]
    kept: dict[int, str]


def shifts(values: Values, unit: NDArray[np.int64], removed: Flags) -> dict[str, Tensor]:
    """What the biases of the layers that read removed constants must gain."""
    found: dict[str, Tensor] = {}
    for step in values.flow.steps.values():
        layer = step.affine
        if layer is None or layer.source is None or not layer.fold:
            continue
        constant = _column_constants(values, layer)
        atoms = values.flow.blocks(layer.node)[layer.source].atoms.ravel()[layer.columns[:, 0]]
        gone = removed[unit[atoms]] & np.isfinite(constant) & (constant != 0)
        numeric = values.flow.numeric(layer.weight)
        if not gone.any() or numeric is None or layer.padded:
            continue
        weight = layer.order(numeric)
        groups, _, columns = weight.shape[:3]
        gain = np.where(gone, constant, 0.0).reshape(groups, 1, columns)
        shift = _constant_part(weight, gain)
        if shift.any():
            found[layer.fold] = torch.from_numpy(shift).to(numeric)
    return found
