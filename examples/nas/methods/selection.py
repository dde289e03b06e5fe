"""The option of the search scripts that selects among the results of several seeds by a short training of each."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from ..engine.command_line import CommandLine, errors_in_one_line
from ..engine.selection import select_by_training
from ..space.genotype import Genotype, RecurrentGenotype

HELP = """Train the result of each seed from new weights for so many epochs, compare them on held-out images (a tenth of the
training images) or on the validation text, and copy the best one to OUT/genotype.json, as DARTS does with 4 seeds and 100 epochs
(300 on text). The table is OUT/seeds.csv."""


class Selection:
    """The option ``--select-by-training EPOCHS``, by which several searches are compared (`engine.selection`).

    Must be made before the settings are parsed. kind: of the data, images or text.
    """

    def __init__(self, words: CommandLine, kind: str) -> None:
        self.words, self.kind = words, kind
        self.epochs = words.count("--select-by-training", HELP, "EPOCHS")

    def check(self) -> None:
        """End the program with one line if the results of the searches could not be trained; call it before they start."""
        if not self.epochs:
            return
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

        train, measure, genotype = {
            "images": (short.train_images, "valid_accuracy", Genotype),
            "text": (short.train_text, "valid_perplexity", RecurrentGenotype),
        }[self.kind]
        one = partial(train, settings, self.words.chosen["--preset"], self.epochs)
        with errors_in_one_line():
            return select_by_training(settings, rows, columns, one, measure, genotype, first)
