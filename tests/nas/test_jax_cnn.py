"""The convolutional networks in JAX compute what those in PyTorch compute; what is compiled runs on accelerators."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from libraries import jax_precision
from nas.nets.jax import cnn, operations
from nas.nets.jax.convolution_kernels import depthwise
from nas.nets.torch import cnn as torch_cnn
from nas.nets.torch.operations import MAKE
from nas.space.genotype import PUBLISHED, Genotype
from nas.space.genotype import Path as GenotypePath
from nas.space.spaces import DARTS, Space, get_space
from nas_jax_cases import gradient, module_leaves, state_of, value
from torch.nn import functional as F

pytestmark = pytest.mark.usefixtures("fast_compilation")

DARTS_V2 = PUBLISHED["convolutional"]["DARTS_V2"]
MANY = Genotype(
    {"2": (("skip_connect", 0), ("max_pool_3x3", 1)), "4": (("conv_7x1_1x7", 2), ("avg_pool_3x3", 2))},
    {"2": (("skip_connect", 0), ("dil_conv_3x3", 1)), "3": (("max_pool_3x3", 0), ("skip_connect", 2), ("conv_7x1_1x7", 0))},
)
SMALL = Genotype({"2": (("skip_connect", 0), ("sep_conv_3x3", 1))}, {"2": (("max_pool_3x3", 0), ("skip_connect", 1))})
# compilation takes most of the time of these tests
plain = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True})


def space_of(name, normal, reduce):
    """A space with operations on these edges only."""
    edges = Genotype.layout.edges
    return Space(name, {"normal": tuple(normal.get(e, ()) for e in edges), "reduce": tuple(reduce.get(e, ()) for e in edges)})


# few edges, for quick compilation; several operations to a node, and a chain of nodes
MIXED = space_of(
    "mixed",
    {
        (2, 0): ("none", "sep_conv_3x3", "max_pool_3x3"),
        (2, 1): ("skip_connect",),
        (3, 1): ("max_pool_3x3",),
        (3, 2): ("sep_conv_3x3", "skip_connect"),
        (4, 0): ("sep_conv_3x3",),
        (4, 3): ("skip_connect", "max_pool_3x3"),
        (5, 1): ("skip_connect",),
    },
    {
        (2, 0): ("sep_conv_3x3",),
        (3, 1): ("sep_conv_3x3",),
        (3, 2): ("none", "max_pool_3x3"),
        (4, 0): ("sep_conv_3x3",),
        (5, 3): ("max_pool_3x3",),
        (5, 4): ("max_pool_3x3",),
    },
)


@pytest.fixture
def double():
    with jax_precision():
        yield


def close(found, expected, name=""):
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-11, err_msg=str(name))


def numbers(tensor):
    """An image tensor of PyTorch as an array (N, H, W, C)."""
    x = tensor.detach().numpy()
    return x.transpose(0, 2, 3, 1) if x.ndim == 4 else x


@cache
def images_and_labels(size=8, count=8):
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(count, 3, size, size, dtype=torch.float64, generator=draw)
    y = torch.randint(10, (count,), generator=draw)
    return x, y, numbers(x), y.numpy()


def cross_entropy(logits, labels):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).mean()


@cache
def both(space):
    """The supernets of both libraries with the same parameters: (PyTorch, JAX, its graph, its parameters)."""
    torch.manual_seed(0)
    theirs = torch_cnn.Supernet(space, 2, 3).double()
    ours = cnn.Supernet(space, 2, 3, rngs=nnx.Rngs(0), dtype=jnp.float64)
    return theirs, ours, nnx.split(ours, nnx.Param)[0], state_of(theirs, ours)


def loss_of(graph):
    def loss(params, weights, images, labels, active=None):
        logits = nnx.merge(graph, params)(images, weights, active)
        return cross_entropy(logits, labels), logits

    return loss


def drawn_weights(ours, own, seed=0):
    """Architecture weights, of each cell its own or of both cell types."""
    rng = np.random.default_rng(seed)
    sizes = {cell: len(ours.space.paths(cell)) for cell in ("normal", "reduce")}
    return {cell: rng.normal(size=(ours.kinds.count(cell), n) if own else n) for cell, n in sizes.items()}


def with_torch(theirs, weights, active=None):
    """Loss, logits and architecture gradient of PyTorch; gradients of the network weights stay in the parameters."""
    x, y, *_ = images_and_labels()
    theirs.zero_grad(set_to_none=True)
    leaves = {c: torch.tensor(w, requires_grad=True) for c, w in weights.items()}
    logits = theirs(x, leaves, active)
    loss = F.cross_entropy(logits, y)
    loss.backward()
    return loss.item(), numbers(logits), {c: numbers(w.grad) for c, w in leaves.items()}


def check_gradients(theirs, ours, found, expected):
    """Compare the results of value_and_grad over (params, weights) with those of `with_torch`."""
    (loss, logits), (grads, arch) = found
    close(logits, expected[1])
    close(loss, expected[0])
    for cell, w in expected[2].items():
        close(arch[cell], w, cell)
    flat = cnn._flat(grads)
    for name, wanted in cnn._flat(state_of(theirs, ours, gradient)).items():
        close(flat[name], wanted, name)


def check_trained(theirs, ours, active):
    """A parameter is trained if PyTorch computes a gradient for it."""
    trained = cnn._flat(ours.trained({c: jnp.asarray(a) for c, a in active.items()}))
    with_gradient = cnn._flat(state_of(theirs, ours, lambda p: torch.full_like(p, p.grad is not None)))
    for name, expected in with_gradient.items():
        np.testing.assert_array_equal(np.broadcast_to(trained[name], expected.shape), expected != 0, err_msg=str(name))
    return trained


EVERY = lambda path: True
ACTIVE = {  # which paths are active: in normal cells, in reduction cells
    "all": (EVERY, EVERY),
    "no path into node 3": (lambda p: p.node != 3, lambda p: p.node != 3),
    "input 0 of normal cells is not used": (lambda p: p.source != 0, EVERY),
    "input 1 of reduction cells is not used": (EVERY, lambda p: p.source != 1),
    "input 0 of reduction cells is not used": (EVERY, lambda p: p.source != 0),
    "one path": (lambda p: p[:2] == (2, 1), lambda p: p == GenotypePath(4, 0, "sep_conv_3x3")),
}


def flags_of(space, name):
    if name.startswith("random"):
        rng = np.random.default_rng(int(name[-1]))
        return {cell: [bool(u < 0.5) for u in rng.random(len(space.paths(cell)))] for cell in ("normal", "reduce")}
    return {cell: [rule(path) for path in space.paths(cell)] for cell, rule in zip(("normal", "reduce"), ACTIVE[name])}


@cache
def compiled_for_all_flags():
    """The gradients with flags that are inputs of the compiled function."""
    return plain(jax.value_and_grad(loss_of(both(MIXED)[2]), (0, 1), has_aux=True))


@pytest.mark.parametrize("active", [*ACTIVE, "random 0", "random 1", "random 2"])
def test_gradients_with_flags_as_arrays_are_those_of_pytorch(active, double):
    theirs, ours, _, params = both(MIXED)
    weights, flags = drawn_weights(ours, own=True), flags_of(MIXED, active)
    expected = with_torch(theirs, weights, flags)
    flags = {c: jnp.asarray(a) for c, a in flags.items()}
    found = compiled_for_all_flags()(params, weights, *images_and_labels()[2:], flags)
    check_gradients(theirs, ours, found, expected)
    trained = check_trained(theirs, ours, flags)
    if active == "input 1 of reduction cells is not used":  # the first of two reduction cells is input 1 of the second
        assert not any(flag.any() for name, flag in trained.items() if name[0] == "cell1")


def test_first_and_second_derivatives_with_flags_in_the_program_are_those_of_pytorch(double):
    theirs, ours, graph, params = both(MIXED)
    flags = flags_of(MIXED, "no path into node 3")
    weights, direction = (drawn_weights(ours, own=False, seed=seed) for seed in (0, 1))
    expected = with_torch(theirs, weights, flags)
    x, y, images, labels = images_and_labels()
    gradients = jax.value_and_grad(lambda p, w: loss_of(graph)(p, w, images, labels, flags), (0, 1), has_aux=True)
    along = jax.tree.map(jnp.zeros_like, params), direction
    found, (_, twice) = plain(partial(jax.jvp, gradients))((params, weights), along)
    check_gradients(theirs, ours, found, expected)

    leaves = {c: torch.tensor(w, requires_grad=True) for c, w in weights.items()}
    grads = torch.autograd.grad(F.cross_entropy(theirs(x, leaves, flags), y), [*leaves.values()], create_graph=True)
    theirs.zero_grad(set_to_none=True)
    sum((g * torch.tensor(d)).sum() for g, d in zip(grads, direction.values())).backward()
    for cell, w in leaves.items():
        np.testing.assert_allclose(twice[1][cell], w.grad, rtol=1e-8, atol=1e-10)
    flat = cnn._flat(twice[0])
    for name, wanted in cnn._flat(state_of(theirs, ours, gradient)).items():
        np.testing.assert_allclose(flat[name], wanted, rtol=1e-8, atol=1e-10, err_msg=str(name))


def test_without_weights_and_flags_all_paths_count_once(double):
    theirs, _, graph, params = both(MIXED)
    x, _, images, _ = images_and_labels()
    with torch.no_grad():
        expected = theirs(x).numpy()
    close(plain(lambda params: nnx.merge(graph, params)(images))(params), expected)


EIGHT_DEVICES = """
import jax, numpy as np
jax.config.update("jax_enable_x64", True)
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import test_jax_cnn as cases

