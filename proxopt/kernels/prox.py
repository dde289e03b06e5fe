"""The prox of whole arrays: groups in contiguous rows, in strided layouts, in pieces, and sums over labels.

Arrays are given by their address, as one vector in the order of their memory; `like` is an empty array of their dtype. Except in
`add_squares`, `largest` and `scale_by`, each group is copied to a contiguous row, which stays in the cache, and treated there by
the functions of ``rows``. A row of ``out`` serves where the entries of a group lie side by side.

Common arguments:

- x, out: addresses of the input and the result; may be equal.
- h: address of the steps of the entries, 0 if the metric is `CONSTANT`.
- l1, t: the threshold of entry j is ``l1 t[j]``, or l1 where the address t is 0.
- bounds: the threshold of each group, or of all of them if it holds one number. With `CONSTANT` it includes the step.
- metric: `CONSTANT`, `MEDIAN`, `SUPPORT` or `EXACT`.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import numpy as np

from proxopt.kernels.jit import jit, view
from proxopt.kernels.rows import scale, shrink, shrink_exact, shrink_median, shrink_support, soften, soften_by

CONSTANT, MEDIAN, SUPPORT, EXACT = range(4)
WIDTH = 16  # groups of a tile: a cache line of single precision


# -- a row ------------------------------------------------------------------------------------------


@jit
def copy(x, z):
    for j in range(x.shape[0]):
        z[j] = x[j]


@jit
def treat(z, h, l1, t, bound, metric):
    """Replace z by its prox; h and t are empty where they are not needed."""
    if t.shape[0] > 0:
        soften_by(z, t, z.dtype.type(l1))
    elif l1 > 0:
        soften(z, z.dtype.type(l1))
    if metric == CONSTANT:
        shrink(z, bound)
    elif metric == MEDIAN:
        shrink_median(z, h, bound)
    elif metric == SUPPORT:
        shrink_support(z, h, bound)
    else:
        shrink_exact(z, h, bound)


@jit
def part_of(address, start, length, like):
    """A row of an array, empty where there is no such array."""
    return view(address, start, length, like) if address != 0 else view(address, 0, 0, like)


# -- groups of an array -----------------------------------------------------------------------------


@jit
def prox_rows(x, out, h, l1, t, bounds, metric, starts, length, total, first, last, like):
    """Groups ``first`` to ``last - 1`` in contiguous rows: from starts[g] to starts[g + 1], or of the same length if it is > 0.

    The last of equal rows ends with the array, after ``total`` entries.
    """
    for g in range(first, last):
        start = g * length if length > 0 else starts[g]
        stop = min(start + length, total) if length > 0 else starts[g + 1]
        z = view(out, start, stop - start, like)
        if x != out:
            copy(view(x, start, stop - start, like), z)
        bound = bounds[g] if bounds.shape[0] > 1 else bounds[0]
        treat(z, part_of(h, start, stop - start, like), l1, part_of(t, start, stop - start, like), bound, metric)


@jit
def collect(address, base, width, pieces, inner, stride, buffer):
    """Copy `width` groups, whose entries lie side by side, to rows of a buffer."""
    n = pieces.shape[0] * inner
    for p in range(pieces.shape[0]):
        for i in range(inner):
            source = view(address, base + pieces[p] + i * stride, width, buffer)
            k = p * inner + i
            for w in range(width):
                buffer[w * n + k] = source[w]


@jit
def distribute(address, base, width, pieces, inner, stride, buffer):
    """The inverse of `collect`."""
    n = pieces.shape[0] * inner
    for p in range(pieces.shape[0]):
        for i in range(inner):
            target = view(address, base + pieces[p] + i * stride, width, buffer)
            k = p * inner + i
            for w in range(width):
                target[w] = buffer[w * n + k]


@jit
def collect_pieces(address, base, pieces, inner, buffer):
    """Copy one group, in contiguous pieces of equal length, to a row."""
    for p in range(pieces.shape[0]):
        source = view(address, base + pieces[p], inner, buffer)
        for i in range(inner):
            buffer[p * inner + i] = source[i]


@jit
def distribute_pieces(address, base, pieces, inner, buffer):
    for p in range(pieces.shape[0]):
        target = view(address, base + pieces[p], inner, buffer)
        for i in range(inner):
            target[i] = buffer[p * inner + i]


@jit
def prox_strided(x, out, h, l1, t, bounds, metric, bases, groups, pieces, inner, stride, first, last, like):
    """Tiles ``first`` to ``last - 1`` of groups side by side: tile k has the groups from groups[k] to groups[k + 1] - 1.

    Entry i of piece p of group w of a tile is at ``bases[k] + w + pieces[p] + i stride``. With stride 1 a tile is one group.
    """
    n = pieces.shape[0] * inner
    size = n if stride == 1 else WIDTH * n
    z = np.empty(size, like.dtype)
    hs = np.empty(size if h != 0 else 0, like.dtype)
    ts = np.empty(size if t != 0 else 0, like.dtype)
    for k in range(first, last):
        base, width = bases[k], groups[k + 1] - groups[k]
        if stride == 1:
            collect_pieces(x, base, pieces, inner, z)
            if h != 0:
                collect_pieces(h, base, pieces, inner, hs)
            if t != 0:
                collect_pieces(t, base, pieces, inner, ts)
        else:
            collect(x, base, width, pieces, inner, stride, z)
            if h != 0:
                collect(h, base, width, pieces, inner, stride, hs)
            if t != 0:
                collect(t, base, width, pieces, inner, stride, ts)
        for w in range(width):
            g = groups[k] + w
            bound = bounds[g] if bounds.shape[0] > 1 else bounds[0]
            own_h = hs[w * n : (w + 1) * n] if h != 0 else hs
            own_t = ts[w * n : (w + 1) * n] if t != 0 else ts
            treat(z[w * n : (w + 1) * n], own_h, l1, own_t, bound, metric)
        if stride == 1:
            distribute_pieces(out, base, pieces, inner, z)
        else:
            distribute(out, base, width, pieces, inner, stride, z)


@jit
def join(address, starts, lengths, first, last, buffer):
    """Copy contiguous pieces of different lengths to a row; returns its length."""
    n = 0
    for p in range(first, last):
        source = view(address, starts[p], lengths[p], buffer)
        for i in range(lengths[p]):
            buffer[n + i] = source[i]
        n += lengths[p]
    return n


@jit
def split(address, starts, lengths, first, last, buffer):
    """The inverse of `join`."""
    n = 0
    for p in range(first, last):
        target = view(address, starts[p], lengths[p], buffer)
        for i in range(lengths[p]):
            target[i] = buffer[n + i]
        n += lengths[p]


@jit
def prox_pieces(x, out, h, l1, t, bounds, metric, owners, starts, lengths, longest, first, last, like):
    """Groups ``first`` to ``last - 1`` of contiguous pieces: group g has those from owners[g] to owners[g + 1] - 1."""
    z = np.empty(longest, like.dtype)
    hs = np.empty(longest if h != 0 else 0, like.dtype)
    ts = np.empty(longest if t != 0 else 0, like.dtype)
    for g in range(first, last):
        n = join(x, starts, lengths, owners[g], owners[g + 1], z)
        if n == 0:
            continue
        if h != 0:
            join(h, starts, lengths, owners[g], owners[g + 1], hs)
        if t != 0:
            join(t, starts, lengths, owners[g], owners[g + 1], ts)
        bound = bounds[g] if bounds.shape[0] > 1 else bounds[0]
        treat(z[:n], hs[:n] if h != 0 else hs, l1, ts[:n] if t != 0 else ts, bound, metric)
        split(out, starts, lengths, owners[g], owners[g + 1], z)


# -- sums over labels, in the order of memory -------------------------------------------------------


@jit
def square_sum(z):
    total = 0.0
    for j in range(z.shape[0]):
        total += float(z[j]) * float(z[j])
    return total


@jit
def add_squares(x, out, l1, t, codes, outer, inner, sums, like):
    """Write the soft threshold of x to out, and add its squares to the sum of the label of each entry.

    x is of shape (outer, codes, inner): entry (a, k, b) has the label codes[k].
    """
    count = codes.shape[0]
    for a in range(outer):
        if inner == 1:
            add_squares_of_entries(x, out, l1, t, a * count, codes, sums, like)
            continue
        for k in range(count):
            start = (a * count + k) * inner
            z = view(out, start, inner, like)
            if x != out:
                copy(view(x, start, inner, like), z)
            treat(z, view(x, 0, 0, like), l1, part_of(t, start, inner, like), 0.0, CONSTANT)
            sums[codes[k]] += square_sum(z)


@jit
def add_squares_of_entries(x, out, l1, t, start, codes, sums, like):
    count = codes.shape[0]
    z = view(out, start, count, like)
    if x != out:
        copy(view(x, start, count, like), z)
    treat(z, view(x, 0, 0, like), l1, part_of(t, start, count, like), 0.0, CONSTANT)
    for k in range(count):
        sums[codes[k]] += float(z[k]) * float(z[k])


@jit
def largest(x, codes, outer, inner, found, like):
    """The largest absolute value of each label."""
    count = codes.shape[0]
    for a in range(outer):
        for k in range(count):
            z = view(x, (a * count + k) * inner, inner, like)
            for j in range(inner):
                size = abs(z[j])
                if not size <= found[codes[k]]:
                    found[codes[k]] = size


@jit
def scale_by(x, codes, outer, inner, factors, like):
    """Multiply each entry of x by the factor of its label, and turn -0 into 0."""
    count = codes.shape[0]
    zero = like.dtype.type(0)
    for a in range(outer):
        if inner == 1:
            z = view(x, a * count, count, like)
            for k in range(count):
                z[k] = z[k] * factors[codes[k]] + zero
        else:
            for k in range(count):
                scale(view(x, (a * count + k) * inner, inner, like), factors[codes[k]])
