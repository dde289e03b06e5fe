"""Loading the state_dict of a smaller model into a model that was built in full size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.parallel import DistributedDataParallel

from proxopt_torch import wrappers
from proxopt_torch.compaction import integers, layers
from proxopt_torch.compaction.slicing import first_names, like, put, slots

SIZES = "sizes"
"""The key of the metadata of a state_dict under which the integers are that were set in the code of the model."""


def remember_sizes(model: nn.Module, sizes: dict[str, int]) -> None:
    """Let the state_dict of a model hold these integers in its metadata.

    The hook is a ``GraphModule``, which is pickled with its code, so that the model loads without this package.
    """
    if not sizes:
        return
    graph = fx.Graph()
    metadata = [graph.placeholder(name) for name in ("module", "state_dict", "prefix", "metadata")][-1]
    graph.call_method("update", (metadata, {SIZES: dict(sizes)}))  # unpickling traces the code, where setitem would fail
    graph.output(None)
    register: Any = model.register_state_dict_post_hook
    register(fx.GraphModule(nn.Module(), graph))


def load_compact(model: nn.Module, state_dict: dict[str, Any], sizes: dict[str, int] | None = None) -> nn.Module:
    """Load the state_dict of a compacted network into ``model``, built in full size, which takes its shapes.

    Args:
      model: a network of the architecture that was compacted; it is changed in place. It may be compiled, as a whole or in parts,
        or in ``DataParallel``; the same holds for the model of ``state_dict``.
      state_dict: the state_dict of ``Compacted.model``.
      sizes: ``Compacted.sizes``, integers that the code of the model reads. None: those in the metadata of ``state_dict``, which
        ``torch.save`` keeps and other formats may lose.

    Returns:
      ``model``; where it is an ``nn.MultiheadAttention`` with fewer heads, its replacement, in no wrapper.

    Raises:
      TypeError: ``model`` is no ``nn.Module``, or ``state_dict`` or ``sizes`` is no mapping.
      ValueError: the names differ, a tensor is larger than that of the model, or the model has no integers with the names in
        ``sizes``; nothing was changed.
      TypeError: ``model`` is no ``nn.Module``, or ``state_dict`` is no mapping.
      ValueError: the names differ, a tensor is larger than that of the model, the model has no integers with the names in
        ``sizes``, or it is in ``DistributedDataParallel``, which has noted its parameters; nothing was changed.

    >>> import torch
    >>> from proxopt_torch import load_compact
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> small = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
    >>> load_compact(net, small.state_dict())[0]
    Linear(in_features=4, out_features=3, bias=True)
    """
    if not isinstance(model, nn.Module) or not isinstance(state_dict, Mapping):
        got = f"{type(model).__name__} and {type(state_dict).__name__}"
        raise TypeError(f"model and state_dict must be an nn.Module and the state_dict of a smaller one, got {got}")
    if not (sizes is None or isinstance(sizes, Mapping)):
        raise TypeError(f"sizes must be a dict of integers by name or None, got {sizes!r}")
    if wrappers.holds(model, DistributedDataParallel):
        raise ValueError(
            "model must be loaded before it is wrapped in DistributedDataParallel, which exchanges the gradients of the "
            "parameters that it was made with, got one that is"
        )
    given, model = model, wrappers.unwrapped(model)
    sizes = sizes_of(state_dict) if sizes is None else sizes
    numbers = integers.located(model, {own: sizes[name] for name, own in wrappers.renamed(sizes, model).items()})
    state_dict = {own: state_dict[name] for name, own in wrappers.renamed(state_dict, model).items()}
    first, places = first_names(model), slots(model)
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    tensors = {name: value for name, value in state_dict.items() if not name.endswith("_extra_state")}
    _check_names(model, own, tensors)
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(value).__name__}")
        if name not in own and tuple(value.shape) != (outputs := _outputs(model, name, tensors)):
            raise ValueError(f"{name} must be of shape {outputs}, got {tuple(value.shape)}")
        if name in own and (value.ndim != own[name].ndim or any(a > b for a, b in zip(value.shape, own[name].shape))):
            raise ValueError(f"{name} must be at most of shape {tuple(own[name].shape)}, got {tuple(value.shape)}")
    for name, value in tensors.items():
        if name not in own:  # a bias of a layer that had none
            path, _, leaf = name.rpartition(".")
            layer: Any = model.get_submodule(path)
            setattr(layer, leaf, nn.Parameter(value.detach().clone()))
        elif first[name] == name or first[name] not in tensors:
            members, old = places[first[name]], own[name]
            new = value.detach().clone().to(old.device)
            put(members, like(old, new) if isinstance(old, nn.Parameter) else new, persistent=value.shape != old.shape)
    for name, value in state_dict.items():
        if name not in tensors:
            model.get_submodule(name.rpartition(".")[0]).set_extra_state(value)
    for module, place, number in numbers:
        integers.assign(module, place, number)
    loaded = layers.refresh(model)
    return given if loaded is model else loaded


def _check_names(model: nn.Module, own: dict[str, Tensor], state_dict: dict[str, Any]) -> None:
    layers_without = [p for p, m in model.named_modules() if m._parameters.get("bias", m) is None and "weight" in m._parameters]
    without_bias = {f"{path}.bias".lstrip(".") for path in layers_without}
    extra = sorted(set(state_dict) - set(own) - without_bias)
    missing = sorted(set(model.state_dict()) - set(state_dict))
    missing = [name for name in missing if not name.endswith("_extra_state")]
    if extra or missing:
        raise ValueError(f"state_dict must hold the names of the model; unknown: {extra}, missing: {missing}")


def _outputs(model: nn.Module, bias: str, tensors: dict[str, Any]) -> tuple[int]:
    """The shape of the bias of a layer that had none, by the weight in the state_dict."""
    path = bias.rpartition(".")[0]
    layer, weight = model.get_submodule(path), tensors[f"{path}.weight".lstrip(".")]
    return (weight.shape[1] * layer.groups,) if isinstance(layer, layers.TRANSPOSED) else (weight.shape[0],)


def sizes_of(state_dict: Any) -> dict[str, int]:
    """The integers in the metadata of a state_dict."""
    found: dict[str, int] = {}
    for prefix, entry in (getattr(state_dict, "_metadata", None) or {}).items():
        found |= {f"{prefix}.{name}".lstrip("."): number for name, number in entry.get(SIZES, {}).items()}
    return found
