"""Errors that name the argument, the value received and the domain.

Only Python and NumPy values are checked: a traced array has no value yet, and reading a device tensor would make the host wait.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from proxopt._arrays import is_number


def in_range(name: str, value: Any, low: float = 0.0, high: float = math.inf, *, open_low: bool = False) -> None:
    """Refuse a number or NumPy array with an entry that is not finite or not in [low, high]."""
    if isinstance(value, (bool, str)) or value is None:
        raise TypeError(f"{name} must be a number, got {value!r}")
    if isinstance(value, (list, tuple)):
        value = np.asarray(value, dtype=float)
    if is_number(value):
        number = float(value)
        if (number > low if open_low else number >= low) and number <= high and number < math.inf:  # comparisons can be traced
            return
        worst: Any = number
    elif isinstance(value, np.ndarray):
        if value.dtype.kind in "fiu" and value.size and _all_in_range(value, low, high, open_low):
            return
        good = np.isfinite(value) & (value > low if open_low else value >= low) & (value <= high)
        if good.all():
            return
        worst = value.reshape(-1)[np.argmin(good.reshape(-1))]
    else:
        return
    if high == math.inf:
        domain = f"be finite and {'>' if open_low else '>='} {low:g}"
    else:
        domain = f"lie in {'(' if open_low else '['}{low:g}, {high:g}]"
    raise ValueError(f"{name} must {domain}, got {worst}")


def _all_in_range(value: np.ndarray, low: float, high: float, open_low: bool) -> bool:
    """Whether an array is in [low, high] and finite, by its extremes: NaN is neither above low nor below high."""
    least, most = value.min(), value.max()
    return bool((least > low if open_low else least >= low) and most <= high and most < math.inf)


def one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Refuse a value that is none of those allowed."""
    if not any(value is a or (isinstance(a, str) and isinstance(value, str) and value == a) for a in allowed):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
