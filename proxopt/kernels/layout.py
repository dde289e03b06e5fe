"""Where the entries of each group lie in memory.

A compiled loop walks over memory, not over axes. Most groups are regular: the memory has the shape
``(outer, runs, inner, length)``, and entries that differ along the second and the fourth axis share a group. Output channels of
a weight have the shape ``(1, 1, count, length)``, columns of a matrix ``(1, rows, columns, 1)``. Other groups are lists of
pieces: ragged labels, and groups that span several tensors.

Groups are numbered in the order of memory, and those of labels in the order of ``Groups.names``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from proxopt.groups import Groups

SHORT = 8  # entries; shorter pieces are addressed entry by entry


@dataclass(frozen=True)
class Layout:
    """The groups of one problem in memory.

    Attributes:
      shape: ``(outer, runs, inner, length)`` of regular groups; empty for lists of pieces.
      kept: the reduced shape, which one number per group has, and
      order: its axes in the order of memory; both empty for labels.
      pieces: one row (array, offset, length, stride) for each piece, the pieces of a group one after the other. With
        stride 0 the offset is a place in ``places``, and the piece consists of the entries at the places from there on.
      starts: the first piece of each group, and the number of pieces.
      places: numbers of entries, for pieces of stride 0.
    """

    shape: tuple[int, ...] = ()
    kept: tuple[int, ...] = ()
    order: tuple[int, ...] = ()
    pieces: np.ndarray = field(default_factory=lambda: np.zeros((0, 4), np.int64))
    starts: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))
    places: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def groups(self) -> int:
        """The number of groups."""
        return self.shape[0] * self.shape[2] if self.shape else len(self.starts) - 1


def of_entries(arrays: Sequence[Any], strides: Sequence[tuple[int, ...]] = (), groups: Groups | None = None) -> Layout:
    """The layout of one array in which each entry is a group."""
    size = math.prod(arrays[0].shape)
    return Layout((1, 1, size, 1), (size,), (0,))


def of_groups(arrays: Sequence[Any], strides: Sequence[tuple[int, ...]], groups: Groups) -> Layout:
    """The layout of groups of arrays that each fill one block of memory.

    Args:
      arrays: the arrays of one problem; only their shapes are read.
      strides: the distance of neighbours along each axis of each array, in entries.
      groups: fit the arrays.
    """
    if groups.kind == "labels":
        return _labelled(arrays, strides, groups)
    if len(arrays) == 1:
        inside = {a % max(arrays[0].ndim, 1) for a in groups.axes(arrays[0].ndim)}
        found = _regular(tuple(arrays[0].shape), strides[0], inside)
        return found or _in_pieces(tuple(arrays[0].shape), strides[0], inside)
    sizes = [math.prod(a.shape) for a in arrays]
    pieces = [(i, 0, n, 1) for i, n in enumerate(sizes) if n]
    return Layout(pieces=np.array(pieces, np.int64).reshape(-1, 4), starts=np.array([0, len(pieces)]))


def in_memory_order(shape: tuple[int, ...], strides: tuple[int, ...]) -> list[int]:
    """The axes from the outermost in memory to the innermost."""
    return sorted(range(len(shape)), key=lambda a: (-strides[a], a) if shape[a] > 1 else (-math.inf, a))


def _regular(shape: tuple[int, ...], strides: tuple[int, ...], inside: set[int]) -> Layout | None:
    """Groups along the axes ``inside`` in a regular layout; None where they alternate with other axes more often."""
    axes = in_memory_order(shape, strides)
    regular = regular_shape(*merged(shape, axes, inside))
    return None if regular is None else Layout(regular, *_reduced(shape, axes, inside))


def regular_shape(lengths: Sequence[int], kinds: str) -> tuple[int, int, int, int] | None:
    """The shape ``(outer, runs, inner, length)`` of axes as `merged` returns them; None where they have no such shape."""
    if kinds in ("", "g", "k", "kg"):
        return 1, 1, lengths[0] if kinds.startswith("k") else 1, lengths[-1] if kinds.endswith("g") else 1
    if kinds in ("gk", "kgk", "gkg", "kgkg"):
        outer, runs, inner, length = [1] * kinds.startswith("g") + [*lengths] + [1] * kinds.endswith("k")
        return outer, runs, inner, length
    return None


def _reduced(shape: tuple[int, ...], axes: list[int], inside: set[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape of the axes outside of the groups, and the order of these axes in memory."""
    kept = sorted(set(axes) - inside)
    return tuple(shape[a] for a in kept), tuple(kept.index(a) for a in axes if a not in inside)


