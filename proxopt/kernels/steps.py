"""One step of an optimizer, or a prox, for many tensors in one call: a loop over blocks of groups.

A block is treated in the cache: a gradient step writes the point ``z`` and the step ``h`` of each entry to scratch memory, where
the prox of each group is taken (`proxopt.kernels.rows`), and the result is written back. The tensors are given by the addresses
of their memory; `proxopt.kernels.plan` builds the tables.
"""

# mypy: disallow-untyped-defs=False, disallow-untyped-calls=False

from __future__ import annotations

import math

import numpy as np

from proxopt.kernels import rows
from proxopt.kernels.jit import jit, view

CHUNK = 4096  # entries of a block, where groups are not larger
LONG = 256  # entries; a group of more is a block of its own
PART = 2048  # entries that are passed over at a time: a sum in single precision over so many is right to a few roundings
WIDTH = 256  # adjacent entries that are read at a time, where the entries of a group are not adjacent
APART = 208  # entries between rows of scratch memory: at a distance of a power of two they would share few places of the cache
EXTENT = PART + 16  # entries of scratch memory for the values of one part
EVERYWHERE = np.int64(1 << 60)  # a length beyond any array

# What a step does before the prox ...
NO_STEP, GRADIENT, MOMENTUM, ADAM = range(4)
# ... with which metric ...
NO_GROUPS, ONE_STEP, EXACT, MEDIAN, SUPPORT = range(5)
# ... and with the result p of the prox: x <- p; p_{t-1} <- p and x <- p + u (p - p_{t-1}); p_{t-1} <- p and x <- x + u (p - x)
COPY, EXTRAPOLATE, RELAX = range(3)

# Rows of the table of addresses: the parameter, its gradient, its velocity or first moment, its second moment, the prox point,
# and the strength of each entry
X, GRAD, FIRST, SECOND, POINT, L1, ROLES = range(7)
# Columns of the table of tensors: the shape of the layout and a row in the table of numbers
RUNS, INNER, LENGTH, NUMBERS, COLUMNS = range(5)
# Columns of the table of tasks: a tensor, or -1 for groups that are lists of pieces; a range of its tiles or groups; the place
# of the bound of its first group
TENSOR, START, STOP, BOUND = range(4)
# Columns of the table of numbers
SIGN, DECAY, STEP, BETA1, BETA2, KEEP, CORRECTION1, CORRECTION2, EPS, WEIGHT, COUNT = range(11)


# -- gradient step and soft threshold of adjacent entries ------------------------------------------
#
# They write the point to z, and return the sum of z^2; with Adam also the step of each entry to h, and the sum of (z / h)^2.


@jit
def _descend(grad, x, sign, decay, out):
    """The gradient to descend: negated to ascend, with weight decay added."""
    for j in range(x.shape[0]):
        out[j] = sign * grad[j] + decay * x[j]


@jit
def _gradient(x, grad, lr, t, z):
    total, below = z.dtype.type(0), -t
    for j in range(x.shape[0]):
        a = x[j] - lr * grad[j]
        c = t if a > t else a
        c = below if c < below else c
        a -= c
        z[j] = a
        total += a * a
    return total


@jit
def _momentum(x, grad, velocity, rho, one_less_rho, lr, t, z):
    total, below = z.dtype.type(0), -t
    for j in range(x.shape[0]):
        v = one_less_rho * velocity[j] + rho * grad[j]
        velocity[j] = v
        a = x[j] - lr * v
        c = t if a > t else a
        c = below if c < below else c
        a -= c
        z[j] = a
        total += a * a
    return total


@jit
def _adam(x, grad, mean, square, b1, one_less_b1, b2, one_less_b2, per_c1, per_c2, lr, eps, keep, tiny, l1, z, h):
    """Adam's moments, its step of each entry and the point that it reaches, as in ``proxopt.updates``."""
    total, dual = z.dtype.type(0), z.dtype.type(0)
    for j in range(x.shape[0]):
        g = grad[j]
        m = b1 * mean[j] + one_less_b1 * g
        v = b2 * square[j] + one_less_b2 * (g * g)
        mean[j] = m
        square[j] = v
        v = v * per_c2
        v = tiny if v < tiny else v
        below = math.sqrt(v) + eps
        step = lr / below
        h[j] = step
        a = x[j] * keep - step * (m * per_c1)
        t = step * l1
        c = t if a > t else a
        c = -t if c < -t else c
        a -= c
        z[j] = a
        total += a * a
        dual += (a * below) * (a * below)
    return total, dual


