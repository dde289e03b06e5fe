"""Recurrent language models: the supernet of a search, the network of a genotype, and an LSTM for comparison.

    net = RecurrentSupernet(get_space("recurrent", RecurrentGenotype), vocabulary=10_000, hidden=300)
    states, last = net(words, net.start(batch), net.draw(batch), {"recurrent": a}, active)   # a: a weight for each path
    net = RecurrentNetwork(genotype, vocabulary=10_000, hidden=850)
    loss, states, last = net.loss(words, targets, net.start(batch), net.draw(batch))

The cell, for each word x with the last hidden state h:

    s_0 = h + sigmoid(c) (tanh(d) - h),                    [c, d] = [x * m_x, h * m_h] W_0
    s_i = sum over paths (j, o) into node i of
              a_jo (s_j + sigmoid(c_j) (o(d_j) - s_j)),    [c_j, d_j] = (s_j * m_h) W_i
    h   = mean of the active nodes

In the supernet a are the architecture weights, and s_0 and all s_i are normalised by a batch norm without scale and shift; in the
network of a genotype every path into a node has the weight 1 / (number of paths into it), and there is no norm. The dropout masks
m are drawn once for a batch and shared by its words; m_h is shared by all nodes. The decoder is the embedding.

Sources: Liu, Simonyan, Yang, "DARTS", 2019 (cell, model, dropouts); Wu et al., "Neural architecture search as sparse supernet",
2021 (linear weights, several paths into a node).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...space.genotype import RecurrentGenotype
from ...space.spaces import Masks, Space, Weights
from ..recurrent import CELL, RANGE, Dropped, Drops, NodePaths, genotype_paths, supernet_paths
from .recurrent_kernels import node, node_reference, product, vocabulary_loss

KERNELS = 256  # limit of the kernels that torch.compile makes of a node


class LanguageModel(nn.Module):
    """Embedding, a recurrent part that subclasses define, and the embedding as decoder."""

    def __init__(self, vocabulary: int, hidden: int, drops: Drops | None = None):
        super().__init__()
        self.hidden, self.drops = hidden, drops or Drops()
        self.embedding = uniform(vocabulary, hidden)
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def start(self, batch: int) -> Any:
        """The hidden state before the first word."""
        return self.embedding.new_zeros(batch, self.hidden)

    def draw(self, batch: int) -> Dropped:
        """Draw the dropout masks of the next batch; none in evaluation mode."""
        if not self.training:
            return Dropped()
        d, shape = self.drops, (batch, self.hidden)
        shapes = {"words": (len(self.embedding), 1), "embedding": shape, "input": shape, "hidden": shape, "output": shape}
        return Dropped(**{name: self._factors(getattr(d, name), shape) for name, shape in shapes.items()})

    def _factors(self, share: float, shape: tuple[int, int]) -> Tensor | None:
        if not share:
            return None
        return torch.empty(shape, device=self.embedding.device).bernoulli_(1 - share).div_(1 - share)

    def forward(self, words: Tensor, state: Any, dropped: Dropped | None = None, *args: Any) -> tuple[Tensor, Any]:
        """Return the hidden states (T, batch, hidden) of words (T, batch), and the last state."""
        dropped = dropped or Dropped()
        x = F.embedding(words, times(self.embedding, dropped.words))
        return self.recur(times(times(x, dropped.embedding), dropped.input), state, dropped.hidden, *args)

    def recur(self, x: Tensor, state: Any, mask: Tensor | None, *args: Any) -> tuple[Tensor, Any]:
        """The recurrence over x (T, batch, hidden), which is masked already. mask: of the hidden states."""
        raise TypeError(f"{type(self).__name__} must define recur")

    def loss(
        self, words: Tensor, targets: Tensor, state: Any, dropped: Dropped | None = None, *args: Any
    ) -> tuple[Tensor, Tensor, Any]:
        """Return the mean cross entropy of the targets (T, batch), the hidden states, and the last state."""
        states, last = self(words, state, dropped, *args)
        out = times(states, (dropped or Dropped()).output)
        return vocabulary_loss(out.flatten(0, 1), self.embedding, self.bias, targets.flatten()), states, last


def uniform(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape).uniform_(-RANGE, RANGE))


def times(x: Tensor, factors: Tensor | None) -> Tensor:
    return x if factors is None else x * factors


class Mixture(NamedTuple):
    """The paths into a node: its sources, their weights (sources, 4), and the indices of the operations in use."""

    node: int
    sources: tuple[int, ...]
    weights: Tensor
    used: tuple[int, ...]


class CellModel(LanguageModel):
    """A language model with the cell above. nodes: those with a weight matrix."""

    def __init__(self, nodes: Sequence[int], vocabulary: int, hidden: int, drops: Drops | None = None, norm: bool = False):
        super().__init__(vocabulary, hidden, drops)
        self.norm = norm
        self.entry = uniform(2 * hidden, 2 * hidden)
        self.products = nn.ParameterDict({str(n): uniform(hidden, 2 * hidden) for n in nodes})
        self.one_node = node

    def fuse(self) -> None:
        """Let torch.compile make a kernel of each node, one for each set of paths into it."""
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, KERNELS)
        self.one_node = torch.compile(node_reference, dynamic=False)

    def recur(self, x: Tensor, state: Tensor, mask: Tensor | None, mixtures: Sequence[Mixture] = ()) -> tuple[Tensor, Tensor]:
        from_word, from_state = self.entry.split(self.hidden)
        outputs = []
        for projected in product(x.flatten(0, 1), from_word).unflatten(0, x.shape[:2]).unbind():
            gate, new = (projected + product(times(state, mask), from_state)).chunk(2, 1)
            states = {0: self._normed(torch.lerp(state, new.tanh(), gate.sigmoid()))}
            for m in mixtures:
                into = [states[source] for source in m.sources]
                found = self.one_node(m.used, m.weights, self.products[str(m.node)], mask, into)
                states[m.node] = self._normed(found)
            state = torch.stack([states[m.node] for m in mixtures]).mean(0)
            outputs.append(state)
        return torch.stack(outputs), state

    def _normed(self, x: Tensor) -> Tensor:
        # batch statistics in evaluation too: nine nodes share the norm, and no running statistics fit all of them
        return F.batch_norm(x, None, None, training=True) if self.norm else x


class RecurrentSupernet(CellModel):
    """A language model whose cell has all paths of a space.

    weights: one for each path; None: all 1. active: flags of the paths to compute; None: all. Paths whose source has no active
    path are not computed, and nodes without active paths do not enter the mean.
    """

    def __init__(self, space: Space, vocabulary: int, hidden: int = 300, drops: Drops | None = None):
        super().__init__(space.layout.nodes, vocabulary, hidden, drops, norm=True)
        self.space = space
        self._plans: dict[Any, list[tuple[NodePaths, Tensor]]] = {}

    def recur(  # type: ignore[override]
        self, x: Tensor, state: Tensor, mask: Tensor | None, weights: Weights | None = None, active: Masks | None = None
    ) -> tuple[Tensor, Tensor]:
        paths = len(self.space.paths(CELL))
        w = x.new_ones(paths) if weights is None else weights[CELL]
        if w.shape != (paths,):
            raise ValueError(f"{CELL}: weights have shape ({paths},), got {tuple(w.shape)}")
        padded = F.pad(w, (0, 1))  # the last entry is the weight of paths that are inactive or not in the space
        active = None if active is None else tuple(active[CELL])
        mixtures = [Mixture(to.node, to.sources, padded[places], to.used) for to, places in self._plan(active)]
        return super().recur(x, state, mask, mixtures)

    def _plan(self, active: tuple[bool, ...] | None) -> list[tuple[NodePaths, Tensor]]:
        """For each active node its paths, and the indices of the weights of (source, operation)."""
        if active not in self._plans:
            absent = len(self.space.paths(CELL))
            plan = []
            for found in supernet_paths(self.space, active):
                places = [[absent if path is None else path for path in row] for row in found.paths]
                plan.append((found, torch.tensor(places, device=self.embedding.device)))
            self._plans = {active: plan, **dict(list(self._plans.items())[:7])}
        return self._plans[active]


class RecurrentNetwork(CellModel):
    """The language model of a genotype without its dead ends."""

    def __init__(self, genotype: RecurrentGenotype, vocabulary: int, hidden: int = 850, drops: Drops | None = None):
        into = genotype_paths(genotype)
        super().__init__([to.node for to in into], vocabulary, hidden, drops)
        self.into = into
        for to in into:
            counts = torch.tensor([[float(path is not None) for path in row] for row in to.paths])
            self.register_buffer(f"counts_{to.node}", counts, persistent=False)

    def recur(self, x: Tensor, state: Tensor, mask: Tensor | None, *args: Any) -> tuple[Tensor, Tensor]:
        counts = [getattr(self, f"counts_{to.node}") for to in self.into]
        mixtures = [Mixture(to.node, to.sources, c / c.sum(), to.used) for to, c in zip(self.into, counts)]
        return super().recur(x, state, mask, mixtures)


class LSTM(LanguageModel):
    """An LSTM layer with the same embedding, dropout and decoder. state: output and cell state, (2, batch, hidden)."""

    def __init__(self, vocabulary: int, hidden: int = 850, drops: Drops | None = None):
        super().__init__(vocabulary, hidden, drops)
        self.entry = uniform(2 * hidden, 4 * hidden)
        self.shift = nn.Parameter(torch.zeros(4 * hidden))

    def start(self, batch: int) -> Tensor:
        return self.embedding.new_zeros(2, batch, self.hidden)

    def recur(self, x: Tensor, state: Tensor, mask: Tensor | None, *args: Any) -> tuple[Tensor, Tensor]:
        from_word, from_state = self.entry.split(self.hidden)
        out, memory = state
        outputs = []
        for projected in (product(x.flatten(0, 1), from_word) + self.shift).unflatten(0, x.shape[:2]).unbind():
            taken, kept, shown, new = (projected + product(times(out, mask), from_state)).chunk(4, 1)
            memory = kept.sigmoid() * memory + taken.sigmoid() * new.tanh()
            out = shown.sigmoid() * memory.tanh()
            outputs.append(out)
        return torch.stack(outputs), torch.stack([out, memory])


def parameter_count(model: nn.Module) -> int:
    """The number of parameters."""
    return sum(p.numel() for p in model.parameters())


def cell_size(found: RecurrentGenotype, vocabulary: int = 10_000, hidden: int = 850) -> dict[str, int]:
    """The parameters of the language model of a genotype, by default of the size for Penn Treebank."""
    with torch.device("meta"):
        return {"parameters": parameter_count(RecurrentNetwork(found, vocabulary, hidden))}


@torch.no_grad()
def mean_loss(model: LanguageModel, rows: Tensor, bptt: int, *args: Any) -> float:
    """Mean cross entropy of a text (rows, columns), with the hidden state carried through all rows.

    As published, the sum is divided by the number of rows, although the first row is not predicted.
    """
    training = model.training
    model.eval()
    total, state = rows.new_zeros((), dtype=torch.float64), model.start(rows.shape[1])
    for start in range(0, len(rows) - 1, bptt):
        words = rows[start : start + bptt + 1]
        loss, _, state = model.loss(words[:-1], words[1:], state, None, *args)
        total += loss.double() * (len(words) - 1)
    model.train(training)
    return float(total) / len(rows)
