"""Schedules for strengths and learning rates: functions from a step number to a number.

Any function of an int can serve as a schedule; these are the usual ones. What a step is depends on the caller: an epoch or
whatever else calls ``proxopt_torch.StrengthPath.step``, an update in optax.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from proxopt import _checks

Schedule = Callable[[int], float]


def constant(value: float) -> Schedule:
    """The schedule f(t) = value.

    Args:
      value: a number >= 0.

    Raises:
      ValueError: ``value`` is negative or not finite.

    >>> constant(0.1)(7)
    0.1
    """
    _checks.in_range("value", value)
    return lambda t: value


def linear(slope: float, start: float = 0.0, stop: float = math.inf) -> Schedule:
    r"""A schedule that rises linearly up to a bound.

    .. math:: f(t) = \min(\mathrm{start} + \mathrm{slope} \cdot t, \; \mathrm{stop})

    Args:
      slope: increase per step, >= 0; 0.01 per epoch in SparseNAS.
      start: value at t = 0, >= 0.
      stop: upper bound, >= 0.

    Raises:
      ValueError: an argument is out of its domain.

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
    r"""A schedule that rises linearly from 0 and is constant after ``steps`` steps.

    .. math:: f(t) = \mathrm{value} \cdot \min(t / \mathrm{steps}, \; 1)

    Args:
      value: the final value, >= 0.
      steps: the number of steps until it is reached, > 0.

    Raises:
      ValueError: an argument is out of its domain.

    >>> path = warmup(1.0, 4)
    >>> path(0), path(2), path(9)
    (0.0, 0.5, 1.0)
    """
    _checks.in_range("value", value)
    _checks.in_range("steps", steps, open_low=True)
    return lambda t: value * min(t / steps, 1.0)


def cosine(start: float, steps: int, stop: float = 0.0) -> Schedule:
    r"""A schedule along half a period of a cosine, constant after ``steps`` steps.

    .. math::

        f(t) = \mathrm{stop} + \tfrac{1}{2} (\mathrm{start} - \mathrm{stop})
               \big(1 + \cos(\pi \min(t / \mathrm{steps}, 1))\big)

    Args:
      start: value at t = 0, >= 0.
      steps: the number of steps until ``stop`` is reached, > 0.
      stop: the final value, >= 0.

    Raises:
      ValueError: an argument is out of its domain.

    >>> path = cosine(1.0, 10)
    >>> path(0), round(path(5), 6), path(10)
    (1.0, 0.5, 0.0)
    """
    _checks.in_range("start", start)
    _checks.in_range("stop", stop)
    _checks.in_range("steps", steps, open_low=True)
    return lambda t: stop + (start - stop) * (1 + math.cos(math.pi * min(t / steps, 1.0))) / 2


def geometric(start: float, stop: float, steps: int) -> Schedule:
    r"""A geometric sequence of ``steps`` numbers, such as the strengths of a regularisation path from ``max_strength`` down.

    .. math:: f(t) = \mathrm{start} \, (\mathrm{stop} / \mathrm{start})^{\min(t, n - 1) / (n - 1)}, \qquad n = \mathrm{steps}

    Args:
      start: value at t = 0, > 0.
      stop: value at t = steps - 1 and later, > 0.
      steps: how many numbers, >= 2.

    Raises:
      ValueError: an argument is out of its domain.

    >>> grid = geometric(1.0, 0.01, 3)
    >>> [round(grid(t), 6) for t in range(3)]
    [1.0, 0.1, 0.01]
    """
    _checks.in_range("start", start, open_low=True)
    _checks.in_range("stop", stop, open_low=True)
    _checks.in_range("steps", steps, 2)
    return lambda t: start * (stop / start) ** (min(t, steps - 1) / (steps - 1))
