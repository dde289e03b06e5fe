"""Bilevel search of convolutional cells in JAX.

row = launch(partial(CifarSearch, Darts, settings, 0, out), settings, out)
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ...data import image_sets
from ...data.jax import Pixels, epoch_order, mean_measures
from ...engine.jax.devices import Devices
from ...engine.jax.run import BATCH, EVALUATION, NETWORK, ORDER
from ...engine.settings import cosine
from ...nets.jax import cnn
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
    genotype_size = staticmethod(cnn.genotype_size)

    def __init__(self, method: type[Method], settings: CifarSearchSettings, seed: int, out: Path, devices: Devices) -> None:
        super().__init__(method, settings, seed, out, devices)
        space = spaces.get_space(settings.space)
        dataset = devices.first_then_others(lambda: image_sets.read_images(settings.data, settings.data_dir))
        self.dataset = dataset
        parts = image_sets.search_halves(dataset, settings.images, settings.batch)
        self.pixels = [devices.replicate(Pixels.of(part, dataset.mean, dataset.std)) for part in parts]
        dtype = jnp.bfloat16 if settings.amp else jnp.float32
        rngs = nnx.Rngs(self.keys[NETWORK])
        sizes = (settings.channels, settings.layers, dataset.classes)
        net = cnn.Supernet(space, *sizes, rngs=rngs, dtype=dtype, image_channels=len(dataset.mean))
        graph, params = nnx.split(net, nnx.Param)
        self.half = len(parts[0].labels)
        self.prepare(graph, params, space, CifarSteps, len(self))
        self.evaluate = jax.jit(self.steps.evaluated)
        self.order = jax.jit(epoch_order, static_argnums=1, out_shardings=devices.replicated)

    def data_text(self) -> str:
        return image_sets.describe_search(self.dataset, *self.pixels)

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), **image_sets.identity(self.dataset)}

    def __len__(self) -> int:
        return self.half // self.settings.batch

    def begin_epoch(self) -> None:
        super().begin_epoch()
        key = jax.random.fold_in(self.keys[ORDER], self.epoch)
        orders = [self.order(jax.random.fold_in(key, stream), self.half) for stream in (TRAIN, VALID)]
        self.data = CifarData(*self.pixels, *orders)

    def batches(self) -> Iterator[int]:
        return iter(range(self.step, len(self)))

    def place(self, batch: int) -> Place:
        return Place(np.int32(self.epoch), np.int32(batch), np.float32(self.rate()), self.keys[BATCH])

    def rate(self) -> float:
        s = self.settings
        return s.lr_min + (s.lr - s.lr_min) * cosine(self.epoch / s.epochs)

    def means(self) -> tuple[float, float]:
        loss, correct, count = self.take_sums()
        return loss / count, correct / count

    def measured(self, weights: Any, active: Masks) -> tuple[float, float]:
        """Compute loss and accuracy of the supernet on the validation half.

        Batch norms use the statistics of each batch of 500: the supernet has no running ones.
        """
        valid, key = self.pixels[1], self.keys[EVALUATION]
        kept, flags = self.devices.replicate((weights, {cell: np.array(mask, bool) for cell, mask in active.items()}))
        return mean_measures(valid, lambda part: self.evaluate(self.search.params, kept, (valid, part, key), flags))
