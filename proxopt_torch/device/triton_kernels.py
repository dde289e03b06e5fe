"""The Triton kernel of all methods: one step of ProxSGD, HAPG, ProxAdam or AdamHAPG, each program for a few groups.

A group is what the penalty zeroes together, of one tensor or of several. It consists of pieces, and entry j of a piece lies at
``base + (j // inner) * outer + (j % inner) * stride`` in the memory of its tensor (``layout.Pieces``). A group of up to ``BLOCK``
entries is read once and stays in registers until it is written; a larger one (``PASSES``) is read again in each pass.

A program holds tiles of shape (``BLOCK``, ``GROUPS``), a column for each of its groups, so that numbers of groups have the shape
(``GROUPS``,). All arithmetic is in float32. Nothing depends on values that the host would have to read.

This module imports Triton and is imported at the first launch only.
"""
# mypy: ignore-errors
# ruff: noqa: SIM109 (Triton has no `in` for constants)

import torch
import triton
import triton.language as tl

from proxopt_torch.device import tables

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

PROX_SGD = tl.constexpr(tables.METHODS.index("prox_sgd"))
PROX_SGD_TAU = tl.constexpr(tables.METHODS.index("prox_sgd_tau"))
HAPG = tl.constexpr(tables.METHODS.index("hapg"))
PROX_ADAM = tl.constexpr(tables.METHODS.index("prox_adam"))
ADAM_HAPG = tl.constexpr(tables.METHODS.index("adam_hapg"))

NO_GROUPS = tl.constexpr(tables.METRICS.index("none"))
ONE_STEP = tl.constexpr(tables.METRICS.index("one_step"))
SUPPORT = tl.constexpr(tables.METRICS.index("support"))
MEDIAN = tl.constexpr(tables.METRICS.index("median"))
EXACT = tl.constexpr(tables.METRICS.index("exact"))

CONTIGUOUS = tl.constexpr(tables.LAYOUTS.index("contiguous"))
STRIDED = tl.constexpr(tables.LAYOUTS.index("strided"))

# columns of the table of tensors
X, GRAD, MEAN, SQUARE, POINT = (tl.constexpr(tables.ADDRESSES.index(n)) for n in ("x", "grad", "mean", "square", "point"))
ADDRESSES = tl.constexpr(len(tables.ADDRESSES))

# columns of the tables of hyperparameters and of what depends on the step count
LR = tl.constexpr(tables.PLAIN.index("lr"))
STEP = tl.constexpr(tables.PLAIN.index("step"))
L1 = tl.constexpr(tables.PLAIN.index("l1"))
L2 = tl.constexpr(tables.PLAIN.index("l2"))
SIGN = tl.constexpr(tables.PLAIN.index("sign"))
DECAY = tl.constexpr(tables.PLAIN.index("decay"))
DECOUPLED = tl.constexpr(tables.PLAIN.index("decoupled"))
KEEP_MEAN = tl.constexpr(tables.PLAIN.index("keep_mean"))
NEW_MEAN = tl.constexpr(tables.PLAIN.index("new_mean"))
KEEP_SQUARE = tl.constexpr(tables.PLAIN.index("keep_square"))
NEW_SQUARE = tl.constexpr(tables.PLAIN.index("new_square"))
EPS = tl.constexpr(tables.PLAIN.index("eps"))
PLAIN = tl.constexpr(len(tables.PLAIN))
MEAN_SCALE = tl.constexpr(tables.COUNTED.index("mean_scale"))
ROOT_SCALE = tl.constexpr(tables.COUNTED.index("root_scale"))
MOMENTUM = tl.constexpr(tables.COUNTED.index("momentum"))
COUNTED = tl.constexpr(len(tables.COUNTED))

# what `_total` reduces: the candidate z, or in the unit of its group y = z / unit and the threshold a of each entry
SIZE = tl.constexpr(0)  # max |z|
NORM = tl.constexpr(1)  # sum y^2, max a
DUAL = tl.constexpr(2)  # sum (y / a)^2, max (|y| - a), of which only positive values matter
NEWTON = tl.constexpr(3)  # sum q^2, sum q^2 / (r + a) for q = y / (r + a) at the point r

TINY = tl.constexpr(1e-30)  # in place of a threshold 0, by which is divided
BISECTIONS = tl.constexpr(5)  # as in `exact.exact_shrink_`
NEWTON_STEPS = tl.constexpr(3)
BITS = tl.constexpr(31)  # of a positive float32


