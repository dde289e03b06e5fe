"""The array libraries under one name each: how NumPy arrays get there and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest


@dataclass(frozen=True)
class Library:
    """An array library: how NumPy arrays get there, dtype kept, and back."""

    name: str
    asarray: Callable[[np.ndarray], Any]

    def give(self, x: Any) -> Any:
        """NumPy arrays (or lists, or numbers) in this library."""
        if isinstance(x, (list, tuple)):
            return [self.give(a) for a in x]
        return self.asarray(x) if isinstance(x, np.ndarray) else x

    def take(self, x: Any) -> Any:
        """Arrays of this library as NumPy arrays."""
        if isinstance(x, (list, tuple)):
            return [self.take(a) for a in x]
        return np.asarray(x.detach() if hasattr(x, "detach") else x)


def jax_precision(double: bool = True) -> AbstractContextManager[Any]:
    """JAX with 64-bit numbers, or without: `jax.enable_x64`, which was `jax.experimental.enable_x64` before JAX 0.8."""
    import jax

    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(double)
    from jax import experimental

    return experimental.enable_x64(double)


def open_library(name: str) -> Iterator[Library]:
    module = pytest.importorskip(name)
    if name == "torch":
        asarray = lambda a: module.from_numpy(np.array(a))
    else:
        asarray = module.numpy.asarray if name == "jax" else module.asarray
    with jax_precision() if name == "jax" else nullcontext():
        yield Library(name, asarray)
