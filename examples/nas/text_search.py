"""The search of a recurrent cell: weights on the training text, architecture on the validation text.

    row = carry_out(lambda processes, device: TextSearch("sparse_supernet", settings, 0, out, processes, device), settings, out)

Both texts are read in columns, each with a hidden state that goes on from window to window. The validation window lies as far
into its text as the training window into its own, modulo its length, and its state is the one that the last architecture step
left, as published.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import bilevel, spaces, text
from .genotype import RecurrentGenotype
from .methods import Method
from .processes import ALONE, Processes
from .rnn import CELL, Drops, RecurrentSupernet, mean_loss, perplexity
from .search import TwoLevelSearch
from .settings import LanguageSettings, TextSearchSettings
from .spaces import Masks
from .steps import TwoLevel

Window = tuple[Tensor, Tensor]  # words and the words that follow them, (T, batch) each


def drops(settings: LanguageSettings) -> Drops:
    s = settings
    return Drops(s.drop_words, s.drop_embedding, s.drop_input, s.drop_hidden, s.drop_output)


def alone(processes: Processes) -> None:
    """Raise ValueError under torchrun: hidden states of several processes would not fit into one checkpoint."""
    if processes.world > 1:
        raise ValueError(f"text is read by one process; start it without torchrun, got {processes.world} processes")


class TextSteps(TwoLevel):
    """On text. `state`: the hidden states of the training and the validation text."""

    net: RecurrentSupernet
    clips_inner_step = True

    def __init__(self, net: RecurrentSupernet, method: Method, settings: Any, processes: Processes = ALONE) -> None:
        super().__init__(net, method, settings, processes)
        self.sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        self.state: dict[str, Tensor] = {}
        self.forget()

    def forget(self) -> None:
        """Go back to the hidden states of the start."""
        self.state = {part: self.net.start(self.settings.batch) for part in ("train", "valid")}

    def losses(self, train: Window, valid: Window, alive: Masks | None) -> tuple[bilevel.Loss, bilevel.Loss]:
        # What is left out is drawn once for all passes over a batch: the published code draws anew in each, and takes the
        # difference of two losses that leave out different things.
        before = dict(self.state)
        draw = lambda: self.net.draw(self.settings.batch)
        batches = {"train": (*train, before["train"], draw()), "valid": (*valid, before["valid"], draw())}

        def on(part: str) -> bilevel.Loss:
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
        return bilevel.clipped(grads, self.settings.arch_clip)[0]

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


class TextSearch(TwoLevelSearch):
    """On text."""

    measure = "perplexity"
    steps: TextSteps

    def __init__(
        self, method: str, settings: TextSearchSettings, seed: int, out: Path, processes: Processes, device: torch.device
    ) -> None:
        super().__init__(method, settings, seed, out, processes, device)
        alone(processes)
        space = spaces.get(settings.space, RecurrentGenotype)
        self.corpus = text.load(settings.data_dir).to(device)
        self.train_rows = text.columns(self.corpus.train[: settings.tokens or None], settings.batch)
        self.valid_rows = text.columns(self.corpus.valid, settings.batch)
        net = RecurrentSupernet(space, len(self.corpus.vocabulary), settings.hidden, drops(settings))
        if settings.compiled:
            net.fuse()
        self.prepare(net, TextSteps)

    def __len__(self) -> int:
        return len(self._windows())

    def _windows(self) -> list[tuple[int, int]]:
        return text.windows(len(self.train_rows), self.settings.bptt, self.seed, self.epoch)

    def begin_epoch(self) -> None:
        if self.step == 0:
            self.steps.forget()
        super().begin_epoch()

    def batches(self) -> Iterator[tuple[Window, Window]]:
        places = len(self.valid_rows) - 1
        for start, words in self._windows()[self.step :]:
            there = start % places
            yield window(self.train_rows, start, words), window(self.valid_rows, there, min(self.settings.bptt, places - there))

    def evaluate(self, weights: Any, alive: Masks | None) -> tuple[float, float]:
        """Loss and perplexity on the validation text, in as many columns as the architecture sees: the norms need them."""
        loss = mean_loss(self.net, self.valid_rows, self.settings.bptt, weights, alive)
        return loss, perplexity(loss)

    def badness(self, row: dict[str, Any]) -> float:
        return row["restricted_loss"]

    def headline(self, row: dict[str, Any]) -> str:
        return f"valid perplexity {row['valid_perplexity']:.1f}"

    def identity(self) -> dict[str, Any]:
        return {"data": self.corpus.name, "text": self.corpus.fingerprint, **super().identity()}


def window(rows: Tensor, start: int, words: int) -> Window:
    return rows[start : start + words], rows[start + 1 : start + 1 + words]
