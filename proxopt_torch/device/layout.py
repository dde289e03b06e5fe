"""Where the entries of groups lie in the memory of dense tensors, as arrays of NumPy that become tables on a device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TypeAlias

import numpy as np
from torch import Tensor

from proxopt import Groups, Shrinkage

Level: TypeAlias = tuple[int, int]  # of a nest of loops over memory: how often, and the stride

CHUNK = 1024  # entries that are treated together where there are no groups
MOST_PIECES = 64  # of a group, as read by one program one after the other
MOST_ENTRIES = 1 << 18  # of a group: more would leave most of a device idle, as one program reads them all
LIMIT = 1 << 31  # entries of a tensor: places within a piece are 32 bits


@dataclass
class Pieces:
    """Pieces of groups: entry j of a piece lies at ``base + (j // inner) * outer + (j % inner) * stride``.

    One number for each piece: the number of its group and of its tensor, base, number of entries, inner, outer and stride.
    """

    group: np.ndarray
    tensor: np.ndarray
    base: np.ndarray
    length: np.ndarray
    inner: np.ndarray
    outer: np.ndarray
    stride: np.ndarray

    @classmethod
    def of(cls, group: np.ndarray, tensor: int, base: np.ndarray, levels: Sequence[Level]) -> Pieces | None:
        """Pieces of one shape: at most two nested loops, the inner one first; None for more."""
        if len(levels) > 2:
            return None
        (inner, stride), (rounds, outer) = [*levels, (1, 0), (1, 0)][:2]
        if rounds == 1 and stride != 1:  # one loop with a stride is written as an outer loop
            inner, stride, rounds, outer = 1, 1, inner, stride
        elif rounds == 1:
            outer = 0

        def full(value: int) -> np.ndarray:
            return np.full(len(base), value, dtype=np.int64)

        return cls(
            np.asarray(group, dtype=np.int64), full(tensor), base, full(inner * rounds), full(inner), full(outer), full(stride)
        )

    def contiguous(self) -> np.ndarray:
        """Whether a piece is one run of memory."""
        runs: np.ndarray = (self.inner == self.length) & (self.stride == 1)
        return runs

    def selected(self, order: np.ndarray) -> Pieces:
        """The pieces with these numbers, in this order."""
        return Pieces(*(getattr(self, f.name)[order] for f in fields(self)))

    @classmethod
    def joined(cls, parts: Sequence[Pieces]) -> Pieces:
        """All pieces of several."""
        return cls(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(cls)))


@dataclass
class Layout:
    """Pieces of the groups of one problem, sorted by group, with the weight of each group."""

    pieces: Pieces
    weights: np.ndarray


def layout(form: Shrinkage | None, xs: Sequence[Tensor]) -> Layout | None:
    """The groups of dense tensors that are one problem; None where they need more than the kernel reads."""
    if any(x.numel() >= LIMIT for x in xs):
        return None
    if form is None or form.l2 is None:
        chunks = [_chunks(i, x) for i, x in enumerate(xs)]
        counts = np.cumsum([0] + [len(c.group) for c in chunks])
        for chunk, count in zip(chunks, counts):
            chunk.group = chunk.group + count
        return Layout(Pieces.joined(chunks), np.ones(counts[-1], np.float32))
    groups = form.groups or Groups.whole()
    parts = _labelled(groups, xs) if groups.kind == "labels" else _regular(groups, xs)
    weights = None if parts is None else _weights(form, groups, xs)
    if parts is None or weights is None:
        return None
    pieces = Pieces.joined(parts)
    # groups in the order of memory, so that programs beside one another read beside one another
    place = np.lexsort((pieces.base, pieces.tensor))
    old, first = np.unique(pieces.group[place], return_index=True)
    order = old[np.argsort(first)]
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    pieces.group = rank[pieces.group]
    pieces = pieces.selected(np.argsort(pieces.group, kind="stable"))
    sizes = np.bincount(pieces.group, weights=pieces.length, minlength=len(weights))
    if np.bincount(pieces.group).max() > MOST_PIECES or sizes.max() > MOST_ENTRIES:
        return None
    return Layout(pieces, weights[order])


def _chunks(tensor: int, x: Tensor) -> Pieces:
    """The memory of a tensor in pieces of equal length, but for the last; each is a group of its own."""
    base = np.arange(0, x.numel(), CHUNK, dtype=np.int64)
    pieces = Pieces.of(np.arange(len(base)), tensor, base, [(CHUNK, 1)])
    assert pieces is not None
    pieces.length = np.minimum(CHUNK, x.numel() - base)
    pieces.inner = pieces.length
    return pieces


def _levels(shape: Sequence[int], strides: Sequence[int]) -> list[Level]:
    """Axes as nested loops, the one with the smallest stride first; loops that continue one another are one."""
    out: list[Level] = []
    for stride, size in sorted((stride, size) for size, stride in zip(shape, strides) if size > 1):
        if out and out[-1][0] * out[-1][1] == stride:
            out[-1] = (out[-1][0] * size, out[-1][1])
        else:
            out.append((size, stride))
    return out


def _regular(groups: Groups, xs: Sequence[Tensor]) -> list[Pieces] | None:
    """Groups along axes, or all entries of all tensors as one group: each piece is a whole group in its tensor."""
    out = []
    for i, x in enumerate(xs):
        axes = groups.axes(x.ndim)
        inside = [a % x.ndim for a in axes]
        outside = [a for a in range(x.ndim) if a not in inside]
        base = np.zeros(1, dtype=np.int64)
        for a in outside:  # in the order of the weights: the last axis fastest
            base = (base[:, None] + np.arange(x.shape[a], dtype=np.int64) * x.stride(a)).reshape(-1)
        levels = _levels([x.shape[a] for a in inside], [x.stride(a) for a in inside])
        pieces = Pieces.of(np.arange(len(base)), i, base, levels)
        if pieces is None:
            return None
        out.append(pieces)
    return out


def _labelled(groups: Groups, xs: Sequence[Tensor]) -> list[Pieces] | None:
    """Groups of slices with equal labels: a piece for each run of such slices that continue one another in memory."""
    out = []
    for i, (x, codes, axis) in enumerate(groups._parts(xs)):
        if axis is None:
            order = np.argsort(-np.asarray(x.stride()), kind="stable")
            codes = np.transpose(codes, order).reshape(-1)  # in the order of memory
            stride, rest = 1, []
        else:
            others = [a for a in range(x.ndim) if a != axis % x.ndim]
            stride, rest = x.stride(axis), _levels([x.shape[a] for a in others], [x.stride(a) for a in others])
        run = 1  # entries of a slice that lie together
        if rest and rest[0][1] == 1:
            (run, _), *rest = rest
        joins = stride == run
        starts = np.flatnonzero(np.diff(codes, prepend=-1)) if joins else np.arange(len(codes))
        slices = np.diff(starts, append=len(codes))
        pieces = Pieces.of(codes[starts], i, starts.astype(np.int64) * stride, [(run, 1), *rest])
        if pieces is None:
            return None
        if joins:
            rounds = math.prod(size for size, _ in rest)
            pieces.inner = slices * run
            pieces.length = pieces.inner * rounds
            pieces.stride = np.ones_like(pieces.stride)
            pieces.outer = np.full_like(pieces.outer, rest[0][1] if rest else 0)
        out.append(pieces)
    return out


def _weights(form: Shrinkage, groups: Groups, xs: Sequence[Tensor]) -> np.ndarray | None:
    """The weight of each group; None where it would have to be read from a device."""
    weights = form.weights
    if isinstance(weights, Tensor):
        if weights.device.type != "cpu":
            return None
        weights = weights.numpy()
    stand_ins = [np.broadcast_to(np.float32(0), tuple(x.shape)) for x in xs]  # for their shapes, without memory
    values = np.asarray(groups.weights(stand_ins, weights), dtype=np.float32).reshape(-1)
    return np.ascontiguousarray(np.broadcast_to(values, (groups.count(stand_ins),)))
