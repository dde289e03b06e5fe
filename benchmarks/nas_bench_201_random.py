"""Random search in NAS-Bench-201 at a given cost: train random cells for equal times, and return the best on held-out images.

The network is the supernet of the searches with the paths of one cell. Times are those of the processor, so that a result is not
exactly the same on another machine.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from nas.data import cifar, image_sets
from nas.data.nats_bench import all_cells
from nas.engine.lock import locked
from nas.engine.settings import RunSettings, check, cosine
from nas.nets.torch.nasbench201 import Supernet
from nas.nets.torch.operations import frozen_statistics
from nas.space.files import write_text
from nas.space.genotype import CellGenotype
from nas.space.spaces import Masks, get_space

CELLS_FILE = "cells.json"  # in the folder of a run: the cells that are finished, with their accuracies
TRAINED = 0.95  # share of the time of a cell that it is trained for; its evaluation takes about the rest
STREAM = 0  # number of the random stream of the batches


@dataclass(frozen=True)
class RandomSearchSettings(RunSettings):
    """Settings of random search; those that a search has too mean the same."""

    cells: int = 8
    """Number of cells, drawn with equal probability from those without `none`."""
    cost: float = 60.0
    """CPU seconds of all of them together, with the reading of the images."""
    held_out: int = 2000
    """Number of training images that are held out, on which the trained cells are compared."""
    data: str = "cifar10"
    data_dir: Path = Path("data")
    images: int = 50_000
    batch: int = 64
    channels: int = 16
    layers: int = 17
    pixels: int = 0
    transition: str = "residual"
    lr: float = 0.05
    lr_min: float = 0.001
    momentum: float = 0.9
    weight_decay: float = 3e-4
    clip: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, counts=("cells", "held_out", "images", "batch"), amounts=("cost",))


@dataclass
class Trial:
    """A cell that was trained: its held-out accuracy after so many steps."""

    architecture: str
    accuracy: float
    steps: int


def search(settings: RandomSearchSettings, seed: int, out: Path) -> dict[str, Any]:
    """Search, or continue: finished cells are in a file, and an interrupted one is trained again."""
    start = time.process_time()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    with locked(out):
        file = out / CELLS_FILE
        trials = [Trial(**found) for found in json.loads(file.read_text(encoding="utf-8"))] if file.exists() else []
        cells = drawn(settings.cells, seed)
        if len(trials) < len(cells):
            train, held_out, normalise, augment, classes = images_of(settings)
            spent = time.process_time() - start
            if settings.cost <= spent:
                raise ValueError(f"cost must be more than the {spent:.1f} CPU seconds of reading the images, got {settings.cost}")
            seconds = (settings.cost - spent) / settings.cells
            for number in range(len(trials), len(cells)):
                torch.manual_seed(seed)  # all cells start with the same weights, as far as they share them
                batches = cifar.Batches(train, settings.batch, seed, augment, STREAM)
                share = partial(_share_of_time, time.process_time(), TRAINED * seconds)
                net, masks, steps = trained(cells[number], settings, share, batches, classes)
                trials.append(Trial(cells[number], evaluated(net, masks, held_out, normalise)[1], steps))
                write_text(file, json.dumps([vars(trial) for trial in trials], indent=1) + "\n")
                print(trials[-1], flush=True)
    best = max(trials, key=lambda trial: trial.accuracy)
    return {"rows": [{"seed": seed, "architecture": best.architecture}]}


def _share_of_time(start: float, seconds: float, steps: int) -> float:
    """Which share of the CPU seconds is over, whatever the number of steps."""
    return (time.process_time() - start) / seconds


def drawn(count: int, seed: int) -> list[str]:
    """Different random cells without `none`."""
    cells = [cell for cell in all_cells() if "none" not in cell]
    return [cells[i] for i in np.random.default_rng(seed).choice(len(cells), count, replace=False)]


def images_of(settings: RandomSearchSettings) -> tuple[cifar.Images, cifar.Images, cifar.Augment, cifar.Augment, int]:
    """The images to train on, those held out, how to normalise and how to augment them, and the number of classes."""
    dataset = cifar.load_images(settings.data, settings.data_dir, settings.pixels)
    images = min(settings.images, len(dataset.train.labels))
    cut = images - settings.held_out
    if cut < settings.batch:
        raise ValueError(f"held_out must leave a batch of {settings.batch} of {images} images, got {settings.held_out}")
    normalise = cifar.Augment(dataset.mean, dataset.std)
    augment = cifar.Augment(dataset.mean, dataset.std, image_sets.crop_padding(settings.pixels))
    parts = dataset.train.select(slice(cut)), dataset.train.select(slice(cut, images))
    return *parts, normalise, augment, dataset.classes


def trained(
    architecture: str, s: RandomSearchSettings, share: Callable[[int], float], batches: cifar.Batches, classes: int
) -> tuple[Supernet, Masks, int]:
    """Train the network of a cell until `share`, of the number of steps so far, is 1. Returns also the masks of its paths and the
    number of steps.
    """
    space = get_space("nasbench201_nonzero")
    masks = space.masks(CellGenotype.from_string(architecture))
    net = Supernet(space, s.channels, s.layers, classes, transition=s.transition)
    optimizer = torch.optim.SGD(net.parameters(), s.lr, s.momentum, weight_decay=s.weight_decay)
    steps = 0
    for images, labels in without_end(batches):
        done = share(steps)
        if done >= 1:
            break
        optimizer.param_groups[0]["lr"] = s.lr_min + (s.lr - s.lr_min) * cosine(done)
        optimizer.zero_grad()
        F.cross_entropy(net(images, None, masks), labels).backward()
        if s.clip:
            torch.nn.utils.clip_grad_norm_(net.parameters(), s.clip)
        optimizer.step()
        steps += 1
    return net, masks, steps


def without_end(batches: cifar.Batches) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The batches of all epochs."""
    for epoch in itertools.count():
        yield from batches.epoch(epoch)


@torch.no_grad()
def evaluated(net: Supernet, masks: Masks, images: cifar.Images, normalise: cifar.Augment) -> tuple[float, float]:
    """The mean loss and the accuracy on images, with batch norms by the statistics of each batch, as searches evaluate."""
    loss, correct = 0.0, 0
    with frozen_statistics(net):
        for batch, labels in cifar.evaluation_batches(images, normalise):
            logits = net(batch, None, masks)
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
            correct += int((logits.argmax(1) == labels).sum())
    return loss / len(images.labels), correct / len(images.labels)
