"""compact on unusual networks: it never raises, never computes another function, and removes what can be removed.

Most networks are a convolution `c`, some of whose channels are zero, an operation, and a convolution `o` that reads the result.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from proxopt_torch import compact

UNSEEN = (1, 4)  # batch sizes; examples have 2 or another
SIDE = 6


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


class Net(nn.Module):
    """A network from a function ``forward(net, *inputs)`` and its modules, parameters, tensors (as buffers) and numbers."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part, persistent=False)
            else:
                setattr(self, name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def zero(layer: nn.Module, *rows: int) -> nn.Module:
    """The layer without these outputs: weights, and bias if it has one."""
    with torch.no_grad():
        for p in layer.parameters(recurse=False):
            p[list(rows)] = 0
    return layer


def unread(layer: nn.Module, *columns: int) -> nn.Module:
    """The layer with zero weights for these inputs."""
    with torch.no_grad():
        layer.weight[:, list(columns)] = 0
    return layer


def images(batch: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, 3, SIDE, SIDE),)


def leaves(outputs: Any) -> Iterator[Tensor]:
    """The tensors of nested outputs."""
    if isinstance(outputs, Tensor):
        yield outputs
    elif dataclasses.is_dataclass(outputs):
        yield from leaves([getattr(outputs, f.name) for f in dataclasses.fields(outputs)])
    elif isinstance(outputs, dict):
        yield from leaves(list(outputs.values()))
    elif isinstance(outputs, (tuple, list)):
        for output in outputs:
            yield from leaves(output)


def run(net: nn.Module, inputs: Any) -> list[Tensor]:
    torch.manual_seed(1)
    with torch.no_grad():
        return list(leaves(net(**inputs) if isinstance(inputs, dict) else net(*inputs)))


