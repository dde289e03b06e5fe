"""The sparse group lasso: single entries and whole groups become zero."""

from __future__ import annotations

from dataclasses import dataclass

from proxopt import _checks
from proxopt._arrays import Array
from proxopt.groups import Groups
from proxopt.penalties.base import Penalty, check_strength
from proxopt.penalties.shrinkage import Shrinkage, check_group_options


@dataclass(frozen=True, eq=False)
class SparseGroupLasso(Penalty):
    r"""The sparse group lasso: a mixture of the L1 norm and the group lasso.

    .. math::

        f(x) = \lambda \left(\alpha \|x\|_1 + (1 - \alpha) \sum_g w_g \|x_g\|_2\right)

    Its prox is a soft threshold of each entry, then a shrinkage of each group. With :math:`s = \text{step} \cdot \lambda`,

    .. math::

        u = \operatorname{sign}(x) \max(|x| - s \alpha, 0), \qquad
        \operatorname{prox}(x)_g = \max\left(1 - \frac{s (1 - \alpha) w_g}{\|u_g\|_2}, 0\right) u_g .

    Args:
      strength: λ, a number >= 0, or an array that broadcasts against x and is constant inside each group.
      l1_ratio: α, the share of the L1 part, in [0, 1].
      groups, weights, metric: as in ``GroupL2``.

    Source: Simon, Friedman, Hastie, Tibshirani, "A sparse-group lasso", 2013; SparseNAS Eq. 3, 9, 10.

    >>> import numpy as np
    >>> from proxopt import Groups
    >>> x = np.array([[3.5, 0.5], [4.5, 0.5]])
    >>> SparseGroupLasso(1.0, l1_ratio=0.5, groups=Groups.along(0), weights="none").prox(x)
    array([[2.7, 0. ],
           [3.6, 0. ]])
    """

    strength: float | Array
    l1_ratio: float = 0.5
    groups: Groups | None = None
    weights: str | Array = "sqrt_size"
    metric: str | None = None

    def __post_init__(self) -> None:
        check_strength(self.strength)
        _checks.in_range("l1_ratio", self.l1_ratio, 0, 1)
        check_group_options(self.groups, self.weights, self.metric)

    def shrinkage(self) -> Shrinkage:
        l1, l2 = self.strength * self.l1_ratio, self.strength * (1 - self.l1_ratio)
        return Shrinkage(l1, l2, self.groups, self.weights, self.metric)
