"""The graph of ATen operators that a model runs, with the names of its parameters and buffers."""

from __future__ import annotations

import copy
import dataclasses
import io
import logging
import re
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn

Arguments: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]  # positional and keyword arguments


class NotTraceable(Exception):
    """torch.export found no graph for the model; the message is the reason."""


@dataclass
class Trace:
    """The graph of a model.

    graph: nodes in the order of execution. names: placeholder -> name of the parameter or buffer; all names of a shared tensor
    stand for the first one. tensors: name -> tensor. constants: placeholder -> tensor that the code of the model holds.
    inputs: the placeholders of the arguments, in order. batches: batch sizes that the code fixes to those of the example, e.g. by
    ``len(x)``.
    """

    model: nn.Module
    graph: fx.Graph
    names: dict[fx.Node, str] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    constants: dict[fx.Node, Tensor] = field(default_factory=dict)
    inputs: list[fx.Node] = field(default_factory=list)

    @property
    def batches(self) -> set[int]:
        values = [node.meta.get("val") for node in self.inputs]
        sizes: list[Any] = [x.shape[0] for x in values if isinstance(x, Tensor) and x.ndim]
        fixed = [size if isinstance(size, int) else size.node.maybe_as_int() for size in sizes]
        return {size for size in fixed if size is not None}


def trace_model(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trace:
    """Export ``model`` in eval mode. Raises ``NotTraceable``."""
    with preserved(model):
        model.eval()
        remove_autocast(model)
        program = _export(model, args, kwargs)
    inline_regions(program.graph)
    return _named(model, program)


def inline_regions(graph: fx.Graph) -> None:
    """Replace the regions that ``torch.autocast`` or ``torch.no_grad`` make inside of ``forward`` by their operators.

    torch.export makes a graph of its own for each such region, and one operator that runs it. What depends on what is the same
    without it: neither changes which entries of a parameter an output depends on.
    """
    for node in list(graph.nodes):
        if getattr(node.target, "__name__", "") not in ("wrap_with_autocast", "wrap_with_set_grad_enabled"):
            continue
        place, region = next((i, a) for i, a in enumerate(args_of(node)) if isinstance(a, fx.Node) and a.op == "get_attr")
        inner = getattr(graph.owning_module, str(region.target)).graph
        inline_regions(inner)
        given = dict(zip((n for n in inner.nodes if n.op == "placeholder"), args_of(node)[place + 1 :], strict=True))
        with graph.inserting_before(node):
            outputs: Any = graph.graph_copy(inner, given)
        for user in list(node.users):  # an element of the tuple that the region returns
            user.replace_all_uses_with(outputs[args_of(user)[1]])
            graph.erase_node(user)
        graph.erase_node(node)
        if not region.users:
            graph.erase_node(region)


def remove_autocast(model: nn.Module) -> None:
    """Give the modules their own ``forward`` again where ``accelerator.prepare`` has put one with autocast in its place."""
    for module in model.modules():
        original = vars(module).pop("_original_forward", None)
        if original is not None:
            vars(module).pop("forward", None)
            if getattr(original, "__func__", None) is not type(module).forward:
                vars(module)["forward"] = original


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Restore attributes, lists and dicts in them, and buffers of all modules at the end; of scripted modules only the mode."""
    modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    modes = [(module, module.training) for module in model.modules() if isinstance(module, torch.jit.ScriptModule)]
    attributes = [(module, dict(vars(module))) for module in modules]
    containers = [(part, copy.copy(part)) for _, held in attributes for part in _containers(list(held.values()))]
    buffers = [b for module in modules for b in module._buffers.values() if b is not None and not b.is_meta]
    values = [(buffer, buffer.clone()) for buffer in buffers]
    try:
        yield
    finally:
        for module, held in attributes:
            vars(module).clear()
            vars(module).update(held)
        for part, content in containers:
            part.clear()
            part.extend(content) if isinstance(part, list) else part.update(content)
        for module, mode in modes:
            module.training = mode
        for buffer, value in values:
            if not torch.equal(buffer, value):
                buffer.copy_(value)


def _containers(value: Any, depth: int = 4) -> Iterator[Any]:
    """The lists and dicts inside a list or dict, and inside of them."""
    for part in value.values() if isinstance(value, dict) else value:
        if type(part) in (list, dict, OrderedDict) and depth:
            yield part
            yield from _containers(part, depth - 1)


def arguments(example_inputs: Any) -> Arguments:
    """Positional and keyword arguments of an example: a tensor, a tuple of arguments, or a mapping of keyword arguments."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    return (example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)), {}


def flat_tensors(out: Any) -> list[Tensor]:
    """The tensors of a nested output: dicts, tuples, lists and dataclasses.

    Tensors inside other objects (the caches of language models) are not among them: they are for the next call of the same
    model, so a smaller one may hold smaller tensors.
    """
    if isinstance(out, Tensor):
        return [out]
    if isinstance(out, Mapping):
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
            with _quiet(), _masks_not_read(), torch.enable_grad():
                return torch.export.export(_Flat(model), example, dynamic_shapes=sizes, strict=False)
        except Exception as error:  # export runs the code of the user
            failure = error
    raise NotTraceable(f"torch.export: {_reason(failure)}") from failure


def _reason(failure: Exception | None) -> str:
    """The first line of an error of torch.export; for a branch that depends on data, the line of code."""
    text = str(failure).strip()
    if type(failure).__name__ == "GuardOnDataDependentSymNode":
        found = re.search(r'File "(.+)", line (\d+), in .+\n\s*(.+)', text)
        return "the code depends on the values of a tensor" + (f": {found[3]} (line {found[2]} of {found[1]})" if found else "")
    return f"{type(failure).__name__}: {text.partition(chr(10))[0]}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings, and without the graph that torch writes to stderr and the log where a model cannot be exported."""
    loggers = [logging.getLogger(name) for name in ("torch.fx.experimental.symbolic_shapes", "torch._subclasses.fake_tensor")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


@contextmanager
def _masks_not_read() -> Iterator[None]:
    """Let transformer layers of torch use their masks without looking whether they are causal, which only selects a kernel.

    A branch that depends on the numbers of a tensor cannot be exported.
    """
    module: Any = torch.nn.modules.transformer
    original = getattr(module, "_detect_is_causal_mask", None)
    if original is None:  # private: another version of torch may have another name
        yield
        return
    module._detect_is_causal_mask = lambda mask, is_causal=None, size=None: is_causal is True
    try:
        yield
    finally:
        module._detect_is_causal_mask = original


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
