"""Searches of NAS-Bench-201 cells in JAX: the networks compute what those in PyTorch compute, and a sweep what its seeds do."""

from __future__ import annotations

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from libraries import jax_precision
from nas.nets.jax import cnn
from nas.nets.jax import nasbench201 as ours
from nas.nets.jax.dense_convolution import convolve
from nas.nets.torch import nasbench201 as theirs
from nas.space.genotype import CellGenotype
from nas.space.spaces import get_space
from nas_jax_cases import _kernel, gradient, module_leaves, value
from torch.nn import functional as F

NONZERO = get_space("nasbench201_nonzero")
# compilation takes most of the time of these tests
plain = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True})
CELL = CellGenotype.from_string("|nor_conv_3x3~0|+|none~0|skip_connect~1|+|avg_pool_3x3~0|none~1|nor_conv_1x1~2|")


def layer_leaves(module, get):
    """The numbers of a transition, or of a ReLU, convolution and batch norm, by the paths of its equivalent in JAX."""
    norm_of = lambda norm: {("norm", *k): a[None] for k, a in module_leaves(norm, get).items()}
    if isinstance(module, theirs.ResidualBlock):
        halves = {(name, *k): a for name in ("first", "second") for k, a in layer_leaves(getattr(module, name), get).items()}
        return halves | {("shortcut",): _kernel(module.shortcut[1], get)[None, None]}
    *_, conv, norm = module
    kernel = _kernel(conv, get)
    return {("kernel",): kernel if kernel.ndim == 4 else kernel[None, None]} | norm_of(norm)


def leaves_of(net, equivalent, get=value):
    """The numbers of a network of PyTorch, by the paths of the leaves of its equivalent in JAX."""
    found = {("stem", *k): a for k, a in layer_leaves(net.stem, get).items()}
    found |= {("norm", *k): a[None] for k, a in module_leaves(net.norm, get).items()}
    found |= {("classifier", *k): a for k, a in module_leaves(net.classifier, get).items()}
    for i, layer in enumerate(net.cells):
        if isinstance(layer, theirs.MixedCell):
            for group in getattr(equivalent, f"cell{i}").plan.groups:
                if group.operation in ours.KERNELS:
                    kernels = [_kernel(layer.operation(path), get) for path in group.indices]
                    size, channels = ours.KERNELS[group.operation], kernels[0].shape[-1]
                    found[f"cell{i}", group.name, "kernel"] = np.stack(kernels).reshape(-1, size, size, channels, channels)
        elif isinstance(layer, theirs.Cell):
            modules = [(k, m) for k, m in enumerate(layer.operations) if isinstance(m, theirs.ReluConvNorm)]
            found |= {(f"cell{i}", f"path{k}", *name): a for k, m in modules for name, a in layer_leaves(m, get).items()}
        else:
            found |= {(f"cell{i}", *k): a for k, a in layer_leaves(layer, get).items()}
    return found


def state_of(net, equivalent, get=value):
    """The state of the equivalent network in JAX with the numbers of a network of PyTorch, or with their gradients."""
    state, leaves = nnx.state(equivalent, nnx.Param), leaves_of(net, equivalent, get)
    wanted = cnn._flat(state)
    assert {name for name in leaves if name[-1] not in ("mean", "var")} == set(wanted)
    for name, leaf in wanted.items():
        assert leaf.shape == leaves[name].shape, (name, leaf.shape, leaves[name].shape)
    return cnn._like(state, {name: jnp.asarray(leaves[name], leaf.dtype) for name, leaf in wanted.items()})


def images_and_labels(size=8, count=6):
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(count, 3, size, size, dtype=torch.float64, generator=draw)
    y = torch.randint(10, (count,), generator=draw)
    return x, y, x.numpy().transpose(0, 2, 3, 1), y.numpy()


def cross_entropy(logits, labels):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).mean()


def close(found, expected, name=""):
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-10, err_msg=str(name))


def flags_of(case):
    """Flags of the paths; None: all."""
    paths = NONZERO.paths("cell")
    if case == "all":
        return None
    if case == "node 2 is not read":
        return [path.source != 2 for path in paths]
    if case == "node 1 has no path":
        return [path.node != 1 for path in paths]
    if case == "not connected":
        return [path.node != 3 for path in paths]
    return np.random.default_rng(0).random(len(paths)).round().astype(bool).tolist()


