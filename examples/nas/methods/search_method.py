"""What scripts need of a search method, in any library."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

RULES = ("published", "sound")
RULE_HELP = """Rule of the architecture steps, for --method sparse_supernet. published: as in the paper. sound: with changes by
which the search sees the shares of the paths and not their common size. Each is a setting below: path-norm (of images),
hold-norm, nonnegative, warmup, levels, optimizer, constant-arch-lr, cap, probe-every, strength."""


class SearchMethod(NamedTuple):
    """A method for scripts: presets by name, and a function of (settings, seed, folder) that returns the row of the result."""

    presets: Mapping[str, Any]
    search: Callable[[Any, int, Path], dict[str, Any]]
    method: type | None = None  # None: not a bilevel method
    sound: Callable[[Any], Any] | None = None  # settings of the sound rule from those of the published one; None: it has no such
    # a search of several seeds in one program, of (settings, seeds, folder), that returns a row for each; None: it has no such
    sweep: Callable[[Any, Sequence[int], Path], list[dict[str, Any]]] | None = None

    def presets_of(self, rule: str) -> Mapping[str, Any]:
        """The presets with a rule of `RULES`. Raises SystemExit if the method does not have it."""
        if rule == "published":
            return self.presets
        if self.sound is None:
            raise SystemExit(f"error: --rule {rule} belongs to --method sparse_supernet")
        return {name: self.sound(preset) for name, preset in self.presets.items()}
