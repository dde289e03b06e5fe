"""Recurrent language models in flax nnx: the supernet of a search, and the network of a genotype.

    net = RecurrentSupernet(get_space("recurrent", RecurrentGenotype), vocabulary=10_000, hidden=300, rngs=nnx.Rngs(0))
    graph, params = nnx.split(net, nnx.Param)
    net = nnx.merge(graph, params)                                          # inside of jax.jit
    dropped = net.draw(key, batch)
    loss, states, last = net.loss(words, targets, net.start(batch), dropped, {"recurrent": a}, active, {"recurrent": is_active})

The cell is that of `nets.torch.rnn`. For each word x with the last hidden state h:

    s_0 = h + sigmoid(c) (tanh(d) - h),                    [c, d] = [x * m_x, h * m_h] W_0
    s_i = sum over paths (j, o) into node i of
              a_jo (s_j + sigmoid(c_j) (o(d_j) - s_j)),    [c_j, d_j] = (s_j * m_h) W_i
    h   = mean of the active nodes

All paths into a node are one batched product and one fused sum. The loop over words is a `lax.scan`.

Parameters and batch statistics are float32, or wider where the parameters are; `dtype` is that of activations and products.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from ...space.genotype import RecurrentGenotype
from ...space.spaces import Masks, Space, Weights
from ..recurrent import CELL, OPERATIONS, RANGE, Dropped, Drops, NodePaths, genotype_paths, supernet_paths

ACTIVATIONS = {"tanh": jnp.tanh, "relu": jax.nn.relu, "sigmoid": jax.nn.sigmoid, "identity": lambda x: x}
FUNCTIONS = [ACTIVATIONS[name] for name in OPERATIONS]
EPS = 1e-5  # of batch norms


class LanguageModel(nnx.Module):
    """Embedding, the cell above, and the embedding as decoder.

    nodes: those with a weight matrix; `products` holds the matrices in this order. norm: whether s_0 and all s_i are normalised
    by batch norms without scale and shift, always with batch statistics.
    """

    def __init__(
        self,
        nodes: tuple[int, ...],
        vocabulary: int,
        hidden: int,
        drops: Drops | None = None,
        norm: bool = False,
        *,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
    ) -> None:
        self.nodes, self.vocabulary, self.hidden = nodes, vocabulary, hidden
        self.drops, self.norm, self.dtype = drops or Drops(), norm, jnp.dtype(dtype)
        uniform = lambda *shape: nnx.Param(jax.random.uniform(rngs.params(), shape, jnp.float32, -RANGE, RANGE))
        self.embedding = uniform(vocabulary, hidden)
        self.bias = nnx.Param(jnp.zeros(vocabulary, jnp.float32))
        self.entry = uniform(2 * hidden, 2 * hidden)
        self.products = uniform(len(nodes), hidden, 2 * hidden)

    def start(self, batch: int) -> Array:
        """The hidden state before the first word."""
        return jnp.zeros((batch, self.hidden), self.dtype)

    def draw(self, key: Array, batch: int) -> Dropped:
        """Draw the dropout masks of the next batch."""
        shape = (batch, self.hidden)
        shapes = {"words": (self.vocabulary, 1), "embedding": shape, "input": shape, "hidden": shape, "output": shape}
        masks = {}
        for (name, shape), part in zip(shapes.items(), jax.random.split(key, len(shapes))):
            share = getattr(self.drops, name)
            if share:
                kept = jax.random.bernoulli(part, 1 - share, shape)
                masks[name] = jnp.where(kept, 1 / (1 - share), 0).astype(self.dtype)
        return Dropped(**masks)

    def __call__(self, words: Array, state: Array, dropped: Dropped | None = None, *args: Any) -> tuple[Array, Array]:
        """Return the hidden states (T, batch, hidden) of words (T, batch), and the last state."""
        masks = dropped or Dropped()
        x = self.embedding[...][words].astype(self.dtype)
        if masks.words is not None:
            x = x * masks.words[words].astype(self.dtype)
        x = times(times(x, masks.embedding), masks.input)
        return self.recur(x, state.astype(self.dtype), masks.hidden, *args)

    def recur(self, x: Array, state: Array, mask: Array | None, *args: Any) -> tuple[Array, Array]:
        """The recurrence over x (T, batch, hidden), which is masked already. mask: of the hidden states."""
        raise TypeError(f"{type(self).__name__} must define recur")

    def word_losses(
        self, words: Array, targets: Array, state: Array, dropped: Dropped | None = None, *args: Any
    ) -> tuple[Array, Array, Array]:
        """Return the cross entropy of each target (T, batch), the hidden states, and the last state."""
        states, last = self(words, state, dropped, *args)
        out = times(states, (dropped or Dropped()).output)
        return vocabulary_losses(out, self.embedding[...], self.bias[...], targets), states, last

    def loss(
        self, words: Array, targets: Array, state: Array, dropped: Dropped | None = None, *args: Any
    ) -> tuple[Array, Array, Array]:
        """Return the mean cross entropy of the targets (T, batch), the hidden states, and the last state.

        Args:
          words: (T, batch). targets: the words that follow them, (T, batch).
          state: the hidden state before the first word, (batch, hidden).
          dropped: dropout masks from `draw`; None: no dropout.
          args: of the cell; see `RecurrentSupernet`.
        """
        losses, states, last = self.word_losses(words, targets, state, dropped, *args)
        return losses.mean(), states, last

    def scan(
        self,
        x: Array,
        state: Array,
        mask: Array | None,
        mixtures: list[tuple[NodePaths, Array]],
        computed: Array | None = None,
    ) -> tuple[Array, Array]:
        """Run the cell over x. mixtures: the paths into each node, with their weights (sources, operations in use).

        computed: flags of the nodes of `mixtures` that enter the mean; None: all.
        """
        cast = lambda w: w.astype(self.dtype)
        from_word, from_state = jnp.split(cast(self.entry[...]), 2)
        # slices outside of the loop: the gradient of a slice inside of it would be a sum over all nodes for each word
        products = [cast(self.products[self.nodes.index(to.node)]) for to, _ in mixtures]
        enters = jnp.ones(len(mixtures), bool) if computed is None else computed
        shares = (enters / jnp.maximum(enters.sum(), 1)).astype(wide(x).dtype)[:, None, None]

        def word(state: Array, projected: Array) -> tuple[Array, Array]:
            gate, new = jnp.split(projected + times(state, mask) @ from_state, 2, 1)
            states = {0: self._normed(state + jax.nn.sigmoid(gate) * (jnp.tanh(new) - state))}
            for (to, weights), product in zip(mixtures, products):
                into = jnp.stack([states[source] for source in to.sources])
                states[to.node] = self._normed(mixed(into, times(into, mask) @ product, weights, to.used))
            nodes = wide(jnp.stack([states[to.node] for to, _ in mixtures]))
            state = (nodes * shares).sum(0).astype(self.dtype)
            return state, state

        # the gradient keeps the products of each word and computes the activations again: it takes half the time on a CPU
        kept = jax.checkpoint(word, prevent_cse=False, policy=jax.checkpoint_policies.dots_saveable)
        last, states = lax.scan(kept, state, x @ from_word)
        return states, last

    def _normed(self, x: Array) -> Array:
        if not self.norm:
            return x.astype(self.dtype)
        x = wide(x)
        centred = x - x.mean(0)
        return (centred * lax.rsqrt((centred * centred).mean(0) + EPS)).astype(self.dtype)


def mixed(s: Array, product: Array, weights: Array, used: tuple[int, ...]) -> Array:
    """The sum of the paths into a node, in float32 or wider: sum_j sum_o a_jo (s_j + sigmoid(c_j) (f_o(d_j) - s_j)).

    Args:
      s: the sources, (sources, batch, hidden). product: [c, d], (sources, batch, 2 hidden).
      weights: a, (sources, operations in use). used: the indices of these operations.
    """
    c, d = jnp.split(product, 2, -1)
    gate = jax.nn.sigmoid(c)
    values = sum(weights[:, k, None, None] * FUNCTIONS[o](d) for k, o in enumerate(used))
    return (weights.sum(1)[:, None, None] * s * (1 - gate) + gate * values).sum(0)


def vocabulary_losses(x: Array, embedding: Array, bias: Array, targets: Array) -> Array:
    """The cross entropy of softmax(x embedding^T + bias) for each target: x (T, batch, hidden), targets (T, batch).

    The scores of the targets are products of their own: the gradient of an index into all scores would be a scatter into them.
    """
    weight = embedding.astype(x.dtype)
    scores = jnp.einsum("tbh,vh->tbv", x, weight, preferred_element_type=wide(x).dtype) + bias
    wanted = jnp.einsum("tbh,tbh->tb", x, weight[targets], preferred_element_type=wide(x).dtype) + bias[targets]
    return jax.nn.logsumexp(scores, -1) - wanted


def times(x: Array, factors: Array | None) -> Array:
    return x if factors is None else x * factors.astype(x.dtype)


def wide(x: Array) -> Array:
    """In float32, or wider if x is."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class RecurrentSupernet(LanguageModel):
    """A language model whose cell has all paths of a space.

    The methods take after the dropout masks:

      weights: {"recurrent": (paths,) array}, a weight for each path; None: all 1.
      active: static flags of the paths to compute; None: all. Paths whose source has no active path are not computed, and nodes
        without active paths do not enter the mean.
      is_active: {"recurrent": (paths,) array of flags}, traced; None: all active. The result is that of `active` with these flags
        set, whichever paths are computed, so that one compiled function serves for all sets of paths within `active`.
    """

    def __init__(
        self,
        space: Space,
        vocabulary: int,
        hidden: int = 300,
        drops: Drops | None = None,
        *,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
    ) -> None:
        super().__init__(space.layout.nodes, vocabulary, hidden, drops, norm=True, rngs=rngs, dtype=dtype)
        self.space = space

    def recur(  # type: ignore[override]
        self,
        x: Array,
        state: Array,
        mask: Array | None,
        weights: Weights | None = None,
        active: Masks | None = None,
        is_active: Weights | None = None,
    ) -> tuple[Array, Array]:
        paths = len(self.space.paths(CELL))
        w = jnp.ones(paths, wide(x).dtype) if weights is None else weights[CELL]
        if w.shape != (paths,):
            raise ValueError(f"{CELL}: weights have shape ({paths},), got {tuple(w.shape)}")
        plan = supernet_paths(self.space, None if active is None else tuple(active[CELL]))
        computed = None
        if is_active is not None:
            flags = is_active[CELL]
            if active is not None:
                flags = flags & np.array(active[CELL], bool)
            nodes = computed_nodes(self.space, flags)
            sources = np.array([path.source for path in self.space.paths(CELL)])
            w = jnp.where(flags & nodes[sources], w, 0)
            computed = nodes[np.array([to.node for to in plan])]
        padded = jnp.pad(w, (0, 1))  # the last entry is the weight of paths that are inactive or not in the space
        places = [np.array([[paths if row[o] is None else row[o] for o in to.used] for row in to.paths]) for to in plan]
        gathered = padded[np.concatenate([p.ravel() for p in places])]
        parts = jnp.split(gathered, np.cumsum([p.size for p in places])[:-1])
        mixtures = [(to, part.reshape(p.shape)) for to, p, part in zip(plan, places, parts)]
        return self.scan(x, state, mask, mixtures, computed)

    def trained(self, is_active: Weights) -> Any:
        """Flags of the parameters that a step with these active paths trains, for each leaf of `nnx.state(self, nnx.Param)`.

        The matrix of a node is trained if the node is computed, the other parameters always are. The flags broadcast to a leaf.
        """
        nodes = computed_nodes(self.space, is_active[CELL])[np.array(self.nodes)]
        flags = jax.tree.map(lambda leaf: jnp.ones((1,) * leaf.ndim, bool), nnx.state(self, nnx.Param))
        flags["products"] = flags["products"].replace(nodes[:, None, None])
        return flags


