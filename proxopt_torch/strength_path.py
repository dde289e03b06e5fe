"""Strengths over time, in the manner of a learning-rate scheduler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from proxopt._checks import in_range
from proxopt_torch.base import check_optimizer


class StrengthPath:
    """Set the strength of an optimizer's penalties to path(epoch), an absolute value, like an LRScheduler sets lr.

    path(0) is applied at construction; call `step()` once an epoch after that. Groups without penalty are left alone.

    Args:
      optimizer: an optimizer of proxopt_torch.
      path: function of the epoch (see `proxopt.schedules`), or one per param group (None leaves a group alone).

    Raises:
      TypeError: optimizer is none of proxopt_torch, or a wrapper around one.
      ValueError: no group has a penalty with a strength, the number of paths is not that of the groups, or a path gives a
        negative or non-finite number.

    >>> import torch
    >>> from proxopt import L1
    >>> from proxopt_torch import HAPG, StrengthPath
    >>> optimizer = HAPG([torch.nn.Parameter(torch.ones(2))], penalty=L1(1.0))
    >>> path = StrengthPath(optimizer, lambda epoch: 0.01 * epoch)
    >>> path.step()
    >>> optimizer.param_groups[0]["strength"]
    0.01
    """

    def __init__(self, optimizer: Any, path: Callable[[int], float] | Sequence[Callable[[int], float] | None]) -> None:
        check_optimizer("optimizer", optimizer)
        self.optimizer = optimizer
        self.path = path
        self.epoch = 0
        self._apply()

    def step(self, epoch: int | None = None) -> None:
        """Go to the next epoch, or to the one given."""
        before, self.epoch = self.epoch, self.epoch + 1 if epoch is None else epoch
        try:
            self._apply()
        except Exception:
            self.epoch = before
            raise

    def get_last_strength(self) -> list:
        """The strength of each param group."""
        return [group["strength"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict:
        """The epoch; the path itself is code and is not saved."""
        return {"epoch": self.epoch}

    def load_state_dict(self, state_dict: dict) -> None:
        """Go to the saved epoch, strengths included."""
        self.step(state_dict["epoch"])

    def _apply(self) -> None:
        groups = self.optimizer.param_groups
        paths = list(self.path) if isinstance(self.path, Sequence) else [self.path] * len(groups)
        if len(paths) != len(groups):
            raise ValueError(f"path must be one function or one per param group, {len(groups)}, got {len(paths)}")
        wanted = []
        for group, path in zip(groups, paths):
            self.optimizer.penalty_of(group)  # converts a penalty that was assigned since
            if path is not None and isinstance(group["penalty"], dict):
                strength = path(self.epoch)
                in_range(f"path({self.epoch})", strength)
                wanted.append((group, strength))
        if not wanted:
            raise ValueError("optimizer must have a param group with a penalty of proxopt, got none")
        for group, strength in wanted:
            group["strength"] = strength
