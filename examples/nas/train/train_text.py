"""Training of recurrent networks: SGD, averaged once validation stops improving, and rollback to the best epoch on divergence.

    row = launch(partial(TextTraining, genotype, settings, 0, out), settings, out)

Writes to `out`: settings.json, genotype.json and vocabulary.json at the start, checkpoint.pt, train.csv, and at the end
train.png, network.pt (the weights of the best epoch) and result.json (perplexities). `nas.load` reads the network.

Sources: Merity, Keskar, Socher, "Regularizing and optimizing LSTM language models", 2018 (the switch, the averages, the lengths
of windows); Liu, Simonyan, Yang, "DARTS", 2019 (settings, rollback).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data import text
from ..data.text import Window, perplexity, window
from ..engine import checkpoint, curves
from ..engine.distributed import Processes, require_single_process
from ..engine.loop import checkpoint_exists
from ..engine.run import Run
from ..nets.torch.rnn import LSTM, CellModel, Drops, LanguageModel, RecurrentNetwork, mean_loss, parameter_count
from ..space import drawing
from ..space.files import write_text
from ..space.genotype import RecurrentGenotype
from .settings import TextTrainSettings
from .weights import read_weights

SPREAD = 5.0  # standard deviation of the lengths of windows
ROLLBACKS = 20  # before a training ends with an error


def language_model(cell: RecurrentGenotype | None, vocabulary: int, settings: TextTrainSettings) -> LanguageModel:
    """The language model of a cell; None: an LSTM."""
    if cell is None:
        return LSTM(vocabulary, settings.hidden, Drops.of(settings))
    return RecurrentNetwork(cell, vocabulary, settings.hidden, Drops.of(settings))


def size_of_cell(cell: RecurrentGenotype | None, settings: TextTrainSettings) -> dict[str, int]:
    """Count the parameters. Returns {"parameters": ..., "vocabulary": words}; without a text, for the 10 000 words of PTB."""
    words = 10_000 if settings.data_dir is None else len(text.load_corpus(settings.data_dir).vocabulary)
    with torch.device("meta"):
        return {"parameters": parameter_count(language_model(cell, words, settings)), "vocabulary": words}


class TextTraining(Run):
    """The training of the language model of a cell, or of an LSTM if it is None, with one seed."""

    kind, table, command = "training", "train.csv", "train_ptb"
    settings: TextTrainSettings
    sgd: torch.optim.Optimizer

    def __init__(
        self,
        cell: RecurrentGenotype | None,
        settings: TextTrainSettings,
        seed: int,
        out: Path,
        processes: Processes,
        device: torch.device,
    ) -> None:
        super().__init__(settings, seed, out, processes, device)
        require_single_process(processes)
        s, self.cell = settings, cell
        self.corpus = text.load_corpus(s.data_dir)
        columns = lambda *args: torch.from_numpy(text.text_columns(*args)).to(device)
        self.rows_of = {
            "train": columns(self.corpus.train[: s.tokens or None], s.batch),
            "valid": columns(self.corpus.valid, s.valid_batch, "valid_batch"),
            "test": columns(self.corpus.test, s.test_batch, "test_batch"),
        }
        self.net = language_model(cell, len(self.corpus.vocabulary), s).to(device)
        if s.start is not None and not checkpoint_exists(out, "torch"):
            self.net.load_state_dict(read_weights(s.start, self.net))
        if s.compiled and isinstance(self.net, CellModel):
            self.net.fuse()
        self.params = list(self.net.parameters())
        self.averages = False  # whether averaging has started
        self.sgd = self._optimizer()
        self.hidden = self.net.start(s.batch)
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)
        self.losses: list[float] = []  # validation loss of each epoch
        self.rollbacks = 0
        self.best = self._copy()
        self.found: dict[str, Any] = {}

    def _optimizer(self) -> torch.optim.Optimizer:
        s = self.settings
        if self.averages:
            return torch.optim.ASGD(self.params, s.lr, lambd=0.0, t0=0.0, weight_decay=s.weight_decay, foreach=True)
        return torch.optim.SGD(self.params, s.lr, weight_decay=s.weight_decay, foreach=True)

    def _now(self) -> dict[str, Any]:
        """The present state: weights and optimizer."""
        return {"net": self.net.state_dict(), "averages": self.averages, "sgd": self.sgd.state_dict()}

    def _copy(self) -> dict[str, Any]:
        return copy.deepcopy(self._now())

    def __len__(self) -> int:
        return len(self._windows())

    def _windows(self) -> list[tuple[int, int]]:
        return text.windows(len(self.rows_of["train"]), self.settings.bptt, self.seed, self.epoch, SPREAD)

    def begin_epoch(self) -> None:
        if self.step == 0:
            self.hidden = self.net.start(self.settings.batch)
        self.net.train()

    def batches(self) -> Iterator[Window]:
        for start, words in self._windows()[self.step :]:
            yield window(self.rows_of["train"], start, words)

    def train_step(self, batch: Window) -> None:
        s, (words, targets) = self.settings, batch
        loss, states, last = self.net.loss(words, targets, self.hidden, self.net.draw(s.batch))
        if not torch.isfinite(loss):
            self._roll_back()
            return
        self.hidden = last.detach()
        self.sgd.zero_grad()
        (loss + s.temporal * (states[1:] - states[:-1]).pow(2).mean()).backward()
        if s.clip:
            nn.utils.clip_grad_norm_(self.params, s.clip)
        self.sgd.param_groups[0]["lr"] = s.lr * len(words) / s.bptt
        self.sgd.step()
        self.sgd.param_groups[0]["lr"] = s.lr
        self.sums += torch.stack([loss.detach().double() * targets.numel(), self.sums.new_tensor(targets.numel())])

    def _roll_back(self) -> None:
        """Return to the state of the best epoch and continue there with the next windows and masks of this one.

        As in the published code an error in the first epoch, when there is no such state, and after that a bounded number of
        times, so that the training ends with a network that it has trained.
        """
        if not self.losses:
            self.check_finite("train", float("nan"))
        self.rollbacks += 1
        if self.rollbacks > ROLLBACKS:
            raise ValueError(f"the loss was not finite {self.rollbacks} times: lr {self.settings.lr:g} is too large")
        self._return_to(self.best)
        self.hidden = self.net.start(self.settings.batch)

    def _return_to(self, kept: dict[str, Any]) -> None:
        self.net.load_state_dict(kept["net"])
        self.averages = kept["averages"]
        self.sgd = self._optimizer()
        self.sgd.load_state_dict(copy.deepcopy(kept["sgd"]))  # the optimizer would update the tensors of `kept` in place

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Context in which the averages, once there are some, replace the weights."""
        if not self.averages:
            yield
            return
        own = [p.detach().clone() for p in self.params]
        with torch.no_grad():
            for p in self.params:
                p.copy_(self.sgd.state[p]["ax"] if p in self.sgd.state else p)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self.params, own)

    def end_epoch(self) -> dict[str, Any]:
        s = self.settings
        total, words = self.sums.tolist()
        self.sums.zero_()
        loss = self._validate()
        if not loss < float("inf"):  # diverged in the last steps
            self._roll_back()
            loss = self._validate()
        was_averaged = self.averages
        if loss < min(self.losses, default=float("inf")):
            with self.averaged():
                self.best = self._copy()
        early = self.losses[: -s.patience]
        if not self.averages and early and loss > min(early):
            self.averages = True
            self.sgd = self._optimizer()
        self.losses.append(loss)
        train = total / words if words else float("nan")
        return {
            "lr": s.lr,
            "train_loss": train,
            "train_perplexity": perplexity(train),
            "valid_loss": loss,
            "valid_perplexity": perplexity(loss),
            "averaged": int(was_averaged),
            "rollbacks": self.rollbacks,
        }

    def _validate(self) -> float:
        with self.averaged():
            return mean_loss(self.net, self.rows_of["valid"], self.settings.bptt)

    def title(self) -> str:
        return "an LSTM" if self.cell is None else f"the network of {self.settings.genotype}"

    def data_text(self) -> str:
        return text.describe(self.corpus, self.settings.tokens)

    def result(self) -> dict[str, Any]:
        best = min(self.rows, key=lambda row: row["valid_loss"])
        return {**best, "rollbacks": self.rollbacks, **self.found}

    def finish(self) -> None:
        own = self._copy()
        self._return_to(self.best)
        test = mean_loss(self.net, self.rows_of["test"], self.settings.bptt)
        self.check_finite("test", test)
        self.found = {"test_loss": test, "test_perplexity": perplexity(test), "parameters": parameter_count(self.net)}
        checkpoint.save_network(self.out / "network.pt", self.net)
        self._return_to(own)
        drawing.save(curves.perplexities(self.rows), self.out / "train.png")

    def write_settings(self) -> None:
        super().write_settings()
        write_text(self.out / "vocabulary.json", json.dumps(self.corpus.vocabulary, ensure_ascii=False) + "\n")
        if self.cell is not None:
            self.cell.save(self.out / "genotype.json")

    def identity(self) -> dict[str, Any]:
        cell = "LSTM" if self.cell is None else self.cell.to_json()
        return {"architecture": cell, "data": self.corpus.name, "text": self.corpus.fingerprint, **super().identity()}

    def state(self) -> dict[str, Any]:
        rest = {"hidden": self.hidden, "sums": self.sums, "losses": self.losses, "rollbacks": self.rollbacks}
        return {"own": self._now(), "best": self.best, **rest}

    def restore(self, state: dict[str, Any]) -> None:
        self._return_to(state["own"])
        self.best, self.hidden = state["best"], state["hidden"]
        self.losses, self.rollbacks = list(state["losses"]), state["rollbacks"]
        self.sums.copy_(state["sums"])
