"""Settings that all pruning scripts have: the optimizer, the penalty, the budget, and the comparison at the end."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from nas.engine.settings import RunSettings, check, cosine

Optimizer = Literal["proxsgd", "proxadam"]
PenaltyName = Literal["group_lasso", "sparse_group_lasso"]


@dataclass(frozen=True)
class PruningSettings(RunSettings):
    """A training with a budget. Subclasses have the network and the data."""

    not_identifying: ClassVar[tuple[str, ...]] = ("data_dir", "baseline", "latency_batch", "latency_runs")
    usual_lr: ClassVar[dict[str, float]] = {}
    epochs: int = 200
    """Number of epochs, passes over the training data."""
    batch: int = 128
    """Batch size, in images or windows of text."""
    optimizer: Optimizer = "proxsgd"
    """Optimizer: proximal SGD with momentum, or Adam with the prox in Adam's own metric."""
    lr: float | Literal["auto"] = "auto"
    """Largest learning rate, > 0. It grows linearly from 0 in the first steps and then falls to 0 by half a cosine. auto: the
    usual one of the optimizer. That of proxsgd, whose momentum averages gradients, is 1 / (1 - momentum) times that of SGD in
    PyTorch."""
    warmup: float = 0.05
    """Share of the steps in which the learning rate grows, in [0, 1)."""
    momentum: float = 0.9
    """Momentum: of proxsgd, and decay rate of the first moment of proxadam; in [0, 1)."""
    weight_decay: float = 5e-4
    """Weight decay: this multiple of each weight is added to its gradient, or with proxadam, times the learning rate, subtracted
    from the weight, as in AdamW."""
    clip: float = 0.0
    """Gradient clipping threshold (norm of the gradient of all weights); 0: no clipping."""
    amp: bool = False
    """Compute the network in bfloat16, which is faster on GPUs; weights stay in float32."""
    macs: float = 0.5
    """Share of the multiply-adds that is to remain, in (0, 1)."""
    penalty: PenaltyName = "group_lasso"
    """Penalty of all parameters that are removed together: the norm of each group, or with it the sum of the absolute values."""
    l1_ratio: float | Literal["auto"] = "auto"
    """Share of the absolute values in the sparse group lasso, in (0, 1). auto: 0.1."""
    start: float = 0.1
    """Share of the steps before the penalty acts, in [0, 1)."""
    due: float = 0.8
    """Share of the steps after which the target is due, in (start, 1]. Once it is reached the zeros are frozen, and the rest of
    the training is without penalty."""
    measurements: int = 200
    """Number of measurements of the multiply-adds until the target is due; the strength changes with each."""
    tolerance: float = 0.01
    """The target counts as reached when the share is above it by half of this, or below it by this, in (0, 1)."""
    baseline: bool = True
    """Train the dense network first, with the same settings and without a penalty, for comparison."""
    latency_batch: int = 1
    """Number of samples in a pass whose time is measured."""
    latency_runs: int = 30
    """Number of timed passes of each network, on one thread."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self,
            counts=("epochs", "batch", "measurements", "latency_batch", "latency_runs"),
            amounts=("weight_decay", "clip"),
            shares=("warmup", "momentum", "start"),
        )
        if not isinstance(self.lr, str) and not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be finite and > 0, or auto, got {self.lr}")
        if self.penalty == "group_lasso" and not isinstance(self.l1_ratio, str):
            raise ValueError(
                f"l1_ratio must be auto with the penalty group_lasso, which has no absolute values, got {self.l1_ratio}"
            )
        for name, value in (("macs", self.macs), ("tolerance", self.tolerance), ("l1_ratio", self.l1_share)):
            if not 0 < value < 1:
                raise ValueError(f"{name} must lie in (0, 1), got {value}")
        if not self.start < self.due <= 1:
            raise ValueError(f"due must lie in (start, 1] = ({self.start}, 1], got {self.due}")

    def schedules(self) -> list[str]:
        return [*super().schedules(), "the learning rate", "the budget"]

    @property
    def l1_share(self) -> float:
        """The share of the absolute values in the sparse group lasso."""
        return 0.1 if isinstance(self.l1_ratio, str) else self.l1_ratio

    @property
    def largest_lr(self) -> float:
        """The largest learning rate."""
        return self.usual_lr[self.optimizer] if isinstance(self.lr, str) else self.lr

    def rate(self, done: float) -> float:
        """The learning rate when this share of the steps is done."""
        if done < self.warmup:
            return self.largest_lr * done / self.warmup
        return self.largest_lr * cosine((done - self.warmup) / (1 - self.warmup))
