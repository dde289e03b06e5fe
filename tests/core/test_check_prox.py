"""check_prox tells a right prox from a wrong one, and says which law is broken."""

from __future__ import annotations

import numpy as np
import pytest

from proxopt import L1, GroupL2, Groups, SparseGroupLasso
from proxopt.testing import check_prox

COLUMNS = SparseGroupLasso(0.3, 0.4, Groups.along(0))


class Broken:
    """A right penalty, with one thing wrong about it."""

    def __init__(self, prox=COLUMNS.prox, value=COLUMNS.value, **declared):
        self.prox, self.value = prox, value
        self.__dict__.update(declared)


def in_place(x, step=1.0):
    x[...] = COLUMNS.prox(x, step)
    return x


def forgetful(x, step=1.0, calls=[]):  # noqa: B006
    calls.append(1)
    return COLUMNS.prox(x, step) + 1e-3 * len(calls)


def other_strength(factor):
    return COLUMNS.with_strength(0.3 * factor).prox


def keeps_the_last_column(x, step=1.0):
    p = COLUMNS.prox(x, step)
    p[:, -1] = x[:, -1]
    return p


def kills_the_last_column(x, step=1.0):
    p = COLUMNS.prox(x, step)
    p[:, -1] = x[:, -1] if np.ndim(step) == 0 and step == 0 else 0
    return p


def hard_threshold(x, step=1.0):
    return np.where(x**2 > 2 * step * 0.3, x, 0)


WRONG = {
    "changes x": (Broken(in_place), "in place"),
    "returns float64": (Broken(lambda x, step=1.0: COLUMNS.prox(x, step).astype(float)), "type"),
    "has another shape": (Broken(lambda x, step=1.0: COLUMNS.prox(x, step)[:1]), "type|shape"),
    "differs from call to call": (Broken(forgetful), "type"),
    "moves at step 0": (Broken(lambda x, step=1.0: COLUMNS.prox(x, step + 0.1)), "identity"),
    "moves zero": (Broken(lambda x, step=1.0: COLUMNS.prox(x, step) + np.float32(step)), "origin"),
    "shrinks 1 % too much": (Broken(other_strength(1.01)), "objective|subgradient|moreau"),
    "shrinks 1 % too little": (Broken(other_strength(0.99)), "objective|subgradient|moreau"),
    "value is twice the penalty": (Broken(value=lambda x: 2 * COLUMNS.value(x)), "objective|subgradient|moreau"),
    "has other groups": (Broken(SparseGroupLasso(0.3, 0.4, Groups.along(1)).prox), "objective|subgradient|moreau"),
    "lets a group live": (Broken(keeps_the_last_column), "objective|subgradient|moreau"),
    "kills a living group": (Broken(kills_the_last_column), "objective|subgradient|moreau"),
    "treats an array step as its mean": (Broken(lambda x, step=1.0: COLUMNS.prox(x, np.mean(step))), "objective|subgradient"),
    "takes the median for exact": (Broken(COLUMNS.with_metric("median").prox), "objective|subgradient|moreau"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_prox_is_found(name):
    penalty, law = WRONG[name]
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 4)).astype(np.float32)
    steps = (0.5 * np.exp(rng.normal(size=x.shape))).astype(np.float32)
    with pytest.raises((AssertionError, ValueError), match=law):
        for step in (0.5, steps):
            check_prox(penalty, x, step)


def test_a_prox_that_is_not_that_of_a_convex_function_is_found():
    l0 = Broken(hard_threshold, lambda x: 0.3 * np.count_nonzero(x), homogeneous=False)
    x = np.array([1.0, -0.2, 0.8, 0.0])
    with pytest.raises(AssertionError, match=r"subgradient|firm"):
        check_prox(l0, x)
    l0.convex = False
    check_prox(l0, x)  # its own laws it keeps


