"""Bilevel search of a recurrent cell in JAX. Windows and hidden states as in `bilevel.search_text`.

row = launch(partial(TextSearch, SparseSupernet, settings, 0, out), settings, out)
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from ...data import text
from ...data.text import perplexity
from ...engine.jax.devices import Devices
from ...engine.jax.run import BATCH, NETWORK
from ...nets.jax.rnn import RecurrentSupernet, cell_size, mean_loss
from ...nets.recurrent import CELL, Drops
from ...space import spaces
from ...space.genotype import RecurrentGenotype
from ...space.spaces import Masks
from ..outcome import TextOutcome
from ..settings import TextSearchSettings
from .method import Method
from .search import BilevelSearch
from .steps import Nodes, TextData, TextPlace, TextSteps


class TextSearch(TextOutcome, BilevelSearch):
    """A bilevel search on text."""

    settings: TextSearchSettings
    steps: TextSteps
    genotype_size = staticmethod(cell_size)

    def __init__(self, method: type[Method], settings: TextSearchSettings, seed: int, out: Path, devices: Devices) -> None:
        super().__init__(method, settings, seed, out, devices)
        space = spaces.get_space(settings.space, RecurrentGenotype)
        self.corpus = text.load_corpus(settings.data_dir)
        columns = lambda words: text.text_columns(words, settings.batch).astype(np.int32)
        rows = columns(self.corpus.train[: settings.tokens or None]), columns(self.corpus.valid)
        self.train_rows, self.valid_rows = rows
        rngs = nnx.Rngs(self.keys[NETWORK])
        net = RecurrentSupernet(space, len(self.corpus.vocabulary), settings.hidden, Drops.of(settings), rngs=rngs)
        self.graph, params = nnx.split(net, nnx.Param)
        self.prepare(self.graph, params, space, TextSteps, len(self))
        padded = [np.pad(r, ((0, settings.bptt + 1), (0, 0))) for r in rows]
        self.data = devices.replicate(TextData(*padded))

    def __len__(self) -> int:
        return len(self._windows())

    def _windows(self) -> list[tuple[int, int]]:
        return text.windows(len(self.train_rows), self.settings.bptt, self.seed, self.epoch)

    def begin_epoch(self) -> None:
        if self.step == 0:
            own = self.devices.replicate(self.steps.reset_states(self.search.params))
            self.search = self.search._replace(own=own)
        super().begin_epoch()

    def nodes_of_program(self, is_active: Any) -> Nodes:
        """The nodes with active paths: one without stays so, as its paths get no gradient (`TextSteps.probed`)."""
        into = [path.node for path in self.space.paths(CELL)]
        nodes = {node for node, active in zip(into, np.asarray(is_active[CELL]).tolist()) if active}
        return None if len(nodes) == len(self.space.layout.nodes) else tuple(sorted(nodes))

    def batches(self) -> Iterator[tuple[int, int]]:
        return iter(self._windows()[self.step :])

    def place(self, batch: tuple[int, int]) -> TextPlace:
        start, length = batch
        places = len(self.valid_rows) - 1
        there = start % places
        numbers = (start, length, there, min(self.settings.bptt, places - there))
        return TextPlace(
            np.int32(self.epoch), np.int32(self.step), np.float32(self.rate()), self.keys[BATCH], *map(np.int32, numbers)
        )

    def means(self) -> tuple[float, float]:
        total, words, _ = self.take_sums()
        return total / words, perplexity(total / words)

    def measured(self, weights: Any, active: Masks) -> tuple[float, float]:
        """Compute loss and perplexity on the validation text, with the batch size of the search, on which batch norms depend."""
        net = nnx.merge(self.graph, self.search.params)
        flags = {cell: jnp.array(mask) for cell, mask in active.items()}
        loss = mean_loss(net, jnp.asarray(self.valid_rows), self.settings.bptt, weights, None, flags)
        return loss, perplexity(loss)

    def identity(self) -> dict[str, Any]:
        return {"data": self.corpus.name, "text": self.corpus.fingerprint, **super().identity()}
