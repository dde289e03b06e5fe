"""What the bilevel search asks of a method: architecture variables, one step of them, and the genotype they stand at."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from ..space.genotype import AnyGenotype
from ..space.spaces import Masks, Space, Weights


class Method(Protocol):
    """One search method in one space, of whatever supernet."""

    name: ClassVar[str]
    parameters: list[nn.Parameter]
    rests: bool  # whether the architecture moves no more: its steps are left out

    def __init__(self, space: Space, settings: Any, device: torch.device) -> None: ...

    def begin_epoch(self, epoch: int) -> None:
        """Set what changes from epoch to epoch: strengths, learning rates."""

    def weights(self) -> Weights:
        """What the paths are multiplied by while searching, as a function of the parameters."""

    def alive(self) -> Masks | None:
        """The paths whose weight is not exactly zero; None where all are: the others need not run."""

    def probes(self, step: int) -> bool:
        """Whether the architecture gradient of this step is wanted for dead paths too."""

    def update(self, grads: list[Tensor]) -> None:
        """One step of the parameters."""

    def point(self) -> dict[str, Tensor]:
        """The weights to evaluate and draw: exactly sparse where the method is."""

    def genotype(self) -> AnyGenotype:
        """The architecture at `point()`."""

    def log(self) -> dict[str, float]:
        """Columns of its own in the table of epochs."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
