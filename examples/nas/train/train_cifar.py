"""Training of convolutional networks by the recipe of `ImageTrainSettings`, and the counts of their size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data import cifar, cifar_files, image_files, image_folder, image_sets
from ..engine import checkpoint, curves, report
from ..engine.distributed import SINGLE_PROCESS, Processes
from ..engine.loop import checkpoint_exists
from ..engine.run import Run, all_finite
from ..nets.torch import cnn, nasbench201
from ..space import drawing
from ..space.amounts import grouped
from ..space.genotype import AnyGenotype, CellGenotype, Genotype
from .settings import CifarTrainSettings, GenotypeTrainSettings, ImageNetTrainSettings, ImageTrainSettings
from .weights import read_weights


class Epochs(Protocol):
    def __len__(self) -> int: ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]: ...


AUXILIARY_SIDES = (32, 36, 40)  # of images for which the last map of the auxiliary head of the papers is 2x2
Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation of each channel, for pixels in [0, 1]
Validation = Callable[[], Iterator[tuple[Tensor, Tensor]]]


class Prepared(NamedTuple):
    """The data of a training: its batches, a function that yields the validation batches, and what they are.

    channels: of the images. text: for the header. identity: what identifies the data in a checkpoint, besides the settings.
    """

    batches: Epochs
    validation: Validation
    classes: int
    channels: int
    text: str
    identity: dict[str, Any]
    statistics: Statistics


ImageGenotype = Genotype | CellGenotype


def image_network(
    genotype: ImageGenotype | Sequence[Genotype], settings: GenotypeTrainSettings, classes: int, image_channels: int = 3
) -> cnn.Discrete | nasbench201.Network:
    """The network of a genotype, or of one for each layer.

    Raises:
      ValueError: settings that a network of NAS-Bench-201 does not have.
    """
    if isinstance(genotype, CellGenotype):
        refuse_darts_settings(settings)
        return nasbench201.Network(genotype, settings.channels, settings.layers, classes, image_channels=image_channels)
    sizes = (genotype, settings.channels, settings.layers, classes, settings.auxiliary > 0)
    if isinstance(settings, ImageNetTrainSettings):
        return cnn.ImageNetNetwork(*sizes)
    return cnn.Network(*sizes, form=settings.form, image_channels=image_channels)


def refuse_darts_settings(settings: GenotypeTrainSettings) -> None:
    """Raise ValueError for settings that belong to networks of cells of DARTS."""
    if isinstance(settings, ImageNetTrainSettings):
        raise ValueError("genotype must be a cell of DARTS with --imagenet, got one of NAS-Bench-201")
    for name, needed in (("auxiliary", 0.0), ("form", "evaluation")):
        if getattr(settings, name) != needed:
            raise ValueError(
                f"{name} must be {needed} for a cell of NAS-Bench-201, got {getattr(settings, name)}: --preset nasbench201"
            )


def start_network(
    genotype: ImageGenotype | Sequence[Genotype], settings: GenotypeTrainSettings, classes: int, out: Path, image_channels: int
) -> cnn.Discrete | nasbench201.Network:
    """The network before its training, with the weights of `settings.start` unless a checkpoint in `out` replaces them."""
    net = image_network(genotype, settings, classes, image_channels)
    if settings.start is not None and not checkpoint_exists(out, "torch"):
        net.load_state_dict(read_weights(settings.start, net))
    return net


def size_of_genotype(genotype: ImageGenotype, settings: CifarTrainSettings) -> dict[str, int]:
    """Count the parameters and multiply-adds ("macs") of the network of a genotype, without its auxiliary head."""
    if isinstance(settings, ImageNetTrainSettings):
        classes, shape = 1000, (3, settings.pixels, settings.pixels)
    elif settings.data == image_sets.FOLDER:
        dataset = image_sets.read_images(settings.data, settings.data_dir)
        classes, shape = dataset.classes, dataset.train.images.shape[1:]
    else:
        classes, shape = cifar_files.SOURCES[settings.data].classes, (3, 32, 32)
    net = image_network(genotype, replace(settings, auxiliary=0.0), settings.classes or classes, shape[0])
    return cnn.network_size(net, shape)


def prepare_data(
    settings: ImageTrainSettings, seed: int, device: torch.device, processes: Processes, statistics: Statistics | None = None
) -> Prepared:
    """The data of a training. Errors as those of `image_sets` and `image_files`.

    statistics: by which small images are normalised; None: those of the data.
    """
    if isinstance(settings, ImageNetTrainSettings):
        return _large_images(settings, seed, device, processes)
    share = processes.share
    pixels, augmented = getattr(settings, "pixels", 0), getattr(settings, "augment", True)  # of searches only
    dataset = cifar.load_images(settings.data, settings.data_dir, pixels)
    refuse_auxiliary(getattr(settings, "auxiliary", 0.0), dataset.train.images.shape[2:])
    parts = image_sets.training_parts(dataset, settings.images, settings.valid_images, settings.hold_out)
    train, valid = (part.to(device) for part in parts)
    statistics = statistics or (dataset.mean, dataset.std)
    augment = cifar.Augment(*statistics, image_sets.crop_padding(pixels, augmented), settings.cutout)
    plain = cifar.Augment(*statistics)
    batches = cifar.Batches(train, settings.batch, seed, augment, 0, share, getattr(settings, "epoch_steps", 0))
    check = lambda: cifar.evaluation_batches(valid, plain, share=share)
    text = image_sets.describe_training(dataset, train, valid, settings.hold_out)
    return Prepared(batches, check, dataset.classes, len(dataset.mean), text, image_sets.identity(dataset), statistics)


def _large_images(settings: ImageNetTrainSettings, seed: int, device: torch.device, processes: Processes) -> Prepared:
    s, share = settings, processes.share
    train, valid = (image_files.read_folder(s.data_dir, split) for split in ("train", "val"))
    image_files.refuse_other_classes(s.data_dir, train, valid)
    batches = image_folder.FolderBatches(train, s.batch, seed, s.pixels, device, s.workers, share)
    check = lambda: image_folder.folder_evaluation_batches(valid, s.pixels, s.batch, device, s.workers, share)
    counts = f"{grouped(len(train.files))} images to train on, {grouped(len(valid.files))} to validate on"
    text = f"{s.data_dir}: {counts}, crops of {s.pixels}x{s.pixels} pixels, {len(train.classes)} classes"
    return Prepared(batches, check, len(train.classes), 3, text, {}, (image_folder.MEAN, image_folder.STD))


def takes_auxiliary(size: Sequence[int]) -> bool:
    """Whether images of this height and width suit the auxiliary head of the papers."""
    return all(side in AUXILIARY_SIDES for side in size)


def refuse_auxiliary(auxiliary: float, size: Sequence[int]) -> None:
    """Raise ValueError for images that the auxiliary head of the papers cannot take."""
    if auxiliary and not takes_auxiliary(size):
        raise ValueError(
            f"auxiliary must be 0 for images of {size[0]}x{size[1]} pixels, as the auxiliary head is made for sides of 32, 36 or"
            f" 40 pixels, got {auxiliary:g}"
        )


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
        self.prepared = prepare_data(settings, seed, device, processes)
        self.data, self.validation = self.prepared.batches, self.prepared.validation
        self.image_channels = self.prepared.channels
        self.net = self.build(self.prepared.classes).to(device)
        # without drop path, networks of DARTS draw masks of ones all the same: earlier runs did, and must resume
        draws = settings.drop_path > 0 or not isinstance(self.net, (nasbench201.Network, nasbench201.Supernet))
        self.net.drop_path = torch.zeros((), device=device) if draws else 0.0
        self.params = list(self.net.parameters())
        options = {"momentum": settings.momentum, "nesterov": settings.nesterov, "weight_decay": settings.weight_decay}
        self.sgd = torch.optim.SGD(self.params, settings.lr, foreach=True, **options)
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)

    def build(self, classes: int) -> Any:
        """Build the network: a module with an attribute `drop_path`, whose result is (logits, auxiliary logits or None)."""
        raise TypeError(f"{type(self).__name__} must define build")

    def data_text(self) -> str:
        return self.prepared.text

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), **self.prepared.identity}

    def description(self) -> dict[str, Any]:
        return {**super().description(), "statistics": self.prepared.statistics}

    def __len__(self) -> int:
        return len(self.data)

    def begin_epoch(self) -> None:
        s = self.settings
        self.sgd.param_groups[0]["lr"] = s.rate(self.epoch)
        if isinstance(self.net.drop_path, Tensor):
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
        self.draw_curves()
        checkpoint.save_network(self.out / "network.pt", self.net)

    def draw_curves(self) -> None:
        evaluated = report.evaluation_images(self.settings.plain())
        drawing.save(curves.training(self.rows, evaluated), self.out / "train.png")

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
        genotype: ImageGenotype | Sequence[Genotype],
        settings: CifarTrainSettings,
        seed: int,
        out: Path,
        processes: Processes,
        device: torch.device,
    ) -> None:
        self.genotype = genotype
        super().__init__(settings, seed, out, processes, device)

    def build(self, classes: int) -> cnn.Discrete | nasbench201.Network:
        return start_network(self.genotype, self.settings, classes, self.out, self.image_channels)

    def title(self) -> str:
        return f"the network of {self.settings.genotype}"

    def write_settings(self) -> None:
        super().write_settings()
        if isinstance(self.genotype, AnyGenotype):
            self.genotype.save(self.out / "genotype.json")

    def description(self) -> dict[str, Any]:
        return {**super().description(), "imagenet": isinstance(self.settings, ImageNetTrainSettings)}

    def identity(self) -> dict[str, Any]:
        each = [self.genotype] if isinstance(self.genotype, AnyGenotype) else self.genotype
        return {"architecture": "".join(g.to_json() for g in each), **super().identity()}