def merged(shape: Sequence[int], axes: Sequence[int], inside: Set[int]) -> tuple[list[int], str]:
    """Lengths and kinds, "g" inside a group or "k" kept, of the axes with neighbours of one kind merged, without length 1."""
    lengths: list[int] = []
    kinds = ""
    for a in axes:
        kind = "g" if a in inside else "k"
        if shape[a] == 1:
            continue
        if kinds.endswith(kind):
            lengths[-1] *= shape[a]
        else:
            lengths.append(shape[a])
            kinds += kind
    return lengths, kinds


def _in_pieces(shape: tuple[int, ...], strides: tuple[int, ...], inside: set[int]) -> Layout:
    """Groups along axes that alternate with others in memory, as pieces."""
    axes = in_memory_order(shape, strides)
    kept, order = _reduced(shape, axes, inside)
    numbers = np.arange(math.prod(kept)).reshape([1 if a in inside else shape[a] for a in axes])
    codes = np.broadcast_to(numbers, [shape[a] for a in axes]).reshape(-1)
    pieces, starts, places = _by_code([_runs(codes, 0)], numbers.size)
    return Layout((), kept, order, pieces, starts, places)


def _labelled(arrays: Sequence[Any], strides: Sequence[tuple[int, ...]], groups: Groups) -> Layout:
    runs = []
    for i, (x, codes, axis) in enumerate(groups._parts(arrays)):
        if math.prod(x.shape):
            runs.append(_runs_of_labels(i, tuple(x.shape), strides[i], codes, axis))
    pieces, starts, places = _by_code(runs, len(groups.names))
    return Layout(pieces=pieces, starts=starts, places=places)


def _runs_of_labels(i: int, shape: tuple[int, ...], strides: tuple[int, ...], codes: np.ndarray, axis: int | None) -> np.ndarray:
    """Rows (code, array, offset, length, stride) of the pieces of array i."""
    axes = in_memory_order(shape, strides)
    if axis is None:
        return _runs(codes.transpose(axes).reshape(-1), i)
    place = axes.index(axis % len(shape))
    outer = math.prod(shape[a] for a in axes[:place])
    inner = math.prod(shape[a] for a in axes[place + 1 :])
    count = len(codes)
    if inner == 1 and outer > 1:  # the labelled axis is the innermost: strided pieces
        return np.stack([codes, np.full(count, i), np.arange(count), np.full(count, outer), np.full(count, count)], axis=1)
    runs = _runs(np.tile(codes, outer), i)
    runs[:, 2:4] *= inner
    return runs


def _runs(codes: np.ndarray, i: int) -> np.ndarray:
    """Rows (code, array, offset, length, stride) for entries with equal codes one after the other."""
    first = np.flatnonzero(np.concatenate([[True], codes[1:] != codes[:-1]]))
    lengths = np.diff(np.concatenate([first, [len(codes)]]))
    return np.stack([codes[first], np.full(len(first), i), first, lengths, np.ones_like(first)], axis=1)


def _by_code(runs: list[np.ndarray], count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pieces, starts and places as in `Layout`, from rows (code, array, offset, length, stride)."""
    joined = np.concatenate(runs).astype(np.int64) if runs else np.zeros((0, 5), np.int64)
    joined = joined[np.argsort(joined[:, 0], kind="stable")]
    places = np.zeros(0, np.int64)
    if len(joined) and joined[:, 3].sum() < SHORT * len(joined):
        joined, places = _entry_by_entry(joined)
    starts = np.concatenate([[0], np.cumsum(np.bincount(joined[:, 0], minlength=count))])
    return np.ascontiguousarray(joined[:, 1:]), starts, places


def _entry_by_entry(runs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows with one piece for each code and array, whose entries are listed in places; and these."""
    lengths = runs[:, 3]
    ends = np.cumsum(lengths)
    within = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
    places = np.repeat(runs[:, 2], lengths) + within * np.repeat(runs[:, 4], lengths)
    first = np.flatnonzero(np.concatenate([[True], (runs[1:, :2] != runs[:-1, :2]).any(axis=1)]))
    offsets = (ends - lengths)[first]
    sizes = np.diff(np.concatenate([offsets, ends[-1:]]))
    pieces = np.stack([runs[first, 0], runs[first, 1], offsets, sizes, np.zeros_like(first)], axis=1)
    return pieces, places
