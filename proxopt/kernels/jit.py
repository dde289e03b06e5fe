"""The decorators of all compiled loops, and arrays at a memory address inside them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numba import carray, njit, types  # type: ignore[attr-defined]
from numba.extending import intrinsic, overload

F = TypeVar("F", bound=Callable[..., Any])

# Without "nnan", "ninf" and "nsz": NaN must stay NaN, and zeroed entries must be +0
REORDER = {"contract", "reassoc", "arcp"}


def jit(function: F) -> F:
    """Compile a loop that may sum in another order, use fused multiply-add and multiply by reciprocals."""
    return _compiled(function, REORDER)


def jit_exactly(function: F) -> F:
    """Compile a loop in the order in which it is written, for values close to the limits of the floating-point range."""
    return _compiled(function, False)


def _compiled(function: F, fastmath: Any) -> F:
    options: dict[str, Any] = {"fastmath": fastmath, "error_model": "numpy", "nogil": True}
    try:
        compiled = njit(cache=True, **options)(function)
    except RuntimeError:  # no folder for the cache can be written: compile once in every process
        return njit(**options)(function)  # type: ignore[no-any-return]
    _depend_on_all_sources(compiled)
    return compiled  # type: ignore[no-any-return]


def _depend_on_all_sources(compiled: Any) -> None:
    """Discard the cached code of a function when any file of this package changes.

    numba itself compares the file of the function only, but its code contains that of the functions it calls.
    """
    file: Any = getattr(getattr(compiled, "_cache", None), "_cache_file", None)
    if hasattr(file, "_source_stamp"):
        file._source_stamp = _STAMP


_STAMP = tuple((p.name, p.stat().st_mtime, p.stat().st_size) for p in sorted(Path(__file__).parent.glob("*.py")))


def _pointer(typing_context: Any, address: Any) -> Any:
    """A memory address, an integer, as a pointer."""

    def convert(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.voidptr(types.int64), convert


pointer: Any = intrinsic(_pointer)


@jit
def view(address, offset, length, like):  # type: ignore[no-untyped-def]
    """The ``length`` entries from entry ``offset`` on of the memory at ``address``, as an array of the dtype of ``like``."""
    return carray(pointer(address + offset * like.itemsize), (length,), like.dtype)


def integers(x):  # type: ignore[no-untyped-def]
    """The bit patterns of an array of floats as integers of the same size; in compiled code only."""


@overload(integers)
def _integers(x):  # type: ignore[no-untyped-def]  # numba compares the names and annotations of arguments
    if x.dtype == types.float32:
        return lambda x: x.view(np.int32)
    return lambda x: x.view(np.int64)


def _from_integer(typing_context: Any, value: Any, like: Any) -> Any:
    """The float of the dtype of ``like`` with this bit pattern; the inverse of `integers`."""
    float_type, int_type = like.dtype, types.int32 if like.dtype == types.float32 else types.int64

    def convert(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits = context.cast(builder, arguments[0], signature.args[0], int_type)
        return builder.bitcast(bits, context.get_value_type(float_type))

    return float_type(value, like), convert


from_integer: Any = intrinsic(_from_integer)
