"""Searches and trainings in PyTorch: the loop with its checkpoints, on one device or several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import checkpoint, console
from .distributed import Processes, join_processes
from .lock import locked
from .loop import Loop, find_checkpoint, first_sentence


class Run(Loop):
    """A loop in PyTorch. Subclasses define the state in a checkpoint as well."""

    framework = "torch"

    def __init__(self, settings: Any, seed: int, out: Path, processes: Processes, device: torch.device) -> None:
        super().__init__(settings, seed, out, processes)
        self.device = device
        torch.manual_seed(seed)

    def state(self) -> dict[str, Any]:
        """The tensors and plain data that `restore` needs."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""

    def machine(self) -> console.Machine:
        library = f"torch {torch.__version__}"
        if self.device.type != "cuda":
            return console.cpu(library, torch.get_num_threads())
        memory = lambda: torch.cuda.max_memory_allocated(self.device)
        return console.Machine(library, torch.cuda.get_device_name(self.device), True, memory)

    def wait_for_steps(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def compiles(self) -> bool:
        return getattr(self.settings, "compiled", False)

    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.net.parameters()) if hasattr(self, "net") else 0

    def save(self) -> None:
        """Write the checkpoint; only the first process does."""
        if self.processes.first:
            random = checkpoint.random_state(self.device)
            content = {"identity": self.identity(), "progress": self.progress(), "random": random, "state": self.state()}
            checkpoint.save(self.out / "checkpoint.pt", content)

    def continue_from_checkpoint(self) -> None:
        """Restore the state of the checkpoint. ValueError if it is damaged, of another program, or of other settings."""
        file = self.out / "checkpoint.pt"
        content = checkpoint.load_run(file, self.device)
        self.refuse_other(content["identity"])
        try:
            self.set_progress(content["progress"])
            self.restore(content["state"])
            checkpoint.restore_random_state(content["random"], self.device)
        except (KeyError, IndexError, TypeError, AttributeError, RuntimeError, ValueError) as error:
            reason = first_sentence(error)
            raise ValueError(f"{file} must be the checkpoint of this {self.kind}, but its state does not fit: {reason}") from None


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no entry is infinite or NaN."""
    return bool(torch.stack(torch._foreach_norm([t.detach() for t in tensors], float("inf"))).isfinite().all())


def join(settings: Any) -> tuple[Processes, torch.device]:
    """Set the number of threads, and return the process and its device. ValueError for a setting outside its domain."""
    if settings.threads < 0:
        raise ValueError(f"threads must be >= 0, got {settings.threads}")
    if settings.threads:
        torch.set_num_threads(settings.threads)
    return join_processes(settings.device)


def launch(make: Callable[[Processes, torch.device], Run], settings: Any, out: Path) -> dict[str, Any]:
    """Build a run, resume it from its checkpoint if there is one, and run it to the end; return the row of its result.

    Under torchrun every process calls this; the first one locks `out` and writes files.

    Args:
      make: builds the run from the process and its device.

    Raises:
      FileExistsError: `out` contains a run and `settings.resume` is off, or another process runs in it.
      Interrupted: the run was stopped by Ctrl-C or SIGTERM, and has saved.
      ValueError: a setting outside its domain; a checkpoint of other settings or of JAX, or a damaged one; a run that diverges.
    """
    processes, device = join(settings)
    with locked(out) if processes.first else nullcontext():
        there = find_checkpoint(out, "torch", settings.resume)
        run = make(processes, device)
        if there:
            run.continue_from_checkpoint()
        processes.wait()
        return run.run()
