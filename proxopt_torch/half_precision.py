"""A warning where the steps of Adam are too small to change parameters of half precision."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from proxopt_torch import sharding
from proxopt_torch.param_groups import ParamGroup

HALF = (torch.float16, torch.bfloat16)


def lost_steps(group: ParamGroup, name: Callable[[int], str]) -> str | None:
    """A warning that steps of the size ``lr`` are rounded away in most entries of a parameter of a new group; None if not.

    It reads the parameters, once for each of half precision: call it where a group is added, not in a step.

    Args:
      group: the param group, in which ``lr`` is the largest that it will have, as under most schedulers.
      name: of the parameter at this place of the group.
    """
    half = [(place, p) for place, p in enumerate(group["params"]) if p.dtype in HALF]
    lr = _number(group["lr"]) if half else None
    if not lr:
        return None
    for place, p in half:
        share = rounded_away(sharding.local(p), lr)
        if share > 0.5:
            return (
                f"{name(place)} is {str(p.dtype).removeprefix('torch.')}, and the learning rate {lr:g}, about the size of a step "
                f"of Adam, is less than half an ulp of {share:.0%} of its entries: they may never change. Keep the parameters in "
                "float32 and use torch.autocast"
            )
    return None


@torch.no_grad()
def rounded_away(x: Tensor, step: float) -> float:
    """The share of the nonzero entries of x of which ``step`` is less than half an ulp; 0 where x has no values."""
    if not _has_values(x) or x.numel() == 0:
        return 0.0
    limits = torch.finfo(x.dtype)
    # half an ulp of x is eps / 2 times the largest power of two <= |x|, which exceeds the step from some power of two on
    largest = step / (limits.eps / 2)
    if largest > limits.max:
        return 0.0
    bound = 2.0 ** (math.floor(math.log2(largest)) + 1)
    nonzero = torch.count_nonzero(x)
    return float(torch.count_nonzero(x.abs() >= bound) / nonzero.clamp(min=1))


def _has_values(x: Tensor) -> bool:
    """Whether x is an ordinary tensor with memory; one of a subclass may be traced or fake."""
    return type(x) in (Tensor, torch.nn.Parameter) and x.device.type != "meta"


def _number(lr: float | Tensor) -> float | None:
    if isinstance(lr, Tensor):
        return float(lr.detach()) if _has_values(lr) else None
    return float(lr)
