"""Param groups from a model: which of its parts become zero together.

Every function returns a list of param groups for an optimizer of proxopt_torch: the penalised ones first, then one
without penalty that holds all other parameters. Each parameter of the model is in exactly one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from difflib import get_close_matches
from fnmatch import fnmatch
from typing import Any

import numpy as np
from torch import Tensor, nn

from proxopt import L1, ElasticNet, GroupL2, Groups, SparseGroupLasso

Selection = str | type[nn.Module] | Iterable[str | type[nn.Module]] | None

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def output_channels(
    model: nn.Module, penalty: Any, include: Selection = None, exclude: Selection = None, *, joint: bool = False
) -> list[dict]:
    """A group is what makes one output neuron (Linear) or output channel (convolution).

    Args:
      model: its Linear and convolution layers are penalised; grouped convolutions too, channel by channel.
      penalty: a penalty without groups of its own, e.g. `SparseGroupLasso(2e-4)`; they are filled in for each weight.
      include, exclude: layers by name (patterns such as "encoder.*") or type; None includes all and excludes none.
      joint: the group also holds the layer's bias and the affine entries of a BatchNorm right behind it, so that a dead
        channel is exactly 0 and `compact` can remove it.

    Raises:
      ValueError: a name or type that matches no such layer; a penalty that has groups already.

    >>> import torch
    >>> from proxopt import GroupL2
    >>> from proxopt_torch import ProxAdam, groups
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> optimizer = ProxAdam(groups.output_channels(net, GroupL2(1e-3), exclude="2"))
    >>> [group.get("param_names") for group in optimizer.param_groups]
    [['0.weight'], ['0.bias', '2.weight', '2.bias']]
    """
    layers = _select(model, (nn.Linear, *CONVS, *TRANSPOSED), include, exclude)
    claimed = []
    for name, layer in layers.items():
        weight = layer.weight
        axis = 1 if isinstance(layer, TRANSPOSED) else 0
        if axis == 1 and layer.groups != 1:
            raise ValueError(f"{name} must be excluded: output channels of a grouped transposed convolution are not slices")
        if joint:
            members = _with_followers(model, name, layer)
            labels = Groups.labels([range(weight.shape[axis])] * len(members), axis=(axis, *[0] * (len(members) - 1)))
            claimed.append(([_name(model, p) for p in members], _with_groups(penalty, labels), True))
        else:
            along = tuple(a for a in range(weight.ndim) if a != axis)
            claimed.append(([_name(model, weight)], _with_groups(penalty, Groups.along(along)), False))
    return _collect(model, claimed)


def input_features(model: nn.Module, penalty: Any, include: Selection = None, exclude: Selection = None) -> list[dict]:
    """A group is all that one input feature (Linear) or input channel (convolution) feeds.

    Convolutions with `groups > 1` have no such slices; they stay unpenalised unless included by name, which is an error.
    Arguments and errors are those of `output_channels`.

    >>> import torch
    >>> from proxopt import SparseGroupLasso
    >>> from proxopt_torch import AdamHAPG, groups
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> optimizer = AdamHAPG(groups.input_features(net, SparseGroupLasso(1e-3)), lr=3e-4)
    >>> optimizer.param_groups[0]["penalty"]["groups"]
    {'kind': 'along', 'axis': [0]}
    """
    layers = _select(model, (nn.Linear, *CONVS, *TRANSPOSED), include, exclude)
    claimed = []
    for name, layer in layers.items():
        if getattr(layer, "groups", 1) != 1:
            if include is not None:
                raise ValueError(f"{name} must not be included: input channels of a convolution with groups > 1 are not slices")
            continue
        axis = 0 if isinstance(layer, TRANSPOSED) else 1
        along = tuple(a for a in range(layer.weight.ndim) if a != axis)
        claimed.append(([_name(model, layer.weight)], _with_groups(penalty, Groups.along(along)), False))
    return _collect(model, claimed)


def attention_heads(model: nn.Module, penalty: Any, include: Selection = None, exclude: Selection = None) -> list[dict]:
    """A group is one head of an `nn.MultiheadAttention`: its rows of the q, k and v projections with their biases, and its
    columns of the output projection. Arguments and errors are those of `output_channels`.

    >>> import torch
    >>> from proxopt import GroupL2
    >>> from proxopt_torch import ProxAdam, groups
    >>> layer = torch.nn.TransformerEncoderLayer(16, 4, 32)
    >>> optimizer = ProxAdam(groups.attention_heads(layer, GroupL2(1e-3)))
    >>> optimizer.param_groups[0]["param_names"]
    ['self_attn.in_proj_weight', 'self_attn.in_proj_bias', 'self_attn.out_proj.weight']
    """
    claimed = []
    for layer in _select(model, (nn.MultiheadAttention,), include, exclude).values():
        heads = np.repeat(np.arange(layer.num_heads), layer.head_dim)
        if layer.in_proj_weight is not None:
            members = [(layer.in_proj_weight, np.tile(heads, 3))]
        else:
            members = [(w, heads) for w in (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)]
        if layer.in_proj_bias is not None:
            members.append((layer.in_proj_bias, np.tile(heads, 3)))
        axes = (*[0] * len(members), 1)
        members.append((layer.out_proj.weight, heads))
        labels = Groups.labels([list(h) for _, h in members], axis=axes)
        claimed.append(([_name(model, p) for p, _ in members], _with_groups(penalty, labels), True))
    return _collect(model, claimed)


def modules(model: nn.Module, penalty: Any, include: Selection) -> list[dict]:
    """A group is all parameters of one whole module, e.g. an operation: it lives or dies as one.

    Args:
      model: holds the modules.
      penalty: a penalty without groups of its own.
      include: the modules by name, pattern or type. One inside another is an error.

    >>> import torch
    >>> from proxopt import GroupL2
    >>> from proxopt_torch import ProxSGD, groups
    >>> net = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)})
    >>> optimizer = ProxSGD(groups.modules(net, GroupL2(1e-3), ["a", "b"]), lr=0.1)
    >>> [group["param_names"] for group in optimizer.param_groups]
    [['a.weight', 'a.bias'], ['b.weight', 'b.bias']]
    """
    chosen = _select(model, (nn.Module,), include, None)
    claimed = []
    for module in chosen.values():
        members = list(dict.fromkeys(_name(model, p) for p in module.parameters()))
        if members:
            claimed.append((members, _with_groups(penalty, Groups.whole()), True))
    return _collect(model, claimed)


def _select(model: nn.Module, kinds: tuple, include: Selection, exclude: Selection) -> dict[str, Any]:
    """Modules of the given kinds by name, in order, that are included and not excluded."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, kinds) and (name or kinds != (nn.Module,))}
    wanted = _matching(found, include, "include") if include is not None else set(found)
    unwanted = _matching(found, exclude, "exclude") if exclude is not None else set()
    chosen = {name: m for name, m in found.items() if name in wanted - unwanted}
    if not chosen:
        names = " or ".join(k.__name__ for k in kinds)
        raise ValueError(f"model must hold a {names} to penalise, got none in {type(model).__name__}")
    return chosen


