"""CIFAR-10 and CIFAR-100 as tensors on the device, augmented there.

    data = load_cifar("cifar10", "data")
    augment = Augment(data.mean, data.std, padding=4, cutout=16)
    for images, labels in Batches(data.train, size=64, seed=0, augment=augment).epoch(3):

A batch depends on (seed, epoch, number) only: a resumed run continues with its next batch, and the ranks of a data-parallel run
take their shares of the same batch.
"""

from __future__ import annotations

import hashlib
import pickle
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..engine.distributed import WHOLE_BATCH, Share


@dataclass(frozen=True)
class Source:
    """The origin of a data set, its files and their md5 sums, and its statistics."""

    title: str
    url: str
    archive_md5: str
    folder: str
    train: tuple[tuple[str, str], ...]
    test: tuple[tuple[str, str], ...]
    label: bytes
    classes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


# Mean and standard deviation as in DARTS and, for CIFAR-100, as in P-DARTS.
SOURCES = {
    "cifar10": Source(
        "CIFAR-10",
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        "c58f30108f718f92721af3b95e74349a",
        "cifar-10-batches-py",
        (
            ("data_batch_1", "c99cafc152244af753f735de768cd75f"),
            ("data_batch_2", "d4bba439e000b95fd0a9bffe97cbabec"),
            ("data_batch_3", "54ebc095f3ab1f0389bbae665268c751"),
            ("data_batch_4", "634d18415352ddfa80567beed471001a"),
            ("data_batch_5", "482c414d41f54cd18b22e5b47cb7c3cb"),
        ),
        (("test_batch", "40351d587109b95175f43aff81a1287e"),),
        b"labels",
        10,
        (0.49139968, 0.48215827, 0.44653124),
        (0.24703233, 0.24348505, 0.26158768),
    ),
    "cifar100": Source(
        "CIFAR-100",
        "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        "eb9058c3a382ffc7106e4002c42a8d85",
        "cifar-100-python",
        (("train", "16019d7e3df5f24257cddd939b257f8d"),),
        (("test", "f0ef6b0ae62326f3e7ffdfab6717acfc"),),
        b"fine_labels",
        100,
        (0.5071, 0.4867, 0.4408),
        (0.2675, 0.2565, 0.2761),
    ),
}


PACKED = ".npz"  # the suffix of files that `pack` writes


class Images(NamedTuple):
    """Images, uint8 (N, 3, H, W), and their labels, int64 (N,)."""

    images: Tensor
    labels: Tensor

    def to(self, device: torch.device | str) -> Images:
        return Images(self.images.to(device), self.labels.to(device))

    def select(self, which: slice) -> Images:
        return Images(self.images[which], self.labels[which])


@dataclass(frozen=True)
class Dataset:
    """A data set. mean, std: of each channel, for pixels in [0, 1]."""

    name: str
    train: Images
    test: Images
    classes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def to(self, device: torch.device | str) -> Dataset:
        return replace(self, train=self.train.to(device), test=self.test.to(device))


def load_cifar(name: str, data_dir: str | Path) -> Dataset:
    """Read a data set from `data_dir`, after downloading it if it is missing, or a part of it from a file that `pack` wrote.

    Every published file is checked against its published md5 before it is parsed.

    Raises:
      ValueError: an unknown name, or a damaged file.
      FileNotFoundError: the data are missing and could not be downloaded; the message gives the address and the place.
    """
    if name not in SOURCES:
        raise ValueError(f"data must be one of {', '.join(SOURCES)}, got {name!r}")
    source, folder = SOURCES[name], Path(data_dir)
    if folder.suffix == PACKED:
        return _unpack(name, folder)
    if folder.name != source.folder:
        folder = folder / source.folder
    if not all((folder / file).is_file() for file, _ in source.train + source.test):
        _download(source, folder.parent)
    parts = [_read(folder, files, source) for files in (source.train, source.test)]
    return Dataset(name, parts[0], parts[1], source.classes, source.mean, source.std)


def _download(source: Source, root: Path) -> None:
    import pooch

    try:
        root.mkdir(parents=True, exist_ok=True)
        unpack = pooch.Untar(extract_dir=".")
        pooch.retrieve(source.url, f"md5:{source.archive_md5}", path=root, processor=unpack, progressbar=True)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{source.title} is not in {root / source.folder} and could not be downloaded ({error}). "
            f"Get {source.url}, unpack it, and pass the folder that contains {source.folder} as --data-dir"
        ) from error


def _read(folder: Path, files: tuple[tuple[str, str], ...], source: Source) -> Images:
    images, labels = [], []
    for name, md5 in files:
        content = (folder / name).read_bytes()
        found = hashlib.md5(content).hexdigest()
        if found != md5:
            raise ValueError(
                f"{folder / name} must have the md5 {md5}, got {found}: the file is damaged; delete it to download it again"
            )
        batch = pickle.loads(content, encoding="bytes")  # safe: the md5 shows that these are the published bytes
        images.append(np.asarray(batch[b"data"], np.uint8).reshape(-1, 3, 32, 32))
        labels.append(np.asarray(batch[source.label], np.int64))
    return Images(torch.from_numpy(np.concatenate(images)), torch.from_numpy(np.concatenate(labels)))


