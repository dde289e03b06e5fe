"""The two steps of a bi-level search: the architecture on a validation batch, the weights on a training batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.text import Window
from ..engine.distributed import SINGLE_PROCESS, Processes
from ..nets.torch.operations import frozen_statistics, norms_of
from ..nets.torch.rnn import CELL, RecurrentSupernet, perplexity
from ..space.spaces import Masks
from . import gradients
from .method import Method
from .settings import BilevelSettings

Batch = tuple[Tensor, Tensor]


class BilevelSteps:
    """Steps of a method and of SGD on the weights of its supernet. `sums` collects what `means` reports of the weight steps.

    Subclasses say what the losses of their data are.
    """

    clips_inner_step = False  # whether the step to w' of second order is clipped, as the steps of the weights are

    def __init__(
        self, net: Any, method: Method, settings: BilevelSettings, processes: Processes = SINGLE_PROCESS, momentum: float = 0.0
    ) -> None:
        self.net, self.method, self.settings, self.processes = net, method, settings, processes
        self.params, self.norms = list(net.parameters()), norms_of(net)
        self.device = self.params[0].device
        self.sgd = torch.optim.SGD(self.params, settings.lr, momentum=momentum, weight_decay=settings.weight_decay, foreach=True)
        self.sums = torch.zeros(3, dtype=torch.float64, device=self.device)

    def losses(self, train: Any, valid: Any, alive: Masks | None) -> tuple[gradients.Loss, gradients.Loss]:
        """What the architecture sees: the training and the validation loss as functions of its parameters."""
        raise TypeError(f"{type(self).__name__} has no losses")

    def loss(self, batch: Any, weights: Any, alive: Masks | None) -> Tensor:
        """What a step of the weights lessens; counts itself in `sums`."""
        raise TypeError(f"{type(self).__name__} has no loss")

    def seen(self, number: int) -> Masks | None:
        """The paths that an architecture step looks at; None: all."""
        return None if self.method.probes(number) else self.method.alive()

    def architecture(self, number: int, train: Any, valid: Any) -> None:
        """One step of the architecture. Batch norms use the statistics of the batches and do not remember them.

        number: of the step, for methods that do not look at dead paths in every one.
        """
        s, method, average = self.settings, self.method, self.processes.average
        if method.rests:
            return
        on_train, on_valid = self.losses(train, valid, self.seen(number))
        with frozen_statistics(self.norms):
            if s.order == "first":
                with gradients.constant(self.params):
                    grads = gradients.first_order(method.parameters, on_valid, average)
            else:
                lr, clip = self.sgd.param_groups[0]["lr"], s.clip if self.clips_inner_step else 0.0
                grads = gradients.second_order(
                    method.parameters, self.params, on_train, on_valid, lr, self._direction, s.hessian, average, clip
                )
        method.update(self.bounded(grads))

    def bounded(self, grads: list[Tensor]) -> list[Tensor]:
        """The gradient of the architecture as the method gets it."""
        return grads

    def weights(self, batch: Any) -> None:
        """One step of the weights; paths whose architecture weight is 0 do not run, and their weights rest."""
        with torch.no_grad():
            weights = dict(self.method.weights())
        loss = self.loss(batch, weights, self.method.alive())
        self.sgd.zero_grad()
        loss.backward()
        live = [p for p in self.params if p.grad is not None]
        self.processes.average([p.grad for p in live])  # type: ignore[misc]
        nn.utils.clip_grad_norm_(live, self.settings.clip)
        self.sgd.step()

    def _direction(self, grads: Any) -> list[Tensor]:
        """Where SGD would go: with its weight decay and momentum."""
        group = self.sgd.param_groups[0]
        out = list(torch._foreach_add(list(grads), self.params, alpha=group["weight_decay"]))
        for i, p in enumerate(self.params):
            buffer = self.sgd.state[p].get("momentum_buffer") if p in self.sgd.state else None
            if buffer is not None:
                out[i] = out[i] + group["momentum"] * buffer
        return out

    def means(self) -> tuple[float, float]:
        """Loss and accuracy over all weight steps, of all processes, since this was last asked."""
        self.processes.total([self.sums])
        loss, correct, samples = self.sums.tolist()
        self.sums.zero_()
        return loss / samples, correct / samples

    def count(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a batch to the sums: its mean loss, its hits, its size."""
        n = len(labels)
        self.sums += torch.stack([loss.detach().double() * n, (logits.argmax(1) == labels).sum(), torch.full_like(loss, n)])

    def state_dict(self) -> dict[str, Any]:
        return {"sgd": self.sgd.state_dict(), "sums": self.sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sgd.load_state_dict(state["sgd"])
        self.sums.copy_(state["sums"])


class CifarSteps(BilevelSteps):
    """On images. batch: (images, labels)."""

    def __init__(self, net: Any, method: Method, settings: Any, processes: Processes = SINGLE_PROCESS) -> None:
        super().__init__(net, method, settings, processes, settings.momentum)

    def logits(self, images: Tensor, weights: Any, alive: Masks | None) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16) if self.settings.amp else nullcontext():
            return self.net(images, weights, alive).float()

    def losses(self, train: Batch, valid: Batch, alive: Masks | None) -> tuple[gradients.Loss, gradients.Loss]:
        def on(batch: Batch) -> gradients.Loss:
            return lambda: F.cross_entropy(self.logits(batch[0], self.method.weights(), alive), batch[1])

        return on(train), on(valid)

    def loss(self, batch: Batch, weights: Any, alive: Masks | None) -> Tensor:
        images, labels = batch
        logits = self.logits(images, weights, alive)
        loss = F.cross_entropy(logits, labels)
        self.count(loss, logits, labels)
        return loss


