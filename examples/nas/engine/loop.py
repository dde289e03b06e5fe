"""The loop of a search or training: epochs of steps with a progress bar, a table, and checkpoints to resume from."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from ..space.files import write_text
from . import console, resume
from .log import Log
from .signals import Interrupted, StopRequest

LONGEST_VALUE = 100  # characters of a setting that an error shows
STEPS_BETWEEN_CLOCKS = 8  # several processes compare their clocks and signals only so often, as that waits for the devices


class Processes(Protocol):
    """The processes of a run as the loop sees them. first: whether this one shows progress and writes tables and reports."""

    @property
    def first(self) -> bool: ...

    world: int

    def wait(self) -> None:
        """Wait until all processes have come here."""

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in one of the processes. All of them must call this."""


class Diverged(ValueError):
    """A run cannot go on: a loss, a gradient or a weight is infinite or NaN."""


class Loop:
    """Epochs of steps, whatever library computes them. Subclasses define a step, a row of the table, and how a checkpoint is
    written.

    kind: what an error calls the run. command: the script that starts it. framework: the library that computes it.
    """

    kind = "run"
    table = "run.csv"
    command = ""
    framework = ""

    def __init__(self, settings: Any, seed: int, out: Path, processes: Processes) -> None:
        self.settings, self.seed, self.out, self.processes = settings, seed, out, processes
        self.epoch = self.step = 0
        self.seconds = 0.0
        self.rows: list[dict[str, Any]] = []
        self.stop = StopRequest()
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
        """Evaluate, and return the columns of this epoch without its number, counted from 1, and its time."""
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

    def initial_lr(self) -> float:
        """The learning rate that an error names."""
        return self.settings.lr

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

    def description(self) -> dict[str, Any]:
        """What settings.json has besides the settings."""
        return {"command": self.command, "framework": self.framework, **self.identity()}

    def is_finite(self) -> bool:
        """Whether the run has not diverged since the last epoch, as far as losses and weights tell."""
        return True

    def save(self) -> None:
        """Write a checkpoint, atomically, from which the run can be continued."""
        raise TypeError(f"{type(self).__name__} must define save")

    def save_is_due(self, seconds: float) -> bool:
        """Whether to write a checkpoint within an epoch. seconds: since the last one, or since the epoch began or was resumed."""
        return seconds > 60 * self.settings.checkpoint_minutes

    def wait_for_steps(self) -> None:
        """Wait until the steps that `train_step` has started are finished."""

    # -- checks and files ---------------------------------------------------------------------

    def check_finite(self, part: str, loss: float) -> None:
        """Raise Diverged for a loss that is infinite or NaN, from which the run cannot recover. part: of the data."""
        if not loss < float("inf"):
            raise Diverged(
                f"the {part} loss of epoch {self.epoch + 1} must be finite, got {loss}; lr is {self.initial_lr():g}:"
                " a lower lr may help"
            )

    def refuse_other(self, found: dict[str, Any]) -> None:
        """Raise ValueError unless a checkpoint with this identity can be continued: only `epochs` may have grown."""
        defaults = type(self.settings)().plain()
        refuse_other(self.kind, self.identity(), found, defaults, self.settings.schedules())

    def write_settings(self) -> None:
        """Write settings.json, from which --resume and --config take the settings."""
        resume.write_settings(self.out, self.settings, **self.description())

    # -- the loop -----------------------------------------------------------------------------

    def progress(self) -> dict[str, Any]:
        """How far the run has come, as plain data: a part of every checkpoint."""
        return {"epoch": self.epoch, "step": self.step, "seconds": self.seconds, "rows": self.rows}

    def set_progress(self, progress: dict[str, Any]) -> None:
        """Continue from what `progress` returned."""
        self.epoch, self.step, self.seconds, rows = (progress[k] for k in ("epoch", "step", "seconds", "rows"))
        self.rows = counted_from_one(rows)

    def run(self) -> dict[str, Any]:
        """Run to the last epoch; return the row of `result`.

        Raises Interrupted after SIGINT or SIGTERM: the run finishes its step and saves.
        """
        with StopRequest() as self.stop:
            return self._run()

    def _run(self) -> dict[str, Any]:
        first = self.processes.first
        log = Log(self.out, self.table) if first else None
        if first:
            self.write_settings()
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
                row = {"epoch": self.epoch + 1, "seconds": round(self.seconds, 1), **self.end_epoch()}
                self.rows.append(row)
                self.epoch, self.step = self.epoch + 1, 0
                self.save()
                bar.total = self.epochs() * len(self)
                if log is not None:
                    log.write(self.rows)
                    bar.set_postfix_str(self.headline(row), refresh=False)
                if self.epoch < self.epochs() and self.processes.any(self.stop.number > 0):
                    self._stop()
        if first:
            self.finish()
            write_text(self.out / "result.json", json.dumps(self.result(), indent=1) + "\n")
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
            self._step(batch)
            self.step += 1
            bar.update()
            if self.first_steps is not None:
                self.wait_for_steps()
            now = time.monotonic()
            self._expect(now - last)
            self.seconds += now - last
            last = now
            if self._stop_is_due():
                self.wait_for_steps()
                self.save_within_epoch()
                self._stop()
            if self.save_is_due(now - saved):
                self.save_within_epoch()
                saved = now
        self.wait_for_steps()
        self.seconds += time.monotonic() - last

    def _step(self, batch: Any) -> None:
        try:
            self.train_step(batch)
        except Diverged:
            raise
        except ValueError as error:  # the optimizers of proxopt check gradients on a CPU
            if "must be finite" not in str(error) or "may help" in str(error):
                raise
            reason = f"{error}; lr is {self.initial_lr():g}: a lower lr may help"
            raise Diverged(f"the {self.kind} diverged in epoch {self.epoch + 1}: {reason}") from None

    def save_within_epoch(self) -> None:
        """Write a checkpoint, unless the run has diverged, so that the last one from which it can go on is kept."""
        if not self.is_finite():
            self.check_finite("train", float("nan"))
        self.save()

    def _stop_is_due(self) -> bool:
        """Whether to stop after this step. Several processes stop after the same one, or they would wait for each other."""
        number = self.stop.number
        if self.processes.world == 1:
            return number > 0
        return self.step % STEPS_BETWEEN_CLOCKS == 0 and self.processes.any(number > 0)

    def _stop(self) -> None:
        number, self.stop.number = self.stop.number or signal.SIGTERM, 0
        where = f" after step {self.step} of epoch {self.epoch + 1}" if self.step else f" after epoch {self.epoch}"
        raise Interrupted(number, where)


