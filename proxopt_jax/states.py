"""States of the transformations; the moments of Adam have the names of optax, so that ``optax.tree.get`` finds them."""

from __future__ import annotations

from typing import Any, NamedTuple


class ProxAdamState(NamedTuple):
    """State of ``prox_adam``: ``proxopt.updates.ProxAdamState`` with trees in place of arrays, and optax's names.

    Attributes:
      mu: Adam's first moment, without bias correction.
      nu: Adam's second moment, without bias correction.
      count: the number of steps taken.
    """

    mu: Any
    nu: Any
    count: Any  # an array; the name is also a method of tuples, of another type

    @property
    def mean(self) -> Any:
        """``mu``, as ``proxopt.updates`` names it."""
        return self.mu

    @property
    def square(self) -> Any:
        """``nu``, as ``proxopt.updates`` names it."""
        return self.nu


class AdamHAPGState(NamedTuple):
    """State of ``adam_hapg``: ``proxopt.updates.AdamHAPGState`` with trees in place of arrays, and optax's names.

    Attributes:
      point: the prox point p_t, exactly sparse.
      mu: Adam's first moment, without bias correction.
      nu: Adam's second moment, without bias correction.
      count: the number of steps taken, t.
    """

    point: Any
    mu: Any
    nu: Any
    count: Any

    @property
    def mean(self) -> Any:
        """``mu``, as ``proxopt.updates`` names it."""
        return self.mu

    @property
    def square(self) -> Any:
        """``nu``, as ``proxopt.updates`` names it."""
        return self.nu


class FreezeZerosState(NamedTuple):
    """State of ``freeze_zeros``.

    Attributes:
      inner_state: the state of the optimizer inside.
      zeros: a tree like the parameters of boolean arrays, True where an entry stays zero.
    """

    inner_state: Any
    zeros: Any
