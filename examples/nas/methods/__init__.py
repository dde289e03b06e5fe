"""Search methods: what the architecture variables are, what one step does to them, which genotype they stand at.

The loop (`nas.search`) gives a method the gradients of its parameters and asks for weights, masks and the genotype. `gsparsity`
has no architecture variables and one level only: its loop is `nas.group_sparse`.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from ..genotype import AnyGenotype
from ..settings import TwoLevelSettings
from ..spaces import Masks, Weights


class Method(Protocol):
    """One search method in one space, of whatever supernet."""

    parameters: list[nn.Parameter]
    rests: bool  # whether the architecture moves no more: its steps are left out

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


def registry(layout: str = "convolutional") -> dict[str, tuple[type, dict[str, Any]]]:
    """name: (method, its presets by name), for spaces of a layout. A preset is an instance of the settings."""
    from . import darts, ista, sparse_supernet

    presets = "PRESETS" if layout == "convolutional" else "TEXT_PRESETS"
    return {m.__name__.rpartition(".")[2]: (m.Search, getattr(m, presets)) for m in (darts, ista, sparse_supernet)}


def build(name: str, net: Any, settings: TwoLevelSettings) -> Method:
    """The method of this name for a supernet, on its device."""
    return registry(net.space.layout.name)[name][0](net.space, settings, next(net.parameters()).device)