def counted_from_one(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with epochs counted from 1, as tables have them; release 0.1.0 wrote checkpoints that count from 0."""
    shift = 1 - rows[0]["epoch"] if rows else 0
    return [{**row, "epoch": row["epoch"] + shift} for row in rows]


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
      ValueError: the checkpoint is one of the other library; a file has the name of its folder.
    """
    if (out / "checkpoint").is_file():
        raise ValueError(f"{out / 'checkpoint'} must be a folder of checkpoints, but is a file")
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


def refuse_other(
    kind: str, wanted: dict[str, Any], found: dict[str, Any], defaults: dict[str, Any], schedules: Sequence[str] = ()
) -> None:
    """Raise ValueError, with every difference, unless a checkpoint was written with the same settings, or fewer epochs.

    defaults: values of settings that the checkpoint of an earlier release lacks. schedules: what follows the number of epochs,
    which must then be the same.
    """
    found = {**defaults, **found}
    missing = [k for k in wanted if k not in found]
    if missing:
        raise ValueError(f"--resume must continue a {kind}, but the checkpoint is one of something else: it has no {missing[0]}")
    other = {k: _difference(k, found.get(k), v) for k, v in wanted.items() if found.get(k) != v}
    if "epochs" in other and not schedules and wanted["epochs"] > found["epochs"]:
        del other["epochs"]
    elif "epochs" in other:
        reason = f"{' and '.join(schedules)} follow{'s' if len(schedules) == 1 else ''} the number of epochs"
        other["epochs"] += f" ({reason if schedules else 'it can only grow'})"
    if other:
        raise ValueError(f"--resume must continue with the settings of the {kind}: in the checkpoint {'; '.join(other.values())}")


def _difference(name: str, found: Any, wanted: Any) -> str:
    """Two values of a setting, or for long ones, such as the genotype of a training, that they differ."""
    if max(len(repr(found)), len(repr(wanted))) > LONGEST_VALUE:
        return f"{name} is another"
    return f"{name} is {found!r}, not {wanted!r}"


def first_sentence(error: Exception) -> str:
    """The begin of a message: those of torch and Orbax have many lines."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line.split(". ")[0].rstrip(".")[:200]
