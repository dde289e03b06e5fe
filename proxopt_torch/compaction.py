"""From zeros to a smaller network: channels, neurons and inputs that do nothing are cut out for real."""

from __future__ import annotations

import copy
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass
class Compacted:
    """model: the smaller network, in eval mode. inputs: indices of the input features it still reads (None: all, as
    they were). removed: how many channels went, by the name of the first layer that made them.
    """

    model: Any
    inputs: Tensor | None = None
    removed: dict[str, int] = field(default_factory=dict)


def compact(model: nn.Module, example_inputs: Any, *, inputs: bool = False, tolerance: float = 1e-4) -> Compacted:
    """Cut out of a copy of `model` what is exactly dead; the copy computes the same function in eval mode.

    A channel or neuron goes, over all layers that must agree on it (residual streams, depthwise convolutions, flattened
    maps), when

      - nothing reads it: all weights that would are exactly zero; or
      - nothing makes it: all weights that lead to it are exactly zero. What it still is, a constant, moves into the biases
        of its readers; where it cannot (a padded convolution that reads a non-zero constant) the channel stays.

    That repeats until nothing changes, since one removal can kill the next. A layer keeps at least one channel. Channels
    that a LayerNorm, GroupNorm, attention or grouped convolution mixes are left alone.

    Args:
      model: the network with the sparse weights in it (after `optimizer.eval()`); is not changed.
      example_inputs: what model(...) takes, a tensor or a tuple; outputs before and after are compared on it.
      inputs: also remove input features that no first Linear layer reads; `Compacted.inputs` says which stay.
      tolerance: how far outputs may move, relative to the largest, by rounding.

    Raises:
      ImportError: torch-pruning is not installed (`pip install "proxopt[torch]"`).
      ValueError: inputs=True and something other than a Linear layer reads the input.
      RuntimeError: the outputs differ; nothing was changed.

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
        makers = {item.dep.target.module for item in group if not _is_reader(item)}
        removed[next(name for name, m in small.named_modules() if m in makers)] += len(channels)
        _graph(small, example).get_pruning_group(root, prune, idxs=channels).prune()
    kept = None
    if inputs:
        kept = _cut_inputs(small, example)
        example = (example[0].flatten(1)[:, kept], *example[1:])
    _compare(before, small, example, tolerance)
    return Compacted(small, kept, dict(removed))


def load_compact(model: nn.Module, state_dict: dict) -> nn.Module:
    """Give `model`, built in full size, the smaller shapes of a compacted network's state_dict, and its values.

    Args:
      model: the architecture that was compacted; changed in place and returned.
      state_dict: of `Compacted.model`.

    Raises:
      ValueError: names that differ, or a tensor that is larger than the model's.

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


def _next_removal(model: nn.Module, example: tuple) -> tuple[Any, Any, Any, list[int]] | None:
    """The next set of coupled layers with dead channels: its root, how to prune it, its members, the channels."""
    graph = _graph(model, example)
    constants = _constant_inputs(model, example)
    for group in graph.get_all_groups(root_module_types=[*CONVS, nn.Linear]):
        root = group[0].dep.target.module
        width = len(set(group[0].root_idxs))
        dead = _dead_channels(group, width, constants)
        if dead and len(dead) == width:
            dead = dead[1:]  # shapes must stay valid
        if dead:
            prune = graph.get_pruner_of_module(root).prune_out_channels
            return root, prune, graph.get_pruning_group(root, prune, idxs=list(range(width))), dead
    return None


def _dead_channels(group: Any, width: int, constants: dict[nn.Module, Tensor]) -> list[int]:
    made = torch.zeros(width, dtype=torch.bool)
    read = torch.zeros(width, dtype=torch.bool)
    stuck = torch.zeros(width, dtype=torch.bool)
    readers = 0
    for item in group:
        module, channels = item.dep.target.module, torch.tensor(item.root_idxs)
        places = torch.tensor(item.idxs)
        if not isinstance(module, (nn.Linear, *CONVS, *NORMS)):
            if type(module).__module__.startswith("torch_pruning"):
                continue  # a reshape, an elementwise function
            return []  # LayerNorm, attention, ...: channels see each other
        if isinstance(module, NORMS) or _depthwise(module):
            continue
        if getattr(module, "groups", 1) > 1:
            return []  # channels of one group go together only
        if _is_reader(item):
            readers += 1
            columns = _by_input(module)[places].flatten(1)
            _mark(read, channels, (columns != 0).any(1))
            constant = constants.get(module)
            value = constant[places] if constant is not None else torch.full(places.shape, torch.nan)
            fixed = (value == 0) | (torch.isfinite(value) & _can_fold(module))
            _mark(stuck, channels, ~fixed)
        else:
            _mark(made, channels, (_by_output(module)[places].flatten(1) != 0).any(1))
    if not readers:
        return []  # what the network returns
    return (~read | (~made & ~stuck)).nonzero().flatten().tolist()


def _fold(model: nn.Module, example: tuple, group: Any, dead: list[int]) -> None:
    """Move what dead channels still are, a constant, into the biases of the layers that read them."""
    constants = _constant_inputs(model, example)
    chosen = set(dead)
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


def _constant_inputs(model: nn.Module, example: tuple) -> dict[nn.Module, Tensor]:
    """For each Linear and convolution the value of every input channel, NaN where it is not constant."""
    found: dict[nn.Module, Tensor] = {}

    def look(module: nn.Module, args: tuple) -> None:
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


def _cut_inputs(model: nn.Module, example: tuple) -> Tensor:
    """Drop input features that no first layer reads; indices of those that stay."""
    x = example[0]
    first: list[nn.Linear] = []
    others: list[str] = []

    def look(module: nn.Module, args: tuple) -> None:
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


def _compare(before: list[Tensor], small: nn.Module, example: tuple, tolerance: float) -> None:
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


def _graph(model: nn.Module, example: tuple) -> Any:
    try:
        import torch_pruning as tp
    except ModuleNotFoundError as error:
        if error.name != "torch_pruning":
            raise
        raise ImportError('compact needs torch-pruning: pip install "proxopt[torch]"') from error
    with torch.enable_grad():
        return tp.DependencyGraph().build_dependency(model, example_inputs=example)


def _is_reader(item: Any) -> bool:
    return "in_channels" in item.dep.handler.__name__


def _by_output(module: Any) -> Tensor:
    """The weight with the output channels first."""
    return module.weight.transpose(0, 1) if "Transpose" in type(module).__name__ else module.weight


def _by_input(module: Any) -> Tensor:
    """The weight with the input channels first, then the outputs."""
    weight = module.weight if "Transpose" in type(module).__name__ else module.weight.transpose(0, 1)
    return weight if weight.ndim > 2 else weight[..., None]


def _depthwise(module: Any) -> bool:
    return getattr(module, "groups", 1) > 1 and module.groups == module.in_channels == module.out_channels


def _can_fold(module: Any) -> bool:
    if isinstance(module, nn.Linear):
        return True
    plain = isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and module.groups == 1
    return plain and (module.padding_mode != "zeros" or (module.padding != "same" and not any(module.padding)))


def _mark(flags: Tensor, channels: Tensor, values: Tensor) -> None:
    flags |= torch.zeros(flags.shape, dtype=torch.long).index_add_(0, channels, values.long().cpu()) > 0


def _flat(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    return [t for part in (out.values() if isinstance(out, dict) else out) for t in _flat(part)]


def _refresh_sizes(module: Any) -> None:
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
