"""Images on the devices as bytes, augmented inside of a compiled step.

pixels = Pixels.of(part, data.mean, data.std, devices)
order = epoch_order(key, len(pixels.labels))
images, labels = augmented(pixels, order, number, batch=64, key=key)          # inside of jax.jit
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .cifar_files import Images

PADDING = 4  # of random crops


class Pixels(NamedTuple):
    """Images as bytes, (N, H, W, 3), with labels (N,), and mean and standard deviation of each channel for pixels in [0, 1]."""

    images: Any
    labels: Any
    mean: Any
    std: Any

    @classmethod
    def of(cls, part: Images, mean: tuple[float, ...], std: tuple[float, ...]) -> Pixels:
        """The images of a file, in NumPy, with channels last."""
        images = np.ascontiguousarray(part.images.transpose(0, 2, 3, 1))
        return cls(images, part.labels.astype(np.int32), np.asarray(mean, np.float32), np.asarray(std, np.float32))


def epoch_order(key: Array, count: int) -> Array:
    """A random order of the images, for an epoch."""
    return jax.random.permutation(key, count)


def augmented(pixels: Pixels, order: Array, number: Array, batch: int, key: Array) -> tuple[Array, Array]:
    """Batch `number` of an epoch: random crops of the images padded by 4 pixels, half of them flipped, normalised.

    key: of the batch, for crops and flips.
    """
    which = jax.lax.dynamic_slice_in_dim(order, number * batch, batch)
    images = pixels.images[which]
    _, height, width, _ = images.shape
    padded = jnp.pad(images, ((0, 0), (PADDING, PADDING), (PADDING, PADDING), (0, 0)))
    of_top, of_left, of_flip = jax.random.split(key, 3)
    draw = lambda key, high: jax.random.randint(key, (batch, 1), 0, high)
    rows = draw(of_top, 2 * PADDING + 1) + jnp.arange(height)
    columns = jnp.arange(width)
    columns = draw(of_left, 2 * PADDING + 1) + jnp.where(draw(of_flip, 2) == 1, width - 1 - columns, columns)
    crops = padded[jnp.arange(batch)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return normalised(pixels, crops), pixels.labels[which]


def normalised(pixels: Pixels, images: Array) -> Array:
    """Bytes as float32 with mean 0 and standard deviation 1 in each channel of the data set."""
    return images.astype(jnp.float32) * (1 / (255 * pixels.std)) - pixels.mean / pixels.std
