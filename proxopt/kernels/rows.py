"""The prox of one group whose entries lie in a contiguous row: soft threshold, norms, shrinkage with one step or one per entry.

All scalars have the dtype of the row, because arithmetic of mixed precision is not vectorised. Loops run from 0 over the whole
row, because a start that may be negative is not vectorised either, and contain neither slices nor ``min`` and ``max``, which are
slow where NaN has to be kept. Sums are right to a few units in the last place: blocks of `BLOCK` entries are summed in the
precision of the row, and the blocks in double precision. Where a sum of squares overflows or underflows the row is treated once
more in double precision, scaled by its largest entry.

A step ``h`` of the entries and a threshold ``bound`` of the group define

.. math::

    \\operatorname*{arg\\,min}_z \\sum_i \\frac{(z_i - x_i)^2}{2 h_i} + \\text{bound} \\, \\|z\\|_2 .
"""

# mypy: disallow-untyped-defs=False, disallow-untyped-calls=False

from __future__ import annotations

import math

import numpy as np

from proxopt.kernels.jit import from_integer, integers, jit, jit_exactly

BLOCK = 2048
NEWTON_STEPS = 60  # a limit: Newton's method ends when it has converged, usually after three steps
SMALLEST, LARGEST = 1e-24, 1e36  # between them a sum of squares in single precision lost nothing to underflow or overflow
SMALLEST_DOUBLE, LARGEST_DOUBLE = 1e-280, 1e300


# -- soft threshold -------------------------------------------------------------------------------


@jit
def soften(x, t):
    """Replace x by ``sign(x) max(|x| - t, 0)`` for a number t >= 0."""
    below = -t
    for j in range(x.shape[0]):
        c = x[j]
        c = t if c > t else c
        c = below if c < below else c
        x[j] -= c


@jit
def soften_into(x, z, t):
    """Write the soft threshold of x to z; returns its sum of squares."""
    below = -t
    total = x.dtype.type(0)
    for j in range(x.shape[0]):
        a = x[j]
        c = t if a > t else a
        c = below if c < below else c
        a = a - c
        z[j] = a
        total += a * a
    return total


@jit
def soften_by(x, h, l1):
    """Replace x by its soft threshold with the threshold ``h[j] * l1`` of entry j, for a number l1 >= 0."""
    for j in range(x.shape[0]):
        t = h[j] * l1
        c = x[j]
        c = t if c > t else c
        c = -t if c < -t else c
        x[j] -= c


@jit
def soften_by_each(x, h, l1):
    """Replace x by its soft threshold with the threshold ``h[j] * l1[j]`` of entry j."""
    for j in range(x.shape[0]):
        t = h[j] * l1[j]
        c = x[j]
        c = t if c > t else c
        c = -t if c < -t else c
        x[j] -= c


# -- norms ----------------------------------------------------------------------------------------


@jit
def _square_sum(x):
    total = x.dtype.type(0)
    for j in range(x.shape[0]):
        total += x[j] * x[j]
    return total


@jit
def _dual_sum(x, h):
    total = x.dtype.type(0)
    for j in range(x.shape[0]):
        q = x[j] / h[j]
        total += q * q
    return total


@jit
def in_range(total, like):
    """Whether a sum of squares in the dtype of ``like`` is right to rounding: no NaN, no overflow, no underflow."""
    if like.itemsize == 4:
        return total >= SMALLEST and total <= LARGEST
    return total >= SMALLEST_DOUBLE and total <= LARGEST_DOUBLE


@jit
def is_zero(x):
    """Whether all entries are 0."""
    bits = integers(x)
    kind = bits.dtype.type
    every = kind(0)
    for j in range(bits.shape[0]):
        every = kind(every | kind(bits[j] + bits[j]))  # without the sign bit
    return every == 0


@jit
def norm(x):
    """The L2 norm of x, in double precision."""
    total = 0.0
    for start in range(0, x.shape[0], BLOCK):
        total += _square_sum(x[start : start + BLOCK])
    if in_range(total, x):
        return math.sqrt(total)
    return 0.0 if is_zero(x) else _norm_scaled(x)


@jit
def dual_norm(x, h):
    """The L2 norm of x / h, in double precision; entries with step 0 count as 0 where x is 0, and as infinite elsewhere."""
    total = 0.0
    for start in range(0, x.shape[0], BLOCK):
        total += _dual_sum(x[start : start + BLOCK], h[start : start + BLOCK])
    if in_range(total, x):
        return math.sqrt(total)
    return 0.0 if is_zero(x) else _dual_norm_scaled(x, h)


