"""Settings that all searches share. A method adds its own in its file, a preset is an instance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Where results go and how a run is watched: not part of what it computes.
ELSEWHERE = ("out", "seeds", "resume", "data_dir", "device", "threads", "checkpoint_minutes")


def check(settings: Any, counts: Sequence[str] = (), amounts: Sequence[str] = (), shares: Sequence[str] = ()) -> None:
    """Raise ValueError unless the counts are >= 1, the amounts finite and >= 0, and the shares in [0, 1)."""
    for name in counts:
        if getattr(settings, name) < 1:
            raise ValueError(f"{name} must be >= 1, got {getattr(settings, name)}")
    for name in amounts:
        if not 0 <= getattr(settings, name) < float("inf"):
            raise ValueError(f"{name} must be finite and >= 0, got {getattr(settings, name)}")
    for name in shares:
        if not 0 <= getattr(settings, name) < 1:
            raise ValueError(f"{name} must lie in [0, 1), got {getattr(settings, name)}")
