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
    in_range,
    norm,
    scale,
    shrink,
    shrink_exact,
    shrink_median,
    shrink_support,
    soften,
    soften_by,
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
def square_sum(x):
    total = x.dtype.type(0)
    for j in range(x.shape[0]):
        total += x[j] * x[j]
    return total


@jit
def soften_into(x, z, l1):
    """Write the soft threshold of x to z; returns its sum of squares."""
    below = -l1
    total = x.dtype.type(0)
    for j in range(x.shape[0]):
        a = x[j]
        c = l1 if a > l1 else a
        c = below if c < below else c
        a = a - c
        z[j] = a
        total += a * a
    return total


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
    return soften_into(x, z, l1) if l1 > 0 else square_sum(x)


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


@jit
def part_of(address, start, length, like):
    """A row of an array, empty where there is no such array."""
    return view(address, start, length, like) if address != 0 else view(address, 0, 0, like)


# -- entries alone ----------------------------------------------------------------------------------


@jit
def prox_entries(x, out, l1, t, total, first, last, like):
    """Soft threshold of the blocks ``first`` to ``last - 1`` of `BLOCK` entries, of ``total`` in all."""
    start, length = first * BLOCK, min(last * BLOCK, total) - first * BLOCK
    a, z = view(x, start, length, like), view(out, start, length, like)
    soften_row(a, z, l1, part_of(t, start, length, like))
    if t == 0 and not l1 > 0:
        copy(a, z)


# -- groups of an array -----------------------------------------------------------------------------


@jit
def is_certain(total, bound, like):
    """Whether a sum of squares decides about the group: it is right to rounding, or far below the bound."""
    return in_range(total, like) or (total < 1.0 and bound > 1e-10)


@jit
def shrink_rows(x, out, l1, bounds, starts, length, rest, first, last, like):
    """`prox_rows` for the metric `CONSTANT` and one threshold of all entries, where x and out are different arrays.

    Groups of more than `BLOCK` entries, or whose sum of squares decides nothing, are left to `prox_rows`: their numbers are
    written to ``rest``. Returns how many they are. The loops are inlined here, because for short rows a call of a function takes
    as long as its loop; and a loop that reads one array and writes another is not vectorised where both are the same.
    """
    count, threshold = 0, like.dtype.type(l1)
    for g in range(first, last):
        start = g * length if length > 0 else starts[g]
        stop = start + length if length > 0 else starts[g + 1]
        a, z = view(x, start, stop - start, like), view(out, start, stop - start, like)
        bound = bounds[g] if bounds.shape[0] > 1 else bounds[0]
        total = np.float64(soften_into(a, z, threshold) if l1 > 0 else square_sum(a))
        if stop - start > BLOCK or not is_certain(total, bound, like):
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
def prox_rows(x, out, h, l1, t, bounds, metric, starts, length, chosen, first, last, like):
    """Groups chosen[first] to chosen[last - 1], or ``first`` to ``last - 1`` where chosen is empty, in contiguous rows.

    Group g has the entries from starts[g] to starts[g + 1], or length entries from g length on if length > 0.
    """
    for k in range(first, last):
        g = chosen[k] if chosen.shape[0] > 0 else k
        start = g * length if length > 0 else starts[g]
        n = length if length > 0 else starts[g + 1] - start
        z = view(out, start, n, like)
        if x != out:
            copy(view(x, start, n, like), z)
        bound = bounds[g] if bounds.shape[0] > 1 else bounds[0]
        treat(z, part_of(h, start, n, like), l1, part_of(t, start, n, like), bound, metric)


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
    widest = 0
    for k in range(first, last):
        widest = max(widest, groups[k + 1] - groups[k])
    size = widest * n
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
            row = z[w * n : (w + 1) * n]
            treat(row, own_h, l1, own_t, bound, metric)
        if stride == 1:
            distribute_pieces(out, base, pieces, inner, z)
        else:
            distribute(out, base, width, pieces, inner, stride, z)


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
def column_norm(address, place, pieces, inner, stride, like):
    """The norm of one group of a tile."""
    z = np.empty(pieces.shape[0] * inner, like.dtype)
    collect(address, place, 1, pieces, inner, stride, z)
    return norm(z)


@jit
def prox_columns(x, out, l1, t, bounds, bases, groups, pieces, inner, stride, first, last, like):
    """`prox_strided` with the metric `CONSTANT`, by sums in the order of memory: no group is copied."""
    factor = like.dtype.type(l1)
    widest = 0
    for k in range(first, last):
        widest = max(widest, groups[k + 1] - groups[k])
    sums, factors = np.empty(widest, np.float64), np.empty(widest, like.dtype)
    for k in range(first, last):
        base, width = bases[k], groups[k + 1] - groups[k]
        sums[:] = 0.0
        for p in range(pieces.shape[0]):
            for i in range(inner):
                start = base + pieces[p] + i * stride
                own_t = part_of(t, start, width, like)
                soften_column(view(x, start, width, like), view(out, start, width, like), factor, own_t, sums)
        for w in range(width):
            bound = bounds[groups[k] + w] if bounds.shape[0] > 1 else bounds[0]
            size = math.sqrt(sums[w])
            if like.itemsize == 8 and not in_range(sums[w], like):
                size = column_norm(out, base + w, pieces, inner, stride, like)
            share = 0.0 if size <= bound else 1.0 - bound / size
            factors[w] = 1.0 if bound <= 0 else share
        for p in range(pieces.shape[0]):
            for i in range(inner):
                scale_each(view(out, base + pieces[p] + i * stride, width, like), factors)


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
                sums[codes[k]] += soften_row(source, z, l1, part_of(t, start, n, like))
            elif t == 0 and not l1 > 0:
                add_by_code(source, codes[k : k + n], sums)
            else:
                soften_row(source, z, l1, part_of(t, start, n, like))
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
