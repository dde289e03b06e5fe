"""Counts, sizes and times as text."""

from __future__ import annotations


def plural(count: int, noun: str) -> str:
    """A count of something: 1 step, 12 000 steps."""
    return f"{grouped(count)} {noun}" + ("" if count == 1 else "s")


def millions(count: int) -> str:
    """A number of parameters: 1.93 M, or 5 310 below a hundred thousand."""
    return grouped(count) if count < 100_000 else f"{count / 1e6:.3g} M"


def grouped(count: int) -> str:
    """A number with its thousands apart: 50 000."""
    return f"{count:,}".replace(",", " ")


def duration(seconds: float) -> str:
    """A time in the unit that suits it: 35 ms, 1.2 s, 14 min, 3.5 h, 61 h (2.5 days)."""
    if seconds < 0.1:
        return f"{1000 * seconds:.2g} ms"
    if seconds < 90:
        return f"{seconds:.2g} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    hours = seconds / 3600
    return f"{hours:.1f} h" if hours < 10 else f"{hours:.0f} h" + (f" ({hours / 24:.1f} days)" if hours >= 36 else "")
