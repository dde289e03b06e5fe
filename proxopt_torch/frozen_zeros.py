"""Zeros that stay zero: the state behind ``freeze_zeros``.

The mask of a parameter is kept in its optimizer state under the key ``"zeros"``, so that checkpoints hold it. It is recorded at
the first step that follows, and not before there is a state: optimizers of torch take one that holds anything for a complete one.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from proxopt_torch.options import EVAL
from proxopt_torch.param_groups import Entry, ParamGroup, State

FROZEN = "zeros_frozen"  # key of a param group
ZEROS = "zeros"  # key of a state


@torch.no_grad()
def begin(groups: Sequence[ParamGroup], states: MutableMapping[Tensor, State]) -> None:
    """Freeze the zeros of the prox points of all groups with a penalty, and make the same entries of the search points zero."""
    for group in groups:
        if group["penalty"] is None:
            continue
        group[FROZEN] = True
        for p in group["params"]:
            state = states.get(p) or {}
            other = state.get("search_point" if group["mode"] == EVAL else "point")
            state.pop(ZEROS, None)
            if other is not None:
                point, search = (p, other) if group["mode"] == EVAL else (other, p)
                _clear(search, point == 0)


def end(groups: Sequence[ParamGroup], states: MutableMapping[Tensor, State]) -> None:
    """Apply the penalties again, and forget which entries were zero."""
    for group in groups:
        if group.get(FROZEN):
            group[FROZEN] = False
            for p in group["params"]:
                (states.get(p) or {}).pop(ZEROS, None)


@torch.no_grad()
def recorded(group: ParamGroup, present: Sequence[Entry], states: MutableMapping[Tensor, State]) -> list[tuple[Tensor, Tensor]]:
    """Each parameter of these entries with the mask of its frozen zeros; nothing where the zeros of the group are not frozen."""
    if not group.get(FROZEN):
        return []
    found = []
    for p in [p for entry in present for p in entry]:
        state = states.get(p) or {}
        mask = state.get(ZEROS)
        found.append((p, state.get("point", p.detach()) == 0 if mask is None else mask))
    return found


def apply(masks: Sequence[tuple[Tensor, Tensor]], states: MutableMapping[Tensor, State]) -> None:
    """Make the frozen zeros zero again, in the parameters and in their prox points."""
    for p, mask in masks:
        state: Any = states.get(p) or {}
        _clear(p, mask)
        if state:
            state[ZEROS] = mask
        if "point" in state:
            _clear(state["point"], mask)


def _clear(x: Tensor, mask: Tensor) -> None:
    x.masked_fill_(mask, 0)
