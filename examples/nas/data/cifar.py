"""CIFAR-10, CIFAR-100 or own images as tensors on the device, augmented there.

    data = load_cifar("cifar10", "data")
    augment = Augment(data.mean, data.std, padding=4, cutout=16)
    for images, labels in Batches(data.train, size=64, seed=0, augment=augment).epoch(3):

A batch depends on (seed, epoch, number) only: a resumed run continues with its next batch, and the ranks of a data-parallel run
take their shares of the same batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..engine.distributed import WHOLE_BATCH, Share
from . import cifar_files, image_sets


class Images(NamedTuple):
    """Images, uint8 (N, C, H, W), and their labels, int64 (N,)."""

    images: Tensor
    labels: Tensor

    def to(self, device: torch.device | str) -> Images:
        return Images(self.images.to(device), self.labels.to(device))

    def select(self, which: slice) -> Images:
        return Images(self.images[which], self.labels[which])


@dataclass(frozen=True)
class Dataset(cifar_files.Dataset):
    """A data set as tensors."""

    train: Images  # type: ignore[assignment]
    test: Images  # type: ignore[assignment]

    def to(self, device: torch.device | str) -> Dataset:
        return replace(self, train=self.train.to(device), test=self.test.to(device))


def load_cifar(name: str, data_dir: str | Path) -> Dataset:
    """Read a data set into tensors. Arguments and errors as those of `cifar_files.read_cifar`."""
    return _as_tensors(cifar_files.read_cifar(name, data_dir))


def load_images(name: str, data_dir: str | Path, pixels: int = 0) -> Dataset:
    """Read cifar10 or cifar100, or with the name "folder" own images, into tensors.

    pixels: the side to which images are reduced; 0: as they are. Errors as those of `image_sets`.
    """
    if name == image_sets.FOLDER or pixels:
        return _as_tensors(image_sets.read_images(name, data_dir, pixels))
    return load_cifar(name, data_dir)


def _as_tensors(read: cifar_files.Dataset) -> Dataset:
    train, test = (Images(*map(torch.from_numpy, part)) for part in (read.train, read.test))
    return Dataset(read.name, train, test, read.classes, read.mean, read.std, read.note, read.fingerprint)


@dataclass(frozen=True)
class Augment:
    """Convert uint8 images to normalised floats, and augment them.

    padding: take a random crop of the image padded by so many pixels, and flip it at random; 0: neither. cutout: set a square
    of this side at a random place to 0, clipped at the border (DeVries and Taylor, 2017); 0: none. cutout_share: the
    probability with which an image has such a square.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    padding: int = 0
    cutout: int = 0
    cutout_share: float = 1.0

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        n, _, height, width = images.shape
        device = images.device
        draw = lambda high: torch.randint(high, (n, 1, 1, 1), generator=generator, device=device)
        if self.padding:
            top, left, flip = draw(2 * self.padding + 1), draw(2 * self.padding + 1), draw(2)
            rows = top + torch.arange(height, device=device)[:, None]
            columns = torch.arange(width, device=device)
            columns = left + torch.where(flip == 1, width - 1 - columns, columns)
            images = F.pad(images, (self.padding,) * 4)
            number, channel = (torch.arange(k, device=device) for k in images.shape[:2])
            images = images[number[:, None, None, None], channel[:, None, None], rows, columns]
        mean, std = _channels(self.mean, device), _channels(self.std, device)
        scale, shift = std.mul(255).reciprocal(), -mean / std
        out = images * scale[:, None, None] + shift[:, None, None]
        if self.cutout:
            y, x = draw(height) - self.cutout // 2, draw(width) - self.cutout // 2
            rows, columns = torch.arange(height, device=device)[:, None], torch.arange(width, device=device)
            inside = (rows >= y) & (rows < y + self.cutout) & (columns >= x) & (columns < x + self.cutout)
            if self.cutout_share < 1:
                inside &= torch.rand((n, 1, 1, 1), generator=generator, device=device) < self.cutout_share
            out = out.masked_fill(inside, 0.0)
        return out.contiguous(memory_format=torch.channels_last)


def _channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """The values on a device, filled in there: a copy from the host would wait for everything queued on it."""
    return torch.stack([torch.full((), value, device=device) for value in values])


@dataclass(frozen=True)
class Batches:
    """Shuffled, augmented batches of images.

    stream: a number for independent random numbers of several sets in a run. steps: the number of batches of an epoch; 0: one
    pass through the images. Otherwise epochs go on where the last one ended, so that every image is drawn once before any is
    again.
    """

    data: Images
    size: int
    seed: int
    augment: Augment
    stream: int = 0
    share: Share = WHOLE_BATCH
    steps: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.size <= len(self.data.labels):
            raise ValueError(f"batch must lie in [1, {len(self.data.labels)}], the number of images, got {self.size}")
        if self.size % self.share.world:
            raise ValueError(f"batch must be a multiple of the {self.share.world} processes, got {self.size}")

    def __len__(self) -> int:
        """The number of batches of an epoch."""
        return self.steps or self._in_pass

    @property
    def _in_pass(self) -> int:
        """The number of batches of a pass through the images; an incomplete last batch is dropped."""
        return len(self.data.labels) // self.size

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch from number `start` on."""
        drawn, order = -1, torch.empty(0)
        for place in range(epoch * len(self) + start, (epoch + 1) * len(self)):
            through, number = divmod(place, self._in_pass)
            if through != drawn:
                drawn, order = through, self._order(through)
            yield self._batch(order, through, number)

    def _order(self, through: int) -> Tensor:
        """The order of the images in a pass."""
        return torch.randperm(len(self.data.labels), generator=self._generator("cpu", through, 0)).to(self.data.images.device)

    def _batch(self, order: Tensor, through: int, number: int) -> tuple[Tensor, Tensor]:
        which = order[number * self.size : (number + 1) * self.size]
        generator = self._generator(self.data.images.device, through, number + 1)
        images = self.augment(self.data.images[which], generator)
        own = slice(self.share.rank, None, self.share.world)
        return images[own], self.data.labels[which][own]

    def _generator(self, device: torch.device | str, *place: int) -> torch.Generator:
        words = np.random.SeedSequence((self.seed, self.stream, *place)).generate_state(1, np.uint64)
        return torch.Generator(device).manual_seed(int(words[0]))


def evaluation_batches(
    data: Images, augment: Augment, size: int = 500, share: Share = WHOLE_BATCH
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield all images in order, for evaluation. Each process gets its share."""
    images, labels = data.images[share.rank :: share.world], data.labels[share.rank :: share.world]
    for part, own in zip(images.split(size), labels.split(size)):
        yield augment(part), own