class TextSteps(BilevelSteps):
    """On text. `state`: the hidden states of the training and the validation text."""

    net: RecurrentSupernet
    clips_inner_step = True

    def __init__(self, net: RecurrentSupernet, method: Method, settings: Any, processes: Processes = SINGLE_PROCESS) -> None:
        super().__init__(net, method, settings, processes)
        self.sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        self.state: dict[str, Tensor] = {}
        self.forget()

    def forget(self) -> None:
        """Go back to the hidden states of the start."""
        self.state = {part: self.net.start(self.settings.batch) for part in ("train", "valid")}

    def losses(self, train: Window, valid: Window, alive: Masks | None) -> tuple[gradients.Loss, gradients.Loss]:
        # What is left out is drawn once for all passes over a batch: the published code draws anew in each, and takes the
        # difference of two losses that leave out different things.
        before = dict(self.state)
        draw = lambda: self.net.draw(self.settings.batch)
        batches = {"train": (*train, before["train"], draw()), "valid": (*valid, before["valid"], draw())}

        def on(part: str) -> gradients.Loss:
            def loss() -> Tensor:
                found, _, last = self.net.loss(*batches[part], self.method.weights(), alive)
                if part == "valid":
                    self.state["valid"] = last.detach()
                return found

            return loss

        return on("train"), on("valid")

    def loss(self, batch: Window, weights: Any, alive: Masks | None) -> Tensor:
        words, targets = batch
        dropped = self.net.draw(self.settings.batch)
        loss, states, last = self.net.loss(words, targets, self.state["train"], dropped, weights, alive)
        self.state["train"] = last.detach()
        n = targets.numel()
        self.sums += torch.stack([n * loss.detach().double(), self.sums.new_tensor(n)])
        return loss + self.settings.temporal * (states[1:] - states[:-1]).pow(2).mean()

    def means(self) -> tuple[float, float]:
        """Loss and perplexity over all weight steps since this was last asked."""
        total, words = self.sums.tolist()
        self.sums.zero_()
        return total / words, perplexity(total / words)

    def seen(self, number: int) -> Masks | None:
        """All paths into nodes that live: a node that has died stays dead.

        Behind its norm a node is the same however small its weights are, so at 0 its gradient is not one to go by: it is larger
        by 1 / sqrt(eps) of the norm, and would bring every dead node back in the next step.
        """
        alive = super().seen(number)
        if alive is not None or self.method.alive() is None:
            return alive
        paths = self.net.space.paths(CELL)
        lives = {path.node for path, living in zip(paths, self.method.alive()[CELL]) if living}  # type: ignore[index]
        return {CELL: tuple(path.node in lives for path in paths)}

    def bounded(self, grads: list[Tensor]) -> list[Tensor]:
        return gradients.clipped(grads, self.settings.arch_clip)[0]

    def architecture(self, number: int, train: Window, valid: Window) -> None:
        with self._shorter_step(train):
            super().architecture(number, train, valid)

    def weights(self, batch: Window) -> None:
        with self._shorter_step(batch):
            super().weights(batch)

    @contextmanager
    def _shorter_step(self, batch: Window) -> Iterator[None]:
        """A learning rate in proportion to the length of the window."""
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
