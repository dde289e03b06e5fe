"""The operations of the DARTS space in JAX, for a stack of paths: (paths, N, H, W, C) -> (paths, N, H / stride, W / stride, C).

All paths of one operation from sources of one shape are computed together, with one array for each parameter whose first axis
runs over the paths: XLA compiles a few large operations instead of hundreds of small ones. `operation(x, rows, scale)` computes
the paths of the stack with the indices `rows` only; x holds the source of each, scale (rows,) its architecture weight or None
for 1. As in the PyTorch networks, batch norms of the search form have no scale and shift of their own: the architecture weight is
the scale of the last one. In the evaluation form they have both, and running statistics.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from .convolution_kernels import IMAGE, avg_pool, depthwise, max_pool

Form = Literal["search", "evaluation"]
Rows = Sequence[int] | None
EPS = 1e-5
MOMENTUM = 0.1  # of running statistics: the share of the new batch, as in PyTorch


def uniform(shape: Sequence[int], inputs: int, rngs: nnx.Rngs, dtype: Any) -> nnx.Param:
    """A parameter drawn as PyTorch initialises layers: U(-1 / sqrt(inputs), 1 / sqrt(inputs)).

    The numbers are NumPy's, as JAX would compile a program for each shape.
    """
    bound, key = 1 / math.sqrt(inputs), rngs.params()
    if isinstance(key, jax.core.Tracer):  # in nnx.eval_shape or jit
        return nnx.Param(jax.random.uniform(key, shape, dtype, -bound, bound))
    random = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    return nnx.Param(jnp.asarray(random.uniform(-bound, bound, shape), dtype))


def rows_of(values: Array, rows: Rows) -> Array:
    """The entries of the first axis with these indices; None: all."""
    if rows is None or list(rows) == list(range(len(values))):
        return values
    return values[np.array(rows)]


class BatchNorm(nnx.Module):
    """Batch norm of each path and channel over images and pixels, computed in float32 or wider.

    affine: whether it has a scale and a shift. running: whether it has running statistics, by default if it is affine; without
    them it uses the statistics of the batch in every mode.
    """

    def __init__(self, paths: int, channels: int, affine: bool, dtype: Any, running: bool | None = None):
        self.use_running_average = False
        self.affine, self.running = affine, affine if running is None else running
        if self.affine:
            self.scale = nnx.Param(jnp.ones((paths, channels), dtype))
            self.bias = nnx.Param(jnp.zeros((paths, channels), dtype))
        if self.running:
            self.mean = nnx.BatchStat(jnp.zeros((paths, channels), dtype))
            self.var = nnx.BatchStat(jnp.ones((paths, channels), dtype))

    def __call__(self, x: Array, rows: Rows = None, scale: Array | None = None) -> Array:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if self.running and self.use_running_average:
            mean, var = _everywhere(rows_of(self.mean[...], rows)), _everywhere(rows_of(self.var[...], rows))
        else:
            mean = wide.mean((1, 2, 3), keepdims=True)
            var = jnp.square(wide - mean).mean((1, 2, 3), keepdims=True)
            if self.running:
                self._update(mean, var, math.prod(x.shape[1:4]), rows)
        factor = lax.rsqrt(var + EPS)
        if scale is not None:
            factor = factor * _everywhere(scale[:, None])
        if self.affine:
            factor = factor * _everywhere(rows_of(self.scale[...], rows))
        y = (wide - mean) * factor
        if self.affine:
            bias = _everywhere(rows_of(self.bias[...], rows))
            y = y + (bias if scale is None else bias * _everywhere(scale[:, None]))
        return y.astype(x.dtype)

    def _update(self, mean: Array, var: Array, count: int, rows: Rows) -> None:
        """Move the running statistics towards those of a batch, with the unbiased variance, as PyTorch does."""
        for variable, new in ((self.mean, mean), (self.var, var * (count / max(count - 1, 1)))):
            before = variable[...]
            new = lax.stop_gradient(new[:, 0, 0, 0]).astype(before.dtype)
            if rows is not None:
                new = before.at[np.array(rows)].set(new)
            variable[...] = before + MOMENTUM * (new - before)


def _everywhere(values: Array) -> Array:
    """(paths, C) -> (paths, 1, 1, 1, C)."""
    return values[:, None, None, None]


class Pointwise(nnx.Module):
    """A 1x1 convolution for each path."""

    def __init__(self, paths: int, inputs: int, outputs: int, rngs: nnx.Rngs, dtype: Any):
        self.kernel = uniform((paths, inputs, outputs), inputs, rngs, dtype)

    def __call__(self, x: Array, rows: Rows = None) -> Array:
        return jnp.einsum("pnhwc,pcd->pnhwd", x, rows_of(self.kernel[...], rows).astype(x.dtype))


class Depthwise(nnx.Module):
    """A depthwise convolution for each path."""

    def __init__(self, paths: int, channels: int, kernel: int, stride: int, dilation: int, rngs: nnx.Rngs, dtype: Any):
        self.kernel = uniform((paths, kernel, kernel, channels), kernel**2, rngs, dtype)
        self.stride, self.dilation = stride, dilation

    def __call__(self, x: Array, rows: Rows = None) -> Array:
        return depthwise(x, rows_of(self.kernel[...], rows).astype(x.dtype), self.stride, self.dilation)


class Rectified(nnx.Module):
    """An operation that begins with a ReLU, which the caller applies: all paths from one source share it."""


class Separable(Rectified):
    """Depthwise convolution, 1x1 convolution, batch norm."""

    def __init__(
        self, paths: int, channels: int, kernel: int, stride: int, dilation: int, affine: bool, rngs: nnx.Rngs, dtype: Any
    ):
        self.depthwise = Depthwise(paths, channels, kernel, stride, dilation, rngs, dtype)
        self.pointwise = Pointwise(paths, channels, channels, rngs, dtype)
        self.norm = BatchNorm(paths, channels, affine, dtype)

    def __call__(self, rectified: Array, rows: Rows = None, scale: Array | None = None) -> Array:
        return self.norm(self.pointwise(self.depthwise(rectified, rows), rows), rows, scale)


class TwiceSeparable(Rectified):
    """Two separable convolutions; the scale is applied by the second."""

    def __init__(self, paths: int, channels: int, kernel: int, stride: int, affine: bool, rngs: nnx.Rngs, dtype: Any):
        self.first = Separable(paths, channels, kernel, stride, 1, affine, rngs, dtype)
        self.second = Separable(paths, channels, kernel, 1, 1, affine, rngs, dtype)

    def __call__(self, rectified: Array, rows: Rows = None, scale: Array | None = None) -> Array:
        return self.second(nnx.relu(self.first(rectified, rows)), rows, scale)


class ConvNorm(Rectified):
    """1x1 convolution, batch norm."""

    def __init__(self, paths: int, inputs: int, outputs: int, affine: bool, rngs: nnx.Rngs, dtype: Any):
        self.pointwise = Pointwise(paths, inputs, outputs, rngs, dtype)
        self.norm = BatchNorm(paths, outputs, affine, dtype)

    def __call__(self, rectified: Array, rows: Rows = None, scale: Array | None = None) -> Array:
        return self.norm(self.pointwise(rectified, rows), rows, scale)


class FactorizedReduce(Rectified):
    """Two 1x1 convolutions of stride 2, one of them shifted by a pixel, concatenated, batch norm. Even sizes only."""

    def __init__(self, paths: int, inputs: int, outputs: int, affine: bool, rngs: nnx.Rngs, dtype: Any):
        self.even = Pointwise(paths, inputs, outputs // 2, rngs, dtype)
        self.odd = Pointwise(paths, inputs, outputs - outputs // 2, rngs, dtype)
        self.norm = BatchNorm(paths, outputs, affine, dtype)

    def __call__(self, rectified: Array, rows: Rows = None, scale: Array | None = None) -> Array:
        even, odd = rectified[:, :, ::2, ::2], rectified[:, :, 1::2, 1::2]
        return self.norm(jnp.concatenate([self.even(even, rows), self.odd(odd, rows)], -1), rows, scale)


class FactorisedSeven(Rectified):
    """1x7 convolution, 7x1 convolution, batch norm."""

    def __init__(self, paths: int, channels: int, stride: int, affine: bool, rngs: nnx.Rngs, dtype: Any):
        self.wide = uniform((paths, 1, 7, channels, channels), 7 * channels, rngs, dtype)
        self.tall = uniform((paths, 7, 1, channels, channels), 7 * channels, rngs, dtype)
        self.norm = BatchNorm(paths, channels, affine, dtype)
        self.stride = stride

    def __call__(self, rectified: Array, rows: Rows = None, scale: Array | None = None) -> Array:
        made = []
        for x, wide, tall in zip(rectified, rows_of(self.wide[...], rows), rows_of(self.tall[...], rows)):
            made.append(convolve(convolve(x, wide, (1, self.stride)), tall, (self.stride, 1)))
        return self.norm(jnp.stack(made), rows, scale)


def convolve(x: Array, kernel: Array, strides: tuple[int, int] = (1, 1)) -> Array:
    """A dense convolution (N, H, W, C) -> (N, H / stride, W / stride, D), with zero padding, by an odd kernel (k, l, C, D)."""
    padding = [(size // 2, size // 2) for size in kernel.shape[:2]]
    return lax.conv_general_dilated(x, kernel.astype(x.dtype), strides, padding, dimension_numbers=IMAGE)


POOLS = {"max_pool_3x3": max_pool, "avg_pool_3x3": avg_pool}


class Pool(nnx.Module):
    """A 3x3 pool with padding 1, (sources, N, H, W, C); in the search form a batch norm without scale follows.

    It is the same for all paths from a source, so that it is computed once for each.
    """

    def __init__(self, kind: str, stride: int, form: Form):
        self.kind, self.stride = kind, stride
        self.norm = BatchNorm(1, 1, False, jnp.float32) if form == "search" else None

    def __call__(self, x: Array, scale: Array | None = None) -> Array:
        y = POOLS[self.kind](x, self.stride)
        if self.norm is not None:
            return self.norm(y, None, scale)
        return y if scale is None else y * scale[:, None, None, None, None].astype(y.dtype)


class Identity(nnx.Module):
    """The source itself."""


class Noise(nnx.Module):
    """Gaussian noise of the shape of the (strided) source: the operation of S4 that a search should not select."""

    def __init__(self, stride: int):
        self.stride = stride

    def __call__(self, like: Array, key: Array) -> Array:
        """Noise in the shape of like (N, H, W, C)."""
        return jax.random.normal(key, like[:, :: self.stride, :: self.stride].shape, like.dtype)


def make(name: str, paths: int, channels: int, stride: int, form: Form, rngs: nnx.Rngs, dtype: Any) -> nnx.Module:
    """The operation of this name for a stack of paths."""
    affine = form == "evaluation"
    kind, *size = name.rsplit("_", 1)
    if name in POOLS:
        return Pool(name, stride, form)
    if name == "noise":
        return Noise(stride)
    if name == "skip_connect":
        return Identity() if stride == 1 else FactorizedReduce(paths, channels, channels, affine, rngs, dtype)
    if kind == "sep_conv":
        return TwiceSeparable(paths, channels, int(size[0][0]), stride, affine, rngs, dtype)
    if kind == "dil_conv":
        return Separable(paths, channels, int(size[0][0]), stride, 2, affine, rngs, dtype)
    if name == "conv_7x1_1x7":
        return FactorisedSeven(paths, channels, stride, affine, rngs, dtype)
    raise ValueError(f"unknown operation {name!r}")
