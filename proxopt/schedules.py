"""step -> number: strength paths and learning rates. Any function of an int serves; these are the usual ones.

A schedule counts whatever its caller counts: epochs in `StrengthPath`, steps in optax.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from proxopt import _checks

Schedule = Callable[[int], float]


def constant(value: float) -> Schedule:
    """f(t) = value"""
    _checks.in_range("value", value)
    return lambda t: value


def linear(slope: float, start: float = 0.0, stop: float = math.inf) -> Schedule:
    """f(t) = min(start + slope * t, stop): SparseNAS raises its strength by 0.01 an epoch.

    >>> path = linear(0.01)
    >>> path(0), path(5)
    (0.0, 0.05)
    """
    _checks.in_range("slope", slope)
    _checks.in_range("start", start)
    if not stop >= 0:
        raise ValueError(f"stop must be >= 0, got {stop}")
    return lambda t: min(start + slope * t, stop)


def warmup(value: float, steps: int) -> Schedule:
    """f(t) = value * min(t / steps, 1): the full strength after `steps`."""
    _checks.in_range("value", value)
    _checks.in_range("steps", steps, open_low=True)
    return lambda t: value * min(t / steps, 1.0)


def cosine(start: float, steps: int, stop: float = 0.0) -> Schedule:
    """f(t) = stop + (start - stop) (1 + cos(pi t / steps)) / 2, and `stop` from `steps` on."""
    _checks.in_range("start", start)
    _checks.in_range("stop", stop)
    _checks.in_range("steps", steps, open_low=True)
    return lambda t: stop + (start - stop) * (1 + math.cos(math.pi * min(t / steps, 1.0))) / 2


def geometric(start: float, stop: float, steps: int) -> Schedule:
    """f(t) = start (stop / start)^(t / (steps - 1)): the grid of a regularisation path, from `max_strength` down.

    >>> grid = geometric(1.0, 0.01, 3)
    >>> [round(grid(t), 6) for t in range(3)]
    [1.0, 0.1, 0.01]
    """
    _checks.in_range("start", start, open_low=True)
    _checks.in_range("stop", stop, open_low=True)
    _checks.in_range("steps", steps, 2)
    return lambda t: start * (stop / start) ** (min(t, steps - 1) / (steps - 1))
