"""Search of convolutional cells: network weights on one half of the training images, architecture on the other, or both on all.

row = launch(partial(CifarSearch, Darts, settings, 0, out), settings, out)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from ..data import cifar, image_sets
from ..engine.distributed import Processes
from ..nets.torch import image_networks
from ..nets.torch.operations import frozen_statistics
from ..space import spaces
from ..space.spaces import Masks
from . import curvature, gradients
from .method import Method
from .search import BilevelSearch
from .settings import CifarSearchSettings
from .steps import Batch, CifarSteps

TRAIN, VALID = 1, 2  # numbers of the random streams of the two halves


class CifarSearch(BilevelSearch):
    """A bilevel search on images."""

    steps: CifarSteps
    genotype_size = staticmethod(image_networks.genotype_size)

    def __init__(
        self,
        method: type[Method],
        settings: CifarSearchSettings,
        seed: int,
        out: Path,
        processes: Processes,
        device: torch.device,
    ) -> None:
        super().__init__(method, settings, seed, out, processes, device)
        space = spaces.get_space(settings.space)
        self.dataset = dataset = cifar.load_images(settings.data, settings.data_dir, settings.pixels)
        if settings.levels == 1:
            parts = image_sets.search_single(dataset, settings.images, settings.batch, settings.valid_images)
        else:
            parts = image_sets.search_halves(dataset, settings.images, settings.batch)
        self.train_set, self.valid_set = (part.to(device) for part in parts)
        self.plain = cifar.Augment(dataset.mean, dataset.std)
        augment = cifar.Augment(dataset.mean, dataset.std, image_sets.crop_padding(settings.pixels, settings.augment))
        sizes = (processes.share, settings.epoch_steps)
        drawn = lambda part, stream: cifar.Batches(part, settings.batch, seed, augment, stream, *sizes)
        self.train_batches = drawn(self.train_set, TRAIN)
        self.valid_batches = drawn(self.valid_set, VALID) if settings.levels == 2 else self.train_batches
        own = getattr(method, "supernets", {}).get(space.kind)  # some methods have one of their own
        self.prepare(image_networks.supernet(space, settings, dataset.classes, len(dataset.mean), own), CifarSteps)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.steps.sgd, settings.epochs, settings.lr_min)

    def data_text(self) -> str:
        return image_sets.describe_search(self.dataset, self.train_set, self.valid_set, self.settings.levels)

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), **image_sets.identity(self.dataset)}

    def __len__(self) -> int:
        return len(self.train_batches)

    def begin_epoch(self) -> None:
        super().begin_epoch()
        s = self.settings
        done = self.epoch / max(s.epochs - 1, 1)
        self.net.drop_path = s.drop_path * done
        if s.cutout:
            masked = lambda batches: replace(batches, augment=replace(batches.augment, cutout=s.cutout, cutout_share=done))
            self.train_batches, self.valid_batches = masked(self.train_batches), masked(self.valid_batches)

    def batches(self) -> Iterator[tuple[Batch, Batch | None]]:
        train = self.train_batches.epoch(self.epoch, self.step)
        if self.settings.levels == 1:
            return ((batch, None) for batch in train)
        return zip(train, self.valid_batches.epoch(self.epoch, self.step))

    def end_epoch(self) -> dict[str, Any]:
        self.net.drop_path = 0.0  # evaluations run in training mode, for the statistics of each batch
        row = super().end_epoch()
        self.scheduler.step()
        s: Any = self.settings
        if getattr(s, "early_stop", False) and self.epoch % s.eigenvalue_every == 0:
            row["eigenvalue"] = self.eigenvalue() + s.arch_decay
        return row

    def eigenvalue(self) -> float:
        """The largest eigenvalue of the Hessian of the validation loss in the architecture, on the last batch of this epoch."""
        ((images, labels),) = self.valid_batches.epoch(self.epoch, len(self) - 1)
        loss = lambda: F.cross_entropy(self.steps.logits(images, self.method.weights(), None), labels)
        with frozen_statistics(self.net), gradients.constant(self.steps.params):
            return curvature.largest_eigenvalue(self.method.parameters, loss, self.processes.average)

    @torch.no_grad()
    def evaluate(self, weights: Any, active: Masks | None) -> tuple[float, float]:
        """Compute loss and accuracy of the supernet on the validation images, or the first `valid_images` of them.

        Batch norms use the statistics of each batch of 500: running statistics lag behind a changing architecture.
        """
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        part = self.valid_set.select(slice(self.settings.valid_images or None))
        with frozen_statistics(self.net):
            for images, labels in cifar.evaluation_batches(part, self.plain, share=self.processes.share):
                logits = self.steps.logits(images, weights, active)
                loss = F.cross_entropy(logits, labels, reduction="sum").double()
                sums += torch.stack([loss, (logits.argmax(1) == labels).sum(), torch.full_like(loss, len(labels))])
        self.processes.total([sums])
        loss_sum, correct, images_seen = sums.tolist()
        return loss_sum / images_seen, correct / images_seen

    def state(self) -> dict[str, Any]:
        return {**super().state(), "scheduler": self.scheduler.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self.scheduler.load_state_dict(state["scheduler"])
