"""Settings of the searches on two levels. A method adds its own in its file, a preset is an instance."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..engine.settings import RunSettings, check
from ..train.settings import LanguageSettings


@dataclass(frozen=True)
class BilevelSettings(RunSettings):
    """Of every search on two levels, whatever the network and the data."""

    epochs: int = 50
    batch: int = 64
    lr: float = 0.025
    """Of SGD on the weights."""
    weight_decay: float = 3e-4
    clip: float = 5.0
    """Largest norm of the gradient of the weights."""
    order: Literal["first", "second"] = "second"
    """Of the architecture gradient; second takes one weight step into account."""
    hessian: Literal["difference", "exact"] = "difference"
    """How second order differentiates twice."""
    pick_below: int = 0
    """Take the genotype of the epoch whose living paths alone do best, among epochs with at most so many of them; 0 takes the
    last epoch."""

    def __post_init__(self) -> None:
        check(self, counts=("epochs", "batch"), amounts=("lr", "weight_decay", "clip", "pick_below"))


@dataclass(frozen=True)
class CifarSearchSettings(BilevelSettings):
    """On images. The defaults are those of the papers (CIFAR-10, 50 epochs, batch 64)."""

    out: Path = Path("runs/nas_cifar10")
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
    lr: float = 0.025
    """Of SGD on the weights; follows a cosine down to lr_min, epoch by epoch."""
    lr_min: float = 0.001
    momentum: float = 0.9
    amp: bool = False
    """Run the network in bfloat16; weights, architecture and prox stay in float32."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, counts=("images", "channels", "layers"), amounts=("lr_min", "momentum"))
        if self.images // 2 < self.batch:
            raise ValueError(f"images must be at least two batches of {self.batch}, got {self.images}")


def small_cifar(settings: type[CifarSearchSettings], **own: Any) -> CifarSearchSettings:
    """A search for a laptop, about twenty minutes on one core: few images, a narrow and shallow supernet, first order."""
    return settings(images=4096, channels=8, layers=5, epochs=10, batch=32, order="first", **own)


@dataclass(frozen=True)
class TextSearchSettings(LanguageSettings, BilevelSettings):
    """On text. The defaults are those of the papers (Penn Treebank, 50 epochs, batch 256)."""

    out: Path = Path("runs/nas_ptb")
    space: str = "recurrent"
    """Search space: recurrent, recurrent_zero."""
    batch: int = 256
    lr: float = 20.0
    """Of SGD on the weights, for `bptt` words; fewer words take a smaller step."""
    weight_decay: float = 5e-7
    clip: float = 0.25
    """Largest norm of the gradient of the weights."""
    arch_clip: float = 0.0
    """Largest norm of the gradient of the architecture; 0: any, as published. It explodes now and then, on the way back through
    nine norms for every word, and Adam remembers for a thousand steps."""

    def __post_init__(self) -> None:
        BilevelSettings.__post_init__(self)
        LanguageSettings.__post_init__(self)
        check(self, amounts=("arch_clip",))


def small_text(settings: type[TextSearchSettings], **own: Any) -> TextSearchSettings:
    """A search for a laptop, about ten minutes on one core: a narrow cell, part of the text, first order.

    In so narrow a cell the gradient explodes on its way back through 35 words, and clipping leaves little of anything else:
    `--tokens 100000 --epochs 3 --target-paths 0` ends at perplexity 449 on Penn Treebank, and with `--bptt 35` at 2721.
    """
    sizes = {"hidden": 96, "batch": 64, "bptt": 10, "epochs": 8, "tokens": 300_000}
    return settings(**sizes, order="first", drop_input=0.3, drop_output=0.5, arch_clip=0.25, **own)
