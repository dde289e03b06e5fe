"""Settings of the trainings, and of language models in searches too. A preset is an instance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from ..engine.settings import RunSettings, check


@dataclass(frozen=True)
class ImageTrainSettings(RunSettings):
    """The recipe of DARTS. The defaults are those of the papers for CIFAR-10 (SparseNAS trains its DARTS space 1200 epochs)."""

    out: Path = Path("runs/train")
    data: Literal["cifar10", "cifar100"] = "cifar10"
    data_dir: Path = Path("data")
    images: int = 0
    """Training images used; 0 takes all."""
    valid_images: int = 0
    """Validation images used; 0 takes all."""
    channels: int = 36
    layers: int = 20
    epochs: int = 600
    batch: int = 96
    lr: float = 0.025
    schedule: Literal["cosine", "linear"] = "cosine"
    """Of the learning rate, down to lr_min, epoch by epoch."""
    lr_min: float = 0.0
    momentum: float = 0.9
    weight_decay: float = 3e-4
    clip: float = 5.0
    """Largest norm of the gradient; 0: any."""
    cutout: int = 16
    """Side of the square that is blanked in training images; 0: none."""
    auxiliary: float = 0.4
    """Weight of the loss of the auxiliary head; 0 leaves it out."""
    drop_path: float = 0.2
    """Probability of dropping a path in the last epoch; grows linearly from 0."""
    smoothing: float = 0.0
    """Label smoothing."""
    amp: bool = False
    """Run the network in bfloat16."""

    def __post_init__(self) -> None:
        check(
            self,
            counts=("channels", "layers", "epochs", "batch"),
            amounts=("lr", "lr_min", "momentum", "weight_decay", "clip", "auxiliary", "cutout", "images", "valid_images"),
            shares=("drop_path", "smoothing"),
        )

    def rate(self, epoch: int) -> float:
        """The learning rate in an epoch."""
        done = epoch / self.epochs
        share = (1 + math.cos(math.pi * done)) / 2 if self.schedule == "cosine" else 1 - done
        return self.lr_min + (self.lr - self.lr_min) * share


@dataclass(frozen=True)
class GenotypeTrainSettings(ImageTrainSettings):
    """The recipe for the network of a genotype."""

    genotype: str = "DARTS_V2"
    """A published name (DARTS_V1, DARTS_V2, PDARTS, PC_DARTS, ISTA, ...) or a JSON file."""
    not_identifying: ClassVar[tuple[str, ...]] = ("data_dir", "genotype", "count", "workers")
    form: Literal["evaluation", "one_stage"] = "evaluation"
    """one_stage: batch norms after pools and identities too, as in the network that a one-stage search trains."""


@dataclass(frozen=True)
class CifarTrainSettings(GenotypeTrainSettings):
    """The training of a genotype on CIFAR."""

    count: bool = False
    """Only print parameters and multiply-adds, as JSON."""
    classes: int = 0
    """Classes to count for; 0 takes those of the data."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.classes < 0:
            raise ValueError(f"classes must be >= 0, got {self.classes}")


