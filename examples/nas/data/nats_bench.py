"""The table of NAS-Bench-201: the accuracy of all 15 625 cells of the search space `nasbench201` on three data sets.

    table = Table.read("nats_bench.csv")
    table.place("|nor_conv_3x3~0|+|nor_conv_3x3~0|none~1|+|skip_connect~0|nor_conv_3x3~1|none~2|").rank

The table is not a part of this project. It is exported from the benchmark file of its authors with their package `nats_bench`, to
a CSV file with a row for each cell and the columns `COLUMNS`: accuracies in percent on the test images, each the mean of the
trainings of 200 epochs, and the cell in the notation of `CellGenotype.to_string`.

Sources: Dong and Yang, "NAS-Bench-201: Extending the Scope of Reproducible Neural Architecture Search", ICLR 2020; Dong, Liu,
Musial and Gabrys, "NATS-Bench: Benchmarking NAS Algorithms for Architecture Topology and Size", 2021 (its topology space).
"""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..space.amounts import grouped
from ..space.genotype import AnyGenotype

OPERATIONS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
EDGES = 6
CELLS = len(OPERATIONS) ** EDGES
COLUMNS = (
    "CIFAR10TestAccuracy200Epochs",
    "CIFAR100TestAccuracy200Epochs",
    "ImageNetTestAccuracy200Epochs",
    "ArchitectureString",
)
DATA_SETS = ("cifar10", "cifar100", "imagenet16_120")
OPTIMA = (94.37, 73.51, 47.31)  # the best test accuracy on each data set in the paper of NAS-Bench-201
HOW_TO_GET = (
    "It is not shipped: install the package nats_bench of its authors, download their file NATS-tss-v1_0-3ffb9-simple, and export"
    f" a CSV file with the columns {', '.join(COLUMNS)}"
)


class Place(NamedTuple):
    """A cell in the table.

    Attributes:
      architecture: its string.
      cifar10, cifar100, imagenet16_120: test accuracies in percent.
      rank: by accuracy on CIFAR-10, from 1: one more than the number of better cells, so that equal cells share the best rank.
      percentile: 100 rank / 15 625.
      size_percentile: among the cells with as many parameters, by midranks: 100 (better + equal / 2) / cells, where the cell
        itself counts as equal. The mean over the cells of a size is 50, and a cell that is alone has 50.
      same_size: the number of cells with as many parameters, itself included.
    """

    architecture: str
    cifar10: float
    cifar100: float
    imagenet16_120: float
    rank: int
    percentile: float
    size_percentile: float
    same_size: int