def check(
    net: nn.Module,
    inputs: Callable[[int], Any] = images,
    *,
    example: int = 2,
    unseen: tuple[int, ...] = UNSEEN,
    tolerance: float = 1e-4,
    **shapes: tuple[int, ...] | None,
) -> Any:
    """Compact a network and compare the two.

    inputs: the arguments for a batch size: a tuple, or a dict of keyword arguments. example: the batch size of the example.
    shapes: by name of a layer or parameter, the first dimensions of the weight that are expected.
    """
    training = net.training
    before = {name: t.clone() for name, t in net.state_dict().items() if isinstance(t, Tensor)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about modules that are deprecated
        small = compact(net, inputs(example), tolerance=tolerance)
    assert net.training == training and not small.model.training
    for name, t in net.state_dict().items():
        assert not isinstance(t, Tensor) or torch.equal(t, before[name]), f"{name} of the original was changed"
    if training:
        net.eval()
    for batch in unseen:
        fresh = inputs(batch)
        for a, b in zip(run(net, fresh), run(small.model, fresh), strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype
            if a.dtype.is_floating_point or a.dtype.is_complex:
                torch.testing.assert_close(a, b, rtol=0, atol=tolerance * float(a.abs().max()) + 1e-6)
            else:
                assert torch.equal(a, b)
    for name, shape in shapes.items():
        part = small.model.get_submodule(name) if name in dict(small.model.named_modules()) else small.model.get_parameter(name)
        weight = part.weight if isinstance(part, nn.Module) else part
        assert tuple(weight.shape[: len(shape)]) == shape, f"{name}: {tuple(weight.shape)}, kept: {small.kept}"
    return small


# -- operations between two convolutions --------------------------------------------------------------


class Between(NamedTuple):
    """An operation on the eight channels of `c`.

    Args:
      call: (network, channels, input of the network) -> what `o` reads.
      c, o: how many channels `c` is to have, and `o` to read, after compact; None: any number.
      out: how many `o` reads before.
      dead: the zero channels of `c`.
      parts: further modules, parameters, buffers and numbers of the network.
      reader: the layer that reads, as a function of the number of channels.
    """

    call: Callable[[Any, Tensor, Tensor], Tensor]
    c: int | None = 6
    o: int | None = 6
    out: int = 8
    dead: tuple[int, ...] = (1, 4)
    parts: Callable[[], dict[str, Any]] = dict
    reader: Callable[[int], nn.Module] = lambda width: nn.Conv2d(width, 2, 1)

    def build(self) -> Net:
        call = self.call
        layers = {"c": zero(nn.Conv2d(3, 8, 1), *self.dead), "o": self.reader(self.out)}
        return Net(lambda m, x: m.o(call(m, m.c(x), x)), **layers, **self.parts())


def padded(width: int) -> nn.Module:
    return nn.Conv2d(width, 2, 3, padding=1)


def excite(m: Any, h: Tensor, x: Tensor) -> Tensor:
    return h * torch.sigmoid(m.up(F.relu(m.down(h.mean((2, 3), keepdim=True)))))


def shuffle(m: Any, h: Tensor, x: Tensor) -> Tensor:
    batch, channels, height, width = h.shape
    return h.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)


def gate(m: Any, h: Tensor, x: Tensor) -> Tensor:
    value, gates = h.chunk(2, 1)
    return value * torch.sigmoid(gates)


def write_slice(m: Any, h: Tensor, x: Tensor) -> Tensor:
    h = h.clone()
    h[:, :4] *= 2
    return h


def autocast(m: Any, h: Tensor, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return m.mid(F.relu(h)).float()


def regions(m: Any, h: Tensor, x: Tensor) -> Tensor:
    """Autocast with a part in single precision, and a part without gradients that returns two tensors."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = m.mid(F.relu(h))
        with torch.autocast("cpu", enabled=False):
            h = torch.tanh(h.float())
            with torch.no_grad():
                first, second = h.detach() * 2, h.sigmoid()
        return (h + first * second).float()


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


STAYS = {"c": 8, "o": 8}
ANY = {"c": None, "o": None}

BETWEEN = {
    # elementwise
    "gelu": Between(lambda m, h, x: F.gelu(h)),
    "a constant that a bias takes over": Between(lambda m, h, x: torch.sigmoid(h)),
    "a constant at a padded convolution": Between(lambda m, h, x: torch.sigmoid(h), **STAYS, reader=padded),
    "zero at a padded convolution": Between(lambda m, h, x: F.silu(h), reader=padded),
    "a constant at padded pooling": Between(lambda m, h, x: F.avg_pool2d(torch.sigmoid(h), 3, 1, 1), **STAYS),
    "a constant at padded maximum": Between(lambda m, h, x: F.max_pool2d(torch.sigmoid(h), 3, 1, 1)),
    "a constant at a transposed convolution": Between(
        lambda m, h, x: torch.cos(h), c=8, o=None, reader=lambda n: nn.ConvTranspose2d(n, 2, 3)
    ),
    "a constant at reflected padding": Between(
        lambda m, h, x: torch.cos(h), **ANY, reader=lambda n: nn.Conv2d(n, 2, 3, padding=1, padding_mode="reflect")
    ),
    "a parameter per channel": Between(lambda m, h, x: F.relu(h) * m.p, parts=lambda: {"p": parameter(8, 1, 1)}),
    "a shift per channel": Between(lambda m, h, x: F.relu(h) + m.p, parts=lambda: {"p": parameter(1, 8, 1, 1)}),
    "a scalar parameter": Between(lambda m, h, x: F.relu(h) * m.p, parts=lambda: {"p": parameter()}),
    "a parameter per pixel": Between(lambda m, h, x: F.relu(h) + m.p, **STAYS, parts=lambda: {"p": parameter(8, SIDE, SIDE)}),
    "a buffer": Between(lambda m, h, x: h * m.b, parts=lambda: {"b": torch.rand(8, 1, 1)}),
    "a tensor made in forward": Between(lambda m, h, x: h + torch.arange(h.shape[1]).view(-1, 1, 1), **ANY),
    "PReLU": Between(lambda m, h, x: m.act(h), parts=lambda: {"act": nn.PReLU(8)}),
    "where": Between(lambda m, h, x: torch.where(h > 0, h, 0.1 * h)),
    "dropout": Between(lambda m, h, x: m.drop(h), parts=lambda: {"drop": nn.Dropout2d(0.5)}),
    "other precisions": Between(lambda m, h, x: h.double().tanh().float()),
    "autocast": Between(autocast, o=8, parts=lambda: {"mid": nn.Conv2d(8, 8, 1)}),
    "regions of autocast and without gradients": Between(regions, o=8, parts=lambda: {"mid": nn.Conv2d(8, 8, 1)}),
    "in place": Between(lambda m, h, x: F.relu_(h).add_(1)),
    "in place, one half": Between(write_slice, **ANY),
    "an input added": Between(lambda m, h, x: F.relu(h) + x.mean(1, keepdim=True), c=8, o=8),
    "an input multiplied": Between(lambda m, h, x: F.relu(h) * x.mean(1, keepdim=True)),
    "batch statistics": Between(lambda m, h, x: h - h.mean(0, keepdim=True)),
    "a custom function": Between(lambda m, h, x: Twice.apply(h), **ANY),
    "checkpointing": Between(lambda m, h, x: torch.utils.checkpoint.checkpoint(F.gelu, h, use_reentrant=False), **ANY),
    "noise": Between(lambda m, h, x: F.relu(h) + torch.randn_like(h), **ANY),
    "a branch on the shape": Between(lambda m, h, x: F.relu(h) if h.shape[2] > 3 else h),
    "a branch on the values": Between(lambda m, h, x: F.relu(h) if float(h.sum()) > 0 else h, **STAYS),
    # norms
    "batch norm": Between(lambda m, h, x: m.n(h), parts=lambda: {"n": nn.BatchNorm2d(8).eval()}),
    "batch norm without statistics": Between(
        lambda m, h, x: m.n(h), **ANY, parts=lambda: {"n": nn.BatchNorm2d(8, track_running_stats=False)}
    ),
    "group norm, whole groups": Between(lambda m, h, x: m.n(h), dead=(2, 3), parts=lambda: {"n": nn.GroupNorm(4, 8)}),
    "group norm, parts of groups": Between(lambda m, h, x: m.n(h), **STAYS, parts=lambda: {"n": nn.GroupNorm(4, 8)}),
    "instance norm": Between(lambda m, h, x: m.n(h), **ANY, parts=lambda: {"n": nn.InstanceNorm2d(8, affine=True)}),
    "layer norm of channels": Between(
        lambda m, h, x: m.n(h.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), **STAYS, parts=lambda: {"n": nn.LayerNorm(8)}
    ),
    "layer norm of pixels": Between(lambda m, h, x: m.n(h), **ANY, parts=lambda: {"n": nn.LayerNorm([SIDE, SIDE])}),
    "local response norm": Between(lambda m, h, x: F.local_response_norm(h, 3), **ANY),
    # operations that combine channels
    "softmax": Between(lambda m, h, x: h.softmax(1), **STAYS),
    "cumulative sum": Between(lambda m, h, x: h.cumsum(1), **ANY),
    "sort": Between(lambda m, h, x: h.sort(1).values, **STAYS),
    "mean of channels": Between(lambda m, h, x: h - h.mean(1, keepdim=True), **STAYS),
    "normalised channels": Between(lambda m, h, x: F.normalize(h, dim=1), **ANY),
    "norm of each row": Between(lambda m, h, x: F.normalize(h, dim=3)),
    "cumulative sum of rows": Between(lambda m, h, x: h.cumsum(2)),
    "sorted rows": Between(lambda m, h, x: h.sort(2).values),
    "largest channel": Between(lambda m, h, x: h.amax(1, keepdim=True), c=None, o=1, out=1),
    "index of the largest": Between(lambda m, h, x: h.argmax(1, keepdim=True).float(), c=8, o=1, out=1),
    "differences of channels": Between(lambda m, h, x: h.diff(dim=1), c=None, o=None, out=7),
    "products of all channels": Between(lambda m, h, x: (h.flatten(2) @ h.flatten(2).transpose(1, 2))[..., None], c=None, o=None),
    # rearranged channels
    "concatenated with itself": Between(lambda m, h, x: torch.cat([h, h.tanh()], 1), o=12, out=16),
    "concatenated with the input": Between(lambda m, h, x: torch.cat([x, h], 1), o=9, out=11),
    "stacked": Between(lambda m, h, x: torch.stack([h, -h], 2).flatten(1, 2), o=12, out=16),
    "repeated": Between(lambda m, h, x: h.repeat(1, 2, 1, 1), o=12, out=16),
    "each channel repeated": Between(lambda m, h, x: h.repeat_interleave(2, 1), o=12, out=16),
    "reversed": Between(lambda m, h, x: h.flip(1), **ANY),
    "rolled": Between(lambda m, h, x: h.roll(1, 1), **ANY),
    "rolled, last channel zero": Between(lambda m, h, x: h.roll(1, 1), **ANY, dead=(7,)),
    "indexed": Between(lambda m, h, x: h[:, [2, 0, 1, 3]], c=None, o=None, out=4),
    "first half": Between(lambda m, h, x: h[:, :4], c=None, o=None, out=4),
    "second half": Between(lambda m, h, x: h[:, 4:], c=None, o=None, out=4),
    "last half": Between(lambda m, h, x: h[:, -4:], c=None, o=None, out=4),
    "one channel": Between(lambda m, h, x: h[:, 5:6], c=None, o=1, out=1),
    "a channel by number": Between(lambda m, h, x: h[:, 5, None], c=None, o=1, out=1),
    "three channels by narrow": Between(lambda m, h, x: h.narrow(1, 3, 3), c=None, o=None, out=3),
    "unequal parts": Between(lambda m, h, x: h.split([2, 6], 1)[1], c=None, o=None, out=6),
    "the largest four": Between(lambda m, h, x: h.topk(4, 1).values, c=8, o=4, out=4),
    "every second": Between(lambda m, h, x: h[:, ::2], c=None, o=None, out=4),
    "gated halves": Between(gate, o=3, out=4),
    "GLU": Between(lambda m, h, x: F.glu(h, 1), o=3, out=4),
    "maxout": Between(lambda m, h, x: h.unflatten(1, (-1, 2)).amax(2), o=3, out=4, dead=(2, 3)),
    "channels appended": Between(lambda m, h, x: F.pad(h, (0, 0, 0, 0, 1, 1)), c=None, o=None, out=10),
    "channel shuffle": Between(shuffle, dead=(1, 5)),
    "channel shuffle, parts of slices": Between(shuffle, **STAYS),
    "nn.ChannelShuffle": Between(lambda m, h, x: m.s(h), **ANY, parts=lambda: {"s": nn.ChannelShuffle(2)}),
    "transposed with the batch": Between(lambda m, h, x: h.transpose(0, 1).tanh().transpose(0, 1)),
    "flattened with the batch": Between(lambda m, h, x: h.flatten(0, 1).tanh().view(h.shape), **ANY),
    # space
    "pixel shuffle": Between(lambda m, h, x: F.pixel_shuffle(h, 2), c=4, o=1, out=2, dead=(0, 1, 2, 3)),
    "pixel shuffle, parts of channels": Between(lambda m, h, x: F.pixel_shuffle(h, 2), c=8, o=2, out=2),
    "pixel unshuffle": Between(lambda m, h, x: F.pixel_unshuffle(h, 2), o=24, out=32),
    "upsampling": Between(lambda m, h, x: F.interpolate(h, scale_factor=2)),
    "bilinear upsampling": Between(lambda m, h, x: F.interpolate(h, scale_factor=2, mode="bilinear")),
    "unfolded": Between(lambda m, h, x: F.unfold(h, 3, padding=1).unflatten(2, (SIDE, SIDE)), c=None, o=None, out=72),
    "squeeze and excite": Between(excite, parts=lambda: {"down": nn.Conv2d(8, 2, 1), "up": nn.Conv2d(2, 8, 1)}),
    "Fourier transform": Between(lambda m, h, x: torch.fft.irfft2(torch.fft.rfft2(h), s=(SIDE, SIDE)), **ANY),
    "complex numbers": Between(lambda m, h, x: torch.complex(h, h).abs(), **ANY),
    # layers
    "grouped convolution, whole groups": Between(
        lambda m, h, x: m.g(h), dead=(2, 3), o=6, parts=lambda: {"g": nn.Conv2d(8, 8, 1, groups=4, bias=False)}
    ),
    "grouped convolution, parts of groups": Between(
        lambda m, h, x: m.g(h), **STAYS, parts=lambda: {"g": nn.Conv2d(8, 8, 1, groups=4, bias=False)}
    ),
    "two outputs for each channel": Between(
        lambda m, h, x: m.g(h), o=12, out=16, parts=lambda: {"g": nn.Conv2d(8, 16, 1, groups=8, bias=False)}
    ),
    "transposed depthwise": Between(
        lambda m, h, x: m.g(h), parts=lambda: {"g": nn.ConvTranspose2d(8, 8, 2, 2, groups=8, bias=False)}
    ),
    "einsum": Between(lambda m, h, x: torch.einsum("bchw,cd->bdhw", h, m.w), o=8, parts=lambda: {"w": parameter(8, 8)}),
    "matrix product": Between(
        lambda m, h, x: (h.permute(0, 2, 3, 1) @ m.w).permute(0, 3, 1, 2), o=8, parts=lambda: {"w": parameter(8, 8)}
    ),
    "functional convolution": Between(
        lambda m, h, x: F.conv2d(h, m.w, m.b), o=5, out=5, parts=lambda: {"w": parameter(5, 8, 1, 1), "b": parameter(5)}
    ),
    "bilinear layer": Between(
        lambda m, h, x: m.b(h.permute(0, 2, 3, 1), h.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
        **ANY,
        parts=lambda: {"b": nn.Bilinear(8, 8, 8)},
    ),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_an_operation_between_two_convolutions(name):
    case = BETWEEN[name]
    shapes = {"c": (case.c, 3)} if case.c is not None else {}
    net = case.build()
    if case.o is not None:
        shapes["o"] = (case.o,) if isinstance(net.o, nn.ConvTranspose2d) else (2, case.o)
    check(net, **shapes)


# -- the same layers or weights in several places -----------------------------------------------------


def test_a_layer_used_twice():
    net = Net(lambda m, x, y: m.o(torch.cat([m.c(x), m.c(y)], 1)), c=zero(nn.Conv2d(3, 8, 1), 1, 4), o=nn.Conv2d(16, 2, 1))
    check(net, lambda n: images(n) + images(n), c=(6, 3), o=(2, 12))


def test_a_block_under_two_names():
    block = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    zero(block[0], 1, 2)
    net = nn.Sequential(block, nn.Tanh(), block)
    small = check(net, lambda n: (torch.randn(n, 4),))
    assert small.model[0][0].out_features == 6 and small.model[2] is small.model[0]


def test_an_autoencoder_with_one_weight():
    def forward(m, x):
        return F.linear(torch.tanh(F.linear(x, m.w, m.b)), m.w.t())

    net = Net(forward, w=parameter(8, 5), b=parameter(8))
    with torch.no_grad():
        net.w[:3] = 0
        net.b[:3] = 0
    check(net, lambda n: (torch.randn(n, 5),), w=(5, 5), b=(5,))


def test_tied_embeddings_stay_tied():
    net = Net(
        lambda m, i: m.o(m.e(i) + m.h(torch.relu(m.e(i)))),
        e=nn.Embedding(20, 8),
        h=zero(nn.Linear(8, 8), 1, 4),
        o=nn.Linear(8, 20),
    )
    net.o.weight = net.e.weight
    unread(net.e, 1, 4)
    small = check(net, lambda n: (torch.randint(20, (n, 5)),), e=(20, 6), h=(6, 6), o=(20, 6))
    assert small.model.o.weight is small.model.e.weight


def test_modules_registered_in_another_order():
    c1, c2, b1, b2 = zero(nn.Conv2d(3, 6, 1), 2), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.BatchNorm2d(6)
    net = Net(lambda m, x: m.b2(m.c2(F.relu(m.b1(m.c1(x))))), c1=c1, c2=c2, b2=b2, b1=b1)
    check(net, c1=(5, 3), c2=(6, 5), b1=(5,), b2=(6,))


def test_a_shortcut_by_padding():
    """Residual connections to more channels without a convolution, as in the ResNets of CIFAR."""

    def forward(m, x):
        h = F.relu(m.c(x))
        return m.o(F.relu(m.d(h) + F.pad(h, (0, 0, 0, 0, 0, 4))))

    check(Net(forward, c=zero(nn.Conv2d(3, 8, 1), 1), d=zero(nn.Conv2d(8, 12, 1), 1, 9), o=nn.Conv2d(12, 2, 1)))


def test_a_residual_stream():
    def forward(m, x):
        h = m.c(x)
        for inner, outer in zip(m.inner, m.outer):
            h = h + outer(F.relu(inner(h)))
        return m.o(h)

    layers = {
        "inner": nn.ModuleList(zero(nn.Conv2d(8, 4, 1), i) for i in range(2)),
        "outer": nn.ModuleList(zero(nn.Conv2d(4, 8, 1), 1, 4) for _ in range(2)),
    }
    check(Net(forward, c=zero(nn.Conv2d(3, 8, 1), 1, 4), o=nn.Conv2d(8, 2, 1), **layers), c=(6, 3), o=(2, 6))


def test_a_chain_of_unread_layers():
    layers = [nn.Linear(4, 6), nn.ReLU(), zero(nn.Linear(6, 6), 0, 1, 2, 3, 4), nn.ReLU(), nn.Linear(6, 2)]
    unread(layers[2], 3)
    small = check(nn.Sequential(*layers), lambda n: (torch.randn(n, 4),))
    assert [m.out_features for m in small.model if isinstance(m, nn.Linear)] == [5, 1, 2]


def test_a_layer_of_zeros_keeps_one_channel():
    small = check(Net(lambda m, x: m.o(F.relu(m.c(x))), c=zero(nn.Conv2d(3, 8, 1), *range(8)), o=nn.Conv2d(8, 2, 1)))
    assert 1 <= small.model.c.out_channels == small.model.o.in_channels


def test_unused_layers_stay():
    net = Net(
        lambda m, x: m.o(F.relu(m.c(x))), c=zero(nn.Conv2d(3, 8, 1), 1), o=nn.Conv2d(8, 2, 1), unused=zero(nn.Linear(4, 4), 0)
    )
    check(net, c=(7, 3), unused=(4, 4))


def test_experts():
    def forward(m, x):
        shares = m.router(x).softmax(-1)
        return torch.stack([expert(x) for expert in m.experts], -1).mul(shares[..., None, :]).sum(-1)

    experts = nn.ModuleList(nn.Sequential(zero(nn.Linear(4, 8), i), nn.ReLU(), nn.Linear(8, 3)) for i in range(3))
    small = check(Net(forward, router=nn.Linear(4, 3), experts=experts), lambda n: (torch.randn(n, 4),))
    assert [expert[0].out_features for expert in small.model.experts] == [7, 7, 7]


def test_weights_that_a_layer_computes():
    def forward(m, x, z):
        return m.o(F.relu(F.conv2d(x, m.w(z).mean(0).view(8, 3, 1, 1))))

    check(Net(forward, w=zero(nn.Linear(5, 24), *range(3)), o=nn.Conv2d(8, 2, 1)), lambda n: (*images(n), torch.randn(2, 5)))


def test_parameters_in_lists_and_dicts():
    def forward(m, x):
        return F.linear(torch.relu(F.linear(x, m.list[0])), m.dict["w"])

    net = Net(forward, list=nn.ParameterList([parameter(8, 4)]), dict=nn.ParameterDict({"w": parameter(3, 8)}))
    with torch.no_grad():
        net.list[0][:2] = 0
    small = check(net, lambda n: (torch.randn(n, 4),))
    assert small.model.list[0].shape == (6, 4) and small.model.dict["w"].shape == (3, 6)


# -- sizes in the code of a network -------------------------------------------------------------------


def decoder(forward: Callable[..., Tensor], **parts: Any) -> Net:
    return Net(forward, fc=zero(nn.Linear(5, 8 * 4), *range(4, 8)), o=nn.Conv2d(8, 2, 1), **parts)


def test_a_size_that_is_an_attribute():
    net = decoder(lambda m, z: m.o(F.relu(m.fc(z)).view(-1, m.channels, 2, 2)), channels=8)
    small = check(net, lambda n: (torch.randn(n, 5),), fc=(28, 5), o=(2, 7))
    assert (net.channels, small.model.channels) == (8, 7)


def test_a_size_in_a_tuple():
    net = decoder(lambda m, z: m.o(F.relu(m.fc(z)).view(-1, *m.shape)), shape=(8, 2, 2))
    small = check(net, lambda n: (torch.randn(n, 5),), fc=(28, 5), o=(2, 7))
    assert small.model.shape == (7, 2, 2)


def test_a_size_beside_a_module_whose_code_has_none():
    """With half of the channels the view runs and makes the batch smaller, so that the layer after it fails."""

    def forward(m, x):
        return m.o(m.hidden(m.first(x)).relu().view(-1, m.channels, 2, 2))

    first = nn.Sequential(zero(nn.Conv2d(3, 8, 3), *range(4)), nn.Flatten())
    net = Net(forward, first=first, hidden=nn.Linear(8 * 16, 32), o=nn.ConvTranspose2d(8, 2, 2), channels=8)
    with torch.no_grad():
        net.o.weight[:4] = 0
    small = check(net, images, hidden=(16, 64), o=(4,))
    assert small.model.channels == 4


def test_a_size_of_another_layer():
    net = decoder(lambda m, z: m.o(F.relu(m.fc(z)).view(-1, m.o.in_channels, 2, 2)))
    check(net, lambda n: (torch.randn(n, 5),), fc=(28, 5), o=(2, 7))


def test_a_size_written_in_the_code():
    small = check(
        decoder(lambda m, z: m.o(F.relu(m.fc(z)).view(-1, 8, 2, 2))), lambda n: (torch.randn(n, 5),), fc=(32, 5), o=(2, 8)
    )
    assert any("8" in reason for reason in small.kept.values())


def test_the_size_of_another_dimension_is_left_alone():
    """Eight channels and eight columns: the two sizes are equal, one of them changes."""
    net = Net(
        lambda m, x: m.o(F.relu(m.c(x)).view(-1, m.channels, m.side, m.side)),
        c=zero(nn.Conv2d(3, 8, 1), 1),
        o=nn.Conv2d(8, 2, 1),
        channels=8,
        side=8,
    )
    small = check(net, lambda n: (torch.randn(n, 3, 8, 8),), c=(7, 3), o=(2, 7))
    assert (small.model.channels, small.model.side) == (7, 8)


# -- inputs and outputs -------------------------------------------------------------------------------


def hidden_units() -> dict[str, nn.Module]:
    return {"a": zero(nn.Linear(4, 8), 1, 4), "b": nn.Linear(8, 3)}


def test_keyword_arguments():
    def forward(m, *, x, scale=None, mode="plain"):
        h = torch.relu(m.a(x))
        return m.b(h if scale is None or mode == "plain" else h * scale)

    inputs = lambda n: {"x": torch.randn(n, 4), "scale": torch.rand(n, 1), "mode": "scaled"}
    check(Net(forward, **hidden_units()), inputs, a=(6, 4), b=(3, 6))


def test_arguments_that_are_no_tensors():
    net = Net(lambda m, x, factor, nothing, name: m.b(torch.relu(m.a(x)) * factor), **hidden_units())
    check(net, lambda n: (torch.randn(n, 4), 2.0, None, "name"), a=(6, 4), b=(3, 6))


def test_nested_inputs():
    net = Net(lambda m, batch: m.b(torch.relu(m.a(batch["x"]) + batch["pair"][0])), **hidden_units())
    check(net, lambda n: ({"x": torch.randn(n, 4), "pair": (torch.randn(n, 1), torch.ones(n))},), a=(8, 4), b=(3, 8))


def test_an_input_that_looks_constant():
    net = Net(lambda m, x, t: m.o(F.relu(m.c(x) + t[:, None, None, None])), c=zero(nn.Conv2d(3, 8, 1), 1), o=nn.Conv2d(8, 2, 1))
    check(net, lambda n: (*images(n), torch.rand(n) * 3), example=1, c=(8, 3))


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_constant_example(value):
    net = BETWEEN["an input added"].build()
    check(net, lambda n: (torch.full((n, 3, SIDE, SIDE), value),), unseen=(3,), c=(8, 3))
    small = compact(net, torch.full((2, 3, SIDE, SIDE), value)).model
    x = torch.randn(3, 3, SIDE, SIDE)
    torch.testing.assert_close(net(x), small(x))


def test_rounding_that_drawn_inputs_amplify():
    """All features are drawn from the range of the first, which the network does not read: outputs are sines of large numbers."""
    torch.manual_seed(1)
    net = Net(lambda m, x: torch.sin(1e3 * m.b(F.relu(m.a(x))).square()), a=nn.Linear(4, 8), b=nn.Linear(8, 3))
    x = 1e-3 * torch.randn(2, 4)
    x[:, 0] = torch.tensor([-10.0, 10.0])
    with torch.no_grad():
        net.a.weight[:, 0] = 0
        net.a.weight[[1, 4]] = 0
    assert compact(net, x).removed == {"a": 2}


def test_hidden_features_among_the_outputs():
    def forward(m, x):
        h = torch.relu(m.a(x))
        return {"out": m.b(h), "features": [h, None]}

    check(Net(forward, **hidden_units()), lambda n: (torch.randn(n, 4),), a=(8, 4), b=(3, 8))


@dataclasses.dataclass
class Output:
    value: Tensor
    loss: Tensor | None = None
    count: int = 0


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


@pytest.mark.parametrize("wrap", [Output, lambda y: Pair(y, 2 * y), lambda y: [(y,), {"again": y}], lambda y: (y, 3, "name")])
def test_nested_outputs(wrap):
    net = Net(lambda m, x: wrap(m.b(torch.relu(m.a(x)))), **hidden_units())
    check(net, lambda n: (torch.randn(n, 4),), a=(6, 4), b=(3, 6))


def test_integers_and_masks():
    def forward(m, i, mask):
        h = m.e(i).masked_fill(mask[..., None], 0).sum(1)
        return m.b(torch.relu(m.a(h)))

    net = Net(forward, e=nn.Embedding(20, 4), **hidden_units())
    check(net, lambda n: (torch.randint(20, (n, 5)), torch.rand(n, 5) > 0.5), a=(6, 4), b=(3, 6))


def test_an_output_of_another_type():
    net = Net(lambda m, x: m.b(torch.relu(m.a(x))).argmax(-1), **hidden_units())
    check(net, lambda n: (torch.randn(n, 4),), a=(6, 4), b=(3, 6))


def test_the_network_returns_its_input():
    check(Net(lambda m, x: (x, m.b(torch.relu(m.a(x)))), **hidden_units()), lambda n: (torch.randn(n, 4),), a=(6, 4), b=(3, 6))


def test_inputs_without_a_batch():
    check(Net(lambda m, x: m.b(torch.relu(m.a(x))), **hidden_units()), lambda n: (torch.randn(4),), a=(6, 4), b=(3, 6))


# -- how a network is kept ----------------------------------------------------------------------------


def plain() -> nn.Module:
    return nn.Sequential(zero(nn.Linear(4, 8), 1, 4), nn.BatchNorm1d(8), nn.Sigmoid(), nn.Linear(8, 3))


def vectors(batch: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, 4),)


@pytest.mark.parametrize("training", [False, True])
def test_training_mode(training):
    small = check(plain().train(training), vectors)
    assert small.model[0].out_features == 6


def test_frozen_parameters_stay_frozen():
    net = plain()
    net[0].requires_grad_(False)
    small = check(net, vectors)
    assert small.model[0].out_features == 6
    assert [p.requires_grad for p in small.model.parameters()] == [p.requires_grad for p in net.parameters()]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-8), (torch.bfloat16, 3e-2), (torch.float16, 1e-2)])
def test_other_precisions(dtype, tolerance):
    small = check(plain().to(dtype), lambda n: (torch.randn(n, 4, dtype=dtype),), tolerance=tolerance)
    assert small.model[0].weight.shape == (6, 4) and small.model[0].weight.dtype == dtype


def test_gradients_switched_off():
    with torch.no_grad():
        assert check(plain(), vectors).model[0].out_features == 6
    with torch.inference_mode():
        check(plain(), vectors)


def test_gradients_at_hand():
    net = plain()
    net(*vectors(3)).sum().backward()
    small = check(net, vectors).model
    small(*vectors(3)).sum().backward()
    assert all(p.grad is None or p.grad.shape == p.shape for p in small.parameters())


def test_hooks():
    net = plain()
    net[0].register_forward_hook(lambda module, inputs, output: output + 1)
    net[3].register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    check(net, vectors)


def test_a_hook_that_adds_a_size():
    """The hook's tensor of eight numbers fits the eight channels only."""
    net, shift = plain(), torch.randn(8)
    net[0].register_forward_hook(lambda module, inputs, output: output + shift)
    check(net, vectors)


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal])
def test_parametrizations(wrap):
    net = plain()
    wrap(net[3])
    check(net.eval(), vectors)


