"""What the cases of `search_step.py` share whatever library computes them: sizes, the paths that are nonzero, and the codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Sizes:
    """Sizes of a step.

    channels, layers, batch: of the supernet of images and its batches. hidden, words, bptt, columns: of the recurrent supernet:
    its width, its vocabulary, and the rows and columns of a window of text. evaluated: images in each of the two batch sizes of
    an evaluation (all batches, and the last), whose compilation counts as well; (): not measured.
    """

    channels: int = 16
    layers: int = 8
    batch: int = 16
    hidden: int = 300
    words: int = 10_000
    bptt: int = 35
    columns: int = 64
    evaluated: tuple[int, ...] = ()


PRESETS = {
    "paper": Sizes(),
    "small": Sizes(channels=8, layers=5, batch=32, hidden=96, bptt=10, evaluated=(500, 48)),
    "tiny": Sizes(channels=2, layers=3, batch=4, hidden=4, words=20, bptt=3, columns=2),
}


def tenth(paths: int) -> np.ndarray:
    """A tenth of the paths of a cell, as indices."""
    return np.random.default_rng(1).permutation(paths)[: paths // 10]


def compressed(shapes: dict[str, list[tuple[int, int]]]) -> tuple[dict[str, list[np.ndarray]], dict[str, np.ndarray]]:
    """Measurement matrices of ISTA-NAS and its compressed variables (nodes, rows): with equal ones, equal paths are computed.

    shapes: for each cell the shapes (rows, paths) of the matrices of its nodes.
    """
    random = np.random.default_rng(1)
    matrices: dict[str, list[Any]] = {cell: [random.random(shape, np.float32) for shape in own] for cell, own in shapes.items()}
    variables = {cell: 1e-3 * random.standard_normal((len(own), own[0][0]), np.float32) for cell, own in shapes.items()}
    return matrices, variables
