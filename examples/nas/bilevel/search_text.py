"""Bilevel search of a recurrent cell: network weights on the training text, architecture on the validation text.

    row = launch(partial(TextSearch, SparseSupernet, settings, 0, out), settings, out)

Both texts are batches of columns, with hidden states that are carried from window to window. As published, the validation window
starts at the position of the training window, modulo the length of the validation text, with the hidden state of the last
architecture step.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..data import text
from ..data.text import Window, perplexity, window
from ..engine.distributed import Processes, require_single_process
from ..nets.torch.rnn import Drops, RecurrentSupernet, cell_size, mean_loss
from ..space import spaces
from ..space.genotype import RecurrentGenotype
from ..space.spaces import Masks
from .method import Method
from .outcome import TextOutcome
from .search import BilevelSearch
from .settings import TextSearchSettings
from .steps import TextSteps


class TextSearch(TextOutcome, BilevelSearch):
    """A bilevel search on text."""

    steps: TextSteps
    genotype_size = staticmethod(cell_size)

    def __init__(
        self, method: type[Method], settings: TextSearchSettings, seed: int, out: Path, processes: Processes, device: torch.device
    ) -> None:
        super().__init__(method, settings, seed, out, processes, device)
        require_single_process(processes)
        space = spaces.get_space(settings.space, RecurrentGenotype)
        self.corpus = text.load_corpus(settings.data_dir)
        columns = lambda words: torch.from_numpy(text.text_columns(words, settings.batch)).to(device)
        self.train_rows, self.valid_rows = columns(self.corpus.train[: settings.tokens or None]), columns(self.corpus.valid)
        net = RecurrentSupernet(space, len(self.corpus.vocabulary), settings.hidden, Drops.of(settings))
        if settings.compiled:
            net.fuse()
        self.prepare(net, TextSteps)

    def __len__(self) -> int:
        return len(self._windows())

    def _windows(self) -> list[tuple[int, int]]:
        return text.windows(len(self.train_rows), self.settings.bptt, self.seed, self.epoch)

    def begin_epoch(self) -> None:
        if self.step == 0:
            self.steps.reset_states()
        super().begin_epoch()

    def batches(self) -> Iterator[tuple[Window, Window]]:
        places = len(self.valid_rows) - 1
        for start, words in self._windows()[self.step :]:
            there = start % places
            yield window(self.train_rows, start, words), window(self.valid_rows, there, min(self.settings.bptt, places - there))

    def evaluate(self, weights: Any, active: Masks | None) -> tuple[float, float]:
        """Compute loss and perplexity on the validation text, with the batch size of the search, on which batch norms depend."""
        loss = mean_loss(self.net, self.valid_rows, self.settings.bptt, weights, active)
        return loss, perplexity(loss)

    def identity(self) -> dict[str, Any]:
        return {"data": self.corpus.name, "text": self.corpus.fingerprint, **super().identity()}
