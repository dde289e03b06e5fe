"""Images of any size, decoded in every epoch, in the layout of ImageNet: ROOT/train/CLASS/*.jpg and ROOT/val/CLASS/*.jpg."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..engine.distributed import WHOLE_BATCH, Share
from .image_files import Folder

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Decoded(Dataset):
    """(image, label) by index. Random crops depend on (seed, epoch, index) only; epoch None: the central crop."""

    def __init__(self, folder: Folder, size: int, seed: int, epoch: int | None) -> None:
        self.folder, self.size, self.seed, self.epoch = folder, size, seed, epoch

    def __len__(self) -> int:
        return len(self.folder.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        file = self.folder.files[index]
        try:
            with Image.open(file) as opened:
                image = opened.convert("RGB")
        except OSError as error:
            raise ValueError(f"{file} must be an image: {error}") from None
        if self.epoch is None:
            image = central(image, self.size)
        else:
            image = augmented(image, self.size, np.random.default_rng((self.seed, self.epoch, index)))
        pixels = (np.asarray(image, np.float32) / 255 - np.float32(MEAN)) / np.float32(STD)
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy()), self.folder.labels[index]


def central(image: Image.Image, size: int) -> Image.Image:
    """The central crop of `size` pixels, after resizing the shorter side to 8/7 of it."""
    short = round(size * 8 / 7)
    scale = short / min(image.size)
    image = image.resize(
        (max(short, round(image.width * scale)), max(short, round(image.height * scale))), Image.Resampling.BILINEAR
    )
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def augmented(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """A random crop of 8 to 100 % of the area, resized, flipped with probability 1/2, with random changes of the colours."""
    left, top, width, height = _part(image.width, image.height, rng)
    image = image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + width, top + height))
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for kind in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = kind(image).enhance(rng.uniform(0.6, 1.4))
    hue, saturation, value = image.convert("HSV").split()
    turn = round(rng.uniform(-0.2, 0.2) * 255)
    turned = Image.fromarray(((np.asarray(hue, np.int16) + turn) % 256).astype(np.uint8))
    return Image.merge("HSV", (turned, saturation, value)).convert("RGB")


def _part(width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1.0)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
    side = min(width, height)
    return (width - side) // 2, (height - side) // 2, side, side


@dataclass(frozen=True)
class FolderBatches:
    """Shuffled batches of a folder, decoded by `workers` processes; same interface as `cifar.Batches`."""

    folder: Folder
    size: int
    seed: int
    pixels: int
    device: torch.device
    workers: int = 0
    share: Share = WHOLE_BATCH

    def __post_init__(self) -> None:
        if not 0 < self.size <= len(self.folder.files):
            raise ValueError(f"batch must lie in [1, {len(self.folder.files)}], the number of images, got {self.size}")
        if self.size % self.share.world:
            raise ValueError(f"batch must be a multiple of the {self.share.world} processes, got {self.size}")

    def __len__(self) -> int:
        return len(self.folder.files) // self.size

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch from number `start` on; an incomplete last batch is dropped."""
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.folder.files))
        batches = [order[i * self.size : (i + 1) * self.size] for i in range(start, len(self))]
        own = [b[self.share.rank :: self.share.world].tolist() for b in batches]
        yield from _decode(Decoded(self.folder, self.pixels, self.seed, epoch), own, self.workers, self.device)


def folder_evaluation_batches(
    folder: Folder, pixels: int, size: int, device: torch.device, workers: int = 0, share: Share = WHOLE_BATCH
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the central crops of all images in order. Each process gets its share."""
    own = range(len(folder.files))[share.rank :: share.world]
    batches = [list(own[i : i + size]) for i in range(0, len(own), size)]
    yield from _decode(Decoded(folder, pixels, 0, None), batches, workers, device)


def _decode(images: Decoded, batches: list[list[int]], workers: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    loader = DataLoader(images, batch_sampler=batches, num_workers=workers, pin_memory=device.type == "cuda")
    for x, y in loader:
        x = x.to(device, non_blocking=True, memory_format=torch.channels_last)
        yield x, y.to(device, non_blocking=True)
