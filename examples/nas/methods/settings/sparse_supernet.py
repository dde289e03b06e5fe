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

    optimizer: Literal["adamhapg", "hapg"] = "adamhapg"
    """Optimizer of the architecture weights: HAPG, accelerated proximal gradient steps, or AdamHAPG, the same with Adam's step
    sizes."""
    arch_lr: float | None = None
    """Learning rate of the architecture weights; None: 3e-4, constant, for adamhapg, and 0.025 with a cosine schedule to 0 for
    hapg."""
    l1_ratio: float = 0.5
    """Share of the L1 norm in the penalty (alpha), in [0, 1]: 1 is the lasso, 0 the group lasso over the paths into each node."""
    strength_step: float = 0.01
    """Increase of the strength of the penalty (lambda) with each epoch; it is 0 in the first one."""
    metric: Literal["median", "support", "exact"] = "median"
    """Metric of the group prox where Adam's step sizes differ within a group, for adamhapg only. median: one step size for the
    group, as published. support: the one with the exact zeros. exact: the exact prox."""
    init: float = 1 / 7
    """Initial value of the architecture weights, to which noise of size 1e-3 is added."""
    target_paths: int = 0
    """Number of paths, in all cells together, at which the architecture is frozen at its prox point, so that only the network
    weights are trained from then on; 0: never."""
    probe_every: int = 1
    """Number of architecture steps between those with the gradient of zero weights, without which they stay zero. More than 1 is
    an approximation that makes the other steps cheaper."""
    cut: float = 0.0
    """Share of the largest weight of a cell up to which a path is removed from the genotype, in [0, 1]; 0: exact zeros only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("l1_ratio", "cut"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        check(self, counts=("probe_every",), amounts=("strength_step", "target_paths"))
        if self.optimizer == "hapg" and self.metric != "median":
            raise ValueError(f"metric belongs to adamhapg; hapg has one step size for all, got metric={self.metric!r}")


@dataclass(frozen=True)
class SparseSupernetSettings(PenaltySettings, CifarSearchSettings):
    usual_lr: ClassVar[Mapping[str, float]] = {"adamhapg": 3e-4, "hapg": 0.025}


@dataclass(frozen=True)
class SparseSupernetTextSettings(PenaltySettings, TextSearchSettings):
    arch_lr: float | None = None
    """Learning rate of the architecture weights; None: 1e-4, constant, for adamhapg, and 0.025 with a cosine schedule to 0 for
    hapg, which diverges on text."""
    init: float = 1 / 4
    usual_lr: ClassVar[Mapping[str, float]] = {"adamhapg": 1e-4, "hapg": 0.025}


CIFAR_PRESETS = {
    "paper": SparseSupernetSettings(),
    "small": small_cifar(SparseSupernetSettings, arch_lr=1e-3, strength_step=0.04),
}
TEXT_PRESETS = {
    "paper": SparseSupernetTextSettings(),
    "small": small_text(SparseSupernetTextSettings, strength_step=0.0025, target_paths=20),
}
