"""The same numbers in a network of PyTorch and in its equivalent in JAX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from nas.nets.jax import cnn as jax_cnn
from nas.nets.jax import rnn
from nas.nets.torch import rnn as torch_rnn
from nas.nets.torch.operations import BatchNorm, ConvNorm, DepthwiseConv, FactorizedReduce, Twice
from torch import nn

Get = Callable[[torch.Tensor], torch.Tensor | None]
Leaves = dict[tuple[str, ...], np.ndarray]


def value(p: torch.Tensor) -> torch.Tensor:
    return p


def gradient(p: torch.Tensor) -> torch.Tensor | None:
    return p.grad


def module_leaves(module: nn.Module, get: Get = value) -> Leaves:
    """The parameters and statistics of a module of an operation, as those of its equivalent in JAX for one path."""
    if isinstance(module, Twice):
        return _under("first", module.first, get) | _under("second", module.second, get)
    if isinstance(module, FactorizedReduce):
        return _under("even", module.even, get) | _under("odd", module.odd, get) | _under("norm", module.norm, get)
    if isinstance(module, ConvNorm):
        first, *rest = module.convs
        if first.kernel_size == (1, 7):
            return {("wide",): _kernel(first, get), ("tall",): _kernel(rest[0], get)} | _under("norm", module.norm, get)
        convs = [("depthwise", first), ("pointwise", *rest)] if rest else [("pointwise", first)]
        return {k: a for name, conv in convs for k, a in _under(name, conv, get).items()} | _under("norm", module.norm, get)
    if isinstance(module, nn.Conv2d):
        return {("kernel",): _kernel(module, get)}
    if isinstance(module, nn.Linear):
        return {("kernel",): _array(module.weight, get).T, ("bias",): _array(module.bias, get)}
    if isinstance(module, BatchNorm):
        pairs = [("scale", module.weight), ("bias", module.bias)]
        pairs += [("mean", module.running_mean), ("var", module.running_var)] if get is value else []
        return {(name,): _array(p, get) for name, p in pairs if module.weight is not None}
    return {}


def _array(p: torch.Tensor, get: Get) -> np.ndarray:
    found = get(p)
    # a copy: JAX may share the memory of a NumPy array, which PyTorch would change
    return (torch.zeros_like(p) if found is None else found).detach().numpy().copy()


def _kernel(conv: nn.Conv2d, get: Get) -> np.ndarray:
    kernel = _array(conv.weight, get).transpose(2, 3, 1, 0)  # (k, l, inputs, outputs)
    if isinstance(conv, DepthwiseConv):
        return kernel[:, :, 0]
    return kernel[0, 0] if conv.kernel_size == (1, 1) else kernel


def _under(name: str, module: nn.Module, get: Get, stacked: bool = False) -> Leaves:
    return {(name, *k): a[None] if stacked else a for k, a in module_leaves(module, get).items()}


def network_leaves(net: nn.Module, equivalent: Any, get: Get = value) -> Leaves:
    """The numbers of a supernet or a network, by the paths of the leaves of its equivalent in JAX."""
    conv, norm = net.stem
    leaves = {("stem", *k): a for k, a in (_under("norm", norm, get, True) | module_leaves(conv, get)).items()}
    leaves |= _under("classifier", net.classifier, get)
    if getattr(net, "auxiliary", None) is not None:
        _, _, narrow, norm0, _, conv, norm1, _, _, linear = net.auxiliary
        head = {("narrow", *k): a for k, a in (_under("pointwise", narrow, get, True) | _under("norm", norm0, get, True)).items()}
        head |= module_leaves(conv, get) | _under("norm", norm1, get, True) | _under("classifier", linear, get)
        leaves |= {("auxiliary", *k): a for k, a in head.items()}
    for i, cell in enumerate(net.cells):
        for name in ("preprocess0", "preprocess1"):
            leaves |= {(f"cell{i}", *k): a for k, a in _under(name, getattr(cell, name), get, True).items()}
        operation = cell.operation if hasattr(cell, "operation") else lambda number, cell=cell: cell.operations[number]
        for stack in getattr(equivalent, f"cell{i}").stacks:
            rows = [module_leaves(operation(number), get) for number in stack.indices]
            leaves |= {(f"cell{i}", stack.name, *k): np.stack([row[k] for row in rows]) for k in rows[0]}
    return leaves


def state_of(net: nn.Module, equivalent: nnx.Module, get: Get = value, kind: Any = nnx.Param) -> nnx.State:
    """The state of the equivalent network in JAX with the numbers of a network of PyTorch, or with their gradients."""
    state, leaves = nnx.state(equivalent, kind), network_leaves(net, equivalent, get)
    wanted = jax_cnn._flat(state)
    if kind is nnx.Param and get is value:
        trainable = {name for name in leaves if name[-1] not in ("mean", "var")}
        assert trainable == set(wanted), trainable ^ set(wanted)
    for name, leaf in wanted.items():
        assert leaf.shape == leaves[name].shape, (name, leaf.shape, leaves[name].shape)
    return jax_cnn._like(state, {name: jnp.asarray(leaves[name], leaf.dtype) for name, leaf in wanted.items()})


def recurrent_like(net: torch_rnn.CellModel, model: rnn.LanguageModel) -> tuple[Any, nnx.State]:
    """The graph of `model`, and its parameters with the values of `net`, in double precision."""
    graph, params = nnx.split(model, nnx.Param)
    products = torch.stack([*net.products.values()])
    for name, value in {"embedding": net.embedding, "bias": net.bias, "entry": net.entry, "products": products}.items():
        params[name] = params[name].replace(jnp.asarray(value.detach().numpy().copy()))
    return graph, params


def as_torch(tree: Any) -> Any:
    return jax.tree.map(lambda x: torch.from_numpy(np.array(x)), tree)
