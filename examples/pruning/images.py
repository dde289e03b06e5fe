"""Residual networks for images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from nas.engine.distributed import SINGLE_PROCESS
from nas.engine.settings import check
from nas.train.train_cifar import measures, prepare_data
from torch import Tensor, nn
from torch.nn import functional as F

from .settings import PruningSettings
from .task import Layer, Quality, Task

percent = lambda value: f"{100 * value:.2f} %"


@dataclass(frozen=True)
class ConvnetSettings(PruningSettings):
    """The recipe of residual networks for CIFAR-10."""

    usual_lr: ClassVar[dict[str, float]] = {"proxsgd": 1.0, "proxadam": 5e-3}
    out: Path = Path("runs/prune_convnet")
    data: Literal["cifar10", "cifar100", "folder"] = "cifar10"
    """Data set. folder: own images of one size with sides divisible by 4, in DATA_DIR/train/CLASS and DATA_DIR/val/CLASS;
    without val, one in ten of each class of train is for validation."""
    data_dir: Path = Path("data")
    """Folder of the data set; CIFAR is downloaded to it if it is missing."""
    images: int = 0
    """Number of training images to use; 0: all."""
    valid_images: int = 0
    """Number of validation images to use; 0: all."""
    epoch_images: int = 0
    """Number of them on which the accuracy after each epoch is measured; 0: all. The table at the end is measured on all."""
    hold_out: float = 0.0
    """Share of the training images that are held out and validated on, so that the test images stay unseen; 0: validate on the
    test images (or val)."""
    cutout: int = 0
    """Side in pixels of a square at a random place that is masked in training images (cutout); 0: no cutout."""
    blocks: int = 3
    """Number of residual blocks in each of the three stages; the network has 6 times as many layers, and 2 more."""
    width: int = 16
    """Number of channels in the first stage; the others have 2 and 4 times as many."""

    def __post_init__(self) -> None:
        super().__post_init__()
        amounts = ("cutout", "images", "valid_images", "epoch_images")
        check(self, counts=("blocks", "width"), amounts=amounts, shares=("hold_out",))


class Images(Task):
    """A residual network for images, and its training on random crops that are flipped at random."""

    command, network = "prune_convnet", "ResNet"
    facts: ClassVar[dict[str, type]] = {"mean": list, "std": list}
    qualities = (Quality("valid_accuracy", "accuracy", percent, " (%)", 100.0),)

    def __init__(
        self, settings: ConvnetSettings, seed: int, device: torch.device, saved: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(settings, seed, device)
        self.settings = settings
        statistics = None if saved is None else (tuple(saved["mean"]), tuple(saved["std"]))
        self.data = prepare_data(settings, seed, device, SINGLE_PROCESS, statistics)
        self.size = tuple(next(self.data.validation())[0].shape[2:])

    def arguments(self) -> dict[str, Any]:
        s = self.settings
        return {"blocks": s.blocks, "width": s.width, "classes": self.data.classes, "channels": self.data.channels}

    def build(self) -> nn.Module:
        return super().build().to(memory_format=torch.channels_last)

    def about(self) -> dict[str, Any]:
        mean, std = self.data.statistics
        return {"mean": list(mean), "std": list(std), "size": list(self.size)}

    def identity(self) -> dict[str, Any]:
        return self.data.identity

    def title(self) -> str:
        return f"ResNet-{6 * self.settings.blocks + 2} with {self.settings.width} channels"

    def text(self) -> str:
        return self.data.text

    def example(self, samples: int = 1) -> Tensor:
        images = torch.zeros((samples, self.data.channels, *self.size), device=self.device)
        return images.contiguous(memory_format=torch.channels_last)

    def steps(self) -> int:
        return len(self.data.batches)

    def batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        return self.data.batches.epoch(epoch, start)

    def loss(self, net: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, int]:
        images, labels = batch
        logits = net(images)
        return F.cross_entropy(logits.float(), labels), (logits.argmax(1) == labels).sum(), len(labels)

    def training_columns(self, loss: float, accuracy: float) -> dict[str, float]:
        return {"train_loss": loss, "train_accuracy": accuracy}

    def evaluate(self, net: nn.Module, whole: bool = True) -> dict[str, float]:
        images = self.data.validation()
        if not whole and self.settings.epoch_images:
            images = first(images, self.settings.epoch_images)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.amp):
            loss, accuracy, _ = measures(net, images, self.device)
        return {"valid_loss": loss, "valid_accuracy": accuracy}

    @torch.no_grad()
    def outputs(self, net: nn.Module) -> Iterator[Tensor]:
        for images, _ in self.data.validation():
            yield net(images)

    def layers(self, before: nn.Module, after: nn.Module) -> Sequence[Layer]:
        """The convolutions on the main path; those of a stage that are added to each other have the same number of channels."""
        found = {name: m for name, m in before.named_modules() if isinstance(m, nn.Conv2d) and "shortcut" not in name}
        width = lambda net, name: len(net.get_submodule(name).weight)
        short = lambda name: name.removeprefix("stages.")
        return [Layer(short(name), "channels", width(before, name), width(after, name)) for name in found]


def first(batches: Iterator[tuple[Tensor, Tensor]], images: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches with the first so many images."""
    left = images
    for x, y in batches:
        yield x[:left], y[:left]
        left -= len(y)
        if left <= 0:
            return
