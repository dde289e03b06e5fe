"""Counts of zeros and of groups that are zero. An entry counts as zero if it equals 0, not if it is small."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from proxopt import _arrays
from proxopt._arrays import ArrayOrList
from proxopt.groups import Groups


class Sparsity(NamedTuple):
    """Counts of one array, or of a list of arrays.

    Attributes:
      entries: number of entries.
      zeros: number of entries that equal 0.
      groups: number of groups.
      living: number of groups with a nonzero entry.
    """

    entries: int
    zeros: int
    groups: int
    living: int

    @property
    def share(self) -> float:
        """The share of zero entries, in [0, 1]; 0 for an empty array."""
        return self.zeros / self.entries if self.entries else 0.0


def zeros(x: ArrayOrList) -> int:
    """The number of entries of an array (or of a list of arrays) that equal 0.

    Raises TypeError unless x holds floating-point arrays.

    >>> import numpy as np
    >>> zeros(np.array([0.0, 1.0, 0.0]))
    2
    """
    return sum(int(np.sum(support == 0)) for support in _supports(x))


def support(x: ArrayOrList) -> np.ndarray | list[np.ndarray]:
    """Where the entries are nonzero: a boolean NumPy array of x's shape, or a list of them.

    Raises TypeError unless x holds floating-point arrays.

    >>> import numpy as np
    >>> support(np.array([0.0, 1.0, 0.0]))
    array([False,  True, False])
    """
    arrays, _ = _arrays.as_list(x)
    found: np.ndarray | list[np.ndarray] = _arrays.like_input(x, _supports(arrays))
    return found


def living_groups(x: ArrayOrList, groups: Groups | None = None) -> np.ndarray:
    """Which groups have a nonzero entry.

    Args:
      x: a floating-point array of any array library, or a list of them.
      groups: None makes all entries one group.

    Returns:
      A boolean NumPy array: for ``Groups.along`` in the shape of x without the axes inside the groups, for ``Groups.labels`` in
      the order of ``Groups.names``, for ``Groups.whole`` with one entry.

    Raises:
      ValueError: the groups do not fit x.

    >>> import numpy as np
    >>> living_groups(np.array([[1.0, 0.0], [0.0, 0.0]]), Groups.along(0))
    array([ True, False])
    """
    arrays, _ = _arrays.as_list(x)
    groups = groups or Groups.whole()
    groups.check(arrays)
    if not any(_arrays.size(a) for a in arrays):
        return np.zeros(groups.count(arrays), dtype=bool)
    nonzero = np.asarray(groups.largest([s.astype(float) for s in _supports(arrays)])) > 0
    if groups.kind == "along":
        return nonzero.squeeze(groups.axes(arrays[0].ndim))
    return nonzero.reshape(-1)


def summary(x: ArrayOrList, groups: Groups | None = None) -> Sparsity:
    """The counts of zeros and of nonzero groups of x, a ``Sparsity``. The arguments are those of ``living_groups``.

    >>> import numpy as np
    >>> summary(np.array([[1.0, 0.0], [2.0, 0.0]]), Groups.along(0))
    Sparsity(entries=4, zeros=2, groups=2, living=1)
    """
    arrays, _ = _arrays.as_list(x)
    nonzero = living_groups(arrays, groups)
    return Sparsity(sum(map(_arrays.size, arrays)), zeros(arrays), nonzero.size, int(nonzero.sum()))


def _supports(x: Any) -> list[np.ndarray]:
    arrays, _ = _arrays.as_list(x)
    nonzero = [(a.detach() if hasattr(a, "detach") else a) != 0 for a in arrays]
    return [np.asarray(n.cpu() if hasattr(n, "cpu") else n) for n in nonzero]
