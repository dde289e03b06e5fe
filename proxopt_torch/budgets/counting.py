"""Parameters and multiply-adds of the model that ``compact`` would return, counted without making that model."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import FlopCounterMode

from proxopt_torch.compaction import attention
from proxopt_torch.compaction.counting import attention_macs, more_operators, recurrent_macs
from proxopt_torch.dependencies import Dependencies, Removal, remaining_sizes
from proxopt_torch.dependencies.recurrent import GATES
from proxopt_torch.dependencies.rules import argument, base_name
from proxopt_torch.dependencies.trace import args_of, module_path, shape_of
from proxopt_torch.dependencies.units import Ints

Sizes: TypeAlias = tuple[int, ...]
Count: TypeAlias = Callable[[fx.Node, "Remaining"], int]

CONVOLUTIONS = {"conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution"}


class Remaining:
    """The sizes of all tensors of a graph after units have been removed.

    Args:
      found: the result of the analysis.
      removed: ids of the units.
    """

    def __init__(self, found: Dependencies, removed: Collection[int] | Ints = ()) -> None:
        assert found.flow is not None
        self.found, self.flow = found, found.flow
        self._gone: NDArray[np.bool_] = np.zeros(int(found.unit.max()) + 1 if found.unit.size else 0, bool)
        self._gone[np.asarray(list(removed), dtype=np.int64)] = True
        self._tensors: dict[fx.Node, Sizes] = {}

    def parameter(self, name: str) -> Sizes:
        """The shape of a parameter or buffer."""
        shape = self.flow.trace.tensors[name].shape
        places: Sequence[Ints | None] = self.found.places.get(name, (None,) * len(shape))
        return tuple(n if units is None else int((~self._gone[units]).sum()) for n, units in zip(shape, places))

    def tensor(self, node: fx.Node) -> Sizes:
        """The shape of a tensor of the graph."""
        if node not in self._tensors:
            name = self.flow.trace.names.get(node)
            self._tensors[node] = self.parameter(name) if name is not None else self._computed(node)
        return self._tensors[node]

    def _computed(self, node: fx.Node) -> Sizes:
        blocks = [(block.dims, ~self._gone[self.found.unit[block.atoms]]) for block in self.flow.blocks(node)]
        return remaining_sizes(self.flow.shape(node), blocks)


class Parameters:
    """The number of parameters, tied ones once, of the modules whose names are given; None for all."""

    def __init__(self, found: Dependencies, names: Collection[str]) -> None:
        assert found.flow is not None
        tensors = found.flow.trace.tensors
        self.found = found
        self.names = [n for n in names if n in tensors]
        self.dense = sum(tensors[n].numel() for n in self.names)

    def count(self, removal: Removal) -> int:
        """The number after a removal, with the biases that layers get for constants."""
        sizes = Remaining(self.found, removal.units)
        number = sum(math.prod(sizes.parameter(name)) for name in self.names)
        return number + sum(self._new_bias(name, sizes) for name in removal.shifts)

    def _new_bias(self, path: str, sizes: Remaining) -> int:
        """The entries of a bias for a layer without one: as many as its weight has outputs, or groups of them."""
        assert self.found.flow is not None
        weight = f"{path}.weight".lstrip(".")
        if path in self.found.flow.trace.tensors or weight not in self.names:
            return 0
        roles = [d for d in range(2) if self.found.roles.get((weight, d)) == "computes"]
        return sizes.parameter(weight)[roles[0] if roles else 0]


class MultiplyAdds:
    """The multiply-adds of one pass on the example: the same number as that of ``Compacted.multiply_adds``.

    Args:
      found: the result of the analysis.
      modules: paths of the modules whose operators are counted, without those inside them; None for all.
    """

    def __init__(self, found: Dependencies, modules: Collection[str] | None = None) -> None:
        assert found.flow is not None
        self.found = found
        dense = Remaining(found)
        nodes = [n for n in found.flow.trace.graph.nodes if n.op == "call_function" and _is_traced(n)]
        chosen = [n for n in nodes if modules is None or module_path(n) in modules]
        counts = {node: _rule(node)(node, dense) for node in chosen}
        self._numbers = {node: number for node, number in counts.items() if number}
        self._attention = [node for node in self._numbers if _closes_attention(node, dense)]
        self.dense = sum(self._numbers.values())

    def count(self, removal: Removal) -> int:
        """The number after a removal."""
        sizes = Remaining(self.found, removal.units)
        number = sum(self._one(node, number, sizes) for node, number in self._numbers.items())
        return number + sum(_identity(node, sizes) for node in self._attention)

    def _one(self, node: fx.Node, dense: int, sizes: Remaining) -> int:
        try:
            return _rule(node)(node, sizes)
        except Exception:  # an operator of no rule below, with sizes among its arguments: its output shrinks in proportion
            before = math.prod(shape_of(node) or (1,))
            return round(dense * math.prod(sizes.tensor(node)) / max(before, 1))


def _closes_attention(node: fx.Node, sizes: Remaining) -> bool:
    """Whether an operator is the output projection of an ``nn.MultiheadAttention``."""
    name = sizes.flow.name(args_of(node)[1]) if base_name(node) == "linear" else None
    path, dot, _ = (name or "").rpartition("out_proj.weight")
    return bool(dot) and attention.is_plain(sizes.flow.trace.model.get_submodule(path.rstrip(".")))


def _identity(node: fx.Node, sizes: Remaining) -> int:
    """What ``compact`` adds to an ``nn.MultiheadAttention`` that has lost heads: a product of the queries with an identity."""
    weight = args_of(node)[1]
    inner = sizes.tensor(weight)[1]
    return math.prod(sizes.tensor(node)[:-1]) * inner**2 if inner < sizes.flow.shape(weight)[1] else 0


def _is_traced(node: fx.Node) -> bool:
    """Whether the model runs this operator; the analysis inserts others, whose outputs are no tensors of the tracer."""
    value = node.meta.get("val")
    return not isinstance(value, Tensor) or isinstance(value, FakeTensor)


def _rule(node: fx.Node) -> Count:
    name = base_name(node)
    if name == "linear":
        return _linear
    if name in CONVOLUTIONS:
        return _convolution
    if name in ("matmul", "mm", "bmm"):
        return _matmul
    if name == "scaled_dot_product_attention":
        return _attention
    return _recurrent if name in GATES else _run


def _linear(node: fx.Node, sizes: Remaining) -> int:
    x, weight = args_of(node)[:2]
    return math.prod(sizes.tensor(x)[:-1]) * math.prod(sizes.tensor(weight))


def _convolution(node: fx.Node, sizes: Remaining) -> int:
    """Each weight acts once at each position of the output, or of the input if it is transposed."""
    x, weight = args_of(node)[:2]
    transposed = "transpose" in base_name(node) or (base_name(node) == "convolution" and argument(node, "transposed"))
    positions = sizes.tensor(x if transposed else node)
    filters = sizes.tensor(weight)
    spatial = len(filters) - 2
    return math.prod(positions[len(positions) - spatial :]) * math.prod(positions[: -spatial - 1]) * math.prod(filters)


def _matmul(node: fx.Node, sizes: Remaining) -> int:
    """A product with a vector is not counted, as in torch."""
    a, b = (sizes.tensor(x) for x in args_of(node)[:2])
    if len(a) == 1 or len(b) == 1:
        return _run(node, sizes)
    return math.prod(sizes.tensor(node)) * min(a[-1], b[-2])


def _attention(node: fx.Node, sizes: Remaining) -> int:
    return attention_macs(*(sizes.tensor(x) for x in args_of(node)[:3]))


def _recurrent(node: fx.Node, sizes: Remaining) -> int:
    """Every weight acts once at each place of each sequence."""
    x, weights = args_of(node)[0], args_of(node)[2]
    return recurrent_macs(sizes.tensor(x), [shape for w in weights if len(shape := sizes.tensor(w)) > 1])


def _run(node: fx.Node, sizes: Remaining) -> int:
    """Any other operator is run, on tensors without memory, under the counter of torch."""
    if not isinstance(node.meta.get("val"), (Tensor, tuple, list)):
        return 0
    counter = FlopCounterMode(display=False, custom_mapping=more_operators())
    with torch.no_grad(), counter:
        node.target(  # type: ignore[operator]
            *fx.map_arg(node.args, lambda x: _stand_in(x, sizes)), **fx.map_arg(node.kwargs, lambda x: _stand_in(x, sizes))
        )
    return counter.get_total_flops() // 2


def _stand_in(node: fx.Node, sizes: Remaining) -> Any:
    """A tensor of the meta device for a tensor of the graph; the number of the example for a size."""
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        return torch.empty(sizes.tensor(node), dtype=value.dtype, device="meta")
    return int(value.node.hint) if isinstance(value, torch.SymInt) else value
