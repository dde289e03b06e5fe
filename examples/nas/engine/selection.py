"""The protocol of DARTS for several searches: train each result from new weights for a short time, and keep the best.

Source: Liu, Simonyan, Yang, "DARTS", 2019, Section 3: four searches; their cells are compared by validation after 100 epochs of
training on CIFAR-10, or 300 on Penn Treebank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..space.genotype import AnyGenotype, Genotype, load_genotype
from .command_line import SEEDS, folder_of
from .log import write_csv

TRAINING = "selection"  # the folder of the short training, in that of its search


def select_by_training(
    settings: Any,
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[str],
    train: Callable[[AnyGenotype, Path], dict[str, Any]],
    measure: str,
    kind: type[AnyGenotype] = Genotype,
    first: bool = True,
) -> list[dict[str, Any]]:
    """Train the result of each search, and copy the best one to OUT/genotype.json; return the rows with two more columns.

    The table is written to OUT/seeds.csv: ``columns`` of the searches, the measure as ``selection_NAME``, and ``selected``. A
    result with a cell without paths cannot be trained: its measure is NaN.

    Args:
      settings: of the searches, with `out` and `seeds`.
      rows: of the searches, with a seed each.
      train: trains a genotype in a folder, or continues there, and returns its row. A finished training is not repeated.
      measure: the column of that row to compare, an accuracy or a perplexity.
      first: whether this process writes files and prints.

    Raises:
      ValueError: no result can be trained.
    """
    found, name = [], f"selection_{measure.removeprefix('valid_')}"
    for row in rows:
        folder = folder_of(settings, row["seed"])
        genotype = load_genotype(folder / "genotype.json", kind)
        trainable = all(genotype.clean().output_nodes(cell) for cell in kind.layout.cells)
        value = float(train(genotype, folder / TRAINING)[measure]) if trainable else math.nan
        found.append({**row, name: value})
    sign = -1 if "perplexity" in measure else 1
    able = [row for row in found if not math.isnan(row[name])]
    if not able:
        raise ValueError("a result must have paths in every cell to be trained, but that of no seed has")
    best = max(able, key=lambda row: sign * row[name])
    found = [{**row, "selected": int(row is best)} for row in found]
    if first:
        shown = ("seed", *columns, name, "selected")
        write_csv(settings.out / SEEDS, [{column: row[column] for column in shown} for row in found])
        load_genotype(folder_of(settings, best["seed"]) / "genotype.json", kind).save(settings.out / "genotype.json")
        print(f"\nselected: seed {best['seed']}, {_listed(found, name)}")
        print(f"written: {settings.out}/genotype.json, {settings.out}/{SEEDS}")
    return found


def _listed(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    show = lambda value: f"{100 * value:.2f} %" if "accuracy" in name else f"{value:.2f}"
    listed = ", ".join(f"{row['seed']}: {show(row[name])}" for row in rows)
    return f"by {name.removeprefix('selection_')} after a short training of each seed ({listed})"