def test_weight_norm_of_old():
    net = plain()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.nn.utils.weight_norm(net[3])
    net(*vectors(2))  # after this the weight is no leaf, and deepcopy refuses it
    check(net.eval(), vectors)


def test_a_network_that_keeps_its_activations():
    def forward(m, x):
        m.last = torch.relu(m.a(x))
        m.every = {"hidden": [m.last * 2]}
        return m.b(m.last)

    net = Net(forward, **hidden_units())
    net(*vectors(2))
    check(net, vectors)


def test_data_parallel():
    check(nn.DataParallel(plain()), vectors)


def test_compiled():
    check(torch.compile(plain(), backend="eager"), vectors)


def test_scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = torch.jit.trace(plain().eval(), vectors(2))
    check(net, vectors)


def test_quantised():
    if "qnnpack" not in torch.backends.quantized.supported_engines and "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("torch was built without a backend for quantised layers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = torch.ao.quantization.quantize_dynamic(plain().eval(), {nn.Linear})
        check(net, vectors)


def test_a_traced_graph():
    assert check(torch.fx.symbolic_trace(plain().eval()), vectors).model.get_submodule("0").out_features == 6


def test_an_exported_module():
    """It refuses train() and eval(), and takes the batch size of its example only."""
    net = torch.export.export(plain().eval(), vectors(2)).module()
    x = vectors(2)
    torch.testing.assert_close(compact(net, x).model(*x), net(*x))