@jit_exactly
def _norm_scaled(x):
    largest = 0.0
    for j in range(x.shape[0]):
        size = abs(float(x[j]))
        if size > largest or size != size:  # NaN stays: no number is larger
            largest = size
    if not 0.0 < largest < math.inf:
        return largest
    total = 0.0
    for j in range(x.shape[0]):
        q = float(x[j]) / largest
        total += q * q
    return largest * math.sqrt(total)


@jit_exactly
def _ratio(x, h):
    """x / h, 0 for 0 / 0."""
    return 0.0 if x == 0 and h == 0 else float(x) / float(h)


@jit_exactly
def _dual_norm_scaled(x, h):
    largest = 0.0
    for j in range(x.shape[0]):
        size = abs(_ratio(x[j], h[j]))
        if size > largest or size != size:
            largest = size
    if not 0.0 < largest < math.inf:
        return largest
    total = 0.0
    for j in range(x.shape[0]):
        q = _ratio(x[j], h[j]) / largest
        total += q * q
    return largest * math.sqrt(total)


# -- shrinkage of the group -----------------------------------------------------------------------


@jit
def scale(x, factor):
    """Multiply x by a number, and turn -0 into 0."""
    zero = x.dtype.type(0)
    for j in range(x.shape[0]):
        x[j] = x[j] * factor + zero


@jit
def share(size, threshold):
    """``max(1 - threshold / size, 0)``, what a shrinkage leaves of a group; 1 where the threshold is 0."""
    if threshold <= 0.0:
        return 1.0
    return 0.0 if size <= threshold else 1.0 - threshold / size


@jit
def shrink(x, threshold):
    """Replace x by ``max(1 - threshold / ||x||, 0) x``."""
    if threshold > 0.0:
        scale(x, x.dtype.type(share(norm(x), threshold)))


@jit
def shrink_median(x, h, bound):
    """`shrink` with the median of the steps as step of all entries."""
    if bound > 0.0:
        shrink(x, bound * median(h))


@jit
def shrink_support(x, h, bound):
    """`shrink` with the step ``||x|| / ||x / h||``, for which the same groups are zeroed as by `shrink_exact`."""
    if bound > 0.0:
        scale(x, x.dtype.type(share(dual_norm(x, h), bound)))


@jit
def shrink_exact(x, h, bound):
    r"""Replace x by the minimiser for steps ``h``: 0 if ``||x / h|| <= bound``, else :math:`x_i \rho / (\rho + h_i)`.

    Here :math:`\rho = \|z\| / \text{bound}` is the root of :math:`\sum_i x_i^2 / (\rho + h_i)^2 = \text{bound}^2`. It is found by
    Newton's method for this sum to the power -1/2, which is concave and increasing, from the root for the one step of
    `shrink_support`.
    """
    if bound <= 0.0:
        return
    dual = dual_norm(x, h)
    if dual <= bound:
        scale(x, x.dtype.type(0))
    else:
        shrink_nonzero(x, h, bound, norm(x), dual)


@jit
def shrink_nonzero(x, h, bound, size, dual):
    """`shrink_exact` of a group that is not zeroed, with the norms ``||x||`` and ``||x / h||``."""
    root, found = _root(x, h, bound, size / bound - size / dual)
    if found:
        _shrink_by_root(x, h, x.dtype.type(1.0 / root))
    else:
        _shrink_exact_scaled(x, h, bound)


@jit
def _root(x, h, bound, root):
    """The root from a start, and whether Newton's method converged to it."""
    smallest, largest = (1e-37, 1e37) if x.itemsize == 4 else (1e-300, 1e300)
    enough = 4e-5 if x.itemsize == 4 else 2e-9  # convergence is quadratic: the error after a move of this size is below rounding
    for _ in range(NEWTON_STEPS):
        if not (root > smallest and root < largest):
            return root, False
        total, slope = 0.0, 0.0
        for start in range(0, x.shape[0], BLOCK):
            part, part_slope = _newton_sums(x[start : start + BLOCK], h[start : start + BLOCK], x.dtype.type(root))
            total += part
            slope += part_slope
        if not (in_range(total, x) and in_range(slope, x)):
            return root, False
        ratio = math.sqrt(total) / bound
        move = (ratio - 1.0) * total / slope
        root += move
        if abs(move) <= enough * root:
            return root, root > smallest and root < largest
    return root, False


@jit
def _newton_sums(x, h, root):
    one = x.dtype.type(1)
    total, slope = x.dtype.type(0), x.dtype.type(0)
    for j in range(x.shape[0]):
        below = one / (root + h[j])
        q = (x[j] * below) * (x[j] * below)
        total += q
        slope += q * below
    return total, slope