def test_somebody_elses_penalty_is_checked_too():
    class Ridge:
        homogeneous = False

        def value(self, x):
            return 0.5 * np.sum(x**2)

        def prox(self, x, step):
            return x / (1 + step)

    check_prox(Ridge(), np.array([1.0, -2.0]), step=0.3)
    Ridge.homogeneous = True
    with pytest.raises(AssertionError, match="moreau"):
        check_prox(Ridge(), np.array([1.0, -2.0]), step=0.3)


class Operator:
    """value and prox, and nothing declared."""

    def __init__(self, value, prox):
        self.value, self.prox = value, prox


def simplex(x, step=1.0):
    descending = np.sort(x)[::-1]
    shifts = (np.cumsum(descending) - 1) / np.arange(1, len(x) + 1)
    return np.maximum(x - shifts[np.flatnonzero(descending > shifts)[-1]], 0)


def singular_values(x, step=1.0):
    u, s, v = np.linalg.svd(x, full_matrices=False)
    return (u * np.maximum(s - step, 0)) @ v


OPERATORS = {
    "projection onto a box": Operator(lambda x: 0.0 if np.all(np.abs(x) <= 1) else np.inf, lambda x, step=1.0: np.clip(x, -1, 1)),
    "projection onto a box without 0": Operator(
        lambda x: 0.0 if np.all((x >= 1) & (x <= 2)) else np.inf, lambda x, step=1.0: np.clip(x, 1, 2)
    ),
    "projection onto the simplex": Operator(lambda x: 0.0 if np.all(x >= 0) and abs(np.sum(x) - 1) < 1e-12 else np.inf, simplex),
    "distance from 1": Operator(lambda x: np.sum(np.abs(x - 1)), lambda x, step=1.0: x - np.clip(x - 1, -step, step)),
}


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("step", [0.1, 1.0, 5.0])
def test_operators_that_declare_nothing_pass(name, step):
    for x in (np.array([3.0, -0.2, 0.0, 1.0]), np.array([0.25, 0.25, 0.5]), np.array([1.5, 2.0])):
        check_prox(OPERATORS[name], x, step)


def test_the_nuclear_norm_passes():
    nuclear = Operator(lambda x: np.sum(np.linalg.svd(x, compute_uv=False)), singular_values)
    check_prox(nuclear, np.random.default_rng(0).normal(size=(4, 3)), 0.7)


def test_a_homogeneous_operator_need_not_say_so():
    halved = Operator(lambda x: 0.5 * np.sum(np.abs(x)), L1(1.0).prox)
    halved.convex = False  # so that only Moreau's identity and the objective are left
    with pytest.raises(AssertionError, match=r"objective|moreau"):
        check_prox(halved, np.array([3.0, -2.0]))


def test_an_operator_that_writes_into_x_is_named_and_leaves_the_callers_array():
    x = np.array([3.0, -0.2])
    with pytest.raises(AssertionError, match=r"law 'in place' of the prox is broken: .* must leave x as it is"):
        check_prox(Operator(L1(1.0).value, lambda x, step=1.0: L1(1.0).prox(x, step, out=x)), x)
    np.testing.assert_array_equal(x, [3.0, -0.2])


def test_laws_hold_in_every_library(library):
    rng = np.random.default_rng(1)
    x, steps = rng.normal(size=(4, 3)), rng.uniform(0.1, 1, (4, 3))
    for penalty in (L1(0.3), GroupL2(0.3, Groups.labels([0, 1, 0, 2])), COLUMNS):
        check_prox(penalty, library.give(x), 0.7)
    check_prox(COLUMNS, library.give(x), library.give(steps))
    check_prox(COLUMNS, library.give(x.astype(np.float32)), 0.7)
    pair = library.give([x, rng.normal(size=(2,))])
    check_prox(GroupL2(0.3, Groups.labels([[0, 1, 1, 0], [1, 2]])), pair, 0.7)


def test_a_list_of_arrays_must_come_back_as_long():
    first = Broken(lambda x, step=1.0: x[:1], L1(0.1).value)
    with pytest.raises(AssertionError, match="type"):
        check_prox(first, [np.zeros(2), np.zeros(3)])
