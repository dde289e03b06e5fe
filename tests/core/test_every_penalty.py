"""What holds for every penalty in every array library: `every_penalty.ROWS` through the core."""

from __future__ import annotations

import json

import numpy as np
import pytest
from every_penalty import ROWS, GroupLog, Log

from proxopt import L1, GroupL2, Groups, Nested, NonNegative, ProxOperator, Shrinkage, max_strength, penalties, sparsity
from proxopt.penalties import declared
from proxopt.solvers import LeastSquares, fista
from proxopt.testing import check_prox

every_row = pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])


def problem(row, seed=0):
    """Arrays for a row, in NumPy, with an entry that is 0."""
    rng = np.random.default_rng(seed)
    arrays = [rng.normal(size=shape) for shape in row.shapes]
    arrays[0].flat[1] = 0.0
    return arrays if len(arrays) > 1 else arrays[0]


def parts(x):
    return x if isinstance(x, list) else [x]


@every_row
def test_the_laws_of_the_prox_hold(row, library):
    x = library.give(problem(row))
    for step in (0.0, 0.3, 4.0):
        check_prox(row.penalty, x, step)
    if row.array_step:
        steps = [np.exp(np.random.default_rng(1).normal(size=shape)) for shape in row.shapes]
        check_prox(row.penalty, x, library.give(steps if len(steps) > 1 else steps[0]))


@every_row
def test_libraries_agree(row, library):
    x = problem(row)
    expected = parts(row.penalty.prox(x, 0.7))
    for a, b in zip(parts(library.take(row.penalty.prox(library.give(x), 0.7))), expected):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)
        assert ((a == 0) == (b == 0)).all()
    for z in (x, row.penalty.prox(x)):  # the value may be infinite at x
        assert float(row.penalty.value(library.give(z))) == pytest.approx(float(row.penalty.value(z)), rel=1e-12)


@every_row
def test_strides_do_not_matter(row):
    x = problem(row)
    strided = [np.repeat(a.T[..., None], 2, axis=-1)[..., 0].T for a in parts(x)]
    got = row.penalty.prox(strided if len(strided) > 1 else strided[0], 0.7)
    for a, b in zip(parts(got), parts(row.penalty.prox(x, 0.7))):
        np.testing.assert_array_equal(a, b)


@every_row
def test_strength_0_is_no_penalty_and_a_large_one_zeroes(row):
    x = problem(row)
    kept = [a.clip(0) for a in parts(x)] if isinstance(row.penalty, NonNegative) else parts(x)
    for a, b in zip(parts(row.penalty.with_strength(0.0).prox(x, 2.0)), kept):
        np.testing.assert_array_equal(a, b)
    if row.name != "Ridge":
        gradient = [-a for a in parts(x)] if isinstance(x, list) else -x
        strong = row.penalty.with_strength(max_strength(gradient, row.penalty))
        assert not any(np.any(a) for a in parts(strong.prox(x)))


@every_row
def test_empty_arrays_are_fine(row):
    if len(row.shapes) == 1:
        assert row.penalty.prox(np.zeros((4, 0))).shape == (4, 0)
        assert float(row.penalty.value(np.zeros((4, 0)))) == 0


@every_row
def test_plain_data_comes_back(row):
    data = json.loads(json.dumps(row.penalty.to_dict()))
    again = penalties.from_dict(data, row.penalty.strength)
    assert again == row.penalty and hash(again) == hash(row.penalty) and type(again) is type(row.penalty)


@every_row
def test_a_stack_is_the_stack_of_the_proxes(row):
    if len(row.shapes) > 1:
        return
    xs = np.stack([problem(row, seed) for seed in range(3)])
    stacked = row.penalty.batched(xs.ndim - 1)
    if stacked is None:
        assert row.name == "Ridge"  # it does not say whether it is elementwise
        return
    np.testing.assert_allclose(stacked.prox(xs, 0.7), np.stack([row.penalty.prox(x, 0.7) for x in xs]), rtol=1e-13)
    assert float(stacked.value(xs)) == pytest.approx(sum(float(row.penalty.value(x)) for x in xs), rel=1e-12)


