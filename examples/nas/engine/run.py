"""The loop of a search or training: epochs of steps with a progress bar, a table, and checkpoints to resume from."""

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
    """Epochs of steps. Subclasses define a step, a row of the table, and the state in a checkpoint."""

    kind = "run"
    table = "run.csv"

    def __init__(self, settings: Any, seed: int, out: Path, processes: Processes, device: torch.device) -> None:
        self.settings, self.seed, self.out, self.processes, self.device = settings, seed, out, processes, device
        self.epoch = self.step = 0
        self.seconds = 0.0
        self.rows: list[dict[str, Any]] = []
        torch.manual_seed(seed)

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
        return f"valid {100 * row['valid_accuracy']:.2f} %"

    def finish(self) -> None:
        """Write pictures and reports after the last epoch; called in the first process only."""

    def result(self) -> dict[str, Any]:
        """The row of the epoch that is the result of the run."""
        return self.rows[-1]

    def identity(self) -> dict[str, Any]:
        """What the run computes, as plain data. A checkpoint can be resumed by runs with the same identity only."""
        return {"seed": self.seed, "processes": self.processes.world, **self.settings.plain()}

    def state(self) -> dict[str, Any]:
        """The tensors and plain data that `restore` needs."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""

    # -- the loop -----------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Run to the last epoch; return the row of `result`."""
        first = self.processes.first
        log = Log(self.out, self.table) if first else None
        patience = 0.5 if os.isatty(2) else 30.0  # seconds between updates: a log file gets fewer than a terminal
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
            self.train_step(batch)
            self.step += 1
            bar.update()
            now = time.monotonic()
            self.seconds += now - last
            last = now
            if now - saved > 60 * self.settings.checkpoint_minutes:
                self.save()
                saved = now

    def save(self) -> None:
        """Write the checkpoint; only the first process does."""
        if self.processes.first:
            progress = {"epoch": self.epoch, "step": self.step, "seconds": self.seconds, "rows": self.rows}
            random = checkpoint.random_state(self.device)
            content = {"identity": self.identity(), "progress": progress, "random": random, "state": self.state()}
            checkpoint.save(self.out / "checkpoint.pt", content)

    def continue_from_checkpoint(self) -> None:
        """Restore the state of the checkpoint. ValueError if it is damaged or was written with other settings."""
        content = checkpoint.load(self.out / "checkpoint.pt", self.device)
        checkpoint.refuse_other(self.kind, self.identity(), content["identity"], type(self.settings)().plain())
        progress = content["progress"]
        self.epoch, self.step, self.seconds, self.rows = (progress[k] for k in ("epoch", "step", "seconds", "rows"))
        self.restore(content["state"])
        checkpoint.restore_random_state(content["random"], self.device)


def launch(make: Callable[[Processes, torch.device], Run], settings: Any, out: Path) -> dict[str, Any]:
    """Build a run, resume it from its checkpoint if there is one, and run it to the end; return the row of its result.

    Under torchrun every process calls this; the first one writes files.

    Args:
      make: builds the run from the process and its device.

    Raises:
      FileExistsError: `out` contains a run and `settings.resume` is off.
      ValueError: a setting outside its domain; a checkpoint of other settings, or a damaged one.
    """
    if settings.threads < 0:
        raise ValueError(f"threads must be >= 0, got {settings.threads}")
    if settings.threads:
        torch.set_num_threads(settings.threads)
    processes, device = join_processes(settings.device)
    there = (out / "checkpoint.pt").exists()
    if there and not settings.resume:
        raise FileExistsError(f"{out} already contains a run: continue it with --resume, or choose another --out")
    run = make(processes, device)
    if processes.first:
        out.mkdir(parents=True, exist_ok=True)
    if there:
        run.continue_from_checkpoint()
    processes.wait()
    return run.run()