# -- writing the prox point back, which is z times the factor of its group --------------------------


@jit
def _copy(x, z, factor):
    zero = z.dtype.type(0)
    for j in range(x.shape[0]):
        x[j] = factor * z[j] + zero


@jit
def _extrapolate(x, point, z, factor, u):
    zero = z.dtype.type(0)
    for j in range(x.shape[0]):
        p = factor * z[j] + zero
        x[j] = p + u * (p - point[j])
        point[j] = p


@jit
def _relax(x, point, z, factor, u):
    zero = z.dtype.type(0)
    for j in range(x.shape[0]):
        p = factor * z[j] + zero
        x[j] = x[j] + u * (p - x[j])
        point[j] = p


# -- entries that are not adjacent ----------------------------------------------------------------


@jit
def _gather(address, offset, stride, places, out):
    source = view(address, np.int64(0), EVERYWHERE, out)
    for j in range(out.shape[0]):
        out[j] = source[offset + j * stride if stride else places[offset + j]]


@jit
def _scatter(values, address, offset, stride, places):
    target = view(address, np.int64(0), EVERYWHERE, values)
    for j in range(values.shape[0]):
        target[offset + j * stride if stride else places[offset + j]] = values[j]


@jit
def _swap(source, runs, inner, length, target):
    """Entries of the shape (runs, inner, length) in the shape (inner, runs, length)."""
    for i in range(inner):
        for r in range(runs):
            for k in range(length):
                target[(i * runs + r) * length + k] = source[(r * inner + i) * length + k]


# -- one part of the entries of a tensor ------------------------------------------------------------


@jit
def _memory(role, addresses, part, places, spare, needed, like):
    """The address of the entries of a part in one of its roles; of a copy in ``spare`` if they are not adjacent."""
    # called with roles and flags that are no literals, because each literal would be compiled anew
    tensor, offset, length, stride = part
    address = addresses[role, tensor]
    if stride == 1:
        return address + offset * like.itemsize
    copied = spare + role * EXTENT * like.itemsize
    if needed:
        _gather(address, offset, stride, places, view(copied, 0, length, like))
    return copied


@jit
def _before(how, addresses, part, places, numbers, row, l1, spare, z, h):
    """Gradient step and soft threshold of a part of at most `PART` entries.

    Writes the point to z and the step of each entry to h. Returns the sums of z^2 and (z / h)^2, NaN where they are not known.
    """
    tensor, length = part[0], part[2]
    kind = z.dtype.type
    step, each = numbers[row, STEP], addresses[L1, tensor] != 0
    t = 0.0 if each else l1
    x = view(_memory(np.int64(X), addresses, part, places, spare, how >= NO_STEP, z), 0, length, z)
    first = view(_memory(np.int64(FIRST), addresses, part, places, spare, how >= MOMENTUM, z), 0, length, z)
    second = view(_memory(np.int64(SECOND), addresses, part, places, spare, how == ADAM, z), 0, length, z)
    grad = view(_memory(np.int64(GRAD), addresses, part, places, spare, how >= GRADIENT, z), 0, length, z)
    if how >= GRADIENT and (numbers[row, SIGN] != 1.0 or numbers[row, DECAY] != 0.0):
        descent = view(spare, ROLES * EXTENT, length, z)
        _descend(grad, x, kind(numbers[row, SIGN]), kind(numbers[row, DECAY]), descent)
        grad = descent
    total, dual = 0.0, math.nan
    if how == ADAM:
        b1, b2 = numbers[row, BETA1], numbers[row, BETA2]
        tiny = kind(1.1754943508222875e-38 if z.itemsize == 4 else 2.2250738585072014e-308)
        total, dual = _adam(
            x, grad, first, second, kind(b1), kind(1.0 - b1), kind(b2), kind(1.0 - b2), kind(1.0 / numbers[row, CORRECTION1]),
            kind(1.0 / numbers[row, CORRECTION2]), kind(step), kind(numbers[row, EPS]), kind(numbers[row, KEEP]), tiny,
            kind(t), z, h,
        )  # fmt: skip
    elif how == MOMENTUM:
        rho = numbers[row, BETA1]
        total = _momentum(x, grad, first, kind(rho), kind(1.0 - rho), kind(step), kind(step * t), z)
    elif how == GRADIENT:
        total = _gradient(x, grad, kind(step), kind(step * t), z)
    else:
        total = rows.soften_into(x, z, kind(step * t))
    if each:
        strengths = view(_memory(np.int64(L1), addresses, part, places, spare, how >= NO_STEP, z), 0, length, z)
        if how == ADAM:
            rows.soften_by_each(z, h, strengths)
        else:
            rows.soften_by(z, strengths, kind(step))
        return math.nan, math.nan
    if part[3] != 1 and how >= MOMENTUM:
        _scatter(first, addresses[FIRST, tensor], part[1], part[3], places)
        if how == ADAM:
            _scatter(second, addresses[SECOND, tensor], part[1], part[3], places)
    return float(total), float(dual) / (step * step)


