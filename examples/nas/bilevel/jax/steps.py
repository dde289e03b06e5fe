"""The steps of a search as compiled functions of a state: architecture on a validation batch and network weights on a training
batch, or both on one batch.

Data stay on the devices, and a step receives the place of its batch in them, so that nothing passes between host and devices but
numbers. Paths of weight 0 are left out of weight steps, and of architecture steps that do not probe them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from ...data import image_sets
from ...data import jax as images
from ...data.jax import Pixels
from ...engine.jax.devices import Devices
from ...nets.jax.rnn import into_computed_nodes
from ...nets.recurrent import CELL
from ...space.spaces import Space, Weights
from ..settings import BilevelSettings
from . import gradients
from .method import Method

TRAIN, VALID = 1, 2  # numbers of the random streams of the two parts of the data
Nodes = tuple[int, ...] | None


class SearchState(NamedTuple):
    """All arrays that steps change.

    params: network weights. momentum: of SGD. method: the architecture. sums: of loss, correct answers and samples of the weight
    steps since the last epoch. own: what the data need from step to step, such as hidden states.
    """

    params: Any
    momentum: Any
    method: Any
    sums: Array
    own: Any = ()


class Place(NamedTuple):
    """Where a step is in the run: numbers, none of which changes the compiled program.

    epoch, number: of its batch; of images the pass through them, and the number in this pass.
    """

    epoch: Any
    number: Any
    lr: Any
    key: Any


class BilevelSteps:
    """Architecture steps by a method, and weight steps by SGD. Subclasses define batches and losses.

    Args:
      graph: the supernet without its parameters, from `nnx.split`.
      devices: those that share each batch.
    """

    clips_inner_step = False  # whether the gradient of the step to w' (second order) is clipped, as those of weight steps
    momentum = 0.0

    def __init__(self, graph: Any, space: Space, method: Method, settings: BilevelSettings, devices: Devices) -> None:
        self.graph, self.space, self.method, self.settings, self.devices = graph, space, method, settings, devices
        self.sgd = optax.chain(optax.add_decayed_weights(settings.weight_decay), optax.trace(self.momentum))
        # split batches must not split the next state: another sharding would be another program, which hosts could not read
        compiled = partial(jax.jit, donate_argnames="state", out_shardings=devices.replicated)
        self.architecture = compiled(self._architecture, static_argnames=("probes", "nodes"))
        self.weights = compiled(self._weights, static_argnames="nodes")
        self.joint = compiled(self._joint, static_argnames=("probes", "moves", "nodes"))

    # -- defined by subclasses ----------------------------------------------------------------

    def batches(self, state: SearchState, data: Any, place: Place) -> tuple[Any, Any]:
        """The training batch and the validation batch of a step."""
        raise TypeError(f"{type(self).__name__} must define batches")

    def loss(self, net: Any, weights: Weights, batch: Any, is_active: Weights | None, nodes: Nodes) -> tuple[Array, Any]:
        """The loss of a batch, and what `after_architecture` and `after_weights` need of its computation.

        is_active: flags of the paths that count; None: all. nodes: as in `weight_step`.
        """
        raise TypeError(f"{type(self).__name__} must define loss")

    def training_loss(self, net: Any, weights: Weights, batch: Any, is_active: Weights, nodes: Nodes) -> tuple[Array, Any]:
        """The loss of a weight step, if it is another."""
        return self.loss(net, weights, batch, is_active, nodes)

    def rate(self, batch: Any, lr: Array) -> Array:
        """The learning rate of a step with this training batch."""
        return lr

    def after_architecture(self, state: SearchState, found: Any) -> SearchState:
        """The state after an architecture step. found: the second result of `loss` on the validation batch."""
        return state

    def after_weights(self, state: SearchState, found: Any) -> SearchState:
        """The state after a weight step. found: the second result of `training_loss`."""
        return state

    def probed(self, is_active: Weights) -> Weights | None:
        """Flags of the paths whose gradient an architecture step computes if it probes those of zero weight; None: all."""
        return None

    def clipped(self, grads: Any) -> Any:
        """Clip the architecture gradient; not by default."""
        return grads

    # -- pure functions of given batches ------------------------------------------------------

    def architecture_step(
        self, state: SearchState, train: Any, valid: Any, lr: Array, probes: bool = True, nodes: Nodes = None
    ) -> SearchState:
        """Take an architecture step.

        Args:
          probes: whether paths of zero weight get a gradient.
          nodes: as in `weight_step`.
        """
        s, method = self.settings, self.method
        is_active = method.is_active(state.method)
        flags = self.probed(is_active) if probes else is_active

        def on(batch: Any) -> Callable[[Any, Any], tuple[Array, Any]]:
            def loss(variables: Any, params: Any) -> tuple[Array, Any]:
                weights = method.weights(variables, state.method)
                if flags is not None:  # no gradient for the others
                    weights = {cell: jnp.where(flags[cell], w, 0) for cell, w in weights.items()}
                return self.loss(nnx.merge(self.graph, params), weights, batch, flags, nodes)

            return loss

        variables = method.variables(state.method)
        if s.order == "first":
            grads, found = gradients.first_order(variables, state.params, on(valid))
        else:
            direction = lambda g: self.sgd.update(g, state.momentum, state.params)[0]
            clip = s.clip if self.clips_inner_step else 0.0
            grads, found = gradients.second_order(
                variables, state.params, on(train), on(valid), self.rate(train, lr), direction, s.hessian, clip
            )
        state = self.after_architecture(state, found)
        return state._replace(method=method.update(self.clipped(grads), state.method))

    def weight_step(self, state: SearchState, batch: Any, lr: Array, nodes: Nodes = None) -> SearchState:
        """Take a weight step. Weights of paths that are not computed do not change.

        nodes: those that the program computes, the others having no active paths; None: all.
        """
        method = self.method
        is_active = method.is_active(state.method)
        # some methods clip the gradients of their variables, the sum of both steps, together with those of the weights
        together = getattr(method, "clips_together", False)
        grads, found = self._training_gradients(state, batch, is_active, nodes, together)
        if together:
            grads = grads[0], jax.tree.map(jnp.add, grads[1], method.last_gradient(state.method))
        (grads, *_), _ = gradients.clipped(grads, self.settings.clip)
        return self.after_weights(self._sgd_step(state, grads, batch, lr, is_active), found)

    def joint_step(
        self, state: SearchState, batch: Any, lr: Array, probes: bool = True, moves: bool = True, nodes: Nodes = None
    ) -> SearchState:
        """Take a weight step and an architecture step with the gradients of one pass over a batch.

        Args:
          probes, nodes: as in `architecture_step`.
          moves: whether the architecture takes a step too.
        """
        is_active = self.method.is_active(state.method)
        computed = is_active
        if probes and moves:
            computed = self.probed(is_active) or jax.tree.map(jnp.ones_like, is_active)
        both, found = self._training_gradients(state, batch, computed, nodes, moves)
        counted = both if getattr(self.method, "clips_together", False) else both[:1]
        (grads, *_), _ = gradients.clipped(counted, self.settings.clip)
        state = self.after_weights(self._sgd_step(state, grads, batch, lr, computed), found)
        if not moves:
            return state
        return state._replace(method=self.method.update(self.clipped(both[1]), state.method))

    def _training_gradients(self, state: SearchState, batch: Any, flags: Weights, nodes: Nodes, both: bool) -> tuple[Any, Any]:
        """The gradients of the training loss in the network weights, and in the variables if `both`; and what the loss found."""

        def loss(params: Any, variables: Any) -> tuple[Array, Any]:
            weights = self.method.weights(variables, state.method)
            return self.training_loss(nnx.merge(self.graph, params), weights, batch, flags, nodes)

        variables = self.method.variables(state.method)
        return jax.grad(loss, argnums=(0, 1) if both else (0,), has_aux=True)(state.params, variables)

    def _sgd_step(self, state: SearchState, grads: Any, batch: Any, lr: Array, is_active: Weights) -> SearchState:
        """The state after a step of SGD. Weights of paths that are not active do not change."""
        direction, momentum = self.sgd.update(grads, state.momentum, state.params)
        rate = self.rate(batch, lr)
        stepped = jax.tree.map(lambda p, d: p - (rate * d).astype(p.dtype), state.params, direction)
        trained = nnx.merge(self.graph, state.params).trained(is_active)
        keep = lambda new, old: jax.tree.map(lambda flag, n, o: jnp.where(flag, n, o), trained, new, old)
        decay, trace = momentum
        trace = trace._replace(trace=keep(trace.trace, state.momentum[1].trace))
        return state._replace(params=keep(stepped, state.params), momentum=(decay, trace))

    # -- compiled -----------------------------------------------------------------------------

    def start(self, params: Any, key: Array) -> SearchState:
        """The state before the first step."""
        dtype = jax.tree.leaves(params)[0].dtype
        return SearchState(params, self.sgd.init(params), self.method.init(key), jnp.zeros(3, dtype))

    def _architecture(self, state: SearchState, data: Any, place: Place, probes: bool, nodes: Nodes = None) -> SearchState:
        train, valid = self.batches(state, data, place)
        return self.architecture_step(state, train, valid, place.lr, probes, nodes)

    def _weights(self, state: SearchState, data: Any, place: Place, nodes: Nodes = None) -> SearchState:
        train, _ = self.batches(state, data, place)
        return self.weight_step(state, train, place.lr, nodes)

    def _joint(self, state: SearchState, data: Any, place: Place, probes: bool, moves: bool, nodes: Nodes = None) -> SearchState:
        train, _ = self.batches(state, data, place)
        return self.joint_step(state, train, place.lr, probes, moves, nodes)


class CifarData(NamedTuple):
    """The two parts of the images, and the order of each in this pass."""

    train: Pixels
    valid: Pixels
    train_order: Array
    valid_order: Array


class CifarSteps(BilevelSteps):
    """Steps on images. A batch is (images, labels, key of noise operations)."""

    def __init__(self, graph: Any, space: Space, method: Method, settings: Any, devices: Devices) -> None:
        self.momentum = settings.momentum
        super().__init__(graph, space, method, settings, devices)

    def batches(self, state: SearchState, data: CifarData, place: Place) -> tuple[Any, Any]:
        key = jax.random.fold_in(jax.random.fold_in(place.key, place.epoch), place.number)
        padding = image_sets.crop_padding(self.settings.pixels, self.settings.augment)

        def draw(pixels: Pixels, order: Array, stream: int) -> tuple[Array, Array, Array]:
            crops, noise = jax.random.split(jax.random.fold_in(key, stream))
            found = images.augmented(pixels, order, place.number, self.settings.batch, crops, padding)
            return (*self.devices.split(found), noise)

        return draw(data.train, data.train_order, TRAIN), draw(data.valid, data.valid_order, VALID)

    def loss(self, net: Any, weights: Weights, batch: Any, is_active: Weights | None, nodes: Nodes = None) -> tuple[Array, Any]:
        pixels, labels, key = batch
        # inactive paths are branches that are not taken
        return images.label_loss(net(pixels, weights, is_active, key), labels)

    def after_weights(self, state: SearchState, found: Any) -> SearchState:
        return state._replace(sums=state.sums + found)

    def evaluated(self, params: Any, weights: Weights, data: Any, is_active: Weights) -> Array:
        """The sums of loss, correct answers and images of a part of the images, normalised by its own statistics."""
        pixels, part, key = data
        batch = self.devices.split((images.normalised(pixels, part[0]), part[1]))
        return self.loss(nnx.merge(self.graph, params), weights, (*batch, key), is_active)[1]


class TextData(NamedTuple):
    """The two texts as columns of words, (rows, batch) each, followed by `bptt` rows of padding."""

    train: Array
    valid: Array


class Window(NamedTuple):
    """A window of text in rows of `bptt` words, of which the first `length` count. state: the hidden state before it."""

    words: Array
    targets: Array
    length: Array
    state: Array
    dropped: Any


class TextPlace(NamedTuple):
    """The place of the windows of a step: first row and length of both."""

    epoch: Any
    number: Any
    lr: Any
    key: Any
    start: Any
    length: Any
    valid_start: Any
    valid_length: Any


class TextSteps(BilevelSteps):
    """Steps on text. own: the hidden states of the training and the validation text.

    All windows have `bptt` rows in the compiled program; rows after the end of a shorter one count for nothing.
    """

    clips_inner_step = True

    def start(self, params: Any, key: Array) -> SearchState:
        state = super().start(params, key)
        return state._replace(own=self.reset_states(params))

    def reset_states(self, params: Any) -> dict[str, Array]:
        """The hidden states before the first word."""
        start = nnx.merge(self.graph, params).start(self.settings.batch)
        return {part: jnp.array(start) for part in ("train", "valid")}

    def batches(self, state: SearchState, data: TextData, place: TextPlace) -> tuple[Window, Window]:
        net, s = nnx.merge(self.graph, state.params), self.settings
        key = jax.random.fold_in(jax.random.fold_in(place.key, place.epoch), place.number)

        def window(part: str, rows: Array, start: Array, length: Array, stream: int) -> Window:
            found = self.devices.split(jax.lax.dynamic_slice_in_dim(rows, start, s.bptt + 1), axis=1)
            dropped = net.draw(jax.random.fold_in(key, stream), s.batch)
            return Window(found[:-1], found[1:], length, self.devices.split(state.own[part]), dropped)

        return (
            window("train", data.train, place.start, place.length, TRAIN),
            window("valid", data.valid, place.valid_start, place.valid_length, VALID),
        )

    def loss(
        self, net: Any, weights: Weights, batch: Window, is_active: Weights | None, nodes: Nodes = None
    ) -> tuple[Array, Any]:
        return self._losses(net, weights, batch, is_active, nodes)[:2]

    def training_loss(
        self, net: Any, weights: Weights, batch: Window, is_active: Weights, nodes: Nodes = None
    ) -> tuple[Array, Any]:
        loss, last, states = self._losses(net, weights, batch, is_active, nodes)
        counted = (jnp.arange(len(states) - 1) < batch.length - 1)[:, None, None]
        count = jnp.maximum(batch.length - 1, 1) * states[0].size
        moved = jnp.where(counted, jnp.square(states[1:] - states[:-1]), 0).sum() / count
        words = (batch.length * batch.words.shape[1]).astype(loss.dtype)
        return loss + self.settings.temporal * moved, (last, jnp.stack([loss * words, words]))

    def _losses(
        self, net: Any, weights: Weights, batch: Window, is_active: Weights | None, nodes: Nodes
    ) -> tuple[Array, Array, Array]:
        """The mean cross entropy, the last hidden state, and all hidden states, of the words that count."""
        static = None if nodes is None else {CELL: tuple(path.node in nodes for path in self.space.paths(CELL))}
        losses, states, _ = net.word_losses(batch.words, batch.targets, batch.state, batch.dropped, weights, static, is_active)
        counted = jnp.arange(len(losses))[:, None] < batch.length
        loss = jnp.where(counted, losses, 0).sum() / (batch.length * losses.shape[1])
        last = jax.lax.dynamic_index_in_dim(states, batch.length - 1, keepdims=False)
        return loss, jax.lax.stop_gradient(last), states

    def rate(self, batch: Window, lr: Array) -> Array:
        """Proportional to the length of the window."""
        return lr * batch.length / self.settings.bptt

    def after_architecture(self, state: SearchState, found: Any) -> SearchState:
        return state._replace(own={**state.own, "valid": found})

    def after_weights(self, state: SearchState, found: Any) -> SearchState:
        last, sums = found
        return state._replace(own={**state.own, "train": last}, sums=state.sums.at[:2].add(sums))

    def probed(self, is_active: Weights) -> Weights:
        return into_computed_nodes(self.space, is_active)

    def clipped(self, grads: Any) -> Any:
        return gradients.clipped(grads, self.settings.arch_clip)[0]
