"""Projections onto sets that an optimizer keeps its parameters in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from proxopt import _arrays, _checks
from proxopt._arrays import ArrayOrList
from proxopt.groups import Groups


@dataclass(frozen=True, eq=False)
class Sphere:
    r"""Groups of entries whose L2 norm has a given value.

    .. math::

        \operatorname{project}(x)_g = \begin{cases} r \, x_g / \|x_g\|_2 & \text{if } x_g \ne 0 \\ 0 & \text{otherwise}
        \end{cases}

    with the radius r. The result for :math:`x_g \ne 0` is the point of the sphere nearest to :math:`x_g`. Zero groups stay zero,
    and so does every zero entry, so that what a prox has zeroed is kept. Use it where a loss does not depend on the size of a
    group of weights, as in front of a normalisation: a penalty then shrinks the weights relative to each other, without shrinking
    all of them together.

    Args:
      groups: a ``Groups``; None makes all entries one group.
      radius: r, a number > 0.

    Raises:
      TypeError: groups is no ``Groups``, or radius no number.
      ValueError: radius is not finite and > 0.

    >>> import numpy as np
    >>> Sphere(Groups.along(1)).project(np.array([[3.0, 4.0], [0.0, -2.0], [0.0, 0.0]]))
    array([[ 0.6,  0.8],
           [ 0. , -1. ],
           [ 0. ,  0. ]])
    """

    groups: Groups | None = None
    radius: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.groups, (Groups, type(None))):
            raise TypeError(f"groups must be a Groups or None, got {self.groups!r}")
        _checks.in_range("radius", self.radius, open_low=True)
        if np.ndim(self.radius):
            raise TypeError(f"radius must be a number, got {self.radius!r}")

    def project(self, x: ArrayOrList) -> Any:
        """Rescale each group to the radius, without overflow or underflow for huge and tiny entries.

        Args:
          x: a floating-point array of any array library, or a list of them, which groups may span. NaN and inf in a group make
            the group NaN.

        Returns:
          An array in the library, dtype, shape and device of x, or a list of them. It can be differentiated.

        Raises:
          TypeError: x is not floating point.
          ValueError: the groups do not fit x.
        """
        arrays, _ = _arrays.as_list(x)
        self._check(arrays)
        if not any(_arrays.size(a) for a in arrays):
            return _arrays.like_input(x, [a * 1 for a in arrays])
        wide = [_arrays.widen(a) for a in arrays]
        xp, groups = _arrays.namespace(*wide), self.partition.from_right(wide)
        # divided by the largest entry of its group first, no square overflows, and the largest is 1
        scaled = [a / m for a, m in zip(wide, groups.spread(groups.scale(wide, xp), wide, xp))]
        square = groups.total([_arrays.square(xp, a) for a in scaled], xp)
        factor = self.radius / xp.sqrt(xp.where(square == 0, xp.ones_like(square), square))
        found = [a * f + 0.0 for a, f in zip(scaled, groups.spread(factor, scaled, xp))]
        return _arrays.like_input(x, [_arrays.cast(f, a) for f, a in zip(found, arrays)])

    @property
    def partition(self) -> Groups:
        """The groups, with all entries as one where none were given."""
        return self.groups or Groups.whole()

    def to_dict(self) -> dict[str, Any]:
        """The sphere as plain data: strings, numbers, lists."""
        return {"kind": "Sphere", "groups": self.partition.to_dict(), "radius": float(self.radius)}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sphere) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash((self.partition, float(self.radius)))

    def _check(self, xs: list[Any]) -> None:
        """Raise where the groups do not fit the arrays."""
        self.partition.check(xs)
