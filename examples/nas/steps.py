"""The two steps of a bi-level search: the architecture on a validation batch, the weights on a training batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import bilevel
from .cnn import Supernet
from .methods import Method
from .operations import frozen_statistics, norms_of
from .processes import ALONE, Processes
from .settings import SearchSettings
from .spaces import Masks

Batch = tuple[Tensor, Tensor]


@contextmanager
def constant(params: Sequence[nn.Parameter]) -> Iterator[None]:
    """The parameters want no gradient: nothing is kept or computed for one."""
    for p in params:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in params:
            p.requires_grad_(True)


class Steps:
    """Steps of a method and of SGD on the weights of its supernet. `sums` collects loss, hits and images of the weight steps."""

    def __init__(self, net: Supernet, method: Method, settings: SearchSettings, processes: Processes = ALONE) -> None:
        self.net, self.method, self.settings, self.processes = net, method, settings, processes
        self.params, self.norms = list(net.parameters()), norms_of(net)
        self.device = self.params[0].device
        self.sgd = torch.optim.SGD(
            self.params, settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay, foreach=True
        )
        self.sums = torch.zeros(3, dtype=torch.float64, device=self.device)

    def logits(self, images: Tensor, weights: Any, alive: Masks | None) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16) if self.settings.amp else nullcontext():
            return self.net(images, weights, alive).float()

    def architecture(self, number: int, train: Batch, valid: Batch) -> None:
        """One step of the architecture. Batch norms use the statistics of the batches and do not remember them.

        number: of the step, for methods that do not look at dead paths in every one.
        """
        s, method = self.settings, self.method
        alive = None if method.probes(number) else method.alive()

        def on(batch: Batch) -> bilevel.Loss:
            return lambda: F.cross_entropy(self.logits(batch[0], method.weights(), alive), batch[1])

        average = self.processes.average
        with frozen_statistics(self.norms):
            if s.order == "first":
                with constant(self.params):
                    grads = bilevel.first_order(method.parameters, on(valid), average)
            else:
                lr = self.sgd.param_groups[0]["lr"]
                grads = bilevel.second_order(
                    method.parameters, self.params, on(train), on(valid), lr, self._direction, s.hessian, average
                )
        method.update(grads)

    def weights(self, batch: Batch) -> None:
        """One step of the weights; paths whose architecture weight is 0 do not run, and their weights rest."""
        images, labels = batch
        with torch.no_grad():
            weights = dict(self.method.weights())
        logits = self.logits(images, weights, self.method.alive())
        loss = F.cross_entropy(logits, labels)
        self.sgd.zero_grad()
        loss.backward()
        live = [p for p in self.params if p.grad is not None]
        self.processes.average([p.grad for p in live])  # type: ignore[misc]
        nn.utils.clip_grad_norm_(live, self.settings.clip)
        self.sgd.step()
        n = len(labels)
        self.sums += torch.stack([loss.detach().double() * n, (logits.argmax(1) == labels).sum(), torch.full_like(loss, n)])

    def _direction(self, grads: Any) -> list[Tensor]:
        """Where SGD would go: with its weight decay and momentum."""
        out = list(torch._foreach_add(list(grads), self.params, alpha=self.settings.weight_decay))
        for i, p in enumerate(self.params):
            buffer = self.sgd.state[p].get("momentum_buffer") if p in self.sgd.state else None
            if buffer is not None:
                out[i] = out[i] + self.settings.momentum * buffer
        return out

    def means(self) -> tuple[float, float]:
        """Loss and accuracy over all weight steps, of all processes, since this was last asked."""
        self.processes.total([self.sums])
        loss, correct, images = self.sums.tolist()
        self.sums.zero_()
        return loss / images, correct / images

    def state_dict(self) -> dict[str, Any]:
        return {"sgd": self.sgd.state_dict(), "sums": self.sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sgd.load_state_dict(state["sgd"])
        self.sums.copy_(state["sums"])
