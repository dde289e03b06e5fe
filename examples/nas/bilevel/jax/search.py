"""The loop of a bilevel search in JAX, for any data and network. Files as those of `bilevel.search`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from ...engine.jax.devices import Devices
from ...engine.jax.run import ARCHITECTURE, Run, all_finite
from ...space.spaces import Masks, Space, discrete
from ..outcome import Outcome
from ..settings import BilevelSettings
from .method import Method
from .steps import BilevelSteps, Nodes, SearchState


class BilevelSearch(Outcome, Run):
    """A search by one method with one seed. Subclasses define the data, the supernet, and the measure of quality."""

    settings: BilevelSettings
    method: Method
    steps: BilevelSteps
    data: Any  # arrays of every step
    search: SearchState

    def __init__(self, method: type[Method], settings: BilevelSettings, seed: int, out: Path, devices: Devices) -> None:
        super().__init__(settings, seed, out, devices)
        self.name, self.make = method.name, method
        self.points: list[dict[str, Any]] = []

    def prepare(self, graph: Any, params: Any, space: Space, steps: type[BilevelSteps], steps_per_epoch: int) -> None:
        """Build the method and the steps, and copy the state to the devices."""
        self.devices.check_divisible("batch", self.settings.batch)
        self.space = space
        self.method = self.make(space, self.settings, steps_per_epoch)
        self.steps = steps(graph, space, self.method, self.settings, self.devices)
        self.search = self.devices.replicate(self.steps.start(params, self.keys[ARCHITECTURE]))
        self.nodes: Nodes = None
        self.programs: set[Nodes] = set()

    def place(self, batch: Any) -> Any:
        """The numbers that locate a batch, for the compiled steps."""
        raise TypeError(f"{type(self).__name__} must define place")

    def rate(self) -> float:
        """The learning rate of this epoch."""
        return self.settings.lr

    def begin_epoch(self) -> None:
        if self.step == 0:
            method = self.method.begin_epoch(self.search.method, self.epoch)
            self.search = self.search._replace(method=self.devices.replicate(method))
            self.nodes = self.nodes_of_program(self.method.is_active(self.search.method))
            self.programs.add(self.nodes)
        self.frozen = self.method.is_frozen(self.search.method)

    def nodes_of_program(self, is_active: Any) -> Nodes:
        """The nodes that the steps of this epoch compute; None: all. Others have no paths, and cannot get any."""
        return None

    def train_step(self, batch: Any) -> None:
        place = self.place(batch)
        if self.settings.levels == 1:
            probes = not self.frozen and self.method.needs_zeroed_paths(self.step)
            options = {"probes": probes, "moves": not self.frozen, "nodes": self.nodes}
            self.search = self.steps.joint(self.search, self.data, place, **options)
            if not self.frozen:
                self._after_step()
            return
        if not self.frozen:
            probes = self.method.needs_zeroed_paths(self.step)
            self.search = self.steps.architecture(self.search, self.data, place, probes=probes, nodes=self.nodes)
            self._after_step()
        self.search = self.steps.weights(self.search, self.data, place, nodes=self.nodes)

    def _after_step(self) -> None:
        """Update what needs the host after an architecture step."""
        changed = self.method.after_step(self.search.method)
        if changed is not self.search.method:
            self.search = self.search._replace(method=self.devices.replicate(changed))

    def end_epoch(self) -> dict[str, Any]:
        trained, state = self.means(), self.search.method
        variables = jax.tree.leaves(self.method.variables(state))
        largest = max(float(abs(np.asarray(v)).max()) for v in variables)
        self.check_finite("train", trained[0], largest)
        point = on_host(self.method.point(state))
        genotype = discrete(self.space, self.method.genotype(state), point)
        weights, masks = on_host(self.method.weights(self.method.variables(state), state)), self.space.masks(genotype)
        flags = on_host(self.method.is_active(state))
        active = {cell: tuple(found.tolist()) for cell, found in flags.items()}
        valid = restricted = self.measured(weights, active)
        if active != masks or not all(np.array_equal(weights[cell], p) for cell, p in point.items()):
            restricted = self.measured(point, masks)  # else both are the same network
        self.check_finite("valid", valid[0], largest)
        row = self.epoch_row(self.rate(), trained, valid, restricted, genotype, point)
        self.points[-1] = {cell: p.tolist() for cell, p in point.items()}  # a checkpoint keeps them as JSON
        return row | self.method.log(state) | {"programs": len(self.programs)}

    def means(self) -> tuple[float, float]:
        """Mean loss and measure of the weight steps since the last call."""
        raise TypeError(f"{type(self).__name__} must define means")

    def is_finite(self) -> bool:
        return bool(np.isfinite(np.asarray(self.search.sums)[0])) and all_finite(self.search.params)

    def take_sums(self) -> list[float]:
        """The sums of the weight steps since the last call."""
        sums = np.asarray(self.search.sums, np.float64).tolist()
        self.search = self.search._replace(sums=self.devices.replicate(np.zeros_like(self.search.sums)))
        return sums

    def measured(self, weights: Any, active: Masks) -> tuple[float, float]:
        """Compute loss and measure of the supernet on the validation data, with these paths alone."""
        raise TypeError(f"{type(self).__name__} must define measured")

    def parameter_count(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(self.search.params))

    def finish(self) -> None:
        self.points = [{cell: np.array(p) for cell, p in point.items()} for point in self.points]
        super().finish()

    def state(self) -> SearchState:
        return self.search

    def plain(self) -> dict[str, Any]:
        # a search resumed within an epoch goes on with its program: another one would round differently
        return {"points": self.points, "nodes": self.nodes, "programs": list(self.programs)}

    def restore(self, state: SearchState, plain: dict[str, Any]) -> None:
        self.search, self.points, self.nodes = state, plain["points"], _hashable(plain["nodes"])
        self.programs = set(map(_hashable, plain["programs"]))


def _hashable(nodes: list[int] | None) -> Nodes:
    return None if nodes is None else tuple(nodes)


def on_host(weights: Any) -> dict[str, np.ndarray]:
    return {cell: np.asarray(w) for cell, w in weights.items()}
