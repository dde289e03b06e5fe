"""Find the strength of a penalty that gives a wanted size, by bisection on its logarithm with one run for each strength tried."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .loop import refuse_existing

FACTOR = 4.0  # ratio of successive strengths, until two of them enclose the wanted size


def closest_strength(size: Callable[[float], int], want: int, start: float, runs: int) -> float:
    """Try at most `runs` strengths and return the one whose size, a decreasing function of the strength, is closest to `want`."""
    found: dict[float, int] = {}
    low: float | None = None  # largest strength known to be too small
    high: float | None = None  # smallest strength known to be too large
    strength = start
    for _ in range(runs):
        found[strength] = size(strength)
        if found[strength] == want:
            break
        if found[strength] > want:
            low = strength
        else:
            high = strength
        strength = (low * high) ** 0.5 if low and high else low * FACTOR if low else strength / FACTOR
    return min(found, key=lambda s: (abs(found[s] - want), s))


def refuse_existing_runs(out: Path, resume: bool) -> None:
    """Raise FileExistsError if `out` contains runs for several strengths and `resume` is off."""
    refuse_existing(any(out.glob("mu-*")), out, resume)
