"""Convolutions with cheaper gradients on a CPU: less time for depthwise ones, less memory for 1x1 ones.

On a CPU PyTorch has no fast gradient of a depthwise convolution if the kernel is wider than 3 (gradient of the weight) or
dilated (both gradients): it costs up to ten times the forward pass. But

- the gradient of the input of a convolution of stride 1 is a convolution with the flipped kernel;
- the gradient of a k x 5 kernel is the concatenation of those of a k x 3 and a k x 2 kernel;
- a convolution of dilation 2 is an ordinary one on each of the four grids of every other pixel, and at stride 2 on one of them.

A 1x1 convolution and the batch norm after it are one product with a rescaled weight, whose statistics and gradients follow from
those of its input; nothing between them is kept, which would be most of the memory of a supernet.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FAST_WIDTH = 3
MANY_VALUES = 1 << 16  # entries of the input from which on the statistics of a 1x1 convolution are computed from its input
BLOCK, ROW = 2048, 512  # of sums over pixels: rows of a block, and entries of the rows that PyTorch adds


class DepthwiseConv(nn.Conv2d):
    """A depthwise convolution (N, C, H, W) -> (N, C, H / stride, W / stride) with an odd kernel, padding and no bias."""

    def __init__(self, channels: int, kernel: int, stride: int = 1, dilation: int = 1):
        padding = dilation * (kernel // 2)
        super().__init__(channels, channels, kernel, stride, padding, dilation, groups=channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            # the bfloat16 gradient of a dilated 5x5 kernel is NaN in PyTorch 2.13 on a CPU
            with torch.autocast("cpu", enabled=False):
                return self(x.float())
        stride, dilation, padding = self.stride[0], self.dilation[0], int(self.padding[0])
        if stride == dilation == 2 and padding % 2 == 0:
            (x,), stride, dilation, padding = every_second(x, 0), 1, 1, padding // 2
        if use_custom_gradient(x):
            return Depthwise.apply(x, self.weight, stride, padding, dilation)
        return F.conv2d(x, self.weight, None, stride, padding, dilation, self.groups)


def use_custom_gradient(x: Tensor) -> bool:
    """Whether the gradients of this module are faster than PyTorch's: in float32 on a CPU."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")


