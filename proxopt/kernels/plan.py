"""The tables from which `proxopt.kernels.steps.run` reads what to do, and its launch on several threads."""

# mypy: disallow-untyped-calls=False

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from proxopt import kernels
from proxopt.kernels import pool, steps
from proxopt.kernels.layout import Layout

TASK = 1 << 15  # entries of a task: enough to hide its start, and so few that threads finish together


class Problem(NamedTuple):
    """The numbers of the tensors of one problem, several in a joint one, and where its groups lie in their memory."""

    tensors: Sequence[int]
    layout: Layout


class Plan:
    """What `steps.run` has to do for a list of problems whose tensors have one dtype.

    Attributes:
      addresses: the memory address of each tensor (columns) in each of its roles (rows: ``steps.X``, ...), 0 where it has none.
        To be set before a launch.
      bounds: the strength of each group times its weight, problem by problem, as `bounds_of` returns them. To be set before a
        launch.
    """

    def __init__(self, problems: Sequence[Problem], dtype: Any) -> None:
        self._like = np.empty(0, dtype)
        tensors = 1 + max(t for problem in problems for t in problem.tensors)
        self.addresses = np.zeros((steps.ROLES, tensors), np.int64)
        self._info = np.zeros((tensors, steps.COLUMNS), np.int64)
        self._size = 0
        tasks: list[np.ndarray] = []
        groups = pieces = places = segments = 0
        tables: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for number, (members, layout) in enumerate(problems):
            self._size = max(self._size, _block_size(layout))
            parts = _tasks_of(layout)
            rows = np.zeros((len(parts), 6), np.int64)
            rows[:, 0], rows[:, 1:3], rows[:, 4], rows[:, 5] = members[0], parts[:, :2], number, parts[:, 2]
            rows[:, 3] = groups + parts[:, 3]
            if not layout.shape:
                rows[:, 0] = -1
                rows[:, 1:3] += segments
                tables.append(_moved(layout, members, pieces, places))
                segments, pieces, places = segments + layout.groups, pieces + len(layout.pieces), places + len(layout.places)
            else:
                self._info[members[0], :3] = layout.shape[1:]
            tasks.append(rows)
            groups += layout.groups
        self._tasks = np.concatenate(tasks)
        self._starts = np.concatenate([*(t[0] for t in tables), [pieces]]).astype(np.int64)
        self._pieces = np.concatenate([np.zeros((0, 4), np.int64), *(t[1] for t in tables)])
        self._places = np.concatenate([np.zeros(0, np.int64), *(t[2] for t in tables)])
        self.bounds = np.zeros(groups)

    def launch(
        self,
        name: str,
        how: tuple[int, int, int],
        numbers: np.ndarray,
        which: Any,
        l1: float,
        active: np.ndarray | None,
        threads: int,
    ) -> None:
        """Run all tasks.

        Args:
          name: of the kernel, for `proxopt.kernels.calls`.
          how: what comes before the prox, its metric, and what comes after it: constants of `steps`.
          numbers: rows of hyperparameters, in the columns ``steps.SIGN``, ...
          which: the row of ``numbers`` for each tensor, or one for all.
          l1: strength of the soft threshold of entries; not used for tensors that have an array in the role ``steps.L1``.
          active: which problems take part; None for all.
          threads: the largest number of threads. The result does not depend on it.
        """
        kernels.calls[name] += 1
        self._info[:, steps.NUMBERS] = which
        tasks = self._tasks if active is None else self._tasks[active[self._tasks[:, 4]]]
        tables = (self._info, self.addresses, numbers, l1, self.bounds, self._starts, self._pieces, self._places, self._size)

        def work(first: int, last: int) -> None:
            scratch = np.empty(steps.scratch(self._size), self._like.dtype)
            steps.run(how, tasks, first, last, *tables, scratch.ctypes.data, self._like)

        pool.run(work, _shares(tasks[:, 5], threads), threads)


def bounds_of(bounds: Any, layout: Layout) -> np.ndarray:
    """One strength per group, a number or an array as ``Groups.weights`` returns it, as an array in the order of the layout."""
    values = np.asarray(bounds, dtype=np.float64)
    if values.ndim == 0 or (not layout.order and not layout.shape):
        return np.broadcast_to(values, (layout.groups,)).astype(np.float64)
    kept = values.reshape(layout.kept)
    return np.ascontiguousarray(kept.transpose(layout.order)).reshape(-1)


def _tasks_of(layout: Layout) -> np.ndarray:
    """Rows (start, stop, entries, groups before) of blocks of about `TASK` entries."""
    if not layout.shape:
        ends = _ends(layout)
        cuts = np.searchsorted(ends, np.arange(TASK, ends[-1], TASK))
        cuts = np.unique(np.concatenate([[0], cuts, [layout.groups]]))
        starts, stops = cuts[:-1], cuts[1:]
        return np.stack([starts, stops, ends[stops] - ends[starts], starts], axis=1)
    outer, runs, inner, length = layout.shape
    width = steps.tile_width(runs, inner, length)
    starts = np.arange(0, outer * -(-inner // width), max(1, TASK // (runs * length * width)))
    stops = np.append(starts[1:], outer * -(-inner // width))
    return np.stack([starts, stops, (stops - starts) * (runs * length * width), 0 * starts], axis=1)


def _block_size(layout: Layout) -> int:
    """The number of entries that are treated at a time."""
    if not layout.shape:
        return int(np.diff(_ends(layout)).max(initial=0))
    _, runs, inner, length = layout.shape
    return int(runs * length * steps.tile_width(runs, inner, length))


def _ends(layout: Layout) -> np.ndarray:
    """How many entries are in the first 0, 1, 2, ... groups, for lists of pieces."""
    found: np.ndarray = np.concatenate([[0], np.cumsum(layout.pieces[:, 2])])[layout.starts]
    return found


def _moved(layout: Layout, tensors: Sequence[int], pieces: int, places: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The tables of a layout with the numbers of its tensors, behind so many pieces and places of others."""
    moved = layout.pieces.copy()
    moved[:, 0] = np.asarray(tensors)[layout.pieces[:, 0]]
    moved[:, 1] += places * (layout.pieces[:, 3] == 0)
    return layout.starts[:-1] + pieces, moved, layout.places


def _shares(sizes: np.ndarray, threads: int) -> list[tuple[int, int]]:
    """Ranges of tasks of about equal numbers of entries, some for each thread."""
    ends = np.cumsum(sizes)
    total = int(ends[-1]) if len(ends) else 0
    if threads <= 1 or total < 2 * TASK:
        return [(0, len(sizes))]
    count = min(4 * threads, total // TASK)
    cuts = np.searchsorted(ends, np.arange(1, count) * total / count)
    cuts = np.unique(np.concatenate([[0], cuts, [len(sizes)]])).tolist()
    return list(pairwise(cuts))
