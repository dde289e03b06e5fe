"""Images on the devices as bytes, augmented inside of a compiled step, and the loss of their labels.

    pixels = devices.replicate(Pixels.of(part, data.mean, data.std))
    order = epoch_order(key, len(pixels.labels))
    images, labels = augmented(pixels, order, number, batch=64, key=key)          # inside of jax.jit

A batch depends on the order of the images in its pass, its number there and its key only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from .cifar_files import Images

PADDING = 4  # of random crops of images that are not reduced
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

    def first(self, count: int) -> Pixels:
        """The first images; 0: all."""
        return self._replace(images=self.images[:count], labels=self.labels[:count]) if count else self


def epoch_order(key: Array, count: int) -> Array:
    """A random order of the images, for a pass."""
    return jax.random.permutation(key, count)


def augmented(pixels: Pixels, order: Array, number: Array, batch: int, key: Array, padding: int = PADDING) -> tuple[Array, Array]:
    """Batch `number` of a pass: random crops of the padded images, half of them flipped, normalised.

    order: of the images in this pass. key: of the batch, for crops and flips. padding: 0 for neither crops nor flips.
    """
    which = jax.lax.dynamic_slice_in_dim(order, number * batch, batch)
    images = pixels.images[which]
    if not padding:
        return normalised(pixels, images), pixels.labels[which]
    _, height, width, _ = images.shape
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    of_top, of_left, of_flip = jax.random.split(key, 3)
    draw = lambda key, high: jax.random.randint(key, (batch, 1), 0, high)
    rows = draw(of_top, 2 * padding + 1) + jnp.arange(height)
    columns = jnp.arange(width)
    columns = draw(of_left, 2 * padding + 1) + jnp.where(draw(of_flip, 2) == 1, width - 1 - columns, columns)
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


@dataclass(frozen=True)
class Passes:
    """Epochs of a number of steps, whatever number of batches a pass through the images has.

    images: their number. steps: of an epoch; 0: one pass. An incomplete last batch of a pass is dropped.
    """

    images: int
    batch: int
    steps: int = 0

    def __len__(self) -> int:
        """The number of steps of an epoch."""
        return self.steps or self.in_pass

    @property
    def in_pass(self) -> int:
        """The number of batches of a pass."""
        return self.images // self.batch

    def place(self, epoch: int, step: int) -> tuple[int, int]:
        """The pass of a step, counted from 0, and the number of its batch there."""
        return divmod(epoch * len(self) + step, self.in_pass)
