"""Architecture gradients in JAX: equal to those in torch, in double precision."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from libraries import jax_precision
from nas.bilevel import gradients as torch_gradients
from nas.bilevel.jax import gradients
from nas.nets.jax import rnn
from nas.nets.recurrent import Drops
from nas.nets.torch import rnn as torch_rnn
from nas.space import spaces
from nas.space.genotype import RecurrentGenotype
from nas_jax_cases import as_torch, recurrent_like

pytestmark = pytest.mark.usefixtures("fast_compilation")

RNG = np.random.default_rng(0)
M, N, B = RNG.normal(size=(5, 3)), RNG.normal(size=(3, 5)), RNG.normal(size=5)
A, W, MOMENTUM = RNG.normal(size=3), RNG.normal(size=5), RNG.normal(size=5)


@pytest.fixture(autouse=True)
def double():
    with jax_precision():
        yield


def losses(numpy):
    """The losses of a bilevel problem with a product of A and w, in which all derivatives differ from 0, in either library."""
    into = torch.from_numpy if numpy is torch else jnp.asarray
    m, n, b = map(into, (M, N, B))
    train = lambda a, w: ((w - m @ a) ** 2).sum() / 2 + numpy.sin(w @ b) * (a**3).sum()
    valid = lambda a, w: ((n @ w - a) ** 2).sum() / 2 + (a * a).sum() * (w**4).sum()
    return train, valid


@jax.custom_vjp
def square(x):
    return x * x


square.defvjp(lambda x: (x * x, x), lambda x, g: (2 * x * g,))


def decayed(momentum):
    """The direction of SGD with weight decay and momentum."""
    return lambda grads, params: [g + 0.1 * p + 0.9 * momentum for g, p in zip(grads, params)]


@pytest.mark.parametrize("clip", [0.0, 0.25, 1e3])
@pytest.mark.parametrize("hessian", gradients.HESSIANS)
def test_second_order_equals_that_in_torch(hessian, clip):
    a, w = (torch.tensor(x, requires_grad=True) for x in (A, W))
    train, valid = losses(torch)
    direction = lambda grads: decayed(torch.from_numpy(MOMENTUM))(grads, [w.detach()])
    on = (lambda: train(a, w)), (lambda: valid(a, w))
    (expected,) = torch_gradients.second_order([a], [w], *on, 0.05, direction, hessian, clip=clip)
    train_jax, valid_jax = losses(jnp)
    on_trees = (lambda a, w: train_jax(a["a"], w[0])), (lambda a, w: (valid_jax(a["a"], w[0]), w[0]))

    @jax.jit
    def ours(arch, params, lr):
        towards = lambda grads: decayed(jnp.asarray(MOMENTUM))(grads, params)
        return gradients.second_order(arch, params, *on_trees, lr, towards, hessian, clip)

    found, moved = ours({"a": jnp.asarray(A)}, [jnp.asarray(W)], 0.05)
    np.testing.assert_allclose(found["a"], expected, rtol=1e-10)
    grads, _ = torch_gradients.clipped(list(torch.autograd.grad(on[0](), [w])), clip)
    np.testing.assert_allclose(moved, (w - 0.05 * direction(grads)[0]).detach(), rtol=1e-12)


def test_first_order_takes_the_weights_as_they_are():
    _, valid = losses(torch)
    a, w = torch.tensor(A, requires_grad=True), torch.from_numpy(W)
    (expected,) = torch_gradients.first_order([a], lambda: valid(a, w))
    _, valid = losses(jnp)
    found, aux = gradients.first_order(jnp.asarray(A), jnp.asarray(W), valid)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert aux is None
    assert gradients.first_order(jnp.asarray(A), jnp.asarray(W), lambda a, w: (valid(a, w), "last"))[1] == "last"


def test_the_exact_product_passes_through_custom_derivatives():
    train = lambda square, a, w: (square(w) * a).sum() + square(a @ w)
    valid = lambda square, a, w: (square(w - a)).sum()
    a, w = jnp.asarray(A), jnp.asarray(W[:3])
    found, plain = (
        gradients.second_order(a, w, partial(train, f), partial(valid, f), 0.1, hessian="exact")[0]
        for f in (square, lambda x: x * x)
    )
    np.testing.assert_allclose(found, plain, rtol=1e-12)


def test_a_network_is_compiled_three_times_at_most():
    train, valid = losses(jnp)
    traced = []

    def counted(loss):
        return lambda a, w: traced.append(1) or loss(a, w)

    for hessian in gradients.HESSIANS:
        traced.clear()
        jax.jit(lambda a, w, h=hessian: gradients.second_order(a, w, counted(train), counted(valid), 0.1, hessian=h))(A, W)
        assert len(traced) == 3


def test_without_a_gradient_of_the_weights_the_difference_is_zero():
    found, _ = gradients.second_order(jnp.asarray(A), jnp.asarray(W), losses(jnp)[0], lambda a, w: (a**2).sum(), 0.1)
    np.testing.assert_array_equal(found, 2 * A)


def test_an_unknown_hessian_is_refused():
    with pytest.raises(ValueError, match="hessian must be one of difference, exact, got 'none'"):
        gradients.second_order(A, W, *losses(jnp), 0.1, hessian="none")


def test_parameters_of_half_precision_keep_their_dtype():
    train, valid = losses(jnp)
    found, _ = gradients.second_order(jnp.asarray(A, jnp.float32), jnp.asarray(W, jnp.bfloat16), train, valid, 0.1, clip=1.0)
    assert found.dtype == jnp.float32


@pytest.fixture(scope="module")
def text():
    """A recurrent supernet in both libraries, with batches, masks, and the paths into two nodes active."""
    space = spaces.get_space("recurrent", RecurrentGenotype)
    torch.manual_seed(0)
    drops = Drops(embedding=0.2, input=0.5, hidden=0.25, output=0.5)
    net = torch_rnn.RecurrentSupernet(space, 9, 4, drops).double()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(20)
    with jax_precision():
        model = rnn.RecurrentSupernet(space, 9, 4, drops, rngs=nnx.Rngs(0), dtype=jnp.float64)
        graph, params = recurrent_like(net, model)
        words = RNG.integers(9, size=(4, 3, 5))
        batches = [(*words[i : i + 2], 0.1 * RNG.normal(size=(5, 4)), model.draw(jax.random.key(i), 5)) for i in (0, 2)]
        active = {"recurrent": [p.node <= 2 for p in space.paths("recurrent")]}
        weights = {"recurrent": jnp.asarray(RNG.normal(size=144))}
    return net, graph, params, batches, active, weights


@pytest.mark.parametrize(("hessian", "clip"), [(None, 0.0), ("difference", 0.25), ("exact", 0.0)])
def test_gradients_of_a_supernet_equal_those_in_torch(text, hessian, clip):
    net, graph, params, batches, active, weights = text
    a = torch.tensor(np.array(weights["recurrent"]), requires_grad=True)
    lasts = []

    def on(batch):
        words, targets, state, dropped = (*as_torch(tuple(batch[:3])), torch_rnn.Dropped(*as_torch(batch[3])))

        def loss():
            found, _, last = net.loss(words, targets, state, dropped, {"recurrent": a}, active)
            lasts.append(last.detach())
            return found

        return loss

    def ours(batch):
        def loss(arch, params):
            found, _, last = nnx.merge(graph, params).loss(*batch, arch, active)
            return found, last

        return loss

    (train, valid), jitted = map(on, batches), partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    decay = lambda grads, params: jax.tree.map(lambda g, p: g + 0.01 * p, grads, params)
    if hessian is None:
        expected = torch_gradients.first_order([a], valid)
        last = lasts[-1]
        found, state = jitted(lambda arch, params: gradients.first_order(arch, params, ours(batches[1])))(weights, params)
    else:
        weights_of = list(net.parameters())
        direction = lambda grads: decay(list(grads), [p.detach() for p in weights_of])
        expected = torch_gradients.second_order([a], weights_of, train, valid, 0.5, direction, hessian, clip=clip)
        last = lasts[1]
        second = lambda arch, params: gradients.second_order(
            arch, params, *map(ours, batches), 0.5, lambda grads: decay(grads, params), hessian, clip
        )
        found, state = jitted(second)(weights, params)
    np.testing.assert_allclose(found["recurrent"], expected[0], rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(state, last, rtol=1e-10)
