"""The interface of a method of bilevel search in JAX: architecture variables, their updates, and the genotype they represent."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

from jax import Array

from ...space.genotype import AnyGenotype
from ...space.spaces import Space

State = Any
"""All that changes about an architecture in a search: a pytree of arrays with constant structure, shapes and dtypes."""

Variables = Any
"""The part of a state of which the architecture gradient is taken."""


class Method(Protocol):
    """A search method in one search space, for any supernet. It holds constants only.

    name: of the method, on the command line and in checkpoints. A method may also have `clips_together`, whether the gradients of
    its variables count in the norm that clips those of the network weights, and `last_gradient(state)`, that of the last update.

    `variables`, `weights`, `update`, `is_active` and `point` are pure functions, for use inside of `jax.jit`. The other methods
    run on the host and wait for values.
    """

    name: ClassVar[str]

    def __init__(self, space: Space, settings: Any, steps_per_epoch: int) -> None: ...

    def init(self, key: Array) -> State:
        """The state before the first epoch, with random numbers from `key`."""

    def begin_epoch(self, state: State, epoch: int) -> State:
        """Update what depends on the epoch, such as strengths, learning rates and recovered codes."""

    def after_step(self, state: State) -> State:
        """Update what needs the host after an architecture step; most methods return the state itself."""

    def variables(self, state: State) -> Variables:
        """The architecture variables."""

    def weights(self, variables: Variables, state: State) -> dict[str, Array]:
        """The factors of the paths in the supernet, differentiable in the variables."""

    def update(self, grads: Variables, state: State) -> State:
        """Update the variables by their gradients. A frozen state is returned as it is."""

    def is_active(self, state: State) -> dict[str, Array]:
        """Flags of the paths with nonzero weight."""

    def point(self, state: State) -> dict[str, Array]:
        """The weights for evaluation and pictures: exactly sparse if the method is."""

    def needs_zeroed_paths(self, step: int) -> bool:
        """Whether this architecture step needs the gradient of zero weights too, by which they can become nonzero."""

    def is_frozen(self, state: State) -> bool:
        """Whether the architecture is final: its steps are skipped."""

    def genotype(self, state: State) -> AnyGenotype:
        """The genotype of the weights `point()`."""

    def log(self, state: State) -> dict[str, float]:
        """Additional columns for the table of epochs."""
