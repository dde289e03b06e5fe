"""The strength of a penalty that leaves as much as is wanted: bisection on its logarithm, one run for each strength tried."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

FACTOR = 4.0  # between the first strengths tried, until the wanted number lies between two


def closest_strength(left: Callable[[float], int], want: int, start: float, runs: int) -> float:
    """Of at most `runs` strengths tried the one at which `left(strength)`, which falls as it grows, is closest to `want`."""
    found: dict[float, int] = {}
    low: float | None = None  # leaves too many
    high: float | None = None  # leaves too few
    strength = start
    for _ in range(runs):
        found[strength] = left(strength)
        if found[strength] == want:
            break
        if found[strength] > want:
            low = strength
        else:
            high = strength
        strength = (low * high) ** 0.5 if low and high else low * FACTOR if low else strength / FACTOR
    return min(found, key=lambda s: (abs(found[s] - want), s))


def refuse_existing_runs(out: Path, resume: bool) -> None:
    """FileExistsError where `out` holds runs for several strengths that were not to be continued."""
    if not resume and any(out.glob("mu-*")):
        raise FileExistsError(f"{out} holds a run already: continue it with --resume, or choose another --out")
