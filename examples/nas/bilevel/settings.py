"""Settings of bilevel searches. A method adds its own in its file; a preset is an instance."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..engine.settings import CheckedSettings, RunSettings, check
from ..train.settings import LanguageSettings

HESSIANS = ("difference", "exact")
RADIUS = 0.01  # norm of the step of the difference, as published; networks with zero channels need a smaller one to be accurate


@dataclass(frozen=True)
class BilevelSettings(RunSettings):
    """Settings of every bilevel search."""

    epochs: int = 50
    """Number of epochs, passes over the training data."""
    batch: int = 64
    """Batch size, in images or columns of text. A step takes a batch for the network weights and one for the architecture."""
    lr: float = 0.025
    """Learning rate of SGD for the network weights."""
    weight_decay: float = 3e-4
    """Weight decay of the network weights: this multiple of each weight is added to its gradient."""
    clip: float = 5.0
    """Gradient clipping threshold (norm) of the network weights; 0: no clipping."""
    order: Literal["first", "second"] = "second"
    """Order of the architecture gradient. first: at the present network weights. second: differentiated through one step of the
    network weights, as in DARTS; a step then takes five passes through the network instead of two."""
    hessian: Literal["difference", "exact"] = "difference"
    """How second order gets its second derivatives: from a central difference of gradients, as published, or exactly, by
    automatic differentiation."""
    levels: Literal[1, 2] = 2
    """2: network weights on one part of the data and the architecture on another, as published. 1: both on the same data, from
    the gradients of one pass over each batch; with --order first. In the first pass through the data no batch has been seen
    before, so that the architecture gradient is that of new data, as with two levels."""
    pick_below: int = 0
    """The result is the epoch with the best accuracy (or perplexity) of the nonzero paths alone, among those with at most this
    number of paths; 0: the last epoch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, counts=("epochs", "batch"), amounts=("lr", "weight_decay", "clip", "pick_below"))
        if self.levels == 1 and self.order == "second":
            raise ValueError(
                "order must be 'first' with levels=1, where both gradients are taken at the same weights, got 'second'"
            )


