"""The decorators of all compiled loops, and arrays at a memory address inside them."""

# mypy: disallow-untyped-calls=False

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from numba import njit, types
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

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
    # Without "_nrt" references to arrays are not counted, which would take longer than the arithmetic on a short row. Such code
    # cannot create arrays
    options: dict[str, Any] = {"fastmath": fastmath, "error_model": "numpy", "nogil": True, "_nrt": False}
    # Loops are never called through C, and those with private names by others only: without wrappers they compile faster
    options |= {"no_cfunc_wrapper": True, "no_cpython_wrapper": function.__name__.startswith("_")}
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


def _array_at(context: Any, builder: Any, kind: Any, pointer: Any, length: Any) -> Any:
    """A vector of numba's type ``kind`` at a pointer; numba does not count references to it."""
    array = context.make_array(kind)(context, builder)
    size = context.get_constant(types.intp, context.get_abi_sizeof(context.get_data_type(kind.dtype)))
    populate_array(array, pointer, [length], [size], size, meminfo=None)
    return array._getvalue()


def _view(typing_context: Any, address: Any, offset: Any, length: Any, like: Any) -> Any:
    def make(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = signature.return_type
        start, first, count, _ = arguments
        base = builder.inttoptr(start, context.get_data_type(kind.dtype).as_pointer())
        return _array_at(context, builder, kind, builder.gep(base, [first]), count)

    kind = types.Array(like.dtype, 1, "C")
    return kind(types.int64, types.int64, types.int64, like), make


view: Any = intrinsic(_view)
"""``view(address, offset, length, like)``: entries from number ``offset`` on at an address, of the dtype of ``like``."""


def _integer_type(float_type: Any) -> Any:
    return types.int32 if float_type == types.float32 else types.int64


def _integers(typing_context: Any, x: Any) -> Any:
    def make(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = signature.return_type
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        pointer = builder.bitcast(array.data, context.get_data_type(kind.dtype).as_pointer())
        return _array_at(context, builder, kind, pointer, array.nitems)

    return types.Array(_integer_type(x.dtype), 1, "C")(x), make


integers: Any = intrinsic(_integers)
"""``integers(x)``: the bit patterns of a vector of floats, as integers of the same size in the same memory."""


def _from_integer(typing_context: Any, value: Any, like: Any) -> Any:
    def convert(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits = context.cast(builder, arguments[0], signature.args[0], _integer_type(like.dtype))
        return builder.bitcast(bits, context.get_value_type(like.dtype))

    return like.dtype(value, like), convert


from_integer: Any = intrinsic(_from_integer)
"""``from_integer(value, like)``: the float of the dtype of ``like`` with this bit pattern, the inverse of `integers`."""
