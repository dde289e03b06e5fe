"""The prox of whole arrays: groups in contiguous rows, in strided layouts, in pieces, and sums over labels.

Arrays are given by their address, as one vector in the order of their memory; `like` is an empty array of their dtype. Common
arguments:

- x, out: addresses of the input and the result; may be equal.
- h: address of the steps of the entries, 0 if the metric is `CONSTANT`.
- l1, t: the threshold of entry j is ``l1 t[j]``, or l1 where the address t is 0.
- bounds: the threshold of each group, or of all of them if it holds one number. With `CONSTANT` it includes the step.
- metric: `CONSTANT`, `MEDIAN`, `SUPPORT` or `EXACT`.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

import math

import numpy as np

from proxopt.kernels.jit import jit, view
from proxopt.kernels.rows import (
    BLOCK,
    _square_sum,
    in_range,
    norm,
    scale,
    shrink,
    shrink_exact,
    shrink_median,
    shrink_support,
    soften,
    soften_by,
    soften_into,
)

CONSTANT, MEDIAN, SUPPORT, EXACT = range(4)


# -- a row ------------------------------------------------------------------------------------------


@jit
def copy(x, z):
    for j in range(x.shape[0]):
        z[j] = x[j]


@jit
def scale_into(x, z, factor):
    """Write ``factor x`` to z, with 0 in place of -0."""
    zero = x.dtype.type(0)
    for j in range(x.shape[0]):
        z[j] = x[j] * factor + zero


@jit
def soften_into_by(x, z, l1, t):
    """`soften_into` with the threshold ``l1 t[j]`` of entry j."""
    total = x.dtype.type(0)
    for j in range(x.shape[0]):
        b = l1 * t[j]
        a = x[j]
        c = b if a > b else a
        c = -b if c < -b else c
        a = a - c
        z[j] = a
        total += a * a
    return total


@jit
def soften_part(x, z, l1, t):
    if t.shape[0] > 0:
        return soften_into_by(x, z, l1, t)
    return soften_into(x, z, l1) if l1 > 0 else _square_sum(x)


@jit
def soften_row(x, z, l1, t):
    """Write the soft threshold of x to z, or leave z as it is where there is none; returns its sum of squares, a double."""
    n, factor = x.shape[0], x.dtype.type(l1)
    if n <= BLOCK:
        return np.float64(soften_part(x, z, factor, t))
    total = 0.0
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        total += soften_part(x[start:stop], z[start:stop], factor, t[start:stop] if t.shape[0] > 0 else t)
    return total


@jit
def treat(z, h, l1, t, bound, metric):
    """Replace z by its prox; h and t are empty where they are not needed."""
    if t.shape[0] > 0:
        soften_by(z, t, z.dtype.type(l1))
    elif l1 > 0:
        soften(z, z.dtype.type(l1))
    shrink_by(z, h, bound, metric)


@jit
def shrink_by(z, h, bound, metric):
    if metric == CONSTANT:
        shrink(z, bound)
    elif metric == MEDIAN:
        shrink_median(z, h, bound)
    elif metric == SUPPORT:
        shrink_support(z, h, bound)
    else:
        shrink_exact(z, h, bound)


# -- entries alone ----------------------------------------------------------------------------------


@jit
def prox_entries(x, out, l1, t, total, first, last, like):
    """Soft threshold of the blocks ``first`` to ``last - 1`` of `BLOCK` entries, of ``total`` in all."""
    start, length = first * BLOCK, min(last * BLOCK, total) - first * BLOCK
    a, z = view(x, start, length, like), view(out, start, length, like)
    soften_row(a, z, l1, view(t, start, length if t != 0 else 0, like))
    if t == 0 and not l1 > 0:
        copy(a, z)


# -- groups -----------------------------------------------------------------------------------------
#
# Regular groups: the memory has the shape (outer, runs, inner, length), and entries that differ along the second and the fourth
# axis share a group; group number g is at (g // inner, g % inner). A tile is up to `width` neighbouring groups. With runs = 1 a
# group is a row. Other groups are lists of pieces: group g has those from owners[g] to owners[g + 1], each with a start and a
# length, and is a tile of its own; these layouts have length 0.


@jit
def is_certain(total, bound, like):
    """Whether a sum of squares decides about the group: it is right to rounding, or far below the bound."""
    return in_range(total, like) or (total < 1.0 and bound > 1e-10)


@jit
def shrink_rows(x, out, l1, bounds, length, starts, lengths, rest, first, last, like):
    """Groups ``first`` to ``last - 1`` in rows, of equal ``length`` or with starts and lengths, where x and out are not the same.

    With the metric `CONSTANT` and one threshold of all entries. Groups of more than `BLOCK` entries, or whose sum of squares
    decides nothing, are left to `prox_groups`: their numbers are written to ``rest``. Returns how many they are. The loops are
    inlined here, because for short rows a call of a function takes as long as its loop; and a loop that reads one array and
    writes another is not vectorised where both are the same.
    """
    count, threshold = 0, like.dtype.type(l1)
    for g in range(first, last):
        start = g * length if length > 0 else starts[g]
        n = length if length > 0 else lengths[g]
        a, z = view(x, start, n, like), view(out, start, n, like)
        bound = bounds[g] if bounds.shape[0] > 1 else bounds[0]
        total = np.float64(soften_into(a, z, threshold) if l1 > 0 else _square_sum(a))
        if n > BLOCK or not is_certain(total, bound, like):
            rest[count] = g
            count += 1
            continue
        size = math.sqrt(total)
        factor = like.dtype.type(1.0 - bound / size if size > bound else 0.0)
        if l1 > 0:
            scale(z, factor)
        else:
            scale_into(a, z, factor)
    return count


@jit
def collect(address, runs, inner, length, left, width, z):
    """Copy a tile of regular groups, which begins at entry ``left``, to rows of z."""
    for r in range(runs):
        source = view(address, left + r * inner * length, width * length, z)
        for w in range(width):
            for k in range(length):
                z[(w * runs + r) * length + k] = source[w * length + k]


@jit
def distribute(address, runs, inner, length, left, width, z):
    """The inverse of `collect`."""
    for r in range(runs):
        target = view(address, left + r * inner * length, width * length, z)
        for w in range(width):
            for k in range(length):
                target[w * length + k] = z[(w * runs + r) * length + k]


@jit
def join(address, starts, lengths, z):
    """Copy pieces to a row."""
    n = 0
    for p in range(starts.shape[0]):
        source = view(address, starts[p], lengths[p], z)
        for k in range(source.shape[0]):
            z[n + k] = source[k]
        n += source.shape[0]


@jit
def split(address, starts, lengths, z):
    """The inverse of `join`."""
    n = 0
    for p in range(starts.shape[0]):
        target = view(address, starts[p], lengths[p], z)
        for k in range(target.shape[0]):
            target[k] = z[n + k]
        n += target.shape[0]


@jit
def total_of(lengths):
    n = 0
    for p in range(lengths.shape[0]):
        n += lengths[p]
    return n


@jit
def tile(number, runs, inner, length, width):
    """First group, first entry and number of groups of a tile."""
    tiles = (inner + width - 1) // width
    place = number % tiles * width
    outer = number // tiles
    return outer * inner + place, (outer * runs * inner + place) * length, min(width, inner - place)


@jit
def prox_groups(
    x, out, h, l1, t, bounds, metric, runs, inner, length, width, owners, starts, lengths, chosen, scratch, first, last, like
):
    """The tiles chosen[first] to chosen[last - 1], or ``first`` to ``last - 1`` where chosen is empty.

    scratch: memory for the points, steps and thresholds of the largest tile.
    """
    z, hs, ts = scratch[0], scratch[1], scratch[2]
    for k in range(first, last):
        number = chosen[k] if chosen.shape[0] > 0 else k
        g, left, count, n = number, 0, 1, runs * length
        a, b = (owners[number], owners[number + 1]) if length == 0 else (0, 0)
        own, own_lengths = starts[a:b], lengths[a:b]
        if length > 0:
            g, left, count = tile(number, runs, inner, length, width)
        else:
            n = total_of(own_lengths)
            left = own[0] if n > 0 else 0
        if own.shape[0] == 1 or runs == 1:  # a row of the array
            row = view(out, left, n, like)
            if x != out:
                copy(view(x, left, n, like), row)
            bound = bounds[g] if bounds.shape[0] > 1 else bounds[0]
            treat(row, view(h, left, n if h != 0 else 0, like), l1, view(t, left, n if t != 0 else 0, like), bound, metric)
            continue
        for role in range(3):
            address = x if role == 0 else h if role == 1 else t
            if address != 0 and length > 0:
                collect(address, runs, inner, length, left, count, scratch[role])
            elif address != 0:
                join(address, own, own_lengths, scratch[role])
        for w in range(count):
            bound = bounds[g + w] if bounds.shape[0] > 1 else bounds[0]
            a, b = w * n, (w + 1) * n
            treat(z[a:b], hs[a:b], l1, ts[a : b if t != 0 else a], bound, metric)
        if length > 0:
            distribute(out, runs, inner, length, left, count, z)
        else:
            split(out, own, own_lengths, z)


@jit
def soften_column(x, z, l1, t, sums):
    """Write the soft threshold of x to z, and add its squares to the sums."""
    by = t.shape[0] > 0
    for j in range(x.shape[0]):
        b = l1 * t[j] if by else l1
        a = x[j]
        c = b if a > b else a
        c = -b if c < -b else c
        a = a - c if b > 0 else a
        z[j] = a
        sums[j] += np.float64(a) * np.float64(a)


@jit
def scale_each(z, factors):
    zero = z.dtype.type(0)
    for j in range(z.shape[0]):
        z[j] = z[j] * factors[j] + zero


@jit
def prox_columns(x, out, l1, t, bounds, runs, inner, length, width, sums, factors, row, first, last, like):
    """Tiles of regular groups with the metric `CONSTANT`, by sums in the order of memory: no group is copied.

    sums, factors and row: memory for a number in double precision and one more for each group of a tile, and for one group.
    """
    factor = like.dtype.type(l1)
    for number in range(first, last):
        g, left, count = tile(number, runs, inner, length, width)
        for w in range(count):
            sums[w] = 0.0
        for r in range(runs):
            start = left + r * inner * length
            if length == 1:
                own = view(t, start, count if t != 0 else 0, like)
                soften_column(view(x, start, count, like), view(out, start, count, like), factor, own, sums)
            else:
                for w in range(count):
                    place = start + w * length
                    a, z = view(x, place, length, like), view(out, place, length, like)
                    sums[w] += soften_row(a, z, l1, view(t, place, length if t != 0 else 0, like))
                    if x != out and t == 0 and not l1 > 0:
                        copy(a, z)
        for w in range(count):
            bound = bounds[g + w] if bounds.shape[0] > 1 else bounds[0]
            size = math.sqrt(sums[w])
            if not is_certain(sums[w], bound, like):
                collect(out, runs, inner, length, left + w * length, 1, row)
                size = norm(row)
            share = 0.0 if size <= bound else 1.0 - bound / size
            factors[w] = 1.0 if bound <= 0 else share
        for r in range(runs):
            start = left + r * inner * length
            if length == 1:
                scale_each(view(out, start, count, like), factors)
            else:
                for w in range(count):
                    scale(view(out, start + w * length, length, like), factors[w])


# -- sums over labels, in the order of memory -------------------------------------------------------


@jit
def add_by_code(z, codes, sums):
    for j in range(z.shape[0]):
        a = np.float64(z[j])
        sums[codes[j]] += a * a


@jit
def add_squares(x, out, l1, t, codes, outer, inner, sums, like):
    """Write the soft threshold of x to out, and add its squares to the sum of the label of each entry.

    x is of shape (outer, codes, inner): entry (a, k, b) has the label codes[k]. Without thresholds nothing is written.
    """
    count = codes.shape[0]
    length = inner if inner > 1 else BLOCK
    for a in range(outer):
        for k in range(0, count, 1 if inner > 1 else BLOCK):
            start = (a * count + k) * inner
            n = min(length, (a + 1) * count * inner - start)
            source, z = view(x, start, n, like), view(out, start, n, like)
            if inner > 1:
                sums[codes[k]] += soften_row(source, z, l1, view(t, start, n if t != 0 else 0, like))
            elif t == 0 and not l1 > 0:
                add_by_code(source, codes[k : k + n], sums)
            else:
                soften_row(source, z, l1, view(t, start, n if t != 0 else 0, like))
                add_by_code(z, codes[k : k + n], sums)


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
def scale_by_code(z, codes, factors):
    zero = z.dtype.type(0)
    for j in range(z.shape[0]):
        z[j] = z[j] * factors[codes[j]] + zero


@jit
def scale_by_code_into(x, z, codes, factors):
    zero = x.dtype.type(0)
    for j in range(x.shape[0]):
        z[j] = x[j] * factors[codes[j]] + zero


@jit
def scale_by(x, out, codes, outer, inner, factors, like):
    """Write x with each entry multiplied by the factor of its label to out, which may be x, with 0 in place of -0."""
    count = codes.shape[0]
    for a in range(outer):
        if inner == 1:
            z = view(out, a * count, count, like)
            if x == out:
                scale_by_code(z, codes, factors)
            else:
                scale_by_code_into(view(x, a * count, count, like), z, codes, factors)
            continue
        for k in range(count):
            start = (a * count + k) * inner
            z = view(out, start, inner, like)
            if x == out:
                scale(z, factors[codes[k]])
            else:
                scale_into(view(x, start, inner, like), z, factors[codes[k]])
