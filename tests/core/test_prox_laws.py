"""What makes a prox right, for every penalty, every kind of groups and every kind of step."""

from __future__ import annotations

from typing import Any

import cvxpy
import numpy as np
import plain
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plain import PROBLEMS, Problem

from proxopt import L1, ElasticNet, GroupL2, Groups, Nested, SparseGroupLasso, soft_threshold, updates
from proxopt.testing import check_prox

every_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
SINGLE_LEVEL = [p for p in PROBLEMS if not isinstance(p.penalty, Nested)]  # these take any array as step
any_metric = pytest.mark.parametrize("problem", SINGLE_LEVEL, ids=lambda p: p.name)
group_problem = pytest.mark.parametrize("problem", [p for p in SINGLE_LEVEL if p.levels], ids=lambda p: p.name)

seeds = st.integers(0, 2**32 - 1)
decades = st.integers(-6, 6)


def some_point(problem: Problem, rng: np.random.Generator, decade: int = 0) -> np.ndarray:
    """Entries of mixed size; some are zero, and so is a whole group here and there."""
    z = rng.normal(size=problem.size) * 10.0**decade * rng.choice([1.0, 1e-2], size=problem.size)
    z[rng.random(problem.size) < 0.2] = 0
    for members in problem.sets():
        if rng.random() < 0.2:
            z[members] = 0
    return z


def some_steps(problem: Problem, rng: np.random.Generator, decade: int = 0) -> np.ndarray:
    """One step per entry, log-normal as behind Adam."""
    if isinstance(problem.penalty, Nested):
        return np.full(problem.size, 10.0**decade * rng.uniform(0.1, 2))
    return 10.0**decade * np.exp(rng.normal(size=problem.size))


