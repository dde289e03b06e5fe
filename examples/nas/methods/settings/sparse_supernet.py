"""Settings of SparseNAS: architecture weights under a sparse group lasso.

`sound` changes settings from the published rule of the architecture steps to the sound one. Each of its changes is a setting of
its own, so that it can be taken back by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from ...bilevel.settings import CifarSearchSettings, TextSearchSettings, small_cifar, small_nasbench201, small_text
from ...engine.settings import CheckedSettings, check


@dataclass(frozen=True)
class PenaltySettings(CheckedSettings):
    """Settings of the architecture weights and their penalty."""

    optimizer: Literal["adamhapg", "hapg", "adam"] = "adamhapg"
    """Optimizer of the architecture weights: HAPG, accelerated proximal gradient steps; AdamHAPG, the same with Adam's step
    sizes; adam, for which the subgradient of the penalty is added to the gradient, and a threshold removes paths at the end."""
    arch_lr: float | None = None
    """Learning rate of the architecture weights; None: 3e-4, constant, for adamhapg and adam, and 0.025 with a cosine schedule to
    0 for hapg."""
    constant_arch_lr: bool = False
    """Keep the learning rate of hapg at --arch-lr, instead of the published cosine schedule."""
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
    an approximation that makes the other steps cheaper; 0: never, zero weights stay zero."""
    cut: float = 0.0
    """Share of the largest weight of a cell up to which a path is removed from the genotype, in [0, 1]; 0: exact zeros only."""
    threshold: float | None = None
    """Weight up to which a path is removed from the genotype; None: 1e-3 for adam, whose weights are never 0, and 0 for the
    others. The paper names 1e-3 for the digits and no threshold for searches."""
    strength: float = 0.0
    """Strength of the penalty in the last epoch, to which it grows linearly from 0 after the warm-up; 0: it grows by
    --strength-step with each epoch instead, as published."""
    warmup: float = 0.0
    """Share of the epochs, the first ones, in which only the network weights are trained."""
    nonnegative: bool = False
    """Constrain the architecture weights to be >= 0."""
    hold_norm: Literal["none", "edge", "node", "cell"] = "none"
    """Rescale the architecture weights of each edge, of all edges into each node, or of a cell to norm 1 after every step.
    Batch norms make the loss blind to their common size, which the penalty therefore shrinks whatever the loss; with a fixed norm
    it acts on the shares of the paths."""
    cap: float = 1.0
    """Cap of the extrapolation of hapg and adamhapg, in [0, 1]; 1: none, as published, with which the noise of the batches
    accumulates."""
    guard: bool = True
    """Restore the strongest route through a cell that an update would leave without any, which is not in the paper; --no-guard
    ends the search with an error instead."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("l1_ratio", "cut", "cap"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        check(self, amounts=("strength_step", "target_paths", "probe_every", "strength"), shares=("warmup",))
        if self.threshold is not None:
            check(self, amounts=("threshold",))
        if self.optimizer != "adamhapg" and self.metric != "median":
            raise ValueError(f"metric belongs to adamhapg, got metric={self.metric!r} with optimizer={self.optimizer!r}")
        if self.optimizer == "adam" and (self.nonnegative or self.hold_norm != "none" or self.cap < 1):
            raise ValueError("nonnegative, hold_norm and cap belong to hapg and adamhapg, got them with optimizer='adam'")

    @property
    def frozen_epochs(self) -> int:
        """Number of epochs of the warm-up, which leaves at least one epoch for the architecture."""
        epochs: int = self.epochs  # type: ignore[attr-defined]
        return min(round(self.warmup * epochs), epochs - 1)

    def final_strength(self, epoch: int) -> float:
        """The strength that grows to `strength` in the last epoch. epoch: counted from 0."""
        moved = self.epochs - self.frozen_epochs  # type: ignore[attr-defined]
        return self.strength * max(epoch + 1 - self.frozen_epochs, 0) / moved

    @property
    def hard_threshold(self) -> float:
        """The threshold of this optimizer."""
        usual = 1e-3 if self.optimizer == "adam" else 0.0
        return usual if self.threshold is None else self.threshold

    def schedules(self) -> list[str]:
        ramp = ["strength"] if self.strength else []
        return [
            *super().schedules(),
            *ramp,
            *(["arch_lr of hapg"] if self.optimizer == "hapg" and not self.constant_arch_lr else []),
        ]


@dataclass(frozen=True)
class SparseSupernetSettings(PenaltySettings, CifarSearchSettings):
    path_norm: bool = False
    """Apply a batch norm after every path, also after skip connections and pools, so that the architecture weights of an edge
    multiply outputs of the same size."""
    usual_lr: ClassVar[Mapping[str, float]] = {"adamhapg": 3e-4, "adam": 3e-4, "hapg": 0.025}


@dataclass(frozen=True)
class SparseSupernetTextSettings(PenaltySettings, TextSearchSettings):
    arch_lr: float | None = None
    """Learning rate of the architecture weights; None: 1e-4, constant, for adamhapg and adam, and 0.025 with a cosine schedule to
    0 for hapg, which diverges on text."""
    init: float = 1 / 4
    usual_lr: ClassVar[Mapping[str, float]] = {"adamhapg": 1e-4, "adam": 1e-4, "hapg": 0.025}


def sound(settings: Any) -> Any:
    """The settings with the sound rule of the architecture steps in place of the published one (see `methods.sparse_supernet`).

    Settings of images or of text; the size of the search is kept. Where a cell has one operation on each edge, the norm of each
    edge is held; elsewhere that of the cell, so that edges and nodes compete. Where a preset for other spaces has few images, an
    epoch has as many others.
    """
    own: dict[str, Any] = {"hold_norm": "cell", "arch_lr": 1e-3, "strength": 0.5}
    if isinstance(settings, CifarSearchSettings):
        own["path_norm"] = True
        if settings.space.startswith("nasbench201"):
            own |= {"hold_norm": "edge", "arch_lr": 0.02, "strength": 0.15}
            if settings.epoch_steps:  # a short search: many passes through few images lead to the same cell more often
                own |= {"images": 5000}
        elif settings.images < 50_000:
            own |= {"images": 50_000, "epoch_steps": settings.images // settings.batch, "valid_images": 2000}
    return replace(
        settings,
        optimizer="hapg",
        constant_arch_lr=True,
        cap=0.9,
        metric="median",
        nonnegative=True,
        strength_step=0.0,
        warmup=0.4,
        probe_every=0,
        levels=1,
        order="first",
        **own,
    )


CIFAR_PRESETS = {
    "paper": SparseSupernetSettings(),
    "small": small_cifar(SparseSupernetSettings, arch_lr=1e-3, strength_step=0.04),
    "nasbench201": SparseSupernetSettings(space="nasbench201_nonzero", layers=17),
    "nasbench201_small": small_nasbench201(SparseSupernetSettings, arch_lr=1e-3, strength_step=0.04),
}
TEXT_PRESETS = {
    "paper": SparseSupernetTextSettings(),
    "small": small_text(SparseSupernetTextSettings, strength_step=0.0025, target_paths=20),
}
