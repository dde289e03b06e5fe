"""Settings of ISTA-NAS: compressed variables and the recovery of their codes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ...bilevel.settings import CifarSearchSettings, TextSearchSettings, small_cifar, small_nasbench201, small_text
from ...engine.settings import CheckedSettings, check


@dataclass(frozen=True)
class CodeSettings(CheckedSettings):
    """Settings of the compressed variables and their recovery."""

    arch_lr: float = 6e-4
    """Learning rate of Adam for the compressed variables."""
    arch_decay: float = 1e-3
    """Weight decay of the compressed variables: this multiple of each is added to its gradient."""
    rows: int = 7
    """Size of the compressed variable of a node: the number of rows of its measurement matrix."""
    sparsity: int = 2
    """Number of paths into each node; in nasbench201, where an edge has one operation, on each edge."""
    matrix: Literal["uniform", "gaussian"] = "uniform"
    """Distribution of the measurement matrices. uniform: entries in [0, 1), as published. gaussian: normalised Gaussian columns,
    which recover more sparse codes."""
    strength: float = 1e-5
    """Strength (lambda) of the L1 penalty in the recovery of the codes, > 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, counts=("rows", "sparsity"), amounts=("arch_lr", "arch_decay"))
        if not 0 < self.strength < float("inf"):
            raise ValueError(f"strength must be finite and > 0, got {self.strength}")


@dataclass(frozen=True)
class TwoStageSettings(CodeSettings):
    recover_every: int = 0
    """Number of architecture steps between recoveries of the codes; 0: one recovery at the start of each epoch."""
    clip_together: bool = True
    """Clip the gradient of the network weights by its norm together with that of the compressed variables, as in the published
    code; --no-clip-together: by its own norm."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, amounts=("recover_every",))


@dataclass(frozen=True)
class IstaSettings(TwoStageSettings, CifarSearchSettings):
    batch: int = 256
    lr: float = 0.1
    order: Literal["first", "second"] = "first"


@dataclass(frozen=True)
class IstaTextSettings(TwoStageSettings, TextSearchSettings):
    order: Literal["first", "second"] = "first"
    sparsity: int = 1
    clip_together: bool = False


# batch64 and batch512 are the other rows of Table 1: the learning rate grows with the batch size.
# A step costs a tenth of that of a dense supernet: the small preset has four times the images and twice the epochs.
CIFAR_PRESETS = {
    "paper": IstaSettings(),
    "batch64": IstaSettings(batch=64, lr=0.025),
    "batch512": IstaSettings(batch=512, lr=0.2),
    "small": replace(small_cifar(IstaSettings, lr=0.025, arch_lr=3e-3), images=16_384, epochs=20),
    "nasbench201": IstaSettings(space="nasbench201_nonzero", layers=17, sparsity=1),
    "nasbench201_small": small_nasbench201(IstaSettings, sparsity=1, lr=0.05, arch_lr=3e-3),
}
TEXT_PRESETS = {"paper": IstaTextSettings(), "small": small_text(IstaTextSettings, arch_lr=3e-3)}
