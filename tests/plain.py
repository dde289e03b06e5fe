"""The definitions once more, over explicit index sets and in plain NumPy: what the library is compared with.

A penalty is written  f(z) = sum_i l1_i |z_i| + ridge/2 ||z||^2 + sum over levels and sets of t_set ||z_set||_2,
where z is the vector of all entries of all arrays, one array after the other.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import brentq

from proxopt import L1, ElasticNet, GroupL2, Groups, Nested, Penalty, SparseGroupLasso

Sets = list[np.ndarray]


class Problem(NamedTuple):
    """A penalty of the library, the shapes of its x, and the same penalty in plain words."""

    name: str
    penalty: Penalty
    shapes: tuple[tuple[int, ...], ...]
    l1: Any = 0.0
    ridge: Any = 0.0
    levels: tuple[tuple[tuple[float, np.ndarray], ...], ...] = ()

    @property
    def size(self) -> int:
        return sum(int(np.prod(s)) for s in self.shapes)

    def arrays(self, z: np.ndarray) -> Any:
        """The vector z as the array, or the list of arrays, that the penalty takes."""
        parts = np.split(z, np.cumsum([int(np.prod(s)) for s in self.shapes])[:-1])
        shaped = [p.reshape(s) for p, s in zip(parts, self.shapes)]
        return shaped[0] if len(shaped) == 1 else shaped

    def value(self, z: np.ndarray) -> float:
        smooth = float(np.sum(self.l1 * np.abs(z)) + np.sum(self.ridge * z**2) / 2)
        return smooth + sum(t * float(np.linalg.norm(z[i])) for level in self.levels for t, i in level)

    def sets(self) -> Sets:
        """Entries that must become zero together; single entries where there are no groups."""
        return [i for _, i in self.levels[-1]] if self.levels else [np.array([i]) for i in range(self.size)]


def vector(x: Any) -> np.ndarray:
    """All entries of an array or of a list of arrays."""
    return np.concatenate([np.ravel(a) for a in (x if isinstance(x, (list, tuple)) else [x])])


def numbered(shapes: tuple) -> list[np.ndarray]:
    ends = np.cumsum([0] + [int(np.prod(s)) for s in shapes])
    return [np.arange(a, b).reshape(s) for a, b, s in zip(ends, ends[1:], shapes)]


def along(axes: tuple[int, ...], shape: tuple[int, ...]) -> Sets:
    """Entries that differ in `axes` only."""
    (numbers,) = numbered((shape,))
    front = np.moveaxis(numbers, axes, range(len(axes)))
    return list(front.reshape(int(np.prod(front.shape[: len(axes)])), -1).T)


def labelled(labels: list, axis: int | None, shapes: tuple) -> Sets:
    """Slices with the same label, over all arrays, in order of first occurrence."""
    found: dict = {}
    for names, numbers in zip(labels, numbered(shapes)):
        slices = numbers.reshape(-1, 1) if axis is None else np.moveaxis(numbers, axis, 0).reshape(len(names), -1)
        for name, members in zip(np.ravel(names).tolist(), slices):
            found.setdefault(name, []).extend(members)
    return [np.array(members) for members in found.values()]


def weigh(weights: Any, sets: Sets) -> list[float]:
    rules = {"sqrt_size": lambda n: n**0.5, "inverse_sqrt_size": lambda n: n**-0.5, "none": lambda n: 1.0}
    return [rules[weights](len(i)) for i in sets] if isinstance(weights, str) else [float(w) for w in np.ravel(weights)]


def level(strength: float, weights: Any, sets: Sets) -> tuple:
    return tuple((strength * w, i) for w, i in zip(weigh(weights, sets), sets))


def soft(x: np.ndarray, t: Any) -> np.ndarray:
    return np.sign(x) * np.maximum(np.abs(x) - t, 0)


def shrink(x: np.ndarray, t: float) -> np.ndarray:
    norm = np.linalg.norm(x)
    return x * (1 - t / norm) if norm > t else x * 0


def metric_shrink(x: np.ndarray, steps: np.ndarray, t: float) -> np.ndarray:
    """argmin sum((z - x)^2 / (2 steps)) + t ||z||, its root r = ||z|| found by bracketing on a logarithmic scale."""
    if np.linalg.norm(x / steps) <= t:
        return x * 0
    gap = lambda log_r: 1 / np.sqrt(np.sum((x / (np.exp(log_r) + steps * t)) ** 2)) - 1
    high = np.log(np.linalg.norm(x)) + 1e-9
    low = high - 1.0
    while gap(low) > 0:
        low -= 1.0
    r = np.exp(brentq(gap, low, high, xtol=1e-300, rtol=1e-15, maxiter=1000))
    return x * (r / (r + steps * t))


def sphere(x: np.ndarray, sets: Sets, radius: float) -> np.ndarray:
    """Each set of entries at the L2 norm ``radius``, zero sets as they are."""
    out = x.copy()
    for members in sets:
        norm = np.linalg.norm(x[members])
        if norm > 0:
            out[members] = radius * x[members] / norm
    return out


def capped_hapg(
    start: np.ndarray, gradient: Any, steps: int, lr: float, cap: float, l1: float, bound: float, sets: Sets, radius: float
) -> tuple[np.ndarray, np.ndarray]:
    """HAPG with capped extrapolation for l1 ||z||_1 + bound sum ||z_set||_2 over z >= 0, both points on spheres: (A, p)."""
    search, point = start, start
    for t in range(1, steps + 1):
        z = soft(np.maximum(search - lr * gradient(search), 0), lr * l1)
        new = z.copy()
        for members in sets:
            new[members] = shrink(z[members], lr * bound)
        search = new + min(cap, max(0, (t - 2) / (t + 1))) * (new - point)
        search, point = sphere(search, sets, radius), sphere(new, sets, radius)
    return search, point


class Case(NamedTuple):
    name: str
    groups: Groups | None
    shapes: tuple
    sets: Sets


LABELS = ["b", "a", "b", "c", "c", "c"]
GRID = np.array([[3, 1, 1], [3, 1, 7], [3, 7, 7], [3, 7, 7]])
JOINT = [[0, 1, 0], [1, 2, 5, 0]]

GROUPS = [
    Case("whole", None, ((4, 3),), [np.arange(12)]),
    Case("along 0", Groups.along(0), ((4, 3),), along((0,), (4, 3))),
    Case("along -1", Groups.along(-1), ((2, 3, 2),), along((2,), (2, 3, 2))),
    Case("along (0, -1)", Groups.along((0, -1)), ((2, 3, 4),), along((0, 2), (2, 3, 4))),
    Case("labels 0", Groups.labels(LABELS), ((6, 2),), labelled([LABELS], 0, ((6, 2),))),
    Case("labels 1", Groups.labels([4, 2, 4], axis=1), ((2, 3, 2),), labelled([[4, 2, 4]], 1, ((2, 3, 2),))),
    Case("labels -1", Groups.labels(LABELS, axis=-1), ((2, 6),), labelled([LABELS], -1, ((2, 6),))),
    Case("labels None", Groups.labels(GRID, axis=None), ((4, 3),), labelled([GRID], None, ((4, 3),))),
    Case("joint", Groups.labels(JOINT), ((3, 2), (4,)), labelled(JOINT, 0, ((3, 2), (4,)))),
    Case("joint whole", Groups.whole(), ((3, 2), (4,)), [np.arange(10)]),
]


def elementwise() -> list[Problem]:
    mixed = np.array([[0.0, 0.3, 2.0], [0.1, 0.0, 0.5]])
    row = np.array([0.2, 0.0, 1.0])
    return [
        Problem("L1", L1(0.4), ((2, 3),), l1=0.4),
        Problem("L1 weighted", L1(mixed), ((2, 3),), l1=mixed.ravel()),
        Problem("L1 broadcast", L1(row), ((2, 3),), l1=np.tile(row, 2)),
        Problem("L1 list", L1(0.4), ((2, 3), (), (4,)), l1=0.4),
        Problem("ElasticNet", ElasticNet(0.5, 0.3), ((2, 3),), l1=0.15, ridge=0.35),
        Problem("ElasticNet l1_ratio=0", ElasticNet(0.5, 0.0), ((2, 3),), ridge=0.5),
        Problem("ElasticNet weighted", ElasticNet(row, 0.5), ((2, 3),), l1=np.tile(row, 2) / 2, ridge=np.tile(row, 2) / 2),
    ]


def grouped() -> list[Problem]:
    found = []
    for name, groups, shapes, sets in GROUPS:
        for weights in ("sqrt_size", "inverse_sqrt_size"):
            penalty: Penalty = GroupL2(0.3, groups, weights=weights)
            found.append(Problem(f"GroupL2 {name} {weights}", penalty, shapes, levels=(level(0.3, weights, sets),)))
        penalty = SparseGroupLasso(0.4, 0.25, groups, weights="none")
        found.append(Problem(f"SparseGroupLasso {name}", penalty, shapes, l1=0.1, levels=(level(0.3, "none", sets),)))
    return found


def weighted() -> list[Problem]:
    """Arrays of weights, one of them 0, and arrays of strengths."""
    columns, by_label, cube = along((0,), (4, 3)), labelled([LABELS], 0, ((6, 2),)), along((2,), (2, 3, 2))
    three = np.array([0.5, 0.0, 2.0])
    batch = np.array([0.1, 0.9]).reshape(2, 1, 1)
    per_row = np.array([0.3, 0.2, 0.3, 0.5, 0.5, 0.5]).reshape(6, 1)  # constant inside the groups of LABELS
    batched = tuple((float(s) * 2**0.5, i) for s, i in zip(np.repeat(batch.ravel(), 3), cube))
    rows = tuple((s * w, i) for s, w, i in zip((0.3, 0.2, 0.5), weigh("sqrt_size", by_label), by_label))
    return [
        Problem("GroupL2 along, weights", GroupL2(0.3, Groups.along(0), three), ((4, 3),), levels=(level(0.3, three, columns),)),
        Problem("GroupL2 labels, weights", GroupL2(0.3, Groups.labels(LABELS), three), ((6, 2),),
                levels=(level(0.3, three, by_label),)),
        Problem("GroupL2 batch of strengths", GroupL2(batch, Groups.along(-1)), ((2, 3, 2),), levels=(batched,)),
        Problem("SparseGroupLasso batch of strengths", SparseGroupLasso(batch, 0.5, Groups.along(-1)), ((2, 3, 2),),
                l1=np.repeat(batch.ravel(), 6) / 2, levels=(tuple((t / 2, i) for t, i in batched),)),
        Problem("GroupL2 labels, strengths", GroupL2(per_row, Groups.labels(LABELS)), ((6, 2),), levels=(rows,)),
    ]  # fmt: skip


def nested() -> list[Problem]:
    rows, shape = along((1,), (4, 3)), ((4, 3),)
    tree = [["u", "u", "v", "w"], ["p", "p", "p", "q"]]
    inner, outer = (labelled([names], 0, shape) for names in tree)
    whole = [np.arange(12)]
    return [
        Problem("Nested two levels", Nested(GroupL2(0.2, Groups.along(1)), GroupL2(0.1), strength=2.0), shape,
                levels=(level(0.4, "sqrt_size", rows), level(0.2, "sqrt_size", whole))),
        Problem("Nested three levels",
                Nested(L1(0.1), GroupL2(0.2, Groups.labels(tree[0])), GroupL2(0.3, Groups.labels(tree[1]), "none")), shape,
                l1=0.1, levels=(level(0.2, "sqrt_size", inner), level(0.3, "none", outer))),
    ]  # fmt: skip


PROBLEMS = elementwise() + grouped() + weighted() + nested()
