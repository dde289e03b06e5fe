"""The loop of a search or training: epochs of steps with a progress bar, a table, and checkpoints to resume from."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from . import console
from .log import Log


class Processes(Protocol):
    """The processes of a run as the loop sees them. first: whether this one shows progress and writes tables and reports."""

    @property
    def first(self) -> bool: ...

    world: int

    def wait(self) -> None:
        """Wait until all processes have come here."""


class Loop:
    """Epochs of steps, whatever library computes them. Subclasses define a step, a row of the table, and how a checkpoint is
    written."""

    kind = "run"
    table = "run.csv"

    def __init__(self, settings: Any, seed: int, out: Path, processes: Processes) -> None:
        self.settings, self.seed, self.out, self.processes = settings, seed, out, processes
        self.epoch = self.step = 0
        self.seconds = 0.0
        self.rows: list[dict[str, Any]] = []
        self.first_steps: console.FirstSteps | None = None

    # -- defined by subclasses ----------------------------------------------------------------

    def __len__(self) -> int:
        """The number of steps of an epoch."""
        raise TypeError(f"{type(self).__name__} must define __len__, the number of steps of an epoch")

    def epochs(self) -> int:
        """The number of epochs, as far as it is known at this time."""
        return self.settings.epochs

    def begin_epoch(self) -> None:
        """Prepare an epoch that starts or is resumed: set everything that depends on its number only."""

    def batches(self) -> Iterator[Any]:
        """The batches of this epoch from number `self.step` on."""
        raise TypeError(f"{type(self).__name__} must define batches")

    def train_step(self, batch: Any) -> None:
        """Take one step."""
        raise TypeError(f"{type(self).__name__} must define train_step")

    def end_epoch(self) -> dict[str, Any]:
        """Evaluate, and return the columns of this epoch without its number and time."""
        return {}

    def headline(self, row: dict[str, Any]) -> str:
        """The summary of the last epoch in the progress bar."""
        return console.progress(row)

    def title(self) -> str:
        """What the run computes, for its header."""
        return ", ".join(str(getattr(self.settings, name)) for name in ("data", "space") if hasattr(self.settings, name))

    def machine(self) -> console.Machine:
        """What computes the run, for its header."""
        return console.cpu("Python")

    def compiles(self) -> bool:
        """Whether the first step is much longer than the others."""
        return False

    def data_text(self) -> str:
        """The data of the run, for its header."""
        return ""

    def parameter_count(self) -> int:
        """The number of parameters of the network, for the header; 0: not shown."""
        return 0

    def finish(self) -> None:
        """Write pictures and reports after the last epoch; called in the first process only."""

    def result(self) -> dict[str, Any]:
        """The row of the epoch that is the result of the run."""
        return self.rows[-1]

    def identity(self) -> dict[str, Any]:
        """What the run computes, as plain data. A checkpoint can be resumed by runs with the same identity only."""
        return {"seed": self.seed, "processes": self.processes.world, **self.settings.plain()}

    def save(self) -> None:
        """Write a checkpoint, atomically, from which the run can be continued."""
        raise TypeError(f"{type(self).__name__} must define save")

    def save_is_due(self, seconds: float) -> bool:
        """Whether to write a checkpoint within an epoch. seconds: since the last one, or since the epoch began or was resumed."""
        return seconds > 60 * self.settings.checkpoint_minutes

    def wait_for_steps(self) -> None:
        """Wait until the steps that `train_step` has started are finished."""

    # -- the loop -----------------------------------------------------------------------------

    def progress(self) -> dict[str, Any]:
        """How far the run has come, as plain data: a part of every checkpoint."""
        return {"epoch": self.epoch, "step": self.step, "seconds": self.seconds, "rows": self.rows}

    def set_progress(self, progress: dict[str, Any]) -> None:
        """Continue from what `progress` returned."""
        self.epoch, self.step, self.seconds, self.rows = (progress[k] for k in ("epoch", "step", "seconds", "rows"))

    def run(self) -> dict[str, Any]:
        """Run to the last epoch; return the row of `result`."""
        first = self.processes.first
        log = Log(self.out, self.table) if first else None
        if log is not None and self.rows:  # a run that was killed may have written the checkpoint, but not yet the table
            log.write(self.rows)
        patience = 0.5 if os.isatty(2) else 30.0  # seconds between updates: a log file gets fewer than a terminal
        done = self.epoch * len(self) + self.step
        if first and self.epoch < self.epochs():
            console.write(console.header(self))
            self.first_steps = console.FirstSteps(skip=int(self.compiles()))
        with tqdm(total=self.epochs() * len(self), initial=done, unit="step", disable=not first, mininterval=patience) as bar:
            if self.rows:
                bar.set_postfix_str(self.headline(self.rows[-1]))
            while self.epoch < self.epochs():
                self._steps(bar)
                row = {"epoch": self.epoch, "seconds": round(self.seconds, 1), **self.end_epoch()}
                self.rows.append(row)
                self.epoch, self.step = self.epoch + 1, 0
                self.save()
                bar.total = self.epochs() * len(self)
                if log is not None:
                    log.write(self.rows)
                    bar.set_postfix_str(self.headline(row), refresh=False)
        if first:
            self.finish()
        self.processes.wait()
        return self.result()

    def _expect(self, seconds: float) -> None:
        """Print the expected time and memory once enough steps have been timed. seconds: those of the last step."""
        if self.first_steps is not None and self.first_steps.add(seconds):
            left = self.epochs() * len(self) - self.epoch * len(self) - self.step
            console.write(self.first_steps.expectation(left, self.machine()))
            self.first_steps = None

    def _steps(self, bar: tqdm) -> None:
        self.begin_epoch()
        last = saved = time.monotonic()
        for batch in self.batches():
            self.train_step(batch)
            self.step += 1
            bar.update()
            if self.first_steps is not None:
                self.wait_for_steps()
            now = time.monotonic()
            self._expect(now - last)
            self.seconds += now - last
            last = now
            if self.save_is_due(now - saved):
                self.save()
                saved = now
        self.wait_for_steps()
        self.seconds += time.monotonic() - last


def checkpoint_exists(out: Path, framework: str) -> bool:
    """Whether `out` contains a checkpoint of this library: the file of PyTorch, or a complete one in the folder of JAX."""
    if framework == "torch":
        return (out / "checkpoint.pt").exists()
    folder = out / "checkpoint"
    return folder.is_dir() and any(entry.name.isdigit() for entry in folder.iterdir())


def find_checkpoint(out: Path, framework: str, resume: bool) -> bool:
    """Whether `out` contains a checkpoint of this library, from which the run must continue.

    Raises:
      FileExistsError: there is a checkpoint and `resume` is off.
      ValueError: the checkpoint is one of the other library.
    """
    there = {name: checkpoint_exists(out, name) for name in ("torch", "jax")}
    refuse_existing(any(there.values()), out, resume)
    for name, found in there.items():
        if found and name != framework:
            raise ValueError(
                f"--resume must continue a run of --framework {framework}, but {out} contains one of --framework {name}"
            )
    return there[framework]


def refuse_existing(there: bool, out: Path, resume: bool) -> None:
    """Raise FileExistsError if `out` contains a checkpoint (`there`) and `resume` is off."""
    if there and not resume:
        raise FileExistsError(f"{out} already contains a run: continue it with --resume, or choose another --out")


def refuse_other(kind: str, wanted: dict[str, Any], found: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Raise ValueError, with every difference, unless a checkpoint was written with the same settings.

    defaults: values of settings that the checkpoint of an earlier release lacks.
    """
    found = {**defaults, **found}
    other = [f"{k} is {found.get(k)!r}, not {v!r}" for k, v in wanted.items() if found.get(k) != v]
    if other:
        raise ValueError(f"--resume must continue with the settings of the {kind}: in the checkpoint {'; '.join(other)}")
