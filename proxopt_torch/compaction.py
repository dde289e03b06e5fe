"""Removal of zeroed channels, neurons and inputs from a network, which becomes smaller and computes the same function."""

from __future__ import annotations

import copy
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

Example: TypeAlias = tuple[Any, ...]  # the arguments of a model


@dataclass
class Compacted:
    """A network after ``compact``.

    model: the smaller network, in eval mode. inputs: indices of the input features that it reads, or None for all. removed:
    the number of channels that were removed, by the name of the first layer that computed them.
    """

    model: nn.Module
    inputs: Tensor | None = None
    removed: dict[str, int] = field(default_factory=dict)


def compact(
    model: nn.Module, example_inputs: Tensor | tuple[Any, ...], *, inputs: bool = False, tolerance: float = 1e-4
) -> Compacted:
    """Remove zeroed channels from a copy of ``model``, which computes the same function in eval mode.

    A channel or neuron is removed from all layers that share it (residual connections, depthwise convolutions, flattened feature
    maps) if

    - nothing reads it: all weights of the layers that take it as input are exactly zero; or
    - nothing computes it: all weights of the layers that have it as output are exactly zero, so that it is constant. The constant
      is added to the biases of the layers that read it. Where this is impossible (a convolution with zero padding that reads a
      nonzero constant) the channel stays.

    This is repeated until nothing changes, since a removal can leave further channels without reader. A layer keeps at least one
    channel. Channels that a LayerNorm, GroupNorm, attention or grouped convolution combines are not removed.

    Args:
      model: a network with sparse weights (after ``optimizer.eval()``); it is not changed.
      example_inputs: the arguments of ``model(...)``, a tensor or a tuple. The outputs before and after are compared on them.
      inputs: also remove input features that no first Linear layer reads. ``Compacted.inputs`` holds the indices of the others.
      tolerance: largest difference of the outputs that counts as rounding, relative to the largest output.

    Raises:
      ImportError: torch-pruning is not installed (``pip install "proxopt[torch]"``).
      ValueError: ``inputs=True`` and something other than a Linear layer reads the input.
      RuntimeError: the outputs differ.

    >>> import torch
    >>> from proxopt_torch import compact
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> with torch.no_grad():
    ...     _ = net[0].weight[2:].zero_(), net[0].weight[:, 1].zero_()
    >>> small = compact(net, torch.randn(3, 4), inputs=True)
    >>> small.model[0], small.inputs.tolist()
    (Linear(in_features=3, out_features=2, bias=True), [0, 2, 3])
    """
    example = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    small = copy.deepcopy(model).eval()
    with torch.no_grad():
        before = _flat(small(*example))
    removed: dict[str, int] = defaultdict(int)
    while found := _next_removal(small, example):
        root, prune, group, channels = found
        _fold(small, example, group, channels)
        producers = {item.dep.target.module for item in group if not _is_reader(item)}
        removed[next(name for name, m in small.named_modules() if m in producers)] += len(channels)
        _graph(small, example).get_pruning_group(root, prune, idxs=channels).prune()
    kept = None
    if inputs:
        kept = _cut_inputs(small, example)
        example = (example[0].flatten(1)[:, kept], *example[1:])
    _compare(before, small, example, tolerance)
    return Compacted(small, kept, dict(removed))


def load_compact(model: nn.Module, state_dict: dict[str, Any]) -> nn.Module:
    """Load the state_dict of a compacted network into ``model``, built in full size, which takes its shapes.

    Args:
      model: a network of the architecture that was compacted; it is changed in place.
      state_dict: the state_dict of ``Compacted.model``.

    Returns:
      ``model``.

    Raises:
      ValueError: the names differ, or a tensor is larger than that of the model; nothing was changed.

    >>> import torch
    >>> from proxopt_torch import load_compact
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> small = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
    >>> load_compact(net, small.state_dict())[0]
    Linear(in_features=4, out_features=3, bias=True)
    """
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    extra = sorted(set(state_dict) - set(own) - {n for n in state_dict if n.endswith(".bias")})
    missing = sorted(set(own) - set(state_dict))
    if extra or missing:
        raise ValueError(f"state_dict must hold the names of the model; unknown: {extra}, missing: {missing}")
    for name, value in state_dict.items():
        if name in own and (value.ndim != own[name].ndim or any(a > b for a, b in zip(value.shape, own[name].shape))):
            raise ValueError(f"{name} must be at most of shape {tuple(own[name].shape)}, got {tuple(value.shape)}")
    for name, value in state_dict.items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if leaf in module._buffers:
            module._buffers[leaf] = value.detach().clone()
        else:
            module._parameters[leaf] = nn.Parameter(value.detach().clone())
    for module in model.modules():
        _refresh_sizes(module)
    return model