def computed_nodes(space: Space, flags: Array) -> Array:
    """Flags (inputs and nodes,) of the nodes that have an active path whose source is the input or such a node; True for inputs.

    flags: of the active paths, (paths,), traced.
    """
    paths, (inputs, nodes) = space.paths(CELL), (space.layout.inputs, space.layout.nodes)
    into = np.array([path.node for path in paths])
    source = np.array([path.source for path in paths])
    computes = np.array([path.operation != "none" for path in paths])
    size = max(nodes) + 1
    edges = jnp.zeros((size, size), bool).at[into, source].max(flags & computes)
    start = jnp.zeros(size, bool).at[np.array(inputs)].set(True)
    return lax.fori_loop(0, len(nodes), lambda _, found: found | (edges & found).any(1), start)


def into_computed_nodes(space: Space, is_active: Weights) -> dict[str, Array]:
    """Flags of all paths into nodes with an active path: those whose gradients an architecture step on text needs.

    A node whose weights are all zero stays zero. The batch norm of a node cancels the scale of its weights: at 0 the gradient is
    therefore larger by the factor 1 / sqrt(eps) of the norm, and would make every such node nonzero in the next step.
    """
    into = np.array([path.node for path in space.paths(CELL)])
    nodes = jnp.zeros(into.max() + 1, bool).at[into].max(is_active[CELL])
    return {CELL: nodes[into]}


