"""Transformers for text, as models of its characters."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from nas.data.text import END, Corpus, load_corpus
from nas.engine.settings import check
from nas.space.amounts import grouped
from torch import Tensor, nn
from torch.nn import functional as F

from .settings import Optimizer, PruningSettings
from .task import Layer, Quality, Task

EVALUATION_BATCH = 32  # windows


@dataclass(frozen=True)
class TransformerSettings(PruningSettings):
    """A small GPT for characters."""

    usual_lr: ClassVar[dict[str, float]] = {"proxsgd": 1.0, "proxadam": 1e-3}
    out: Path = Path("runs/prune_transformer")
    data_dir: Path | None = None
    """Folder with ptb.train.txt, ptb.valid.txt and ptb.test.txt, or with train.txt, valid.txt and test.txt. Without it the
    text is the documentation of Python's language topics, which comes with Python."""
    characters: int = 0
    """Number of characters of the training text to use; 0: all."""
    valid_characters: int = 0
    """Number of characters of the validation text to use; 0: all."""
    epoch_characters: int = 0
    """Number of them on which the model is evaluated after each epoch; 0: all. The table at the end is measured on all."""
    layers: int = 6
    """Number of layers, each of which has attention and an MLP."""
    width: int = 384
    """Size of the residual stream, a multiple of --heads."""
    heads: int = 12
    """Number of attention heads of each layer."""
    hidden: int = 1536
    """Number of hidden units of each MLP."""
    length: int = 256
    """Number of characters that the model reads at once."""
    dropout: float = 0.1
    """Dropout probability of the embeddings and of what a layer adds to the residual stream, in [0, 1)."""
    optimizer: Optimizer = "proxadam"
    weight_decay: float = 0.1
    clip: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        amounts = ("characters", "valid_characters", "epoch_characters")
        check(self, counts=("layers", "width", "heads", "hidden"), amounts=amounts, shares=("dropout",))
        if self.length < 2:
            raise ValueError(f"length must be >= 2, got {self.length}")
        if self.width % self.heads:
            raise ValueError(f"heads must divide the width {self.width}, got {self.heads}")


