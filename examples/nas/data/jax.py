"""Images on the devices as bytes, augmented inside of a compiled step, and the loss of their labels.

    pixels = devices.replicate(Pixels.of(part, data.mean, data.std))
    order = epoch_order(key, len(pixels.labels))
    images, labels = augmented(pixels, order, number, batch=64, key=key)          # inside of jax.jit

A batch depends on the order of the epoch, its number and its key only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from .cifar_files import Images

PADDING = 4  # of random crops
EVALUATED = 500  # images of a batch in evaluations, whose statistics normalise it


class Pixels(NamedTuple):
    """Images as bytes, (N, H, W, C), with labels (N,), and mean and standard deviation of each channel for pixels in [0, 1]."""

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


def label_loss(logits: Array, labels: Array, smoothing: float = 0.0) -> tuple[Array, Array]:
    """The mean cross entropy in float32 or wider, and the sums of loss, correct answers and images."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    if smoothing:
        smooth = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[1], dtype=logits.dtype), smoothing)
        loss = optax.softmax_cross_entropy(logits, smooth).mean()
    else:
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    count = jnp.asarray(len(labels), loss.dtype)
    return loss, jnp.stack([loss * count, (logits.argmax(1) == labels).sum().astype(loss.dtype), count])


def mean_measures(pixels: Pixels, sums_of: Callable[[tuple[Any, Any]], Any]) -> tuple[float, float]:
    """Mean loss and accuracy over all images, by parts of `EVALUATED`.

    sums_of: the sums of `label_loss` of a part (bytes, labels).
    """
    parts = (slice(start, start + EVALUATED) for start in range(0, len(pixels.labels), EVALUATED))
    found = [sums_of((pixels.images[part], pixels.labels[part])) for part in parts]
    loss, correct, count = np.sum([np.asarray(sums, np.float64) for sums in found], 0).tolist()
    return loss / count, correct / count