def _next_removal(model: nn.Module, example: Example) -> tuple[Any, Any, Any, list[int]] | None:
    """The next set of coupled layers with removable channels: its root, its pruning function, its members, the channels."""
    graph = _graph(model, example)
    constants = _constant_inputs(model, example)
    for group in graph.get_all_groups(root_module_types=[*CONVS, nn.Linear]):
        root = group[0].dep.target.module
        width = len(set(group[0].root_idxs))
        removable = _removable_channels(group, width, constants)
        if removable and len(removable) == width:
            removable = removable[1:]  # a layer without channels is not valid
        if removable:
            prune = graph.get_pruner_of_module(root).prune_out_channels
            return root, prune, graph.get_pruning_group(root, prune, idxs=list(range(width))), removable
    return None


def _removable_channels(group: Any, width: int, constants: dict[nn.Module, Tensor]) -> list[int]:
    """The channels of coupled layers that nothing reads, or that are constants which can be moved into biases."""
    computed = torch.zeros(width, dtype=torch.bool)
    read = torch.zeros(width, dtype=torch.bool)
    immovable = torch.zeros(width, dtype=torch.bool)
    readers = 0
    for item in group:
        module, channels = item.dep.target.module, torch.tensor(item.root_idxs)
        places = torch.tensor(item.idxs)
        if not isinstance(module, (nn.Linear, *CONVS, *NORMS)):
            if type(module).__module__.startswith("torch_pruning"):
                continue  # a reshape or an elementwise function
            return []  # LayerNorm, attention, ...: each output depends on all channels
        if isinstance(module, NORMS) or _depthwise(module):
            continue
        if getattr(module, "groups", 1) > 1:
            return []  # the groups of a convolution must keep equal sizes
        if _is_reader(item):
            readers += 1
            columns = _by_input(module)[places].flatten(1)
            _mark(read, channels, (columns != 0).any(1))
            constant = constants.get(module)
            value = constant[places] if constant is not None else torch.full(places.shape, torch.nan)
            fixed = (value == 0) | (torch.isfinite(value) & _can_fold(module))
            _mark(immovable, channels, ~fixed)
        else:
            _mark(computed, channels, (_by_output(module)[places].flatten(1) != 0).any(1))
    if not readers:
        return []  # an output of the network
    indices: list[int] = (~read | (~computed & ~immovable)).nonzero().flatten().tolist()
    return indices


def _fold(model: nn.Module, example: Example, group: Any, channels: list[int]) -> None:
    """Add the constant values of channels that will be removed to the biases of the layers that read them."""
    constants = _constant_inputs(model, example)
    chosen = set(channels)
    for item in group:
        module = item.dep.target.module
        if not isinstance(module, (nn.Linear, *CONVS)) or _depthwise(module) or not _is_reader(item):
            continue
        places = torch.tensor([place for place, channel in zip(item.idxs, item.root_idxs) if channel in chosen])
        columns = _by_input(module).detach()[places].flatten(2).sum(2)  # (channels, outputs)
        value = torch.where((columns != 0).any(1), constants[module][places], 0)
        shift = value @ columns
        if bool((shift != 0).any()):
            bias = module.bias.detach() if module.bias is not None else torch.zeros_like(shift)
            module.bias = nn.Parameter(bias + shift)


