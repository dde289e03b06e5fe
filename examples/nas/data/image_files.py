"""Own images as NumPy arrays, from one folder for each class: DIR/train/CLASS/*.png and DIR/val/CLASS/*.png.

    data = read_image_files("flowers")
    data.train.images, data.train.labels        # uint8 (N, C, H, W), int64 (N,)

All images are in memory, of one size, with sides divisible by 4. Large images of any size are read by `image_folder`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .cifar_files import Dataset, Images

ARRAYS = ".npy"  # uint8 (H, W) or (H, W, C), with any number of channels
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
GREY, COLOUR, ALPHA = 1, 3, 4  # numbers of channels of image files
# The modes of Pillow with 8 bits per channel, by the mode to which they are converted.
MODES = {"L": ("1", "L"), "RGB": ("RGB", "P", "YCbCr", "CMYK", "HSV", "LAB", "RGBX"), "RGBA": ("RGBA", "LA", "PA", "La", "RGBa")}
DIVISOR = 4  # of the sides: the two reduction cells of a network halve them
HELD = 10  # without a folder val, one image in so many of each class is for validation


@dataclass(frozen=True)
class Folder:
    """Image files and their labels, sorted by name. classes: the names of the classes."""

    files: tuple[Path, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]


def read_folder(root: Path, split: str, suffixes: Sequence[str] = SUFFIXES) -> Folder:
    """Find the images of ROOT/SPLIT.

    Raises:
      FileNotFoundError: the folder is missing, or it or the folder of a class contains no image.
      ValueError: fewer than two classes.
    """
    place = root / split
    if not place.is_dir():
        raise FileNotFoundError(
            f"--data-dir must contain a folder {split!r} with one folder of images for each class, got {root}"
        )
    classes = tuple(sorted(d.name for d in place.iterdir() if d.is_dir() and not d.name.startswith(".")))
    of_class = [[f for f in sorted((place / c).rglob("*")) if f.suffix.lower() in suffixes] for c in classes]
    empty = [place / name for name, files in zip(classes, of_class) if not files]
    if empty or not classes:
        missing = empty[0] if any(of_class) else place
        where = "images" if any(of_class) else "images in a folder for each class"
        raise FileNotFoundError(f"{missing} must contain {where} ({', '.join(suffixes)}), found none")
    if len(classes) < 2:
        raise ValueError(f"{place} must contain the folders of at least two classes, got one, {classes[0]!r}")
    found = [(file, label) for label, files in enumerate(of_class) for file in files]
    return Folder(tuple(f for f, _ in found), tuple(label for _, label in found), classes)


def refuse_other_classes(root: Path, train: Folder, valid: Folder) -> None:
    """Raise ValueError unless train and val have the same classes."""
    for name, own, other in (("train", train, valid), ("val", valid, train)):
        alone = sorted({*own.classes} - {*other.classes})
        if alone:
            raise ValueError(f"train and val of {root} must contain the same classes, but {alone[0]!r} is in {name} only")


def read_image_files(root: str | Path) -> Dataset:
    """Read all images below a folder.

    Without DIR/val, a tenth of the images of each class in DIR/train is for validation. These and the order of the images are
    random, but always the same: a search does not see the images on which a training is validated, and any part of the images
    has all classes.

    Channels: 1 if all files are grey, 3 if there are colours, 4 if an image is transparent somewhere, and those of the array in
    .npy files. Grey files among coloured ones are converted. Mean and standard deviation are those of the training images.

    Raises:
      FileNotFoundError: a folder is missing or empty.
      ValueError: one class, or different ones in train and val; a file that is no image of 8 bits per channel; images of
        different sizes or numbers of channels, or with sides that are not divisible by 4.
    """
    root = Path(root)
    suffixes = (*SUFFIXES, ARRAYS)
    train = read_folder(root, "train", suffixes)
    has_val = (root / "val").is_dir()
    valid = read_folder(root, "val", suffixes) if has_val else None
    if valid is not None:
        refuse_other_classes(root, train, valid)
    pixels = _stacked([*train.files, *(valid.files if valid else ())])
    count, labels = len(train.files), np.array(train.labels, np.int64)
    if valid is not None:
        parts = [(pixels[:count], labels), (pixels[count:], np.array(valid.labels, np.int64))]
    else:
        held = _held_out(labels, train.classes, root)
        parts = [(pixels[~held], labels[~held]), (pixels[held], labels[held])]
    made = [_shuffled(Images(*part)) for part in parts]
    mean, std = statistics(made[0].images)
    split = "" if has_val else f"one in {HELD} of each class of train, as there is no folder val"
    digest = hashlib.md5()
    for part in made:
        for array in part:
            digest.update(array.tobytes())
    return Dataset(str(root), made[0], made[1], len(train.classes), mean, std, split, digest.hexdigest())


def statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of uint8 (N, C, H, W), for pixels in [0, 1]; of a constant channel 1."""
    levels, found = np.arange(256) / 255, []
    for channel in range(images.shape[1]):
        counts = np.bincount(images[:, channel].ravel(), minlength=256)
        mean = float((counts * levels).sum() / counts.sum())
        std = float(np.sqrt((counts * (levels - mean) ** 2).sum() / counts.sum()))
        found.append((mean, std if std > 1e-6 else 1.0))
    return tuple(mean for mean, _ in found), tuple(std for _, std in found)


