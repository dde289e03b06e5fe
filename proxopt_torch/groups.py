"""Param groups from a model: which of its parts become zero together.

Every function returns a list of param groups for an optimizer of proxopt_torch: first those with a penalty, then one without,
which holds all other parameters. Each parameter of the model is in exactly one of them.

Only parameters can become zero. A weight that is computed from others (weight_norm, a parametrization, a pruning mask), a buffer,
or a lazy layer before its first forward pass raises ValueError with its name and the remedy.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from fnmatch import fnmatch
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from proxopt import Groups, ProxOperator
from proxopt.penalties import declared
from proxopt_torch.param_groups import ParamGroup, check_operator

Selection: TypeAlias = str | type[nn.Module] | Iterable[str | type[nn.Module]] | None
Claim: TypeAlias = tuple[list[str], ProxOperator, bool]  # names of parameters, their penalty, whether they are one problem

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
LAZY_NORMS = (nn.LazyBatchNorm1d, nn.LazyBatchNorm2d, nn.LazyBatchNorm3d)
PRUNED = "masked by pruning"


def output_channels(
    model: nn.Module, penalty: ProxOperator, include: Selection = None, exclude: Selection = None, *, joint: bool = False
) -> list[ParamGroup]:
    """One group for each output neuron (Linear) or output channel (convolution): the weights that compute it.

    Args:
      model: its Linear and convolution layers are penalised, also grouped convolutions.
      penalty: a penalty without groups of its own, e.g. ``SparseGroupLasso(2e-4)``; the groups are set here for each weight.
      include, exclude: layers by name (patterns such as ``"encoder.*"``) or type. None includes all and excludes none.
      joint: put the entry of the bias, and the two entries of a BatchNorm directly after the layer, into the group of their
        channel. The output of a zeroed channel is then exactly 0, and ``compact`` can remove it.

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
    layers = _select(model, (nn.Linear, *CONVS, *TRANSPOSED), include, exclude)
    claimed: list[Claim] = []
    for name, layer in layers.items():
        axis = 1 if isinstance(layer, TRANSPOSED) else 0
        if axis == 1 and layer.groups != 1:
            raise ValueError(f"{name} must be excluded: output channels of a grouped transposed convolution are not slices")
        weight = _parameter(model, layer, "weight")
        if joint:
            members = [weight, *(_parameter(model, *member) for member in _followers(model, layer))]
            labels = Groups.labels([range(layer.weight.shape[axis])] * len(members), axis=(axis, *[0] * (len(members) - 1)))
            claimed.append((members, _with_groups(penalty, labels), True))
        else:
            along = tuple(a for a in range(layer.weight.ndim) if a != axis)
            claimed.append(([weight], _with_groups(penalty, Groups.along(along)), False))
    return _collect(model, claimed)


def input_features(
    model: nn.Module, penalty: ProxOperator, include: Selection = None, exclude: Selection = None
) -> list[ParamGroup]:
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
    layers = _select(model, (nn.Linear, *CONVS, *TRANSPOSED), include, exclude)
    claimed: list[Claim] = []
    for name, layer in layers.items():
        if getattr(layer, "groups", 1) != 1:
            if include is not None:
                raise ValueError(f"{name} must not be included: input channels of a convolution with groups > 1 are not slices")
            continue
        axis = 0 if isinstance(layer, TRANSPOSED) else 1
        weight = _parameter(model, layer, "weight")
        along = tuple(a for a in range(layer.weight.ndim) if a != axis)
        claimed.append(([weight], _with_groups(penalty, Groups.along(along)), False))
    return _collect(model, claimed)


def attention_heads(
    model: nn.Module, penalty: ProxOperator, include: Selection = None, exclude: Selection = None
) -> list[ParamGroup]:
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
    for layer in _select(model, (nn.MultiheadAttention,), include, exclude).values():
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
        claimed.append(([_parameter(model, m, key) for m, key, _ in members], _with_groups(penalty, labels), True))
    return _collect(model, claimed)