# -- recurrent layers and attention -------------------------------------------------------------------


def zero_hidden(layer: nn.RNNBase, *units: int) -> nn.RNNBase:
    """The recurrent layer without these hidden units, in all gates, layers and directions."""
    with torch.no_grad():
        for p in layer.parameters():
            for gate in range(p.shape[0] // layer.hidden_size):
                p[[gate * layer.hidden_size + u for u in units]] = 0
    return layer


def sequences(batch: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, 3 + batch, 4),)


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_recurrent_layers(kind):
    net = Net(lambda m, x: m.o(m.r(x)[0]), r=zero_hidden(kind(4, 6, batch_first=True), 1, 4), o=nn.Linear(6, 2))
    small = check(net, sequences, o=(2, 4))
    assert small.model.r.hidden_size == 4 and small.model.r.weight_ih_l0.shape[1] == 4


def test_layers_and_directions():
    recurrent = zero_hidden(nn.LSTM(4, 6, 2, batch_first=True, bidirectional=True), 1, 4)
    small = check(Net(lambda m, x: m.o(m.r(x)[0]), r=recurrent, o=nn.Linear(12, 2)), sequences, o=(2, 8))
    assert small.model.r.hidden_size == 4 and small.model.r.weight_ih_l1.shape == (16, 8)


