"""Bilevel search of convolutional cells in JAX.

row = launch(partial(CifarSearch, Darts, settings, 0, out), settings, out)
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from ...data import image_sets
from ...data.jax import Passes, Pixels, epoch_order, mean_measures
from ...engine.jax.devices import Devices
from ...engine.jax.run import BATCH, EVALUATION, NETWORK, ORDER
from ...engine.settings import cosine
from ...nets.jax import image_networks
from ...space import spaces
from ...space.spaces import Masks
from ..settings import CifarSearchSettings
from .method import Method
from .search import BilevelSearch
from .steps import TRAIN, VALID, CifarData, CifarSteps, Place


class CifarSearch(BilevelSearch):
    """A bilevel search on images."""

    settings: CifarSearchSettings
    data: CifarData
    steps: CifarSteps
    genotype_size = staticmethod(image_networks.genotype_size)

    def __init__(self, method: type[Method], settings: CifarSearchSettings, seed: int, out: Path, devices: Devices) -> None:
        super().__init__(method, settings, seed, out, devices)
        space = spaces.get_space(settings.space)
        dataset = devices.first_then_others(lambda: image_sets.read_images(settings.data, settings.data_dir, settings.pixels))
        self.dataset = dataset
        parts = search_parts(dataset, settings)
        self.pixels = [devices.replicate(Pixels.of(part, dataset.mean, dataset.std)) for part in parts]
        rngs = nnx.Rngs(self.keys[NETWORK])
        graph, params = nnx.split(image_networks.supernet(space, settings, dataset.classes, len(dataset.mean), rngs), nnx.Param)
        self.passes = Passes(len(parts[0].labels), settings.batch, settings.epoch_steps)
        self.drawn = -1  # the pass of the orders in `data`
        self.prepare(graph, params, space, CifarSteps, len(self))
        self.evaluate = jax.jit(self.steps.evaluated)
        self.order = jax.jit(epoch_order, static_argnums=1, out_shardings=devices.replicated)

    def data_text(self) -> str:
        return image_sets.describe_search(self.dataset, *self.pixels, self.settings.levels)

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), **image_sets.identity(self.dataset)}

    def __len__(self) -> int:
        return len(self.passes)

    def batches(self) -> Iterator[int]:
        return iter(range(self.step, len(self)))

    def place(self, batch: int) -> Place:
        through, number = self.passes.place(self.epoch, batch)
        if through != self.drawn:
            key = jax.random.fold_in(self.keys[ORDER], through)
            counts = (len(pixels.labels) for pixels in self.pixels)
            orders = [self.order(jax.random.fold_in(key, stream), n) for stream, n in zip((TRAIN, VALID), counts)]
            self.data, self.drawn = CifarData(*self.pixels, *orders), through
        return Place(np.int32(through), np.int32(number), np.float32(self.rate()), self.keys[BATCH])

    def rate(self) -> float:
        return rate(self.settings, self.epoch)

    def means(self) -> tuple[float, float]:
        loss, correct, count = self.take_sums()
        return loss / count, correct / count

    def measured(self, weights: Any, active: Masks) -> tuple[float, float]:
        """Compute loss and accuracy of the supernet on the validation images, or the first `valid_images` of them.

        Batch norms use the statistics of each batch of 500: the supernet has no running ones.
        """
        valid, key = self.pixels[1].first(self.settings.valid_images), self.keys[EVALUATION]
        kept, flags = self.devices.replicate((weights, {cell: np.array(mask, bool) for cell, mask in active.items()}))
        return mean_measures(valid, lambda part: self.evaluate(self.search.params, kept, (valid, part, key), flags))


def search_parts(dataset: Any, settings: CifarSearchSettings) -> tuple[Any, Any]:
    """The images of the weight steps, and those of the architecture steps or, with one level, of the evaluations alone."""
    if settings.levels == 1:
        return image_sets.search_single(dataset, settings.images, settings.batch, settings.valid_images)
    return image_sets.search_halves(dataset, settings.images, settings.batch)


def rate(settings: CifarSearchSettings, epoch: int) -> float:
    """The learning rate of the network weights in an epoch."""
    return settings.lr_min + (settings.lr - settings.lr_min) * cosine(epoch / settings.epochs)
