"""A penalty restricted to nonnegative entries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from proxopt import _arrays
from proxopt._arrays import Array
from proxopt.groups import Groups
from proxopt.penalties.base import Penalty
from proxopt.penalties.plain import from_dict, plain_data


@dataclass(frozen=True, eq=False)
class NonNegative(Penalty):
    r"""A penalty plus the indicator function of the nonnegative orthant: no entry of its prox is negative.

    .. math::

        f(x) = g(x) + \begin{cases} 0 & \text{if all } x_i \ge 0 \\ \infty & \text{otherwise} \end{cases}, \qquad
        \operatorname{prox}_f(x) = \operatorname{prox}_g(\max(x, 0))

    The formula holds for every g that depends on the moduli :math:`|x_i|` only and does not decrease where one of them grows, and
    in every diagonal metric, so that steps may differ between entries (as those of Adam do). Indeed, where
    :math:`x_i \le 0` both g and :math:`(z_i - x_i)^2` are smallest at :math:`z_i = 0` among all :math:`z_i \ge 0`, for
    :math:`\max(x_i, 0)` in place of :math:`x_i` too; and for nonnegative x a negative entry of z can be replaced by its modulus,
    which leaves g as it is and reduces the distance from x.

    An entry with step 0, and all entries at strength 0, are projected: the result is :math:`\max(x_i, 0)`. With
    :math:`\max(-\text{gradient}, 0)` in place of the gradient everything that holds for g at x = 0 holds for f: ``max_strength``
    counts negative entries of the gradient only. Optimizers that extrapolate (``HAPG``, ``AdamHAPG``) evaluate the gradient at
    search points that may have negative entries; their prox points have none.

    Args:
      penalty: g, a ``Penalty`` that declares ``absolute``: ``L1``, ``ElasticNet``, ``GroupL2``, ``SparseGroupLasso``, ``Nested``
        levels of these, or your own. Its strength is the strength of this penalty, and so are its groups.

    Raises:
      TypeError: g is no ``Penalty``, or does not declare ``absolute``; from ``value`` and ``prox``, x is complex.

    Source: Parikh and Boyd, "Proximal algorithms", 2014, sections 2.3 and 6.5.2 (for the L1 norm).

    >>> import numpy as np
    >>> from proxopt import SparseGroupLasso, Groups
    >>> penalty = NonNegative(SparseGroupLasso(1.0, l1_ratio=0.5, groups=Groups.along(1), weights="none"))
    >>> penalty.prox(np.array([[3.5, 4.5, -2.0], [-5.0, 0.5, 0.6]]))
    array([[2.7, 3.6, 0. ],
           [0. , 0. , 0. ]])
    """

    penalty: Penalty
    absolute = False
    radial = False

    def __post_init__(self) -> None:
        if not isinstance(self.penalty, Penalty):
            raise TypeError(f"penalty must be a Penalty, got {self.penalty!r}")
        if not self.penalty.absolute:
            raise TypeError(
                "penalty must depend on the moduli |x_i| only and not decrease in any of them, which "
                f"{type(self.penalty).__name__} does not declare: set absolute = True in it if this holds"
            )

    # -- the equation -------------------------------------------------------------------------

    def entries(self, x: Array) -> Array | None:
        inner = self.penalty.entries(x)
        return None if inner is None else inner + _indicator(x)

    def _value(self, xs: list[Array]) -> Array:
        outside = [_arrays.namespace(x).sum(_indicator(x)) for x in xs]
        return sum(outside, start=self.penalty._value(xs))

    def _prox(self, xs: list[Array], steps: list[Any]) -> list[Array]:
        found: list[Array] = self.penalty.prox([positive_part(x) for x in xs], steps)
        return found

    # -- declared properties: those of the inner penalty, unless signs matter -------------------

    @property
    def strength(self) -> float | Array:  # type: ignore[override]
        """That of the inner penalty."""
        return self.penalty.strength

    @property
    def convex(self) -> bool:  # type: ignore[override]
        return self.penalty.convex

    @property
    def homogeneous(self) -> bool:  # type: ignore[override]
        return self.penalty.homogeneous

    @property
    def elementwise(self) -> bool:
        return self.penalty.elementwise

    @property
    def on_positive_part(self) -> Penalty:
        """The penalty whose prox at max(x, 0) is the prox of this one at x."""
        return self.penalty

    @property
    def groups(self) -> Groups | None:
        """Those of the inner penalty."""
        return getattr(self.penalty, "groups", None)

    @property
    def partition(self) -> Groups | None:
        return self.penalty.partition

    def with_groups(self, groups: Groups) -> NonNegative:
        return NonNegative(self.penalty.with_groups(groups))

    def with_strength(self, strength: float | Array) -> NonNegative:
        return NonNegative(self.penalty.with_strength(strength))

    def with_metric(self, default: str) -> NonNegative:
        return NonNegative(self.penalty.with_metric(default))

    def batched(self, ndim: int) -> NonNegative | None:
        inner = self.penalty.batched(ndim)
        return None if inner is None else NonNegative(inner)

    def has_dual(self, problems: int = 0) -> bool:
        """As for the inner penalty, if all entries are penalised.

        The conjugate of f at an entry that g leaves free is finite for negative numbers too. The feasible point of ``dual`` would
        be 0 there, and the gap would not shrink to 0 where such an entry is 0 at the solution.
        """
        return self.penalty.has_dual(problems) and all(map(_all_positive, _factors(self.penalty)))

    def dual(self, c: Array, problems: int = 0) -> tuple[Array, float | Array]:
        # the conjugate of f at c is that of g at max(c, 0): negative entries of c have their supremum at x_i = 0
        return self.penalty.dual(positive_part(c), problems)

    def unpenalised(self, x: Array) -> Array | None:
        return self.penalty.unpenalised(x)

    # -- plain data and checks ----------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        data = plain_data(self.penalty)
        if data is None:
            raise TypeError(f"penalty must be plain data itself, got {self.penalty!r}")
        return {"kind": "NonNegative", "penalty": data}

    @classmethod
    def _from_dict(cls, data: dict[str, Any], strength: float | Array) -> NonNegative:
        return cls(from_dict(data["penalty"], strength))

    def _check(self, xs: Sequence[Array]) -> None:
        for x in xs:
            if _arrays.is_complex(x):
                raise TypeError(f"x must be real for NonNegative, got {x.dtype}")
        self.penalty._check(xs)


def positive_part(x: Array) -> Array:
    """max(x, 0): +0 where x is -0, and NaN where it is NaN."""
    xp = _arrays.namespace(x)
    return xp.where(x <= 0, xp.zeros_like(x), x)


def _indicator(x: Array) -> Array:
    """0 where x is nonnegative, infinity elsewhere."""
    xp = _arrays.namespace(x)
    return xp.where(x < 0, xp.full_like(x, float("inf")), xp.zeros_like(x))


def _factors(penalty: Any) -> list[Any]:
    """The numbers and arrays that multiply a penalty and the levels it is composed of."""
    found = [getattr(penalty, name, None) for name in ("strength", "weights")]
    levels = getattr(penalty, "penalties", ())
    return [v for v in found if v is not None and not isinstance(v, str)] + [v for level in levels for v in _factors(level)]


def _all_positive(v: Any) -> bool:
    """Whether a factor is positive; arrays of other libraries than NumPy are not read, and count as positive."""
    if _arrays.is_number(v) or isinstance(v, (list, tuple, np.ndarray)):
        return bool(np.all(np.asarray(v) > 0))
    return True
