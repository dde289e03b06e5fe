"""Training of convolutional networks: cosine or linear schedule, drop path, auxiliary head, resumable."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data import cifar, cifar_files, image_folder
from ..engine import checkpoint, curves
from ..engine.distributed import SINGLE_PROCESS, Processes
from ..engine.loop import checkpoint_exists
from ..engine.run import Run, all_finite
from ..nets.torch import cnn
from ..space import drawing
from ..space.genotype import Genotype
from .settings import CifarTrainSettings, GenotypeTrainSettings, ImageNetTrainSettings, ImageTrainSettings
from .weights import read_weights


class Epochs(Protocol):
    def __len__(self) -> int: ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]: ...


Validation = Callable[[], Iterator[tuple[Tensor, Tensor]]]


def image_network(genotype: Genotype | Sequence[Genotype], settings: GenotypeTrainSettings, classes: int) -> cnn.Discrete:
    """The network of a genotype, or of one for each layer."""
    sizes = (genotype, settings.channels, settings.layers, classes, settings.auxiliary > 0)
    return cnn.ImageNetNetwork(*sizes) if isinstance(settings, ImageNetTrainSettings) else cnn.Network(*sizes, form=settings.form)


def start_network(
    genotype: Genotype | Sequence[Genotype], settings: GenotypeTrainSettings, classes: int, out: Path
) -> cnn.Discrete:
    """The network before its training, with the weights of `settings.start` unless a checkpoint in `out` replaces them."""
    net = image_network(genotype, settings, classes)
    if settings.start is not None and not checkpoint_exists(out, "torch"):
        net.load_state_dict(read_weights(settings.start, net))
    return net


def size_of_genotype(genotype: Genotype, settings: CifarTrainSettings) -> dict[str, int]:
    """Count the parameters and multiply-adds ("macs") of the network of a genotype, without its auxiliary head."""
    if isinstance(settings, ImageNetTrainSettings):
        classes, pixels = 1000, settings.pixels
    else:
        classes, pixels = cifar_files.SOURCES[settings.data].classes, 32
    net = image_network(genotype, replace(settings, auxiliary=0.0), settings.classes or classes)
    return cnn.network_size(net, (3, pixels, pixels))


def prepare_data(
    settings: ImageTrainSettings, seed: int, device: torch.device, processes: Processes
) -> tuple[Epochs, Validation, int]:
    """The training batches, a function that yields the validation batches, and the number of classes."""
    share = processes.share
    if isinstance(settings, ImageNetTrainSettings):
        train, valid = (image_folder.read_folder(settings.data_dir, split) for split in ("train", "val"))
        if train.classes != valid.classes:
            raise ValueError(f"train and val of {settings.data_dir} must contain the same classes")
        batches = image_folder.FolderBatches(train, settings.batch, seed, settings.pixels, device, settings.workers, share)
        check = lambda: image_folder.folder_evaluation_batches(
            valid, settings.pixels, settings.batch, device, settings.workers, share
        )
        return batches, check, len(train.classes)
    dataset = cifar.load_cifar(settings.data, settings.data_dir).to(device)
    augment = cifar.Augment(dataset.mean, dataset.std, padding=4, cutout=settings.cutout)
    cifar_files.check_counts(dataset, settings.images, settings.valid_images)
    images = dataset.train.select(slice(settings.images or None))
    plain = cifar.Augment(dataset.mean, dataset.std)
    test = dataset.test.select(slice(settings.valid_images or None))
    check = lambda: cifar.evaluation_batches(test, plain, share=share)
    return cifar.Batches(images, settings.batch, seed, augment, share=share), check, dataset.classes


@torch.no_grad()
def measures(
    logits_of: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    processes: Processes = SINGLE_PROCESS,
) -> tuple[float, float, float]:
    """Compute loss, accuracy and top-5 accuracy on all images. logits_of: the network. batches: those of this process."""
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    for images, labels in batches:
        logits = logits_of(images).float()
        loss = F.cross_entropy(logits, labels, reduction="sum").double()
        best = logits.topk(min(5, logits.shape[1]), 1).indices == labels[:, None]
        sums += torch.stack([loss, best[:, 0].sum(), best.any(1).sum(), torch.full_like(loss, len(labels))])
    processes.total([sums])
    loss_sum, top1, top5, n = sums.tolist()
    return loss_sum / n, top1 / n, top5 / n


class ImageTraining(Run):
    """A training by the recipe of `ImageTrainSettings`. Subclasses build the network."""

    table = "train.csv"

    def __init__(self, settings: ImageTrainSettings, seed: int, out: Path, processes: Processes, device: torch.device) -> None:
        super().__init__(settings, seed, out, processes, device)
        self.data, self.validation, classes = prepare_data(settings, seed, device, processes)
        self.net = self.build(classes).to(device)
        self.net.drop_path = torch.zeros((), device=device)
        self.params = list(self.net.parameters())
        self.sgd = torch.optim.SGD(
            self.params, settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay, foreach=True
        )
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)

    def build(self, classes: int) -> Any:
        """Build the network: a module with an attribute `drop_path`, whose result is (logits, auxiliary logits or None)."""
        raise TypeError(f"{type(self).__name__} must define build")

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

    def train_step(self, batch: tuple[Tensor, Tensor]) -> None:
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
        """Update the parameters, whose gradients have been computed."""
        self.processes.average([p.grad for p in self.params if p.grad is not None])
        if self.settings.clip:
            nn.utils.clip_grad_norm_(self.params, self.settings.clip)
        self.sgd.step()

    def end_epoch(self) -> dict[str, Any]:
        self.processes.average_buffers(self.net)
        self.processes.total([self.sums])
        loss, correct, images = self.sums.tolist()
        self.sums.zero_()
        self.check_finite("train", loss / images)
        valid_loss, valid_accuracy, top5 = self.evaluate()
        self.check_finite("valid", valid_loss)
        return {
            "lr": self.sgd.param_groups[0]["lr"],
            "train_loss": loss / images,
            "train_accuracy": correct / images,
            "valid_loss": valid_loss,
            "valid_accuracy": valid_accuracy,
            "valid_top5": top5,
        }

    def is_finite(self) -> bool:
        return bool(self.sums[0].isfinite()) and all_finite(self.params)

    def evaluate(self) -> tuple[float, float, float]:
        """Compute loss, accuracy and top-5 accuracy on all validation images."""
        self.net.eval()
        return measures(lambda images: self.forward(images)[0], self.validation(), self.device, self.processes)

    def finish(self) -> None:
        evaluated = "validation images" if isinstance(self.settings, ImageNetTrainSettings) else "test images"
        drawing.save(curves.training(self.rows, evaluated), self.out / "train.png")
        checkpoint.save_network(self.out / "network.pt", self.net)

    def state(self) -> dict[str, Any]:
        return {"net": self.net.state_dict(), "sgd": self.sgd.state_dict(), "sums": self.sums}

    def restore(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["net"])
        self.sgd.load_state_dict(state["sgd"])
        self.sums.copy_(state["sums"])


class GenotypeTraining(ImageTraining):
    """The training of the network of a genotype, or of one for each layer, with one seed."""

    kind, command = "training", "train_cifar10"

    def __init__(
        self,
        genotype: Genotype | Sequence[Genotype],
        settings: CifarTrainSettings,
        seed: int,
        out: Path,
        processes: Processes,
        device: torch.device,
    ) -> None:
        self.genotype = genotype
        super().__init__(settings, seed, out, processes, device)

    def build(self, classes: int) -> cnn.Discrete:
        return start_network(self.genotype, self.settings, classes, self.out)

    def write_settings(self) -> None:
        super().write_settings()
        if isinstance(self.genotype, Genotype):
            self.genotype.save(self.out / "genotype.json")

    def description(self) -> dict[str, Any]:
        return {**super().description(), "imagenet": isinstance(self.settings, ImageNetTrainSettings)}

    def identity(self) -> dict[str, Any]:
        each = [self.genotype] if isinstance(self.genotype, Genotype) else self.genotype
        return {"architecture": "".join(g.to_json() for g in each), **super().identity()}
