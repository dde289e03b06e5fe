"""Depthwise convolutions and pools for XLA, stacked over the paths of a cell.

On a CPU XLA computes a depthwise convolution with a loop over single numbers: a 3x3 one of 8 channels takes a hundred times as
long as nine products of shifted images. There the convolution is a sum of shifted products; elsewhere XLA's own is used.

The convolution y = w * x and its two gradients are the three sides of one trilinear form <g, w * x>. Each is a JAX primitive
whose derivatives are the other two, so that derivatives of any order, in forward and in reverse mode, run on the same fast code.
Pools are linear once it is known which pixel of each window is the largest; a pool and its transpose are a pair of primitives.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

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
    return _convolve_shifted(_with_holes(g, size, stride), weight[:, ::-1, ::-1], stride=1, dilation=dilation)


def _input_xla(g: Array, weight: Array, *, size: tuple[int, int], stride: int, dilation: int) -> Array:
    x = jax.ShapeDtypeStruct((*g.shape[:2], *size, g.shape[-1]), g.dtype)
    return jax.linear_transpose(lambda x: _convolve_xla(x, weight, stride=stride, dilation=dilation), x)(g)[0]


# gradient of <g, w * x> with respect to w


def _weight_shape(x: Any, g: Any, *, kernel: int, stride: int, dilation: int) -> ShapedArray:
    return ShapedArray((x.shape[0], kernel, kernel, x.shape[-1]), x.dtype)


def _weight_shifted(x: Array, g: Array, *, kernel: int, stride: int, dilation: int) -> Array:
    """The weight gradient on one device."""
    if stride > 1:
        return _weight_by_image(x, g, kernel=kernel, stride=stride, dilation=dilation)
    of_path = partial(_weight_of_path, kernel=kernel, dilation=dilation)
    return of_path(x[0], g[0])[None] if len(x) == 1 else lax.map(lambda both: of_path(*both), (x, g))


def _weight_of_path(x: Array, g: Array, *, kernel: int, dilation: int) -> Array:
    """The sum of shifted products over rows, image by image: what is summed stays in the cache of the processor.

    A row of pixels and channels is one long axis, which XLA vectorises; a tap is a part of a long row. For kernels of few
    channels this takes less than half the time of `_weight_by_image`.
    """
    height, width, channels = g.shape[1:]
    padded = _padded(x[None], _padding(kernel, dilation))[0]
    long, step = width * channels, dilation * channels
    images, grads = padded.reshape(*padded.shape[:2], -1), g.reshape(-1, height, long)

    def add_image(total: Array, both: tuple[Array, Array]) -> tuple[Array, None]:
        image, grad = both
        rows = [image[i * dilation : i * dilation + height] for i in range(kernel)]
        products = [(row[:, j * step : j * step + long] * grad).sum(0) for row in rows for j in range(kernel)]
        return total + jnp.stack(products), None

    total = lax.scan(add_image, jnp.zeros((kernel**2, long), x.dtype), (images, grads))[0]
    return total.reshape(kernel, kernel, width, channels).sum(2)


def _weight_by_image(x: Array, g: Array, *, kernel: int, stride: int, dilation: int) -> Array:
    """The sum of shifted products over the pixels of each image, then over images.

    The only form for a batch that is divided over devices: each sums over its own images, whereas a loop over images would
    gather all of them on every device.
    """
    padded = _padded(x, _padding(kernel, dilation))
    taps = [_shifted(padded, i, j, g.shape[2:4], stride, dilation) for i in range(kernel) for j in range(kernel)]
    of_images = jnp.stack([(tap * g).sum((2, 3)) for tap in taps], 1)
    return of_images.sum(2).reshape(len(x), kernel, kernel, -1)


def _lower_weight(ctx: Any, x: Any, g: Any, **geometry: Any) -> Any:
    """Choose the program for a CPU by the number of devices."""
    devices = getattr(ctx.module_context.axis_context, "num_devices", 1)
    chosen = _weight_shifted if devices == 1 else _weight_by_image
    return mlir.lower_fun(chosen, multiple_results=False)(ctx, x, g, **geometry)


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
mlir.register_lowering(weight_gradient_p, _lower_weight, platform="cpu")


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


def taps(x: Array, stride: int, fill: float = 0.0) -> list[Array]:
    """The nine pixels that a 3x3 window with padding 1 sees, row by row: each (..., H / stride, W / stride, C)."""
    height, width = x.shape[-3:-1]
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 3) + [(1, 1), (1, 1), (0, 0)], constant_values=fill)
    return [padded[..., i : i + height : stride, j : j + width : stride, :] for i in range(3) for j in range(3)]


def max_pool(x: Array, stride: int) -> Array:
    """The maximum of each 3x3 window. Its gradient goes to the first of several equal maxima, as in PyTorch."""
    largest, *others = taps(lax.stop_gradient(x), stride, -jnp.inf)
    number = jnp.zeros(largest.shape, jnp.uint8)
    for i, tap in enumerate(others, 1):
        number, largest = jnp.where(tap > largest, jnp.uint8(i), number), jnp.maximum(tap, largest)
    return select_p.bind(x, number, stride=stride, size=x.shape[-3:-1])


def avg_pool(x: Array, stride: int) -> Array:
    """The mean of each 3x3 window, over the pixels inside the image."""
    return average_p.bind(x, stride=stride, size=x.shape[-3:-1])


def _select(x: Array, number: Array, *, stride: int, size: tuple[int, int]) -> Array:
    """The tap with this number of each window."""
    terms = [jnp.where(number == i, tap, 0) for i, tap in enumerate(taps(x, stride))]
    return sum(terms[1:], terms[0])


def _unselect(g: Array, number: Array, *, stride: int, size: tuple[int, int]) -> Array:
    g, number = _with_holes(g, size, stride), _with_holes(number, size, stride)
    terms = [jnp.where(n == 8 - i, tap, 0) for i, (n, tap) in enumerate(zip(taps(number, 1), taps(g, 1)))]
    return sum(terms[1:], terms[0])


def _average(x: Array, *, stride: int, size: tuple[int, int]) -> Array:
    terms = taps(x, stride)
    return sum(terms[1:], terms[0]) / _pixels_inside(size, stride, x.dtype)


def _average_transposed(g: Array, *, stride: int, size: tuple[int, int]) -> Array:
    terms = taps(_with_holes(g / _pixels_inside(size, stride, g.dtype), size, stride), 1)
    return sum(terms[1:], terms[0])


def _with_holes(x: Array, size: tuple[int, int], stride: int) -> Array:
    """The pixels of an image of this size that windows are centred at, zero elsewhere."""
    holes = [(0, n - 1 - (m - 1) * stride, stride - 1) for n, m in zip(size, x.shape[-3:-1])]
    return lax.pad(x, jnp.zeros((), x.dtype), [*[(0, 0, 0)] * (x.ndim - 3), *holes, (0, 0, 0)])


def _pixels_inside(size: tuple[int, int], stride: int, dtype: Any) -> Array:
    """How many pixels of each window are inside the image, (H / stride, W / stride, 1)."""
    rows, columns = (np.minimum(c + 2, n) - np.maximum(c - 1, 0) for n in size for c in [np.arange(0, n, stride)])
    return jnp.asarray((rows[:, None] * columns)[:, :, None], dtype)


def _linear_pair(name: str, there: Any, back: Any) -> Primitive:
    """A primitive that is linear in its first argument, with a primitive for its transpose."""
    pair = Primitive(f"nas_{name}"), Primitive(f"nas_{name}_transposed")
    for made, other, function in ((pair[0], pair[1], there), (pair[1], pair[0], back)):
        _define_linear(made, other, function)
    return pair[0]


def _define_linear(made: Primitive, transposed: Primitive, function: Any) -> None:
    def shape(*arrays: Any, **geometry: Any) -> ShapedArray:
        out = jax.eval_shape(partial(function, **geometry), *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays))
        return ShapedArray(out.shape, out.dtype)

    def jvp(primals: Any, tangents: Any, **geometry: Any) -> tuple[Any, Any]:
        out, tangent = made.bind(*primals, **geometry), tangents[0]
        if type(tangent) is ad.Zero:
            return out, ad.Zero.from_primal_value(out)
        return out, made.bind(tangent, *primals[1:], **geometry)

    def transpose(ct: Any, x: Any, *others: Any, **geometry: Any) -> list:
        found = ad.Zero(x.aval) if type(ct) is ad.Zero else transposed.bind(ct, *others, **geometry)
        return [found, *[None] * len(others)]

    def batch(arrays: Any, axes: Any, **geometry: Any) -> tuple[Array, int]:  # any number of leading axes is allowed
        return made.bind(*in_front(arrays, axes), **geometry), 0

    made.def_abstract_eval(shape)
    made.def_impl(lambda *arrays, **geometry: jax.jit(partial(made.bind, **geometry))(*arrays))
    mlir.register_lowering(made, mlir.lower_fun(function, multiple_results=False))
    batching.primitive_batchers[made] = batch
    ad.primitive_jvps[made] = jvp
    ad.primitive_transposes[made] = transpose


def in_front(arrays: Sequence[Array], axes: Sequence[int | None]) -> list[Array]:
    """The arrays of a batching rule with the mapped axis in front; one without it is repeated."""
    size = next(a.shape[axis] for a, axis in zip(arrays, axes) if axis is not None)
    return [jnp.broadcast_to(a, (size, *a.shape)) if axis is None else jnp.moveaxis(a, axis, 0) for a, axis in zip(arrays, axes)]


select_p = _linear_pair("select", _select, _unselect)
average_p = _linear_pair("average", _average, _average_transposed)