def modules(model: nn.Module, penalty: ProxOperator, include: Selection) -> list[ParamGroup]:
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
    chosen = _select(model, (nn.Module,), include, None)
    claimed: list[Claim] = []
    for module in chosen.values():
        for part in module.modules():
            for key, (reason, _) in _computed(part).items():
                if reason != PRUNED:  # the product of a mask with zeros is zero
                    _parameter(model, part, key)
        members = list(dict.fromkeys(_name(model, p) for p in module.parameters()))
        if members:
            claimed.append((members, _with_groups(penalty, Groups.whole()), True))
    if not claimed:
        raise ValueError(f"include must name modules that have parameters, got {', '.join(map(repr, chosen))}")
    return _collect(model, claimed)


def _select(model: nn.Module, kinds: tuple[type[nn.Module], ...], include: Selection, exclude: Selection) -> dict[str, Any]:
    """The modules of the given classes that are included and not excluded, by name, in the order of the model."""
    everything = dict(model.named_modules())
    found = {name: m for name, m in everything.items() if isinstance(m, kinds) and (name or kinds != (nn.Module,))}
    chosen: dict[str, Any] = {}
    if found:
        wanted = _matching(found, include, "include", everything) if include is not None else set(found)
        unwanted = _matching(found, exclude, "exclude", everything) if exclude is not None else set()
        chosen = {name: m for name, m in found.items() if name in wanted - unwanted}
    if not chosen:
        names = "submodule" if kinds == (nn.Module,) else " or ".join(k.__name__ for k in kinds)
        quantized = any("quantized" in type(m).__module__ for m in everything.values())
        hint = "; a quantized layer holds no parameters, build the groups before the model is quantized" if quantized else ""
        raise ValueError(f"model must hold a {names} to penalise, got none in {type(model).__name__}{hint}")
    return chosen


def _matching(found: dict[str, Any], selection: Selection, argument: str, everything: dict[str, nn.Module]) -> set[str]:
    """Names in ``found`` that a selection matches; raises, with suggestions, for a part of it that matches none."""
    items = [selection] if isinstance(selection, (str, type)) else list(selection or [])
    chosen: set[str] = set()
    for item in items:
        matches = {n for n, m in found.items() if (fnmatch(n, item) if isinstance(item, str) else isinstance(m, item))}
        if not matches:
            close = get_close_matches(item, found, n=3, cutoff=0.4) if isinstance(item, str) else []
            hint = f"; did you mean {', '.join(map(repr, close))}?" if close else f"; there are {', '.join(map(repr, found))}"
            if item in everything:
                kind = type(everything[item])
                hint = f", a {kind.__module__}.{kind.__qualname__}; there are {', '.join(map(repr, found))}"
            raise ValueError(f"{argument} must name layers of the model, got {item!r}{hint}")
        chosen |= matches
    return chosen


def _with_groups(penalty: Any, groups: Groups) -> ProxOperator:
    """The penalty with these groups, or unchanged if it has no groups."""
    check_operator(penalty)
    operator: ProxOperator = penalty
    if declared.partition(penalty) is None:
        return operator
    if not hasattr(penalty, "groups"):
        raise ValueError(f"penalty must have a field 'groups', they are chosen here, got {type(penalty).__name__}")
    if penalty.groups is not None:
        raise ValueError(f"penalty must come without groups, they are chosen here, got {penalty.groups}")
    operator = penalty.with_groups(groups)
    return operator


def _followers(model: nn.Module, layer: Any) -> list[tuple[nn.Module, str]]:
    """The bias of a layer and the weight and bias of a BatchNorm directly after it, as pairs of a module and a name."""
    members = [(layer, "bias")] if layer.bias is not None else []
    own, order = set(layer.modules()), list(model.modules())
    after = next((m for m in order[order.index(layer) :] if m not in own and _is_leaf(m)), None)
    if isinstance(after, LAZY_NORMS) and after.affine:
        members += [(after, "weight")]  # has no shape yet, which `_parameter` raises for
    elif isinstance(after, NORMS) and after.affine:
        width = layer.weight.shape[1 if isinstance(layer, TRANSPOSED) else 0]
        members += [(after, "weight"), (after, "bias")] if after.num_features == width else []
    return members