@cache
def both(path_norm, transition):
    torch.manual_seed(0)
    net = theirs.Supernet(NONZERO, 2, 3, path_norm=path_norm, transition=transition).double()
    options = {"path_norm": path_norm, "transition": transition}
    equivalent = ours.Supernet(NONZERO, 2, 3, rngs=nnx.Rngs(0), dtype=jnp.float64, **options)
    graph, _ = nnx.split(equivalent, nnx.Param)

    def loss(params, weights, images, labels, active):
        logits = nnx.merge(graph, params)(images, weights, None if active is None else {"cell": active})
        return cross_entropy(logits, labels), logits

    return net, equivalent, state_of(net, equivalent), plain(jax.value_and_grad(loss, (0, 1), has_aux=True))


@pytest.mark.parametrize("case", ["all", "some", "node 2 is not read", "node 1 has no path", "not connected"])
@pytest.mark.parametrize("path_norm, transition", [(False, "residual"), (True, "patch")])
def test_logits_and_gradients_are_those_of_pytorch(path_norm, transition, case):
    with jax_precision():
        net, equivalent, params, compiled = both(path_norm, transition)
        rng, flags = np.random.default_rng(0), flags_of(case)
        weights = rng.normal(size=(len(NONZERO.paths("cell")),))
        x, y, images, labels = images_and_labels()
        net.zero_grad(set_to_none=True)
        leaf = torch.tensor(weights, requires_grad=True)
        logits = net(x, {"cell": leaf}, None if flags is None else {"cell": flags})
        F.cross_entropy(logits, y).backward()
        given = jnp.ones(len(weights), bool) if flags is None else jnp.asarray(flags)
        (_, found), (grads, of_weights) = compiled(params, {"cell": jnp.asarray(weights)}, images, labels, given)
        close(found, logits.detach())
        close(of_weights["cell"], torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)
        flat = cnn._flat(grads)
        for name, wanted in leaves_of(net, equivalent, gradient).items():
            close(flat[name], wanted, name)
        trained = cnn._flat(equivalent.trained({"cell": given}))
        for name, wanted in leaves_of(net, equivalent, lambda p: torch.full_like(p, p.grad is not None)).items():
            np.testing.assert_array_equal(np.broadcast_to(trained[name], wanted.shape), wanted != 0, err_msg=str(name))


def test_flags_in_the_program_leave_the_other_paths_out():
    with jax_precision():
        net, equivalent, params, _ = both(True, "patch")
        x, _, images, _ = images_and_labels()
        flags = {"cell": tuple(flags_of("some"))}
        with torch.no_grad():
            expected = net(x, None, flags)
        close(plain(lambda params: nnx.merge(nnx.split(equivalent)[0], params)(images, None, flags))(params), expected)


def test_the_network_of_a_cell_is_that_of_pytorch():
    with jax_precision():
        torch.manual_seed(0)
        net = theirs.Network(CELL, 2, 3).double()
        equivalent = ours.Network(CELL, 2, 3, rngs=nnx.Rngs(0), dtype=jnp.float64)
        x, _, images, _ = images_and_labels()
        nnx.update(equivalent, state_of(net, equivalent))
        graph, state = nnx.split(equivalent)
        logits = plain(lambda state: nnx.merge(graph, state)(images)[0])(state)
        close(logits, net(x)[0].detach())


@pytest.mark.parametrize("cell", [CELL, CellGenotype.from_string("|none~0|+|none~0|none~1|+|nor_conv_3x3~0|none~1|none~2|")])
def test_parameters_and_multiply_adds_are_those_of_pytorch(cell):
    assert ours.genotype_size(cell) == theirs.genotype_size(cell)


@pytest.mark.parametrize("size, kernel, stride", [(6, 3, 1), (6, 1, 1), (7, 3, 2), (4, 5, 1)])
def test_the_convolution_of_many_networks_and_its_derivatives_are_those_of_xla(size, kernel, stride):
    rng = np.random.default_rng(0)
    with jax_precision():
        x, w = jnp.asarray(rng.normal(size=(2, 3, size, size, 2))), jnp.asarray(rng.normal(size=(2, kernel, kernel, 2, 3)))

        def xla(x, w):
            padding = [(kernel // 2,) * 2] * 2
            return jax.lax.conv_general_dilated(x, w, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))

        def twice(f):
            """Gradients of a sum of squares of gradients: all three primitives and the derivatives of each."""
            first = lambda x, w: jax.grad(lambda x, w: (f(x, w) ** 3).sum(), (0, 1))(x, w)
            return jax.vmap(jax.grad(lambda x, w: sum((g**2).sum() for g in first(x, w)), (0, 1)))

        for found, expected in zip(plain(twice(partial(convolve, stride=stride)))(x, w), plain(twice(xla))(x, w)):
            close(found, expected)