class RecurrentNetwork(LanguageModel):
    """The language model of a genotype without its dead ends."""

    def __init__(
        self,
        genotype: RecurrentGenotype,
        vocabulary: int,
        hidden: int = 850,
        drops: Drops | None = None,
        *,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
    ) -> None:
        into = genotype_paths(genotype)
        super().__init__(tuple(to.node for to in into), vocabulary, hidden, drops, rngs=rngs, dtype=dtype)
        self.into = into

    def recur(self, x: Array, state: Array, mask: Array | None, *args: Any) -> tuple[Array, Array]:
        mixtures = []
        for to in self.into:
            counts = np.array([[row[o] is not None for o in to.used] for row in to.paths], float)
            mixtures.append((to, jnp.asarray(counts / counts.sum(), wide(x).dtype)))
        return self.scan(x, state, mask, mixtures)


def parameter_count(model: nnx.Module) -> int:
    """The number of parameters, also of an abstract model: `parameter_count(nnx.eval_shape(lambda: RecurrentSupernet(...)))`."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def cell_size(found: RecurrentGenotype, vocabulary: int = 10_000, hidden: int = 850) -> dict[str, int]:
    """The parameters of the language model of a genotype, by default of the size for Penn Treebank."""
    net = nnx.eval_shape(lambda: RecurrentNetwork(found, vocabulary, hidden, rngs=nnx.Rngs(0)))
    return {"parameters": parameter_count(net)}


def mean_loss(
    model: LanguageModel,
    rows: Array,
    bptt: int,
    weights: Weights | None = None,
    active: Masks | None = None,
    is_active: Weights | None = None,
) -> float:
    """Mean cross entropy of a text (rows, columns), with the hidden state carried through all rows.

    As published, the sum is divided by the number of rows, although the first row is not predicted. `bptt` rows are decoded at a
    time, which bounds the memory and does not change the result. The other arguments are those of `RecurrentSupernet`.
    """
    graph, params = nnx.split(model, nnx.Param)
    static = None if active is None else tuple((cell, tuple(map(bool, flags))) for cell, flags in active.items())
    cell = () if isinstance(model, RecurrentNetwork) else (weights, static, is_active)
    losses = _row_losses(graph, bptt, cell[1:2], params, rows, cell[::2])
    return float(np.asarray(losses, np.float64).sum()) / len(rows)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _row_losses(graph: Any, bptt: int, active: Any, params: Any, rows: Array, traced: Any) -> Array:
    """The mean cross entropy of each row but the first. All windows have the same length: the last is padded by zeros."""
    model = nnx.merge(graph, params)
    args = (traced[0], active[0] and dict(active[0]), traced[1]) if active else ()
    predicted = len(rows) - 1
    many = -(-predicted // bptt)
    padded = jnp.pad(rows, ((0, many * bptt - predicted), (0, 0)))
    windows = padded[:-1].reshape(many, bptt, -1), padded[1:].reshape(many, bptt, -1)

    def window(state: Array, both: tuple[Array, Array]) -> tuple[Array, Array]:
        losses, _, last = model.word_losses(*both, state, None, *args)
        return last, losses.mean(1)

    _, losses = lax.scan(window, model.start(rows.shape[1]), windows)
    return losses.ravel()[:predicted]
