"""Operations that the array API standard lacks, or whose derivatives differ between libraries, in one form for all."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
from array_api_compat import array_namespace, is_array_api_obj, is_jax_array

Array: TypeAlias = Any
"""An array of NumPy, torch, JAX or any other library of the array API standard."""

ArrayOrList: TypeAlias = Array | Sequence[Array]
"""An array, or a list of arrays that form one problem."""


def namespace(*xs: Array) -> Any:
    """The array API namespace of the arrays. For NumPy and torch without `array_namespace`, about which torch.compile warns."""
    if all(is_numpy_array(x) for x in xs):
        from array_api_compat import numpy

        return numpy
    if all(is_torch_array(x) for x in xs):
        from array_api_compat import torch

        return torch
    return array_namespace(*xs)


def is_numpy_array(x: Any) -> bool:
    return isinstance(x, np.ndarray)


def _is_jax(x: Any) -> bool:
    return not (is_numpy_array(x) or is_torch_array(x)) and bool(is_jax_array(x))


def may_differentiate(x: Any) -> bool:
    """Whether derivatives may be taken of what is computed from x; False where only the numbers count."""
    if is_torch_array(x):
        return bool(sys.modules["torch"].is_grad_enabled())
    return not is_numpy_array(x)


def is_torch_array(x: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def as_list(x: Any, name: str = "x") -> tuple[list[Array], Any]:
    """The arrays of `x` (an array or a list of arrays) and their namespace; refuses what has no prox.

    A scalar of NumPy, to which its arithmetic turns an array without axes, becomes such an array again.
    """
    many = isinstance(x, (list, tuple))
    arrays = [np.asarray(a) if isinstance(a, np.generic) else a for a in (x if many else [x])]
    if not arrays:
        raise ValueError(f"{name} must hold at least one array, got an empty list")
    for i, a in enumerate(arrays):
        label = f"{name}[{i}]" if many else name
        if not (is_numpy_array(a) or is_torch_array(a) or is_array_api_obj(a)):
            raise TypeError(f"{label} must be an array or a list of arrays, got {type(a).__name__}")
        if not is_floating(a):
            raise TypeError(f"{label} must be a floating-point array, got {a.dtype}")
    return arrays, namespace(*arrays)


def like_input(x: Any, results: Sequence[Array]) -> Any:
    """Hand `results` back in the container that `x` came in, with scalars of NumPy where it held such."""
    many = isinstance(x, (list, tuple))
    results = [r[()] if isinstance(a, np.generic) else r for a, r in zip(x if many else [x], results)]
    return results[0] if not many else tuple(results) if type(x) is tuple else results


def is_floating(x: Array) -> bool:
    """Real or complex floating point, the half precisions included."""
    if is_torch_array(x):
        return bool(x.dtype.is_floating_point or x.dtype.is_complex)
    if is_numpy_array(x) and x.dtype.kind in "fc":
        return True
    if "bfloat16" in str(x.dtype):
        return True
    return bool(namespace(x).isdtype(x.dtype, ("real floating", "complex floating")))


def is_complex(x: Array) -> bool:
    if is_torch_array(x):
        return bool(x.dtype.is_complex)
    return x.dtype.kind == "c" if is_numpy_array(x) else "complex" in str(x.dtype)


def is_number(v: Any) -> bool:
    """A Python or NumPy scalar: something whose value may be read without waiting for a device."""
    return isinstance(v, (int, float, np.number)) or (isinstance(v, np.ndarray) and v.ndim == 0)


def widen(x: Array) -> Array:
    """Half precision in float32, everything else as it is."""
    if is_numpy_array(x) and x.dtype.char in "fdFD":  # the name of a dtype costs more than the arithmetic on a small array
        return x
    if "float16" in str(x.dtype):
        xp = namespace(x)
        return xp.astype(x, xp.float32)
    return x


def cast(x: Array, target: Array) -> Array:
    """`x` in the dtype of `target`."""
    if is_numpy_array(target):  # an array with no axes, too: NumPy's arithmetic turns it into a scalar
        return np.asarray(x, dtype=target.dtype)
    return x if x.dtype == target.dtype else namespace(x).astype(x, target.dtype)


def like(v: Any, x: Array) -> Any:
    """A number stays a Python float; an array comes to the library, real dtype and device of `x`."""
    if is_number(v):
        return float(v)
    if isinstance(v, (list, tuple)):
        v = np.asarray(v, dtype=float)
    dtype = namespace(x).real(x).dtype if is_complex(x) else x.dtype
    if isinstance(v, np.ndarray) and not is_numpy_array(x):
        where = {"device": x.device} if is_torch_array(x) else {}
        return namespace(x).asarray(v, dtype=dtype, **where)
    if is_torch_array(v) and is_torch_array(x) and v.device != x.device:
        v = v.to(x.device)
    return v if v.dtype == dtype else namespace(x).astype(v, dtype)


def times(a: Any, b: Any, x: Array) -> Any:
    """a b, where each is a number or an array against x; numbers and NumPy arrays stay what they are."""
    a, b = (float(v) if is_number(v) else v for v in (a, b))
    if isinstance(a, float) or isinstance(b, float) or (is_numpy_array(a) and is_numpy_array(b)):
        return a * b
    return like(a, x) * like(b, x)


def untraced(f: Callable[..., Any]) -> Callable[..., Any]:
    """Let the method `f`, of plain arguments and a plain result, run as it is while torch.compile traces its caller."""
    f._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compiler.assume_constant_result, less its import
    return f


def ndim(v: Any) -> int:
    return 0 if is_number(v) else getattr(v, "ndim", 0)


def size(x: Array) -> int:
    return math.prod(x.shape)


def detach(x: Any) -> Any:
    """`x` as a constant for automatic differentiation."""
    if is_torch_array(x):
        return x.detach()
    if not is_numpy_array(x) and is_jax_array(x):
        import jax

        return jax.lax.stop_gradient(x)
    return x


def repeated(count: int, f: Callable[[Any], Any], state: Any) -> Any:
    """f(f(...f(state))): a loop in JAX too, where it is compiled once and not ``count`` times."""
    first = state[0] if isinstance(state, tuple) else state
    if _is_jax(first):
        import jax

        return jax.lax.fori_loop(0, count, lambda _, value: f(value), state)
    for _ in range(count):
        state = f(state)
    return state


def modulus(xp: Any, x: Array) -> Array:
    """|x|, with slope 0 at x = 0, the symmetric subgradient: the slope of abs is 1 there in JAX."""
    if not _is_jax(x):
        return xp.abs(x)
    if not is_complex(x):
        return x * xp.sign(x)
    zero = x == 0
    return xp.where(zero, 0.0, xp.abs(xp.where(zero, 1.0, x)))


def sign(xp: Any, x: Array) -> Array:
    """The sign of a real array; torch's own method, because array-api-compat's has no vmap."""
    return x.sign() if is_torch_array(x) else xp.sign(x)


def square(xp: Any, x: Array) -> Array:
    """|x|^2 with its second derivative at x = 0, which the square of abs lacks in torch."""
    return xp.real(x) ** 2 + xp.imag(x) ** 2 if is_complex(x) else x * x


def root(x: Array) -> Array:
    """sqrt(x) for x >= 0, from the smallest normal number on, so that the slope at x = 0 is 0 and not infinite."""
    xp = namespace(x)
    tiny = float(xp.finfo(x.dtype).smallest_normal)
    return xp.sqrt(x.clip(tiny) if hasattr(x, "clip") else xp.clip(x, tiny))


def clip(xp: Any, x: Array, bound: Any) -> Array:
    """min(max(x, -bound), bound), with slope 1 in x and 0 in the bound where |x| = bound."""
    if isinstance(bound, float):
        bound = min(bound, float(xp.finfo(x.dtype).max))
    if _is_jax(x):  # its own clip has slopes of 1/2 there
        return xp.where(xp.abs(x) <= bound, x, bound * xp.sign(x))
    if hasattr(x, "clip"):  # the native, fused form
        return x.clip(-bound, bound)
    return xp.clip(x, -bound, bound)


def segment_sum(values: Array, codes: Array, count: int) -> Array:
    """Sum of the entries of the vector `values` that share a code in 0 .. count-1."""
    if is_numpy_array(values):
        return np.bincount(codes, weights=values, minlength=count).astype(values.dtype, copy=False)
    if is_torch_array(values):
        return values.new_zeros(count).index_add(0, index(codes, values), values)
    xp = namespace(values)
    if is_jax_array(values):
        return xp.zeros(count, dtype=values.dtype).at[codes].add(values)
    return xp.sum(_padded(values, codes, count), axis=1)


def segment_max(values: Array, codes: Array, count: int) -> Array:
    """Largest of the non-negative entries of `values` that share a code; 0 where there is none."""
    if is_numpy_array(values):
        largest = np.zeros(count, values.dtype)
        np.maximum.at(largest, codes, values)
        return largest
    if is_torch_array(values):
        return values.new_zeros(count).scatter_reduce(0, index(codes, values), values, "amax")
    xp = namespace(values)
    if is_jax_array(values):
        return xp.zeros(count, dtype=values.dtype).at[codes].max(values)
    return xp.max(_padded(values, codes, count), axis=1)


def middle(xp: Any, rows: Array) -> Array:
    """Median over the last axis, the mean of the two middle entries where their number is even."""
    n = rows.shape[-1]
    if is_numpy_array(rows):  # one vectorised selection; np.median is ten times slower
        parted = np.partition(rows, n // 2, axis=-1)
        upper = parted[..., n // 2]
        return upper if n % 2 else (parted[..., : n // 2].max(axis=-1) + upper) / 2
    ordered = xp.sort(rows, axis=-1)
    return (ordered[..., (n - 1) // 2] + ordered[..., n // 2]) / 2


def pad_index(codes: np.ndarray, count: int) -> np.ndarray:
    """One row per group: the positions of its entries, then `len(codes)` as padding."""
    order = np.argsort(codes, kind="stable")
    lengths = np.bincount(codes, minlength=count)
    rows = np.full((count, max(int(lengths.max(initial=0)), 1)), len(codes))
    starts = np.cumsum(lengths) - lengths
    rows[codes[order], np.arange(len(codes)) - np.repeat(starts, lengths)] = order
    return rows


def index(codes: Any, x: Array, xp: Any = None) -> Array:
    """Integer `codes` as an index array of the library of `x`, on its device; torch tensors stay as they are."""
    if is_torch_array(codes):
        return codes
    xp = xp or namespace(x)
    return xp.asarray(codes, device=x.device) if is_torch_array(x) else xp.asarray(codes)


def keeps(x: Array) -> bool:
    """Whether what is made beside x may be kept for later calls: x is an ordinary torch tensor on a device, nothing is traced."""
    if not is_torch_array(x) or x.device.type in ("cpu", "meta"):
        return False
    torch = sys.modules["torch"]
    ordinary = type(x) in (torch.Tensor, torch.nn.Parameter)
    return ordinary and not torch.compiler.is_compiling() and not torch.is_inference_mode_enabled()


def full(shape: tuple[int, ...], fill: float, x: Array) -> Array:
    """An array of `shape` beside `x`, in its dtype."""
    return x.new_full(shape, fill) if is_torch_array(x) else namespace(x).full(shape, fill, dtype=x.dtype)


def empty_like(x: Array) -> Array:
    """A new array of NumPy or torch, in the shape and dtype of x, with its axes in the order of x in memory."""
    return np.empty_like(x) if is_numpy_array(x) else sys.modules["torch"].empty_like(x)


def _padded(values: Array, codes: np.ndarray, count: int) -> Array:
    """One row per group: its entries, then zeros."""
    xp = namespace(values)
    rows = pad_index(codes, count)
    return xp.reshape(xp.take(xp.concat([values, full((1,), 0.0, values)]), index(rows.reshape(-1), values), axis=0), rows.shape)