def _is_leaf(module: nn.Module) -> bool:
    """Whether a module has no submodules, other than those that compute its weights."""
    return all(name == "parametrizations" for name, _ in module.named_children())


def _parameter(model: nn.Module, module: nn.Module, key: str) -> str:
    """The full name of a parameter of one module of the model; raises where it is no parameter, or has no shape yet."""
    place = next(name for name, m in model.named_modules() if m is module)
    name, p = f"{place}.{key}".lstrip("."), module._parameters.get(key)
    if isinstance(p, nn.UninitializedParameter):
        raise ValueError(f"{name} must have a shape, but is of a lazy layer: run one forward pass of the model first")
    if p is not None:
        return _name(model, p)
    if key in _computed(module):
        reason, remedy = _computed(module)[key]
        raise ValueError(f"{name} must be a parameter, but is {reason}: leave this layer out, or call {remedy} first")
    kind = "a buffer" if key in module._buffers else "a plain tensor" if getattr(module, key, None) is not None else "missing"
    raise ValueError(f"{name} must be a parameter, but is {kind}: leave this layer out, or assign an nn.Parameter")


def _computed(module: nn.Module) -> dict[str, tuple[str, str]]:
    """The tensors that a module computes in its forward pass: the reason, and the function that makes them parameters again."""
    out = {}
    if parametrize.is_parametrized(module):
        remedy = "torch.nn.utils.parametrize.remove_parametrizations"
        for key, chain in dict(module.parametrizations).items():  # type: ignore[arg-type]
            out[key] = (f"computed by a parametrization ({', '.join(type(f).__name__ for f in chain)})", remedy)
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm):
            out[hook.name] = ("computed by weight_norm", "torch.nn.utils.remove_weight_norm")
        elif isinstance(hook, SpectralNorm):
            out[hook.name] = ("computed by spectral_norm", "torch.nn.utils.remove_spectral_norm")
        elif isinstance(hook, BasePruningMethod):
            out[hook._tensor_name] = (PRUNED, "torch.nn.utils.prune.remove")
    return out


def _name(model: nn.Module, p: Tensor) -> str:
    return next(name for name, q in model.named_parameters(remove_duplicate=False) if q is p)


def _collect(model: nn.Module, claimed: list[Claim]) -> list[ParamGroup]:
    """Param groups with named parameters: one for each penalty or joint problem, and the last for all other parameters."""
    params = dict(model.named_parameters(remove_duplicate=False))
    owners: dict[int, str] = {}  # by the identity of a parameter, which may have several names, the first name of its group
    out: list[ParamGroup] = []
    for names, penalty, joint in claimed:
        if not joint and all(id(params[n]) in owners for n in names):
            continue  # a tied weight, which is penalised where it came first
        _check_claim(params, owners, names, joint)
        owners |= {id(params[n]): names[0] for n in names}
        same = next((g for g in out if not joint and not g["joint"] and g["penalty"] == penalty), None)
        if same is None:
            same = {"params": [], "penalty": penalty, "joint": joint}
            out.append(same)
        same["params"] += [(n, params[n]) for n in names]
    rest = [(name, p) for name, p in model.named_parameters() if id(p) not in owners]
    return out + ([{"params": rest}] if rest else [])


def _check_claim(params: dict[str, nn.Parameter], owners: dict[int, str], names: list[str], joint: bool) -> None:
    """Raise for a parameter that is in another group already, or a joint group of which a part is frozen."""
    clash = next((n for n in names if id(params[n]) in owners), None)
    if clash is not None:
        owner = owners[id(params[clash])]
        raise ValueError(f"{clash} must be in one group, but is in that of {owner} already: leave one of the layers out")
    frozen = [n for n in names if not params[n].requires_grad]
    if joint and 0 < len(frozen) < len(names):
        raise ValueError(
            f"{frozen[0]} must require grad like the rest of its group ({', '.join(names)}), which is updated as a whole or not "
            "at all: freeze all of it or none, or leave this layer out"
        )