def test_one_direction_alone_stays():
    recurrent = nn.GRU(4, 6, batch_first=True, bidirectional=True)
    with torch.no_grad():
        for p in (recurrent.weight_ih_l0, recurrent.weight_hh_l0, recurrent.bias_ih_l0, recurrent.bias_hh_l0):
            p[[1, 7, 13]] = 0
    check(Net(lambda m, x: m.o(m.r(x)[0]), r=recurrent, o=nn.Linear(12, 2)), sequences, o=(2, 12))


def test_the_last_state_is_an_output():
    net = Net(lambda m, x: m.r(x), r=zero_hidden(nn.LSTM(4, 6, batch_first=True), 1, 4))
    assert check(net, sequences).model.r.hidden_size == 6


def test_the_last_state_is_read():
    net = Net(lambda m, x: m.o(m.r(x)[1][0][-1]), r=zero_hidden(nn.LSTM(4, 6, batch_first=True), 1, 4), o=nn.Linear(6, 2))
    assert check(net, sequences).model.r.hidden_size == net.r.hidden_size - 2


def test_an_initial_state():
    net = Net(lambda m, x, h: m.o(m.r(x, h)[0]), r=zero_hidden(nn.GRU(4, 6, batch_first=True), 1, 4), o=nn.Linear(6, 2))
    check(net, lambda n: (*sequences(n), torch.randn(1, n, 6)))


def test_a_projection():
    recurrent = nn.LSTM(4, 6, batch_first=True, proj_size=3)
    check(Net(lambda m, x: m.o(m.r(x)[0]), r=recurrent, o=unread(nn.Linear(3, 2), 1)), sequences)


def test_a_cell_in_a_loop():
    def forward(m, x):
        h = x.new_zeros(x.shape[0], 6)
        for t in range(3):
            h = m.r(x[:, t], h)
        return m.o(h)

    check(Net(forward, r=zero_hidden(nn.GRUCell(4, 6), 1, 4), o=nn.Linear(6, 2)), sequences)


def test_packed_sequences():
    def forward(m, x):
        packed = nn.utils.rnn.pack_padded_sequence(x, [2] * x.shape[0], batch_first=True)
        return m.o(m.r(packed)[1][-1])

    check(Net(forward, r=zero_hidden(nn.GRU(4, 6, batch_first=True), 1, 4), o=nn.Linear(6, 2)), sequences)


def attention(**options: Any) -> nn.MultiheadAttention:
    """Four heads of two entries, of which the output projection does not read the second."""
    layer = nn.MultiheadAttention(8, 4, batch_first=True, **options)
    unread(layer.out_proj, 2, 3)
    return layer


def tokens(batch: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, 3 + batch, 8),)


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True}], ids=repr)
def test_heads(options):
    net = Net(lambda m, x: m.a(x, x, x, need_weights=False)[0], a=attention(**options))
    small = check(net, tokens)
    if not options or "bias" in options:
        assert sum(p.numel() for p in small.model.parameters()) < sum(p.numel() for p in net.parameters())


def test_weights_of_attention_among_the_outputs():
    """They are means over the heads, so that each head counts."""
    net = Net(lambda m, x: m.a(x, x, x), a=attention())
    small = check(net, tokens)
    assert sum(p.numel() for p in small.model.parameters()) == sum(p.numel() for p in net.parameters())


def test_attention_to_other_sequences():
    net = Net(lambda m, x, y: m.a(x, y, y, need_weights=False)[0], a=attention(kdim=5, vdim=5))
    check(net, lambda n: (*tokens(n), torch.randn(n, 4, 5)))


def test_masks_of_attention():
    def forward(m, x, padding):
        return m.a(x, x, x, key_padding_mask=padding, attn_mask=m.mask[: x.shape[1], : x.shape[1]], need_weights=False)[0]

    net = Net(forward, a=attention(), mask=torch.triu(torch.full((9, 9), -torch.inf), 1))

    def inputs(n):
        padding = torch.zeros(n, 3 + n, dtype=torch.bool)
        padding[:, -1] = True
        return *tokens(n), padding

    small = check(net, inputs)
    assert sum(p.numel() for p in small.model.parameters()) < sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_layers(norm_first):
    layer = nn.TransformerEncoderLayer(8, 4, 12, batch_first=True, norm_first=norm_first)
    net = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    for block in net.layers:
        zero(block.linear1, 0, 5)
        unread(block.self_attn.out_proj, 2, 3)
    small = check(net, tokens)
    assert all(block.linear1.out_features == 10 for block in small.model.layers)
    heads = (2 * 8 + 2) * 3 + 2 * 8
    units = 2 * (8 + 1 + 8)
    assert sum(p.numel() for p in small.model.parameters()) <= sum(p.numel() for p in net.parameters()) - units - heads


def test_encoder_and_decoder():
    net = nn.Transformer(8, 4, 1, 1, 12, batch_first=True)
    zero(net.encoder.layers[0].linear1, 0, 5)
    zero(net.decoder.layers[0].linear1, 0, 5)
    small = check(net, lambda n: (*tokens(n), torch.randn(n, 4, 8)))
    assert small.model.decoder.layers[0].linear1.out_features == 10


def fused(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x).reshape(*x.shape[:2], 3, m.heads, m.size).permute(2, 0, 3, 1, 4)
    h = F.scaled_dot_product_attention(q, k, v) if m.flash else (q @ k.transpose(-2, -1) * m.size**-0.5).softmax(-1) @ v
    return m.o(h.transpose(1, 2).reshape(*x.shape[:2], m.heads * m.size))


@pytest.mark.parametrize("flash", [False, True])
def test_fused_attention(flash):
    net = Net(fused, qkv=nn.Linear(8, 24), o=unread(nn.Linear(8, 8), 2, 3), heads=4, size=2, flash=flash)
    small = check(net, tokens, qkv=(18, 8), o=(8, 6))
    assert (small.model.heads, small.model.size) == (3, 2)


def test_a_part_of_each_head():
    """The same entry of all heads is zero in values alone, or in queries: keys and values have sizes of their own then."""
    net = Net(fused, qkv=nn.Linear(8, 24), o=unread(nn.Linear(8, 8), 0, 2, 4, 6), heads=4, size=2, flash=True)
    check(net, tokens)


def test_entries_of_different_heads():
    net = Net(fused, qkv=nn.Linear(8, 24), o=unread(nn.Linear(8, 8), 0, 3), heads=4, size=2, flash=True)
    check(net, tokens, qkv=(24, 8), o=(8, 8))


def test_grouped_queries():
    def forward(m, x):
        batch, length = x.shape[:2]
        q = m.q(x).view(batch, length, -1, m.size).transpose(1, 2)
        k, v = (f(x).view(batch, length, -1, m.size).transpose(1, 2).repeat_interleave(m.shared, 1) for f in (m.k, m.v))
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return m.o(h.transpose(1, 2).flatten(2))

    layers = {"q": nn.Linear(8, 8), "k": nn.Linear(8, 4), "v": nn.Linear(8, 4), "o": nn.Linear(8, 8)}
    unread(layers["o"], 4, 5, 6, 7)
    check(Net(forward, size=2, shared=2, **layers), tokens, q=(4, 8), k=(2, 8), v=(2, 8), o=(8, 4))
