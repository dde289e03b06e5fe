"""Settings of GSparsity: group sparsity on the weights of the operations."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from ...bilevel.settings import ImageProxySettings
from ...engine.settings import check
from ...train.settings import ImageTrainSettings

Weighting = Literal["inverse_sqrt_size", "none", "sqrt_size", "initial_norm"]


@dataclass(frozen=True)
class GSparsitySettings(ImageProxySettings, ImageTrainSettings):
    out: Path = Path("runs/nas_cifar10")
    channels: int = 16
    layers: int = 8
    epochs: int = 100
    batch: int = 64
    lr: float = 1e-3
    lr_min: float = 1e-3
    momentum: float = 0.2
    """Weight of the last direction in ProxSGD, in [0, 1): 1 - rho of the paper."""
    weight_decay: float = 0.0
    clip: float = 0.0
    cutout: int = 0
    auxiliary: float = 0.0
    drop_path: float = 0.0
    space: str = "darts"
    """Search space, the candidate operations of the edges: darts (7 operations), darts_zero (and the zero operation), cherry (2),
    S1, S2, S3, S4 of Zela et al. (2020), nasbench201 (4 operations and the zero operation) or nasbench201_nonzero (without it).
    Cells of the last two have one operation on each edge: of several, a search writes the one whose norm has kept the largest
    share of its initial value."""
    mu: float = 60.0
    """Strength of the penalty (mu)."""
    weighting: Weighting = "inverse_sqrt_size"
    """Factor of mu for a group: 1 / sqrt(its number of weights), as published, 1 (none), sqrt(its number of weights), or its
    initial norm, with which all groups shrink at one relative rate."""
    gates: Literal["penalised", "free"] = "penalised"
    """Whether operations without parameters (pools, skip connections), each of which is multiplied by a factor (gate), are
    penalised (free: they are not)."""
    tau: float | Literal["direct"] = 1.0
    """Curvature of ProxSGD's model, > 0. direct: prox steps of length --lr on the weights themselves, which are then exactly
    sparse, and not only their prox point."""
    vanish: float = 1e-6
    """Norm below which a group that is 0 at the prox point is set to 0 and no longer computed; 0: never."""
    cut: float = 0.0
    """Norm at the prox point up to which a group is removed from the genotype; 0: exact zeros only, which changes no logit."""
    # the searches of a bisection differ in mu only
    not_identifying: ClassVar[tuple[str, ...]] = ("data_dir", "want_paths", "want_parameters", "bisect_runs")
    want_paths: int = 0
    """Find by bisection the mu with this number of paths in both cells together; 0: use --mu."""
    want_parameters: int = 0
    """Find by bisection the mu with this number of parameters of the resulting network of 20 cells and 36 channels (in
    nasbench201 15 and 16); 0: use --mu."""
    bisect_runs: int = 6
    """Maximal number of searches of a bisection."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, amounts=("mu", "vanish", "cut"), shares=("momentum",))
        if self.nesterov:
            raise ValueError("nesterov must be False for GSparsity, as ProxSGD has no such momentum, got True")
        for name, least in (("want_paths", 0), ("want_parameters", 0), ("bisect_runs", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be >= {least}, got {getattr(self, name)}")
        if self.want_paths and self.want_parameters:
            raise ValueError(f"want_paths and want_parameters exclude each other, got {self.want_paths}, {self.want_parameters}")
        if self.tau != "direct" and not 0 < self.tau < math.inf:
            raise ValueError(f"tau must be finite and > 0, or direct, got {self.tau}")


CIFAR_PRESETS = {
    "paper": GSparsitySettings(),
    "small": GSparsitySettings(
        channels=8,
        layers=5,
        epochs=10,
        batch=32,
        images=4096,
        valid_images=2000,
        lr=0.02,
        lr_min=0.02,
        tau="direct",
        mu=0.05,
        weighting="initial_norm",
    ),
    # mu of the published code on NAS-Bench-201
    "nasbench201": GSparsitySettings(space="nasbench201_nonzero", layers=17, mu=200.0, epochs=50),
    "nasbench201_small": GSparsitySettings(
        space="nasbench201_nonzero",
        channels=8,
        layers=5,
        pixels=16,
        augment=False,
        transition="patch",
        epochs=20,
        epoch_steps=50,
        valid_images=1000,
        lr=0.02,
        lr_min=0.02,
        tau="direct",
        mu=0.06,
        weighting="initial_norm",
    ),
}
