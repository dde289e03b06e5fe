"""What a run prints: a header before its first step, the expected time and memory after a few steps, and its progress.

All of it goes to standard error, with the progress bar, and is printed by the first process only.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..space.amounts import duration, millions, plural

LONG = 3 * 3600.0  # seconds; a longer run on a CPU gets advice
MANY = 500_000  # images, or windows of a column of text, that a small preset stays below and a published one exceeds
# Steps are timed until there are 3 that took 2 s together, or so many, or those that there are took so many seconds.
FEWEST, ENOUGH = 3, 2.0
MOST, MOST_SECONDS = 20, 20.0


@dataclass(frozen=True)
class Machine:
    """What computes a run.

    library: name and version. name: of the device. accelerator: whether it is faster than a CPU. memory: peak use in bytes; 0 if
    that is unknown.
    """

    library: str
    name: str
    accelerator: bool
    memory: Callable[[], int]


def cpu(library: str, threads: int | None = None) -> Machine:
    """The processor of this machine. threads: those that the library uses, where it reports them."""
    used = "" if threads is None else f", {plural(threads, 'thread')}"
    return Machine(library, f"CPU, {_processor()}, {plural(_cores(), 'core')}{used}", False, _peak_resident)


def header(run: Any) -> str:
    """What a run is about to compute, a line each. run: a `Loop`."""
    machine, processes = run.machine(), run.processes.world
    epochs, steps, settings = run.epochs(), len(run), run.settings
    limit = "at most " if epochs != settings.epochs else ""
    batch = f" of batch size {settings.batch}" if hasattr(settings, "batch") else ""
    start = f", continued from epoch {run.epoch + 1}, step {run.step + 1}" if run.epoch or run.step else ""
    length = f"{limit}{plural(epochs, 'epoch')} of {plural(steps, 'step')}{batch}{start}"
    rows = {
        run.kind: f"{run.title()}, seed {run.seed}, in {run.out}",
        "device": f"{machine.library} on {machine.name}" + (f", {processes} processes" if processes > 1 else ""),
        "data": run.data_text(),
        "network": f"{millions(run.parameter_count())} parameters" if run.parameter_count() else "",
        "steps": f"{length}; the expected time follows after a few steps",
    }
    left = (epochs - run.epoch) * steps * getattr(settings, "batch", 1)
    if not machine.accelerator and left > MANY:
        rows["note"] = "no accelerator is in use, and so long a run can take days on a CPU; --preset small is made for one"
    return "\n".join(f"{name:<9}{text}" for name, text in rows.items() if text)


@dataclass
class FirstSteps:
    """Times the first steps of a run. skip: how many are left out, as they include compilation."""

    skip: int = 0
    seconds: list[float] = field(default_factory=list)

    def add(self, seconds: float) -> bool:
        """Add the time of a step; return whether these are enough."""
        if self.skip:
            self.skip -= 1
            return False
        self.seconds.append(seconds)
        count, total = len(self.seconds), sum(self.seconds)
        return count >= MOST or total >= MOST_SECONDS or (count >= FEWEST and total >= ENOUGH)

    def expectation(self, left: int, machine: Machine) -> str:
        """The expected time and memory, in a line. left: the number of steps to come."""
        each = statistics.median(self.seconds)
        memory = machine.memory()
        used = f", {memory / 2**30:.2g} GB of {'device ' if machine.accelerator else ''}memory so far" if memory else ""
        text = f"expected {duration(each * left)} for {plural(left, 'step')} at {duration(each)} each, plus evaluations{used}"
        if not machine.accelerator and each * left > LONG:
            text += "; no accelerator is in use: --preset small is made for a CPU"
        return text


def write(text: str) -> None:
    """Print to standard error, above a progress bar."""
    from tqdm import tqdm

    tqdm.write(text, file=sys.stderr)


def progress(row: Mapping[str, Any]) -> str:
    """The summary of an epoch in the progress bar: quality on validation data, and how far the architecture has come.

    The latter is the number of nonzero paths, and for a method whose number of paths is constant what changes instead: the mean
    entropy of the edges, or the distance that the codes moved in the last epoch.
    """
    parts = []
    if "valid_perplexity" in row:
        parts.append(f"valid perplexity {row['valid_perplexity']:.1f}")
    if "valid_accuracy" in row:
        parts.append(f"valid {100 * row['valid_accuracy']:.2f} %")
    of = lambda prefix: [value for name, value in row.items() if name.startswith(prefix)]
    entropies, paths = of("entropy_"), of("paths_")
    if entropies:
        parts.append(f"edge entropy {statistics.mean(entropies):.3f}")
    elif "frozen_nodes" in row:
        parts.append(f"{row['frozen_nodes']} of 8 nodes frozen")
    elif "moved" in row:
        parts.append(f"codes moved {row['moved']:.2g}")
    elif paths:
        parts.append(f"{sum(paths)} paths left")
    if "pruned_share" in row:
        parts.append(f"{row['dead_operations']} operations zero, {100 * row['pruned_share']:.1f} % of the weights")
    return ", ".join(parts)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _peak_resident() -> int:
    try:
        import resource
    except ImportError:  # on Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
