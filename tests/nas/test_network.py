"""The supernet equals the published one; restricted to a genotype it equals a separate network."""

import pytest
import torch
from nas.methods import darts
from nas.nets.torch import cnn, convolution_kernels, nasbench201
from nas.nets.torch.operations import BatchNorm, frozen_statistics
from nas.space import spaces
from nas.space.genotype import CellGenotype, Genotype, load_genotype
from nas_cases import copy_weights, random_weights, supernet
from pruning import networks
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode


def with_published(linear):
    """Our supernet and the published one with the same weights, in double precision."""
    from naive_darts import NaiveNetwork

    torch.manual_seed(0)
    naive = NaiveNetwork(2, 3, linear=linear).double()
    ours = cnn.Supernet(spaces.get_space("darts" if linear else "darts_zero"), 2, 3).double()
    copy_weights(naive, ours)
    return ours, naive


@pytest.mark.parametrize("linear", [True, False], ids=["linear", "softmax"])
def test_the_supernet_and_its_gradients_equal_the_published_one(linear, exact_kernels):
    ours, naive = with_published(linear)
    x, y = torch.randn(4, 3, 16, 16, dtype=torch.float64), torch.randint(10, (4,))
    alphas = {c: a.detach().reshape(-1).clone().requires_grad_() for c, a in zip(("normal", "reduce"), naive.arch_parameters())}
    weights = alphas if linear else darts.edge_softmax(ours.space, alphas)
    ours_out, naive_out = ours(x, weights), naive(x)
    torch.testing.assert_close(ours_out, naive_out, rtol=1e-6, atol=1e-8)
    F.cross_entropy(ours_out, y).backward()
    F.cross_entropy(naive_out, y).backward()
    for a, b in zip(alphas.values(), naive.arch_parameters()):
        torch.testing.assert_close(a.grad, b.grad.reshape(-1), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(ours.stem[0].weight.grad, naive.stem[0].weight.grad, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(ours.classifier.weight.grad, naive.classifier.weight.grad, rtol=1e-6, atol=1e-8)


def test_single_precision_agrees_to_rounding():
    net = supernet("S1")
    x, weights = torch.randn(4, 3, 16, 16), random_weights(net)
    with torch.no_grad():
        single = net(x, weights)
        double = net.double()(x.double(), {cell: w.double() for cell, w in weights.items()})
    torch.testing.assert_close(single.double(), double, rtol=0, atol=1e-3 * float(double.abs().max()))


@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("size", [8, 7])
def test_depthwise_convolutions_have_the_gradients_of_pytorch(kernel, stride, dilation, size, exact_kernels):
    torch.manual_seed(0)
    conv = convolution_kernels.DepthwiseConv(3, kernel, stride, dilation).double()
    x = torch.randn(2, 3, size, size, requires_grad=True, dtype=torch.float64)
    y = conv(x)
    reference = F.conv2d(x, conv.weight, None, stride, dilation * (kernel // 2), dilation, 3)
    torch.testing.assert_close(y, reference)
    out = torch.randn_like(y)
    ours, theirs = (torch.autograd.grad(r, (x, conv.weight), out, retain_graph=True) for r in (y, reference))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("many", [0, 1 << 16])
@pytest.mark.parametrize("affine", [False, True])
def test_a_pointwise_convolution_with_its_norm_is_both_one_after_the_other(many, affine, exact_kernels, monkeypatch):
    monkeypatch.setattr(convolution_kernels, "MANY_VALUES", many)
    torch.manual_seed(0)
    x = (torch.randn(4, 3, 6, 6, dtype=torch.float64) + 2).requires_grad_()
    conv, scale = nn.Conv2d(3, 5, 1, bias=False).double(), torch.randn(5, requires_grad=True, dtype=torch.float64)
    fused, plain = BatchNorm(5, affine=affine).double(), BatchNorm(5, affine=affine).double()
    if affine:
        for norm in (fused, plain):
            norm.weight.data, norm.bias.data = torch.arange(1.0, 6).double(), torch.arange(5.0).double()
    y, reference = fused.after(conv, x, scale), plain(conv(x), scale)
    torch.testing.assert_close(y, reference)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(fused, name), getattr(plain, name))
    out = torch.randn(4, 10, 6, 6, dtype=torch.float64).to(memory_format=torch.channels_last)[:, :5]  # part of another tensor
    inputs = (x, conv.weight, scale)
    once = [torch.autograd.grad(r, inputs, out, retain_graph=True) for r in (y, reference)]
    ours, theirs = (torch.autograd.grad(r, inputs, out, create_graph=True) for r in (y, reference))
    for a, b in zip([*once[0], *ours], [*once[1], *theirs], strict=True):
        torch.testing.assert_close(a, b)
    twice = [torch.autograd.grad(sum((g**2).sum() for g in grads), inputs, retain_graph=True) for grads in (ours, theirs)]
    for a, b in zip(*twice):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_moments_in_single_precision_are_those_of_the_convolution():
    """Channels with means larger than their deviations, whose convolution nearly cancels."""
    torch.manual_seed(0)
    common = torch.randn(16, 1, 32, 32)
    x = (3 + common + 0.3 * torch.randn(16, 8, 32, 32)).to(memory_format=torch.channels_last).requires_grad_()
    conv, norm = nn.Conv2d(8, 8, 1, bias=False), BatchNorm(8, affine=False)
    assert x.numel() >= convolution_kernels.MANY_VALUES
    conv.weight.data -= conv.weight.data.mean(1, keepdim=True)
    y = norm.after(conv, x)
    assert "PointwiseNorm" in type(y.grad_fn).__name__
    exact = F.batch_norm(F.conv2d(x.double(), conv.weight.double()), None, None, training=True)
    # Moments as differences of single-precision sums are off by 1.2e-3 here, those of the kernel by 1e-4, on any machine.
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=3e-4)


def test_every_second_pixel_has_the_gradient_of_a_slice(exact_kernels):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 8, dtype=torch.float64, requires_grad=True)
    found = convolution_kernels.every_second(x, 0, 1)
    assert all(torch.equal(y, x[:, :, o::2, o::2]) for o, y in enumerate(found))
    assert torch.autograd.gradcheck(lambda x: convolution_kernels.every_second(x, 0, 1), x)
    assert torch.autograd.gradgradcheck(lambda x: convolution_kernels.every_second(x, 1), x)
    (grad,) = torch.autograd.grad(sum(y.sum() for y in found), x)
    assert grad.is_contiguous(memory_format=torch.channels_last)


class Strided1x1(TorchDispatchMode):
    """Records the strided 1x1 convolutions of which a gradient is taken."""

    def __init__(self):
        super().__init__()
        self.found, self.gradients = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default:
            self.gradients += 1
            weight, stride = args[2], args[4]
            self.found += [tuple(weight.shape)] if tuple(weight.shape[2:]) == (1, 1) and set(stride) != {1} else []
        return func(*args, **(kwargs or {}))


CELL = CellGenotype.from_string("|nor_conv_3x3~0|+|nor_conv_1x1~0|skip_connect~1|+|avg_pool_3x3~0|nor_conv_1x1~1|nor_conv_3x3~2|")
IN_CHANNELS_LAST = {
    "supernet": lambda: cnn.Supernet(spaces.get_space("darts"), 2, 3),
    "network": lambda: cnn.Network(load_genotype("DARTS_V2"), 2, 3, auxiliary=False),
    "network for ImageNet": lambda: cnn.ImageNetNetwork(load_genotype("DARTS_V2"), 4, 3, auxiliary=False),
    "supernet of NAS-Bench-201": lambda: nasbench201.Supernet(spaces.get_space("nasbench201"), 2, 3),
    "supernet with patches": lambda: nasbench201.Supernet(spaces.get_space("nasbench201"), 2, 3, transition="patch"),
    "network of NAS-Bench-201": lambda: nasbench201.Network(CELL, 2, 3),
    "ResNet": lambda: networks.resnet20(3).to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("kind", IN_CHANNELS_LAST)
def test_no_network_meets_the_convolution_of_which_onednn_corrupts_memory(kind):
    """Strided, 1x1, in channels_last, with fewer than 16 channels (uxlfoundation/oneDNN#6035): ours slice their input instead."""
    net = IN_CHANNELS_LAST[kind]()
    out = net(torch.randn(2, 3, 32, 32))
    with Strided1x1() as seen:
        (out[0] if isinstance(out, tuple) else out).sum().backward()
    assert seen.gradients >= 9 and not seen.found
    with Strided1x1() as seen:
        nn.Conv2d(3, 4, 1, 2)(torch.randn(2, 3, 8, 8)).sum().backward()  # in the other layout, which is safe
    assert seen.found == [(4, 3, 1, 1)]


@pytest.mark.parametrize("training", [True, False])
def test_dead_paths_need_not_run(training):
    net = supernet("darts", 2).double().train(training)
    weights = random_weights(net, 0.3)
    active = {cell: (w != 0).tolist() for cell, w in weights.items()}
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad(), frozen_statistics(net):
        torch.testing.assert_close(net(x, weights, active), net(x, weights))


@pytest.mark.parametrize("space", ["darts", "S1", "S4"])
@pytest.mark.parametrize("training", [True, False])
def test_what_lives_is_a_network_that_computes_the_same(space, training):
    net = supernet(space, 2).double()
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    net(x)  # statistics
    for active in (0.15, 0.4, 1.0):
        weights = random_weights(net, active)
        found = net.space.genotype({cell: (w != 0).tolist() for cell, w in weights.items()}).clean()
        if not all(map(found.active_nodes, ("normal", "reduce"))):
            continue
        alone = cnn.restricted(net, found, weights).train(training)
        masks = net.train(training).space.masks(found)
        with torch.no_grad(), frozen_statistics(net), frozen_statistics(alone):
            torch.manual_seed(1)
            whole = net(x, weights, masks)
            torch.manual_seed(1)
            torch.testing.assert_close(alone(x)[0], whole)


def test_extra_passes_leave_the_statistics_as_they_were():
    net, x = supernet("cherry"), torch.randn(4, 3, 16, 16)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with frozen_statistics(net):
        net(x)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    net(x)
    assert not all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_cells_may_have_weights_of_their_own():
    net = supernet(channels=2, layers=5).double()
    shared = random_weights(net)
    own = {c: w.expand(sum(k == c for k in net.kinds), -1).clone() for c, w in shared.items()}
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad(), frozen_statistics(net):
        torch.testing.assert_close(net(x, own), net(x, shared))
    with pytest.raises(ValueError, match=r"normal: weights have shape \(98,\) or \(3, 98\), got \(97,\)"):
        net(x, {"normal": torch.ones(97), "reduce": torch.ones(98)})


def test_the_form_of_gsparsity_pads_nodes_and_drops_the_sums_of_edges():
    found = Genotype({"2": [("max_pool_3x3", 0), ("sep_conv_3x3", 0)], "5": [("skip_connect", 2)]}, {"3": [("avg_pool_3x3", 1)]})
    net = cnn.Network(found, 4, 3, auxiliary=False, form="gsparsity")
    first, reduction = net.cells[:2]
    assert first.active_nodes == (2, 5, 3, 4) and reduction.active_nodes == (3, 2, 4, 5), "zeros come behind the others"
    assert first.operations[0].norm.affine and first.operations[2].norm is None, "norms after pools, not after identities"
    assert net.classifier.in_features == 4 * 16
    images = torch.randn(8, 3, 8, 8)
    assert net.eval()(images)[0].shape == (8, 10)
    sources = {0: cnn.Source(torch.ones(64, 4, 4, 4)), 2: cnn.Source(torch.ones(64, 4, 4, 4))}
    first.train()
    (pool_and_conv,), (skip,) = ([*first._edges(node, sources, 0.5)] for node in (2, 5))
    assert set(skip[:, 0, 0, 0].tolist()) == {0.0, 2.0}, "identities are dropped too"
    assert 10 < int((pool_and_conv == 0).flatten(1).all(1).sum()) < 54, "both operations of an edge together"
    again = cnn.Network(found, 4, 3, auxiliary=False)
    assert again.cells[0].active_nodes == (2, 5) and again.classifier.in_features == 16


def test_drop_path_keeps_the_mean_and_stays_out_of_evaluation():
    torch.manual_seed(0)
    x = torch.ones(20_000, 1, 1, 1)
    y = cnn.drop(x, 0.25)
    assert y.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert float(y.mean()) == pytest.approx(1.0, abs=0.02)
    assert cnn.drop(x, 0.0) is x
