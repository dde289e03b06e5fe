"""The Triton kernel of all methods: one step of ProxSGD, HAPG, ProxAdam or AdamHAPG, each program for a few groups.

A group is what the penalty zeroes together, of one tensor or of several. It consists of pieces, and entry j of a piece has the
place ``base + (j // inner) * outer + (j % inner) * inner_stride`` in the memory of its tensor (``layout.Pieces``). A group of up to
``BLOCK`` entries is read once and stays in registers until it is written; a larger one (``PASSES``) is read in each pass again.

A program holds tiles of shape (``BLOCK``, ``GROUPS``), a column for each of its groups, so that numbers of groups have the shape
(``GROUPS``,). All arithmetic is in float32. Nothing depends on values that the host would have to read.

This module imports Triton and is imported at the first launch only.
"""
# mypy: ignore-errors

import triton
import triton.language as tl

from proxopt_torch.device import tables

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

# what `_total` reduces; with y = z / unit, a = threshold of an entry / unit, and a point r
SIZE = tl.constexpr(0)  # max |z|
NORM = tl.constexpr(1)  # sum y^2, max a
DUAL = tl.constexpr(2)  # sum (y / a)^2, max (|y| - a), of which only positive values matter
NEWTON = tl.constexpr(3)  # sum q^2, sum q^2 / (r + a) for q = y / (r + a)

TINY = tl.constexpr(1e-30)
BISECTIONS = tl.constexpr(5)  # as in `exact.exact_shrink_`
NEWTON_STEPS = tl.constexpr(3)
BITS = tl.constexpr(31)  # of a positive float32


@triton.jit
def _pointer(tensors, tensor, COLUMN: tl.constexpr, dtype: tl.constexpr, mask):
    """The address of the first entry of a tensor, or of a state of it."""
    return tl.load(tensors + tensor * ADDRESSES + COLUMN, mask=mask, other=0).to(tl.pointer_type(dtype))


