"""The options that all optimizers of this package share: their defaults and their checks."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from proxopt._checks import in_range
from proxopt_torch.param_groups import ParamGroup

TRAIN, EVAL = "train", "eval"
# what every param group has, also one behind `Proximal`
GROUP_DEFAULTS: ParamGroup = {
    "penalty": None,
    "strength": None,
    "joint": False,
    "mode": TRAIN,
    "check_finite": None,
    "projection": None,
    "zeros_frozen": False,  # by freeze_zeros()
}

FLAGS = ("joint", "maximize", "capturable", "differentiable")
FLAGS_OR_NONE = ("foreach", "check_finite")


def check_options(group: ParamGroup) -> None:
    """Check the shared options of a param group, or of the defaults of an optimizer.

    Raises:
      TypeError: a flag that is not a bool, or a learning rate or weight decay that is not a number.
      ValueError: a learning rate or weight decay that is negative or not finite, or a learning rate that torch does not
        take as a tensor: one with several entries, or together with ``foreach=True`` and ``capturable=False``.
    """
    check_flags(group, (*FLAGS, *FLAGS_OR_NONE))
    check_lr(group)
    if isinstance(group["lr"], Tensor):
        # the rules, and the messages, of torch.optim
        if group["lr"].numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if group["foreach"] and not group["capturable"]:
            raise ValueError("lr as a Tensor is not supported for capturable=False and foreach=True")
    in_range("weight_decay", group["weight_decay"])


def check_flags(group: ParamGroup, names: tuple[str, ...]) -> None:
    """Raise TypeError for a flag that is neither a bool nor, where that is a choice of its own, None."""
    for name in names:
        value: Any = group[name]
        may_be_none = name in FLAGS_OR_NONE
        if not (isinstance(value, (bool, np.bool_)) or (value is None and may_be_none)):
            raise TypeError(f"{name} must be True{', False or None' if may_be_none else ' or False'}, got {value!r}")


def check_lr(group: ParamGroup) -> None:
    """Raise where the learning rate is no number >= 0. A tensor is not read: that would wait for its device."""
    if not isinstance(group["lr"], Tensor):
        in_range("lr", group["lr"])
