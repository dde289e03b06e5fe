"""Whole steps of searches in JAX: equal to those in PyTorch, with paths that become zero and paths that come back."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from libraries import jax_precision
from nas.bilevel import steps as torch_steps
from nas.bilevel.jax import steps
from nas.engine.jax.devices import join_devices
from nas.methods import ista as torch_ista
from nas.methods import sparse_supernet as torch_sparse
from nas.methods.jax import ista, sparse_supernet
from nas.methods.settings.ista import IstaSettings
from nas.methods.settings.sparse_supernet import SparseSupernetSettings, SparseSupernetTextSettings
from nas.nets.jax import cnn, rnn
from nas.nets.recurrent import Dropped
from nas.nets.torch import cnn as torch_cnn
from nas.nets.torch import rnn as torch_rnn
from nas.space import spaces
from nas.space.genotype import RecurrentGenotype
from nas_jax_cases import network_leaves, recurrent_like, state_of

pytestmark = pytest.mark.usefixtures("fast_compilation")

CPU = torch.device("cpu")
# compilation takes most of the time of these tests
plain = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True})
EPOCHS = (40, 40, 0)  # of three steps, for their strength: paths become zero, and some nonzero again


@pytest.fixture
def double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    with jax_precision():
        yield
    torch.set_default_dtype(before)


def start_of(ours, other, params):
    """The state of steps in JAX with the architecture of a method in PyTorch."""
    state = ours.start(params, jax.random.key(0))
    arch = {cell: jnp.asarray(a.detach().numpy().copy()) for cell, a in zip(other.cells, other.parameters)}
    method = ours.method.init(jax.random.key(0))
    optimizer = ours.method._optimizer(ours.method.lr, 0.0).init(arch)
    return state._replace(method=method._replace(arch=arch, optimizer=optimizer))


def three_steps(ours, theirs, state, batches, check):
    """Three architecture and weight steps by both libraries. Returns the zeros of the search point after each."""
    architecture, weights = plain(ours.architecture_step), plain(ours.weight_step)
    zeros = []
    for number, (epoch, (train, valid), (torch_train, torch_valid)) in enumerate(zip(EPOCHS, *batches(state))):
        theirs.method.begin_epoch(epoch)
        state = state._replace(method=ours.method.begin_epoch(state.method, epoch))
        lr = jnp.asarray(ours.settings.lr)
        train, valid = (b(state) for b in (train, valid))
        state = architecture(state, train, valid, lr)
        state = weights(state, train._replace(state=state.own["train"]) if hasattr(train, "state") else train, lr)
        theirs.architecture(number, torch_train, torch_valid)
        theirs.weights(torch_train)
        for cell, a in zip(theirs.method.cells, theirs.method.parameters):
            found, expected = np.asarray(state.method.arch[cell]), a.detach().numpy()
            np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-9)
            np.testing.assert_array_equal(found == 0, expected == 0)
        check(state)
        zeros.append(np.concatenate([np.asarray(a) == 0 for a in state.method.arch.values()]))
    return zeros


@pytest.mark.slow
@pytest.mark.parametrize("hessian", ["difference", "exact"])
def test_three_steps_on_images_are_those_of_torch(double, hessian):
    settings = SparseSupernetSettings(
        space="cherry", channels=2, layers=3, batch=6, images=12, arch_lr=0.05, strength_step=0.01, hessian=hessian, lr=0.1
    )
    space = spaces.get_space("cherry")
    net = torch_cnn.Supernet(space, 2, 3, 4)
    other = torch_sparse.SparseSupernet(space, settings, CPU)
    theirs = torch_steps.CifarSteps(net, other, settings)
    equivalent = cnn.Supernet(space, 2, 3, 4, rngs=nnx.Rngs(0), dtype=jnp.float64)
    graph, _ = nnx.split(equivalent, nnx.Param)
    ours = steps.CifarSteps(graph, space, sparse_supernet.SparseSupernet(space, settings, 1), settings, join_devices("cpu"))
    state = start_of(ours, other, state_of(net, equivalent))
    draw = np.random.default_rng(0)
    data = [(draw.normal(size=(6, 3, 8, 8)), draw.integers(4, size=6)) for _ in range(6)]
    as_torch = [tuple(map(torch.from_numpy, part)) for part in data]
    as_jax = [
        lambda s, i=images, y=labels: (jnp.asarray(i.transpose(0, 2, 3, 1)), jnp.asarray(y), None) for images, labels in data
    ]
    pairs = lambda found: list(zip(found[::2], found[1::2]))

    def check(state):
        found, wanted = cnn._flat(state.params), network_leaves(net, equivalent)
        for name, leaf in found.items():
            np.testing.assert_allclose(leaf, wanted[name], rtol=1e-6, atol=1e-8, err_msg=str(name))

    zeros = three_steps(ours, theirs, state, lambda _: (pairs(as_jax), pairs(as_torch)), check)
    assert zeros[0].any() and not zeros[0].all()
    assert (zeros[1] & ~zeros[2]).any(), "no path came back"


def test_a_weight_step_of_ista_is_clipped_as_in_torch(double):
    settings = IstaSettings(space="cherry", channels=2, layers=3, batch=4, images=8, clip=0.1, lr=1.0)
    space = spaces.get_space("cherry")
    net = torch_cnn.Supernet(space, 2, 3, 4)
    other = torch_ista.Ista(space, settings, CPU)
    other.begin_epoch(0)
    equivalent = cnn.Supernet(space, 2, 3, 4, rngs=nnx.Rngs(0), dtype=jnp.float64)
    graph, _ = nnx.split(equivalent, nnx.Param)
    ours = steps.CifarSteps(graph, space, ista.Ista(space, settings, 1), settings, join_devices("cpu"))
    state = ours.start(state_of(net, equivalent), jax.random.key(0))
    variables = {cell: jnp.asarray(b.detach().numpy().copy()) for cell, b in zip(other.codes.cells, other.parameters)}
    matrices = jax.tree.map(jnp.asarray, other.codes.matrices)
    method = ours.method.begin_epoch(state.method._replace(variables=variables, matrices=matrices), 0)
    draw = np.random.default_rng(0)
    last = {cell: draw.normal(size=b.shape) for cell, b in variables.items()}
    for b, g in zip(other.parameters, last.values()):
        b.grad = torch.from_numpy(g.copy())
    images, labels = draw.normal(size=(4, 3, 8, 8)), draw.integers(4, size=4)
    torch_steps.CifarSteps(net, other, settings).weights((torch.from_numpy(images), torch.from_numpy(labels)))
    batch = jnp.asarray(images.transpose(0, 2, 3, 1)), jnp.asarray(labels), None
    state = state._replace(method=method._replace(gradient=jax.tree.map(jnp.asarray, last)))
    state = plain(ours.weight_step)(state, batch, jnp.asarray(1.0))
    wanted = network_leaves(net, equivalent)
    for name, leaf in cnn._flat(state.params).items():
        np.testing.assert_allclose(leaf, wanted[name], rtol=1e-6, atol=1e-9, err_msg=str(name))


@pytest.mark.slow
def test_three_steps_on_text_are_those_of_torch(double):
    settings = SparseSupernetTextSettings(
        batch=4, hidden=5, bptt=6, arch_lr=0.02, strength_step=0.01, lr=1.0, temporal=0.1,
        drop_words=0.0, drop_embedding=0.0, drop_input=0.0, drop_hidden=0.0, drop_output=0.0,
    )  # fmt: skip
    space = spaces.get_space("recurrent", RecurrentGenotype)
    net = torch_rnn.RecurrentSupernet(space, 11, 5)
    other = torch_sparse.SparseSupernet(space, settings, CPU)
    theirs = torch_steps.TextSteps(net, other, settings)
    model = rnn.RecurrentSupernet(space, 11, 5, rngs=nnx.Rngs(0), dtype=jnp.float64)
    graph, params = recurrent_like(net, model)
    ours = steps.TextSteps(graph, space, sparse_supernet.SparseSupernet(space, settings, 1), settings, join_devices("cpu"))
    state = start_of(ours, other, params)
    draw = np.random.default_rng(0)
    data = [(draw.integers(11, size=(length + 1, 4)), length) for length in (6, 4, 3, 6, 6, 5)]
    as_torch = [(torch.from_numpy(rows[:-1]), torch.from_numpy(rows[1:])) for rows, _ in data]

    def window(rows, length, part):
        padded = np.pad(rows, ((0, 7 - len(rows)), (0, 0)))
        return lambda s: steps.Window(
            jnp.asarray(padded[:-1]), jnp.asarray(padded[1:]), jnp.asarray(length), s.own[part], Dropped()
        )

    as_jax = [window(*one, "valid" if i % 2 else "train") for i, one in enumerate(data)]
    pairs = lambda found: list(zip(found[::2], found[1::2]))

    def check(state):
        _, wanted = recurrent_like(net, model)
        for found, expected in zip(jax.tree.leaves(state.params), jax.tree.leaves(wanted)):
            np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-8)
        for part, hidden in state.own.items():
            np.testing.assert_allclose(hidden, theirs.state[part].numpy(), rtol=1e-6, atol=1e-8)

    zeros = three_steps(ours, theirs, state, lambda _: (pairs(as_jax), pairs(as_torch)), check)
    assert zeros[0].any() and not zeros[0].all()
    assert (zeros[1] & ~zeros[2]).any(), "no path came back"
