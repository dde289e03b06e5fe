"""Recurrent networks in JAX: equal to those in torch, with their weights, in double precision."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from libraries import jax_precision
from nas.nets.jax import rnn
from nas.nets.recurrent import Drops
from nas.nets.torch import rnn as torch_rnn
from nas.space import spaces
from nas.space.genotype import RecurrentGenotype, load_genotype
from nas_jax_cases import as_torch, recurrent_like

pytestmark = pytest.mark.usefixtures("fast_compilation")

SPACE = spaces.get_space("recurrent", RecurrentGenotype)
PATHS = SPACE.paths("recurrent")
WORDS, HIDDEN, BATCH, ROWS = 11, 4, 5, 3
EVERY = Drops(words=0.2, embedding=0.2, input=0.5, hidden=0.25, output=0.5)
SEVERAL = RecurrentGenotype(
    {"1": [["tanh", 0], ["relu", 0]], "3": [["sigmoid", 1], ["identity", 0], ["tanh", 1]], "7": [["identity", 3]]}
)


@pytest.fixture(autouse=True)
def double():
    with jax_precision():
        yield


def scaled(net):
    """The torch network in double precision, with weights far from the linear part of the activations."""
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(20)
    return net.double()


def supernets(space=SPACE, hidden=HIDDEN, drops=EVERY):
    torch.manual_seed(0)
    net = scaled(torch_rnn.RecurrentSupernet(space, WORDS, hidden, drops))
    like = rnn.RecurrentSupernet(space, WORDS, hidden, drops, rngs=nnx.Rngs(0), dtype=jnp.float64)
    return net, *recurrent_like(net, like)


def batch(seed=1):
    rng = np.random.default_rng(seed)
    words, targets = rng.integers(WORDS, size=(2, ROWS, BATCH))
    return words, targets, 0.1 * rng.normal(size=(BATCH, HIDDEN))


def close(ours, other, rtol=1e-10):
    np.testing.assert_allclose(ours, other.detach().numpy(), rtol=rtol, atol=1e-12)


def compare(net, graph, params, weights, dropped, given, active=None, is_active=None):
    """Loss, states, last state and all gradients of both networks are equal. given: the flags of the torch network."""
    words, targets, state = batch()

    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiles in half of the time
    def ours(weights, params):
        def loss(weights, params):
            found, states, last = nnx.merge(graph, params).loss(words, targets, state, dropped, weights, active, is_active)
            return found, (states, last)

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(weights, params)

    (loss, (states, last)), (to_weights, to_params) = ours(weights, params)
    variables = {cell: torch.tensor(np.array(w), requires_grad=True) for cell, w in weights.items()}
    masks = torch_rnn.Dropped(*as_torch(dropped))
    expected = net.loss(*as_torch((words, targets, state)), masks, variables, given)
    net.zero_grad()
    expected[0].backward()
    for found, other in zip((loss, states, last), expected):
        close(found, other)
    close(to_weights["recurrent"], variables["recurrent"].grad)
    for name in ("embedding", "bias", "entry"):
        close(to_params[name][...], getattr(net, name).grad)
    zero = torch.zeros(HIDDEN, 2 * HIDDEN)
    close(to_params["products"][...], torch.stack([zero if p.grad is None else p.grad for p in net.products.values()]))


def few(space=SPACE):
    """Flags of the paths into nodes 1 to 3: the compilation of all nodes takes seconds."""
    return {"recurrent": [p.node <= 3 for p in space.paths("recurrent")]}


def sparse(seed=3):
    """Weights most of which are 0: node 2 has no path, and node 4 only one from node 2, so that neither is computed."""
    rng = np.random.default_rng(seed)
    a = np.where(rng.random(len(PATHS)) < 0.5, rng.normal(size=len(PATHS)), 0)
    a[[i for i, p in enumerate(PATHS) if p.node in (2, 4) or p.node > 5]] = 0
    a[PATHS.index((4, 2, "relu"))] = a[0] = 1
    return a


def test_the_supernet_equals_that_in_torch():
    net, graph, params = supernets()
    dropped = nnx.merge(graph, params).draw(jax.random.key(1), BATCH)
    weights = {"recurrent": jnp.asarray(np.random.default_rng(0).normal(size=len(PATHS)))}
    compare(net, graph, params, weights, dropped, None)


def test_one_compiled_set_of_paths_serves_for_every_set_within():
    """Paths outside of the traced flags count as absent: not in sums, and their nodes not in the mean."""
    net, graph, params = supernets()
    a = sparse()
    flags = a != 0
    weights = {"recurrent": jnp.asarray(a)}
    wider = flags | np.array([p.node == 2 or (p.node < 5 and p.operation == "tanh") for p in PATHS])
    given = {"recurrent": flags.tolist()}
    compare(
        net, graph, params, weights, torch_rnn.Dropped(), given, {"recurrent": tuple(wider)}, {"recurrent": jnp.asarray(flags)}
    )
    compare(net, graph, params, weights, torch_rnn.Dropped(), given, given)
    trained = nnx.merge(graph, params).trained({"recurrent": jnp.asarray(flags)})
    assert jax.tree.structure(trained) == jax.tree.structure(params)
    computed = [p.grad is not None for p in net.products.values()]
    assert trained["products"][...].ravel().tolist() == computed and computed == [
        True,
        False,
        True,
        False,
        True,
        False,
        False,
        False,
    ]
    assert all(bool(trained[name][...].all()) for name in ("embedding", "bias", "entry"))
    for leaf, other in zip(jax.tree.leaves(trained), jax.tree.leaves(params)):
        assert jnp.broadcast_shapes(leaf.shape, other.shape) == other.shape
    into = np.asarray(rnn.into_computed_nodes(SPACE, {"recurrent": jnp.asarray(flags)})["recurrent"])
    assert into.tolist() == [p.node in (1, 3, 4, 5) for p in PATHS]


def test_zero_takes_a_share_of_the_softmax_and_nothing_else():
    space = spaces.get_space("recurrent_zero", RecurrentGenotype)
    net, graph, params = supernets(space, drops=None)
    weights = {"recurrent": jnp.asarray(np.random.default_rng(0).random(len(space.paths("recurrent"))))}
    compare(net, graph, params, weights, torch_rnn.Dropped(), few(space), few(space))


@pytest.mark.parametrize("genotype", [SEVERAL, load_genotype("DARTS_V2", RecurrentGenotype)], ids=["several paths", "DARTS_V2"])
def test_the_network_of_a_genotype_equals_that_in_torch(genotype):
    torch.manual_seed(0)
    net = scaled(torch_rnn.RecurrentNetwork(genotype, WORDS, HIDDEN))
    graph, params = recurrent_like(net, rnn.RecurrentNetwork(genotype, WORDS, HIDDEN, rngs=nnx.Rngs(0), dtype=jnp.float64))
    words, targets, state = batch()
    both = jax.jit(jax.value_and_grad(lambda params: nnx.merge(graph, params).loss(words, targets, state)[0]))
    loss, grads = both(params)
    expected, _, _ = net.loss(*as_torch((words, targets, state)))
    expected.backward()
    close(loss, expected)
    close(grads["products"][...], torch.stack([p.grad for p in net.products.values()]))
    close(grads["entry"][...], net.entry.grad)


def test_the_mean_loss_of_a_text_equals_that_in_torch():
    net, graph, params = supernets()
    rows = np.random.default_rng(5).integers(WORDS, size=(12, BATCH))
    a = sparse()
    active = {"recurrent": (a != 0).tolist()}
    expected = torch_rnn.mean_loss(net, torch.from_numpy(rows), 4, {"recurrent": torch.from_numpy(a)}, active)
    model, weights = nnx.merge(graph, params), {"recurrent": jnp.asarray(a)}
    assert rnn.mean_loss(model, jnp.asarray(rows), 4, weights, active) == pytest.approx(expected, rel=1e-12)
    flags = {"recurrent": jnp.asarray(a != 0)}
    assert rnn.mean_loss(model, jnp.asarray(rows), 11, weights, None, flags) == pytest.approx(expected, rel=1e-12)


def test_wrong_arguments_are_named():
    _, graph, params = supernets()
    net, (words, _, state) = nnx.merge(graph, params), batch()
    with pytest.raises(ValueError, match="no path is active in the recurrent cell"):
        net(words, state, None, None, {"recurrent": (False,) * 144})
    with pytest.raises(ValueError, match=r"weights have shape \(144,\), got \(98,\)"):
        net(words, state, None, {"recurrent": jnp.zeros(98)})
    with pytest.raises(ValueError, match="no path of the genotype reaches the input"):
        rnn.RecurrentNetwork(RecurrentGenotype({"5": [["tanh", 2]]}), WORDS, HIDDEN, rngs=nnx.Rngs(0))


def test_dropout_masks_keep_their_share_and_scale():
    net = rnn.RecurrentSupernet(SPACE, 50, 40, EVERY, rngs=nnx.Rngs(0))
    dropped = net.draw(jax.random.key(0), 50)
    for name in ("words", "embedding", "input", "hidden", "output"):
        share, mask = getattr(EVERY, name), np.asarray(getattr(dropped, name))
        assert mask.shape == ((50, 1) if name == "words" else (50, 40))
        assert set(np.unique(mask)) <= {0, np.float32(1 / (1 - share))}
        assert (mask == 0).mean() == pytest.approx(share, abs=0.2 if name == "words" else 0.05)
    assert rnn.RecurrentSupernet(SPACE, 5, 4, rngs=nnx.Rngs(0)).draw(jax.random.key(0), 2) == torch_rnn.Dropped()


def test_bfloat16_products_leave_statistics_parameters_and_losses_in_float32():
    with jax_precision(False):
        make = lambda dtype: rnn.RecurrentSupernet(SPACE, WORDS, 8, rngs=nnx.Rngs(0), dtype=dtype)
        rng = np.random.default_rng(0)
        words, targets = rng.integers(WORDS, size=(2, 2, 16))
        weights = {"recurrent": jnp.asarray(rng.normal(size=144), jnp.float32)}
        found = {}
        for dtype in (jnp.float32, jnp.bfloat16):
            graph, params = nnx.split(make(dtype), nnx.Param)
            state = jnp.zeros((16, 8))
            run = jax.jit(lambda w, p, state, graph=graph: nnx.merge(graph, p).loss(words, targets, state, None, w, few()))
            loss, states, _ = run(weights, params, state)
            assert loss.dtype == jnp.float32 and states.dtype == dtype
            assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
            found[dtype] = float(loss), np.asarray(states, np.float32)
        assert found[jnp.bfloat16][0] == pytest.approx(found[jnp.float32][0], rel=1e-2)
        # a column of normalised states: in bfloat16 statistics, deviations of 1 % of the mean would not survive
        x = jnp.asarray(100 + rng.normal(size=(16, 1)), jnp.bfloat16)
        normed = np.asarray(make(jnp.bfloat16)._normed(x), np.float32)
        exact = np.asarray(x, np.float64)
        np.testing.assert_allclose(normed, (exact - exact.mean()) / exact.std(), atol=0.02)


def test_a_step_exports_for_tpus():
    with jax_precision(False):
        graph, params = nnx.split(rnn.RecurrentSupernet(SPACE, WORDS, 8, EVERY, rngs=nnx.Rngs(0), dtype=jnp.bfloat16), nnx.Param)

        def step(params, weights, flags, words, targets, state, key):
            net = nnx.merge(graph, params)
            loss = lambda w, p: nnx.merge(graph, p).loss(words, targets, state, net.draw(key, 16), w, None, flags)[0]
            return jax.value_and_grad(loss, (0, 1))(weights, params), net.trained(flags)

        like = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)
        words, flags = like(2, 16, dtype=jnp.int32), {"recurrent": like(144, dtype=bool)}
        state = like(16, 8, dtype=jnp.bfloat16)
        args = (params, {"recurrent": like(144)}, flags, words, words, state, jax.random.key(0))
        exported = jax.export.export(jax.jit(step), platforms=["tpu"])(*args)
        assert exported.platforms == ("tpu",) and "f64" not in exported.mlir_module()


def test_parameter_counts_are_those_of_the_papers():
    make = lambda network, *args: nnx.eval_shape(lambda: network(*args, rngs=nnx.Rngs(0)))
    assert rnn.parameter_count(make(rnn.RecurrentSupernet, SPACE, 10_000, 300)) == 4_810_000
    genotype = load_genotype("DARTS_V2", RecurrentGenotype)
    assert rnn.parameter_count(make(rnn.RecurrentNetwork, genotype, 10_000, 850)) == 22_960_000
