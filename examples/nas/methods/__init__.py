"""Search methods: what the architecture variables are, what one step does to them, which genotype they stand at.

The loop (`nas.search`) gives a method the gradients of its parameters and asks for weights, masks and the genotype. `gsparsity`
has no architecture variables and one level only: its loop is `nas.group_sparse`.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from ..cnn import Supernet, Weights
from ..genotype import Genotype
from ..settings import SearchSettings
from ..spaces import Masks


class Method(Protocol):
    """One search method on one supernet."""

    parameters: list[nn.Parameter]

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

    def genotype(self) -> Genotype:
        """The architecture at `point()`."""

    def log(self) -> dict[str, float]:
        """Columns of its own in the table of epochs."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def registry() -> dict[str, tuple[type, type[SearchSettings], dict[str, SearchSettings]]]:
    """name: (method, its settings, presets by name)."""
    from . import darts, ista, sparse_supernet

    return {m.__name__.rpartition(".")[2]: (m.Search, m.Settings, m.PRESETS) for m in (darts, ista, sparse_supernet)}


def build(name: str, net: Supernet, settings: Any) -> Method:
    return registry()[name][0](net, settings)
