"""Selection of indices of the parameters and buffers of a model."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Kept: TypeAlias = tuple[Tensor | None, ...]
"""The indices that remain of each dimension of a tensor; None where all do."""

Slot: TypeAlias = tuple[nn.Module, str]


def selected(tensor: Tensor, kept: Kept) -> Tensor:
    """A copy of the remaining slices of a tensor, in its memory format."""
    out = tensor.detach()
    for dimension, indices in enumerate(kept):
        if indices is not None:
            out = out.index_select(dimension, indices.to(out.device))
    if tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous():
        return out.clone(memory_format=torch.channels_last)
    return out.contiguous().clone() if out.data_ptr() == tensor.data_ptr() else out.contiguous()


def slots(model: nn.Module) -> dict[str, list[Slot]]:
    """Where a model holds each of its parameters and buffers, under the first of its names. Tied ones have several places."""
    first: dict[int, str] = {}
    out: dict[str, list[Slot]] = {}
    for path, module in model.named_modules():
        for members in (module._parameters, module._buffers):
            for leaf, tensor in members.items():
                if tensor is not None:
                    name = first.setdefault(id(tensor), f"{path}.{leaf}".lstrip("."))
                    out.setdefault(name, []).append((module, leaf))
    return out


def first_names(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter or buffer, and the first name of the same tensor."""
    first: dict[int, str] = {}
    out: dict[str, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for members in (module._parameters, module._buffers):
            for leaf, tensor in members.items():
                if tensor is not None:
                    name = f"{path}.{leaf}".lstrip(".")
                    out[name] = first.setdefault(id(tensor), name)
    return out


def cut(model: nn.Module, kept: dict[str, Kept]) -> None:
    """Replace tensors of a model, which is changed, by their remaining slices. Tied tensors stay tied.

    A buffer that is cut becomes a persistent one: without its values a state_dict would not determine the model.
    """
    places, first = slots(model), first_names(model)
    for name, indices in kept.items():
        if all(i is None for i in indices):
            continue
        members = places[first[name]]
        module, leaf = members[0]
        old = module._parameters.get(leaf)
        if old is None:
            buffer = module._buffers[leaf]
            assert buffer is not None
            put(members, selected(buffer, indices))
        else:
            put(members, like(old, selected(old, indices)))


def like(old: nn.Parameter, values: Tensor) -> nn.Parameter:
    """A parameter with other values and the attributes of an old one."""
    new = nn.Parameter(values, requires_grad=old.requires_grad)
    new.__dict__.update(old.__dict__)
    return new


def put(members: list[Slot], tensor: Tensor, persistent: bool = True) -> None:
    """Let all these places hold one tensor. persistent: make a buffer a persistent one."""
    for module, leaf in members:
        if leaf in module._parameters:
            module._parameters[leaf] = tensor  # type: ignore[assignment]
        else:
            module._buffers[leaf] = tensor
            if persistent:
                module._non_persistent_buffers_set.discard(leaf)


def add_to_bias(model: nn.Module, name: str, shift: Tensor) -> None:
    """Add to a bias, given by its name, or by the name of a layer that has none yet."""
    first = first_names(model)
    if name in first:
        members = slots(model)[first[name]]
        module, leaf = members[0]
        old = module._parameters.get(leaf)
        if old is None:
            buffer = module._buffers[leaf]
            assert buffer is not None
            module._buffers[leaf] = buffer + shift.to(buffer)
            return
        put(members, like(old, old.detach() + shift.to(old)))
        return
    layer: Any = model.get_submodule(name)
    layer.bias = nn.Parameter(shift.to(layer.weight).clone(), requires_grad=layer.weight.requires_grad)