def _constant_inputs(model: nn.Module, example: Example) -> dict[nn.Module, Tensor]:
    """For each Linear and convolution layer the value of every input channel on the example; NaN where it is not constant."""
    found: dict[nn.Module, Tensor] = {}

    def look(module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].detach()
        axis = x.ndim - 1 if isinstance(module, nn.Linear) else x.ndim + 1 - module.weight.ndim
        rows = x.movedim(axis, 0).flatten(1)
        low, high = rows.amin(1), rows.amax(1)
        value = torch.where(low == high, low, torch.nan)
        if module in found:
            value = torch.where(found[module] == value, value, torch.nan)
        found[module] = value

    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, *CONVS))]
    hooks = [m.register_forward_pre_hook(look) for m in layers]
    try:
        with torch.no_grad():
            model(*example)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _cut_inputs(model: nn.Module, example: Example) -> Tensor:
    """Remove input features that no first layer reads, and return the indices of the others."""
    x = example[0]
    first: list[nn.Linear] = []
    others: list[str] = []

    def look(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor) and args[0].data_ptr() == x.data_ptr() and not list(module.children()):
            if isinstance(module, nn.Linear) and args[0].shape == (x.shape[0], x.numel() // x.shape[0]):
                first.append(module)
            elif not isinstance(module, (nn.Flatten, nn.Identity)):
                others.append(type(module).__name__)

    hooks = [m.register_forward_pre_hook(look) for m in model.modules()]
    try:
        with torch.no_grad():
            model(*example)
    finally:
        for hook in hooks:
            hook.remove()
    if others or not first:
        raise ValueError(f"inputs=True needs a model whose input goes to Linear layers only, got {others or 'none'}")
    read = torch.stack([(layer.weight != 0).any(0) for layer in first]).any(0)
    if not bool(read.any()):
        read[0] = True
    kept = read.nonzero().flatten()
    for layer in dict.fromkeys(first):
        layer.weight = nn.Parameter(layer.weight.detach()[:, kept].clone())
        layer.in_features = len(kept)
    return kept


def _compare(before: list[Tensor], small: nn.Module, example: Example, tolerance: float) -> None:
    """Raise RuntimeError where the outputs of the smaller network differ from those before."""
    with torch.no_grad():
        after = _flat(small(*example))
    for b, a in zip(before, after, strict=True):
        if a.shape != b.shape:
            raise RuntimeError(f"the compacted model must return shape {tuple(b.shape)}, got {tuple(a.shape)}")
        gap, largest = float((a - b).abs().max()), float(b.abs().max())
        if not gap <= tolerance * max(largest, 1e-30):
            raise RuntimeError(
                f"the compacted model must compute the same, got outputs that differ by {gap:.3g} of {largest:.3g}"
            )


def _graph(model: nn.Module, example: Example) -> Any:
    try:
        import torch_pruning as tp
    except ModuleNotFoundError as error:
        if error.name != "torch_pruning":
            raise
        raise ImportError('compact needs torch-pruning: pip install "proxopt[torch]"') from error
    with torch.enable_grad():  # torch-pruning follows the autograd graph
        return tp.DependencyGraph().build_dependency(model, example_inputs=example)


def _is_reader(item: Any) -> bool:
    """Whether a member of a group has the channels as input; torch-pruning names its functions after the side."""
    return "in_channels" in item.dep.handler.__name__


def _by_output(module: Any) -> Tensor:
    """The weight with the output channels as first axis."""
    weight: Tensor = module.weight.transpose(0, 1) if "Transpose" in type(module).__name__ else module.weight
    return weight


def _by_input(module: Any) -> Tensor:
    """The weight with the input channels as first axis, the output channels as second, and at least one more."""
    weight: Tensor = module.weight if "Transpose" in type(module).__name__ else module.weight.transpose(0, 1)
    return weight if weight.ndim > 2 else weight[..., None]


def _depthwise(module: Any) -> bool:
    return getattr(module, "groups", 1) > 1 and module.groups == module.in_channels == module.out_channels


def _can_fold(module: Any) -> bool:
    """Whether a constant input channel acts like a bias: not near the border of a convolution with zero padding."""
    if isinstance(module, nn.Linear):
        return True
    plain = isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and module.groups == 1
    return plain and (module.padding_mode != "zeros" or (module.padding != "same" and not any(module.padding)))


def _mark(flags: Tensor, channels: Tensor, values: Tensor) -> None:
    """Set the flags of channels for which a value is True; a channel may come several times, as in flattened maps."""
    flags |= torch.zeros(flags.shape, dtype=torch.long).index_add_(0, channels, values.long().cpu()) > 0


def _flat(out: Any) -> list[Tensor]:
    """The tensors of a nested output."""
    if isinstance(out, Tensor):
        return [out]
    return [t for part in (out.values() if isinstance(out, dict) else out) for t in _flat(part)]


def _refresh_sizes(module: Any) -> None:
    """Set the sizes that a layer holds as numbers to those of its tensors."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, CONVS):
        depthwise = module.groups > 1 and module.weight.shape[1] == 1
        transposed = "Transpose" in type(module).__name__
        if depthwise:
            module.groups = module.in_channels = module.out_channels = module.weight.shape[0]
        else:
            sides = (module.weight.shape[0], module.weight.shape[1] * module.groups)
            module.in_channels, module.out_channels = sides if transposed else (sides[1], sides[0])
    elif isinstance(module, NORMS):
        module.num_features = len(module.running_mean if module.running_mean is not None else module.weight)
