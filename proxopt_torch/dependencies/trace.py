"""The graph of ATen operators that a model runs, with the names of its parameters and buffers."""

from __future__ import annotations

import dataclasses
import re
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn


class NotTraceable(Exception):
    """torch.export found no graph for the model; the message is the reason."""


@dataclass
class Trace:
    """The graph of a model.

    graph: nodes in the order of execution. names: placeholder -> name of the parameter or buffer; all names of a shared tensor
    stand for the first one. tensors: name -> tensor. constants: placeholder -> tensor that the code of the model holds.
    inputs: the placeholders of the arguments, in order.
    """

    model: nn.Module
    graph: fx.Graph
    names: dict[fx.Node, str] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    constants: dict[fx.Node, Tensor] = field(default_factory=dict)
    inputs: list[fx.Node] = field(default_factory=list)


def trace_model(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trace:
    """Export ``model`` in eval mode. Raises ``NotTraceable``."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        program = _export(model, args, kwargs)
    finally:
        for module, mode in modes:
            module.training = mode
    return _named(model, program)


def flat_tensors(out: Any) -> list[Tensor]:
    """The tensors of a nested output: dicts, tuples, lists and dataclasses.

    Tensors inside other objects (the caches of language models) are not among them: they are for the next call of the same
    model, so a smaller one may hold smaller tensors.
    """
    if isinstance(out, Tensor):
        return [out]
    if isinstance(out, dict):
        return [t for part in out.values() for t in flat_tensors(part)]
    if isinstance(out, (tuple, list)):
        return [t for part in out for t in flat_tensors(part)]
    if dataclasses.is_dataclass(out) and not isinstance(out, type):
        return [t for f in dataclasses.fields(out) for t in flat_tensors(getattr(out, f.name))]
    return []


def module_path(node: fx.Node) -> str:
    """The path of the module whose code runs the operator; empty for the model itself."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    path = re.sub(r"@\d+", "", stack[-1][0]) if stack else ""
    return path.removeprefix("inner").removeprefix(".") if path.split(".")[0] == "inner" else ""


def shape_of(node: fx.Node) -> tuple[int, ...] | None:
    """The shape on the example; None for what is no tensor."""
    value = node.meta.get("val")
    return tuple(_number(size) for size in value.shape) if isinstance(value, Tensor) else None


class _Flat(nn.Module):
    """The model with a flat list of tensors as output."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        return flat_tensors(self.inner(*args, **kwargs))


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Export with a batch of at least 2, as one of size 1 broadcasts; the example itself where the model refuses that."""
    failure: Exception | None = None
    for repeat in (True, False):
        example = torch.utils._pytree.tree_map(_twice if repeat else lambda x: x, (args, kwargs))
        sizes = torch.utils._pytree.tree_map(_dynamic, example)
        try:
            # With gradients, since torch runs fused transformer layers without.
            with warnings.catch_warnings(), torch.enable_grad():
                warnings.simplefilter("ignore")
                return torch.export.export(_Flat(model), example, dynamic_shapes=sizes, strict=False)
        except Exception as error:  # export runs the code of the user
            failure = error
    text = str(failure).strip().splitlines()
    raise NotTraceable(f"torch.export: {type(failure).__name__}: {text[0] if text else ''}") from failure


def _twice(x: Any) -> Any:
    return x.expand(2, *x.shape[1:]).clone() if isinstance(x, Tensor) and x.ndim and len(x) == 1 else x


def _dynamic(x: Any) -> Any:
    return {0: torch.export.Dim.AUTO} if isinstance(x, Tensor) and x.ndim and len(x) > 1 else None


def _named(model: nn.Module, program: Any) -> Trace:
    result = Trace(model, program.graph)
    first: dict[int, str] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        first.setdefault(id(tensor), name)
        result.tensors.setdefault(first[id(tensor)], tensor)
    every = {name: first[id(tensor)] for name, tensor in named}
    places = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    for spec in program.graph_signature.input_specs:
        node = places.get(getattr(spec.arg, "name", ""))
        stored = every.get((spec.target or "").removeprefix("inner."))
        if node is None:
            continue
        if spec.kind.name in ("PARAMETER", "BUFFER") and stored is not None:
            result.names[node] = stored
        elif spec.target in program.constants and isinstance(program.constants[spec.target], Tensor):
            result.constants[node] = program.constants[spec.target]
        else:
            result.inputs.append(node)
    return result


def _number(size: Any) -> int:
    return int(size) if isinstance(size, int) else int(size.node.hint)


def args_of(node: fx.Node) -> Any:
    """The positional arguments of an operator, without the type that torch.fx declares for them."""
    return node.args
