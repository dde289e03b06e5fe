"""The group lasso: whole groups of entries become zero."""

from __future__ import annotations

from dataclasses import dataclass

from proxopt._arrays import Array
from proxopt.groups import Groups
from proxopt.penalties.base import Penalty, check_strength
from proxopt.penalties.shrinkage import Shrinkage, check_group_options


@dataclass(frozen=True, eq=False)
class GroupL2(Penalty):
    r"""The group lasso: a weighted sum of the L2 norms of groups.

    .. math::

        f(x) = \lambda \sum_g w_g \|x_g\|_2, \qquad
        \operatorname{prox}(x)_g = \max\left(1 - \frac{\text{step} \cdot \lambda w_g}{\|x_g\|_2}, 0\right) x_g

    for a step that is constant in each group.

    Args:
      strength: λ, a number >= 0, or an array that broadcasts against x and is constant inside each group.
      groups: a ``Groups``; None makes all entries one group.
      weights: w_g for a group of n entries: "sqrt_size", √n (SparseNAS Eq. 3, 10); "inverse_sqrt_size", 1/√n (GSparsity);
        "none", 1; or an array with one number per group: for ``Groups.along`` in the reduced shape, for ``Groups.labels`` in the
        order of ``Groups.names``.
      metric: how a step that differs inside a group is treated. "exact" minimises in the diagonal metric, "median"
        (SparseNAS) takes the group's median step for all of it, "support" the one step that zeroes the same groups as the exact
        metric. None leaves it to the caller: exact in ``prox`` and ``ProxAdam``, median in ``AdamHAPG``.

    Source: Yuan and Lin, "Model selection and estimation in regression with grouped variables", 2006.

    >>> import numpy as np
    >>> GroupL2(1.0, weights="none").prox(np.array([3.0, 4.0]))
    array([2.4, 3.2])
    """

    strength: float | Array
    groups: Groups | None = None
    weights: str | Array = "sqrt_size"
    metric: str | None = None

    def __post_init__(self) -> None:
        check_strength(self.strength)
        check_group_options(self.groups, self.weights, self.metric)

    def shrinkage(self) -> Shrinkage:
        return Shrinkage(l2=self.strength, groups=self.groups, weights=self.weights, metric=self.metric)
