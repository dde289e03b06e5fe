"""What a pruning script prunes: a network, its data, its loss, and how good it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from . import networks
from .settings import PruningSettings


@dataclass(frozen=True)
class Layer:
    """The units of a layer that can be removed. kind: what they are, in the plural. before, after: their number."""

    name: str
    kind: str
    before: int
    after: int


@dataclass(frozen=True)
class Quality:
    """A column that tells how good a network is. show: a value as text. unit, factor: of values in pictures."""

    column: str
    label: str
    show: Callable[[float], str]
    unit: str = ""
    factor: float = 1.0


class Task(ABC):
    """A network and its data. Subclasses define everything.

    command: the script. network: the name of a class in `networks`. qualities: the first one is drawn. facts: the types of
    what `about` returns and `saved` needs, by name.

    Args:
      saved: what `about` of the task of a saved network returned, for its evaluation on the data of `settings`; None for a
        training.
    """

    command: ClassVar[str]
    network: ClassVar[str]
    qualities: ClassVar[tuple[Quality, ...]]
    facts: ClassVar[dict[str, type]]

    def __init__(
        self, settings: PruningSettings, seed: int, device: torch.device, saved: Mapping[str, Any] | None = None
    ) -> None:
        self.seed, self.device = seed, device

    @abstractmethod
    def arguments(self) -> dict[str, Any]:
        """The arguments of the network, as plain data."""

    def build(self) -> nn.Module:
        """A new network on the device."""
        return getattr(networks, self.network)(**self.arguments()).to(self.device)

    @abstractmethod
    def about(self) -> dict[str, Any]:
        """What somebody needs to know of the data to use the network, as plain data."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What identifies the data in a checkpoint, besides the settings."""

    @abstractmethod
    def title(self) -> str:
        """The network, for the header of the training."""

    @abstractmethod
    def text(self) -> str:
        """The data, for the header of the training."""

    @abstractmethod
    def example(self, samples: int = 1) -> Tensor:
        """An input of the network with so many samples, for tracing, counting and timing."""

    @abstractmethod
    def steps(self) -> int:
        """The number of batches of an epoch."""

    @abstractmethod
    def batches(self, epoch: int, start: int) -> Iterator[Any]:
        """The batches of an epoch from number `start` on. They depend on the seed and these numbers only."""

    @abstractmethod
    def loss(self, net: nn.Module, batch: Any) -> tuple[Tensor, Tensor, int]:
        """The mean loss of a batch, the number of correct predictions, and the number of predictions."""

    @abstractmethod
    def training_columns(self, loss: float, accuracy: float) -> dict[str, float]:
        """The columns of an epoch for the mean loss and accuracy of its steps."""

    @abstractmethod
    def evaluate(self, net: nn.Module, whole: bool = True) -> dict[str, float]:
        """How good a network in evaluation mode is on the validation data. whole: on all of it, else on the part for each epoch.

        The result has `valid_loss` and the columns of `qualities`.
        """

    @abstractmethod
    def outputs(self, net: nn.Module) -> Iterator[Tensor]:
        """The outputs of a network in evaluation mode for the validation data, a batch at a time."""

    @abstractmethod
    def layers(self, before: nn.Module, after: nn.Module) -> Sequence[Layer]:
        """The layers with units that can be removed, of the dense network and of the compact one."""
