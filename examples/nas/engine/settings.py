"""Settings that every search and training has, and checks of numbers. A preset is an instance of a settings class."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal


class CheckedSettings:
    """Base class of all settings. A class that adds fields checks them in ``__post_init__``, after that of its bases."""

    def __post_init__(self) -> None:
        pass

    def schedules(self) -> list[str]:
        """What follows the number of epochs, as a learning rate with a cosine schedule; without any, a run can be prolonged."""
        return []


@dataclass(frozen=True)
class RunSettings(CheckedSettings):
    """Where a run writes and how it is executed. None of it changes a result, so none of it identifies a checkpoint."""

    out: Path = Path("runs/run")
    """Folder for all files of the run: results, pictures, the table of the epochs, checkpoints, scalars for TensorBoard."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the random numbers. There is one run for each, one after the other; with several, each has the folder OUT/seed-N,
    and OUT/seeds.csv compares them."""
    resume: bool = False
    """Continue the run in --out from its checkpoint."""
    device: Literal["auto", "cpu", "cuda", "gpu", "tpu"] = "auto"
    """Device: auto (CUDA where available), cpu or cuda. With --framework jax also gpu or tpu, and auto is the fastest kind there
    is."""
    threads: int = 0
    """Number of CPU threads; 0: as many as the library chooses, usually one for each core."""
    checkpoint_minutes: float = 5.0
    """Minutes between checkpoints within an epoch; one is also written after every epoch."""
    not_identifying: ClassVar[tuple[str, ...]] = ("data_dir",)
    """Settings of a subclass that do not identify a checkpoint either."""

    def plain(self) -> dict[str, Any]:
        """What the run computes, as numbers and strings: runs with equal ones give equal results, and share checkpoints."""
        left_out = {*(field.name for field in fields(RunSettings)), *self.not_identifying}
        return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items() if k not in left_out}


def check(settings: Any, counts: Sequence[str] = (), amounts: Sequence[str] = (), shares: Sequence[str] = ()) -> None:
    """Check fields by name.

    Raises:
      ValueError: a count below 1, an amount that is negative or not finite, a share outside [0, 1).
    """
    for name in counts:
        if getattr(settings, name) < 1:
            raise ValueError(f"{name} must be >= 1, got {getattr(settings, name)}")
    for name in amounts:
        if not 0 <= getattr(settings, name) < float("inf"):
            raise ValueError(f"{name} must be finite and >= 0, got {getattr(settings, name)}")
    for name in shares:
        if not 0 <= getattr(settings, name) < 1:
            raise ValueError(f"{name} must lie in [0, 1), got {getattr(settings, name)}")


def cosine(done: float) -> float:
    """The factor of a cosine schedule, from 1 to 0, when this share of the run is done."""
    return (1 + math.cos(math.pi * done)) / 2