assert jax.device_count() == 8
theirs, ours, _, params = cases.both(cases.MIXED)
weights, flags = cases.drawn_weights(ours, own=True), cases.flags_of(cases.MIXED, "random 0")
expected = cases.with_torch(theirs, weights, flags)
mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
images, labels = jax.device_put(cases.images_and_labels()[2:], NamedSharding(mesh, P("data")))
flags = {cell: jax.numpy.asarray(a) for cell, a in flags.items()}
same = jax.device_put((params, weights, flags), NamedSharding(mesh, P()))
inputs = *same[:2], images, labels, same[2]
step = cases.compiled_for_all_flags().lower(*inputs).compile()
cases.check_gradients(theirs, ours, step(*inputs), expected)
assert "all-gather" not in step.as_text()  # images and what is computed from them stay where they are
print("as on one device")
"""


@pytest.mark.commands
def test_a_batch_divided_over_eight_devices_gives_the_same_gradients():
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run([sys.executable, "-c", EIGHT_DEVICES], env=environment, capture_output=True, text=True, timeout=300)
    assert "as on one device" in done.stdout, done.stderr[-3000:]


NOISY = space_of(
    "noisy",
    {(2, 0): ("noise", "skip_connect"), (3, 1): ("noise",)},
    {(2, 0): ("noise",), (3, 1): ("noise",)},
)


def test_noise_depends_on_key_cell_and_path_alone():
    net = cnn.Supernet(NOISY, 2, 3, rngs=nnx.Rngs(0))
    images = images_and_labels()[2].astype(np.float32)
    graph, params = nnx.split(net)
    run = plain(lambda params, active, key: nnx.merge(graph, params)(images, None, active, key))
    active = {"normal": [False, True, True], "reduce": [True, False]}
    flags, key = {cell: jnp.asarray(a) for cell, a in active.items()}, jax.random.key(0)
    found = run(params, flags, key)
    np.testing.assert_array_equal(found, run(params, flags, key))
    assert not np.allclose(found, run(params, flags, jax.random.key(1)))
    alone = plain(lambda params: nnx.merge(graph, params)(images, None, active, key))(params)
    np.testing.assert_allclose(alone, found, rtol=1e-4, atol=1e-5)

    noise = operations.Noise(2)
    drawn = noise(jnp.zeros((32, 15, 16, 8)), key)
    assert drawn.shape == (32, 8, 8, 8)
    assert float(drawn.mean()) == pytest.approx(0, abs=0.03)
    assert float(drawn.std()) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("stride", [1, 2])
def test_operations_and_their_gradients_are_those_of_pytorch(stride, double):
    """Each operation of the search form, for a stack of two paths with their own sources, parameters and weights."""
    torch.manual_seed(0)
    x, scale = torch.randn(2, 3, 4, 6, 8, dtype=torch.float64), torch.tensor([0.7, -1.3], dtype=torch.float64)
    stacks, expected = {}, {}
    for name in (*DARTS, "conv_7x1_1x7"):
        made = [MAKE[name](4, stride, "search").double() for _ in range(2)]
        inputs = x.clone().requires_grad_(), scale.clone().requires_grad_()
        y = torch.stack([m(a, s.expand(4)) for m, a, s in zip(made, *inputs)])
        (y**3).sum().backward()
        leaves = [[module_leaves(m, get) for m in made] for get in (value, gradient)]
        params, grads = ({key: np.stack([a[key], b[key]]) for key in a} for a, b in leaves)
        stacks[name] = cnn.make(name, 2, 4, stride, "search", nnx.Rngs(0), jnp.float64), params
        expected[name] = y, *(a.grad for a in inputs), grads

    def run(name, x, scale, params):
        operation, _ = stacks[name]
        graph, state = nnx.split(operation, nnx.Param)
        operation = nnx.merge(graph, cnn._like(state, params))
        if isinstance(operation, operations.Identity):
            return x * scale[:, None, None, None, None]
        if isinstance(operation, operations.Pool):
            return operation(x, scale)
        return operation(nnx.relu(x), None, scale)

    def gradients(name, *inputs):
        y, pull = jax.vjp(partial(run, name), *inputs)
        return y, *pull(3 * y**2)

    last = lambda tensor: np.moveaxis(tensor.detach().numpy(), 2, -1)
    inputs = last(x), scale.numpy()
    found = plain(lambda params: {name: gradients(name, *inputs, params[name]) for name in stacks})(
        {name: params for name, (_, params) in stacks.items()}
    )
    for name, (y, x_grad, scale_grad, grads) in expected.items():
        close(found[name][0], last(y), name)
        close(found[name][1], last(x_grad), name)
        close(found[name][2], scale_grad, name)
        for key, wanted in grads.items():
            close(found[name][3][key], wanted, (name, key))


def test_statistics_of_bfloat16_are_float32():
    x = jnp.asarray(np.random.default_rng(0).normal(30, 0.5, (1, 64, 8, 8, 2)), jnp.bfloat16)
    found = operations.BatchNorm(1, 2, False, jnp.float32)(x)
    exact = np.asarray(x, np.float64)
    exact = (exact - exact.mean((1, 2, 3))) / np.sqrt(exact.var((1, 2, 3)) + operations.EPS)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float64), exact, rtol=2**-8, atol=1e-4)  # one rounding, at the end


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
    theirs = torch_cnn.Supernet(MIXED, 2, 3)
    net = cnn.Supernet(MIXED, 2, 3, rngs=nnx.Rngs(0))
    params = nnx.state(net, nnx.Param)
    vectors, rest = cnn.split_paths(net, params)
    sizes = {key: sum(p.numel() for p in ps) for key, ps in theirs.path_parameters().items()}
    assert {key: v.size for key, v in vectors.items()} == {key: n for key, n in sizes.items() if n}
    again = cnn.join_paths(net, vectors, rest)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.parametrize(
    ("genotype", "layers", "auxiliary", "size"), [(MANY, 3, False, 8), (SMALL, 2, True, 32)], ids=["many", "auxiliary"]
)
def test_the_network_of_a_genotype_equals_that_of_pytorch(genotype, layers, auxiliary, size, double):
    torch.manual_seed(0)
    theirs = torch_cnn.Network(genotype, 2, layers, auxiliary=auxiliary).double()
    ours = cnn.Network(genotype, 2, layers, auxiliary=auxiliary, rngs=nnx.Rngs(0), dtype=jnp.float64)
    params, statistics = (state_of(theirs, ours, kind=kind) for kind in (nnx.Param, nnx.BatchStat))
    x, _, images, _ = images_and_labels(size)
    present = lambda outputs: [y for y in outputs if y is not None]

    def run(params, statistics):
        net = nnx.merge(nnx.split(ours, nnx.Param, nnx.BatchStat)[0], params, statistics)
        outputs = present(net(images))
        return sum((y**2).sum() for y in outputs), (outputs, nnx.state(net, nnx.BatchStat))

    (grads, _), (outputs, statistics) = plain(jax.grad(run, (0, 1), has_aux=True))(params, statistics)
    expected = present(theirs(x))
    sum((y**2).sum() for y in expected).backward()
    assert len(outputs) == len(expected) == 1 + auxiliary
    for y, wanted in zip(outputs, expected):
        close(y, numbers(wanted))
    for found, kind, get in ((grads, nnx.Param, gradient), (statistics, nnx.BatchStat, value)):
        flat = cnn._flat(found)
        for name, wanted in cnn._flat(state_of(theirs, ours, get, kind)).items():
            np.testing.assert_allclose(flat[name], wanted, rtol=1e-8, atol=1e-9, err_msg=str(name))

    theirs.eval()
    ours.eval()
    logits, head = theirs(x)
    _, (outputs, after) = plain(run)(params, statistics)
    assert head is None and len(outputs) == 1
    close(outputs[0], numbers(logits))
    jax.tree.map(np.testing.assert_array_equal, after, statistics)
    assert cnn.network_size(ours, (size, size, 3)) == torch_cnn.network_size(theirs, (3, size, size))


def test_the_size_of_a_network_is_counted_as_in_pytorch():
    net = nnx.eval_shape(lambda: cnn.Network(DARTS_V2, 36, 6, rngs=nnx.Rngs(0)))
    assert cnn.network_size(net) == torch_cnn.network_size(torch_cnn.Network(DARTS_V2, 36, 6), (3, 32, 32))


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
        return plain(lambda both: (convolve(*both), forward_over_reverse(both), twice(both)))((x, w))

    found, expected = results(lambda x, w: depthwise(x, w, stride, dilation)), results(reference)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9), found, expected)


@pytest.mark.parametrize("stride", [1, 2])
def test_pools_have_the_gradients_of_pytorch(stride, double):
    """Also where several pixels of a window are equal: PyTorch chooses the first."""
    x = np.random.default_rng(0).integers(0, 3, (2, 6, 8, 3)).astype(float)
    theirs = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    pools = [(operations.max_pool, F.max_pool2d(theirs, 3, stride, 1))]
    pools += [(operations.avg_pool, F.avg_pool2d(theirs, 3, stride, 1, count_include_pad=False))]
    cubed = lambda ours: lambda x: (ours(x, stride) ** 3).sum()

    @plain
    def run(x):
        along = lambda ours: jax.jvp(jax.grad(cubed(ours)), (x,), (jnp.ones_like(x),))
        again = lambda ours: jax.grad(lambda x: jax.grad(cubed(ours))(x).sum())(x)
        return [(ours(x, stride), *along(ours), again(ours)) for ours, _ in pools]

    for (_, expected), (y, grad, forward_over_reverse, twice) in zip(pools, run(x)):
        np.testing.assert_allclose(y, numbers(expected), rtol=1e-12)
        (wanted,) = torch.autograd.grad((expected**3).sum(), theirs)
        np.testing.assert_allclose(grad, numbers(wanted), rtol=1e-12)
        np.testing.assert_allclose(forward_over_reverse, twice, rtol=1e-12)


def test_the_search_step_in_bfloat16_is_exported_for_tpus_without_float64_and_callbacks():
    net = cnn.Supernet(MIXED, 2, 3, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    graph, params = nnx.split(net, nnx.Param)
    weights = {cell: jnp.ones(len(MIXED.paths(cell))) for cell in ("normal", "reduce")}
    flags = {cell: jnp.ones(len(w), bool) for cell, w in weights.items()}
    gradients = jax.value_and_grad(loss_of(graph), (0, 1), has_aux=True)
    inputs = params, weights, jnp.ones((2, 8, 8, 3)), jnp.zeros(2, int), flags
    exported = jax.export.export(jax.jit(gradients), platforms=["tpu"])(*inputs)
    assert exported.platforms == ("tpu",)
    assert all(a.dtype == jnp.float32 for a in exported.out_avals)  # logits and gradients
    assert not re.findall(r"custom_call @\w*callback", exported.mlir_module())
    with jax_precision():  # where float64 could appear, it does not
        program = str(jax.make_jaxpr(gradients)(*inputs))
    assert "bf16" in program
    assert not re.findall(r"f64\[\d+[^\]]*\]", program)  # arrays; Python numbers are scalars of 64 bits
