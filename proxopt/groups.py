"""How arrays split into groups.

A group is a set of entries that become zero together. Penalties need the number of entries of each group, sums, maxima and
medians over each group, and a way to bring one number per group back to the entries. All of that is here, and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from proxopt import _arrays
from proxopt._arrays import Array

WEIGHTS = ("sqrt_size", "inverse_sqrt_size", "none")


@dataclass(frozen=True, eq=False)
class Groups:
    """A partition of the entries of an array, or of a list of arrays, into groups.

    Build one with ``Groups.whole()``, ``Groups.along(axis)`` or ``Groups.labels(labels, axis)``.

    >>> import numpy as np
    >>> from proxopt import GroupL2, Groups
    >>> x = np.array([[3.0, 0.1], [4.0, 0.1]])
    >>> GroupL2(1.0, groups=Groups.along(0), weights="none").prox(x)  # each column is a group
    array([[2.4, 0. ],
           [3.2, 0. ]])
    """

    kind: str
    axis: int | tuple[int, ...] | None = None
    codes: tuple[np.ndarray, ...] | np.ndarray | None = None  # the number of its label for each slice
    names: tuple[int | str, ...] = ()
    _slices: list[Any] = field(init=False)  # for each array the number of slices with each label; an int where all are equal

    def __post_init__(self) -> None:
        """Count the slices of each label here, because a compiled step cannot read the labels."""
        if self.codes is None:
            return
        parts = [np.ravel(c) for c in (self.codes if isinstance(self.codes, tuple) or self.codes.ndim > 1 else [self.codes])]
        joined, count = np.concatenate(parts), len(self.names)
        counts = [np.bincount(c, minlength=count) for c in (parts if self.axis is not None else [joined])]
        slices = [int(c[0]) if count and (c == c[0]).all() else c for c in counts]
        object.__setattr__(self, "_slices", slices)

    # -- constructors -------------------------------------------------------------------------

    @classmethod
    def whole(cls) -> Groups:
        """All entries, of all arrays of a list, are one group."""
        return cls("whole")

    @classmethod
    def along(cls, axis: int | tuple[int, ...]) -> Groups:
        """Entries that differ only along ``axis`` share a group: on a matrix, ``along(0)`` makes each column a group.

        Args:
          axis: an axis inside the groups, or a tuple of them. Negative axes count from the last.

        Raises:
          TypeError: axis is no int and no tuple of ints.

        >>> import numpy as np
        >>> from proxopt import Groups
        >>> Groups.along(0).count([np.zeros((4, 3))])
        3
        """
        axes = tuple(axis) if isinstance(axis, (tuple, list)) else (axis,)
        if not axes or not all(_is_int(a) for a in axes):
            raise TypeError(f"axis must be an int or a tuple of ints, got {axis!r}")
        return cls("along", tuple(int(a) for a in axes) if isinstance(axis, (tuple, list)) else int(axis))

    @classmethod
    def labels(cls, labels: Sequence[Any] | Array, axis: int | tuple[int, ...] | None = 0) -> Groups:
        """Slices along ``axis`` with the same label share a group, with all entries of the other axes.

        The attribute ``names`` holds the labels in order of first occurrence. Arrays of weights follow that order.

        Args:
          labels: ints or strings, one per slice. For a list of arrays one such sequence per array: equal labels in different
            arrays are one group.
          axis: the labelled axis; for a list of arrays also a tuple with one axis per array. With None, labels has the shape of
            the array, one label per entry.

        Raises:
          TypeError: labels are neither all ints nor all strings, or axis is none of the above.

        >>> from proxopt import Groups
        >>> Groups.labels(["a", "b", "a"]).names
        ('a', 'b')
        """
        many = isinstance(labels, (list, tuple)) and any(_ndim(part) > 0 for part in labels)
        parts = [_label_array(part) for part in labels] if many else [_label_array(labels)]
        if any(not (np.issubdtype(p.dtype, np.integer) or p.dtype.kind in "US") for p in parts if p.size):
            raise TypeError(f"labels must be ints or strings, got {parts[0].dtype}")
        if len({p.dtype.kind in "US" for p in parts if p.size}) > 1:
            raise TypeError("labels must be all ints or all strings, got both")
        flat = np.concatenate([p.reshape(-1) for p in parts])
        sorted_names, first, inverse = np.unique(flat, return_index=True, return_inverse=True)
        order = np.argsort(first)
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        split = np.split(rank[inverse.reshape(-1)], np.cumsum([p.size for p in parts])[:-1])
        codes = tuple(c.reshape(p.shape) for c, p in zip(split, parts))
        names = tuple(n.item() for n in sorted_names[order])
        if not (axis is None or _is_int(axis) or (isinstance(axis, (tuple, list)) and all(_is_int(a) for a in axis))):
            raise TypeError(f"axis must be an int, one int per array, or None, got {axis!r}")
        axis = tuple(int(a) for a in axis) if isinstance(axis, (tuple, list)) else axis
        same_shape = many and len({c.shape for c in codes}) == 1
        return cls("labels", axis, np.stack(codes) if same_shape else codes if many else codes[0], names)

    def to_dict(self) -> dict[str, Any]:
        """Plain data (numbers, strings, lists) from which ``from_dict`` rebuilds the groups."""
        if self.kind != "labels":
            return {"kind": self.kind, "axis": list(self.axis) if isinstance(self.axis, tuple) else self.axis}
        codes = self.codes
        named = [_named(c, self.names) for c in codes] if isinstance(codes, tuple) else _named(codes, self.names)
        return {"kind": "labels", "axis": list(self.axis) if isinstance(self.axis, tuple) else self.axis, "labels": named}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Groups:
        """The inverse of ``to_dict``."""
        axis = tuple(data["axis"]) if isinstance(data["axis"], list) else data["axis"]
        if data["kind"] == "whole":
            return cls.whole()
        return cls.along(axis) if data["kind"] == "along" else cls.labels(data["labels"], axis)

    def __repr__(self) -> str:
        if self.kind == "labels":
            return f"Groups.labels({len(self.names)} names, axis={self.axis})"
        return "Groups.whole()" if self.kind == "whole" else f"Groups.along({self.axis})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Groups) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash((self.kind, self.axis, self.names))

    # -- of given arrays ----------------------------------------------------------------------

    def from_right(self, xs: Sequence[Array]) -> Groups:
        """The same groups with the axes of ``along`` counted from the last, so that they hold for a batch of such arrays too."""
        return Groups("along", self.axes(xs[0].ndim)) if self.kind == "along" else self

    def over_last(self, ndim: int) -> Groups | None:
        """The same groups for stacks of arrays with ``ndim`` axes, each array a problem of its own; None for labels."""
        return None if self.kind == "labels" else Groups("along", self.axes(ndim))

    def axes(self, ndim: int, name: str = "x") -> tuple[int, ...]:
        """The axes inside the groups of an array with ``ndim`` axes, counted from the last: -1, -2, ... Not for labels.

        Raises ValueError where ``along`` names an axis that does not exist, or one twice.
        """
        if self.kind == "whole":
            return tuple(range(-ndim, 0))
        assert self.axis is not None
        axes = self.axis if isinstance(self.axis, tuple) else (self.axis,)
        if not all(-ndim <= a < ndim for a in axes):
            raise ValueError(f"axis of Groups.along must exist in {name} with {ndim} axes, got {self.axis}")
        from_right = tuple(a if a < 0 else a - ndim for a in axes)
        if len(set(from_right)) != len(from_right):
            raise ValueError(f"axis of Groups.along must name each axis once, got {self.axis}")
        return from_right

    def check(self, xs: Sequence[Array], name: str = "x") -> None:
        """Raise ValueError where the groups do not fit the arrays."""
        if self.kind == "along":
            if len(xs) > 1:
                raise ValueError(
                    f"Groups.along({self.axis}) splits one array, got a list of {len(xs)}: use labels to join arrays"
                )
            self.axes(xs[0].ndim, name)
        elif self.kind == "labels":
            for i, (x, codes, axis) in enumerate(self._parts(xs)):
                label = f"{name}[{i}]" if len(xs) > 1 else name
                if axis is None:
                    if codes.shape != tuple(x.shape):
                        raise ValueError(
                            f"labels with axis=None must have the shape of {label}, {tuple(x.shape)}, got {codes.shape}"
                        )
                elif not -x.ndim <= axis < x.ndim:
                    raise ValueError(f"axis of the labels must exist in {label} of shape {tuple(x.shape)}, got {axis}")
                elif codes.shape != (x.shape[axis],):
                    raise ValueError(
                        f"labels must hold one label per slice along axis {axis} of {label}, "
                        f"{x.shape[axis]}, got {len(codes) if codes.ndim == 1 else codes.shape}"
                    )

    def count(self, xs: Sequence[Array]) -> int:
        """The number of groups."""
        if self.kind == "whole":
            return 1
        if self.kind == "labels":
            return len(self.names)
        axes = self.axes(xs[0].ndim)
        return math.prod([n for i, n in enumerate(xs[0].shape) if i - xs[0].ndim not in axes])

    def sizes(self, xs: Sequence[Array]) -> int | np.ndarray:
        """The number of entries per group: an int where all groups are equally large, else an array in the order of ``names``."""
        found: int | np.ndarray = 0
        if self.kind == "whole":
            found = sum(_arrays.size(x) for x in xs)
        elif self.kind == "along":
            found = math.prod([xs[0].shape[a] for a in self.axes(xs[0].ndim)])
        elif self.axis is None:
            found = self._slices[0]
        else:
            inner = [_arrays.size(x) // max(x.shape[axis], 1) for x, _, axis in self._parts(xs)]
            found = sum(n * slices for n, slices in zip(inner, self._slices))
        return found

    def weights(self, xs: Sequence[Array], weights: str | Array) -> Any:
        """One weight per group, of a shape that multiplies what ``total`` returns. ``weights`` is as in ``GroupL2``."""
        if isinstance(weights, str):
            if weights == "none":
                return 1.0
            sizes = self.sizes(xs)
            power = 0.5 if weights == "sqrt_size" else -0.5
            if isinstance(sizes, int):
                return float(max(sizes, 1)) ** power
            return self._beside((weights, *_shapes(xs)), np.maximum(sizes, 1.0) ** power, xs[0], _arrays.like)
        values = _arrays.like(weights, xs[0])
        if self.kind == "along" and _arrays.ndim(values):
            ndim, axes, xp = xs[0].ndim, self.axes(xs[0].ndim), _arrays.namespace(values)
            reduced = tuple(n for i, n in enumerate(xs[0].shape) if i - ndim not in axes)
            try:
                values = xp.broadcast_to(values, reduced)
            except (ValueError, RuntimeError):
                raise ValueError(f"weights must have the reduced shape {reduced}, got {tuple(values.shape)}") from None
            return xp.reshape(values, tuple(1 if i - ndim in axes else n for i, n in enumerate(xs[0].shape)))
        if self.kind == "labels" and _arrays.ndim(values) and tuple(values.shape) != (len(self.names),):
            raise ValueError(f"weights must hold one number per group, {len(self.names)}, got shape {tuple(values.shape)}")
        if self.kind == "whole" and _arrays.ndim(values):
            if math.prod(values.shape) != 1:
                raise ValueError(f"weights must be one number for the one group, got shape {tuple(values.shape)}")
            return _arrays.namespace(values).reshape(values, ())
        return values

    def total(self, values: Sequence[Array], xp: Any = None) -> Array:
        """The sum over each group. With ``along`` the summed axes stay, with length 1. xp: the namespace of the values."""
        return self._reduce(xp or _arrays.namespace(*values), values, "sum")

    def largest(self, values: Sequence[Array], xp: Any = None) -> Array:
        """The maximum of each group of non-negative values; 0 for an empty group."""
        return self._reduce(xp or _arrays.namespace(*values), values, "max")

    def norms(self, xs: Sequence[Array], xp: Any = None) -> Array:
        """The L2 norm of each group, as ``total`` returns it; its gradient is 0 at a zero group.

        Entries are scaled by the largest of their group before they are squared, so that no square overflows or underflows.
        """
        xp = xp or _arrays.namespace(*xs)
        if all(type(x) is np.ndarray and x.dtype.char in "fd" for x in xs):
            found = self._unscaled_norms(xs, xp)
            if found is not None:
                return found
        largest = self.scale(xs, xp)
        scaled = [x / m for x, m in zip(xs, self.spread(largest, xs, xp))]
        square = self.total([_arrays.square(xp, x) for x in scaled], xp)
        zero = square == 0
        root = largest * xp.sqrt(xp.where(zero, xp.ones_like(square), square))
        return xp.where(zero, xp.zeros_like(root), root)

    def _unscaled_norms(self, xs: Sequence[np.ndarray], xp: Any) -> np.ndarray | None:
        """The L2 norm of each group; None where a square overflows, or loses digits to underflow."""
        with np.errstate(over="ignore", under="ignore"):
            square = self.total([x * x for x in xs], xp)
        zero = square == 0
        if zero.any() and any(((x != 0) & z).any() for x, z in zip(xs, self.spread(zero, xs, xp))):
            return None
        low, high = (1e-24, 1e36) if square.dtype.char == "f" else (1e-280, 1e300)
        in_range = zero | ((square >= low) & (square <= high))
        return np.sqrt(square) if in_range.all() else None

    def scale(self, xs: Sequence[Array], xp: Any) -> Array:
        """max|x_g| as a constant for automatic differentiation; 1 where it is 0 or not finite."""
        largest = self.largest([xp.abs(_arrays.detach(x)) for x in xs], xp)
        return xp.where((largest > 0) & xp.isfinite(largest), largest, xp.ones_like(largest))

    def median(self, values: Sequence[Array], xp: Any = None) -> Array:
        """The median of each group: the mean of the two middle entries where their number is even."""
        xp = xp or _arrays.namespace(*values)
        if self.kind == "along":
            axes = self.axes(values[0].ndim)
            keep = tuple(a for a in range(-values[0].ndim, 0) if a not in axes)
            rows = xp.permute_dims(values[0], tuple(a + values[0].ndim for a in keep + axes))
            rows = xp.reshape(rows, (*(values[0].shape[a] for a in keep), -1))
            shape = tuple(1 if i - values[0].ndim in axes else n for i, n in enumerate(values[0].shape))
            return xp.reshape(_arrays.middle(xp, rows), shape)
        if self.kind == "whole":
            return _arrays.middle(xp, xp.concat([xp.reshape(v, (-1,)) for v in values]))
        ordered, index = self._in_order(xp, values), partial(_arrays.index, xp=xp)
        sizes = np.zeros(len(self.names), dtype=int) + self.sizes(values)
        start, sizes = np.cumsum(sizes) - sizes, np.maximum(sizes, 1)
        last = max(ordered.shape[0] - 1, 0)  # an empty last label reads it, and its result is not used
        places = [np.minimum(start + k, last) for k in ((sizes - 1) // 2, sizes // 2)]
        low, high = (self._beside((i, *_shapes(values)), place, ordered, index) for i, place in enumerate(places))
        return (xp.take(ordered, low, axis=0) + xp.take(ordered, high, axis=0)) / 2

    def spread(self, per_group: Any, xs: Sequence[Array], xp: Any = None) -> list[Any]:
        """One number per group as arrays that broadcast against each of ``xs``: for each entry the number of its group."""
        if self.kind != "labels" or not _arrays.ndim(per_group):
            return [per_group] * len(xs)
        xp = xp or _arrays.namespace(per_group)
        out, index = [], partial(_arrays.index, xp=xp)
        for i, (x, codes, axis) in enumerate(self._parts(xs)):
            taken = xp.take(per_group, self._beside(("codes", i), codes.reshape(-1), per_group, index), axis=0)
            shape = tuple(x.shape) if axis is None else tuple(-1 if i == axis % x.ndim else 1 for i in range(x.ndim))
            out.append(xp.reshape(taken, shape))
        return out

    def ids(self, xs: Sequence[Array]) -> list[np.ndarray]:
        """The index of its group for each entry."""
        if self.kind == "whole":
            return [np.zeros(x.shape, dtype=int) for x in xs]
        if self.kind == "labels":
            return [self._dense(x, codes, axis) for x, codes, axis in self._parts(xs)]
        shape = tuple(1 if i - xs[0].ndim in self.axes(xs[0].ndim) else n for i, n in enumerate(xs[0].shape))
        return [np.broadcast_to(np.arange(math.prod(shape)).reshape(shape), xs[0].shape)]

    def inside(self, outer: Groups, xs: Sequence[Array]) -> bool:
        """Whether each of these groups lies inside one group of ``outer``."""
        inner_ids = np.concatenate([i.reshape(-1) for i in self.ids(xs)])
        outer_ids = np.concatenate([i.reshape(-1) for i in outer.ids(xs)])
        first = np.zeros(self.count(xs), dtype=int)
        first[inner_ids] = outer_ids
        return bool((first[inner_ids] == outer_ids).all())

    def constant(self, name: str, value: Any, xs: Sequence[Array]) -> Any:
        """``value`` (a number, or an array that broadcasts against the one array of ``xs``) as one number per group.

        Raises ValueError where it differs inside a group. Arrays on a device are not read: what their shape allows is refused.
        """
        if _arrays.ndim(value) == 0:
            return value
        if len(xs) > 1:
            raise ValueError(f"{name} must be one number for a list of arrays, got shape {tuple(value.shape)}")
        x = xs[0]
        if self.kind == "along":
            axes = [a for a in self.axes(x.ndim) if -a <= value.ndim and value.shape[a] != 1]
            for a in axes:
                head = np.take(value, [0], axis=a) if isinstance(value, np.ndarray) else None
                if head is None or not (value == head).all():
                    raise ValueError(f"{name} must be constant inside each group (axis {a}), got shape {tuple(value.shape)}")
                value = head
            return value
        if value.ndim <= x.ndim and math.prod(value.shape) == 1:
            return _arrays.namespace(value).reshape(value, ())
        if not isinstance(value, np.ndarray):
            raise ValueError(
                f"{name} must be one number where groups are {self.kind}, got shape {tuple(value.shape)}: "
                "batch with vmap, weigh groups with weights="
            )
        try:
            full = np.broadcast_to(value, x.shape)
        except ValueError:
            raise ValueError(f"{name} of shape {tuple(value.shape)} must broadcast to x of shape {tuple(x.shape)}") from None
        ids = self.ids(xs)[0].reshape(-1)
        first = np.zeros(self.count(xs), dtype=full.dtype)
        first[ids] = full.reshape(-1)
        if not (first[ids] == full.reshape(-1)).all():
            raise ValueError(f"{name} must be constant inside each group, got differing values in one group")
        return first.reshape(()) if self.kind == "whole" else first

    def refuse_batch(self, name: str, value: Any, x: Array) -> None:
        """Raise ValueError where broadcasting x against ``value`` would repeat entries inside a group, or shift its axes."""
        n, shape = _arrays.ndim(value), (1,) * max(_arrays.ndim(value) - x.ndim, 0) + tuple(x.shape)
        inside = self.axes(x.ndim) if self.kind == "along" else range(-n, 0)
        if (n > x.ndim and self.kind != "along") or any(-a <= n and value.shape[a] not in (1, shape[a]) for a in inside):
            raise ValueError(
                f"{name} must not repeat the entries of a group: x has shape {tuple(x.shape)}, got {name} of shape "
                f"{tuple(value.shape)} with {self}; batch whole arrays and labels with vmap"
            )

    def varies(self, step: Any, x: Array) -> bool:
        """Whether ``step`` can differ inside a group, by its shape alone."""
        if _arrays.ndim(step) == 0 or math.prod(step.shape) == 1:
            return False
        return self.kind != "along" or any(-a <= step.ndim and step.shape[a] != 1 for a in self.axes(x.ndim))

    # -- implementation -----------------------------------------------------------------------

    def _parts(self, xs: Sequence[Array]) -> list[tuple[Array, np.ndarray, int | None]]:
        """Each array with its codes and its labelled axis."""
        assert self.codes is not None
        codes: tuple[np.ndarray, ...]
        if isinstance(self.codes, tuple):
            codes = self.codes
        elif len(xs) > 1 or (self.codes.shape[:1] == (1,) and self.codes.ndim == (xs[0].ndim if self.axis is None else 1) + 1):
            codes = tuple(self.codes) if self.codes.ndim > 1 else (self.codes,)
        else:
            codes = (self.codes,)
        if len(codes) != len(xs):
            raise ValueError(f"labels must come as one sequence per array, {len(xs)}, got {len(codes)}")
        axes = self.axis if isinstance(self.axis, tuple) else (self.axis,) * len(xs)
        if len(axes) != len(xs):
            raise ValueError(f"axis of the labels must name one axis per array, {len(xs)}, got {len(axes)}")
        return list(zip(xs, codes, axes))

    def _dense(self, x: Array, codes: np.ndarray, axis: int | None) -> np.ndarray:
        """Codes spread over all entries of x."""
        if axis is None:
            return codes
        shape = [1] * x.ndim
        shape[axis] = -1
        return np.broadcast_to(codes.reshape(shape), tuple(x.shape))

    def _in_order(self, xp: Any, values: Sequence[Array]) -> Array:
        """All entries as one vector, label by label, ascending inside each: memory does not grow with uneven labels."""
        flat, owners, index = [], [], partial(_arrays.index, xp=xp)
        for i, (v, codes, axis) in enumerate(self._parts(values)):
            if axis is not None:
                v = xp.permute_dims(v, (axis % v.ndim, *(i for i in range(v.ndim) if i != axis % v.ndim)))
            shape = (codes.size, _arrays.size(v) // max(codes.size, 1))
            flat.append(xp.reshape(v, (-1,)))
            numbers = self._beside(("codes", i), codes.reshape(-1), v, index)
            owners.append(xp.reshape(xp.broadcast_to(xp.reshape(numbers, (-1, 1)), shape), (-1,)))
        joined, owner = xp.concat(flat), xp.concat(owners)
        by_size = xp.argsort(joined)
        by_label = xp.argsort(xp.take(owner, by_size, axis=0), stable=True)
        return xp.take(joined, xp.take(by_size, by_label, axis=0), axis=0)

    def _reduce(self, xp: Any, values: Sequence[Array], how: str) -> Array:
        fold = xp.sum if how == "sum" else xp.max
        if self.kind == "along":
            return fold(values[0], axis=self.axes(values[0].ndim), keepdims=True)
        if self.kind == "whole":
            parts = [fold(v) for v in values if _arrays.size(v)]
            total = parts[0]
            for part in parts[1:]:
                total = total + part if how == "sum" else xp.maximum(total, part)
            return total
        vectors, codes = [], []
        for v, c, axis in self._parts(values):
            inner = () if axis is None else tuple(i for i in range(v.ndim) if i != axis % v.ndim)
            if not _arrays.size(v):
                continue
            vectors.append(xp.reshape(fold(v, axis=inner) if inner else v, (-1,)))
            codes.append(c.reshape(-1))
        joined = vectors[0] if len(vectors) == 1 else xp.concat(vectors)
        segment = _arrays.segment_sum if how == "sum" else _arrays.segment_max
        every = codes[0] if len(codes) == 1 else np.concatenate(codes)
        if _arrays.is_torch_array(joined):
            every = self._beside(("all codes", *_shapes(values)), every, joined, partial(_arrays.index, xp=xp))
        return segment(joined, every, len(self.names))

    def _beside(self, key: tuple[Any, ...], values: np.ndarray, x: Array, make: Callable[..., Array]) -> Array:
        """make(values, x): the values as an array of x's library, on its device.

        Copies to a torch device are cached under ``key``: copying in every step would make the host wait for the device, and a
        CUDA graph cannot contain a copy from the host.
        """
        if not _arrays.keeps(x):
            return make(values, x)
        kept = self.__dict__.setdefault("_kept", {})
        key = (*key, x.device, x.dtype)
        if key not in kept:
            kept[key] = make(values, x)
        return kept[key]

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_kept", "_layout")}


def _shapes(xs: Sequence[Array]) -> list[tuple[int, ...]]:
    return [tuple(x.shape) for x in xs]


def _is_int(v: Any) -> bool:
    return isinstance(v, (int, np.integer)) and not isinstance(v, bool)


def _ndim(v: Any) -> int:
    return 1 if isinstance(v, (list, tuple)) else _arrays.ndim(v)


def _label_array(v: Any) -> np.ndarray:
    if hasattr(v, "detach"):
        v = v.detach().cpu()
    flat = list(v) if isinstance(v, (list, tuple)) else None
    if flat and len({isinstance(item, str) for item in flat}) > 1:
        raise TypeError("labels must be all ints or all strings, got both")
    return np.asarray(v)


def _named(codes: Any, names: tuple[int | str, ...]) -> list[Any]:
    if isinstance(codes, np.ndarray) and codes.ndim > 1:
        return [_named(c, names) for c in codes]
    return [names[c] for c in codes]
