"""Param groups of single layers and modules: output channels, input features, attention heads, whole modules."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from proxopt import Groups, ProxOperator
from proxopt_torch.groups.claims import Claim, collect, with_groups
from proxopt_torch.groups.result import ParamGroups, Units
from proxopt_torch.groups.selection import PRUNED, Selection, computed, name, parameter, select
from proxopt_torch.penalised import warn

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# those that treat each channel alone: batch norms, that of several devices too, and instance norms
NORMS = (nn.modules.batchnorm._NormBase,)
LAZY_NORMS = (nn.modules.batchnorm._LazyNormBase,)


def output_channels(
    model: nn.Module, penalty: ProxOperator, include: Selection = None, exclude: Selection = None, *, joint: bool = False
) -> ParamGroups:
    """One group for each output neuron (Linear) or output channel (convolution): the weights that compute it.

    Args:
      model: its Linear and convolution layers are penalised, also grouped convolutions.
      penalty: a penalty without groups of its own, e.g. ``SparseGroupLasso(2e-4)``; the groups are set here for each weight.
      include, exclude: layers by name (patterns such as ``"encoder.*"``) or type. None includes all and excludes none.
      joint: put the entry of the bias, and the two entries of a BatchNorm, SyncBatchNorm or InstanceNorm that is registered
        directly after the layer, into the group of their channel. Where it follows the layer in the forward pass too, the output
        of a zeroed channel is exactly 0, and ``compact`` can remove it. A warning points to ``coupled``, which finds what follows
        from an example.

    Raises:
      TypeError: ``penalty`` is no ``ProxOperator``.
      ValueError: a name or type that matches no such layer; a penalty that has groups already; a weight that is no parameter of
        the layer; with ``joint``, a layer of which some but not all parameters are frozen.

    >>> import torch
    >>> from proxopt import GroupL2
    >>> from proxopt_torch import ProxAdam, groups
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> optimizer = ProxAdam(groups.output_channels(net, GroupL2(1e-3), exclude="2"))
    >>> [group.get("param_names") for group in optimizer.param_groups]
    [['0.weight'], ['0.bias', '2.weight', '2.bias']]
    """
    if joint:
        warn(
            "joint=True assumes that a layer is followed by the BatchNorm registered directly after it, and does not find other "
            "layers that compute the same channels: groups.coupled(model, example_inputs, penalty) follows the data instead"
        )
    layers = select(model, (nn.Linear, *CONVS, *TRANSPOSED), include, exclude)
    claimed: list[Claim] = []
    for place, layer in layers.items():
        axis = 1 if isinstance(layer, TRANSPOSED) else 0
        if axis == 1 and layer.groups != 1:
            raise ValueError(f"{place} must be excluded: output channels of a grouped transposed convolution are not slices")
        weight = parameter(model, layer, "weight")
        units = (Units("output channels", place, layer.weight.shape[axis]),)
        if joint:
            members = [weight, *(parameter(model, *member) for member in _followers(model, layer))]
            labels = Groups.labels([range(layer.weight.shape[axis])] * len(members), axis=(axis, *[0] * (len(members) - 1)))
            claimed.append(Claim(members, with_groups(penalty, labels), True, units))
        else:
            along = tuple(a for a in range(layer.weight.ndim) if a != axis)
            claimed.append(Claim([weight], with_groups(penalty, Groups.along(along)), False, units))
    return collect(model, claimed)


def input_features(model: nn.Module, penalty: ProxOperator, include: Selection = None, exclude: Selection = None) -> ParamGroups:
    """One group for each input feature (Linear) or input channel (convolution): the weights that read it.

    A convolution with ``groups > 1`` has no such slices and stays unpenalised.

    Args:
      model: its Linear and convolution layers are penalised.
      penalty: a penalty without groups of its own; the groups are set here for each weight.
      include, exclude: layers by name (patterns such as ``"encoder.*"``) or type. None includes all and excludes none.

    Raises:
      TypeError: ``penalty`` is no ``ProxOperator``.
      ValueError: a name or type that matches no such layer; a convolution with ``groups > 1`` that is included; a penalty that
        has groups already; a weight that is no parameter of the layer.

    >>> import torch
    >>> from proxopt import SparseGroupLasso
    >>> from proxopt_torch import AdamHAPG, groups
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> optimizer = AdamHAPG(groups.input_features(net, SparseGroupLasso(1e-3)), lr=3e-4)
    >>> optimizer.param_groups[0]["penalty"]["groups"]
    {'kind': 'along', 'axis': [0]}
    """
    layers = select(model, (nn.Linear, *CONVS, *TRANSPOSED), include, exclude)
    claimed: list[Claim] = []
    for place, layer in layers.items():
        if getattr(layer, "groups", 1) != 1:
            if include is not None:
                raise ValueError(f"{place} must not be included: input channels of a convolution with groups > 1 are not slices")
            continue
        axis = 0 if isinstance(layer, TRANSPOSED) else 1
        weight = parameter(model, layer, "weight")
        along = tuple(a for a in range(layer.weight.ndim) if a != axis)
        units = (Units("input features", place, layer.weight.shape[axis]),)
        claimed.append(Claim([weight], with_groups(penalty, Groups.along(along)), False, units))
    return collect(model, claimed)


def attention_heads(model: nn.Module, penalty: ProxOperator, include: Selection = None, exclude: Selection = None) -> ParamGroups:
    """One group for each head of an ``nn.MultiheadAttention``.

    It holds the rows of the query, key and value projections that belong to the head, their biases, and its columns of the output
    projection.

    Args:
      model: its ``nn.MultiheadAttention`` layers are penalised.
      penalty: a penalty without groups of its own; the groups are set here for each layer.
      include, exclude: layers by name (patterns such as ``"encoder.*"``) or type. None includes all and excludes none.

    Raises:
      TypeError: ``penalty`` is no ``ProxOperator``.
      ValueError: a name or type that matches no such layer; a penalty that has groups already; a weight that is no parameter of
        the layer; a layer of which some but not all parameters are frozen.

    >>> import torch
    >>> from proxopt import GroupL2
    >>> from proxopt_torch import ProxAdam, groups
    >>> layer = torch.nn.TransformerEncoderLayer(16, 4, 32)
    >>> optimizer = ProxAdam(groups.attention_heads(layer, GroupL2(1e-3)))
    >>> optimizer.param_groups[0]["param_names"]
    ['self_attn.in_proj_weight', 'self_attn.in_proj_bias', 'self_attn.out_proj.weight']
    """
    claimed: list[Claim] = []
    for place, layer in select(model, (nn.MultiheadAttention,), include, exclude).items():
        heads = np.repeat(np.arange(layer.num_heads), layer.head_dim)
        if layer.in_proj_weight is not None:
            members = [(layer, "in_proj_weight", np.tile(heads, 3))]
        else:
            members = [(layer, key, heads) for key in ("q_proj_weight", "k_proj_weight", "v_proj_weight")]
        if layer.in_proj_bias is not None:
            members.append((layer, "in_proj_bias", np.tile(heads, 3)))
        axes = (*[0] * len(members), 1)
        members.append((layer.out_proj, "weight", heads))
        labels = Groups.labels([list(h) for _, _, h in members], axis=axes)
        names = [parameter(model, m, key) for m, key, _ in members]
        units = (Units("attention heads", place, layer.num_heads),)
        claimed.append(Claim(names, with_groups(penalty, labels), True, units))
    return collect(model, claimed)


def modules(model: nn.Module, penalty: ProxOperator, include: Selection) -> ParamGroups:
    """One group for each whole module, e.g. an operation of a supernet: all its parameters become zero together.

    Args:
      model: contains the modules.
      penalty: a penalty without groups of its own.
      include: the modules by name, pattern or type. None of them may be inside another.

    Raises:
      TypeError: ``penalty`` is no ``ProxOperator``.
      ValueError: a name or type that matches no module; modules without parameters; a penalty that has groups already; a module
        of which some but not all parameters are frozen, or that computes a weight from others, which may be nonzero where they
        are zero.

    >>> import torch
    >>> from proxopt import GroupL2
    >>> from proxopt_torch import ProxSGD, groups
    >>> net = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)})
    >>> optimizer = ProxSGD(groups.modules(net, GroupL2(1e-3), ["a", "b"]), lr=0.1)
    >>> [group["param_names"] for group in optimizer.param_groups]
    [['a.weight', 'a.bias'], ['b.weight', 'b.bias']]
    """
    chosen = select(model, (nn.Module,), include, None)
    claimed: list[Claim] = []
    for place, module in chosen.items():
        for part in module.modules():
            for key, (reason, _) in computed(part).items():
                if reason != PRUNED:  # the product of a mask with zeros is zero
                    parameter(model, part, key)
        members = list(dict.fromkeys(name(model, p) for p in module.parameters()))
        if members:
            claimed.append(Claim(members, with_groups(penalty, Groups.whole()), True, (Units("modules", place, 1),)))
    if not claimed:
        raise ValueError(f"include must name modules that have parameters, got {', '.join(map(repr, chosen))}")
    return collect(model, claimed)


def _followers(model: nn.Module, layer: Any) -> list[tuple[nn.Module, str]]:
    """The bias of a layer and the weight and bias of a norm of channels directly after it, as pairs of a module and a name."""
    members = [(layer, "bias")] if layer.bias is not None else []
    own, order = set(layer.modules()), list(model.modules())
    after = next((m for m in order[order.index(layer) :] if m not in own and _is_leaf(m)), None)
    if isinstance(after, LAZY_NORMS) and after.affine:
        members += [(after, "weight")]  # has no shape yet, which ``parameter`` raises for
    elif isinstance(after, NORMS) and after.affine:
        width = layer.weight.shape[1 if isinstance(layer, TRANSPOSED) else 0]
        members += [(after, "weight"), (after, "bias")] if after.num_features == width else []
    return members


def _is_leaf(module: nn.Module) -> bool:
    """Whether a module has no submodules, other than those that compute its weights."""
    return all(name == "parametrizations" for name, _ in module.named_children())