def pack(dataset: Dataset, count: int, file: Path, test: int) -> None:
    """Write the first `count` images of a data set, `test` of them test images, to a file for `load_cifar`.

    Images and labels keep the order of the data set, so a search that uses no more of them gets the same images as from the
    whole data set. Compression would save only a tenth and is left out.

    Raises:
      ValueError: more images than the data set has, no training or no test images, or a file name that does not end in .npz.
    """
    parts = {"train": (dataset.train, count - test), "test": (dataset.test, test)}
    if file.suffix != PACKED:
        raise ValueError(f"the name of the file must end in {PACKED}, got {file}")
    for name, (images, wanted) in parts.items():
        if not 0 < wanted <= len(images.labels):
            raise ValueError(f"images to {name} must lie in [1, {len(images.labels)}], got {wanted} of {count}")
    arrays: dict[str, np.ndarray] = {"name": np.array(dataset.name)}
    for name, (images, wanted) in parts.items():
        arrays[f"{name}_images"] = images.images[:wanted].cpu().numpy()
        arrays[f"{name}_labels"] = images.labels[:wanted].to("cpu", torch.uint8).numpy()
        arrays[f"{name}_of"] = np.array(len(images.labels))
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez(file, **arrays)  # type: ignore[arg-type]


def _unpack(name: str, file: Path) -> Dataset:
    if not file.is_file():
        raise FileNotFoundError(f"no file {file} of packed images: `python benchmarks/gpu.py --pack 16000 {file}` writes one")
    try:
        with np.load(file, allow_pickle=False) as found:
            arrays = {key: found[key] for key in found.files}  # the zip format verifies a checksum of each
        stored = str(arrays["name"])
        parts = [(arrays[f"{part}_images"], arrays[f"{part}_labels"], int(arrays[f"{part}_of"])) for part in ("train", "test")]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file} must contain packed images, but could not be read: {error}") from None
    source = SOURCES[name]
    if stored != name:
        raise ValueError(f"{file} must contain {name}, got {stored}")
    for images, labels, _ in parts:
        fits = images.ndim == 4 and images.shape[1:] == (3, 32, 32) and labels.shape == images.shape[:1] and len(labels) > 0
        if not fits or images.dtype != np.uint8 or labels.dtype != np.uint8 or labels.max() >= source.classes:
            raise ValueError(
                f"{file} must contain bytes (N, 3, 32, 32) and as many labels below {source.classes}, got {images.dtype} of shape"
                f" {images.shape} and {labels.dtype} of shape {labels.shape}"
            )
    (train, _, every), (test, _, every_test) = parts
    print(
        f"{source.title}, a part: {len(train)} of {every} images to train and {len(test)} of {every_test} to test, from {file},"
        " which has no published md5",
        file=sys.stderr,
    )
    made = [Images(torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))) for images, labels, _ in parts]
    return Dataset(name, made[0], made[1], source.classes, source.mean, source.std)


@dataclass(frozen=True)
class Augment:
    """Convert uint8 images to normalised floats, and augment them.

    padding: take a random crop of the image padded by so many pixels, and flip it at random; 0: neither. cutout: set a square
    of this side at a random place to 0, clipped at the border (DeVries and Taylor, 2017); 0: none.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    padding: int = 0
    cutout: int = 0

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
        scale = torch.tensor(self.std, device=device).mul(255).reciprocal()
        shift = -torch.tensor(self.mean, device=device) / torch.tensor(self.std, device=device)
        out = images * scale[:, None, None] + shift[:, None, None]
        if self.cutout:
            y, x = draw(height) - self.cutout // 2, draw(width) - self.cutout // 2
            rows, columns = torch.arange(height, device=device)[:, None], torch.arange(width, device=device)
            inside = (rows >= y) & (rows < y + self.cutout) & (columns >= x) & (columns < x + self.cutout)
            out = out.masked_fill(inside, 0.0)
        return out.contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Batches:
    """Shuffled, augmented batches of images. stream: a number for independent random numbers of several sets in a run."""

    data: Images
    size: int
    seed: int
    augment: Augment
    stream: int = 0
    share: Share = WHOLE_BATCH

    def __post_init__(self) -> None:
        if not 0 < self.size <= len(self.data.labels):
            raise ValueError(f"batch must lie in [1, {len(self.data.labels)}], the number of images, got {self.size}")
        if self.size % self.share.world:
            raise ValueError(f"batch must be a multiple of the {self.share.world} processes, got {self.size}")

    def __len__(self) -> int:
        """The number of batches of an epoch; an incomplete last batch is dropped."""
        return len(self.data.labels) // self.size

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch from number `start` on."""
        order = torch.randperm(len(self.data.labels), generator=self._generator("cpu", epoch, 0)).to(self.data.images.device)
        for number in range(start, len(self)):
            yield self._batch(order, epoch, number)

    def _batch(self, order: Tensor, epoch: int, number: int) -> tuple[Tensor, Tensor]:
        which = order[number * self.size : (number + 1) * self.size]
        generator = self._generator(self.data.images.device, epoch, number + 1)
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