class Depthwise(torch.autograd.Function):
    """conv2d(x, weight, None, stride, padding, dilation, groups=C) with the gradients of this module; twice differentiable."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, stride: int, padding: int, dilation: int) -> Tensor:
        return F.conv2d(x, weight, None, stride, padding, dilation, len(weight))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, weight, *ctx.geometry = inputs
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else x.new_empty(()).expand(x.shape), weight)
        ctx.save_for_forward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        grad_x = input_gradient(grad, x, weight, *ctx.geometry) if needs_x else None
        grad_weight = weight_gradient(grad, x, weight, *ctx.geometry) if needs_weight else None
        return grad_x, grad_weight, None, None, None

    @staticmethod
    def jvp(ctx: Any, x_t: Tensor | None, weight_t: Tensor | None, *_: None) -> Tensor:  # type: ignore[override]
        x, weight = ctx.saved_for_forward
        stride, padding, dilation = ctx.geometry
        terms = [(x_t, weight), (x, weight_t)]
        convs = [F.conv2d(a, b, None, stride, padding, dilation, len(b)) for a, b in terms if a is not None and b is not None]
        return sum(convs[1:], convs[0])


def input_gradient(grad: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int, dilation: int) -> Tensor:
    """Gradient of sum(grad * conv(x, weight)) with respect to x; only the shape of x is used."""
    if stride == 1:
        reach = dilation * (weight.shape[-1] - 1)
        return F.conv2d(grad, weight.flip(2, 3), None, 1, reach - padding, dilation, len(weight))
    return _reference(grad, x, weight, stride, (padding, padding), dilation, (True, False, False))[0]


def weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int, dilation: int) -> Tensor:
    """Gradient of sum(grad * conv(x, weight)) with respect to the weight; only the shape of the weight is used."""
    if dilation == 2 and stride == 1 and not (padding % 2 or x.shape[2] % 2 or x.shape[3] % 2):
        return weight_gradient(grids(grad), grids(x), weight, 1, padding // 2, 1)
    kernel = weight.shape[-1]
    if dilation > 1 or kernel <= FAST_WIDTH:
        return _reference(grad, x, weight, stride, (padding, padding), dilation, (False, True, False))[1]
    x = F.pad(x, (padding, padding, 0, 0))
    reach = (grad.shape[-1] - 1) * stride
    parts = []
    for left in range(0, kernel, FAST_WIDTH):
        part = weight[..., left : left + FAST_WIDTH]
        view = x[..., left : left + reach + part.shape[-1]]
        parts.append(_reference(grad, view, part, stride, (padding, 0), 1, (False, True, False))[1])
    return torch.cat(parts, -1)


def grids(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (4 N, C, H / 2, W / 2): the pixels of each parity of row and column, in channels-last order."""
    n, c, h, w = x.shape
    x = x.permute(0, 2, 3, 1).reshape(n, h // 2, 2, w // 2, 2, c).permute(2, 4, 0, 1, 3, 5)
    return x.reshape(4 * n, h // 2, w // 2, c).permute(0, 3, 1, 2)


def _reference(
    grad: Tensor, x: Tensor, weight: Tensor, stride: int, padding: tuple[int, int], dilation: int, mask: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, [stride] * 2, padding, [dilation] * 2, False, [0, 0], len(weight), mask
    )


def every_second(x: Tensor, *offsets: int) -> tuple[Tensor, ...]:
    """For each offset the pixels x[:, :, offset::2, offset::2] of images (N, C, H, W), on a CPU in channels-last order.

    The gradient of a slice is in the default order of PyTorch: added to one in channels-last order it makes that sum, and
    everything computed from it, slow.
    """
    if use_custom_gradient(x):
        return _EverySecond.apply(x, offsets)
    return tuple(x[:, :, o::2, o::2] for o in offsets)


class _EverySecond(torch.autograd.Function):
    """`every_second`; twice differentiable."""

    @staticmethod
    def forward(x: Tensor, offsets: tuple[int, ...]) -> tuple[Tensor, ...]:
        return tuple(x[:, :, o::2, o::2].clone(memory_format=torch.channels_last) for o in offsets)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        ctx.size, ctx.offsets = inputs[0].shape, inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _Between.apply(ctx.size, ctx.offsets, *grads), None


class _Between(torch.autograd.Function):
    """Images of this size that are zero but for the pixels of `every_second`: its gradient."""

    @staticmethod
    def forward(size: torch.Size, offsets: tuple[int, ...], *parts: Tensor) -> Tensor:
        n, c, h, w = size
        out = parts[0].new_zeros(n, h, w, c).permute(0, 3, 1, 2)
        for o, part in zip(offsets, parts):
            out[:, :, o::2, o::2] = part
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.offsets = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return None, None, *every_second(grad, *ctx.offsets)


def mean_of_pixels(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C), with a gradient in channels-last order."""
    return x.permute(0, 2, 3, 1).flatten(1, 2).mean(1)


class PointwiseNorm(torch.autograd.Function):
    r"""Batch norm in training mode of a 1x1 convolution, ``batch_norm(conv2d(x, weight), ...)``; twice differentiable.

    The result of the convolution is neither kept for the gradient nor computed on its own where `x` has many pixels: with the
    mean m and the covariance C of the channels of x over all pixels, the result z = W x has

    .. math:: E[z] = W m, \qquad \operatorname{var}(z_c) = (W C W^T)_{cc},

    so that the batch norm is a rescaling of W and an offset. Both of its gradients follow from sums over pixels of g x^T, where g
    is the gradient of the output. A pass over the pixels that is a product with a small matrix costs less than one of PyTorch's
    passes for the statistics of few channels.

    Keeps x for the gradient. The running mean and variance (or None) are updated in place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        running: tuple[Tensor | None, Tensor | None],
        momentum: float,
        eps: float,
    ) -> Tensor:
        ctx.eps = eps
        if x.numel() < MANY_VALUES:
            y, mean, rstd = torch.ops.aten.native_batch_norm(F.conv2d(x, weight), scale, shift, *running, True, momentum, eps)
            ctx.save_for_backward(x, weight, scale, mean, rstd)
            return y
        rows, w = pixels(x), weight[:, :, 0, 0]
        n = len(rows)
        mean_x = sum_of_rows(rows) / n
        covariance = (product_of_rows(rows, rows) / n).sub_(torch.outer(mean_x, mean_x))
        mean_x = mean_x.to(x)
        against_x, mean = w @ covariance.to(x), w @ mean_x
        var = (against_x * w).sum(1).clamp_(min=0)
        rstd = (var + eps).rsqrt_()
        factor = rstd if scale is None else rstd * scale
        offset = -factor * mean if shift is None else shift - factor * mean
        y = torch.addmm(offset, rows, (w * factor[:, None]).t())
        if running[0] is not None and running[1] is not None:
            running[0].lerp_(mean, momentum)
            running[1].lerp_(var * (n / (n - 1)), momentum)
        ctx.save_for_backward(x, weight, scale, mean, rstd, mean_x, against_x)
        return images(y, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, scale, mean, rstd, *moments = ctx.saved_tensors
        needs_x, needs_weight, *needs_norm = ctx.needs_input_grad[:4]
        if moments and not torch.is_grad_enabled():
            grads = moment_gradients(grad, x, weight, scale, mean, rstd, *moments, needs_x)
            return *(g if needed else None for g, needed in zip(grads, ctx.needs_input_grad)), None, None, None
        z = F.conv2d(x, weight)
        grad_z, grad_scale, grad_shift = torch.ops.aten.native_batch_norm_backward(
            grad, z, scale, None, None, mean, rstd, True, ctx.eps, (True, *needs_norm)
        )
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            grad_z, x, weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, (needs_x, needs_weight, False)
        )
        return grad_x, grad_weight, grad_scale if needs_norm[0] else None, grad_shift if needs_norm[1] else None, None, None, None


def moment_gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    mean_x: Tensor,
    against_x: Tensor,
    needs_x: bool,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    r"""Gradients of `PointwiseNorm` with respect to x, weight, scale and shift.

    .. math:: g_z = a (g - \bar g - \hat z \, \overline{g \hat z}), \qquad \hat z = (W x - \mu) r, \quad a = \text{scale} \cdot r

    mean, rstd: the mean and r of the convolution's channels. mean_x, against_x: m and W C of the forward pass.
    """
    g, rows, w = pixels(grad), pixels(x), weight[:, :, 0, 0]
    n, total = len(rows), sum_of_rows(g)
    against = product_of_rows(g, rows).sub_(torch.outer(total, mean_x)).to(x)  # sum of g (x - m)^T
    total = total.to(x)
    correlation = rstd * (w * against).sum(1)  # sum of g z_hat
    a = rstd if scale is None else rstd * scale
    slope = correlation * rstd
    grad_weight = a[:, None] * (against - slope[:, None] * against_x)
    grad_x = None
    if needs_x:
        c = a * slope / n
        offset = (c * mean - a * total / n) @ w
        out = torch.addmm(offset, rows, (w.t() * -c) @ w)
        grad_x = images(out.addmm_(g, w * a[:, None]), x)
    return grad_x, grad_weight[:, :, None, None], correlation, total


def pixels(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N H W, C), a view of a tensor in channels-last order, or of some of its channels."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def images(rows: Tensor, like: Tensor) -> Tensor:
    """(N H W, C) -> (N, C, H, W) in channels-last order, with N, H and W of `like`."""
    n, _, h, w = like.shape
    return rows.view(n, h, w, -1).permute(0, 3, 1, 2)


def sum_of_rows(rows: Tensor) -> Tensor:
    """Sum over the rows of a float32 matrix, as float64."""
    n, c = rows.shape
    if rows.is_contiguous():  # PyTorch adds rows of some hundred entries faster than short ones
        joined = math.gcd(n, max(1, ROW // c))
        rows = rows.view(n // joined, joined * c)
    return rows.sum(0).double().view(-1, c).sum(0)


def product_of_rows(a: Tensor, b: Tensor) -> Tensor:
    """a^T b of float32 matrices of many rows, as float64: products of blocks of rows are added in float64."""
    blocks = math.gcd(len(a), max(1, len(a) // BLOCK))
    split = lambda m: m.unflatten(0, (blocks, -1))
    return torch.bmm(split(a).transpose(1, 2), split(b)).double().sum(0)
