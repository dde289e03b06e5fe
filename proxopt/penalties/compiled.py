"""The prox of a `Shrinkage` by the compiled loops of ``proxopt.kernels``, for NumPy arrays and plain torch tensors on a CPU.

`prox` returns None for arrays that the loops cannot handle, and where the result may be differentiated.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np

from proxopt import _arrays, kernels
from proxopt._arrays import Array
from proxopt.groups import Groups
from proxopt.kernels.layout import merged, regular_shape
from proxopt.penalties.shrinkage import Shrinkage, constant

SMALLEST = 2**15  # entries; for fewer the array code is about as fast, and numba need not be imported
SMALLEST_IN_METRIC = 2**12  # the same for arrays of steps, for which the array code takes a hundred times as long
NARROW, WIDE = 16, 1024  # the smallest and largest number of groups side by side that are treated together ...
CACHED = 2**17  # ... and how many entries they should have at most
LEAST = 65536  # entries of the work of one thread
SHORT = 8  # entries; pieces of a labelled array that are shorter on average are not collected into rows without need
METRICS = ("constant", "median", "support", "exact")


def prox(shrinkage: Callable[[], Shrinkage | None], xs: list[Array], steps: list[Any]) -> list[Array] | None:
    """``shrinkage().prox(xs, steps)``, or None where only the array code computes it. Raises the same errors."""
    if _arrays.is_torch_array(xs[0]) and sys.modules["torch"].compiler.is_compiling():
        return None
    size = _arrays.size(xs[0]) if len(xs) == 1 else sum(map(_arrays.size, xs))
    if size < SMALLEST_IN_METRIC or (size < SMALLEST and not any(map(_arrays.ndim, steps))) or not kernels.available():
        return None
    form = shrinkage()
    if form is None:
        return None
    if not (all(map(_plain_numpy, xs)) or _plain_torch(xs, [*steps, form.l1, form.l2, form.weights])):
        return None
    if any(x.dtype != xs[0].dtype for x in xs):
        return None
    problem = _problem(form, xs, steps) if kernels.usable() else None
    return None if problem is None else _solve(problem)


# -- which arrays -----------------------------------------------------------------------------------


def _plain_numpy(x: Array) -> bool:
    return type(x) is np.ndarray and x.dtype.char in "fd" and x.dtype.isnative


def _plain_torch(xs: Sequence[Array], others: Sequence[Any]) -> bool:
    """Whether all are ordinary torch tensors on a CPU, and the operations on them are neither differentiated nor traced."""
    torch: Any = sys.modules.get("torch")
    if torch is None:
        return False
    tensors = [*xs, *(v for v in others if isinstance(v, torch.Tensor))]
    ordinary = all(type(v) in (torch.Tensor, torch.nn.Parameter) and v.device.type == "cpu" for v in tensors)
    if not ordinary or not all(x.dtype in (torch.float32, torch.float64) and x.layout == torch.strided for x in xs):
        return False
    if torch.is_grad_enabled() and any(v.requires_grad for v in tensors):
        return False
    return not any(x.is_neg() for x in tensors) and not _traced(torch)


def _traced(torch: Any) -> bool:
    """Whether torch.jit or torch.func, forward derivatives or a dispatch mode see the operations."""
    if torch.jit.is_tracing() or torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return bool(torch.autograd.forward_ad._current_level >= 0 or torch._C._len_torch_dispatch_stack() > 0)


# -- the problem in NumPy ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Problem:
    """A shrinkage of arrays as the loops take it.

    Args:
      xs: the arrays as they came, and `views` of them in NumPy.
      l1: threshold of the entries, a number, which multiplies `thresholds`, an array for each of xs, unless they are None.
      groups: None where the penalty is elementwise.
      bounds: the threshold of each group, or of all: a number or an array in the form that `Groups.total` returns.
      steps: an array for each of xs, unless the metric is "constant".
    """

    xs: list[Array]
    views: list[np.ndarray]
    l1: float
    thresholds: list[np.ndarray] | None
    groups: Groups | None
    bounds: float | np.ndarray
    steps: list[np.ndarray] | None
    metric: str


def _problem(form: Shrinkage, xs: list[Array], steps: list[Any]) -> _Problem | None:
    """The problem in NumPy, or None where the loops cannot solve it."""
    steps = [_arrays.like(s, x) for s, x in zip(steps, xs)]
    l1 = [0.0 if form.l1 is None else _arrays.like(form.l1, x) for x in xs]
    if not all(_fits(v, x.shape) for x, *own in zip(xs, steps, l1) for v in own):
        return None  # a batch
    groups, bound, metric = None, 0.0, "constant"
    if form.l2 is not None:
        groups, strength = form._per_group(xs, steps)
        bound = strength * groups.weights(xs, form.weights)
        if constant(steps, groups, xs):
            bound = groups.constant("step", steps[0], xs) * bound
        else:
            metric = form.metric or "exact"
        if form.l1 is not None and _arrays.is_number(form.l2) and form.l2 == 0:
            groups, bound, metric = None, 0.0, "constant"
    if groups is not None and groups.kind == "along" and not _fits(bound, _reduced(groups, xs[0])):
        return None
    steps, l1, bound = list(map(_simple, steps)), list(map(_simple, l1)), _simple(bound)
    if not all(map(_is_threshold, (*steps, *l1, bound))):
        return None
    views = list(map(_view, xs))
    thresholds, factor = _thresholds(views, steps, l1)
    full = [np.broadcast_to(_like(s, x), x.shape) for s, x in zip(steps, views)] if metric != "constant" else None
    return _Problem(xs, views, factor, thresholds, groups, bound, full, metric)


def _fits(v: Any, shape: tuple[int, ...]) -> bool:
    """Whether v broadcasts to this shape, and does not make it larger."""
    n = _arrays.ndim(v)
    return n <= len(shape) and (not n or all(a in (1, b) for a, b in zip(reversed(v.shape), reversed(shape))))


def _reduced(groups: Groups, x: Array) -> tuple[int, ...]:
    """The shape of one number for each group along axes."""
    axes = groups.axes(x.ndim)
    return tuple(1 if a - x.ndim in axes else n for a, n in enumerate(x.shape))


def _simple(v: Any) -> Any:
    """An array with one entry as a number; any other as one of NumPy that shares its memory."""
    if _arrays.is_number(v):
        return float(v)
    return float(v.item()) if math.prod(v.shape) == 1 else _view(v)


def _view(v: Any) -> Any:
    """An array as one of NumPy that shares its memory."""
    return v.detach().numpy() if _arrays.is_torch_array(v) else v


def _like(v: Any, x: np.ndarray) -> np.ndarray:
    """A number or an array in the dtype of x."""
    return np.asarray(v, dtype=x.dtype)


def _is_threshold(v: Any) -> bool:
    """Whether a number, or all entries of an array, are finite and >= 0; the values of tensors have not been checked."""
    if isinstance(v, float):
        return 0 <= v < math.inf
    return not v.size or bool(v.min() >= 0 and v.max() < math.inf)


def _thresholds(xs: list[np.ndarray], steps: list[Any], l1: list[Any]) -> tuple[list[np.ndarray] | None, float]:
    """Thresholds of entries as ``arrays * factor``; None in place of arrays of ones."""
    if all(isinstance(t, float) for t in l1):
        if l1[0] == 0 or all(isinstance(s, float) and s == steps[0] for s in steps):
            return None, min(steps[0] * l1[0], float(np.finfo(xs[0].dtype).max)) if l1[0] else 0.0
        return [np.broadcast_to(_like(s, x), x.shape) for s, x in zip(steps, xs)], l1[0]
    return [np.broadcast_to(_like(s * t, x), x.shape) for s, t, x in zip(steps, l1, xs)], 1.0


# -- layouts ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Regular:
    """Memory of the shape (outer, runs, inner, length), whose second and fourth axis are inside the groups."""

    outer: int
    runs: int
    inner: int
    length: int

    @property
    def are_rows(self) -> bool:
        """Whether each group is contiguous."""
        return self.runs == 1

    def width(self, constant: bool) -> int:
        """How many neighbouring groups are treated together."""
        if self.are_rows:
            return 1
        return min(max(CACHED // (self.runs * self.length), NARROW), WIDE) if constant else max(NARROW // self.length, 1)

    def tiles(self, width: int) -> int:
        return self.outer * -(-self.inner // width)

    def table(self, width: int) -> tuple[Any, ...]:
        """The arguments of ``prox_groups`` that describe the layout."""
        return (self.runs, self.inner, self.length, width, NONE, NONE, NONE)

    def largest(self, width: int) -> int:
        """How many entries of scratch memory a tile needs."""
        return 0 if self.are_rows else self.runs * self.length * width


@dataclass(frozen=True)
class _Pieces:
    """Group g has the pieces from owners[g] to owners[g + 1], each with a start and a length."""

    owners: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    @cached_property
    def are_rows(self) -> bool:
        """Whether each group is one piece."""
        return len(self.owners) == len(self.starts) + 1 and bool((np.diff(self.owners) == 1).all())

    @cached_property
    def _largest(self) -> int:
        """The number of entries of the largest group."""
        ends = np.concatenate([[0], np.cumsum(self.lengths)])[self.owners]
        return int(np.diff(ends).max(initial=0))

    def width(self, constant: bool) -> int:
        return 1

    def tiles(self, width: int) -> int:
        return len(self.owners) - 1

    def table(self, width: int) -> tuple[Any, ...]:
        return (0, 0, 0, width, self.owners, self.starts, self.lengths)

    def largest(self, width: int) -> int:
        return self._largest


@dataclass(frozen=True)
class _Labelled:
    """An array of shape (outer, codes, inner) in its memory, whose slices along the second axis have codes."""

    codes: np.ndarray
    outer: int
    inner: int


NONE = np.zeros(0, np.int64)
_Order = tuple[int, ...]


def _memory_order(x: np.ndarray) -> _Order:
    """The axes of x, the one with the largest stride first."""
    if x.flags.c_contiguous:
        return tuple(range(x.ndim))
    return tuple(sorted(range(x.ndim), key=lambda a: -abs(x.strides[a])))


def _along(x: np.ndarray, inside: Sequence[int], order: _Order) -> _Regular | _Pieces:
    """The layout of groups along the axes ``inside``, which are negative, of an array with its axes in this order in memory."""
    lengths, kinds = merged(x.shape, order, {a % x.ndim for a in inside})
    shape = regular_shape(lengths, kinds)
    if shape is not None:
        return _Regular(*shape)
    strides = [math.prod(lengths[i + 1 :]) for i in range(len(lengths))]
    length = lengths[-1] if kinds.endswith("g") else 1
    axes = list(zip(kinds, lengths, strides))
    bases = _offsets([(n, stride) for kind, n, stride in axes if kind == "k"])
    pieces = _offsets([(n, stride) for kind, n, stride in axes if kind == "g" and (stride > 1 or length == 1)])
    starts = (bases[:, None] + pieces).reshape(-1)
    return _Pieces(len(pieces) * np.arange(len(bases) + 1), starts, np.full(len(starts), length))


def _offsets(axes: Sequence[tuple[int, int]]) -> np.ndarray:
    """The places of all entries of an array whose axes have these lengths and strides."""
    found = np.zeros(1, np.int64)
    for n, stride in axes:
        found = (found[:, None] + stride * np.arange(n)).reshape(-1)
    return found


def _labelled(groups: Groups, xs: list[np.ndarray], orders: list[_Order]) -> list[_Labelled]:
    if groups.kind == "whole":
        return [_Labelled(np.zeros(1, np.uint32), 1, x.size) for x in xs]
    found = []
    for (x, codes, axis), order in zip(groups._parts(xs), orders):
        if axis is None:
            found.append(_Labelled(np.ascontiguousarray(codes.transpose(order), np.uint32).reshape(-1), 1, 1))
            continue
        place = order.index(axis % x.ndim)
        lengths = [x.shape[a] for a in order]
        own = np.ascontiguousarray(codes, np.uint32)
        found.append(_Labelled(own, math.prod(lengths[:place]), math.prod(lengths[place + 1 :])))
    return found


def _pieces_of(parts: list[_Labelled], count: int) -> _Pieces:
    owners, starts, lengths, base = [], [], [], 0
    for part in parts:
        by_code = np.argsort(part.codes, kind="stable").astype(np.int64)
        whole = len(part.codes) * part.inner
        places = by_code[:, None] * part.inner + whole * np.arange(part.outer)
        owners.append(np.repeat(part.codes[by_code], part.outer))
        starts.append(base + places.reshape(-1))
        lengths.append(np.full(places.size, part.inner))
        base += whole * part.outer
    owner, start, length = (np.concatenate(v) for v in (owners, starts, lengths))
    kept = length > 0
    owner, start, length = owner[kept], start[kept], length[kept]
    by_owner = np.argsort(owner, kind="stable")
    owner, start, length = owner[by_owner], start[by_owner], length[by_owner]
    first = np.ones(len(owner), bool)
    first[1:] = (owner[1:] != owner[:-1]) | (start[1:] != start[:-1] + length[:-1])
    places = np.flatnonzero(first)
    counts = np.bincount(owner[places], minlength=count)
    return _Pieces(np.concatenate([[0], np.cumsum(counts)]), start[places], np.add.reduceat(length, places))


def _layout_of_labels(groups: Groups, xs: list[np.ndarray], orders: list[_Order], metric: str) -> Any:
    """`_Pieces`; a list of `_Labelled` where sums over labels in the order of memory are faster.

    That of the last arrays is cached beside the labels.
    """
    key = ([x.shape for x in xs], orders, metric == "constant")
    cached = groups.__dict__.get("_layout")
    if cached is not None and cached[0] == key:
        return cached[1]
    parts = _labelled(groups, xs, orders)
    found: Any = parts
    if metric != "constant" or len(parts) == 1:
        found = _pieces_of(parts, groups.count(xs))
        if metric == "constant" and xs[0].size < SHORT * len(found.starts):
            found = parts
    if groups.kind == "labels":
        object.__setattr__(groups, "_layout", (key, found))
    return found


# -- the solution -----------------------------------------------------------------------------------


def _solve(problem: _Problem) -> list[Array] | None:
    """New arrays with the result; None where sums of squares overflow or underflow, which the array code scales."""
    outs = [_arrays.empty_like(x) for x in problem.xs]
    views = list(map(_view, outs))
    orders = list(map(_memory_order, views))
    sources = [x if x.strides == o.strides else _copied(o, x) for x, o in zip(problem.views, views)]
    if problem.groups is None:
        for i, (x, o, order) in enumerate(zip(sources, views, orders)):
            _run(problem, None, x, o, None, _flat(problem.thresholds, i, order), np.zeros(1))
        return outs
    if len(outs) == 1 and problem.groups.kind != "labels":
        _solve_regular(problem, sources[0], views[0], orders[0])
        return outs
    layout = _layout_of_labels(problem.groups, views, orders, problem.metric)
    bounds = np.atleast_1d(np.asarray(problem.bounds, dtype=float))
    if isinstance(layout, list):
        flat = [_flat(problem.thresholds, i, order) for i, order in enumerate(orders)]
        return outs if _sum_over_labels(problem, layout, sources, views, flat, bounds) else None
    if len(outs) == 1:
        h, t = (_flat(values, 0, orders[0]) for values in (problem.steps, problem.thresholds))
        _run(problem, layout, sources[0], views[0], h, t, bounds)
        return outs
    joined = np.concatenate([x.transpose(order).reshape(-1) for x, order in zip(sources, orders)])
    h, t = (_joined(values, orders) for values in (problem.steps, problem.thresholds))
    _run(problem, layout, joined, joined, h, t, bounds)
    ends = np.cumsum([o.size for o in views])[:-1]
    for o, order, part in zip(views, orders, np.split(joined, ends)):
        moved = o.transpose(order)
        moved[...] = part.reshape(moved.shape)
    return outs


def _solve_regular(problem: _Problem, x: np.ndarray, out: np.ndarray, order: _Order) -> None:
    """Groups along axes, or one group."""
    assert problem.groups is not None
    reduced, bounds = _reduced(problem.groups, x), problem.bounds
    layout = _along(x, problem.groups.axes(x.ndim), order)
    if not isinstance(bounds, float):
        bounds = np.broadcast_to(bounds, reduced).transpose(order).reshape(-1)
    h, t = (_flat(values, 0, order) for values in (problem.steps, problem.thresholds))
    _run(problem, layout, x, out, h, t, np.atleast_1d(np.asarray(bounds, dtype=float)))


def _copied(out: np.ndarray, x: np.ndarray) -> np.ndarray:
    np.copyto(out, x)
    return out


def _flat(values: list[np.ndarray] | None, i: int, order: _Order) -> np.ndarray | None:
    """The entries of an array in the order of memory of another."""
    return None if values is None else np.ascontiguousarray(values[i].transpose(order))


def _joined(values: list[np.ndarray] | None, orders: list[_Order]) -> np.ndarray | None:
    if values is None:
        return None
    return np.concatenate([v.transpose(order).reshape(-1) for v, order in zip(values, orders)])


def _loops() -> Any:
    """The compiled functions, which import numba."""
    from proxopt.kernels import prox

    return prox


def _run(problem: _Problem, layout: _Regular | _Pieces | None, x: Any, out: Any, h: Any, t: Any, bounds: np.ndarray) -> None:
    """Launch the loop over the groups of a layout, or over the entries where there is none."""
    loops, launch = _loops(), partial(_launch, out=out, threads=_threads(problem.xs[0]))
    where, l1, constant = (_address(x), _address(out)), problem.l1, problem.metric == "constant"
    if layout is None:
        launch("prox_entries", loops.prox_entries, (*where, l1, _address(t), out.size), count=-(-out.size // loops.BLOCK))
        return
    width = layout.width(constant)
    table, largest, tiles = layout.table(width), layout.largest(width), layout.tiles(width)

    def groups(chosen: np.ndarray, first: int, last: int, like: np.ndarray) -> None:
        common = (*where, _address(h), l1, _address(t), bounds, METRICS.index(problem.metric), *table)
        loops.prox_groups(*common, chosen, np.empty((3, largest), like.dtype), first, last, like)

    def rows(first: int, last: int, like: np.ndarray) -> None:
        rest = np.empty(last - first, np.int64)
        count = loops.shrink_rows(*where, l1, bounds, table[2], *table[5:], rest, first, last, like)
        if count:
            groups(rest[:count], 0, count, like)

    def columns(first: int, last: int, like: np.ndarray) -> None:
        scratch = (np.empty(width), np.empty(width, like.dtype), np.empty(largest // width, like.dtype))
        loops.prox_columns(*where, l1, _address(t), bounds, *table[:4], *scratch, first, last, like)

    if constant and layout.are_rows and t is None and x is not out:
        launch("shrink_rows", rows, (), count=tiles)
    elif constant and isinstance(layout, _Regular) and not layout.are_rows:
        launch("prox_columns", columns, (), count=tiles)
    else:
        launch("prox_groups", groups, (NONE,), count=tiles)


def _launch(
    name: str, function: Callable[..., None], arguments: tuple[Any, ...], count: int, out: np.ndarray, threads: int
) -> None:
    """Call a loop for the tiles 0 to count - 1, in parts that do not depend on the number of threads if it is above 1."""
    from proxopt.kernels import pool

    like = np.zeros(0, out.dtype)
    length = count if threads == 1 else -(-count * LEAST // out.size)
    kernels.calls[name] += 1
    pool.run(function, [(*arguments, i, min(i + length, count), like) for i in range(0, count, length)], threads)


def _threads(x: Array) -> int:
    return int(sys.modules["torch"].get_num_threads()) if _arrays.is_torch_array(x) else 1


def _address(x: np.ndarray | None) -> int:
    return 0 if x is None else x.ctypes.data


def _sum_over_labels(
    problem: _Problem,
    parts: list[_Labelled],
    xs: list[np.ndarray],
    outs: list[np.ndarray],
    thresholds: list[np.ndarray | None],
    bounds: np.ndarray,
) -> bool:
    """Groups by sums over labels in double precision; False where a sum of squares is not right to rounding."""
    loops = _loops()
    assert problem.groups is not None
    count, like = problem.groups.count(outs), np.zeros(0, outs[0].dtype)
    sums = np.zeros(count)
    kernels.calls["add_squares"] += 1
    for x, out, t, part in zip(xs, outs, thresholds, parts):
        loops.add_squares(_address(x), _address(out), problem.l1, _address(t), part.codes, part.outer, part.inner, sums, like)
    points = xs if problem.l1 == 0 else outs  # after the soft threshold
    if not _in_range(sums, parts, points):
        return False
    norms = np.sqrt(sums)
    zeroed = norms <= bounds
    shares = np.where(zeroed, 0.0, 1 - bounds / np.where(zeroed, 1.0, norms))
    factors = np.where(bounds <= 0, 1.0, shares).astype(like.dtype)
    for x, out, part in zip(points, outs, parts):
        loops.scale_by(_address(x), _address(out), part.codes, part.outer, part.inner, factors, like)
    return True


def _in_range(sums: np.ndarray, parts: list[_Labelled], xs: list[np.ndarray]) -> bool:
    """Whether no sum of squares of xs has overflown, or lost entries to underflow; NaN is in range."""
    from proxopt.kernels import rows

    double = xs[0].dtype.itemsize == 8
    if (sums > (rows.LARGEST_DOUBLE if double else rows.LARGEST)).any():
        return False
    low = sums < (rows.SMALLEST_DOUBLE if double else rows.SMALLEST)
    if not low.any():
        return True
    found = np.zeros(len(sums))
    for x, part in zip(xs, parts):
        _loops().largest(_address(x), part.codes, part.outer, part.inner, found, np.zeros(0, x.dtype))
    return not found[low].any()
