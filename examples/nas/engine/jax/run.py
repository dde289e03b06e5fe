"""Searches in JAX: the loop with its checkpoints, on one device or many, on one host or several."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from .. import console
from ..lock import locked
from ..loop import STEPS_BETWEEN_CLOCKS, Loop, find_checkpoint, first_sentence
from .checkpoint import Checkpoints
from .devices import Devices, join_devices

# settings without effect in JAX, or that the networks in JAX lack, and the only values that they may have
WITHOUT_EFFECT = {"threads": 0, "compiled": False, "auxiliary": 0.0, "drop_path": 0.0, "cutout": 0, "early_stop": False}
MOST_STEPS = 10**7  # of an epoch: checkpoints are numbered by epoch and step
ARCHITECTURE, NETWORK, ORDER, BATCH, EVALUATION = range(5)  # the random streams of a run, the indices of its keys
PARTS = ("identity", "progress", "own")  # of the plain data of a checkpoint


class Run(Loop):
    """A loop in JAX. Subclasses define the state in a checkpoint as well.

    Every process runs the same steps. The first one writes tables and reports; all of them take part in a checkpoint, in a folder
    that all can read.
    """

    framework = "jax"
    processes: Devices

    def __init__(self, settings: Any, seed: int, out: Path, devices: Devices) -> None:
        super().__init__(settings, seed, out, devices)
        self.devices = devices
        key = jax.random.key(seed)
        self.keys = [jax.random.fold_in(key, stream) for stream in range(5)]
        self._checkpoints: Checkpoints | None = None

    def state(self) -> Any:
        """The tree of arrays that `restore` needs."""
        return {}

    def plain(self) -> dict[str, Any]:
        """The data that `restore` needs besides, as JSON has them."""
        return {}

    def restore(self, state: Any, plain: dict[str, Any]) -> None:
        """Restore what `state` and `plain` returned."""

    def identity(self) -> dict[str, Any]:
        # sums over a batch are rounded in another order when more devices share it
        return {**super().identity(), "framework": self.framework, "devices": self.devices.count}

    def checkpoints(self) -> Checkpoints:
        if self._checkpoints is None:
            self._checkpoints = Checkpoints(self.out)
        return self._checkpoints

    def save(self) -> None:
        plain = {"identity": self.identity(), "progress": self.progress(), "own": self.plain()}
        self.checkpoints().save(self.epoch * MOST_STEPS + self.step, self.state(), plain)

    def save_is_due(self, seconds: float) -> bool:
        # all processes write a checkpoint after the same step, by the clock of the first one
        if self.devices.world == 1:
            return super().save_is_due(seconds)
        return self.step % STEPS_BETWEEN_CLOCKS == 0 and self.devices.from_first(super().save_is_due(seconds))

    def machine(self) -> console.Machine:
        library, devices = f"jax {jax.__version__}", self.devices.mesh.devices.flatten().tolist()
        if devices[0].platform == "cpu":
            found = console.cpu(library)
            return replace(found, name=f"{found.name}, {len(devices)} devices") if len(devices) > 1 else found
        peak = lambda: sum((d.memory_stats() or {}).get("peak_bytes_in_use", 0) for d in devices if d.process_index == 0)
        return console.Machine(library, f"{len(devices)} x {devices[0].device_kind}", True, peak)

    def compiles(self) -> bool:
        return True

    def wait_for_steps(self) -> None:
        jax.block_until_ready(self.state())

    def continue_from_checkpoint(self) -> None:
        """Restore the state of the checkpoint. ValueError if it is damaged, of another program, or of other settings."""
        folder, plain = self.checkpoints().folder, self.checkpoints().plain()
        missing = [part for part in PARTS if part not in plain]
        if missing:
            raise ValueError(f"{folder} must hold checkpoints of a run, but the last one has no {missing[0]!r}")
        found = {name: tuple(value) if isinstance(value, list) else value for name, value in plain["identity"].items()}
        self.refuse_other(found)
        self.set_progress(plain["progress"])
        state = self.checkpoints().state(self.state())
        try:
            self.restore(state, plain["own"])
        except (KeyError, TypeError, ValueError) as error:
            reason = first_sentence(error)
            raise ValueError(
                f"{folder} must hold checkpoints of this {self.kind}, but its state does not fit: {reason}"
            ) from None

    def run(self) -> dict[str, Any]:
        try:
            return super().run()
        finally:
            if self._checkpoints is not None:
                self._checkpoints.close()


def all_finite(tree: Any) -> bool:
    """Whether no entry of the arrays is infinite or NaN."""
    return all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(tree))


def refuse_other_settings(settings: Any) -> None:
    """Raise ValueError for a setting that a search in JAX would ignore."""
    for name, default in WITHOUT_EFFECT.items():
        given = getattr(settings, name, default)
        if given != default:
            raise ValueError(f"{name} must be {default} with --framework jax, got {given}")


def launch(make: Callable[[Devices], Run], settings: Any, out: Path) -> dict[str, Any]:
    """Build a run, resume it from its checkpoint if there is one, and run it to the end; return the row of its result.

    On several hosts every process calls this, after `Hosts.join`.

    Args:
      make: builds the run for its devices.

    Raises:
      FileExistsError: `out` contains a run and `settings.resume` is off, or another process runs in it.
      Interrupted: the run was stopped by Ctrl-C or SIGTERM, and has saved.
      ValueError: a setting outside its domain; a checkpoint of other settings or of PyTorch, or a damaged one; a run that
        diverges.
    """
    refuse_other_settings(settings)
    devices = join_devices(settings.device)
    with ExitStack() as stack:
        refused: FileExistsError | None = None
        if devices.first:
            try:
                stack.enter_context(locked(out))
            except FileExistsError as error:
                refused = error
        if devices.any(refused is not None):  # the other processes must not wait for the first one
            raise refused or FileExistsError(f"{out} is in use: the first process has the reason")
        there = find_checkpoint(out, "jax", settings.resume)
        run = make(devices)
        devices.wait()
        if not devices.all_same(out.is_dir(), there):
            raise ValueError(f"out must be a folder that all processes share, got {out}")
        if there:
            run.continue_from_checkpoint()
        devices.wait()
        return run.run()
