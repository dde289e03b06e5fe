"""What became zero: the numbers that a report prints. An entry is zero when it equals 0, never when it is small."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from proxopt import _arrays
from proxopt.groups import Groups


class Sparsity(NamedTuple):
    """entries and groups: how many there are; zeros, living: how many entries are 0, how many groups are not."""

    entries: int
    zeros: int
    groups: int
    living: int

    @property
    def share(self) -> float:
        """Share of zero entries, in [0, 1]; 0 for an empty array."""
        return self.zeros / self.entries if self.entries else 0.0


def zeros(x: Any) -> int:
    """How many entries of an array (or of a list of arrays) equal 0."""
    return sum(int(np.sum(support == 0)) for support in _supports(x))


def support(x: Any) -> Any:
    """Where the entries are not zero: a boolean NumPy array of x's shape, or a list of them."""
    arrays, _ = _arrays.as_list(x)
    return _arrays.like_input(x, _supports(arrays))


def living_groups(x: Any, groups: Groups | None = None) -> np.ndarray:
    """Which groups have an entry that is not zero.

    Returns booleans: in the reduced shape for `Groups.along`, in the order of `Groups.names` for labels, one for whole.

    >>> import numpy as np
    >>> living_groups(np.array([[1.0, 0.0], [0.0, 0.0]]), Groups.along(0))
    array([ True, False])
    """
    arrays, _ = _arrays.as_list(x)
    groups = groups or Groups.whole()
    groups.check(arrays)
    if not any(_arrays.size(a) for a in arrays):
        return np.zeros(groups.count(arrays), dtype=bool)
    lives = np.asarray(groups.largest([s.astype(float) for s in _supports(arrays)])) > 0
    if groups.kind == "along":
        return lives.squeeze(groups.axes(arrays[0].ndim))
    return lives.reshape(-1)


def summary(x: Any, groups: Groups | None = None) -> Sparsity:
    """Zeros and living groups of x.

    >>> import numpy as np
    >>> summary(np.array([[1.0, 0.0], [2.0, 0.0]]), Groups.along(0))
    Sparsity(entries=4, zeros=2, groups=2, living=1)
    """
    arrays, _ = _arrays.as_list(x)
    lives = living_groups(arrays, groups)
    return Sparsity(sum(map(_arrays.size, arrays)), zeros(arrays), lives.size, int(lives.sum()))


def _supports(x: Any) -> list[np.ndarray]:
    arrays, _ = _arrays.as_list(x)
    nonzero = [(a.detach() if hasattr(a, "detach") else a) != 0 for a in arrays]
    return [np.asarray(n.cpu() if hasattr(n, "cpu") else n) for n in nonzero]
