"""GSparsity in JAX: group sparsity on the weights of the operations themselves, by ProxSGD. Equations: `methods.gsparsity`.

The parameters of a group, one operation on one edge in all cells of a type, and its gates are one vector, so that the prox acts
on one leaf for each group. Supernets in JAX have no running statistics: all evaluations normalise each batch by its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

import proxopt_jax

from ...bilevel.jax import gradients
from ...data import image_sets
from ...data import jax as images
from ...data.jax import EVALUATED, Passes, Pixels, epoch_order, mean_measures
from ...engine import report, results
from ...engine.jax.devices import Devices, first_process
from ...engine.jax.run import BATCH, EVALUATION, NETWORK, ORDER, Run, all_finite, launch
from ...nets.jax import cnn, image_networks
from ...space import spaces
from ...space.genotype import AnyGenotype, cell_name
from ...space.spaces import Masks
from ..group_sparsity import (
    GatedGroup,
    Key,
    droppable,
    genotype_of,
    search_or_bisect,
    shares,
    strength_of_group,
)
from ..settings.gsparsity import GSparsitySettings

GATED = ("skip_connect", "max_pool_3x3", "avg_pool_3x3", "noise")  # operations without parameters, and strided skip connections


class SearchState(NamedTuple):
    """All arrays of a search. groups: by name the weights and gates of a group. rest: all other parameters."""

    groups: dict[str, Array]
    rest: dict[str, Array]
    optimizer: Any
    is_active: dict[str, Array]
    sums: Array


class OperationGroups:
    """The groups of a supernet, and steps on them. Everything here is a pure function of a `SearchState`."""

    def __init__(self, net: Any, settings: GSparsitySettings):
        self.settings, self.net, self.space = settings, net, net.space
        self.cells = net.space.layout.cells
        self.graph, params = nnx.split(net, nnx.Param)
        self.count = {cell: net.kinds.count(cell) for cell in self.cells}
        vectors, rest = cnn.split_paths(net, params)
        self.names: dict[Key, str] = {}
        self.sizes: dict[Key, tuple[int, int]] = {}  # of the weights, and of the gates
        groups = {}
        for cell in self.cells:
            for path in (p for p in net.space.paths(cell) if p.operation != "none"):
                vector = vectors.get((cell, path), jnp.zeros(0, jnp.float32))
                gates = self.count[cell] if path.operation in GATED else 0
                name = f"{cell} {path.source}-{path.node} {path.operation}"
                self.names[cell, path], self.sizes[cell, path] = name, (vector.size, gates)
                groups[name] = jnp.concatenate([vector, jnp.ones(gates, vector.dtype)])
        self.initial = {key: float(jnp.linalg.norm(groups[name])) for key, name in self.names.items()}
        penalties = [(name, GatedGroup(self.strength(key), self.sizes[key][1])) for key, name in self.names.items()]
        self.penalty = [*((f"groups/{name}", penalty) for name, penalty in penalties), ("*", None)]
        self.tau = None if settings.tau == "direct" else settings.tau
        self.rest_names = {"/".join(name): name for name in rest}
        self.first = groups, {"/".join(name): leaf for name, leaf in rest.items()}

    def strength(self, key: Key) -> float:
        """mu_k of a group."""
        weights, gates = self.sizes[key]
        if self.settings.gates == "free" and gates and not weights:
            return 0.0
        return strength_of_group(self.settings.mu, self.settings.weighting, weights + gates, self.initial[key])

    def optimizer(self, lr: Any) -> optax.GradientTransformation:
        return proxopt_jax.prox_sgd(lambda count: lr, self.penalty, 1 - self.settings.momentum, self.tau)

    def start(self) -> SearchState:
        groups, rest = self.first
        state = self.optimizer(self.settings.lr).init({"groups": groups, "rest": rest})
        flags = {cell: jnp.array([(cell, path) in self.names for path in self.space.paths(cell)]) for cell in self.cells}
        return SearchState(groups, rest, state, flags, jnp.zeros(3, jnp.float32))

    def logits(self, state: SearchState, pixels: Array, key: Array, flags: Mapping[str, Any]) -> Array:
        """The logits of the supernet with the paths of `flags`; others are not computed."""
        vectors = {k: state.groups[name][: self.sizes[k][0]] for k, name in self.names.items() if self.sizes[k][0]}
        rest = {name: state.rest[joined] for joined, name in self.rest_names.items()}
        net = nnx.merge(self.graph, cnn.join_paths(self.net, vectors, rest))
        weights = {}
        for cell in self.cells:
            columns = [
                state.groups[self.names[cell, path]][self.sizes[cell, path][0] :]
                if (cell, path) in self.names and self.sizes[cell, path][1]
                else jnp.ones(self.count[cell])
                for path in self.space.paths(cell)
            ]
            weights[cell] = jnp.stack(columns, 1)
        return net(pixels, weights, flags, key)

    def loss(self, state: SearchState, batch: Any, flags: Mapping[str, Array], smoothing: float = 0.0) -> tuple[Array, Array]:
        """The loss of a batch (images, labels, key), and the sums of loss, correct answers and images."""
        pixels, labels, key = batch
        return images.label_loss(self.logits(state, pixels, key, flags), labels, smoothing)

    def step(self, state: SearchState, batch: Any, lr: Any) -> SearchState:
        """Take a step of ProxSGD."""
        params = {"groups": state.groups, "rest": state.rest}

        def loss(params: Any) -> tuple[Array, Array]:
            return self.loss(state._replace(**params), batch, state.is_active, self.settings.smoothing)

        grads, sums = jax.grad(loss, has_aux=True)(params)
        grads, _ = gradients.clipped(grads, self.settings.clip)
        decay = self.settings.weight_decay
        grads["rest"] = jax.tree.map(lambda g, w: g + decay * w, grads["rest"], state.rest)
        updates, optimizer = self.optimizer(lr).update(grads, state.optimizer, params)
        moved = optax.apply_updates(params, updates)
        return state._replace(**moved, optimizer=optimizer, sums=state.sums + sums)

    def batch_step(
        self, devices: Devices, state: SearchState, pixels: Pixels, order: Array, number: Array, lr: Array, key: Array
    ) -> SearchState:
        """Take a step on batch `number` of a pass. order, key: of the pass."""
        crops, noise = jax.random.split(jax.random.fold_in(key, number))
        padding = image_sets.crop_padding(self.settings.pixels, self.settings.augment)
        found = images.augmented(pixels, order, number, self.settings.batch, crops, padding)
        return self.step(state, (*devices.split(found), noise), lr)

    def evaluated(self, devices: Devices, state: SearchState, pixels: Pixels, part: Any, key: Array, flags: Any) -> Array:
        """The sums of loss, correct answers and images of a part of the images, normalised by its own statistics."""
        batch = devices.split((images.normalised(pixels, part[0]), part[1]))
        return self.loss(state, (*batch, key), flags)[1]

    def at_prox_point(self, state: SearchState) -> SearchState:
        """The state with the prox point for parameters, which is exactly sparse."""
        return state._replace(**proxopt_jax.prox_point(state.optimizer, {"groups": state.groups, "rest": state.rest}))

    # -- on the host --------------------------------------------------------------------------

    def norms(self, state: SearchState) -> dict[Key, float]:
        """The norm of each group."""
        return {key: float(np.linalg.norm(np.asarray(state.groups[name]))) for key, name in self.names.items()}

    def drop_zeroed(self, state: SearchState, points: Mapping[Key, float]) -> SearchState:
        """Set groups to 0 that are 0 at the prox point and have decayed below `vanish`; they are not computed any more.

        A cell that would lose its last connection keeps all its groups. points: the norms at the prox point.
        """
        small = {key for key, norm in self.norms(state).items() if points[key] == 0 and norm < self.settings.vanish}
        return self.without(state, droppable(self.names, small, self.space.kind))

    def without(self, state: SearchState, keys: Sequence[Key]) -> SearchState:
        """The state in which these groups are 0, with what the optimizer keeps of them, and are not computed."""
        flags = {cell: np.array(found) for cell, found in state.is_active.items()}
        for cell, path in keys:
            flags[cell][self.space.paths(cell).index(path)] = False
        clear = lambda groups: {**groups, **{self.names[key]: jnp.zeros_like(groups[self.names[key]]) for key in keys}}
        # momentum would make them nonzero again
        cleared = lambda part: {**part, "groups": clear(part["groups"])} if _is_params(part) else part
        optimizer = jax.tree.map(cleared, state.optimizer, is_leaf=_is_params)
        return state._replace(groups=clear(state.groups), optimizer=optimizer, is_active=flags)


def _is_params(part: Any) -> bool:
    """Whether a part of the state of the optimizer has the form of the parameters."""
    return isinstance(part, dict) and part.keys() == {"groups", "rest"}


class GSparsitySearch(Run):
    """A search by GSparsity with one seed."""

    kind, table, command = "search", "search.csv", "nas_cifar10"
    settings: GSparsitySettings
    size: dict[str, int] | None = None

    def __init__(self, settings: GSparsitySettings, seed: int, out: Path, devices: Devices) -> None:
        super().__init__(settings, seed, out, devices)
        devices.check_divisible("batch", settings.batch)
        dataset = devices.first_then_others(lambda: image_sets.read_images(settings.data, settings.data_dir, settings.pixels))
        self.dataset = dataset
        parts = image_sets.training_parts(dataset, settings.images, settings.valid_images, settings.hold_out)
        self.train, self.valid = (devices.replicate(Pixels.of(part, dataset.mean, dataset.std)) for part in parts)
        if not 0 < settings.batch <= len(self.train.labels):
            raise ValueError(f"batch must lie in [1, {len(self.train.labels)}], the number of images, got {settings.batch}")
        self.space = spaces.get_space(settings.space)
        rngs = nnx.Rngs(self.keys[NETWORK])
        net = image_networks.supernet(self.space, settings, dataset.classes, len(dataset.mean), rngs)
        self.passes, self.drawn = Passes(len(self.train.labels), settings.batch, settings.epoch_steps), -1
        self.operations = OperationGroups(net, settings)
        self.search = devices.replicate(self.operations.start())
        self.order = jax.jit(epoch_order, static_argnums=1, out_shardings=devices.replicated)
        self.weights = jax.jit(
            partial(self.operations.batch_step, devices), donate_argnames="state", out_shardings=devices.replicated
        )
        self.evaluation = jax.jit(partial(self.operations.evaluated, devices))

    def title(self) -> str:
        return f"gsparsity, {super().title()}"

    def data_text(self) -> str:
        return image_sets.describe_training(self.dataset, self.train, self.valid, self.settings.hold_out)

    def parameter_count(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves((self.search.groups, self.search.rest)))

    def __len__(self) -> int:
        return len(self.passes)

    def batches(self) -> Iterator[int]:
        return iter(range(self.step, len(self)))

    def place(self, batch: int) -> tuple[Any, ...]:
        """The order of the pass that has this batch, its number there, the learning rate, and the key of the pass."""
        through, number = self.passes.place(self.epoch, batch)
        if through != self.drawn:
            self.key, of_order = (jax.random.fold_in(self.keys[stream], through) for stream in (BATCH, ORDER))
            self.data_order, self.drawn = self.order(of_order, len(self.train.labels)), through
        return self.data_order, np.int32(number), np.float32(self.settings.rate(self.epoch)), self.key

    def train_step(self, batch: int) -> None:
        self.search = self.weights(self.search, self.train, *self.place(batch))

    def end_epoch(self) -> dict[str, Any]:
        operations = self.operations
        loss, correct, count = np.asarray(self.search.sums, np.float64).tolist()
        self.check_finite("train", loss / count)
        self.search = self.search._replace(sums=self.devices.replicate(np.zeros(3, np.float32)))
        at_point = operations.at_prox_point(self.search)
        norms = operations.norms(at_point)
        genotype, point = self.genotype_at(norms), shares(self.space, norms, operations.initial)
        sizes = {key: sum(operations.sizes[key]) for key in norms}
        regulariser = sum(n / math.sqrt(sizes[key]) for key, n in operations.norms(self.search).items())
        valid_loss, valid_accuracy = self.measured(self.search, self.search.is_active)
        self.check_finite("valid", valid_loss)
        restricted = (float("nan"), float("nan"))
        if all(genotype.output_nodes(cell) for cell in operations.cells):
            restricted = self.measured(at_point, self.space.masks(genotype))
        if self.settings.vanish:
            self.search = self.devices.replicate(operations.drop_zeroed(self.search, norms))
        if self.devices.first:
            results.save_epoch(self.out, self.epoch, genotype)
        return {
            "lr": self.settings.rate(self.epoch),
            "train_loss": loss / count,
            "train_accuracy": correct / count,
            "valid_loss": valid_loss,
            "valid_accuracy": valid_accuracy,
            "restricted_loss": restricted[0],
            "restricted_accuracy": restricted[1],
            "regulariser": regulariser,
            **report.architecture_columns(genotype, point),
            "vanished": self._vanished(),
        }

    def is_finite(self) -> bool:
        return bool(np.isfinite(np.asarray(self.search.sums)[0])) and all_finite((self.search.groups, self.search.rest))

    def _vanished(self) -> int:
        """The number of groups that have been dropped."""
        active = sum(int(np.asarray(flags).sum()) for flags in self.search.is_active.values())
        return len(self.operations.names) - active

    def measured(self, state: SearchState, active: Masks) -> tuple[float, float]:
        """Compute loss and accuracy on the validation images with these paths alone."""
        flags = self.devices.replicate({cell: np.array(mask, bool) for cell, mask in active.items()})
        key = self.keys[EVALUATION]
        return mean_measures(self.valid, lambda part: self.evaluation(state, self.valid, part, key, flags))

    def genotype_at(self, norms: Mapping[Key, float]) -> Any:
        """The genotype of these norms at the prox point, without dead ends; in NAS-Bench-201 with one operation on each edge."""
        found = genotype_of(norms, self.settings.cut, self.space.kind)
        return spaces.discrete(self.space, found, shares(self.space, norms, self.operations.initial))

    def cut_changes(self, genotype: AnyGenotype) -> float:
        """The largest change of a logit of a validation batch when zero paths are removed, at the prox point."""
        state = self.operations.at_prox_point(self.search)
        pixels = images.normalised(self.valid, self.valid.images[:EVALUATED])
        compute, logits = jax.jit(self.operations.logits), []
        for masks in ({cell: [True] * len(self.space.paths(cell)) for cell in self.operations.cells}, self.space.masks(genotype)):
            flags = {cell: np.array(mask, bool) for cell, mask in masks.items()}
            logits.append(np.asarray(compute(state, pixels, self.keys[EVALUATION], flags)))
        return float(np.abs(logits[0] - logits[1]).max())

    def finish(self) -> None:
        norms = self.operations.norms(self.operations.at_prox_point(self.search))
        genotype = self.genotype_at(norms)
        empty = [cell for cell in self.operations.cells if not genotype.output_nodes(cell)]
        if empty:
            zero = f"all operations of the {cell_name(empty[0])} are zero"
            print(f"{zero}: a mu smaller than {self.settings.mu:g} keeps some")
            return
        if self.devices.world == 1:
            print(f"the cut changes logits by {self.cut_changes(genotype):g}")
        point = shares(self.space, norms, self.operations.initial)
        details = report.Details(size=image_networks.genotype_size, data_dir=self.settings.data_dir)
        self.size = results.write_report(self.out, "gsparsity", self.rows, point, self.space, self.identity(), details)

    def result(self) -> dict[str, Any]:
        return {**super().result(), **(self.size or {})}

    def identity(self) -> dict[str, Any]:
        return {"method": "gsparsity", **super().identity(), **image_sets.identity(self.dataset)}

    def state(self) -> SearchState:
        return self.search

    def restore(self, state: SearchState, plain: dict[str, Any]) -> None:
        self.search = state


def search(settings: GSparsitySettings, seed: int, out: Path) -> dict[str, Any]:
    """Search with one mu, or find the mu with the wanted size by bisection; return the last row."""
    run = lambda own, folder: launch(partial(GSparsitySearch, own, seed, folder), own, folder)
    description = {"command": GSparsitySearch.command, "framework": "jax", "method": "gsparsity", "seed": seed}
    return search_or_bisect(settings, out, run, image_networks.genotype_size, first_process, description)