def _held_out(labels: np.ndarray, classes: Sequence[str], root: Path) -> np.ndarray:
    """Flags of the images for validation: of each class a tenth, and at least one."""
    held = np.zeros(len(labels), bool)
    draw = np.random.default_rng(0)
    for label, name in enumerate(classes):
        own = draw.permutation(np.flatnonzero(labels == label))
        if len(own) < 2:
            raise ValueError(f"{root / 'train' / name} must contain at least two images where there is no folder val, got 1")
        held[own[: max(1, round(len(own) / HELD))]] = True
    return held


def _shuffled(part: Images) -> Images:
    order = np.random.default_rng(0).permutation(len(part.labels))
    return Images(part.images[order], part.labels[order])


def _stacked(files: Sequence[Path]) -> np.ndarray:
    """The pixels of files of one size, (N, C, H, W)."""
    arrays = [_pixels(file) for file in files]
    size = arrays[0].shape[:2]
    for file, array in zip(files, arrays):
        if array.shape[:2] != size:
            sizes = [f"{height}x{width}" for height, width in (size, array.shape[:2])]
            raise ValueError(f"all images must have one size, but {files[0]} has {sizes[0]} pixels and {file} has {sizes[1]}")
    if any(side % DIVISOR or not side for side in size):
        raise ValueError(f"the sides of images must be divisible by {DIVISOR}, got {size[0]}x{size[1]} pixels in {files[0]}")
    most = max(array.shape[2] for array in arrays)
    has_arrays = any(file.suffix.lower() == ARRAYS for file in files)
    for file, array in zip(files, arrays):
        if has_arrays and array.shape[2] != most:
            raise ValueError(f"all arrays must have one number of channels, but {file} has {array.shape[2]} and others {most}")
    pixels = np.stack([_with_channels(array, most) for array in arrays])
    if most == ALPHA and not has_arrays and bool((pixels[..., 3] == 255).all()):
        pixels = pixels[..., :COLOUR]  # nothing is transparent
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))


def _with_channels(array: np.ndarray, channels: int) -> np.ndarray:
    """An image (H, W, C) with more channels: grey becomes a colour, and gets an opaque alpha channel."""
    if array.shape[2] == GREY and channels > GREY:
        array = array.repeat(COLOUR, 2)
    if array.shape[2] < channels:
        array = np.concatenate([array, np.full_like(array[..., :1], 255)], 2)
    return array


def _pixels(file: Path) -> np.ndarray:
    """uint8 (H, W, C)."""
    if file.suffix.lower() == ARRAYS:
        return _array(file)
    from PIL import Image

    try:
        with Image.open(file) as image:
            mode = next((to for to, modes in MODES.items() if image.mode in modes), None)
            if image.mode == "P" and "transparency" in image.info:
                mode = "RGBA"
            pixels = None if mode is None else np.asarray(image.convert(mode))
            found = image.mode
    except (OSError, SyntaxError, ValueError) as error:  # SyntaxError: Pillow's for a broken PNG
        raise ValueError(f"{file} must be an image: {error}") from None
    if pixels is None:
        raise ValueError(f"{file} must have 8 bits per channel, got an image of Pillow's mode {found!r}")
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _array(file: Path) -> np.ndarray:
    try:
        array = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{file} must be an array: {error}") from None
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or not array.size:
        raise ValueError(f"{file} must be uint8 of shape (H, W) or (H, W, C), got {array.dtype} of shape {array.shape}")
    return array[..., None] if array.ndim == 2 else array