@jit
def _shrink_by_root(x, h, inverse_root):
    zero, one = x.dtype.type(0), x.dtype.type(1)
    for j in range(x.shape[0]):
        x[j] = x[j] / (one + h[j] * inverse_root) + zero


@jit_exactly
def _shrink_exact_scaled(x, h, bound):
    """`shrink_exact` of a group that is not zeroed, for any magnitudes: in double precision, with ``y = x / max|x|``.

    In these units the root is that of ``sum y^2 / (r + a)^2 = 1`` with ``a = h bound / max|x|``; an entry with step 0 stays. It
    is found as in ``proxopt.penalties.metric``: the range is halved on a logarithmic scale, because Newton's method alone climbs
    only a decade at a time where the steps spread over many decades.
    """
    largest = _norm_scaled(x)
    if not largest < math.inf:
        for j in range(x.shape[0]):
            x[j] = math.nan if largest != largest else x[j] + 0.0
        return
    unit = bound / largest if bound < largest * LARGEST_DOUBLE else LARGEST_DOUBLE
    square, widest, low = 0.0, 0.0, 0.0
    for j in range(x.shape[0]):
        y, a = abs(float(x[j])) / largest, float(h[j]) * unit
        square += y * y
        widest = max(widest, a)
        low = max(low, y - a)
    high = math.sqrt(square)
    low = min(max(low, high - widest), high)
    root = low
    for turn in range(NEWTON_STEPS):
        middle = math.sqrt(low * high) if 0 < turn < 6 else low
        ahead = _newton_scaled(x, h, largest, unit, middle)
        if ahead < middle:
            high = middle
        root = min(max(ahead, low), high)
        if turn > 6 and root - low <= 1e-13 * root:
            break
        low = root
    for j in range(x.shape[0]):
        a = float(h[j]) * unit
        x[j] = float(x[j]) * (root / (root + a) if a > 0 else 1.0) + 0.0


@jit_exactly
def _newton_scaled(x, h, largest, unit, root):
    total, slope = 0.0, 0.0
    for j in range(x.shape[0]):
        below = root + float(h[j]) * unit
        q = float(x[j]) / largest / (below if below > 0 else 1.0)
        total += q * q
        slope += q * q / (below if below > 0 else 1.0)
    return root + total * (math.sqrt(total) - 1.0) / slope if slope > 0 else root


# -- median ---------------------------------------------------------------------------------------


@jit
def median(h):
    """The median of a row of numbers >= 0: the mean of the two middle ones where their number is even.

    The bit pattern of a positive floating-point number, read as an integer, grows with the number. An interval that contains the
    lower middle one is halved by counting the entries below, in vectorised loops over the row in cache, until it contains a
    single entry: after about as many loops as the number of entries has binary digits.
    """
    bits = integers(h)
    kind = bits.dtype.type
    n = h.shape[0]
    rank = (n - 1) // 2  # how many entries are smaller than the lower middle one, if none are equal
    low, high = _range(bits)
    below, upto = 0, n  # how many entries are < low and <= high
    while low < high and upto - below > 1:
        middle = low + (high - low) // 2
        count = _count_up_to(bits, kind(middle))
        if count > rank:
            high, upto = middle, count
        else:
            low, below = middle + 1, count
    lower = _smallest_from(bits, kind(low))
    if n % 2 == 1:
        return from_integer(lower, h)
    upper = _smallest_from(bits, kind(np.int64(lower) + 1)) if upto == rank + 1 else lower
    return (from_integer(lower, h) + from_integer(upper, h)) / h.dtype.type(2)


@jit
def _range(bits):
    low, high = bits[0], bits[0]
    for j in range(bits.shape[0]):
        low = bits[j] if bits[j] < low else low
        high = bits[j] if bits[j] > high else high
    return np.int64(low), np.int64(high)


@jit
def _count_up_to(bits, limit):
    kind = bits.dtype.type
    count = kind(0)
    for j in range(bits.shape[0]):
        count = kind(count + kind(bits[j] <= limit))  # numba's sum of two integers has 64 bits, and as many halve the speed
    return np.int64(count)


@jit
def _smallest_from(bits, limit):
    """The smallest entry that is not below the limit."""
    largest = bits.dtype.type(_largest_integer(bits.itemsize))
    found = largest
    for j in range(bits.shape[0]):
        value = bits[j] if bits[j] >= limit else largest
        found = value if value < found else found
    return found


@jit
def _largest_integer(itemsize):
    half = (np.int64(1) << (8 * itemsize - 2)) - 1
    return 2 * half + 1
