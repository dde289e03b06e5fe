"""The interface of a method of bilevel search: architecture variables, their updates, and the genotype they represent."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from ..space.genotype import AnyGenotype
from ..space.spaces import Masks, Space, Weights


class Method(Protocol):
    """A search method in one search space, for any supernet.

    name: of the method, on the command line and in checkpoints. parameters: the architecture variables.

    A method may also have `supernets`, classes of supernets of its own for images, by the kind of genotype, and
    `clips_together`: whether the gradients of its parameters count in the norm that clips those of the network weights.

    A method that reads values of its last update from the device may define `begin_step()`, which is called before each step and
    before an evaluation: what the update has sent to the host has then arrived, or arrives while the device is busy.
    """

    name: ClassVar[str]
    parameters: list[nn.Parameter]
    frozen: bool  # whether the architecture is final: its steps are skipped

    def __init__(self, space: Space, settings: Any, device: torch.device) -> None: ...

    def begin_epoch(self, epoch: int) -> None:
        """Update what depends on the epoch, such as strengths and learning rates."""

    def weights(self) -> Weights:
        """The factors of the paths in the supernet, as a differentiable function of the parameters."""

    def active_paths(self) -> Masks | None:
        """Flags of the paths with nonzero weight, the only ones to compute; None if all weights are nonzero."""

    def needs_zeroed_paths(self, step: int) -> bool:
        """Whether this architecture step needs the gradient of zero weights too, by which they can become nonzero."""

    def update(self, grads: list[Tensor]) -> None:
        """Update the parameters by their gradients."""

    def point(self) -> dict[str, Tensor]:
        """The weights for evaluation and pictures: exactly sparse if the method is."""

    def genotype(self) -> AnyGenotype:
        """The genotype of the weights `point()`."""

    def log(self) -> dict[str, float]:
        """Additional columns for the table of epochs."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