class Text(Task):
    """A transformer that predicts the next character, trained on windows of a text."""

    command, network = "prune_transformer", "GPT"
    facts: ClassVar[dict[str, type]] = {"symbols": str}
    qualities = (
        Quality("valid_bits", "bits per character", lambda value: f"{value:.4f}"),
        Quality("valid_perplexity", "perplexity", lambda value: f"{value:.3f}"),
    )

    def __init__(
        self, settings: TransformerSettings, seed: int, device: torch.device, saved: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(settings, seed, device)
        self.settings, s = settings, settings
        self.corpus = load_corpus(s.data_dir)
        train, valid = characters_of(self.corpus, self.corpus.train), characters_of(self.corpus, self.corpus.valid)
        self.symbols = "".join(sorted({*train, *valid})) if saved is None else saved["symbols"]
        self.train = self._numbers(train[: s.characters or None])
        self.valid = self._numbers(valid[: s.valid_characters or None])
        least = s.length * s.batch + s.length
        for name, part, need in (("batch", self.train, least), ("length", self.valid, s.length + 1)):
            if len(part) < need:
                raise ValueError(f"{name} must leave a text of {need} characters, got {getattr(s, name)} for {len(part)}")

    def _numbers(self, text: str) -> Tensor:
        """The numbers of the characters, on the device."""
        number = {symbol: place for place, symbol in enumerate(self.symbols)}
        unknown = sorted({*text} - number.keys())
        if unknown:
            raise ValueError(f"the text must have the {len(self.symbols)} symbols of the network, got {unknown[0]!r}")
        return torch.from_numpy(np.array([number[symbol] for symbol in text], np.int64)).to(self.device)

    def arguments(self) -> dict[str, Any]:
        s = self.settings
        sizes = {name: getattr(s, name) for name in ("layers", "width", "heads", "hidden", "length", "dropout")}
        return {"vocabulary": len(self.symbols), **sizes}

    def about(self) -> dict[str, Any]:
        return {"symbols": self.symbols}

    def identity(self) -> dict[str, Any]:
        return {"text": self.corpus.fingerprint}

    def title(self) -> str:
        s = self.settings
        return f"GPT of {s.layers} layers, width {s.width}, {s.heads} heads and {s.hidden} hidden units"

    def text(self) -> str:
        counts = f"{grouped(len(self.train))} characters to train on, {grouped(len(self.valid))} to validate on"
        return f"{self.corpus.name}: {counts}, {len(self.symbols)} symbols"

    def example(self, samples: int = 1) -> Tensor:
        return self.valid[: self.settings.length].expand(samples, -1)

    def steps(self) -> int:
        return self._windows() // self.settings.batch

    def _windows(self) -> int:
        """The number of windows of an epoch: the last characters leave room for a random start, and for the last target."""
        return len(self.train) // self.settings.length - 1

    def batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Windows that lie one after the other from a random character on, in random order."""
        s, draw = self.settings, np.random.default_rng((self.seed, epoch))
        first = int(draw.integers(s.length))
        order = first + s.length * draw.permutation(self._windows())
        inside = torch.arange(s.length, device=self.device)
        for number in range(start, self.steps()):
            places = torch.from_numpy(order[number * s.batch : (number + 1) * s.batch]).to(self.device)[:, None] + inside
            yield self.train[places], self.train[places + 1]

    def loss(self, net: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, int]:
        inputs, targets = batch
        logits = net(inputs).float().flatten(0, 1)
        correct = (logits.detach().argmax(1) == targets.flatten()).sum()
        return F.cross_entropy(logits, targets.flatten()), correct, targets.numel()

    def training_columns(self, loss: float, accuracy: float) -> dict[str, float]:
        return {"train_loss": loss, "train_bits": loss / math.log(2), "train_accuracy": accuracy}

    @torch.no_grad()
    def evaluate(self, net: nn.Module, whole: bool = True) -> dict[str, float]:
        """The mean loss over windows that lie one after the other; the first characters of each have little before them."""
        total, count = torch.zeros((), dtype=torch.float64, device=self.device), 0
        limit = None if whole else self.settings.epoch_characters or None
        for inputs, targets in self._validation(limit):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.amp):
                logits = net(inputs)
            total += F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum").double()
            count += targets.numel()
        loss = float(total) / count
        return {"valid_loss": loss, "valid_bits": loss / math.log(2), "valid_perplexity": math.exp(min(loss, 700.0))}

    def _validation(self, limit: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """The windows of the validation text. limit: number of its characters to use."""
        length = self.settings.length
        windows = max((min(limit or len(self.valid), len(self.valid)) - 1) // length, 1)
        inputs = self.valid[: windows * length].view(windows, length)
        targets = self.valid[1 : windows * length + 1].view(windows, length)
        yield from zip(inputs.split(EVALUATION_BATCH), targets.split(EVALUATION_BATCH))

    @torch.no_grad()
    def outputs(self, net: nn.Module) -> Iterator[Tensor]:
        for inputs, _ in self._validation():
            yield net(inputs)

    def layers(self, before: nn.Module, after: nn.Module) -> Sequence[Layer]:
        """The heads of all layers, then their hidden units."""
        found = []
        for kind, part in (("attention heads", "attention.query"), ("hidden units", "fc1")):
            for number in range(self.settings.layers):
                name = f"blocks.{number}.{part}"
                rows = [len(net.get_submodule(name).weight) for net in (before, after)]
                size = before.get_submodule(f"blocks.{number}.attention").size if kind == "attention heads" else 1
                found.append(Layer(f"layer {number + 1}", kind, *(count // size for count in rows)))
        return found


def characters_of(corpus: Corpus, words: np.ndarray) -> str:
    """A part of a corpus as characters: words with a space between them, and a line end for the end of a line."""
    spelt = ("\n" if word == END else word for word in (corpus.vocabulary[number] for number in words))
    return " ".join(spelt).replace(" \n ", "\n").replace(" \n", "\n")
