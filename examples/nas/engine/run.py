"""What a search and a training share: epochs of steps with progress and a table, checkpoints, going on after any stop."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import checkpoint
from .distributed import Processes, join_processes
from .log import Log


class Run:
    """Epochs of steps. Subclasses say what a step does, what a row of the table holds, and what belongs into a checkpoint."""

    kind = "run"
    table = "run.csv"

    def __init__(self, settings: Any, seed: int, out: Path, processes: Processes, device: torch.device) -> None:
        self.settings, self.seed, self.out, self.processes, self.device = settings, seed, out, processes, device
        self.epoch = self.step = 0
        self.seconds = 0.0
        self.rows: list[dict[str, Any]] = []
        torch.manual_seed(seed)

    # -- what subclasses say ------------------------------------------------------------------

    def __len__(self) -> int:
        """Steps of an epoch."""
        raise TypeError(f"{type(self).__name__} does not say how many steps an epoch has")

    def epochs(self) -> int:
        """How many there will be, as far as is known."""
        return self.settings.epochs

    def begin_epoch(self) -> None:
        """Before the first step of an epoch that starts or goes on: set what only depends on its number."""

    def batches(self) -> Iterator[Any]:
        """What the steps of this epoch take, from number `self.step` on."""
        raise TypeError(f"{type(self).__name__} has no batches")

    def take(self, batch: Any) -> None:
        """One step."""
        raise TypeError(f"{type(self).__name__} has no steps")

    def end_epoch(self) -> dict[str, Any]:
        """Evaluate: the columns of this epoch beside its number and time."""
        return {}

    def headline(self, row: dict[str, Any]) -> str:
        """What the line of progress says of the last epoch."""
        return f"valid {100 * row['valid_accuracy']:.2f} %"

    def finish(self) -> None:
        """After the last epoch, in the first process: pictures, reports."""

    def result(self) -> dict[str, Any]:
        """The row of the epoch that the run stands for."""
        return self.rows[-1]

    def identity(self) -> dict[str, Any]:
        """What the run computes, as plain data: a checkpoint belongs to exactly this."""
        return {"seed": self.seed, "processes": self.processes.world, **self.settings.plain()}

    def state(self) -> dict[str, Any]:
        """Tensors and plain data from which `restore` goes on."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned."""

    # -- the loop -----------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Train to the last epoch; the row of `result`."""
        first = self.processes.first
        log = Log(self.out, self.table) if first else None
        patience = 0.5 if os.isatty(2) else 30.0  # seconds between lines of progress
        done = self.epoch * len(self) + self.step
        with tqdm(total=self.epochs() * len(self), initial=done, unit="step", disable=not first, mininterval=patience) as bar:
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

    def _steps(self, bar: tqdm) -> None:
        self.begin_epoch()
        last = saved = time.monotonic()
        for batch in self.batches():
            self.take(batch)
            self.step += 1
            bar.update()
            now = time.monotonic()
            self.seconds += now - last
            last = now
            if now - saved > 60 * self.settings.checkpoint_minutes:
                self.save()
                saved = now

    def save(self) -> None:
        """Write the checkpoint, in the first process."""
        if self.processes.first:
            progress = {"epoch": self.epoch, "step": self.step, "seconds": self.seconds, "rows": self.rows}
            random = checkpoint.random_state(self.device)
            content = {"identity": self.identity(), "progress": progress, "random": random, "state": self.state()}
            checkpoint.save(self.out / "checkpoint.pt", content)

    def continue_from_checkpoint(self) -> None:
        """Go on from the checkpoint; ValueError where it is damaged or belongs to other settings."""
        content = checkpoint.load(self.out / "checkpoint.pt", self.device)
        checkpoint.refuse_other(self.kind, self.identity(), content["identity"], type(self.settings)().plain())
        progress = content["progress"]
        self.epoch, self.step, self.seconds, self.rows = (progress[k] for k in ("epoch", "step", "seconds", "rows"))
        self.restore(content["state"])
        checkpoint.restore_random_state(content["random"], self.device)


def launch(make: Callable[[Processes, torch.device], Run], settings: Any, out: Path) -> dict[str, Any]:
    """Build a run, continue it where it had stopped, and run it to the end; the row it stands for.

    Under torchrun every process calls this; the first one writes.

    Raises:
      FileExistsError: `out` holds a run and `settings.resume` is off.
      ValueError: a setting out of its domain; a checkpoint of other settings, or a damaged one.
    """
    if settings.threads < 0:
        raise ValueError(f"threads must be >= 0, got {settings.threads}")
    if settings.threads:
        torch.set_num_threads(settings.threads)
    processes, device = join_processes(settings.device)
    there = (out / "checkpoint.pt").exists()
    if there and not settings.resume:
        raise FileExistsError(f"{out} holds a run already: continue it with --resume, or choose another --out")
    run = make(processes, device)
    if processes.first:
        out.mkdir(parents=True, exist_ok=True)
    if there:
        run.continue_from_checkpoint()
    processes.wait()
    return run.run()
