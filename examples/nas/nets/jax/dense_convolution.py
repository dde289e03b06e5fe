"""Dense convolutions for XLA that stay fast inside of loops and under `jax.vmap`.

On a CPU XLA runs a convolution inside of a loop, or one with a kernel for each member of a batch of networks, many times slower
than a single one. There the convolution is a product of matrices, of patches of pixels and the kernel, network by network;
elsewhere XLA's own is used.

As in `convolution_kernels`, the convolution y = w * x and its two gradients are the three sides of one trilinear form
<g, w * x>: each is a JAX primitive whose derivatives are the other two. The leading axis of all arrays runs over networks, and
`jax.vmap` adds to it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from .convolution_kernels import IMAGE, in_front


def convolve(x: Array, kernel: Array, stride: int = 1) -> Array:
    """Convolve images (N, H, W, C) by an odd kernel (k, k, C, D), with zero padding.

    Returns (N, ceil(H / stride), ceil(W / stride), D), in the dtype of x.

    Raises:
      ValueError: shapes that do not fit, or an even kernel.
    """
    fits = x.ndim == kernel.ndim == 4 and kernel.shape[0] == kernel.shape[1] and kernel.shape[0] % 2 == 1
    if not fits or kernel.shape[2] != x.shape[-1]:
        raise ValueError(
            f"x and kernel must have shapes (N, H, W, C) and (k, k, C, D) with an odd k, got {x.shape} and {kernel.shape}"
        )
    return dense_p.bind(x[None], kernel[None].astype(x.dtype), stride=stride)[0]


def _out(size: tuple[int, int], stride: int) -> tuple[int, int]:
    return -(-size[0] // stride), -(-size[1] // stride)


# y = w * x


def _shape(x: Any, w: Any, *, stride: int) -> ShapedArray:
    return ShapedArray((*x.shape[:2], *_out(x.shape[2:4], stride), w.shape[-1]), x.dtype)


def _patches(x: Array, kernel: int, stride: int) -> Array:
    """The pixels that each tap of the kernel multiplies, as a matrix: (N H W / stride^2, k k C)."""
    if kernel == 1:
        taken = x[:, ::stride, ::stride]
        return taken.reshape(-1, x.shape[-1])
    height, width = x.shape[1:3]
    side = kernel // 2
    padded = jnp.pad(x, ((0, 0), (side, side), (side, side), (0, 0)))
    taps = [padded[:, i : i + height : stride, j : j + width : stride] for i in range(kernel) for j in range(kernel)]
    return jnp.concatenate(taps, -1).reshape(-1, kernel**2 * x.shape[-1])


def _flat(w: Array) -> Array:
    return w.reshape(-1, w.shape[-1])


def _product(x: Array, w: Array, *, stride: int) -> Array:
    y = _patches(x, w.shape[0], stride) @ _flat(w)
    return y.reshape(x.shape[0], *_out(x.shape[1:3], stride), -1)


def _xla(x: Array, w: Array, *, stride: int) -> Array:
    padding = [(w.shape[0] // 2,) * 2] * 2
    return lax.conv_general_dilated(x, w, (stride, stride), padding, dimension_numbers=IMAGE)


# gradient of <g, w * x> with respect to x


def _input_shape(g: Any, w: Any, *, size: tuple[int, int], stride: int) -> ShapedArray:
    return ShapedArray((*g.shape[:2], *size, w.shape[-2]), g.dtype)


def _input_product(g: Array, w: Array, *, size: tuple[int, int], stride: int) -> Array:
    patches = _flat(g) @ _flat(w).T
    x = jax.ShapeDtypeStruct((g.shape[0], *size, w.shape[-2]), g.dtype)
    return jax.linear_transpose(partial(_patches, kernel=w.shape[0], stride=stride), x)(patches)[0]


def _input_xla(g: Array, w: Array, *, size: tuple[int, int], stride: int) -> Array:
    x = jax.ShapeDtypeStruct((g.shape[0], *size, w.shape[-2]), g.dtype)
    return jax.linear_transpose(lambda x: _xla(x, w, stride=stride), x)(g)[0]


# gradient of <g, w * x> with respect to w


def _weight_shape(x: Any, g: Any, *, kernel: int, stride: int) -> ShapedArray:
    return ShapedArray((x.shape[0], kernel, kernel, x.shape[-1], g.shape[-1]), x.dtype)


def _weight_product(x: Array, g: Array, *, kernel: int, stride: int) -> Array:
    return (_patches(x, kernel, stride).T @ _flat(g)).reshape(kernel, kernel, x.shape[-1], -1)


def _weight_xla(x: Array, g: Array, *, kernel: int, stride: int) -> Array:
    w = jax.ShapeDtypeStruct((kernel, kernel, x.shape[-1], g.shape[-1]), x.dtype)
    return jax.linear_transpose(lambda w: _xla(x, w, stride=stride), w)(g)[0]


def _primitive(name: str, shape: Any, product: Callable[..., Array], xla: Callable[..., Array]) -> Primitive:
    """A primitive of two arrays, from functions of the arrays of one network."""
    made = Primitive(f"nas_dense_{name}")

    def by_network(a: Array, b: Array, **geometry: Any) -> Array:
        if len(a) == 1:
            return product(a[0], b[0], **geometry)[None]
        return lax.map(lambda both: product(*both, **geometry), (a, b))

    def together(a: Array, b: Array, **geometry: Any) -> Array:
        return jax.vmap(partial(xla, **geometry))(a, b) if len(a) > 1 else xla(a[0], b[0], **geometry)[None]

    def batch(arrays: tuple[Array, Array], axes: tuple[Any, Any], **geometry: Any) -> tuple[Array, int]:
        full = in_front(arrays, axes)
        size, networks = full[0].shape[:2]
        out = made.bind(*(a.reshape(size * networks, *a.shape[2:]) for a in full), **geometry)
        return out.reshape(size, networks, *out.shape[1:]), 0

    made.def_abstract_eval(shape)
    made.def_impl(lambda *arrays, **geometry: jax.jit(partial(made.bind, **geometry))(*arrays))
    mlir.register_lowering(made, mlir.lower_fun(together, multiple_results=False))
    mlir.register_lowering(made, mlir.lower_fun(by_network, multiple_results=False), platform="cpu")
    batching.primitive_batchers[made] = batch
    return made


dense_p = _primitive("convolve", _shape, _product, _xla)
input_p = _primitive("input_gradient", _input_shape, _input_product, _input_xla)
weight_p = _primitive("weight_gradient", _weight_shape, _weight_product, _weight_xla)


def _size(x: Any) -> tuple[int, int]:
    return tuple(x.aval.shape[2:4])


def _kernel(w: Any) -> int:
    return int(w.aval.shape[1])


# Transposes: the argument without value is the one the result belongs to; ct is the cotangent of the output.
ad.defbilinear(
    dense_p,
    lambda ct, x, w, stride: input_p.bind(ct, w, size=_size(x), stride=stride),
    lambda ct, x, w, stride: weight_p.bind(x, ct, kernel=_kernel(w), stride=stride),
)
ad.defbilinear(
    input_p,
    lambda ct, g, w, size, stride: dense_p.bind(ct, w, stride=stride),
    lambda ct, g, w, size, stride: weight_p.bind(ct, g, kernel=_kernel(w), stride=stride),
)
ad.defbilinear(
    weight_p,
    lambda ct, x, g, kernel, stride: input_p.bind(g, ct, size=_size(x), stride=stride),
    lambda ct, x, g, kernel, stride: dense_p.bind(x, ct, stride=stride),
)
