"""Settings of DARTS: architecture logits trained by Adam."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...bilevel.settings import CifarSearchSettings, TextSearchSettings, small_cifar, small_nasbench201, small_text
from ...engine.settings import CheckedSettings, check


@dataclass(frozen=True)
class LogitSettings(CheckedSettings):
    """Settings of the architecture logits."""

    arch_lr: float = 3e-4
    """Learning rate of Adam for the architecture logits."""
    arch_decay: float = 1e-3
    """Weight decay of the architecture logits: this multiple of each is added to its gradient."""
    arch_beta1: float = 0.5
    """Adam's beta1 for the architecture logits, the decay of its mean gradient, in [0, 1)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, amounts=("arch_lr", "arch_decay"), shares=("arch_beta1",))


@dataclass(frozen=True)
class DartsSettings(LogitSettings, CifarSearchSettings):
    space: str = "darts_zero"
    early_stop: bool = False
    """Stop when the largest eigenvalue of the Hessian of the validation loss in the logits grows fast, and return the genotype
    before it did (DARTS-ES, Zela et al., 2020)."""
    eigenvalue_every: int = 2
    """With --early-stop: compute the eigenvalue after the first epoch and every n-th from there."""
    stop_window: int = 5
    """With --early-stop: number of eigenvalues that are averaged."""
    stop_delay: int = 4
    """With --early-stop: an average is compared with the one so many eigenvalues earlier."""
    stop_factor: float = 1.3
    """With --early-stop: stop if the later average is larger than the earlier one by this factor."""
    stop_after: int = 11
    """With --early-stop: first epoch to which the search may return."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, counts=("eigenvalue_every", "stop_window", "stop_delay", "stop_after"), amounts=("stop_factor",))
        if self.early_stop and self.pick_below:
            raise ValueError(f"pick_below must be 0 with early_stop, which chooses the epoch itself, got {self.pick_below}")
        if self.early_stop and self.levels == 1:
            raise ValueError("levels must be 2 with early_stop, which needs the loss on data that train no weights, got 1")


@dataclass(frozen=True)
class PartialSettings(LogitSettings, CifarSearchSettings):
    """Settings of PC-DARTS."""

    space: str = "darts_zero"
    batch: int = 256
    lr: float = 0.1
    lr_min: float = 0.0
    arch_lr: float = 6e-4
    order: Literal["first", "second"] = "first"
    frozen_epochs: int = 15
    """Number of first epochs in which only the network weights are trained."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, amounts=("frozen_epochs",))
        if self.channels % 4:
            raise ValueError(f"channels must be a multiple of 4, of which operations see one quarter, got {self.channels}")


@dataclass(frozen=True)
class DartsTextSettings(LogitSettings, TextSearchSettings):
    space: str = "recurrent_zero"
    arch_lr: float = 3e-3
    arch_beta1: float = 0.9


CIFAR_PRESETS = {
    "paper": DartsSettings(),
    "first_order": DartsSettings(order="first"),
    "small": small_cifar(DartsSettings, arch_lr=3e-3),
    "subspace": DartsSettings(space="S1"),  # Zela et al.: S1, S2, S3, S4, also with drop_path and cutout
    "subspace_early_stop": DartsSettings(space="S1", early_stop=True),
    "nasbench201": DartsSettings(space="nasbench201", layers=17),
    "nasbench201_small": small_nasbench201(DartsSettings, space="nasbench201", arch_lr=3e-3),
}
PARTIAL_PRESETS = {
    "paper": PartialSettings(),
    "small": small_cifar(PartialSettings, arch_lr=3e-3, lr=0.025, frozen_epochs=3),
    "nasbench201": PartialSettings(space="nasbench201", layers=17),
    "nasbench201_small": small_nasbench201(PartialSettings, space="nasbench201", arch_lr=3e-3, lr=0.025, frozen_epochs=6),
}
TEXT_PRESETS = {"paper": DartsTextSettings(), "small": small_text(DartsTextSettings, arch_lr=1e-2)}
