"""What ``compact`` returns."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from proxopt_torch.compaction import optimizers
from proxopt_torch.compaction.slicing import Kept


@dataclass
class Compacted:
    """A network after ``compact``. ``print`` shows it as a table.

    model: the smaller network, in eval mode. inputs: indices of the input features that it reads, or None for all. removed: the
    number of channels, heads or units that were removed, by the name of the first layer that computed them. kept: why something
    that is zero or unused stays, by the same names; the name ``""`` is the whole model. parameters and multiply_adds: before and
    after; multiply-adds of one pass on the example, or None where they cannot be counted. sizes: integers of the code that were
    set, by the name of the module and the attribute.
    """

    model: nn.Module
    inputs: Tensor | None = None
    removed: dict[str, int] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    parameters: tuple[int, int] = (0, 0)
    multiply_adds: tuple[int, int] | None = None
    sizes: dict[str, int] = field(default_factory=dict)
    _slices: dict[str, Kept] = field(default_factory=dict, repr=False)
    _shifts: dict[str, Tensor] = field(default_factory=dict, repr=False)
    _kinds: dict[str, str] = field(default_factory=dict, repr=False)
    _original: Any = field(default=None, repr=False)  # a weak reference, so that the large model can be freed

    def optimizer(self, optimizer: Optimizer) -> Any:
        """A copy of an optimizer of the original model that updates ``model``, with its state sliced along.

        It has the class, the hyperparameters and the penalties of ``optimizer``, also one of ``torch.optim``. Labels and weights
        of penalty groups are those of what remains. A bias that a layer got for a constant is in a group without penalty. If the
        optimizer is in eval mode, so is the copy. Learning rate schedulers must be made anew.

        Raises:
          RuntimeError: the original model no longer exists, so that the parameters of the optimizer have no names.
          TypeError: ``optimizer`` is no optimizer.
          ValueError: the optimizer holds other parameters than those of the original model, or is ``LBFGS``.

        >>> import torch
        >>> from proxopt_torch import compact
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> optimizer = torch.optim.Adam(net.parameters())
        >>> net(torch.ones(4)).sum().backward(); optimizer.step()
        >>> with torch.no_grad():
        ...     _ = net[0].weight[2:].zero_(), net[0].bias[2:].zero_()
        >>> small = compact(net, torch.randn(3, 4))
        >>> again = small.optimizer(optimizer)
        >>> again.state[small.model[0].weight]["exp_avg"].shape
        torch.Size([2, 4])
        """
        original = self._original() if self._original is not None else None
        if original is None:
            raise RuntimeError("the original model must exist while an optimizer is made for the smaller one, but was deleted")
        return optimizers.sliced(optimizer, original, self.model, self._slices, self._shifts)

    def __str__(self) -> str:
        rows = [
            (name or "(model)", self._kinds.get(name, ""), str(self.removed.get(name, "")), self.kept.get(name, ""))
            for name in dict.fromkeys([*self.removed, *self.kept])
        ]
        lines = _table(("name", "kind", "removed", "kept because"), rows) if rows else ["nothing was removed"]
        lines.append(_change("parameters", self.parameters))
        if self.multiply_adds is not None:
            lines.append(_change("multiply-adds", self.multiply_adds))
        if self.inputs is not None:
            lines.append(f"inputs: {len(self.inputs)} features are read")
        return "\n".join(lines)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_original": None}


def reference(model: nn.Module) -> Any:
    return weakref.ref(model)


def _change(what: str, numbers: tuple[int, int]) -> str:
    before, after = numbers
    share = f" ({100 * (1 - after / before):.1f} % fewer)" if before else ""
    return f"{what}: {before:,} -> {after:,}{share}"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in (head, *rows)]
