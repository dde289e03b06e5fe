"""The parts of GSparsity that all libraries share: weighting and prox of the groups, what they leave, bisection for a size."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from proxopt import GroupL2

from ..engine.bisection import closest_strength, refuse_existing_runs
from ..engine.lock import locked
from ..engine.log import write_csv
from ..engine.resume import write_settings
from ..space.genotype import AnyGenotype, Genotype, load_image_genotype
from ..space.genotype import Path as CellPath
from ..space.spaces import Space
from .settings.gsparsity import GSparsitySettings, Weighting

Key = tuple[str, CellPath]  # of a group: the cell type and the path


def strength_of_group(mu: float, weighting: Weighting, size: int, norm: float) -> float:
    """mu_k of a group with so many entries and this initial norm."""
    factors = {"inverse_sqrt_size": 1 / math.sqrt(size), "none": 1.0, "sqrt_size": math.sqrt(size), "initial_norm": norm}
    return mu * factors[weighting]


def genotype_of(norms: Mapping[Key, float], cut: float, kind: type[AnyGenotype] = Genotype) -> Any:
    """The operations whose norm at the prox point is larger than `cut`, without dead ends. kind: of the genotype."""
    cells = kind.layout.cells
    kept = {cell: [path for (c, path), norm in norms.items() if c == cell and norm > cut] for cell in cells}
    return kind.from_paths(**kept).clean()


def shares(space: Space, norms: Mapping[Key, float], initial: Mapping[Key, float]) -> dict[str, np.ndarray]:
    """||w_hat_k|| / ||w_k(0)|| of each path, for pictures; 0 for paths without group."""
    share = lambda key: norms[key] / initial[key] if key in norms else 0.0
    return {cell: np.array([share((cell, path)) for path in space.paths(cell)], np.float32) for cell in space.layout.cells}


def droppable(keys: Iterable[Key], small: Collection[Key], kind: type[AnyGenotype] = Genotype) -> list[Key]:
    """The groups of `small`, but for those of a cell that would lose its last connection without them. kind: of genotypes."""
    found, cells = [], kind.layout.cells
    for cell in cells:
        left = [path for c, path in keys if c == cell and (c, path) not in small]
        if kind.from_paths(**{name: left if name == cell else [] for name in cells}).clean().output_nodes(cell):
            found += [key for key in small if key[0] == cell]
    return found


def parameters_of(found: AnyGenotype, size_of: Callable[[Any], dict[str, int]]) -> int:
    """The parameters of the network of a genotype by this function; 0 if no path leads to the output of a cell."""
    return size_of(found)["parameters"] if all(found.output_nodes(cell) for cell in found.layout.cells) else 0


def loss_free(norm: np.ndarray, strength: np.ndarray, lr: float, tau: float, steps: int) -> np.ndarray:
    """The norms of groups after `steps` steps of ProxSGD with zero gradient: the effect of the penalty alone.

        ||w_hat|| = max(||w|| - mu_k / tau, 0),   ||w|| <- ||w|| + lr (||w_hat|| - ||w||)

    norm: ||w_k(0)||. strength: mu_k. One entry for each group.
    """
    for _ in range(steps):
        norm = norm + lr * (np.maximum(norm - strength / tau, 0) - norm)
    return norm


class GatedGroup:
    """The penalty mu_k ||w||_2, whose prox clips the last `gates` entries to [0, 1], as in the published code."""

    __module__ = "nas.methods.gsparsity"  # where release 0.1.0 had it, whose checkpoints name it so

    def __init__(self, mu: float, gates: int):
        self.mu, self.gates = mu, gates

    def value(self, x: Any) -> Any:
        return self._group.value(x)

    def prox(self, x: Any, step: Any = 1.0) -> Any:
        z = self._group.prox(x, step)
        if not self.gates:
            return z
        xp, weights = array_namespace(z), z.shape[0] - self.gates
        return xp.concat([z[:weights], xp.clip(z[weights:], 0, 1)])

    @property
    def _group(self) -> GroupL2:
        return GroupL2(self.mu, weights="none")


def search_or_bisect(
    settings: GSparsitySettings,
    out: Path,
    run: Callable[[GSparsitySettings, Path], dict[str, Any]],
    size_of: Callable[[Any], dict[str, int]],
    first: Callable[[], bool],
    description: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Search with one mu, or find the mu with the wanted size by bisection; return the last row.

    A bisection searches in `out`/mu-... for each mu tried, and copies the files of the closest one to `out`.

    Args:
      run: searches with settings in a folder, and returns the last row.
      size_of: parameters and multiply-adds of the published network of a genotype.
      first: whether this process prints and writes, where several search together.
      description: what settings.json of a bisection has besides the settings, such as the seed; None: no such file.

    Unfinished searches are resumed. Raises FileExistsError if `out` contains searches and `settings.resume` is off.
    """
    if not settings.want_paths and not settings.want_parameters:
        return run(settings, out)
    with locked(out) if first() else nullcontext():
        return _bisect(settings, out, run, size_of, first, description)


def _bisect(
    settings: GSparsitySettings,
    out: Path,
    run: Callable[[GSparsitySettings, Path], dict[str, Any]],
    size_of: Callable[[Any], dict[str, int]],
    first: Callable[[], bool],
    description: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Arguments as those of `search_or_bisect`."""
    refuse_existing_runs(out, settings.resume)
    if first() and description is not None:
        write_settings(out, settings, **description)
    rows: dict[float, dict[str, Any]] = {}
    want = settings.want_paths or settings.want_parameters

    def left(mu: float) -> int:
        at = replace(settings, mu=mu, want_paths=0, want_parameters=0, resume=True)
        folder = out / f"mu-{mu:.6g}"
        rows[mu] = run(at, folder)
        paths = sum(value for column, value in rows[mu].items() if column.startswith("paths_"))
        count = paths if settings.want_paths else parameters_of(load_image_genotype(folder / "genotype.json"), size_of)
        if first():
            print(f"mu {mu:.6g}: {count} {'paths' if settings.want_paths else 'parameters'}, {want} wanted")
        rows[mu] = {"mu": mu, "left": count, **rows[mu]}
        return count

    mu = closest_strength(left, want, settings.mu, settings.bisect_runs)
    if first():
        for file in (out / f"mu-{mu:.6g}").iterdir():
            if file.is_file() and file.name not in ("checkpoint.pt", "settings.json"):
                shutil.copy(file, out / file.name)
        write_csv(out / "bisection.csv", [rows[m] for m in sorted(rows)])
    return rows[mu]