@triton.jit
def _piece(k, first, count, tables_of):
    """Piece k of each group: whether there is one, its tensor, length, base, and the three numbers of its loops."""
    tensor_of, base_of, length_of, inner_of, outer_of, stride_of = tables_of
    has = k < count
    piece = first + k
    tensor = tl.load(tensor_of + piece, mask=has, other=0).to(tl.int64)
    length = tl.load(length_of + piece, mask=has, other=0)
    base = tl.load(base_of + piece, mask=has, other=0)
    inner = tl.load(inner_of + piece, mask=has, other=1)
    outer = tl.load(outer_of + piece, mask=has, other=0)
    stride = tl.load(stride_of + piece, mask=has, other=0)
    return tensor, length, base, inner, outer, stride


@triton.jit
def _places(start, piece, LAYOUT: tl.constexpr, BLOCK: tl.constexpr):
    """For the tile whose entry ``-start`` is the first of a piece: the tensor, an origin, offsets from it, and which are inside.

    Contiguous entries get offsets that are constants of the program, which leaves their addresses to immediate operands.
    """
    tensor, length, base, inner, outer, stride = piece
    lane = tl.arange(0, BLOCK)[:, None]
    j = lane + start[None, :]
    inside = (j >= 0) & (j < length[None, :])
    origin = base
    if LAYOUT == CONTIGUOUS:
        origin = base + start
        offset = lane
    elif LAYOUT == STRIDED:
        offset = j * outer[None, :]
    else:
        offset = (j // inner[None, :]) * outer[None, :] + (j % inner[None, :]) * stride[None, :]
    return tensor, origin, offset, inside


@triton.jit
def _pointers(tensors, places, COLUMN: tl.constexpr, dtype: tl.constexpr):
    """Addresses of the entries of a tile in a tensor, its gradient or one of its states."""
    tensor, origin, offset, _ = places
    address = tl.load(tensors + tensor * ADDRESSES + COLUMN).to(tl.pointer_type(dtype))
    return (address + origin)[None, :] + offset


@triton.jit
def _candidate(tensors, places, numbers, METHOD: tl.constexpr, DTYPE: tl.constexpr, UPDATE: tl.constexpr):
    """The gradient step and its soft threshold: the point z and the step of each entry. With UPDATE the moments are stored."""
    lr, step, l1, sign, decay, decoupled, keep_mean, new_mean, keep_square, new_square, eps, mean_scale, root_scale = numbers
    inside = places[3]
    x = tl.load(_pointers(tensors, places, X, DTYPE), mask=inside, other=0).to(tl.float32)
    step = step[None, :] + tl.zeros_like(x)
    move = x
    if UPDATE or METHOD == HAPG:
        grad = tl.load(_pointers(tensors, places, GRAD, DTYPE), mask=inside, other=0).to(tl.float32)
        grad = sign[None, :] * grad + tl.where(decay[None, :] != 0, decay[None, :] * x, 0.0)  # x may be NaN, and 0 * NaN is
        move = grad
    if METHOD != HAPG:
        mean_at = _pointers(tensors, places, MEAN, tl.float32)
        mean = tl.load(mean_at, mask=inside, other=0)
        if UPDATE:
            mean = keep_mean[None, :] * mean + new_mean[None, :] * grad
            tl.store(mean_at, mean, mask=inside)
        move = mean
    if METHOD == PROX_ADAM or METHOD == ADAM_HAPG:
        square_at = _pointers(tensors, places, SQUARE, tl.float32)
        square = tl.load(square_at, mask=inside, other=0)
        if UPDATE:
            square = keep_square[None, :] * square + new_square[None, :] * (grad * grad)
            tl.store(square_at, square, mask=inside)
        step = lr[None, :] / (tl.sqrt_rn(square) * root_scale[None, :] + eps[None, :])
        move = mean * mean_scale[None, :]
        x = x * (1 - decoupled[None, :])
    z = x - step * move
    t = l1[None, :] * step
    z = z - tl.where(z > t, t, tl.where(z < -t, -t, z))  # NaN stays NaN, and a zeroed entry is +0
    return z, step


@triton.jit
def _unit(largest):
    """The power of two below the largest entry, by which the numbers of a group are divided exactly, and its inverse."""
    exponent = largest.to(tl.int32, bitcast=True) & 0x7F800000
    exponent = tl.minimum(tl.maximum(exponent, 0x00800000), 0x7E800000)  # normal, and so is the inverse
    return exponent.to(tl.float32, bitcast=True), (0x7F000000 - exponent).to(tl.float32, bitcast=True)


@triton.jit
def _scaled(z, step, inside, inverse, bound):
    """z and the thresholds of the entries in the unit of their group; outside of it entries that change no reduction."""
    y = tl.where(inside, z * inverse[None, :], 0.0)
    a = tl.where(inside, tl.maximum(step * (bound * inverse)[None, :], TINY), TINY)
    return y, a


@triton.jit
def _tile_total(KIND: tl.constexpr, y, a, point):
    """A pair of reductions over one tile."""
    if KIND == SIZE:
        first = tl.max(tl.abs(y), 0)
        second = first
    elif KIND == NORM:
        first = tl.sum(y * y, 0)
        second = tl.max(a, 0)
    elif KIND == DUAL:
        ratio = y / a
        first = tl.sum(ratio * ratio, 0)
        second = tl.max(tl.abs(y) - a, 0)
    else:
        below = 1.0 / (point[None, :] + a)
        square = (y * below) * (y * below)
        first = tl.sum(square, 0)
        second = tl.sum(square * below, 0)
    return first, second


@triton.jit
def _tile_rank(a, inside, bits):
    """How many thresholds are below a number, given by its bits, how many are at most it, and the bits of the next larger one."""
    own = tl.where(inside, a.to(tl.int32, bitcast=True), 0x7FFFFFFF)  # floats >= 0 are ordered like their bits
    below = tl.sum(tl.where(own < bits[None, :], 1, 0), 0)
    at_most = tl.sum(tl.where(own <= bits[None, :], 1, 0), 0)
    return below, at_most, tl.min(tl.where(own > bits[None, :], own, 0x7FFFFFFF), 0)


@triton.jit
def _total(KIND: tl.constexpr, y, a, point, inverse, bound, source, numbers, kind: tl.constexpr):
    """A pair of reductions over the whole group: of the tile y and a, or (PASSES) of tiles that are read again."""
    METHOD: tl.constexpr = kind[0]
    DTYPE: tl.constexpr = kind[1]
    LAYOUT: tl.constexpr = kind[2]
    BLOCK: tl.constexpr = kind[3]
    PASSES: tl.constexpr = kind[4]
    if not PASSES:
        total, other = _tile_total(KIND, y, a, point)
    else:
        tensors, tables_of, first, count = source
        total, other = 0 * bound, 0 * bound
        for k in range(tl.max(count, 0)):
            piece = _piece(k, first, count, tables_of)
            for chunk in range(0, tl.max(piece[1], 0), BLOCK):
                places = _places(chunk + 0 * count, piece, LAYOUT, BLOCK)
                y, a = _candidate(tensors, places, numbers, METHOD, DTYPE, False)
                if KIND != SIZE:
                    y, a = _scaled(y, a, places[3], inverse, bound)
                else:
                    y = tl.where(places[3], y, 0.0)
                more, further = _tile_total(KIND, y, a, point)
                if KIND == SIZE:
                    total = tl.maximum(total, more)
                else:
                    total += more
                if KIND == NEWTON:
                    other += further
                else:
                    other = tl.maximum(other, further)
    return total, other


@triton.jit
def _rank(a, inside, bits, inverse, bound, source, numbers, kind: tl.constexpr):
    """``_tile_rank`` over the whole group."""
    METHOD: tl.constexpr = kind[0]
    DTYPE: tl.constexpr = kind[1]
    LAYOUT: tl.constexpr = kind[2]
    BLOCK: tl.constexpr = kind[3]
    PASSES: tl.constexpr = kind[4]
    if not PASSES:
        below, at_most, following = _tile_rank(a, inside, bits)
    else:
        tensors, tables_of, first, count = source
        below, at_most, following = 0 * bits, 0 * bits, 0 * bits + 0x7FFFFFFF
        for k in range(tl.max(count, 0)):
            piece = _piece(k, first, count, tables_of)
            for chunk in range(0, tl.max(piece[1], 0), BLOCK):
                places = _places(chunk + 0 * count, piece, LAYOUT, BLOCK)
                z, step = _candidate(tensors, places, numbers, METHOD, DTYPE, False)
                _, a = _scaled(z, step, places[3], inverse, bound)
                b, m, f = _tile_rank(a, places[3], bits)
                below += b
                at_most += m
                following = tl.minimum(following, f)
    return below, at_most, following


@triton.jit
def _median(a, inside, size, inverse, bound, source, numbers, kind: tl.constexpr):
    """The median of the thresholds of each group: the mean of the two middle ones where their number is even."""
    lower, upper = (size - 1) // 2, size // 2
    bits, bit = 0 * size, 0 * size + 0x40000000
    for _ in range(BITS):
        # the largest number with at most `lower` thresholds below it is the threshold of that rank
        candidate = bits | bit
        bit = bit >> 1
        below, _, _ = _rank(a, inside, candidate, inverse, bound, source, numbers, kind)
        bits = tl.where(below <= lower, candidate, bits)
    _, at_most, following = _rank(a, inside, bits, inverse, bound, source, numbers, kind)
    following = tl.where(at_most > upper, bits, following)
    return 0.5 * bits.to(tl.float32, bitcast=True) + 0.5 * following.to(tl.float32, bitcast=True)


@triton.jit
def _newton(point, y, a, inverse, bound, source, numbers, kind: tl.constexpr):
    f, slope = _total(NEWTON, y, a, point, inverse, bound, source, numbers, kind)
    return point + f * (tl.sqrt(f) - 1.0) / slope


@triton.jit
def _between(value, low, high):
    """The value, moved into the interval; NaN stays NaN."""
    return tl.where(value < low, low, tl.where(value > high, high, value))


@triton.jit
def _root(low, high, y, a, inverse, bound, source, numbers, kind: tl.constexpr):
    """The root r of ``sum y^2 / (r + a)^2 = 1``, by a fixed number of steps: see ``exact.exact_shrink_``."""
    low = _between(_newton(low, y, a, inverse, bound, source, numbers, kind), low, high)
    for _ in range(BISECTIONS):
        middle = tl.sqrt(low * high)
        ahead = _newton(middle, y, a, inverse, bound, source, numbers, kind)
        high = tl.where(ahead < middle, middle, high)
        low = _between(ahead, low, high)
    for _ in range(NEWTON_STEPS):
        low = _between(_newton(low, y, a, inverse, bound, source, numbers, kind), low, high)
    return low


@triton.jit(do_not_specialize=["n_groups"])
def step_kernel(
    tensors,
    plain,
    counted,
    group_first,
    group_size,
    group_row,
    group_problem,
    group_weight,
    tensor_of,
    base_of,
    length_of,
    inner_of,
    outer_of,
    stride_of,
    n_groups,
    METHOD: tl.constexpr,
    METRIC: tl.constexpr,
    LAYOUT: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
    PASSES: tl.constexpr,
):
    """Take a step in the groups of one kind.

    tensors: addresses, a row of ``tables.ADDRESSES`` for each tensor. plain, counted: a row of ``tables.PLAIN`` for each param
    group and of ``tables.COUNTED`` for each problem (a parameter, or the parameters of a joint group). Groups, by number: their
    first piece (one number more than groups), their size, their rows in the two tables, and their weight. Pieces: see
    ``layout.Pieces``.
    """
    kind: tl.constexpr = (METHOD, DTYPE, LAYOUT, BLOCK, PASSES)
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    valid = group < n_groups
    first = tl.load(group_first + group, mask=valid, other=0)
    count = tl.load(group_first + group + 1, mask=valid, other=0) - first
    size = tl.load(group_size + group, mask=valid, other=1)
    row = plain + tl.load(group_row + group, mask=valid, other=0) * PLAIN
    problem = counted + tl.load(group_problem + group, mask=valid, other=0) * COUNTED
    lr = tl.load(row + LR)
    own_step = tl.load(row + STEP)
    bound = tl.load(row + L2) * tl.load(group_weight + group, mask=valid, other=0)
    momentum = tl.load(problem + MOMENTUM)
    numbers = (
        lr,
        own_step,
        tl.load(row + L1),
        tl.load(row + SIGN),
        tl.load(row + DECAY),
        tl.load(row + DECOUPLED),
        tl.load(row + KEEP_MEAN),
        tl.load(row + NEW_MEAN),
        tl.load(row + KEEP_SQUARE),
        tl.load(row + NEW_SQUARE),
        tl.load(row + EPS),
        tl.load(problem + MEAN_SCALE),
        tl.load(problem + ROOT_SCALE),
    )
    tables_of = (tensor_of, base_of, length_of, inner_of, outer_of, stride_of)
    source = (tensors, tables_of, first, count)

    # the gradient step: all of the group into the tile, or once through the group
    y = tl.zeros([BLOCK, GROUPS], tl.float32)
    a = tl.zeros([BLOCK, GROUPS], tl.float32)
    start = 0 * count
    for k in range(tl.max(count, 0)):
        piece = _piece(k, first, count, tables_of)
        for chunk in range(0, tl.max(piece[1], 0) if PASSES else 1, BLOCK):
            places = _places(chunk - start, piece, LAYOUT, BLOCK)
            z, step = _candidate(tensors, places, numbers, METHOD, DTYPE, True)
            if not PASSES:
                y = tl.where(places[3], z, y)
                a = tl.where(places[3], step, a)
        if not PASSES:
            start += piece[1]
    if PASSES:
        tl.debug_barrier()  # the moments are read again below

    # what the group shrink leaves: a share of each group, or of each entry root / (root + a)
    share = 0 * bound + 1.0
    root = share
    unit = share
    inverse = share
    zeroed = bound < 0
    if METRIC != NO_GROUPS:
        filled = tl.arange(0, BLOCK)[:, None] < size[None, :]
        largest, _ = _total(SIZE, y, a, share, inverse, bound, source, numbers, kind)
        unit, inverse = _unit(largest)
        y, a = _scaled(y, a, filled, inverse, bound)
        if tl.max(bound, 0) > 0:
            square, widest = _total(NORM, y, a, share, inverse, bound, source, numbers, kind)
            norm = tl.sqrt_rn(square)
            if METRIC == ONE_STEP or METRIC == MEDIAN:
                if METRIC == ONE_STEP:
                    threshold = bound * inverse * own_step
                else:
                    threshold = _median(a, filled, size, inverse, bound, source, numbers, kind)
                zeroed = norm <= threshold
                share = 1.0 - threshold / norm
            else:
                square, excess = _total(DUAL, y, a, share, inverse, bound, source, numbers, kind)
                dual = tl.sqrt_rn(square)
                zeroed = dual <= 1.0
                share = 1.0 - 1.0 / dual
                if METRIC == EXACT:
                    low = tl.maximum(tl.maximum(excess, norm - widest), 0.0)
                    root = _root(low, norm, y, a, inverse, bound, source, numbers, kind)
    shrinks = bound > 0

    # the result, and the extrapolation
    start = 0 * count
    for k in range(tl.max(count, 0)):
        piece = _piece(k, first, count, tables_of)
        for chunk in range(0, tl.max(piece[1], 0) if PASSES else 1, BLOCK):
            places = _places(chunk - start, piece, LAYOUT, BLOCK)
            inside = places[3]
            if PASSES:
                y, a = _candidate(tensors, places, numbers, METHOD, DTYPE, False)
                if METRIC != NO_GROUPS:
                    y, a = _scaled(y, a, inside, inverse, bound)
            new = y
            if METRIC != NO_GROUPS:
                if METRIC == EXACT:
                    left = root[None, :] / (root[None, :] + a)
                else:
                    left = share[None, :]
                new = tl.where(shrinks[None, :], tl.where(zeroed[None, :], 0.0, y * left), y) * unit[None, :]
            x_at = _pointers(tensors, places, X, DTYPE)
            if METHOD == HAPG or METHOD == ADAM_HAPG:
                point_at = _pointers(tensors, places, POINT, tl.float32)
                last = tl.load(point_at, mask=inside, other=0)
                tl.store(point_at, new, mask=inside)
                new = new + momentum[None, :] * (new - last)
            elif METHOD == PROX_SGD_TAU:
                tl.store(_pointers(tensors, places, POINT, tl.float32), new, mask=inside)
                x = tl.load(x_at, mask=inside, other=0).to(tl.float32)
                new = x + lr[None, :] * (new - x)
            tl.store(x_at, new.to(DTYPE), mask=inside)
        if not PASSES:
            start += piece[1]