@every_row
def test_the_declared_form_is_the_penalty(row):
    form = row.penalty.shrinkage()
    if form is None:
        return
    xs = parts(problem(row))
    for a, b in zip(form.prox(xs, [0.7] * len(xs)), row.penalty._prox(xs, [0.7] * len(xs))):
        np.testing.assert_allclose(a, b, rtol=1e-13)
    assert float(form.value(xs)) == pytest.approx(float(row.penalty.value(problem(row))), rel=1e-13)


@every_row
def test_declared_groups_become_zero_together(row):
    if row.penalty.partition is None:
        return
    x = problem(row)
    for strength in np.linspace(0, max_strength(x, row.penalty), 5):
        p = row.penalty.with_strength(float(strength)).prox(x)
        assert sparsity.summary(p, row.penalty.partition).groups == row.penalty.partition.count(parts(x))


@every_row
def test_solvers_end_at_a_fixed_point_and_certify_no_other(row):
    if len(row.shapes) > 1:
        return
    rng = np.random.default_rng(3)
    A, b = rng.normal(size=(20, 12)), rng.normal(size=20)

    class Flat:
        """The penalty on a vector that holds the row's array."""

        def value(self, z):
            return row.penalty.value(z.reshape(row.shapes[0]))

        def prox(self, z, step=1.0):
            return row.penalty.prox(z.reshape(row.shapes[0]), step).reshape(-1)

    found = fista(LeastSquares(A, b), Flat(), np.zeros(12), tol=1e-10, max_iter=3000)
    assert found.success
    step = 0.9 / np.linalg.norm(A, 2) ** 2
    moved = Flat().prox(found.x - step * A.T @ (A @ found.x - b), step)
    np.testing.assert_allclose(moved, found.x, atol=1e-6)


def test_a_gap_needs_what_was_declared():
    rng = np.random.default_rng(3)
    f = LeastSquares(rng.normal(size=(20, 6)), rng.normal(size=20))
    certified = lambda penalty: {"gap", "residual"} & set(fista(f, penalty, np.zeros(6)))
    assert certified(GroupL2(0.3)) == {"gap"}
    assert certified(Log(0.3)) == {"residual"}


def test_an_operator_that_declares_nothing_has_the_two_methods_alone():
    class Box:
        def value(self, x):
            return 0.0

        def prox(self, x, step=1.0):
            return x.clip(-1, 1)

    box = Box()
    assert isinstance(box, ProxOperator) and not isinstance(object(), ProxOperator)
    assert declared.shrinkage(box) is declared.partition(box) is declared.batched(box, 2) is penalties.plain_data(box) is None
    assert declared.with_metric(box, "exact") is box and not declared.has_dual(box)


def test_data_of_a_class_that_is_not_imported_is_refused():
    with pytest.raises(ValueError, match=r"penalty kind 'their\.module\.Ridge' must be defined .* import their\.module first"):
        penalties.from_dict({"kind": "their.module.Ridge"}, 0.1)


def test_a_penalty_without_an_equation_says_what_is_missing():
    class Empty(penalties.Penalty):
        strength = 1.0

    with pytest.raises(TypeError, match=r"Empty must state shrinkage\(\) or _prox"):
        Empty().prox(np.ones(2))
    with pytest.raises(TypeError, match=r"Empty must state shrinkage\(\), entries"):
        Empty().value(np.ones(2))


