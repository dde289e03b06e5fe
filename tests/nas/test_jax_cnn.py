"""The convolutional networks in JAX compute what those in PyTorch compute; what is compiled runs on accelerators."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from nas.nets.jax import cnn, operations
from nas.nets.jax.convolution_kernels import depthwise
from nas.nets.torch import cnn as torch_cnn
from nas.space.genotype import PUBLISHED, Genotype
from nas.space.spaces import get_space
from nas_jax_cases import gradient, state_of
from torch.nn import functional as F

DARTS_V2 = PUBLISHED["convolutional"]["DARTS_V2"]
MANY = Genotype(
    {"2": (("sep_conv_3x3", 0), ("skip_connect", 0), ("max_pool_3x3", 1)), "4": (("conv_7x1_1x7", 2), ("avg_pool_3x3", 2))},
    {"2": (("skip_connect", 0), ("dil_conv_3x3", 1)), "3": (("max_pool_3x3", 0), ("skip_connect", 2), ("conv_7x1_1x7", 0))},
)


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


def images_and_labels(size=8, count=4):
    torch.manual_seed(1)
    x, y = torch.randn(count, 3, size, size, dtype=torch.float64), torch.randint(10, (count,))
    return x, y, jnp.asarray(x.numpy().transpose(0, 2, 3, 1)), jnp.asarray(y.numpy())


def cross_entropy(logits, labels):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).mean()


def both(space, channels=4, layers=3):
    torch.manual_seed(0)
    theirs = torch_cnn.Supernet(get_space(space), channels, layers).double()
    ours = cnn.Supernet(get_space(space), channels, layers, rngs=nnx.Rngs(0), dtype=jnp.float64)
    return theirs, ours


def drawn(space, kinds, own, share, seed=0):
    """Weights and flags of paths: node 3 has none if not all are active."""
    rng, weights, active = np.random.default_rng(seed), {}, {}
    for cell in ("normal", "reduce"):
        paths = space.paths(cell)
        weights[cell] = rng.normal(size=(kinds.count(cell), len(paths)) if own else len(paths))
        active[cell] = [bool(u < share) and (share == 1 or p.node != 3) for u, p in zip(rng.random(len(paths)), paths)]
    return weights, active


# traced: the flags are an input of the compiled function
@pytest.mark.parametrize(
    ("space", "own", "share", "traced"),
    [("darts", True, 0.4, False), ("darts", False, 0.4, True), ("darts_zero", False, 1.0, False), ("S1", False, 1.0, False)],
)
def test_the_supernet_and_all_its_gradients_equal_those_of_pytorch(space, own, share, traced, double):
    theirs, ours = both(space)
    x, y, images, labels = images_and_labels()
    weights, active = drawn(ours.space, ours.kinds, own, share)
    leaves = {c: torch.tensor(w, requires_grad=True) for c, w in weights.items()}
    logits = theirs(x, leaves, active)
    expected = F.cross_entropy(logits, y)
    expected.backward()

    graph, params = nnx.split(ours, nnx.Param)[0], state_of(theirs, ours)
    flags = {c: jnp.asarray(a) for c, a in active.items()}

    def loss(params, weights, flags):
        found = nnx.merge(graph, params)(images, weights, flags if traced else active)
        return cross_entropy(found, labels), found

    step = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    (found, found_logits), (grads, arch) = step(params, {c: jnp.asarray(w) for c, w in weights.items()}, flags)
    np.testing.assert_allclose(found_logits, logits.detach().numpy(), rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(found, expected.item(), rtol=1e-10)
    for cell, w in leaves.items():
        np.testing.assert_allclose(arch[cell], w.grad.numpy(), rtol=1e-9, atol=1e-11)
    reference, found = cnn._flat(state_of(theirs, ours, gradient)), cnn._flat(grads)
    for name, expected in reference.items():
        np.testing.assert_allclose(found[name], expected, rtol=1e-9, atol=1e-11, err_msg=str(name))

    # a parameter is trained if PyTorch computes a gradient for it
    trained = cnn._flat(ours.trained(flags))
    with_gradient = cnn._flat(state_of(theirs, ours, lambda p: torch.full_like(p, p.grad is not None)))
    for name, expected in with_gradient.items():
        np.testing.assert_array_equal(np.broadcast_to(trained[name], expected.shape), expected != 0, err_msg=str(name))


def test_without_weights_and_flags_all_paths_count_once(double):
    theirs, ours = both("cherry")
    x, _, images, _ = images_and_labels()
    graph, params = nnx.split(ours, nnx.Param)[0], state_of(theirs, ours)
    with torch.no_grad():
        expected = theirs(x).numpy()
    np.testing.assert_allclose(nnx.merge(graph, params)(images), expected, rtol=1e-9, atol=1e-11)


def test_refused_calls_name_the_argument():
    net = cnn.Supernet(get_space("S4"), 2, 3, rngs=nnx.Rngs(0))
    x = jnp.zeros((2, 8, 8, 3))
    with pytest.raises(ValueError, match=r"key must be a jax.random key where noise"):
        jax.eval_shape(net, x)
    assert jax.eval_shape(lambda: net(x, key=jax.random.key(0))).shape == (2, 10)
    with pytest.raises(ValueError, match=r"normal: weights have shape \(28,\) or \(1, 28\), got \(27,\)"):
        net(x, {"normal": jnp.ones(27), "reduce": jnp.ones(28)})
    none = {"normal": [True] * 28, "reduce": [False] * 28}
    with pytest.raises(ValueError, match="no path is active in the reduction cell"):
        jax.eval_shape(lambda: net(x, None, none, jax.random.key(0)))


def test_the_parameters_of_a_path_are_one_vector():
    space = get_space("darts")
    net = nnx.eval_shape(lambda: cnn.Supernet(space, 16, 8, rngs=nnx.Rngs(0)))
    assert sum(p.size for p in jax.tree.leaves(nnx.state(net, nnx.Param))) == 1_930_618
    theirs = torch_cnn.Supernet(space, 4, 3)
    net = cnn.Supernet(space, 4, 3, rngs=nnx.Rngs(0))
    params = nnx.state(net, nnx.Param)
    vectors, rest = cnn.split_paths(net, params)
    sizes = {key: sum(p.numel() for p in ps) for key, ps in theirs.path_parameters().items()}
    assert {key: v.size for key, v in vectors.items()} == {key: n for key, n in sizes.items() if n}
    again = cnn.join_paths(net, vectors, rest)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.parametrize(("genotype", "auxiliary", "size"), [(MANY, False, 8), (DARTS_V2, True, 32)], ids=["many", "DARTS_V2"])
def test_the_network_of_a_genotype_equals_that_of_pytorch(genotype, auxiliary, size, double):
    torch.manual_seed(0)
    theirs = torch_cnn.Network(genotype, 4, 3, auxiliary=auxiliary).double()
    ours = cnn.Network(genotype, 4, 3, auxiliary=auxiliary, rngs=nnx.Rngs(0), dtype=jnp.float64)
    for kind in (nnx.Param, nnx.BatchStat):
        nnx.update(ours, state_of(theirs, ours, kind=kind))
    x, _, images, _ = images_and_labels(size)
    run = nnx.jit(lambda net, images: net(images))
    for training in (True, False):
        theirs.train(training)
        ours.train() if training else ours.eval()
        for expected, found in zip(theirs(x), run(ours, images)):
            assert (expected is None) == (found is None)
            if found is not None:
                np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-9, atol=1e-10)
    assert cnn.network_size(ours, (size, size, 3)) == torch_cnn.network_size(theirs, (3, size, size))


def test_the_size_of_a_network_is_counted_as_in_pytorch():
    net = nnx.eval_shape(lambda: cnn.Network(DARTS_V2, rngs=nnx.Rngs(0)))
    assert cnn.network_size(net) == torch_cnn.network_size(torch_cnn.Network(DARTS_V2), (3, 32, 32))


def test_drop_path_keeps_the_mean_and_needs_a_key():
    x = jnp.ones((20_000, 1, 1, 1))
    (y,) = cnn.Dropping(0.25, jax.random.key(0))([x])
    assert np.unique(y) == pytest.approx([0.0, 4 / 3])
    assert float(y.mean()) == pytest.approx(1.0, abs=0.02)
    with pytest.raises(ValueError, match=r"key must be a jax.random key for drop_path, got None"):
        cnn.Dropping(0.25, None)([x])


@pytest.mark.parametrize(("kernel", "stride", "dilation", "size"), [(3, 1, 1, 6), (3, 2, 1, 7), (5, 2, 2, 6), (5, 1, 2, 7)])
def test_depthwise_convolutions_are_those_of_xla_with_all_derivatives(kernel, stride, dilation, size, double):
    rng = np.random.default_rng(0)
    x, w = jnp.asarray(rng.normal(size=(2, 2, size, size, 3))), jnp.asarray(rng.normal(size=(2, kernel, kernel, 3)))

    def reference(x, w):
        pad = dilation * (kernel // 2)
        one = lambda x, w: jax.lax.conv_general_dilated(
            x,
            w[:, :, None],
            (stride, stride),
            [(pad, pad)] * 2,
            rhs_dilation=(dilation, dilation),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=3,
        )
        return jnp.stack([one(a, b) for a, b in zip(x, w)])

    def results(convolve):
        loss = lambda both: (jnp.sin(convolve(*both)) ** 2).sum()
        forward_over_reverse = lambda both: jax.jvp(jax.grad(loss), (both,), (both,))
        twice = jax.grad(lambda both: sum((g**3).sum() for g in jax.grad(loss)(both)))
        return jax.jit(lambda both: (convolve(*both), forward_over_reverse(both), twice(both)))((x, w))

    found, expected = results(lambda x, w: depthwise(x, w, stride, dilation)), results(reference)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9), found, expected)


@pytest.mark.parametrize("stride", [1, 2])
def test_pools_have_the_gradients_of_pytorch(stride, double):
    """Also where several pixels of a window are equal: PyTorch chooses the first."""
    x = np.random.default_rng(0).integers(0, 3, (2, 6, 8, 3)).astype(float)
    theirs = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    pools = [(operations.max_pool, F.max_pool2d(theirs, 3, stride, 1))]
    pools += [(operations.avg_pool, F.avg_pool2d(theirs, 3, stride, 1, count_include_pad=False))]
    for ours, expected in pools:
        y, pull = jax.vjp(lambda x, ours=ours: ours(x, stride), jnp.asarray(x))
        np.testing.assert_allclose(y, expected.detach().numpy().transpose(0, 2, 3, 1), rtol=1e-12)
        (grad,) = torch.autograd.grad((expected**3).sum(), theirs)
        np.testing.assert_allclose(pull(3 * y**2)[0], grad.numpy().transpose(0, 2, 3, 1), rtol=1e-12)
        hessian = jax.jvp(jax.grad(lambda x, ours=ours: (ours(x, stride) ** 3).sum()), (jnp.asarray(x),), (jnp.ones_like(x),))
        twice = jax.grad(lambda x, ours=ours: jax.grad(lambda x: (ours(x, stride) ** 3).sum())(x).sum())(jnp.asarray(x))
        np.testing.assert_allclose(hessian[1], twice, rtol=1e-12)


def test_the_search_step_in_bfloat16_is_exported_for_tpus_without_float64():
    net = cnn.Supernet(get_space("S1"), 2, 3, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    graph, params = nnx.split(net, nnx.Param)
    weights = {cell: jnp.ones(len(net.space.paths(cell))) for cell in ("normal", "reduce")}
    step = jax.jit(jax.grad(lambda both, x: nnx.merge(graph, both[0])(x, both[1]).sum()))
    x = jnp.ones((2, 8, 8, 3))
    assert jax.eval_shape(lambda: net(x, weights)).dtype == jnp.float32
    assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(jax.eval_shape(step, (params, weights), x)))
    exported = jax.export.export(step, platforms=["tpu"])((params, weights), x)
    assert exported.platforms == ("tpu",)
    with jax.enable_x64(True):  # where float64 could appear, it does not
        program = str(jax.make_jaxpr(step)((params, weights), x))
    assert "bf16" in program and not re.findall(r"f64\[\d+[^\]]*\]", program)  # arrays; Python numbers are scalars of 64 bits