@dataclass(frozen=True)
class Table:
    """All cells and their accuracies. accuracies: percent, float64 (15 625, 3), with the columns `DATA_SETS`."""

    architectures: tuple[str, ...]
    accuracies: np.ndarray

    @classmethod
    def read(cls, path: str | Path) -> Table:
        """Read the table from a CSV file, in any order of rows and columns; further columns are ignored.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: a column or a cell is missing, a cell is unknown or appears twice, an accuracy is no number in [0, 100], or
            the best accuracies are not the published ones. The message names the file, and the line where there is one.
        """
        file = Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"no file {file} with the table of NAS-Bench-201. {HOW_TO_GET}.")
        try:
            with file.open(encoding="utf-8-sig", newline="") as opened:
                found = _read_rows(file, csv.DictReader(opened))
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{file} must be a CSV file in UTF-8, but {error}") from None
        if len(found) < CELLS:
            missing = next(cell for cell in all_cells() if cell not in found)
            raise ValueError(f"{file} must have all {grouped(CELLS)} cells, got {grouped(len(found))}; {missing} is missing")
        accuracies = np.array(list(found.values()))
        for name, best, published in zip(DATA_SETS, accuracies.max(0), OPTIMA):
            if abs(best - published) > 0.006:  # the published figures have two decimals
                raise ValueError(
                    f"{file}: the best accuracy on {name} must be the published one, {published} %, got {best:.2f} %"
                )
        return cls(tuple(found), accuracies)

    def place(self, cell: AnyGenotype | str) -> Place:
        """Look up a cell, given as a `CellGenotype` or as its string. ValueError if it is none of the space."""
        at = self.index(cell)
        accuracies = map(float, self.accuracies[at])
        rank, same_size = int(self.ranks[at]), int((self.sizes == self.sizes[at]).sum())
        return Place(self.architectures[at], *accuracies, rank, 100 * rank / CELLS, float(self.size_percentiles[at]), same_size)

    def index(self, cell: AnyGenotype | str) -> int:
        """The row of a cell."""
        architecture = cell if isinstance(cell, str) else cell.to_string()  # type: ignore[attr-defined]
        try:
            return self._rows[architecture]
        except KeyError:
            raise ValueError(f"cell must be one of the {grouped(CELLS)} cells of NAS-Bench-201, got {architecture!r}") from None

    @property
    def cifar10(self) -> np.ndarray:
        """The accuracies by which cells are ranked."""
        return self.accuracies[:, 0]

    @cached_property
    def sizes(self) -> np.ndarray:
        """The number of parameters of each cell, in units of a 1x1 convolution, int64 (15 625,).

        Two cells have the same number only if they have as many 1x1 and as many 3x3 convolutions.
        """
        return np.array([size(architecture) for architecture in self.architectures])

    @cached_property
    def ranks(self) -> np.ndarray:
        """The rank of each cell, as in `Place`, int64 (15 625,)."""
        return 1 + _better(self.cifar10)

    @cached_property
    def size_percentiles(self) -> np.ndarray:
        """The percentile of each cell among those of its size, as in `Place`, float64 (15 625,)."""
        found = np.empty(len(self.sizes))
        for wanted in np.unique(self.sizes):
            own = self.sizes == wanted
            accuracy = self.cifar10[own]
            better, worse = _better(accuracy), _better(-accuracy)
            found[own] = 100 * (better + (len(accuracy) - better - worse) / 2) / len(accuracy)
        return found

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {architecture: i for i, architecture in enumerate(self.architectures)}


def _better(values: np.ndarray) -> np.ndarray:
    """For each value the number of larger ones."""
    return len(values) - np.searchsorted(np.sort(values), values, side="right")


def size(architecture: str) -> int:
    """The number of parameters of a cell without its norms, in units of a 1x1 convolution: a 3x3 convolution has nine."""
    return architecture.count("nor_conv_1x1~") + 9 * architecture.count("nor_conv_3x3~")


def all_cells() -> Iterator[str]:
    """The strings of all cells of the space."""
    for a, b, c, d, e, f in itertools.product(OPERATIONS, repeat=EDGES):
        yield f"|{a}~0|+|{b}~0|{c}~1|+|{d}~0|{e}~1|{f}~2|"


def _read_rows(file: Path, reader: csv.DictReader) -> dict[str, tuple[float, ...]]:
    """The accuracies of each cell in a file."""
    missing = [column for column in COLUMNS if column not in (reader.fieldnames or ())]
    if missing:
        there = ", ".join(reader.fieldnames or ()) or "none"
        raise ValueError(f"{file}, line 1 must name the columns {', '.join(COLUMNS)}, got {there}: {missing[0]} is missing")
    known = frozenset(all_cells())
    found: dict[str, tuple[float, ...]] = {}
    for row in reader:
        line = f"{file}, line {reader.line_num}"
        architecture = row["ArchitectureString"]
        if architecture not in known:
            raise ValueError(f"{line}: ArchitectureString must be a cell such as {next(all_cells())}, got {architecture!r}")
        if architecture in found:
            raise ValueError(f"{line}: {architecture} appears twice")
        found[architecture] = tuple(_percent(line, column, row[column]) for column in COLUMNS[:3])
    return found


def _percent(line: str, column: str, text: str | None) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not 0 <= value <= 100:
        raise ValueError(f"{line}: {column} must be a number in [0, 100], got {text!r}")
    return value
