"""A schedule of penalty strengths, used like a learning-rate scheduler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from torch import Tensor

from proxopt._checks import in_range
from proxopt_torch import param_groups
from proxopt_torch.penalised import Penalised, as_penalised

Path: TypeAlias = Callable[[int], float]


class StrengthPath:
    """Set the strength of an optimizer's penalties to ``path(epoch)``, as an LRScheduler sets the learning rate.

    The values are strengths, not factors. ``path(0)`` is applied at construction; call ``step()`` once after each epoch, or after
    each update for a path over updates. Groups without penalty keep their strength.

    Args:
      optimizer: an optimizer of proxopt_torch.
      path: a function of the epoch (see ``proxopt.schedules``), or one for each param group, where None leaves a group as it is.

    Raises:
      TypeError: ``optimizer`` is none of proxopt_torch, or a wrapper around one.
      ValueError: no group has a penalty with a strength, the number of paths is not that of the groups, or a path returns a
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

    def __init__(self, optimizer: Penalised, path: Path | Sequence[Path | None]) -> None:
        self.optimizer = as_penalised("optimizer", optimizer)
        self.path = path
        self.epoch = 0
        self._apply()

    def step(self, epoch: int | None = None) -> None:
        """Go to the next epoch, or to the given one; an error leaves everything as it was."""
        before, self.epoch = self.epoch, self.epoch + 1 if epoch is None else epoch
        try:
            self._apply()
        except Exception:
            self.epoch = before
            raise

    def get_last_strength(self) -> list[float | Tensor | None]:
        """The strength of each param group; None for an operator that has no strength to set."""
        return [group["strength"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """The epoch. The path is code and is not saved."""
        return {"epoch": self.epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to the saved epoch, and set its strengths."""
        self.step(state_dict["epoch"])

    def _apply(self) -> None:
        groups = self.optimizer.param_groups
        paths = list(self.path) if isinstance(self.path, Sequence) else [self.path] * len(groups)
        if len(paths) != len(groups):
            raise ValueError(f"path must be one function or one per param group, {len(groups)}, got {len(paths)}")
        wanted = []
        for group, path in zip(groups, paths):
            self.optimizer.penalty_of(group)  # turns a penalty object that was assigned since into plain data
            if path is not None and param_groups.has_strength(group):
                strength = path(self.epoch)
                in_range(f"path({self.epoch})", strength)
                wanted.append((group, strength))
        if not wanted:
            raise ValueError("optimizer must have a param group whose penalty has a strength to set, got none")
        for group, strength in wanted:
            group["strength"] = strength