def _matching(found: dict[str, Any], selection: Selection, argument: str) -> set[str]:
    items = [selection] if isinstance(selection, (str, type)) else list(selection or [])
    chosen: set[str] = set()
    for item in items:
        matches = {n for n, m in found.items() if (fnmatch(n, item) if isinstance(item, str) else isinstance(m, item))}
        if not matches:
            close = get_close_matches(item, found, n=3, cutoff=0.4) if isinstance(item, str) else []
            hint = f"; did you mean {', '.join(map(repr, close))}?" if close else f"; there are {', '.join(map(repr, found))}"
            raise ValueError(f"{argument} must name layers of the model, got {item!r}{hint}")
        chosen |= matches
    return chosen


def _with_groups(penalty: Any, groups: Groups) -> Any:
    if isinstance(penalty, (L1, ElasticNet)):
        return penalty
    if not isinstance(penalty, (GroupL2, SparseGroupLasso)):
        raise TypeError(f"penalty must be L1, ElasticNet, GroupL2 or SparseGroupLasso, got {type(penalty).__name__}")
    if penalty.groups is not None:
        raise ValueError(f"penalty must come without groups, they are chosen here, got {penalty.groups}")
    return replace(penalty, groups=groups)


def _with_followers(model: nn.Module, name: str, layer: Any) -> list[Tensor]:
    """Weight and bias of a layer, and the affine entries of the BatchNorm that comes next, if one does."""
    members = [layer.weight] + ([layer.bias] if layer.bias is not None else [])
    leaves = [m for m in model.modules() if not list(m.children())]
    place = next(i for i, m in enumerate(leaves) if m is layer)
    after = leaves[place + 1] if place + 1 < len(leaves) else None
    width = layer.weight.shape[1 if isinstance(layer, TRANSPOSED) else 0]
    if isinstance(after, NORMS) and after.affine and after.num_features == width:
        members += [after.weight, after.bias]
    return members


def _name(model: nn.Module, p: Tensor) -> str:
    return next(name for name, q in model.named_parameters(remove_duplicate=False) if q is p)


def _collect(model: nn.Module, claimed: list[tuple[list[str], Any, bool]]) -> list[dict]:
    """Param groups with named parameters: equal penalties share one, all that is unclaimed comes last."""
    params = dict(model.named_parameters(remove_duplicate=False))
    seen: dict[int, str] = {}
    out: list[dict] = []
    for names, penalty, joint in claimed:
        fresh = [n for n in names if id(params[n]) not in seen]
        if not fresh and not joint:
            continue  # a tied weight, penalised where it came first
        if len(fresh) < len(names):
            clash = next(n for n in names if n not in fresh)
            raise ValueError(f"{clash} must be in one group, but is in that of {seen[id(params[clash])]} already")
        for n in names:
            seen[id(params[n])] = n
        home = next((g for g in out if not joint and not g["joint"] and g["penalty"] == penalty), None)
        if home is None:
            out.append({"params": [], "penalty": penalty, "joint": joint})
            home = out[-1]
        home["params"] += [(n, params[n]) for n in names]
    rest = list(_unclaimed(model, seen))
    return out + ([{"params": rest}] if rest else [])


def _unclaimed(model: nn.Module, seen: dict[int, str]) -> Iterator[tuple[str, Tensor]]:
    return ((name, p) for name, p in model.named_parameters() if id(p) not in seen)
