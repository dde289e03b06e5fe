"""The files of CIFAR-10 and CIFAR-100 as NumPy arrays: downloaded, checked, and packed in parts.

data = read_cifar("cifar10", "data")
data.train.images, data.train.labels        # uint8 (50000, 3, 32, 32), int64 (50000,)
"""

from __future__ import annotations

import hashlib
import pickle
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..space.amounts import grouped, plural


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
    """Images, uint8 (N, C, H, W), and their labels, int64 (N,)."""

    images: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Dataset:
    """A data set.

    mean, std: of each channel, for pixels in [0, 1]. note: where the test images come from, if they are not published.
    fingerprint: a hash of all images that are not published.
    """

    name: str
    train: Images
    test: Images
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    note: str = ""
    fingerprint: str = ""


def read_cifar(name: str, data_dir: str | Path) -> Dataset:
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


def describe(dataset: Any, train: int, valid: int, note: str) -> str:
    """The sizes of a data set, to be printed. train, valid: the numbers of images in use. note: where the latter come from."""
    channels, height, width = dataset.train.images.shape[1:]
    parts = f"{grouped(train)} images to train on, {grouped(valid)} to validate on{note and f' ({note})'}"
    return f"{dataset.name}: {parts}, {height}x{width} pixels of {plural(channels, 'channel')}, {dataset.classes} classes"


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
    return Images(np.concatenate(images), np.concatenate(labels))


def pack(dataset: Dataset, count: int, file: Path, test: int) -> None:
    """Write the first `count` images of a data set, `test` of them test images, to a file for `read_cifar`.

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
        arrays[f"{name}_images"] = images.images[:wanted]
        arrays[f"{name}_labels"] = images.labels[:wanted].astype(np.uint8)
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
    made = [Images(images, labels.astype(np.int64)) for images, labels, _ in parts]
    return Dataset(name, made[0], made[1], source.classes, source.mean, source.std)