def test_levels_must_compose():
    with pytest.raises(TypeError, match=r"penalties\[0\] must be convex and homogeneous"):
        Nested(Log(0.1), GroupL2(0.2))
    with pytest.raises(TypeError, match=r"penalties\[0\] must be a Penalty that is elementwise or has groups, got Ridge"):
        Nested(ROWS[-1].penalty, GroupL2(0.2))
    with pytest.raises(ValueError, match="Log must come first"):
        Nested(GroupL2(0.1, Groups.along(0)), Log(0.2))
    assert Nested(L1(0.1), GroupL2(0.2)).with_metric("median").penalties[1].metric is not None


def test_a_prox_that_loses_an_array_is_refused():
    class Lossy(Log):
        def _prox(self, xs, steps):
            return super()._prox(xs, steps)[:1]

    with pytest.raises(ValueError, match=r"Lossy\._prox must return a list of one array for each of 2, got 1"):
        Lossy(0.1).prox([np.ones(2), np.ones(3)])


def test_a_negative_strength_is_refused_in_a_subclass_too():
    with pytest.raises(ValueError, match=r"strength must be finite and >= 0, got -1"):
        Log(-1.0)


class QuarterL1(L1):
    """A quarter of the L1 norm, by its own equation."""

    def entries(self, x):
        return self.strength * abs(x) / 4

    def _prox(self, xs, steps):
        return super()._prox(xs, [step / 4 for step in steps])


def test_a_subclass_with_its_own_equation_inherits_no_form_and_no_dual():
    check_prox(QuarterL1(1.0), np.array([3.0, -0.1, 0.0]), 0.5)
    assert declared.shrinkage(QuarterL1(1.0)) is None
    rng = np.random.default_rng(0)
    f = LeastSquares(rng.normal(size=(20, 6)), rng.normal(size=20))
    found, same = (fista(f, penalty, np.zeros(6)) for penalty in (QuarterL1(2.0), L1(0.5)))
    assert found.success
    np.testing.assert_allclose(found.x, same.x, atol=1e-6)


@pytest.mark.parametrize("name", ["kind", "value", "prox", "dual"])
def test_a_field_may_not_hide_a_method(name):
    with pytest.raises(TypeError, match=f"must not have a field '{name}': the name is taken by Penalty"):
        type("Hidden", (penalties.Penalty,), {"__annotations__": {"strength": "float", name: "float"}})


def test_a_single_step_per_group_replaces_those_of_a_metric():
    x, step = np.array([[3.0, 0.1], [4.0, 0.1]]), np.array([[0.5, 1.0], [2.0, 3.0]])
    penalty = GroupLog(1.0, groups=Groups.along(0))
    p = penalty.prox(x, step)
    np.testing.assert_allclose(p[0] * x[1], p[1] * x[0])  # each column keeps its direction
    support = np.linalg.norm(x[:, 0]) / np.linalg.norm(x[:, 0] / step[:, 0])
    np.testing.assert_allclose(p[:, 0], penalty.prox(x, support)[:, 0])


class WrongElementwise(Log):
    def _prox(self, xs, steps):
        return [p * (1 - 1e-3 * s * np.tanh(abs(x).sum())) for p, x, s in zip(super()._prox(xs, steps), xs, steps)]


class WrongRadial(GroupLog):
    def _prox(self, xs, steps):
        return L1(self.strength)._prox(xs, steps)


class WrongForm(GroupLog):
    def shrinkage(self):
        return Shrinkage(l2=self.strength, groups=self.groups, weights="none")

    _value, _prox = GroupLog._value, GroupLog._prox


@pytest.mark.parametrize(
    ("penalty", "law"),
    [
        (WrongElementwise(0.1), "objective|separate"),
        (WrongRadial(0.1, groups=Groups.along(0)), "objective|radial"),
        (WrongForm(0.2, groups=Groups.along(0)), "shrinkage"),
    ],
    ids=repr,
)
def test_what_is_declared_wrongly_is_found(penalty, law):
    with pytest.raises(AssertionError, match=law):
        check_prox(penalty, np.random.default_rng(0).normal(size=(4, 3)), 0.5)
