"""The option of the search scripts that selects among the results of several seeds by a short training of each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..engine.command_line import CommandLine, errors_in_one_line, folder_of
from ..engine.loop import checkpoint_exists
from ..engine.selection import select_by_training
from ..engine.signals import stops_in_one_line
from ..space.files import write_text
from ..space.genotype import RecurrentGenotype
from ..space.spaces import get_space
from .frameworks import FRAMEWORKS

HELP = """Train the result of each seed from new weights for so many epochs, compare them on held-out images (a tenth of the
training images) or on the validation text, and copy the best one to OUT/genotype.json, as DARTS does with 4 seeds and 100 epochs
(300 on text). The recipe is that of train_cifar10.py or train_ptb.py with the preset of the same name as that of the search; with
--config it is that of the preset paper. The table is OUT/seeds.csv."""
NAME = "selection.json"  # what --resume reads, in OUT


class Selection:
    """The option ``--select-by-training EPOCHS``, by which several searches are compared (`engine.selection`).

    Must be made before the settings are parsed. kind: of the data, images or text.
    """

    def __init__(self, words: CommandLine, kind: str) -> None:
        self.words, self.kind = words, kind
        self.epochs = words.count("--select-by-training", HELP, "EPOCHS")
        self.preset = ""

    def begin(self, settings: Any, first: bool) -> None:
        """Write what --resume needs to OUT, or read it there; call it before the searches start.

        Ends the program with one line if their results could not be trained. first: whether this process writes files.
        """
        file, given = settings.out / NAME, self.words.given["--preset"]
        saved = {}
        if settings.resume and file.is_file():
            with errors_in_one_line():
                saved = _read(file)
        self.epochs = self.epochs or saved.get("epochs", 0)
        self.preset = given or saved.get("preset", self.words.chosen["--preset"])
        if self.epochs:
            self._check()
        folders = [folder_of(settings, seed) for seed in settings.seeds]
        refused = not settings.resume and any(checkpoint_exists(folder, name) for folder in folders for name in FRAMEWORKS)
        if not first or refused:  # a search refuses a folder that contains another one
            return
        with errors_in_one_line():
            if self.epochs:
                settings.out.mkdir(parents=True, exist_ok=True)
                write_text(file, json.dumps({"epochs": self.epochs, "preset": self.preset}) + "\n")
            else:
                file.unlink(missing_ok=True)

    def _check(self) -> None:
        try:
            import torch  # noqa: F401
        except ModuleNotFoundError:
            raise SystemExit(
                "error: --select-by-training needs PyTorch, which trains the results of a search in JAX too"
            ) from None
        for name in ("--coordinator", "--one-stage"):
            if self.words.given.get(name):
                raise SystemExit(f"error: --select-by-training and {name} exclude each other")

    def run(self, settings: Any, rows: list[dict[str, Any]], columns: Sequence[str], first: bool) -> list[dict[str, Any]]:
        """Train the result of each search and select the best one; return the rows, unchanged without the option."""
        if not self.epochs:
            return rows
        from ..train import short

        if self.kind == "images":
            train, measure, kind = short.train_images, "valid_accuracy", get_space(settings.space).kind
        else:
            train, measure, kind = short.train_text, "valid_perplexity", RecurrentGenotype
        one = partial(train, settings, self.preset, self.epochs)
        with errors_in_one_line(), stops_in_one_line(settings.out, lambda: first):
            return select_by_training(settings, rows, columns, one, measure, kind, first)


def _read(file: Path) -> dict[str, Any]:
    """The epochs and the preset that an earlier run has written."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {"epochs": int(found["epochs"]), "preset": str(found["preset"])}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{file} must contain epochs and preset of a selection as JSON: remove it to search only") from None
