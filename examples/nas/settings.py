"""Settings that all searches share. A method adds its own in its file, a preset is an instance."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

# Where results go and how a run is watched: not part of what it computes.
ELSEWHERE = ("out", "seeds", "resume", "data_dir", "device", "threads", "checkpoint_minutes")


@dataclass(frozen=True)
class SearchSettings:
    """The defaults are those of the papers (CIFAR-10, 50 epochs, batch 64)."""

    out: Path = Path("runs/nas_cifar10")
    """Folder for everything that the search writes."""
    seeds: tuple[int, ...] = (0,)
    """One search for each; several get a folder each in --out."""
    resume: bool = False
    """Continue what is in --out."""
    space: str = "darts"
    """Search space: darts, darts_zero, cherry, S1, S2, S3, S4."""
    data: Literal["cifar10", "cifar100"] = "cifar10"
    data_dir: Path = Path("data")
    """Folder that holds the data set; it is downloaded there if missing."""
    images: int = 50_000
    """Training images used: the first half for the weights, the second for the architecture."""
    channels: int = 16
    layers: int = 8
    """Cells; those at one and two thirds of the depth halve the image and double the channels."""
    epochs: int = 50
    batch: int = 64
    lr: float = 0.025
    """Of SGD on the weights; follows a cosine down to lr_min, epoch by epoch."""
    lr_min: float = 0.001
    momentum: float = 0.9
    weight_decay: float = 3e-4
    clip: float = 5.0
    """Largest norm of the gradient of the weights."""
    order: Literal["first", "second"] = "second"
    """Of the architecture gradient; second takes one weight step into account."""
    hessian: Literal["difference", "exact"] = "difference"
    """How second order differentiates twice."""
    pick_below: int = 0
    """Take the genotype of the epoch whose living paths alone are most accurate, among epochs with at most so many of them; 0
    takes the last epoch."""
    amp: bool = False
    """Run the network in bfloat16; weights, architecture and prox stay in float32."""
    device: str = "auto"
    threads: int = 0
    """CPU threads; 0 leaves the choice to PyTorch."""
    checkpoint_minutes: float = 5.0
    """A checkpoint is written after every epoch, and this often inside one."""

    def __post_init__(self) -> None:
        for name in ("images", "channels", "layers", "epochs", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        for name in ("lr", "lr_min", "momentum", "weight_decay", "clip"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be finite and >= 0, got {getattr(self, name)}")
        if self.pick_below < 0:
            raise ValueError(f"pick_below must be >= 0, got {self.pick_below}")
        if self.images // 2 < self.batch:
            raise ValueError(f"images must be at least two batches of {self.batch}, got {self.images}")

    def plain(self) -> dict[str, Any]:
        """What the run computes, as numbers and strings: two runs with equal ones give equal results."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items() if k not in ELSEWHERE}


def small(settings: type[SearchSettings], **own: Any) -> SearchSettings:
    """A search for a laptop, about twenty minutes on one core: few images, a narrow and shallow supernet, first order."""
    return settings(images=4096, channels=8, layers=5, epochs=10, batch=32, order="first", **own)