@dataclass(frozen=True)
class ImageProxySettings(CheckedSettings):
    """Settings of all searches on images that make a smaller problem of them, which is quicker to search on."""

    pixels: int = 0
    """Side in pixels to which the images are reduced once, by averaging; 0: as they are. Random crops move in proportion."""
    augment: bool = True
    """Crop and flip the training images at random."""
    transition: Literal["residual", "patch"] = "residual"
    """Layers between the stages of nasbench201. residual: the published residual blocks. patch: one convolution of disjoint 2x2
    patches, so that only the cells combine neighbouring pixels otherwise. Other spaces have reduction cells there."""
    epoch_steps: int = 0
    """Number of steps of an epoch; 0: one pass through the images. Otherwise epochs go through the shuffled images one after the
    other, so that every image is seen once before any is seen again."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, amounts=("pixels", "epoch_steps"))


@dataclass(frozen=True)
class CifarSearchSettings(ImageProxySettings, BilevelSettings):
    """Settings of bilevel searches on images. The defaults are the published ones (CIFAR-10, 50 epochs, batch 64)."""

    out: Path = Path("runs/nas_cifar10")
    space: str = "darts"
    """Search space, the candidate operations of the edges: darts (7 operations), darts_zero (and the zero operation), cherry (2),
    S1, S2, S3, S4 of Zela et al. (2020), nasbench201 (4 operations and the zero operation) or nasbench201_nonzero (without it).
    Cells of the last two have one operation on each edge: of several, a search writes the one with the largest weight."""
    data: Literal["cifar10", "cifar100", "folder"] = "cifar10"
    """Data set. folder: own images of one size with sides divisible by 4, in DATA_DIR/train/CLASS. The search does not see the
    images of a training's validation: those in DATA_DIR/val, or without it one in ten of each class of train."""
    data_dir: Path = Path("data")
    """Folder of the data set; CIFAR is downloaded to it if it is missing."""
    images: int = 50_000
    """Number of training images to use: the first half for the network weights, the second for the architecture; with --levels 1
    all but the last ones, those of --valid-images, for both. Of a folder with fewer images all are used."""
    channels: int = 16
    """Number of channels of the first cell; each reduction cell doubles it."""
    layers: int = 8
    """Number of cells of the supernet; those at one and two thirds of the depth are reduction cells, which halve the sides of the
    image."""
    lr: float = 0.025
    """Initial learning rate of SGD for the network weights; it follows a cosine schedule down to --lr-min, by epoch."""
    lr_min: float = 0.001
    """Final learning rate of the network weights."""
    momentum: float = 0.9
    """Momentum of SGD for the network weights."""
    drop_path: float = 0.0
    """Probability of drop path on the sum of the operations of each edge, reached linearly from 0 over the epochs."""
    cutout: int = 0
    """Side of the square that is masked in the images of all steps (cutout), in pixels; the share of masked images grows linearly
    from none to all over the epochs; 0: no cutout."""
    amp: bool = False
    """Compute the network in bfloat16, which is faster on GPUs; weights, architecture and prox stay in float32."""
    valid_images: int = 0
    """Number of images on which the supernet is evaluated after each epoch; 0: the half for the architecture, or with --levels 1
    a tenth of the images, on which no step is taken."""
    replicas: int = 1
    """Number of supernets with weights of their own that share the architecture; each computes a part of every batch, whose size
    must be a multiple. The architecture gradient is their mean, and so depends less on the weights of one supernet. In PyTorch
    only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self,
            counts=("images", "channels", "layers", "replicas"),
            amounts=("lr_min", "momentum", "cutout", "valid_images"),
            shares=("drop_path",),
        )
        if self.images // 2 < self.batch:
            raise ValueError(f"images must be at least two batches of {self.batch}, got {self.images}")
        if self.batch % self.replicas:
            raise ValueError(f"batch must be a multiple of the {self.replicas} replicas, got {self.batch}")
        if self.levels == 2 and self.valid_images > self.images // 2:
            raise ValueError(f"valid_images must be at most half of the {self.images} images, got {self.valid_images}")

    def schedules(self) -> list[str]:
        lr = [f"lr from {self.lr:g} to {self.lr_min:g}"] if self.lr != self.lr_min else []
        return [*super().schedules(), *lr, *(name for name in ("drop_path", "cutout") if getattr(self, name))]


def small_cifar(settings: type[CifarSearchSettings], **own: Any) -> CifarSearchSettings:
    """Settings for a laptop, about twenty minutes on one core: few images, a narrow and shallow supernet, first order."""
    return settings(images=4096, channels=8, layers=5, epochs=10, batch=32, order="first", **own)


def small_nasbench201(settings: type[CifarSearchSettings], **own: Any) -> CifarSearchSettings:
    """Settings for NAS-Bench-201 in a few minutes on one core: a cell a stage, reduced images, 1000 steps, first order.

    Without random crops and flips, as hardly an image is seen more than twice.
    """
    sizes = {"channels": 8, "layers": 5, "pixels": 16, "epochs": 20, "epoch_steps": 50, "valid_images": 1000, "batch": 64}
    usual = {"space": "nasbench201_nonzero", "transition": "patch", "augment": False, "order": "first", **sizes}
    return settings(**{**usual, **own})


@dataclass(frozen=True)
class TextSearchSettings(LanguageSettings, BilevelSettings):
    """Settings of bilevel searches on text. The defaults are the published ones (Penn Treebank, 50 epochs, batch 256)."""

    out: Path = Path("runs/nas_ptb")
    space: str = "recurrent"
    """Search space, the candidate operations of the edges: recurrent (4 operations) or recurrent_zero (and the zero
    operation)."""
    batch: int = 256
    lr: float = 20.0
    """Learning rate of SGD for the network weights and windows of --bptt words; it is scaled with the length of the window."""
    weight_decay: float = 5e-7
    clip: float = 0.25
    """Gradient clipping threshold (norm) of the network weights; 0: no clipping."""
    arch_clip: float = 0.0
    """Gradient clipping threshold (norm) of the architecture; 0: no clipping, as published. Backpropagation through nine batch
    norms for each word sometimes explodes, and Adam's second moment keeps such a gradient for about a thousand steps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, amounts=("arch_clip",))


def small_text(settings: type[TextSearchSettings], **own: Any) -> TextSearchSettings:
    """Settings for a laptop, about ten minutes on one core: a narrow cell, part of the text, first order.

    bptt is 10, because the gradient of so narrow a cell explodes over 35 words and clipping then removes most of it: with
    `--tokens 100000 --epochs 3 --target-paths 0` perplexity on Penn Treebank is 449, and 2721 with `--bptt 35`.
    """
    sizes = {"hidden": 96, "batch": 64, "bptt": 10, "epochs": 8, "tokens": 300_000}
    return settings(**sizes, order="first", drop_input=0.3, drop_output=0.5, arch_clip=0.25, **own)
