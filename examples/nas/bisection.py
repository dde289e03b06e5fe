"""The strength of a penalty that leaves as much as is wanted: bisection on its logarithm, one search for each strength tried."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import cnn, genotype
from .group_sparse import GroupSparse
from .methods.gsparsity import Settings
from .run import carry_out

FACTOR = 4.0  # between the first strengths tried, until the wanted number lies between two


def closest(left: Callable[[float], int], want: int, start: float, runs: int) -> float:
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


def search(settings: Settings, seed: int, out: Path) -> dict[str, Any]:
    """Searches in `out`/mu-..., each going on where it was; what the closest one left is copied to `out`. Its last row.

    Raises FileExistsError where `out` holds such searches and `settings.resume` is off.
    """
    refuse_old(out, settings.resume)
    rows: dict[float, dict[str, Any]] = {}
    want = settings.want_paths or settings.want_parameters

    def left(mu: float) -> int:
        at = replace(settings, mu=mu, want_paths=0, want_parameters=0, resume=True)
        folder = out / f"mu-{mu:.6g}"
        rows[mu] = carry_out(lambda processes, device: GroupSparse(at, seed, folder, processes, device), at, folder)
        paths = rows[mu]["paths_normal"] + rows[mu]["paths_reduce"]
        count = paths if settings.want_paths else parameters(genotype.load(folder / "genotype.json"))
        print(f"mu {mu:.6g}: {count} {'paths' if settings.want_paths else 'parameters'}, {want} wanted")
        rows[mu] = {"mu": mu, "left": count, **rows[mu]}
        return count

    mu = closest(left, want, settings.mu, settings.bisect_runs)
    for file in (out / f"mu-{mu:.6g}").iterdir():
        if file.is_file() and file.name != "checkpoint.pt":
            shutil.copy(file, out / file.name)
    with (out / "bisection.csv").open("w", newline="", encoding="utf-8") as table:
        writer = csv.DictWriter(table, fieldnames=list(rows[mu]))
        writer.writeheader()
        writer.writerows(rows[m] for m in sorted(rows))
    return rows[mu]


def refuse_old(out: Path, resume: bool) -> None:
    """FileExistsError where `out` holds runs for several strengths that were not to be continued."""
    if not resume and any(out.glob("mu-*")):
        raise FileExistsError(f"{out} holds a run already: continue it with --resume, or choose another --out")


def parameters(found: genotype.Genotype) -> int:
    """Of the network of 20 cells and 36 channels; 0 for a genotype with a dead cell."""
    if not all(found.living(cell) for cell in genotype.CELLS):
        return 0
    return cnn.count(cnn.Network(found, auxiliary=False), (3, 32, 32))["parameters"]
