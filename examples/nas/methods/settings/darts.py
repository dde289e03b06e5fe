"""Settings of DARTS: architecture logits trained by Adam."""

from __future__ import annotations

from dataclasses import dataclass

from ...bilevel.settings import CifarSearchSettings, TextSearchSettings, small_cifar, small_text
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


@dataclass(frozen=True)
class DartsTextSettings(LogitSettings, TextSearchSettings):
    space: str = "recurrent_zero"
    arch_lr: float = 3e-3
    arch_beta1: float = 0.9


CIFAR_PRESETS = {"paper": DartsSettings(), "small": small_cifar(DartsSettings, arch_lr=3e-3)}
TEXT_PRESETS = {"paper": DartsTextSettings(), "small": small_text(DartsTextSettings, arch_lr=1e-2)}
