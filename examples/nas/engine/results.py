"""The files that a search writes besides its checkpoint and its table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..space.genotype import AnyGenotype, load_genotype
from ..space.spaces import Space
from . import report


def save_epoch(out: Path, epoch: int, genotype: AnyGenotype) -> None:
    """Write the genotype of an epoch, counted from 0, as genotypes/epoch-NNN.json, and as genotype.json, the latest one."""
    genotype.save(_of_epoch(out, epoch))
    genotype.save(out / "genotype.json")


def select_epoch(out: Path, epoch: int, kind: type[AnyGenotype]) -> None:
    """Make the genotype of this epoch the result, genotype.json."""
    load_genotype(_of_epoch(out, epoch), kind).save(out / "genotype.json")


def write_report(
    out: Path,
    method: str,
    rows: Sequence[Mapping[str, Any]],
    point: Mapping[str, Any],
    space: Space,
    settings: Mapping[str, Any],
    details: report.Details | None = None,
) -> dict[str, int]:
    """Write report.html and its pictures. Arguments and result as of `report.write`."""
    return report.write(out, method, rows, point, space, settings, details) or {}


def _of_epoch(out: Path, epoch: int) -> Path:
    return out / "genotypes" / f"epoch-{epoch + 1:03d}.json"
