"""Searches of NAS-Bench-201 cells with several seeds as one program.

    rows = sweep(settings, seeds=(0, 1, 2, 3), out=Path("runs/sweep"), method=SparseSupernet)

Every seed has its own initial weights and its own order of the images, as in a single search with this seed, and the result is
the same but for rounding. The seeds are an axis of all arrays (`jax.vmap`), an epoch is a `jax.lax.scan` over its steps, and
the images lie on the devices once. Where there are several devices, each computes an equal part of the seeds.

All seeds compute all paths, with weights of 0 where a path is zeroed: under `jax.vmap` both branches of a condition are computed,
so that leaving paths out, as single searches in PyTorch do, would save nothing.

Writes to `out`: settings.json, a checkpoint after each epoch, sweep.csv with the means over the seeds after each epoch, and for
each seed a folder seed-N with search.csv, genotype.json, result.json and the pictures of a single search.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ...data import image_sets
from ...data.jax import EVALUATED, Passes, Pixels, epoch_order
from ...engine.jax.devices import Devices
from ...engine.jax.run import ARCHITECTURE, BATCH, EVALUATION, NETWORK, ORDER, Run, launch
from ...engine.log import Log
from ...nets.jax import image_networks
from ...space import spaces
from ...space.files import write_text
from ...space.genotype import CellGenotype
from ...space.spaces import discrete
from ..outcome import Outcome
from ..settings import CifarSearchSettings
from .method import Method
from .search import on_host
from .search_cifar import rate, search_parts
from .steps import TRAIN, VALID, CifarData, CifarSteps, Place, SearchState

SEEDS, SAME = PartitionSpec("data"), PartitionSpec()  # an axis of seeds, divided over the devices; the same on each device


class WholeBatch:
    """In place of `Devices` for steps whose batch is not divided over devices."""

    replicated = None

    def split(self, tree: Any, axis: int = 0) -> Any:
        return tree


class SeedOutcome(Outcome):
    """The rows and files of one of the seeds."""

    framework = "jax"
    genotype_size = staticmethod(image_networks.genotype_size)

    def __init__(self, name: str, space: spaces.Space, settings: Any, seed: int, out: Path, devices: Devices) -> None:
        super().__init__(settings, seed, out, devices)
        self.name, self.space = name, space
        self.points: list[dict[str, Any]] = []


class Sweep(Run):
    """Searches by one method with several seeds. A step of the loop is an epoch of all of them."""

    kind, table, command = "sweep", "sweep.csv", "nas_bench_201"
    settings: CifarSearchSettings

    def __init__(
        self, make: type[Method], settings: CifarSearchSettings, seeds: Sequence[int], out: Path, devices: Devices
    ) -> None:
        super().__init__(settings, seeds[0], out, devices)
        self.seeds = tuple(seeds)
        self.mesh = Mesh(devices.mesh.devices.flatten()[: _parts(len(seeds), devices.count)], ("data",))
        self.space = spaces.get_space(settings.space)
        self.dataset = image_sets.read_images(settings.data, settings.data_dir, settings.pixels)
        parts = search_parts(self.dataset, settings)
        self.pixels = self._put([Pixels.of(part, self.dataset.mean, self.dataset.std) for part in parts], SAME)
        self.passes = Passes(len(parts[0].labels), settings.batch, settings.epoch_steps)
        self.method = make(self.space, settings, len(self.passes))
        self.keys_of = [[jax.random.fold_in(jax.random.key(seed), stream) for stream in range(5)] for seed in self.seeds]
        nets = [self._network(keys[NETWORK]) for keys in self.keys_of]
        self.steps = CifarSteps(nets[0][0], self.space, self.method, settings, WholeBatch())  # type: ignore[arg-type]
        states = [self.steps.start(params, keys[ARCHITECTURE]) for (_, params), keys in zip(nets, self.keys_of)]
        self.search: SearchState = self._put(_stacked(states), SEEDS)
        key_of = lambda stream: self._put(jnp.stack([keys[stream] for keys in self.keys_of]), SEEDS)
        self.order_keys, self.batch_keys, self.evaluation_keys = map(key_of, (ORDER, BATCH, EVALUATION))
        self.outcomes = [
            SeedOutcome(make.name, self.space, replace(settings, seeds=(seed,)), seed, out / f"seed-{seed}", devices)
            for seed in self.seeds
        ]
        # of the state, the images, the keys, and the numbers of the steps; of the weights, images and flags of an evaluation
        self.epoch_program = self._compiled(self._epoch, (SEEDS, SAME, SEEDS, SEEDS, SAME, SAME), donate=True)
        self.evaluation = self._compiled(self._evaluated, (SEEDS, SEEDS, SAME, SEEDS, SEEDS))

    def _network(self, key: Array) -> tuple[Any, Any]:
        """Graph and initial parameters of a seed."""
        net = image_networks.supernet(self.space, self.settings, self.dataset.classes, len(self.dataset.mean), nnx.Rngs(key))
        return nnx.split(net, nnx.Param)

    def _put(self, tree: Any, spec: PartitionSpec) -> Any:
        return jax.device_put(tree, NamedSharding(self.mesh, spec))

    def _compiled(self, function: Any, specs: tuple[PartitionSpec, ...], donate: bool = False) -> Any:
        """The function of arrays with an axis of seeds, each device computing its part of them."""
        own = jax.shard_map(function, mesh=self.mesh, in_specs=specs, out_specs=SEEDS, check_vma=False)
        return jax.jit(own, donate_argnums=(0,) if donate else ())

    # -- pure functions -----------------------------------------------------------------------

    def _epoch(self, state: SearchState, pixels: Any, orders: Array, keys: Array, places: Array, lr: Array) -> SearchState:
        """The steps of an epoch of all seeds. places: of each step the pass, and the number of the batch in it, (steps, 2)."""
        first = places[0, 0]
        counts = [len(part.labels) for part in pixels]

        def orders_of(key: Array, number: Array) -> list[Array]:
            key = jax.random.fold_in(key, first + number)
            return [epoch_order(jax.random.fold_in(key, stream), n) for stream, n in zip((TRAIN, VALID), counts)]

        steps, in_pass = len(self.passes), self.passes.in_pass
        reached = (steps - 2) // in_pass + 2 if steps % in_pass else steps // in_pass  # passes with batches of an epoch
        drawn = jax.vmap(lambda key: jax.vmap(partial(orders_of, key))(jnp.arange(reached)))(orders)

        def step(state: SearchState, place: Array) -> tuple[SearchState, None]:
            one = lambda state, drawn, key: self._seed_step(state, pixels, drawn, key, place, first, lr)
            return jax.vmap(one)(state, drawn, keys), None

        return jax.lax.scan(step, state, places)[0]

    def _seed_step(
        self, state: SearchState, pixels: Any, drawn: list[Array], key: Array, place: Array, first: Array, lr: Array
    ) -> SearchState:
        """A step of one seed."""
        data = CifarData(*pixels, *(orders[place[0] - first] for orders in drawn))
        probes = self.method.needs_zeroed_paths(0)
        train, valid = self.steps.batches(state, data, Place(place[0], place[1], lr, key))
        if self.settings.levels == 1:
            return self.steps.joint_step(state, train, lr, probes)
        return self.steps.weight_step(self.steps.architecture_step(state, train, valid, lr, probes), train, lr)

    def _evaluated(self, params: Any, weights: Any, part: Any, flags: Any, keys: Array) -> Array:
        """The sums of loss, correct answers and images of a part of the images, for each seed."""
        pixels, *one = part
        of_seed = lambda params, weights, flags, key: self.steps.evaluated(params, weights, (pixels, one, key), flags)
        return jax.vmap(of_seed)(params, weights, flags, keys)

    # -- the loop -----------------------------------------------------------------------------

    def __len__(self) -> int:
        return 1

    def batches(self) -> Iterator[int]:
        return iter(range(self.step, 1))

    def begin_epoch(self) -> None:
        if self.step:  # resumed between the steps of an epoch and its evaluation
            return
        begun = [self.method.begin_epoch(state.method, self.epoch) for state in self._states()]
        self.search = self.search._replace(method=self._put(_stacked(begun), SEEDS))

    def train_step(self, batch: int) -> None:
        places = np.array([self.passes.place(self.epoch, step) for step in range(len(self.passes))], np.int32)
        lr = np.float32(rate(self.settings, self.epoch))
        self.search = self.epoch_program(self.search, self.pixels, self.order_keys, self.batch_keys, places, lr)

    def end_epoch(self) -> dict[str, Any]:
        states = self._states()
        sums = np.asarray(self.search.sums, np.float64).tolist()
        self.search = self.search._replace(sums=self._put(np.zeros_like(self.search.sums), SEEDS))
        points = [on_host(self.method.point(state.method)) for state in states]
        found = [discrete(self.space, self.method.genotype(s.method), p) for s, p in zip(states, points)]
        at_search = [on_host(self.method.weights(self.method.variables(s.method), s.method)) for s in states]
        valid = self.measured(at_search, [on_host(self.method.is_active(s.method)) for s in states])
        masks = [{cell: np.array(mask) for cell, mask in self.space.masks(genotype).items()} for genotype in found]
        restricted = self.measured(points, masks)
        for i, outcome in enumerate(self.outcomes):
            outcome.epoch = self.epoch
            loss, correct, count = sums[i]
            outcome.check_finite("train", loss / count)
            outcome.check_finite("valid", valid[i][0])
            lr = rate(self.settings, self.epoch)
            row = outcome.epoch_row(lr, (loss / count, correct / count), valid[i], restricted[i], found[i], points[i])
            outcome.points[-1] = {cell: p.tolist() for cell, p in points[i].items()}  # a checkpoint keeps them as JSON
            row |= self.method.log(states[i].method)
            outcome.rows.append({"epoch": self.epoch + 1, "seconds": round(self.seconds, 1), **row})
            if self.processes.first:
                Log(outcome.out, outcome.table).write(outcome.rows)
        last = [outcome.rows[-1] for outcome in self.outcomes]
        numbers = [name for name, value in last[0].items() if not isinstance(value, str) and name not in ("epoch", "seconds")]
        return {name: float(np.mean([row[name] for row in last])) for name in numbers}

    def measured(self, weights: Sequence[Any], active: Sequence[Any]) -> list[tuple[float, float]]:
        """Loss and accuracy of each seed on the validation images, or the first `valid_images` of them, with these paths."""
        valid = self.pixels[1].first(self.settings.valid_images)
        given, flags = (self._put(_stacked(trees), SEEDS) for trees in (weights, active))
        total = np.zeros((len(self.seeds), 3))
        for start in range(0, len(valid.labels), EVALUATED):
            part = valid, valid.images[start : start + EVALUATED], valid.labels[start : start + EVALUATED]
            total += np.asarray(self.evaluation(self.search.params, given, part, flags, self.evaluation_keys), np.float64)
        return [(loss / count, correct / count) for loss, correct, count in total.tolist()]

    def _states(self) -> list[SearchState]:
        """The state of each seed without the network, on the host."""
        arrays = jax.device_get(self.search._replace(params=(), momentum=()))
        return [jax.tree.map(lambda x: jnp.asarray(x[i]), arrays) for i in range(len(self.seeds))]  # noqa: B023

    def title(self) -> str:
        return f"{self.method.name}, {super().title()}, seeds {', '.join(map(str, self.seeds))} in one program"

    def data_text(self) -> str:
        text = image_sets.describe_search(self.dataset, *self.pixels, self.settings.levels)
        return f"{text}; a step of the progress bar is an epoch of {len(self.passes)} steps of all seeds"

    def parameter_count(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(self.search.params)) // len(self.seeds)

    def identity(self) -> dict[str, Any]:
        own = {"method": self.method.name, "sweep": self.seeds, **image_sets.identity(self.dataset)}
        return {**super().identity(), **own, "devices": self.mesh.devices.size}

    def result(self) -> dict[str, Any]:
        return {**super().result(), "results": [{"seed": o.seed, **o.result()} for o in self.outcomes]}

    def finish(self) -> None:
        for outcome in self.outcomes:
            outcome.points = [{cell: np.array(p) for cell, p in point.items()} for point in outcome.points]
            outcome.finish()
            write_text(outcome.out / "result.json", json.dumps(outcome.result(), indent=1) + "\n")

    def state(self) -> SearchState:
        return self.search

    def plain(self) -> dict[str, Any]:
        return {"rows": [outcome.rows for outcome in self.outcomes], "points": [outcome.points for outcome in self.outcomes]}

    def restore(self, state: SearchState, plain: dict[str, Any]) -> None:
        self.search = state
        for outcome, rows, points in zip(self.outcomes, plain["rows"], plain["points"]):
            outcome.rows, outcome.points = rows, points


def sweep(settings: CifarSearchSettings, seeds: Sequence[int], out: Path, method: type[Method]) -> list[dict[str, Any]]:
    """Search with all seeds in one program, or continue a sweep in `out` if `settings.resume` is set.

    Args:
      settings: of a search by this method, in a space of NAS-Bench-201.
      method: the search method; `methods.jax.registry` has them by name.

    Returns:
      The row of the result of each seed, as that of a single search: with the columns seed and architecture among others.

    Raises:
      ValueError: settings or seeds outside their domain, or a checkpoint of other ones; a search that diverges.
      FileExistsError, Interrupted: as by `engine.jax.run.launch`.
    """
    refuse_others(settings, seeds, method)
    found = launch(partial(Sweep, method, settings, tuple(seeds), Path(out)), settings, Path(out))
    return list(found["results"])


def refuse_others(settings: CifarSearchSettings, seeds: Sequence[int], method: type[Method]) -> None:
    """Raise ValueError for what is not a sweep."""
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be different numbers, at least one, got {list(seeds)}")
    if spaces.get_space(settings.space).kind is not CellGenotype:
        raise ValueError(f"space must be one of NAS-Bench-201 for a sweep, got {settings.space!r}")
    if method.name == "ista":
        raise ValueError("method must not be ista for a sweep, as its codes are recovered on the host")
    if getattr(settings, "probe_every", 1) > 1:
        raise ValueError(f"probe_every must be 0 or 1 for a sweep, got {settings.probe_every}")  # type: ignore[attr-defined]
    if not getattr(settings, "guard", True):
        raise ValueError("guard must be set for a sweep, whose steps do not wait for the host, got guard=False")
    if jax.process_count() > 1:
        raise ValueError(f"a sweep runs in one process, got {jax.process_count()}")


def _parts(seeds: int, devices: int) -> int:
    """The largest number of devices that divides the seeds evenly."""
    return max(n for n in range(1, devices + 1) if seeds % n == 0)


def _stacked(trees: Sequence[Any]) -> Any:
    """Trees of arrays as one, with an axis of trees in front."""
    return jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *trees)
