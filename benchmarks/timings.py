"""What the benchmarks of steps report of their timings."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def summary(name: str, seconds: Sequence[float], baseline: Sequence[float], device: str) -> dict:
    """One row of a table: the median in milliseconds, and the ratio to the baseline of the same round as median and range."""
    ratios = [t / base for t, base in zip(seconds, baseline)]
    return {
        "optimizer": name,
        f"{device}_ms": 1e3 * statistics.median(seconds),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }
