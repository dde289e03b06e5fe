"""The operations of the DARTS space, (N, C, H, W) -> (N, C, H / stride, W / stride), in four forms.

Search form: batch norms without scale and shift, also after pools. Evaluation form: batch norms with both, none after pools.
One-stage form (ISTA-NAS): batch norms with both, also after pools and identities, so that every operation ends in a scale of its
own. GSparsity's form: the evaluation form with batch norms after pools. `operation(x, scale)` returns scale * operation(x) for a
(C,) vector, or None for 1: an operation that ends in a batch norm uses the architecture weight as the scale of that norm, at no
cost. Operations that begin with a ReLU have a method `body` for the rectified input, so that all paths from one source share one
ReLU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .convolution_kernels import DepthwiseConv, PointwiseNorm, every_second, use_custom_gradient

Form = Literal["search", "evaluation", "one_stage", "gsparsity"]


class BatchNorm(nn.BatchNorm2d):
    """Batch norm whose result is multiplied by `scale` within the same kernel."""

    updates = True

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        return F.batch_norm(x, *self._running(), *self._affine(scale), self.training, self._momentum(), self.eps)

    def after(self, conv: nn.Conv2d, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """Return forward(conv(x), scale) for a 1x1 convolution, without keeping its result for the gradient if it is large."""
        # with fewer channels than the input, the result needs little memory, and its statistics less time than those of the input
        fewer = conv.out_channels < conv.in_channels
        if fewer or not (self.training and torch.is_grad_enabled() and use_custom_gradient(x)):
            return self(conv(x), scale)
        return PointwiseNorm.apply(x, conv.weight, *self._affine(scale), self._running(), self._momentum(), self.eps)

    def _affine(self, scale: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if scale is None or self.weight is None:
            return (self.weight if scale is None else scale), self.bias
        return self.weight * scale, self.bias * scale

    def _running(self) -> tuple[Tensor | None, Tensor | None]:
        return (self.running_mean, self.running_var) if self.updates or not self.training else (None, None)

    def _momentum(self) -> float:
        """The momentum of this batch; momentum None averages over all batches, which `update_bn` relies on."""
        if self.momentum is not None or not (self.training and self.updates):
            return self.momentum or 0.0
        self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        return 1.0 / float(self.num_batches_tracked)  # type: ignore[arg-type]


def norms_of(net: nn.Module) -> list[BatchNorm]:
    """All batch norms of a network."""
    return [m for m in net.modules() if isinstance(m, BatchNorm)]


@contextmanager
def frozen_statistics(net: nn.Module | Sequence[BatchNorm]) -> Iterator[None]:
    """Context in which batch norms use the statistics of each batch without updating the running ones.

    net: a network, or the list of its batch norms; finding them takes as long as a few convolutions.
    """
    norms = norms_of(net) if isinstance(net, nn.Module) else net
    before = [m.updates for m in norms]
    for m in norms:
        m.__dict__["updates"] = False  # nn.Module.__setattr__ takes ten times as long
    try:
        yield
    finally:
        for m, updates in zip(norms, before):
            m.__dict__["updates"] = updates


@contextmanager
def repeated_noise(net: nn.Module) -> Iterator[None]:
    """Context in which each noise operation draws the same numbers in every pass, whichever others are active."""

    def seeded(number: int) -> Callable[[nn.Module, tuple], None]:
        def before(module: nn.Module, inputs: tuple) -> None:
            torch.manual_seed(number)

        return before

    noises = [m for m in net.modules() if isinstance(m, Noise)]
    hooks = [m.register_forward_pre_hook(seeded(number)) for number, m in enumerate(noises)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class Identity(nn.Module):
    """The identity, followed by a batch norm in the one-stage form, and in others with `normed`."""

    def __init__(self, channels: int = 0, form: Form = "evaluation", normed: bool = False):
        super().__init__()
        self.norm = BatchNorm(channels, affine=form != "search") if normed or form == "one_stage" else None

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        return scaled(x, scale) if self.norm is None else self.norm(x, scale)


class Noise(nn.Module):
    """Gaussian noise of the shape of the (strided) input: the operation of S4 that a search should not select."""

    def __init__(self, stride: int):
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        return scaled(torch.randn_like(x[:, :, :: self.stride, :: self.stride]), scale)


class Pool(nn.Module):
    """A 3x3 pool with padding 1, not counted in the mean; followed by a batch norm except in the evaluation form."""

    def __init__(self, kind: str, channels: int, stride: int, form: Form):
        super().__init__()
        self.kind, self.stride = kind, stride
        self.norm = None if form == "evaluation" else BatchNorm(channels, affine=form != "search")

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        if self.kind == "max_pool_3x3":
            y = F.max_pool2d(x, 3, self.stride, 1)
        else:
            y = F.avg_pool2d(x, 3, self.stride, 1, count_include_pad=False)
        return scaled(y, scale) if self.norm is None else self.norm(y, scale)

    def extra_repr(self) -> str:
        return f"{self.kind}, stride={self.stride}"


class Rectified(nn.Module):
    """An operation that begins with a ReLU."""

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        return self.body(F.relu(x), scale)

    def body(self, rectified: Tensor, scale: Tensor | None = None) -> Tensor:
        """The operation after its ReLU."""
        raise TypeError(f"{type(self).__name__} must define body, the operation after its ReLU")


class ConvNorm(Rectified):
    """ReLU, a sequence of convolutions that ends in a 1x1 one, batch norm."""

    def __init__(self, convs: list[nn.Module], channels: int, affine: bool):
        super().__init__()
        self.convs = nn.ModuleList(convs)
        self.norm = BatchNorm(channels, affine=affine)

    def body(self, rectified: Tensor, scale: Tensor | None = None) -> Tensor:
        *before, last = self.convs
        for conv in before:
            rectified = conv(rectified)
        return self.norm.after(last, rectified, scale)


class Twice(Rectified):
    """Two operations in sequence; the scale is applied by the second."""

    def __init__(self, first: Rectified, second: Rectified):
        super().__init__()
        self.first, self.second = first, second

    def body(self, rectified: Tensor, scale: Tensor | None = None) -> Tensor:
        return self.second(self.first.body(rectified), scale)


class FactorizedReduce(Rectified):
    """ReLU, 1x1 convolutions of the even and of the odd pixels of both axes, concatenated, batch norm. Even sizes only."""

    def __init__(self, channels_in: int, channels: int, affine: bool):
        super().__init__()
        self.even = nn.Conv2d(channels_in, channels // 2, 1, bias=False)
        self.odd = nn.Conv2d(channels_in, channels - channels // 2, 1, bias=False)
        self.norm = BatchNorm(channels, affine=affine)

    def body(self, rectified: Tensor, scale: Tensor | None = None) -> Tensor:
        even, odd = every_second(rectified, 0, 1)
        return self.norm(torch.cat([self.even(even), self.odd(odd)], 1), scale)


def scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else x * scale[:, None, None]


def relu_conv_norm(channels_in: int, channels: int, affine: bool) -> ConvNorm:
    """ReLU, 1x1 convolution, batch norm."""
    return ConvNorm([nn.Conv2d(channels_in, channels, 1, bias=False)], channels, affine)


def separable(kernel: int, dilation: int = 1) -> Callable[[int, int, Form], ConvNorm]:
    """ReLU, depthwise convolution, 1x1 convolution, batch norm."""

    def make(channels: int, stride: int, form: Form) -> ConvNorm:
        depthwise = DepthwiseConv(channels, kernel, stride, dilation)
        return ConvNorm([depthwise, nn.Conv2d(channels, channels, 1, bias=False)], channels, form != "search")

    return make


def twice_separable(kernel: int) -> Callable[[int, int, Form], Twice]:
    make = separable(kernel)
    return lambda channels, stride, form: Twice(make(channels, stride, form), make(channels, 1, form))


def skip(channels: int, stride: int, form: Form) -> nn.Module:
    return Identity(channels, form) if stride == 1 else FactorizedReduce(channels, channels, form != "search")


def factorised_seven(channels: int, stride: int, form: Form) -> ConvNorm:
    wide = nn.Conv2d(channels, channels, (1, 7), (1, stride), (0, 3), bias=False)
    tall = nn.Conv2d(channels, channels, (7, 1), (stride, 1), (3, 0), bias=False)
    return ConvNorm([wide, tall], channels, form != "search")


def last_norm(operation: nn.Module) -> BatchNorm | None:
    """The batch norm that an operation ends in, or None."""
    return last_norm(operation.second) if isinstance(operation, Twice) else getattr(operation, "norm", None)


# name: (channels, stride, form) -> module
MAKE: dict[str, Callable[[int, int, Form], nn.Module]] = {
    "max_pool_3x3": lambda channels, stride, form: Pool("max_pool_3x3", channels, stride, form),
    "avg_pool_3x3": lambda channels, stride, form: Pool("avg_pool_3x3", channels, stride, form),
    "skip_connect": skip,
    "sep_conv_3x3": twice_separable(3),
    "sep_conv_5x5": twice_separable(5),
    "dil_conv_3x3": separable(3, dilation=2),
    "dil_conv_5x5": separable(5, dilation=2),
    "sep_conv_7x7": twice_separable(7),
    "conv_7x1_1x7": factorised_seven,
    "noise": lambda channels, stride, form: Noise(stride),
}