def reference(problem: Problem, x: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """The prox by its equations, leaves first, each group on its own."""
    z = plain.soft(x, steps * problem.l1) / (1 + steps * problem.ridge)
    for level in problem.levels:
        for t, members in level:
            z[members] = plain.metric_shrink(z[members], steps[members], t)
    return z


@every_problem
@given(seed=seeds, decade=decades, spread=st.booleans(), dtype=st.sampled_from([np.float32, np.float64]))
def test_every_penalty_keeps_the_laws_of_a_prox(problem, seed, decade, spread, dtype):
    rng = np.random.default_rng(seed)
    x = some_point(problem, rng, decade).astype(dtype)
    steps = some_steps(problem, rng, decade).astype(dtype)
    check_prox(problem.penalty, problem.arrays(x), problem.arrays(steps) if spread else float(steps[0]))


@every_problem
@given(seed=seeds)
def test_value_is_the_sum_that_defines_the_penalty(problem, seed):
    z = some_point(problem, np.random.default_rng(seed))
    assert np.isclose(float(problem.penalty.value(problem.arrays(z))), problem.value(z), rtol=1e-13)


@every_problem
@given(seed=seeds, decade=decades)
def test_prox_is_the_closed_form_of_each_group(problem, seed, decade):
    rng = np.random.default_rng(seed)
    x, steps = some_point(problem, rng, decade), some_steps(problem, rng, decade)
    found = plain.vector(problem.penalty.prox(problem.arrays(x), problem.arrays(steps)))
    np.testing.assert_allclose(found, reference(problem, x, steps), rtol=1e-9, atol=1e-13 * 10.0**decade)


@every_problem
@pytest.mark.filterwarnings("ignore:Solution may be inaccurate")  # 1e-11 is more than the solver likes to promise
@pytest.mark.parametrize("spread", [False, True], ids=["number", "array"])
def test_prox_is_the_minimum_that_a_convex_solver_finds(problem, spread):
    rng = np.random.default_rng(7)
    x, steps = some_point(problem, rng), some_steps(problem, rng)
    steps = steps if spread else np.full(problem.size, 0.7)
    z = cvxpy.Variable(problem.size)
    objective = cvxpy.sum_squares(cvxpy.multiply(z - x, (2 * steps) ** -0.5))
    objective += cvxpy.sum(cvxpy.multiply(np.broadcast_to(problem.l1, x.shape), cvxpy.abs(z)))
    objective += cvxpy.sum(cvxpy.multiply(np.broadcast_to(problem.ridge, x.shape) / 2, cvxpy.square(z)))
    objective += sum(t * cvxpy.norm2(z[members]) for level in problem.levels for t, members in level)
    tight = {"tol_gap_abs": 1e-11, "tol_gap_rel": 1e-11, "tol_feas": 1e-11}
    cvxpy.Problem(cvxpy.Minimize(objective)).solve(solver=cvxpy.CLARABEL, **tight)
    found = plain.vector(problem.penalty.prox(problem.arrays(x), problem.arrays(steps) if spread else 0.7))
    np.testing.assert_allclose(found, z.value, atol=2e-5)  # a gap of 1e-11 is a distance of about 1e-5
    moreau = lambda z: problem.value(z) + np.sum((z - x) ** 2 / (2 * steps))
    assert moreau(found) <= moreau(z.value) + 1e-13


@any_metric
@given(seed=seeds)
def test_what_the_prox_takes_away_lies_in_the_dual_ball(problem, seed):
    """Moreau: x / step = p / step + u, where |u_i| <= l1_i up to a group part of norm t."""
    rng = np.random.default_rng(seed)
    x, steps = some_point(problem, rng), some_steps(problem, rng)
    p = plain.vector(problem.penalty.prox(problem.arrays(x), problem.arrays(steps)))
    rest = plain.soft((x - p) / steps - problem.ridge * p, problem.l1)
    for bound, members in problem.levels[0] if problem.levels else ((0.0, slice(None)),):
        assert np.linalg.norm(rest[members]) <= bound + 1e-12 * np.max(np.abs(x / steps), initial=1)


@every_problem
@given(seed=seeds, dtype=st.sampled_from([np.float16, np.float32, np.float64]))
def test_step_0_and_strength_0_change_nothing(problem, seed, dtype):
    x = some_point(problem, np.random.default_rng(seed)).astype(dtype)
    given_x, zeros = problem.arrays(x), problem.arrays(np.zeros(problem.size, dtype))
    silent = problem.penalty.with_strength(np.zeros_like(problem.penalty.strength) * 0.0)
    for same in (problem.penalty.prox(given_x, 0), problem.penalty.prox(given_x, zeros), silent.prox(given_x, 3.0)):
        np.testing.assert_array_equal(plain.vector(same), x)


@any_metric
@given(seed=seeds)
def test_an_entry_with_step_0_stays_and_keeps_its_group_alive(problem, seed):
    rng = np.random.default_rng(seed)
    x, steps = some_point(problem, rng), some_steps(problem, rng, decade=3)
    held = rng.random(problem.size) < 0.3
    p = plain.vector(problem.penalty.prox(problem.arrays(x), problem.arrays(np.where(held, 0, steps))))
    np.testing.assert_array_equal(p[held], x[held])
    nearly = reference(problem, x, np.where(held, 1e-13, steps))  # the limit of ever smaller steps
    np.testing.assert_allclose(p, nearly, rtol=1e-6, atol=1e-12)


@every_problem
def test_zero_stays_zero(problem):
    for dtype in (np.float16, np.float32, np.float64):
        zero = problem.arrays(np.zeros(problem.size, dtype))
        for step in (0, 1e-30, 1.0, 1e30):
            assert not np.any(plain.vector(problem.penalty.prox(zero, step)))


@group_problem
@given(seed=seeds, decade=st.integers(-3, 3))
def test_median_lets_the_median_step_of_a_group_stand_for_all(problem, seed, decade):
    rng = np.random.default_rng(seed)
    x, steps = some_point(problem, rng), some_steps(problem, rng, decade)
    z = plain.soft(x, steps * problem.l1)
    for t, members in problem.levels[0]:
        ordered = np.sort(steps[members])
        middle = (ordered[(len(members) - 1) // 2] + ordered[len(members) // 2]) / 2
        z[members] = plain.shrink(z[members], middle * t)
    found = with_metric(problem, "median").prox(problem.arrays(x), problem.arrays(steps))
    np.testing.assert_allclose(plain.vector(found), z, rtol=1e-12, atol=1e-15)


@group_problem
@given(seed=seeds, decade=st.integers(-3, 3))
def test_support_has_the_zeros_of_exact(problem, seed, decade):
    rng = np.random.default_rng(seed)
    x, steps = some_point(problem, rng), some_steps(problem, rng, decade)
    exact = problem.penalty.prox(problem.arrays(x), problem.arrays(steps))
    support = with_metric(problem, "support").prox(problem.arrays(x), problem.arrays(steps))
    np.testing.assert_array_equal(plain.vector(support) == 0, plain.vector(exact) == 0)


@group_problem
@given(seed=seeds)
def test_the_metrics_agree_where_the_step_is_constant_in_each_group(problem, seed):
    rng = np.random.default_rng(seed)
    x, steps = some_point(problem, rng), np.empty(problem.size)
    for members in problem.sets():
        steps[members] = rng.uniform(0.1, 2)
    proxes = [
        plain.vector(with_metric(problem, metric).prox(problem.arrays(x), problem.arrays(steps)))
        for metric in ("exact", "median", "support")
    ]
    np.testing.assert_allclose(proxes[1], proxes[0], rtol=1e-11, atol=1e-14)
    np.testing.assert_allclose(proxes[2], proxes[0], rtol=1e-11, atol=1e-14)


def with_metric(problem: Problem, metric: str):
    assert isinstance(problem.penalty, (GroupL2, SparseGroupLasso))
    return problem.penalty.with_metric(metric)


@given(seed=seeds, spread=st.floats(0, 20), excess=st.floats(-2, 1), size=st.integers(1, 30), flat=st.booleans())
def test_the_exact_metric_solves_steps_that_spread_over_many_decades(seed, spread, excess, size, flat):
    """Whatever the steps, the root is that of a bracketing solver to 1e-10; `excess` says how far the group is from dying."""
    rng = np.random.default_rng(seed)
    steps = 10 ** rng.uniform(-spread, 0, size)
    x = steps * (rng.uniform(0.5, 1.0) if flat else 10 ** rng.uniform(-3, 1, size)) * rng.choice([-1, 1], size)
    t = np.linalg.norm(x / steps) / (1 + 10**excess)
    found = GroupL2(t, weights="none").prox(x, steps)
    np.testing.assert_allclose(found, plain.metric_shrink(x, steps, t), rtol=1e-10, atol=0)


@pytest.mark.parametrize("decades", [4, 8, 12, 16, 20])
def test_the_exact_metric_solves_a_staircase_with_one_entry_per_decade(decades):
    """Newton alone would climb this staircase one stair at a time."""
    steps = 10.0 ** -np.arange(decades + 1)
    np.testing.assert_allclose(
        GroupL2(1.0, weights="none").prox(0.9 * steps, steps), plain.metric_shrink(0.9 * steps, steps, 1.0), rtol=1e-10
    )


@pytest.mark.parametrize("axis", [0, -2, (0, 1)])
@pytest.mark.parametrize("metric", ["exact", "median", "support"])
@pytest.mark.parametrize("step", [0.0, 0.3, "array"], ids=str)
def test_strengths_with_a_batch_axis_in_front_solve_one_problem_each(axis, metric, step):
    rng = np.random.default_rng(0)
    x, strengths = rng.normal(size=(4, 3)), np.array([0.1, 0.4, 2.0])
    step = rng.uniform(0.1, 2, (4, 3)) if step == "array" else step
    groups, batch = Groups.along(axis), strengths.reshape(3, 1, 1)
    one_level = lambda s: SparseGroupLasso(s, 0.3, groups, metric=metric)
    two_levels = lambda s: Nested(L1(0.1), GroupL2(0.2, groups, metric=metric), strength=s)
    leaves = lambda s: Nested(L1(s), GroupL2(0.2, groups, metric=metric))
    for penalty in (one_level, two_levels, leaves, L1):
        together = penalty(batch).prox(x, step)
        np.testing.assert_allclose(together, [penalty(float(s)).prox(x, step) for s in strengths], rtol=1e-12)
        values = [penalty(float(s)).value(x) for s in strengths]
        assert np.isclose(penalty(batch).value(x), sum(values))


def test_nested_levels_take_steps_that_are_constant_in_the_inner_groups():
    x = np.random.default_rng(3).normal(size=(4, 3))
    steps = np.array([0.1, 0.5, 2.0, 1.0]).reshape(4, 1)
    penalty = Nested(L1(0.1), GroupL2(0.1, Groups.along(1)), GroupL2(0.2))
    check_prox(penalty, x, np.broadcast_to(steps, x.shape).copy())
    check_prox(penalty, x, steps)


def test_nested_levels_refuse_other_steps_in_the_exact_metric():
    x = np.ones((4, 3))
    two = Nested(GroupL2(0.1, Groups.along(1)), GroupL2(0.1))
    with pytest.raises(ValueError, match="metric='exact' is not the prox of two group levels"):
        two.prox(x, np.arange(12.0).reshape(4, 3))
    with pytest.raises(ValueError, match="metric='exact'"):
        two.with_metric("exact").prox(x, np.arange(12.0).reshape(4, 3))
    assert two.with_metric("median").prox(x, np.arange(12.0).reshape(4, 3)).shape == (4, 3)


@pytest.mark.parametrize("problem", [p for p in PROBLEMS if not np.any(p.ridge)], ids=lambda p: p.name)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("size", [1e-30, 1e-15, 1e15, 1e30])
@pytest.mark.parametrize("spread", [False, True], ids=["number", "array"])
def test_tiny_and_huge_float32_values_lose_no_digits(problem, size, spread):
    """Steps grow with the values, so that thresholds stay comparable to them."""
    rng = np.random.default_rng(1)
    x, steps = some_point(problem, rng), some_steps(problem, rng)
    steps = steps if spread else np.full(problem.size, 0.3)
    expected = reference(problem, x, steps) * size
    x32, step32 = (x * size).astype(np.float32), (steps * size).astype(np.float32)
    found = problem.penalty.prox(problem.arrays(x32), problem.arrays(step32) if spread else float(step32[0]))
    np.testing.assert_allclose(plain.vector(found), expected, rtol=2e-4, atol=3e-6 * size)


@every_problem
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("metric", [None, "median", "support"])
def test_nan_stays_nan_and_takes_its_group_with_it(problem, metric):
    penalty = problem.penalty.with_metric(metric) if metric else problem.penalty
    rng = np.random.default_rng(2)
    for i in range(problem.size):
        x, steps = some_point(problem, rng), some_steps(problem, rng)
        x[i] = np.nan
        for step in (0.5, 1e6, problem.arrays(steps), problem.arrays(steps * 1e6)):
            assert np.isnan(plain.vector(penalty.prox(problem.arrays(x), step))[i])
        for t, members in problem.levels[0] if problem.levels else ():
            if i in members and t > 0:
                assert np.isnan(plain.vector(penalty.prox(problem.arrays(x), 0.5))[members]).all()


@pytest.mark.parametrize("metric", ["exact", "median", "support"])
def test_nan_with_step_0_does_not_pass_for_a_dead_group(metric):
    p = GroupL2(1.0, metric=metric).prox(np.array([np.nan, 0.1, 0.1]), np.array([0.0, 1.0, 2.0]))
    assert np.isnan(p[0]) and not np.any(p[1:] == 0)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
@pytest.mark.parametrize("groups", [None, Groups.along(0), Groups.along(-1)], ids=repr)
def test_empty_arrays_pass_through(shape, groups):
    x = np.zeros(shape, np.float32)
    for penalty in (L1(0.1), GroupL2(0.1, groups), SparseGroupLasso(0.1, 0.5, groups), Nested(L1(0.1), GroupL2(0.1, groups))):
        p = penalty.prox(x, np.ones(shape))
        assert p.shape == shape and p.dtype == np.float32
        assert penalty.value(x) == 0
    by_label = GroupL2(0.1, Groups.labels([1, 2, 1][: shape[0]]))
    assert by_label.prox(x).shape == shape and by_label.value(x) == 0


def test_an_empty_array_in_a_list_does_not_disturb_the_others():
    x = [np.zeros((0, 2)), np.array([[3.0, 4.0]])]
    for groups in (None, Groups.labels([[], ["a"]])):
        empty, p = GroupL2(1.0, groups, weights="none").prox(x)
        assert empty.shape == (0, 2)
        np.testing.assert_allclose(p, [[2.4, 3.2]])


def test_arrays_without_axes_are_arrays():
    x = np.array(2.0)
    for penalty in (L1(0.5), GroupL2(0.5), SparseGroupLasso(0.5), Nested(L1(0.5), GroupL2(0.5))):
        check_prox(penalty, x, 0.5)
        check_prox(penalty, x, np.array(0.5))


@every_problem
def test_out_takes_the_result_and_may_be_x_itself(problem):
    x = some_point(problem, np.random.default_rng(5))
    expected = problem.penalty.prox(problem.arrays(x), 0.5)
    out = problem.arrays(np.full(problem.size, np.nan))
    returned = problem.penalty.prox(problem.arrays(x), 0.5, out=out)
    np.testing.assert_array_equal(plain.vector(out), plain.vector(expected))
    np.testing.assert_array_equal(plain.vector(returned), plain.vector(expected))
    own = problem.arrays(x.copy())
    problem.penalty.prox(own, 0.5, out=own)
    np.testing.assert_array_equal(plain.vector(own), plain.vector(expected))


@given(seed=seeds, t=st.floats(0, 1e6))
def test_soft_threshold_is_its_equation_and_never_minus_zero(seed, t):
    x = np.random.default_rng(seed).normal(size=20) * 10.0 ** np.random.default_rng(seed).integers(-6, 6, 20)
    p = soft_threshold(x, t)
    np.testing.assert_array_equal(p, plain.soft(x, t))
    assert not np.signbit(p[np.abs(x) <= t]).any() or t == 0


def test_a_complex_entry_shrinks_in_modulus():
    x = np.array([3 + 4j, 0.3 + 0.4j, 0])
    np.testing.assert_allclose(soft_threshold(x, 1.0), [(3 + 4j) * 0.8, 0, 0])
    np.testing.assert_allclose(GroupL2(1.0, weights="none").prox(np.array([3j, 4.0])), [2.4j, 3.2])
    np.testing.assert_allclose(GroupL2(1.0, weights="none").prox(np.array([3j, 4.0]), np.ones(2)), [2.4j, 3.2])


# -- derivatives ------------------------------------------------------------------------------
# A norm has the slope 0 at x = 0, the symmetric subgradient. What is zeroed has slope 0, at the threshold too. Where the
# threshold is 0 the prox has the derivatives of its limit from above.

ROWS, ENDS = Groups.along(1), Groups.labels(["a", "b", "a"])
ROUGH = np.array([[1.5, 0.0, -2.0, 0.7], [0.02, 0.01, -0.03, 0.0], [-0.9, 1.1, 2.5, -1.3]])  # the middle row will be zeroed
SPREAD = np.array([[0.3, 1.0, 2.0, 0.6], [0.5, 1.5, 0.7, 1.0], [0.2, 0.9, 0.4, 1.7]])
ONE_PER_METRIC = [SparseGroupLasso(0.3, 0.2, ENDS), GroupL2(0.3, ROWS, metric="support"), GroupL2(0.3, metric="median")]
IN_A_METRIC = [
    *ONE_PER_METRIC,
    ElasticNet(0.3, 0.5),
    Nested(L1(0.1), GroupL2(0.2, ROWS, metric="median"), GroupL2(0.1, metric="median")),
    *(GroupL2(0.3, groups, metric=metric) for groups in (ROWS, ENDS, None) for metric in ("exact", "median", "support")),
]


class Calculus:
    """torch.func or jax, which have the same functions."""

    def __init__(self, library: Any) -> None:
        self.library = library
        if library.name == "jax":
            import jax as module
        else:
            import torch.func as module
        self.grad, self.jvp, self.jacrev = module.grad, module.jvp, module.jacrev

    def slope(self, f: Any) -> Any:
        """The derivative of a function of one number, in forward mode."""
        return lambda h: self.jvp(f, (h,), (h * 0 + 1,))[1]

    def give(self, x: Any) -> Any:
        return self.library.give(np.asarray(x) if isinstance(x, float) else x)

    def compiled(self, f: Any) -> Any:
        """f, compiled by JAX, as a function of NumPy arrays and numbers."""
        if self.library.name == "jax":
            import jax

            f = jax.jit(f)
        return lambda *args: self._take(f(*map(self.give, args)))

    def at(self, f: Any, *args: Any) -> Any:
        return self.compiled(f)(*args)

    def few(self, cases: list, count: int = 3) -> list:
        """All of the cases in torch, the first ones in JAX, which compiles each for seconds."""
        return cases if self.library.name == "torch" else cases[:count]

    def _take(self, x: Any) -> Any:
        if isinstance(x, (list, tuple)):
            return [self._take(a) for a in x]
        if self.library.name == "jax":
            return np.asarray(x)
        # a tangent of zeros has no memory, and torch 2.9 reads what lies there
        return np.zeros(x.shape, np.float64) if x._is_zerotensor() else x.numpy(force=True)


@pytest.fixture
def calculus(autograd_library):
    return Calculus(autograd_library)


def test_the_value_at_0_has_slope_0_and_no_curvature_but_that_of_a_ridge(calculus):
    first = ("L1 list", "ElasticNet weighted", "GroupL2 labels, weights", "SparseGroupLasso joint", "Nested three levels")
    problems = calculus.few(sorted(PROBLEMS, key=lambda p: p.name not in first), len(first))
    zeros, ones = ([p.arrays(np.full(p.size, v)) for p in problems] for v in (0.0, 1.0))
    both = lambda xs, vs: [calculus.jvp(calculus.grad(p.penalty.value), (x,), (v,)) for p, x, v in zip(problems, xs, vs)]
    for problem, (slope, curvature) in zip(problems, calculus.at(both, zeros, ones)):
        np.testing.assert_array_equal(plain.vector(slope), 0, err_msg=problem.name)
        np.testing.assert_allclose(plain.vector(curvature), np.zeros(problem.size) + problem.ridge, err_msg=problem.name)


def test_the_value_of_complex_zeros_has_slope_0(calculus):
    penalties = [
        L1(0.3),
        ElasticNet(0.3, 0.5),
        GroupL2(0.3, ROWS),
        SparseGroupLasso(0.3, 0.4, ENDS),
        Nested(L1(0.1), GroupL2(0.2)),
    ]
    values = [lambda parts, p=p: p.value(parts[0] + 1j * parts[1]) for p in penalties]
    both = lambda parts: [calculus.jvp(calculus.grad(f), (parts,), (parts + 1,)) for f in values]
    for penalty, (slope, curvature) in zip(penalties, calculus.at(both, np.zeros((2, 3, 4)))):
        np.testing.assert_array_equal(slope, 0, err_msg=repr(penalty))
        np.testing.assert_allclose(curvature, 0.15 if isinstance(penalty, ElasticNet) else 0, err_msg=repr(penalty))


def test_the_value_is_linear_in_the_strength(calculus):
    problems = calculus.few([p for p in PROBLEMS if np.ndim(p.penalty.strength) == 0])
    xs = [p.arrays(np.random.default_rng(0).normal(size=p.size)) for p in problems]
    slopes = lambda s, xs: [
        calculus.grad(lambda s, p=p, x=x: p.penalty.with_strength(s).value(x))(s) for p, x in zip(problems, xs)
    ]
    for problem, x, slope in zip(problems, xs, calculus.at(slopes, 0.0, xs)):
        np.testing.assert_allclose(slope, problem.penalty.with_strength(1.0).value(x), rtol=1e-12)


def moved(penalty: Any, h: Any, x: Any, steps: Any, direction: Any) -> Any:
    """The prox where x, the steps and the strength move together."""
    dx, ds = direction
    return penalty.with_strength(0.3 + h).prox(x + h * dx, steps + h * ds)


def test_derivatives_up_to_the_third_are_those_of_finite_differences(calculus):
    rng = np.random.default_rng(0)
    problem = (ROUGH, SPREAD, [rng.normal(size=(3, 4)), rng.normal(size=(3, 4))])
    weights, h = rng.normal(size=(3, 4)), 1e-3
    given, given_weights = [calculus.give(a) for a in problem], calculus.give(weights)
    grad, slope = calculus.grad, calculus.slope
    for penalty in calculus.few(IN_A_METRIC):
        traced = lambda h, p=penalty: (moved(p, h, *given) * given_weights).sum()
        second, third = [slope(grad(traced))], [slope(grad(grad(traced)))]
        second += calculus.few([slope(slope(traced)), grad(grad(traced))], 0)
        found = calculus.at(lambda h, orders=(*second, *third): [f(h) for f in orders], 0.0)
        f = {k: float(np.sum(moved(penalty, k * h, *problem) * weights)) for k in (-2, -1, 0, 1, 2)}
        expected = (16 * (f[1] + f[-1]) - f[2] - f[-2] - 30 * f[0]) / (12 * h**2)
        np.testing.assert_allclose(found[:-1], expected, rtol=1e-6, err_msg=repr(penalty))
        expected = (f[2] - 2 * f[1] + 2 * f[-1] - f[-2]) / (2 * h**3)
        np.testing.assert_allclose(found[-1], expected, rtol=1e-3, err_msg=repr(penalty))


def test_what_is_zeroed_has_slope_0_at_the_threshold_too(calculus):
    five = lambda metric: lambda x, t: GroupL2(t, weights="none", metric=metric).prox(x, calculus.give(np.array([1.0, 2.0])))
    for prox, x, threshold in (
        (soft_threshold, np.array([2.0, -2.0]), 2.0),
        (lambda x, t: soft_threshold(x, 2.0) * t, np.array([2.0, -2.0]), 1.0),
        (lambda x, t: GroupL2(t, weights="none").prox(x), np.array([3.0, 4.0]), 5.0),
        (five("exact"), np.array([3.0, 8.0]), 5.0),
        (five("support"), np.array([3.0, 8.0]), 5.0),
    ):
        for zeros in calculus.at(lambda x, t, f=prox: [f(x, t), *calculus.jacrev(f, (0, 1))(x, t)], x, threshold):
            np.testing.assert_array_equal(zeros, 0)


def test_at_threshold_0_the_prox_has_the_slopes_of_small_thresholds(calculus):
    """Also for zero entries and groups. The median of equal steps has no such slope, and neither has the step of the support."""
    x, steps, h = np.vstack([ROUGH, np.zeros(4)]), np.vstack([SPREAD, np.ones(4)]), 1e-8
    groups = Groups.labels(["a", "b", "a", "c"])
    by_strength = [
        SparseGroupLasso(1.0, 0.2, groups),
        L1(1.0),
        GroupL2(1.0, groups, metric="median"),
        GroupL2(1.0, metric="support"),
    ]
    by_step = [SparseGroupLasso(1.0, 0.2, groups), ElasticNet(1.0), GroupL2(1.0, ROWS)]
    for prox in [
        *(lambda h, x, steps, p=p: p.with_strength(h).prox(x, steps) for p in calculus.few(by_strength, 1)),
        *(lambda h, x, steps, p=p: p.prox(x, h * steps) for p in calculus.few(by_step, 0)),
        *(lambda h, x, steps, p=p: p.prox(x, h) for p in calculus.few(by_step, 1)),
    ]:
        slope = lambda x, steps, f=prox: calculus.slope(lambda h: f(h, x, steps))(0 * x.sum())
        np.testing.assert_allclose(calculus.at(slope, x, steps), (prox(h, x, steps) - x) / h, atol=1e-4)


STEPS_OF = {
    "prox_sgd": lambda *args, lr, decay: updates.prox_sgd(*args, lr=lr, rho=decay),
    "prox_sgd tau": lambda *args, lr, decay: updates.prox_sgd(*args, lr=lr, rho=decay, tau=2.0),
    "hapg": lambda *args, lr, decay: updates.hapg(*args, lr=lr),
    "prox_adam": lambda *args, lr, decay: updates.prox_adam(*args, lr=lr, betas=(decay, decay), weight_decay=decay),
    "adam_hapg": lambda *args, lr, decay: updates.adam_hapg(*args, lr=lr, betas=(decay, decay), extrapolation=0.9),
}


def test_steps_have_finite_derivatives_where_gradients_entries_and_numbers_are_0(calculus):
    """With respect to the point, the gradient, and all numbers; through the state of the first step too."""
    x, grad = np.array([0.0, 1.0, 0.0, -2.0]), np.array([0.0, 0.0, 1.0, 0.5])

    def walked(step, x, grad, lr, strength, decay):
        penalty = L1(strength) if calculus.library.name == "jax" else SparseGroupLasso(strength, 0.5)
        new, state = step(x, grad, None, penalty, lr=lr, decay=decay)
        return (step(new, 2 * grad, state, penalty, lr=lr, decay=decay)[0] ** 2).sum()

    slopes = calculus.compiled(
        lambda *args: [calculus.grad(lambda *a, s=s: walked(s, *a), tuple(range(5)))(*args) for s in STEPS_OF.values()]
    )
    for numbers in ((0.1, 0.1, 0.5), (0.0, 0.1, 0.5), (0.1, 0.0, 0.0), (0.0, 0.0, 0.0)):
        for name, found in zip(STEPS_OF, slopes(x, grad, *numbers)):
            assert all(np.isfinite(a).all() for a in found), (name, numbers)


def test_adam_moves_with_a_small_gradient_as_eps_says(calculus):
    """|g| has the slope 0 at g = 0, so that d x / d g = -lr / eps there."""
    step = lambda g: updates.prox_adam(g * 0, g, None, None, lr=0.1, eps=1e-2)[0]
    np.testing.assert_allclose(calculus.at(calculus.jacrev(step), np.zeros(2)), -10.0 * np.eye(2))


def test_a_traced_strength_or_step_below_0_changes_nothing(calculus):
    """A schedule may end a rounding below 0, where its value cannot be read."""
    penalties = [L1(1.0), SparseGroupLasso(1.0, 0.2, ENDS), GroupL2(1.0, metric="median"), GroupL2(1.0, metric="support")]

    def proxes(x, below, penalty):
        negative = penalty.with_strength(below[0, 0])
        return [penalty.prox(x, below), penalty.prox(x, below[0, 0]), negative.prox(x, -below), negative.prox(x, 0.5)]

    for penalty in calculus.few(penalties, 1):
        for p in calculus.at(lambda x, below, p=penalty: proxes(x, below, p), ROUGH, -SPREAD):
            np.testing.assert_array_equal(p, ROUGH)
