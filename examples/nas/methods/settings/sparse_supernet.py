"""Settings of SparseNAS: architecture weights under a sparse group lasso."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from ...bilevel.settings import CifarSearchSettings, TextSearchSettings, small_cifar, small_text
from ...engine.settings import CheckedSettings, check


@dataclass(frozen=True)
class PenaltySettings(CheckedSettings):
    """Settings of the architecture weights and their penalty."""

    optimizer: Literal["adamhapg", "hapg", "adam"] = "adamhapg"
    """Optimizer of the architecture weights. adam: the subgradient of the penalty is added to the gradient, there is no prox, and
    a threshold removes paths at the end."""
    arch_lr: float | None = None
    """Learning rate of the architecture weights. Default 3e-4, constant, and for hapg 0.025, cosine to 0."""
    l1_ratio: float = 0.5
    """Share of the L1 part: 1 is the lasso, 0 the group lasso."""
    strength_step: float = 0.01
    """Increase of the strength in each epoch."""
    metric: Literal["median", "support", "exact"] = "median"
    """Metric of the group prox with Adam's step sizes, for adamhapg only; the median is the published rule."""
    init: float = 1 / 7
    """Initial architecture weights, to which noise of size 1e-3 is added."""
    target_paths: int = 0
    """Freeze the architecture at its prox point as soon as all cells together have at most so many paths, and train only the
    network weights from then on; 0: never."""
    probe_every: int = 1
    """Compute the gradient of zero weights, without which they stay zero, in every n-th architecture step only: an
    approximation that makes the other steps cheaper."""
    cut: float = 0.0
    """Remove paths from the genotype whose weight is at most this share of the largest one of their cell; 0: exact zeros only."""
    threshold: float | None = None
    """Remove paths from the genotype whose weight is at most this. Default 1e-3 for adam, whose weights are never 0, else 0.
    The paper names 1e-3 for the digits and no threshold for searches."""
    guard: bool = True
    """Restore the strongest route through a cell that an update would leave without any, which is not in the paper; --no-guard
    ends the search with an error instead."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("l1_ratio", "cut"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        check(self, counts=("probe_every",), amounts=("strength_step", "target_paths"))
        if self.threshold is not None:
            check(self, amounts=("threshold",))
        if self.optimizer != "adamhapg" and self.metric != "median":
            raise ValueError(f"metric belongs to adamhapg, got metric={self.metric!r} with optimizer={self.optimizer!r}")

    @property
    def hard_threshold(self) -> float:
        """The threshold of this optimizer."""
        usual = 1e-3 if self.optimizer == "adam" else 0.0
        return usual if self.threshold is None else self.threshold

    def schedules(self) -> list[str]:
        return [*super().schedules(), *(["arch_lr of hapg"] if self.optimizer == "hapg" else [])]


@dataclass(frozen=True)
class SparseSupernetSettings(PenaltySettings, CifarSearchSettings):
    usual_lr: ClassVar[Mapping[str, float]] = {"adamhapg": 3e-4, "adam": 3e-4, "hapg": 0.025}


@dataclass(frozen=True)
class SparseSupernetTextSettings(PenaltySettings, TextSearchSettings):
    arch_lr: float | None = None
    """Learning rate of the architecture weights. Default 1e-4, constant, and for hapg, which diverges on text, 0.025, cosine to
    0."""
    init: float = 1 / 4
    usual_lr: ClassVar[Mapping[str, float]] = {"adamhapg": 1e-4, "adam": 1e-4, "hapg": 0.025}


CIFAR_PRESETS = {
    "paper": SparseSupernetSettings(),
    "small": small_cifar(SparseSupernetSettings, arch_lr=1e-3, strength_step=0.04),
}
TEXT_PRESETS = {
    "paper": SparseSupernetTextSettings(),
    "small": small_text(SparseSupernetTextSettings, strength_step=0.0025, target_paths=20),
}