@jit
def _after(how, addresses, part, places, weight, factor, spare, z):
    """Write the prox point of a part back."""
    tensor, offset, length, stride = part
    kind = z.dtype.type
    x = view(_memory(np.int64(X), addresses, part, places, spare, how != COPY, z), 0, length, z)
    if how == COPY:
        _copy(x, z, kind(factor))
    else:
        point = view(_memory(np.int64(POINT), addresses, part, places, spare, how >= NO_STEP, z), 0, length, z)
        if how == EXTRAPOLATE:
            _extrapolate(x, point, z, kind(factor), kind(weight))
        else:
            _relax(x, point, z, kind(factor), kind(weight))
        if stride != 1:
            _scatter(point, addresses[POINT, tensor], offset, stride, places)
    if stride != 1:
        _scatter(x, addresses[X, tensor], offset, stride, places)


# -- one block ------------------------------------------------------------------------------------


@jit
def tile_width(runs, inner, length):
    """How many neighbouring groups of a tensor are treated at a time."""
    if runs == 1 and length >= LONG:
        return 1
    return min(inner, max(1, max(WIDTH, CHUNK // runs) // length))


@jit
def _run_of(tensor, number, r, info, width, starts, pieces):
    """Run r of a block: the tensor, offset, length and stride."""
    if tensor < 0:
        piece = starts[number] + r
        return pieces[piece, 0], pieces[piece, 1], pieces[piece, 2], pieces[piece, 3]
    runs, inner, length = info[tensor, RUNS], info[tensor, INNER], info[tensor, LENGTH]
    tiles = (inner + width - 1) // width
    outer, left = number // tiles, number % tiles * width
    return tensor, ((outer * runs + r) * inner + left) * length, min(width, inner - left) * length, np.int64(1)


@jit
def _part_of(run, start):
    """At most `PART` entries of a run, from one on."""
    tensor, offset, length, stride = run
    return tensor, offset + start * (stride if stride else 1), min(PART, length - start), stride


@jit
def _shrink(metric, step, bound, total, dual, z, h):
    """The factor by which the prox multiplies a group, given the sums of z^2 and (z / h)^2; 1 if it has changed z itself."""
    if bound <= 0.0:
        return 1.0
    if metric in (ONE_STEP, MEDIAN):
        size = math.sqrt(total) if rows.in_range(total, z) else rows.norm(z)
        return rows.share(size, bound * (step if metric == ONE_STEP else rows.median(h)))
    dual = math.sqrt(dual) if rows.in_range(dual, z) else rows.dual_norm(z, h)
    if metric == EXACT and not dual <= bound:
        rows.shrink_nonzero(z, h, bound, math.sqrt(total) if rows.in_range(total, z) else rows.norm(z), dual)
        return 1.0
    return rows.share(dual, bound)


@jit
def _shrink_all(metric, step, bounds, place, groups, runs, size, z, h, z_rows, h_rows):
    """The prox of each group of a block, whose entries lie in z in the shape (runs, groups, length)."""
    n = size // groups
    swapped = runs > 1
    if swapped:
        _swap(z, runs, groups, n // runs, z_rows)
        if metric != ONE_STEP:
            _swap(h, runs, groups, n // runs, h_rows)
    else:
        z_rows, h_rows = z, h
    for i in range(groups):
        row, steps = z_rows[i * n : (i + 1) * n], h_rows[i * n : (i + 1) * n]
        rows.scale(row, z.dtype.type(_shrink(metric, step, bounds[place + i], math.nan, math.nan, row, steps)))
    if swapped:
        _swap(z_rows, groups, runs, n // runs, z)


def scratch(size: int) -> int:
    """The number of entries of scratch memory that `run` needs for blocks of this size."""
    return 4 * (size + APART) + (ROLES + 1) * EXTENT


@jit
def run(how, tasks, first, last, info, addresses, numbers, l1, bounds, starts, pieces, places, size, scratch, like):
    """Treat the tasks from number first to last.

    Args:
      how: what comes before the prox, its metric and what comes after it.
      l1: strength of the soft threshold of entries, for tensors that have none for each entry in the role `L1`.
      bounds: strength times weight of each group.
      starts, pieces, places: as in ``Layout``, for the groups that are lists of pieces.
      size: the largest number of entries of a block.
      scratch: the address of scratch memory: slices of an array would count their references.
      like: an array of the dtype of the tensors.
    """
    before, metric, after = how
    size += APART
    spare = scratch + 4 * size * like.itemsize
    for t in range(first, last):
        tensor, bound = tasks[t, TENSOR], tasks[t, BOUND]
        runs, inner, width = 0, 1, 1
        if tensor >= 0:
            runs, inner = info[tensor, RUNS], info[tensor, INNER]
            width = tile_width(runs, inner, info[tensor, LENGTH])
        for number in range(tasks[t, START], tasks[t, STOP]):
            if tensor < 0:
                runs = starts[number + 1] - starts[number]
            end, total, dual, step = np.int64(0), 0.0, 0.0, 0.0
            for r in range(runs):
                whole = _run_of(tensor, number, r, info, width, starts, pieces)
                row = info[whole[0], NUMBERS]
                step = numbers[row, STEP]
                for start in range(0, whole[2], PART):
                    part = _part_of(whole, start)
                    z, h = view(scratch, end, part[2], like), view(scratch, size + end, part[2], like)
                    square, ratio = _before(before, addresses, part, places, numbers, row, l1, spare, z, h)
                    total += square
                    dual += ratio
                    end += part[2]
            factor = 1.0
            if metric != NO_GROUPS:
                z, h = view(scratch, np.int64(0), end, like), view(scratch, size, end, like)
                tiles = (inner + width - 1) // width
                groups = min(width, inner - number % tiles * width)
                if groups > 1:
                    z_rows, h_rows = view(scratch, 2 * size, end, like), view(scratch, 3 * size, end, like)
                    place = bound + number // tiles * inner + number % tiles * width
                    _shrink_all(metric, step, bounds, place, groups, runs, end, z, h, z_rows, h_rows)
                else:
                    place = bound + number - (tasks[t, START] if tensor < 0 else 0)
                    factor = _shrink(metric, step, bounds[place], total, dual, z, h)
            end = np.int64(0)
            for r in range(runs):
                whole = _run_of(tensor, number, r, info, width, starts, pieces)
                weight = numbers[info[whole[0], NUMBERS], WEIGHT]
                for start in range(0, whole[2], PART):
                    part = _part_of(whole, start)
                    _after(after, addresses, part, places, weight, factor, spare, view(scratch, end, part[2], like))
                    end += part[2]


@jit
def all_finite(addresses, sizes, like):
    """Whether all entries of tensors of these sizes, at these addresses, are finite."""
    for i in range(addresses.shape[0]):
        for start in range(0, sizes[i], CHUNK):
            if _times_zero(view(addresses[i], start, min(CHUNK, sizes[i] - start), like)) != 0:
                return False
    return True


@jit
def _times_zero(x):
    """The sum of 0 x: 0 for finite entries, NaN for any other."""
    zero = x.dtype.type(0)
    total = zero
    for j in range(x.shape[0]):
        total += x[j] * zero
    return total


@jit
def read_counts(addresses, out):
    """Read the step counts, float32 numbers at the addresses."""
    for i in range(addresses.shape[0]):
        out[i] = view(addresses[i], np.int64(0), np.int64(1), out)[0]


@jit
def write_counts(addresses, counts):
    """Write the step counts."""
    for i in range(addresses.shape[0]):
        view(addresses[i], np.int64(0), np.int64(1), counts)[0] = counts[i]
