"""The data sets of images by name, and the parts of them that a search or a training uses, whatever library computes it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from . import cifar_files, image_files

FOLDER = "folder"


def read_images(name: str, data_dir: str | Path, pixels: int = 0) -> cifar_files.Dataset:
    """Read cifar10 or cifar100 (`cifar_files.read_cifar`), or with the name "folder" own images (`image_files`).

    pixels: the side to which images are reduced (`reduced`); 0: as they are.
    """
    found = image_files.read_image_files(data_dir) if name == FOLDER else cifar_files.read_cifar(name, data_dir)
    return reduced(found, pixels) if pixels else found


def reduced(dataset: cifar_files.Dataset, pixels: int) -> cifar_files.Dataset:
    """The data set with images of `pixels` x `pixels`, each pixel the rounded mean of a square of the original ones.

    The mean and standard deviation of the channels become those of the reduced training images.

    Raises:
      ValueError: images are not square, `pixels` is not divisible by 4, or the side is not a multiple of it.
    """
    height, width = dataset.train[0].shape[2:]
    if height != width or pixels % 4 or height % pixels:
        raise ValueError(
            f"pixels must be divisible by 4 and divide the side of square images, got {pixels} for {height}x{width} pixels"
        )
    reduce = lambda part: part._replace(images=averaged(part.images, height // pixels))
    train, test = reduce(dataset.train), reduce(dataset.test)
    counts = [np.bincount(channel.ravel(), minlength=256) for channel in train[0].transpose(1, 0, 2, 3)]
    levels = np.arange(256) / 255
    means = [float((count * levels).sum() / count.sum()) for count in counts]
    spreads = [float(np.sqrt((count * (levels - mean) ** 2).sum() / count.sum())) for count, mean in zip(counts, means)]
    return replace(dataset, train=train, test=test, mean=tuple(means), std=tuple(spreads))


def averaged(images: np.ndarray, factor: int) -> np.ndarray:
    """The rounded means of squares of factor x factor pixels. images: uint8 (N, C, H, W)."""
    total = np.zeros((*images.shape[:2], images.shape[2] // factor, images.shape[3] // factor), np.uint32)
    for row in range(factor):
        for column in range(factor):
            total += images[:, :, row::factor, column::factor]
    return ((total + factor**2 // 2) // factor**2).astype(np.uint8)


def crop_padding(pixels: int, augment: bool = True) -> int:
    """The padding of random crops: 4 pixels, as published, and in proportion for images reduced to `pixels`.

    augment: False gives 0, with which images are neither cropped nor flipped.
    """
    if not augment:
        return 0
    return max(pixels // 8, 1) if pixels else 4


def search_halves(dataset: Any, images: int, batch: int) -> tuple[Any, Any]:
    """The images for the network weights, and as many for the architecture.

    images: to use of the training images; of a folder all if there are fewer.

    Raises:
      ValueError: more images than CIFAR has, or halves that are smaller than a batch.
    """
    used = _used(dataset, "images", images, dataset.train)
    half = used // 2
    if batch > half:
        raise ValueError(f"batch must lie in [1, {half}], a half of the {used} images, got {batch}")
    return part_of(dataset.train, 0, half), part_of(dataset.train, half, 2 * half)


def search_single(dataset: Any, images: int, batch: int, valid_images: int) -> tuple[Any, Any]:
    """The images for the network weights and the architecture together, and those behind them for the evaluations.

    images: to use of the training images, evaluations included; of a folder all if there are fewer. valid_images: of them, for
    the evaluations; 0: a tenth.

    Raises:
      ValueError: more images than CIFAR has, or less than a batch for the steps.
    """
    used = _used(dataset, "images", images, dataset.train)
    held = valid_images or used // 10
    if batch > used - held:
        raise ValueError(f"valid_images must leave a batch of {batch} of the {used} images for the steps, got {valid_images}")
    return part_of(dataset.train, 0, used - held), part_of(dataset.train, used - held, used)


def training_parts(dataset: Any, images: int, valid_images: int, hold_out: float) -> tuple[Any, Any]:
    """The images of a training, and those on which it is validated.

    Args:
      images: to use of the training images; 0: all.
      valid_images: to use of the validation images; 0: all.
      hold_out: share of the training images, the last ones, on which to validate; 0: validate on the images for that.

    Raises:
      ValueError: more images than there are, or a share without any image.
    """
    used = _used(dataset, "images", images or len(dataset.train.labels), dataset.train)
    held = round(hold_out * used)
    if hold_out and not 0 < held < used:
        raise ValueError(f"hold_out must leave images on both sides, got {hold_out} of {used} images")
    rest = part_of(dataset.train, used - held, used) if held else dataset.test
    count = _used(dataset, "valid_images", valid_images or len(rest.labels), rest)
    return part_of(dataset.train, 0, used - held), part_of(rest, 0, count)


def part_of(part: Any, start: int, stop: int) -> Any:
    """Some images and their labels, in arrays of any library."""
    return type(part)(*(array[start:stop] for array in part))


def identity(dataset: Any) -> dict[str, str]:
    """What identifies own images in a checkpoint: a hash of them all. The published data sets need none."""
    return {"images_md5": dataset.fingerprint} if dataset.fingerprint else {}


def describe_search(dataset: Any, train: Any, valid: Any, levels: int = 2) -> str:
    """The sizes of the two parts of a search, to be printed."""
    parts = "two halves" if levels == 2 else "two parts"
    return cifar_files.describe(dataset, len(train.labels), len(valid.labels), f"{parts} of the training images")


def describe_training(dataset: Any, train: Any, valid: Any, hold_out: float) -> str:
    """The sizes of the two parts of a training, to be printed."""
    note = "held out from the training images" if hold_out else dataset.note
    return cifar_files.describe(dataset, len(train.labels), len(valid.labels), note)


def _used(dataset: Any, name: str, wanted: int, part: Any) -> int:
    there = len(part.labels)
    if wanted > there and not dataset.fingerprint:
        raise ValueError(f"{name} must be at most {there}, got {wanted}")
    return min(wanted, there)
