"""Convolutions with cheaper gradients on a CPU: less time for depthwise ones, less memory for 1x1 ones.

On a CPU PyTorch has no fast gradient of a depthwise convolution if the kernel is wider than 3 (gradient of the weight) or
dilated (both gradients): it costs up to ten times the forward pass. But

- the gradient of the input of a convolution of stride 1 is a convolution with the flipped kernel;
- the gradient of a k x 5 kernel is the concatenation of those of a k x 3 and a k x 2 kernel;
- a convolution of dilation 2 is an ordinary one on each of the four grids of every other pixel, and at stride 2 on one of them.

The result of a 1x1 convolution is recomputed for the gradient of the batch norm after it instead of kept: such results are most
of the memory of a supernet.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FAST_WIDTH = 3


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
            x, stride, dilation, padding = x[:, :, ::2, ::2], 1, 1, padding // 2
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


class PointwiseNorm(torch.autograd.Function):
    """batch_norm(conv2d(x, weight), mean, var, scale, shift, training=True, ...) of a 1x1 convolution; twice differentiable.

    Keeps x for the gradient, not the result of the convolution. The running mean and var (or None) are updated in place.
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
        y, mean, rstd = torch.ops.aten.native_batch_norm(F.conv2d(x, weight), scale, shift, *running, True, momentum, eps)
        ctx.save_for_backward(x, weight, scale, mean, rstd)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, scale, mean, rstd = ctx.saved_tensors
        needs_x, needs_weight, *needs_norm = ctx.needs_input_grad[:4]
        z = F.conv2d(x, weight)
        grad_z, grad_scale, grad_shift = torch.ops.aten.native_batch_norm_backward(
            grad, z, scale, None, None, mean, rstd, True, ctx.eps, (True, *needs_norm)
        )
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            grad_z, x, weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, (needs_x, needs_weight, False)
        )
        return grad_x, grad_weight, grad_scale if needs_norm[0] else None, grad_shift if needs_norm[1] else None, None, None, None
