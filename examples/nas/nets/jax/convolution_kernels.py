"""Depthwise convolutions for XLA, stacked over the paths of a cell.

On a CPU XLA computes a depthwise convolution with a loop over single numbers: a 3x3 one of 8 channels takes a hundred times as
long as nine products of shifted images. There the convolution is a sum of shifted products; elsewhere XLA's own is used.

The convolution y = w * x and its two gradients are the three sides of one trilinear form <g, w * x>. Each is a JAX primitive whose
derivatives are the other two, so that derivatives of any order, in forward and in reverse mode, run on the same fast code.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, mlir

IMAGE = ("NHWC", "HWIO", "NHWC")


def depthwise(x: Array, weight: Array, stride: int = 1, dilation: int = 1) -> Array:
    """Convolve each channel of each path with its own odd kernel, with zero padding.

    x: (paths, N, H, W, C). weight: (paths, k, k, C). Returns (paths, N, ceil(H / stride), ceil(W / stride), C).

    Raises:
      ValueError: shapes that do not fit, or an even kernel.
    """
    kernel = weight.shape[1] if weight.ndim == 4 else 0
    if x.ndim != 5 or weight.shape != (x.shape[0], kernel, kernel, x.shape[-1]) or kernel % 2 == 0:
        raise ValueError(
            "x and weight must have shapes (paths, N, H, W, C) and (paths, k, k, C) with an odd k, "
            f"got {x.shape} and {weight.shape}"
        )
    if stride == dilation == 2 and (kernel // 2 * dilation) % 2 == 0:  # all taps fall on every other pixel
        x, stride, dilation = x[:, :, ::2, ::2], 1, 1
    return convolve_p.bind(x, weight, stride=stride, dilation=dilation)


def _padding(kernel: int, dilation: int) -> int:
    return dilation * (kernel // 2)


def _padded(x: Array, padding: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding), (0, 0)))


def _shifted(padded: Array, row: int, column: int, size: tuple[int, int], stride: int, dilation: int) -> Array:
    """The pixels that one tap of the kernel multiplies, (paths, N, *size, C)."""
    top, left = row * dilation, column * dilation
    rows, columns = ((n - 1) * stride + 1 for n in size)
    return padded[:, :, top : top + rows : stride, left : left + columns : stride]


# y = w * x


def _convolve_shape(x: Any, weight: Any, *, stride: int, dilation: int) -> ShapedArray:
    paths, images, height, width, channels = x.shape
    return ShapedArray((paths, images, -(-height // stride), -(-width // stride), channels), x.dtype)


def _convolve_shifted(x: Array, weight: Array, *, stride: int, dilation: int) -> Array:
    kernel = weight.shape[1]
    size = _convolve_shape(x, weight, stride=stride, dilation=dilation).shape[2:4]
    padded = _padded(x, _padding(kernel, dilation))
    taps = weight[:, None, None, None]
    terms = (
        _shifted(padded, i, j, size, stride, dilation) * taps[:, :, :, :, i, j] for i in range(kernel) for j in range(kernel)
    )
    return sum(terms, jnp.zeros((), x.dtype))


def _convolve_xla(x: Array, weight: Array, *, stride: int, dilation: int) -> Array:
    paths, images, height, width, channels = x.shape
    kernel, padding = weight.shape[1], _padding(weight.shape[1], dilation)
    y = lax.conv_general_dilated(
        x.transpose(1, 2, 3, 0, 4).reshape(images, height, width, -1),
        weight.transpose(1, 2, 0, 3).reshape(kernel, kernel, 1, -1),
        (stride, stride),
        [(padding, padding)] * 2,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=IMAGE,
        feature_group_count=paths * channels,
    )
    return y.reshape(*y.shape[:3], paths, channels).transpose(3, 0, 1, 2, 4)


# gradient of <g, w * x> with respect to x


def _input_shape(g: Any, weight: Any, *, size: tuple[int, int], stride: int, dilation: int) -> ShapedArray:
    return ShapedArray((*g.shape[:2], *size, g.shape[-1]), g.dtype)


def _input_shifted(g: Array, weight: Array, *, size: tuple[int, int], stride: int, dilation: int) -> Array:
    if stride > 1:  # zeros between the pixels of g turn it into a convolution of stride 1
        holes = [(0, n - 1 - (m - 1) * stride, stride - 1) for n, m in zip(size, g.shape[2:4])]
        g = lax.pad(g, jnp.zeros((), g.dtype), [(0, 0, 0), (0, 0, 0), *holes, (0, 0, 0)])
    return _convolve_shifted(g, weight[:, ::-1, ::-1], stride=1, dilation=dilation)


def _input_xla(g: Array, weight: Array, *, size: tuple[int, int], stride: int, dilation: int) -> Array:
    x = jax.ShapeDtypeStruct((*g.shape[:2], *size, g.shape[-1]), g.dtype)
    return jax.linear_transpose(lambda x: _convolve_xla(x, weight, stride=stride, dilation=dilation), x)(g)[0]


# gradient of <g, w * x> with respect to w


def _weight_shape(x: Any, g: Any, *, kernel: int, stride: int, dilation: int) -> ShapedArray:
    return ShapedArray((x.shape[0], kernel, kernel, x.shape[-1]), x.dtype)


def _weight_shifted(x: Array, g: Array, *, kernel: int, stride: int, dilation: int) -> Array:
    of_path = partial(_weight_of_path, kernel=kernel, stride=stride, dilation=dilation)
    return of_path(x[0], g[0])[None] if len(x) == 1 else lax.map(lambda both: of_path(*both), (x, g))


def _weight_of_path(x: Array, g: Array, *, kernel: int, stride: int, dilation: int) -> Array:
    """The sum of shifted products over rows, image by image: what is summed stays in the cache of the processor.

    A row of pixels and channels is one long axis, which XLA vectorises. The rows of taps are a loop, so that XLA compiles one.
    """
    height, width, channels = g.shape[1:]
    padded = _padded(x[None], _padding(kernel, dilation))[0]
    long, reach = width * channels, (width - 1) * stride + 1
    starts = [j * dilation for j in range(kernel)]
    if stride == 1:  # a tap is a part of a long row
        images, starts = padded.reshape(*padded.shape[:2], -1), [start * channels for start in starts]
    else:  # the pixels of each tap, one tap after the other
        columns = [padded[:, :, start : start + reach : stride] for start in starts]
        images = jnp.concatenate([c.reshape(*c.shape[:2], long) for c in columns], -1)
        starts = [j * long for j in range(kernel)]
    grads = g.reshape(-1, height, long)

    def row_of_taps(image: Array, grad: Array, row: Array) -> Array:
        rows = lax.dynamic_slice_in_dim(image, row * dilation, (height - 1) * stride + 1)[::stride]
        return jnp.stack([(rows[:, start : start + long] * grad).sum(0) for start in starts])

    def add_image(total: Array, both: tuple[Array, Array]) -> tuple[Array, None]:
        return total + lax.map(lambda row: row_of_taps(*both, row), jnp.arange(kernel)), None

    total = lax.scan(add_image, jnp.zeros((kernel, kernel, long), x.dtype), (images, grads))[0]
    return total.reshape(kernel, kernel, width, channels).sum(2)


def _weight_xla(x: Array, g: Array, *, kernel: int, stride: int, dilation: int) -> Array:
    weight = jax.ShapeDtypeStruct((x.shape[0], kernel, kernel, x.shape[-1]), x.dtype)
    return jax.linear_transpose(lambda w: _convolve_xla(x, w, stride=stride, dilation=dilation), weight)(g)[0]


def _primitive(name: str, shape: Any, shifted: Any, xla: Any) -> Primitive:
    made = Primitive(f"nas_depthwise_{name}")
    made.def_abstract_eval(shape)
    made.def_impl(lambda *arrays, **geometry: jax.jit(partial(made.bind, **geometry))(*arrays))
    mlir.register_lowering(made, mlir.lower_fun(xla, multiple_results=False))
    mlir.register_lowering(made, mlir.lower_fun(shifted, multiple_results=False), platform="cpu")
    return made


convolve_p = _primitive("convolve", _convolve_shape, _convolve_shifted, _convolve_xla)
input_gradient_p = _primitive("input_gradient", _input_shape, _input_shifted, _input_xla)
weight_gradient_p = _primitive("weight_gradient", _weight_shape, _weight_shifted, _weight_xla)


def _size(x: Any) -> tuple[int, int]:
    return tuple(x.aval.shape[2:4])


def _kernel(weight: Any) -> int:
    return int(weight.aval.shape[1])


# Transposes: the argument without value is the one the result belongs to; ct is the cotangent of the output.
ad.defbilinear(
    convolve_p,
    lambda ct, x, weight, **geometry: input_gradient_p.bind(ct, weight, size=_size(x), **geometry),
    lambda ct, x, weight, **geometry: weight_gradient_p.bind(x, ct, kernel=_kernel(weight), **geometry),
)
ad.defbilinear(
    input_gradient_p,
    lambda ct, g, weight, size, **geometry: convolve_p.bind(ct, weight, **geometry),
    lambda ct, g, weight, size, **geometry: weight_gradient_p.bind(ct, g, kernel=_kernel(weight), **geometry),
)
ad.defbilinear(
    weight_gradient_p,
    lambda ct, x, g, kernel, **geometry: input_gradient_p.bind(g, ct, size=_size(x), **geometry),
    lambda ct, x, g, kernel, **geometry: convolve_p.bind(x, ct, **geometry),
)