@triton.jit
def _places(j, piece, has, base_of, inner_of, outer_of, stride_of, LAYOUT: tl.constexpr):
    """Places in memory of the entries j of pieces."""
    base = tl.load(base_of + piece, mask=has, other=0)[None, :]
    if LAYOUT == CONTIGUOUS:
        return base + j
    outer = tl.load(outer_of + piece, mask=has, other=0)[None, :]
    if LAYOUT == STRIDED:
        return base + j * outer
    inner = tl.load(inner_of + piece, mask=has, other=1)[None, :]
    stride = tl.load(stride_of + piece, mask=has, other=0)[None, :]
    return base + (j // inner) * outer + (j % inner) * stride


@triton.jit
def _candidate(tensors, tensor, has, place, inside, numbers, METHOD: tl.constexpr, DTYPE: tl.constexpr, UPDATE: tl.constexpr):
    """The gradient step and its soft threshold: the point z and the step of each entry. With UPDATE the moments are stored."""
    lr, step, l1, sign, decay, decoupled, keep_mean, new_mean, keep_square, new_square, eps, mean_scale, root_scale = numbers
    x = tl.load(_pointer(tensors, tensor, X, DTYPE, has)[None, :] + place, mask=inside, other=0).to(tl.float32)
    step = step[None, :] + 0 * x
    move = x
    if UPDATE or METHOD == HAPG:
        grad = tl.load(_pointer(tensors, tensor, GRAD, DTYPE, has)[None, :] + place, mask=inside, other=0).to(tl.float32)
        grad = sign[None, :] * grad + decay[None, :] * x
        move = grad
    if METHOD != HAPG:
        mean_at = _pointer(tensors, tensor, MEAN, tl.float32, has)[None, :] + place
        mean = tl.load(mean_at, mask=inside, other=0)
        if UPDATE:
            mean = keep_mean[None, :] * mean + new_mean[None, :] * grad
            tl.store(mean_at, mean, mask=inside)
        move = mean
    if METHOD == PROX_ADAM or METHOD == ADAM_HAPG:
        square_at = _pointer(tensors, tensor, SQUARE, tl.float32, has)[None, :] + place
        square = tl.load(square_at, mask=inside, other=0)
        if UPDATE:
            square = keep_square[None, :] * square + new_square[None, :] * (grad * grad)
            tl.store(square_at, square, mask=inside)
        step = lr[None, :] / (tl.sqrt_rn(square) / root_scale[None, :] + eps[None, :])
        move = mean / mean_scale[None, :]
        x = x * (1 - decoupled[None, :])
    z = x - step * move
    t = l1[None, :] * step
    z = z - tl.where(z > t, t, tl.where(z < -t, -t, z))  # NaN stays NaN, and a zeroed entry is +0
    return z, step


@triton.jit
def _scaled(z, step, inside, unit, bound):
    """y = z / unit and a, the threshold of each entry in this unit; outside of the groups entries that change no reduction."""
    y = tl.where(inside, z / unit[None, :], 0.0)
    a = tl.where(inside, tl.maximum(step * bound[None, :] / unit[None, :], TINY), TINY)
    return y, a


@triton.jit
def _tile_total(KIND: tl.constexpr, y, a, point):
    """A pair of reductions over one tile."""
    if KIND == SIZE:
        first = tl.max(tl.abs(y), 0)
        return first, first
    if KIND == NORM:
        return tl.sum(y * y, 0), tl.max(a, 0)
    if KIND == DUAL:
        ratio = y / a
        return tl.sum(ratio * ratio, 0), tl.max(tl.abs(y) - a, 0)
    below = 1.0 / (point[None, :] + a)
    square = (y * below) * (y * below)
    return tl.sum(square, 0), tl.sum(square * below, 0)


@triton.jit
def _tile_rank(step, inside, bits):
    """How many steps are below a number, given by its bits, and how many are at most it; and the bits of the next larger one."""
    own = tl.where(inside, step.to(tl.int32, bitcast=True), 0x7FFFFFFF)  # floats >= 0 are ordered like their bits
    below = tl.sum(tl.where(own < bits[None, :], 1, 0), 0)
    at_most = tl.sum(tl.where(own <= bits[None, :], 1, 0), 0)
    return below, at_most, tl.min(tl.where(own > bits[None, :], own, 0x7FFFFFFF), 0)


@triton.jit
def _total(KIND: tl.constexpr, y, a, point, unit, bound, source, numbers, kind: tl.constexpr):
    """A pair of reductions over the whole group: of the tile y and a, or (``PASSES``) of tiles that are read again."""
    METHOD: tl.constexpr = kind[0]
    DTYPE: tl.constexpr = kind[1]
    LAYOUT: tl.constexpr = kind[2]
    BLOCK: tl.constexpr = kind[3]
    PASSES: tl.constexpr = kind[4]
    if not PASSES:
        return _tile_total(KIND, y, a, point)
    tensors, piece_tensor, base_of, length_of, inner_of, outer_of, stride_of, first, count = source
    total, other = 0 * unit, 0 * unit
    for k in range(tl.max(count, 0)):
        has = k < count
        piece = first + k
        tensor = tl.load(piece_tensor + piece, mask=has, other=0).to(tl.int64)
        length = tl.load(length_of + piece, mask=has, other=0)
        for start in range(0, tl.max(length, 0), BLOCK):
            j = start + tl.arange(0, BLOCK)[:, None]
            inside = j < length[None, :]
            place = _places(j, piece, has, base_of, inner_of, outer_of, stride_of, LAYOUT)
            z, step = _candidate(tensors, tensor, has, place, inside, numbers, METHOD, DTYPE, False)
            if KIND == SIZE:
                y, a = tl.where(inside, z, 0.0), step
            else:
                y, a = _scaled(z, step, inside, unit, bound)
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
def _rank(step, inside, bits, source, numbers, kind: tl.constexpr):
    """``_tile_rank`` over the whole group."""
    METHOD: tl.constexpr = kind[0]
    DTYPE: tl.constexpr = kind[1]
    LAYOUT: tl.constexpr = kind[2]
    BLOCK: tl.constexpr = kind[3]
    PASSES: tl.constexpr = kind[4]
    if not PASSES:
        return _tile_rank(step, inside, bits)
    tensors, piece_tensor, base_of, length_of, inner_of, outer_of, stride_of, first, count = source
    below, at_most, following = 0 * bits, 0 * bits, 0 * bits + 0x7FFFFFFF
    for k in range(tl.max(count, 0)):
        has = k < count
        piece = first + k
        tensor = tl.load(piece_tensor + piece, mask=has, other=0).to(tl.int64)
        length = tl.load(length_of + piece, mask=has, other=0)
        for start in range(0, tl.max(length, 0), BLOCK):
            j = start + tl.arange(0, BLOCK)[:, None]
            inside = j < length[None, :]
            place = _places(j, piece, has, base_of, inner_of, outer_of, stride_of, LAYOUT)
            _, step = _candidate(tensors, tensor, has, place, inside, numbers, METHOD, DTYPE, False)
            b, m, f = _tile_rank(step, inside, bits)
            below += b
            at_most += m
            following = tl.minimum(following, f)
    return below, at_most, following


@triton.jit
def _median(step, inside, size, source, numbers, kind: tl.constexpr):
    """The median of the steps of each group: the mean of the two middle ones where their number is even."""
    lower, upper = (size - 1) // 2, size // 2
    bits, bit = 0 * size, 0 * size + 0x40000000
    for _ in range(BITS):
        # the largest number with at most `lower` steps below it is the step of that rank
        candidate = bits | bit
        bit = bit >> 1
        below, _, _ = _rank(step, inside, candidate, source, numbers, kind)
        bits = tl.where(below <= lower, candidate, bits)
    _, at_most, following = _rank(step, inside, bits, source, numbers, kind)
    following = tl.where(at_most > upper, bits, following)
    return 0.5 * (bits.to(tl.float32, bitcast=True) + following.to(tl.float32, bitcast=True))


@triton.jit
def _newton(point, y, a, unit, bound, source, numbers, kind: tl.constexpr):
    f, slope = _total(NEWTON, y, a, point, unit, bound, source, numbers, kind)
    return point + f * (tl.sqrt(f) - 1.0) / slope


@triton.jit
def _between(value, low, high):
    """The value, moved into the interval; NaN stays NaN."""
    return tl.where(value < low, low, tl.where(value > high, high, value))


@triton.jit
def _root(norm, low, y, a, unit, bound, source, numbers, kind: tl.constexpr):
    """The root r of ``sum y^2 / (r + a)^2 = 1``, by a fixed number of steps: see ``exact.exact_shrink_``."""
    high = norm
    low = _between(_newton(low, y, a, unit, bound, source, numbers, kind), low, high)
    for _ in range(BISECTIONS):
        middle = tl.sqrt(low * high)
        ahead = _newton(middle, y, a, unit, bound, source, numbers, kind)
        high = tl.where(ahead < middle, middle, high)
        low = _between(ahead, low, high)
    for _ in range(NEWTON_STEPS):
        low = _between(_newton(low, y, a, unit, bound, source, numbers, kind), low, high)
    return low


@triton.jit
def step_kernel(
    tensors,
    plain,
    counted,
    group_first,
    group_size,
    group_row,
    group_problem,
    group_weight,
    piece_tensor,
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

    tensors: addresses, a row of ``tables.ADDRESSES`` for each tensor. plain, counted: a row of ``tables.PLAIN`` for each param group
    and of ``tables.COUNTED`` for each problem (the parameters with a penalty of their own). Groups, by number: their first piece
    (one number more than groups), their size, their rows in the two tables, and their weight. Pieces: see ``layout.Pieces``.
    """
    kind: tl.constexpr = (METHOD, DTYPE, LAYOUT, BLOCK, PASSES)
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    valid = group < n_groups
    first = tl.load(group_first + group, mask=valid, other=0)
    count = tl.load(group_first + group + 1, mask=valid, other=0) - first
    size = tl.load(group_size + group, mask=valid, other=1)
    row = plain + tl.load(group_row + group, mask=valid, other=0) * PLAIN
    lr = tl.load(row + LR)
    step_of = tl.load(row + STEP)
    bound = tl.load(row + L2) * tl.load(group_weight + group, mask=valid, other=0)
    problem = counted + tl.load(group_problem + group, mask=valid, other=0) * COUNTED
    momentum = tl.load(problem + MOMENTUM)
    numbers = (
        lr,
        step_of,
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
    source = (tensors, piece_tensor, base_of, length_of, inner_of, outer_of, stride_of, first, count)

    # the gradient step: all of the group into the tile, or once through the group
    z = tl.zeros([BLOCK, GROUPS], tl.float32)
    steps = tl.zeros([BLOCK, GROUPS], tl.float32)
    start = 0 * count
    for k in range(tl.max(count, 0)):
        has = k < count
        piece = first + k
        tensor = tl.load(piece_tensor + piece, mask=has, other=0).to(tl.int64)
        length = tl.load(length_of + piece, mask=has, other=0)
        for chunk in range(0, tl.max(length, 0) if PASSES else 1, BLOCK):
            j = chunk + tl.arange(0, BLOCK)[:, None] - start[None, :]
            inside = (j >= 0) & (j < length[None, :])
            place = _places(j, piece, has, base_of, inner_of, outer_of, stride_of, LAYOUT)
            new, step = _candidate(tensors, tensor, has, place, inside, numbers, METHOD, DTYPE, True)
            if not PASSES:
                z = tl.where(inside, new, z)
                steps = tl.where(inside, step, steps)
        if not PASSES:
            start += length
    if PASSES:
        tl.debug_barrier()  # the moments are read again below
    filled = tl.arange(0, BLOCK)[:, None] < size[None, :]

    # what the group shrink leaves: a share of each group, or of each entry root / (root + a)
    share = 0 * bound + 1.0
    root = share
    unit = share
    shrinks = bound > 0
    zeroed = bound < 0
    if METRIC != NO_GROUPS:
        if tl.max(bound, 0) > 0:
            largest, _ = _total(SIZE, z, steps, share, unit, bound, source, numbers, kind)
            unit = tl.where((largest > 0) & (largest < float("inf")), largest, 1.0)
            y, a = _scaled(z, steps, filled, unit, bound)
            square, widest = _total(NORM, y, a, share, unit, bound, source, numbers, kind)
            norm = tl.sqrt_rn(square)
            if METRIC == ONE_STEP or METRIC == MEDIAN:
                if METRIC == ONE_STEP:
                    threshold = bound * step_of / unit
                else:
                    threshold = bound * _median(steps, filled, size, source, numbers, kind) / unit
                zeroed = norm <= threshold
                share = 1.0 - threshold / norm
            else:
                square, excess = _total(DUAL, y, a, share, unit, bound, source, numbers, kind)
                dual = tl.sqrt_rn(square)
                zeroed = dual <= 1.0
                if METRIC == SUPPORT:
                    share = 1.0 - 1.0 / dual
                else:
                    low = tl.maximum(tl.maximum(excess, norm - widest), 0.0)
                    root = _root(norm, low, y, a, unit, bound, source, numbers, kind)

    # the result, and the extrapolation
    start = 0 * count
    for k in range(tl.max(count, 0)):
        has = k < count
        piece = first + k
        tensor = tl.load(piece_tensor + piece, mask=has, other=0).to(tl.int64)
        length = tl.load(length_of + piece, mask=has, other=0)
        for chunk in range(0, tl.max(length, 0) if PASSES else 1, BLOCK):
            j = chunk + tl.arange(0, BLOCK)[:, None] - start[None, :]
            inside = (j >= 0) & (j < length[None, :])
            place = _places(j, piece, has, base_of, inner_of, outer_of, stride_of, LAYOUT)
            if PASSES:
                z, steps = _candidate(tensors, tensor, has, place, inside, numbers, METHOD, DTYPE, False)
            new = z
            if METRIC == EXACT:
                _, a = _scaled(z, steps, inside, unit, bound)
                new = tl.where(shrinks[None, :], z * (root[None, :] / (root[None, :] + a)), z)
            elif METRIC != NO_GROUPS:
                new = tl.where(shrinks[None, :], z * share[None, :], z)
            new = tl.where(zeroed[None, :] & shrinks[None, :], 0.0, new)
            x_at = _pointer(tensors, tensor, X, DTYPE, has)[None, :] + place
            if METHOD == HAPG or METHOD == ADAM_HAPG:
                point_at = _pointer(tensors, tensor, POINT, tl.float32, has)[None, :] + place
                last = tl.load(point_at, mask=inside, other=0)
                tl.store(point_at, new, mask=inside)
                new = new + momentum[None, :] * (new - last)
            elif METHOD == PROX_SGD_TAU:
                point_at = _pointer(tensors, tensor, POINT, tl.float32, has)[None, :] + place
                tl.store(point_at, new, mask=inside)
                x = tl.load(x_at, mask=inside, other=0).to(tl.float32)
                new = x + lr[None, :] * (new - x)
            tl.store(x_at, new.to(DTYPE), mask=inside)
        if not PASSES:
            start += length
