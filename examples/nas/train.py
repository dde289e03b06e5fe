"""Training of derived networks: cosine or linear rates, drop path, auxiliary head, checkpoints from which a run goes on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import checkpoint, cnn, data, draw, folder
from .genotype import Genotype
from .processes import Processes
from .run import Run
from .settings import check

ELSEWHERE = ("out", "seeds", "resume", "data_dir", "device", "threads", "checkpoint_minutes", "count", "workers", "genotype")


@dataclass(frozen=True)
class TrainSettings:
    """The recipe of DARTS. The defaults are those of the papers for CIFAR-10 (SparseNAS trains its DARTS space 1200 epochs)."""

    out: Path = Path("runs/train")
    """Folder for everything that the training writes."""
    seeds: tuple[int, ...] = (0,)
    """One training for each; several get a folder each in --out."""
    resume: bool = False
    """Continue what is in --out."""
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
    device: str = "auto"
    threads: int = 0
    """CPU threads; 0 leaves the choice to PyTorch."""
    checkpoint_minutes: float = 5.0
    """A checkpoint is written after every epoch, and this often inside one."""

    def __post_init__(self) -> None:
        check(
            self,
            counts=("channels", "layers", "epochs", "batch"),
            amounts=("lr", "lr_min", "momentum", "weight_decay", "clip", "auxiliary", "cutout", "images", "valid_images"),
            shares=("drop_path", "smoothing"),
        )

    def plain(self) -> dict[str, Any]:
        """What the run computes, as numbers and strings."""
        return {k: v for k, v in asdict(self).items() if k not in ELSEWHERE}

    def rate(self, epoch: int) -> float:
        """The learning rate in an epoch."""
        done = epoch / self.epochs
        share = (1 + math.cos(math.pi * done)) / 2 if self.schedule == "cosine" else 1 - done
        return self.lr_min + (self.lr - self.lr_min) * share


@dataclass(frozen=True)
class GenotypeSettings(TrainSettings):
    """The recipe for the network of a genotype."""

    genotype: str = "DARTS_V2"
    """A published name (DARTS_V1, DARTS_V2, PDARTS, PC_DARTS, ISTA, ...) or a JSON file."""
    form: Literal["evaluation", "one_stage"] = "evaluation"
    """one_stage: batch norms after pools and identities too, as in the network that a one-stage search trains."""


@dataclass(frozen=True)
class CifarSettings(GenotypeSettings):
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
class ImageNetSettings(CifarSettings):
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


PRESETS = {
    "paper": CifarSettings(),
    "long": CifarSettings(epochs=1200),
    "small": CifarSettings(channels=12, layers=8, epochs=15, batch=64, images=10_000, drop_path=0.1, cutout=8),
}
IMAGENET_PRESETS = {
    "paper": ImageNetSettings(),
    "small": ImageNetSettings(channels=16, layers=8, epochs=30, batch=64, lr=0.05),
}


class Epochs(Protocol):
    def __len__(self) -> int: ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]: ...


Validation = Callable[[], Iterator[tuple[Tensor, Tensor]]]


def network(genotype: Genotype | Sequence[Genotype], settings: GenotypeSettings, classes: int) -> cnn.Discrete:
    """The network that is trained and counted."""
    sizes = (genotype, settings.channels, settings.layers, classes, settings.auxiliary > 0)
    return cnn.ImageNetNetwork(*sizes) if isinstance(settings, ImageNetSettings) else cnn.Network(*sizes, form=settings.form)


def count(genotype: Genotype, settings: CifarSettings) -> dict[str, int]:
    """{"parameters": ..., "macs": ...} of the network of a genotype, without its auxiliary head."""
    imagenet = isinstance(settings, ImageNetSettings)
    classes = settings.classes or (1000 if imagenet else data.SOURCES[settings.data].classes)
    net = network(genotype, replace(settings, auxiliary=0.0), classes)
    return cnn.count(net, (3, settings.pixels, settings.pixels) if isinstance(settings, ImageNetSettings) else (3, 32, 32))


def prepare(settings: TrainSettings, seed: int, device: torch.device, processes: Processes) -> tuple[Epochs, Validation, int]:
    """Training batches, validation batches and the number of classes."""
    share = processes.share
    if isinstance(settings, ImageNetSettings):
        train, valid = (folder.read(settings.data_dir, split) for split in ("train", "val"))
        if train.classes != valid.classes:
            raise ValueError(f"train and val of {settings.data_dir} must hold the same classes")
        batches = folder.FolderBatches(train, settings.batch, seed, settings.pixels, device, settings.workers, share)
        check = lambda: folder.whole(valid, settings.pixels, settings.batch, device, settings.workers, share)
        return batches, check, len(train.classes)
    dataset = data.load(settings.data, settings.data_dir).to(device)
    augment = data.Augment(dataset.mean, dataset.std, padding=4, cutout=settings.cutout)
    images = dataset.train.take(slice(settings.images or None))
    plain = data.Augment(dataset.mean, dataset.std)
    test = dataset.test.take(slice(settings.valid_images or None))
    check = lambda: data.whole(test, plain, share=share)
    return data.Batches(images, settings.batch, seed, augment, share=share), check, dataset.classes


class Recipe(Run):
    """The training of a network by the recipe, whatever the network."""

    table = "train.csv"

    def __init__(self, settings: TrainSettings, seed: int, out: Path, processes: Processes, device: torch.device) -> None:
        super().__init__(settings, seed, out, processes, device)
        self.data, self.validation, classes = prepare(settings, seed, device, processes)
        self.net = self.build(classes).to(device)
        self.net.drop_path = torch.zeros((), device=device)
        self.params = list(self.net.parameters())
        self.sgd = torch.optim.SGD(
            self.params, settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay, foreach=True
        )
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)

    def build(self, classes: int) -> Any:
        """The network: a module with a `drop_path` that returns the logits and those of its auxiliary head, or None."""
        raise TypeError(f"{type(self).__name__} does not say what it trains")

    def __len__(self) -> int:
        return len(self.data)

    def begin_epoch(self) -> None:
        s = self.settings
        self.sgd.param_groups[0]["lr"] = s.rate(self.epoch)
        self.net.drop_path.fill_(s.drop_path * self.epoch / s.epochs)
        self.net.train()

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.data.epoch(self.epoch, self.step)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.amp):
            return self.net(images)

    def take(self, batch: tuple[Tensor, Tensor]) -> None:
        s, (images, labels) = self.settings, batch
        logits, auxiliary = self.forward(images)
        total = loss = F.cross_entropy(logits.float(), labels, label_smoothing=s.smoothing)
        if auxiliary is not None:
            total = loss + s.auxiliary * F.cross_entropy(auxiliary.float(), labels, label_smoothing=s.smoothing)
        self.sgd.zero_grad()
        total.backward()
        self.update()
        n = len(labels)
        self.sums += torch.stack([loss.detach().double() * n, (logits.argmax(1) == labels).sum(), torch.full_like(loss, n)])

    def update(self) -> None:
        """One step of the parameters, whose gradients are there."""
        self.processes.average([p.grad for p in self.params if p.grad is not None])
        if self.settings.clip:
            nn.utils.clip_grad_norm_(self.params, self.settings.clip)
        self.sgd.step()

    def end_epoch(self) -> dict[str, Any]:
        self.processes.average_buffers(self.net)
        self.processes.total([self.sums])
        loss, correct, images = self.sums.tolist()
        self.sums.zero_()
        valid_loss, valid_accuracy, top5 = self.evaluate()
        return {
            "lr": self.sgd.param_groups[0]["lr"],
            "train_loss": loss / images,
            "train_accuracy": correct / images,
            "valid_loss": valid_loss,
            "valid_accuracy": valid_accuracy,
            "valid_top5": top5,
        }

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float, float]:
        """Loss, accuracy and top-5 accuracy on all validation images."""
        self.net.eval()
        sums = torch.zeros(4, dtype=torch.float64, device=self.device)
        for images, labels in self.validation():
            logits = self.forward(images)[0].float()
            loss = F.cross_entropy(logits, labels, reduction="sum").double()
            best = logits.topk(min(5, logits.shape[1]), 1).indices == labels[:, None]
            sums += torch.stack([loss, best[:, 0].sum(), best.any(1).sum(), torch.full_like(loss, len(labels))])
        self.processes.total([sums])
        loss_sum, top1, top5, n = sums.tolist()
        return loss_sum / n, top1 / n, top5 / n

    def finish(self) -> None:
        draw.save(draw.training(self.rows), self.out / "train.png")
        checkpoint.save(self.out / "network.pt", {k: v.cpu() for k, v in self.net.state_dict().items()})

    def state(self) -> dict[str, Any]:
        return {"net": self.net.state_dict(), "sgd": self.sgd.state_dict(), "sums": self.sums}

    def restore(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["net"])
        self.sgd.load_state_dict(state["sgd"])
        self.sums.copy_(state["sums"])


class Training(Recipe):
    """The training of a genotype, or of a network with one for each layer, with one seed."""

    kind = "training"

    def __init__(
        self,
        genotype: Genotype | Sequence[Genotype],
        settings: CifarSettings,
        seed: int,
        out: Path,
        processes: Processes,
        device: torch.device,
    ) -> None:
        self.genotype = genotype
        super().__init__(settings, seed, out, processes, device)

    def build(self, classes: int) -> cnn.Discrete:
        return network(self.genotype, self.settings, classes)

    def identity(self) -> dict[str, Any]:
        each = [self.genotype] if isinstance(self.genotype, Genotype) else self.genotype
        return {"architecture": "".join(g.to_json() for g in each), **super().identity()}
