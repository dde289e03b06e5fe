"""Short trainings that compare the results of several searches (`engine.selection`), in PyTorch.

Images: the recipe of `train_cifar10.py` and its preset of the same name, on nine tenths of its training images; the last tenth is
for validation, and the test images are not seen. Text: the recipe of `train_ptb.py`, validated on the validation text.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ..data import image_sets
from ..engine.run import launch
from ..space.genotype import CellGenotype, Genotype, RecurrentGenotype
from .settings import CIFAR_TRAIN_PRESETS, TEXT_TRAIN_PRESETS
from .train_cifar import GenotypeTraining, takes_auxiliary
from .train_text import TextTraining

HELD_OUT = 0.1  # share of the training images on which results are compared
SEED = 0  # the same for all, so that trainings differ in the genotype only


def train_images(search: Any, preset: str, epochs: int, genotype: Genotype | CellGenotype, out: Path) -> dict[str, Any]:
    """Train the network of a genotype on the data of a search; return the row of its last epoch.

    Where own images have another size than the auxiliary head needs, it is left out, and where they are few, the batches are
    smaller.

    Args:
      search: the settings of the search.
      preset: of the search; if trainings of such genotypes have none of this name, "paper" or "nasbench201".
    """
    usual = "nasbench201" if isinstance(genotype, CellGenotype) else "paper"
    named = preset if preset.startswith("nasbench201") == isinstance(genotype, CellGenotype) else usual
    base = CIFAR_TRAIN_PRESETS.get(named, CIFAR_TRAIN_PRESETS[usual])
    settings = replace(base, epochs=epochs, hold_out=HELD_OUT, data=search.data, amp=search.amp, **_execution(search, out))
    images = min((count for count in (base.images, search.images) if count), default=0)
    if search.data == image_sets.FOLDER:
        dataset = image_sets.read_images(search.data, search.data_dir)
        images = min(images or len(dataset.train.labels), len(dataset.train.labels))
        if not takes_auxiliary(dataset.train.images.shape[2:]):
            settings = replace(settings, auxiliary=0.0)
    if images:
        settings = replace(settings, images=images, batch=min(base.batch, images - round(HELD_OUT * images)))
    return launch(partial(GenotypeTraining, genotype, settings, SEED, out), settings, out)


def train_text(search: Any, preset: str, epochs: int, genotype: RecurrentGenotype, out: Path) -> dict[str, Any]:
    """Train the language model of a cell on the text of a search; return the row of its best epoch."""
    base = TEXT_TRAIN_PRESETS.get(preset, TEXT_TRAIN_PRESETS["paper"])
    settings = replace(base, epochs=epochs, tokens=search.tokens, **_execution(search, out))
    return launch(partial(TextTraining, genotype, settings, SEED, out), settings, out)


def _execution(search: Any, out: Path) -> dict[str, Any]:
    """Where and how a run is executed, as settings. It continues where an earlier one ended."""
    names = ("data_dir", "threads", "checkpoint_minutes")
    device = search.device if search.device in ("auto", "cpu", "cuda") else "auto"  # a search in JAX has others
    shown = str(out.parent / "genotype.json")  # for the header; the genotype itself identifies the training
    return {"out": out, "genotype": shown, "resume": True, "device": device, **{name: getattr(search, name) for name in names}}