@dataclass(frozen=True)
class ImageNetTrainSettings(CifarTrainSettings):
    """The mobile setting: 224x224 images from a folder with `train` and `val`, 14 cells, 48 channels."""

    data: Literal["folder"] = "folder"  # type: ignore[assignment]
    channels: int = 48
    layers: int = 14
    epochs: int = 250
    batch: int = 512
    lr: float = 0.4
    schedule: Literal["cosine", "linear"] = "linear"
    weight_decay: float = 3e-5
    cutout: int = 0
    drop_path: float = 0.0
    smoothing: float = 0.1
    pixels: int = 224
    """Side of the images."""
    workers: int = 4
    """Processes that decode images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cutout:
            raise ValueError(f"cutout must be 0 for folders of images, got {self.cutout}")
        if self.images or self.valid_images:
            raise ValueError(f"images and valid_images must be 0 for folders, got {self.images} and {self.valid_images}")
        if self.form != "evaluation":
            raise ValueError(f"form must be evaluation for folders of images, got {self.form}")


CIFAR_TRAIN_PRESETS = {
    "paper": CifarTrainSettings(),
    "long": CifarTrainSettings(epochs=1200),
    "small": CifarTrainSettings(channels=12, layers=8, epochs=15, batch=64, images=10_000, drop_path=0.1, cutout=8),
}
IMAGENET_TRAIN_PRESETS = {
    "paper": ImageNetTrainSettings(),
    "small": ImageNetTrainSettings(channels=16, layers=8, epochs=30, batch=64, lr=0.05),
}


@dataclass(frozen=True)
class LanguageSettings:
    """Of a recurrent language model and of how text is shown to it, in a search and in a training."""

    data_dir: Path | None = None
    """Folder with the text: ptb.train.txt, ptb.valid.txt and ptb.test.txt, or train.txt, valid.txt and test.txt. Without it the
    documentation of Python's language topics is taken, which comes with Python."""
    tokens: int = 0
    """Words of the training text used; 0 takes all."""
    hidden: int = 300
    """Entries of an embedded word and of the hidden state: both have one size, for the decoder is the embedding."""
    bptt: int = 35
    """Words that a gradient goes back through."""
    drop_words: float = 0.0
    """Share of the vocabulary whose embedding is left out of a batch."""
    drop_embedding: float = 0.2
    drop_input: float = 0.75
    """Of what enters the cell from the word."""
    drop_hidden: float = 0.25
    """Of what enters each product with a hidden state; one mask for all nodes and words of a batch."""
    drop_output: float = 0.75
    temporal: float = 1e-3
    """Weight of the mean squared change of the hidden state from word to word."""
    compiled: bool = False
    """Have torch.compile make one kernel of each node: worth its minutes in long runs, on a GPU above all."""

    def __post_init__(self) -> None:
        check(
            self,
            counts=("hidden",),
            amounts=("tokens", "temporal"),
            shares=("drop_words", "drop_embedding", "drop_input", "drop_hidden", "drop_output"),
        )
        if self.bptt < 2:
            raise ValueError(f"bptt must be >= 2, got {self.bptt}")


@dataclass(frozen=True)
class TextTrainSettings(LanguageSettings, RunSettings):
    """The recipe of DARTS, with the epochs of SparseNAS. The defaults are those of the papers for Penn Treebank."""

    out: Path = Path("runs/train_ptb")
    not_identifying: ClassVar[tuple[str, ...]] = ("data_dir", "genotype", "count")
    genotype: str = "DARTS_V2"
    """A published cell (DARTS_V1, DARTS_V2), a JSON file, or LSTM."""
    count: bool = False
    """Only print the number of parameters, as JSON."""
    epochs: int = 4000
    batch: int = 64
    valid_batch: int = 10
    """Columns in which the validation text is read."""
    test_batch: int = 1
    """Columns in which the test text is read."""
    hidden: int = 850
    drop_words: float = 0.1
    lr: float = 20.0
    """Of SGD, for windows of `bptt` words; others take a step in proportion to their length."""
    weight_decay: float = 8e-7
    clip: float = 0.25
    """Largest norm of the gradient."""
    patience: int = 5
    """SGD is averaged from the epoch on in which validation is worse than the best of all but the last so many epochs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self,
            counts=("epochs", "batch", "valid_batch", "test_batch", "patience"),
            amounts=("lr", "weight_decay", "clip"),
        )


TEXT_TRAIN_PRESETS = {
    "paper": TextTrainSettings(),
    "small": TextTrainSettings(
        hidden=128, epochs=12, batch=32, tokens=300_000, test_batch=10, drop_input=0.2, drop_output=0.3, drop_words=0.0, lr=10.0
    ),
}
