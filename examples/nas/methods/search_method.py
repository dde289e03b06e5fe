"""What scripts need of a search method, in any library."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple


class SearchMethod(NamedTuple):
    """A method for scripts: presets by name, and a function of (settings, seed, folder) that returns the row of the result."""

    presets: Mapping[str, Any]
    search: Callable[[Any, int, Path], dict[str, Any]]
    method: type | None = None  # None: not a bilevel method
