"""The steps of a search: architecture on a validation batch and network weights on a training batch, or both on one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.text import Window, perplexity
from ..engine.distributed import SINGLE_PROCESS, Processes
from ..nets.torch.operations import frozen_statistics, norms_of
from ..nets.torch.rnn import CELL, RecurrentSupernet
from ..space.spaces import Masks
from . import gradients
from .method import Method
from .settings import BilevelSettings

Batch = tuple[Tensor, Tensor]


class BilevelSteps:
    """Architecture steps by a method, and weight steps by SGD. Subclasses define the losses.

    sums: accumulates the losses of the weight steps for `means`.
    """

    clips_inner_step = False  # whether the gradient of the step to w' (second order) is clipped, as those of weight steps

    def __init__(
        self, net: Any, method: Method, settings: BilevelSettings, processes: Processes = SINGLE_PROCESS, momentum: float = 0.0
    ) -> None:
        self.net, self.method, self.settings, self.processes = net, method, settings, processes
        self.begin_step: Callable[[], None] = getattr(method, "begin_step", lambda: None)
        self.params, self.norms = list(net.parameters()), norms_of(net)
        self.device = self.params[0].device
        self.sgd = torch.optim.SGD(self.params, settings.lr, momentum=momentum, weight_decay=settings.weight_decay, foreach=True)
        self.sums = torch.zeros(3, dtype=torch.float64, device=self.device)

    def losses(self, train: Any, valid: Any, active: Masks | None) -> tuple[gradients.Loss, gradients.Loss]:
        """Training and validation loss for an architecture step, as functions without arguments."""
        raise TypeError(f"{type(self).__name__} must define losses")

    def loss(self, batch: Any, weights: Any, active: Masks | None) -> Tensor:
        """The training loss of a weight step; adds itself to `sums`."""
        raise TypeError(f"{type(self).__name__} must define loss")

    def architecture_paths(self, number: int) -> Masks | None:
        """The paths that this architecture step computes; None: all."""
        return None if self.method.needs_zeroed_paths(number) else self.method.active_paths()

    def architecture(self, number: int, train: Any, valid: Any) -> None:
        """Take an architecture step. Batch norms use batch statistics and do not update running ones.

        number: of the step, for methods that compute paths of zero weight in some steps only.
        """
        s, method, average = self.settings, self.method, self.processes.average
        self.begin_step()
        if method.frozen:
            return
        on_train, on_valid = self.losses(train, valid, self.architecture_paths(number))
        with frozen_statistics(self.norms):
            if s.order == "first":
                with gradients.constant(self.params):
                    grads = gradients.first_order(method.parameters, on_valid, average)
            else:
                lr, clip = self.sgd.param_groups[0]["lr"], s.clip if self.clips_inner_step else 0.0
                grads = gradients.second_order(
                    method.parameters, self.params, on_train, on_valid, lr, self._direction, s.hessian, average, clip
                )
        method.update(self.clipped(grads))

    def clipped(self, grads: list[Tensor]) -> list[Tensor]:
        """Clip the architecture gradient; not by default."""
        return grads

    def weights(self, batch: Any) -> None:
        """Take a weight step. Paths of architecture weight 0 are not computed, and their weights do not change."""
        together = self._clipped_together()  # gradients that are accumulated over both steps
        self._backward(batch, self.method.active_paths(), bool(together))
        self._weight_step(together)

    def joint(self, number: int, batch: Any) -> None:
        """Take a weight step and an architecture step with the gradients of one pass over a batch.

        number: as in `architecture`.
        """
        method = self.method
        self.begin_step()
        moves = not method.frozen
        for p in method.parameters:
            p.grad = None
        self._backward(batch, self.architecture_paths(number) if moves else method.active_paths(), moves)
        # copies, as the weight step may clip the originals
        grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in method.parameters]
        self._weight_step(self._clipped_together())
        if moves:
            self.processes.average(grads)
            method.update(self.clipped(grads))

    def _clipped_together(self) -> Sequence[Tensor]:
        """The parameters of the method whose gradients count in the norm that clips those of the network weights."""
        return self.method.parameters if getattr(self.method, "clips_together", False) else []

    def _backward(self, batch: Any, active: Masks | None, architecture: bool) -> None:
        """Compute the gradients of the network weights, and of the architecture if that is set."""
        with torch.set_grad_enabled(architecture):
            weights = dict(self.method.weights())
        loss = self.loss(batch, weights, active)
        self.sgd.zero_grad()
        loss.backward()

    def _weight_step(self, together: Sequence[Tensor]) -> None:
        """Clip the gradients of the network weights, with those of these tensors, and take a step of SGD."""
        updated = [p for p in (*self.params, *together) if p.grad is not None]
        self.processes.average([p.grad for p in updated])  # type: ignore[misc]
        if self.settings.clip:
            gradients.clip([p.grad for p in updated], self.settings.clip)  # type: ignore[misc]
        self.sgd.step()

    def _direction(self, grads: Any) -> list[Tensor]:
        """The direction of SGD: the gradients with weight decay and momentum."""
        group = self.sgd.param_groups[0]
        out = list(torch._foreach_add(list(grads), self.params, alpha=group["weight_decay"]))
        for i, p in enumerate(self.params):
            buffer = self.sgd.state[p].get("momentum_buffer") if p in self.sgd.state else None
            if buffer is not None:
                out[i] = out[i] + group["momentum"] * buffer
        return out

    def means(self) -> tuple[float, float]:
        """Mean loss and accuracy of the weight steps of all processes since the last call."""
        self.processes.total([self.sums])
        loss, correct, samples = self.sums.tolist()
        self.sums.zero_()
        return loss / samples, correct / samples

    def count(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a batch to the sums: loss, number of correct labels, size."""
        n = len(labels)
        self.sums += torch.stack([loss.detach().double() * n, (logits.argmax(1) == labels).sum(), torch.full_like(loss, n)])

    def state_dict(self) -> dict[str, Any]:
        return {"sgd": self.sgd.state_dict(), "sums": self.sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sgd.load_state_dict(state["sgd"])
        self.sums.copy_(state["sums"])


class CifarSteps(BilevelSteps):
    """Steps on images. A batch is (images, labels)."""

    def __init__(self, net: Any, method: Method, settings: Any, processes: Processes = SINGLE_PROCESS) -> None:
        super().__init__(net, method, settings, processes, settings.momentum)

    def logits(self, images: Tensor, weights: Any, active: Masks | None) -> Tensor:
        if not self.settings.amp:
            return self.net(images, weights, active)
        with torch.autocast(self.device.type, torch.bfloat16):
            return self.net(images, weights, active).float()

    def losses(self, train: Batch, valid: Batch, active: Masks | None) -> tuple[gradients.Loss, gradients.Loss]:
        def on(batch: Batch) -> gradients.Loss:
            return lambda: F.cross_entropy(self.logits(batch[0], self.method.weights(), active), batch[1])

        return on(train), on(valid)

    def loss(self, batch: Batch, weights: Any, active: Masks | None) -> Tensor:
        images, labels = batch
        logits = self.logits(images, weights, active)
        loss = F.cross_entropy(logits, labels)
        self.count(loss, logits, labels)
        return loss


class TextSteps(BilevelSteps):
    """Steps on text. state: the hidden states of the training and the validation text."""

    net: RecurrentSupernet
    clips_inner_step = True

    def __init__(self, net: RecurrentSupernet, method: Method, settings: Any, processes: Processes = SINGLE_PROCESS) -> None:
        super().__init__(net, method, settings, processes)
        self.sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        self.state: dict[str, Tensor] = {}
        self.reset_states()

    def reset_states(self) -> None:
        """Reset the hidden states to those before the first word."""
        self.state = {part: self.net.start(self.settings.batch) for part in ("train", "valid")}

    def losses(self, train: Window, valid: Window, active: Masks | None) -> tuple[gradients.Loss, gradients.Loss]:
        # One draw of dropout masks for all passes over a batch: the published code draws new masks in each pass, so that its
        # central difference compares losses with different masks.
        before = dict(self.state)
        draw = lambda: self.net.draw(self.settings.batch)
        batches = {"train": (*train, before["train"], draw()), "valid": (*valid, before["valid"], draw())}

        def on(part: str) -> gradients.Loss:
            def loss() -> Tensor:
                found, _, last = self.net.loss(*batches[part], self.method.weights(), active)
                if part == "valid":
                    self.state["valid"] = last.detach()
                return found

            return loss

        return on("train"), on("valid")

    def loss(self, batch: Window, weights: Any, active: Masks | None) -> Tensor:
        words, targets = batch
        dropped = self.net.draw(self.settings.batch)
        loss, states, last = self.net.loss(words, targets, self.state["train"], dropped, weights, active)
        self.state["train"] = last.detach()
        n = targets.numel()
        self.sums += torch.stack([n * loss.detach().double(), self.sums.new_full((), n)])
        return loss + self.settings.temporal * (states[1:] - states[:-1]).pow(2).mean()

    def means(self) -> tuple[float, float]:
        """Mean loss and perplexity of the weight steps since the last call."""
        total, words = self.sums.tolist()
        self.sums.zero_()
        return total / words, perplexity(total / words)

    def architecture_paths(self, number: int) -> Masks | None:
        """The paths into nodes with nonzero weights: a node whose weights are all zero stays zero.

        The batch norm of a node cancels the scale of its weights. At 0 the gradient is therefore larger by the factor
        1 / sqrt(eps) of the norm, and would make every such node nonzero in the next step.
        """
        active = super().architecture_paths(number)
        if active is not None or self.method.active_paths() is None:
            return active
        paths = self.net.space.paths(CELL)
        nodes = {path.node for path, active in zip(paths, self.method.active_paths()[CELL]) if active}  # type: ignore[index]
        return {CELL: tuple(path.node in nodes for path in paths)}

    def clipped(self, grads: list[Tensor]) -> list[Tensor]:
        return gradients.clipped(grads, self.settings.arch_clip)[0]

    def architecture(self, number: int, train: Window, valid: Window) -> None:
        with self._shorter_step(train):
            super().architecture(number, train, valid)

    def weights(self, batch: Window) -> None:
        with self._shorter_step(batch):
            super().weights(batch)

    def joint(self, number: int, batch: Window) -> None:
        with self._shorter_step(batch):
            super().joint(number, batch)

    @contextmanager
    def _shorter_step(self, batch: Window) -> Iterator[None]:
        """Context in which the learning rate is proportional to the length of the window."""
        group = self.sgd.param_groups[0]
        usual = group["lr"]
        group["lr"] = usual * len(batch[0]) / self.settings.bptt
        try:
            yield
        finally:
            group["lr"] = usual

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "state": self.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.state = dict(state["state"])
