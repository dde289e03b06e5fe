"""The solvers: what they return minimises the objective, whoever asks and in whatever company, and says how far off it is."""

from __future__ import annotations

import warnings
from typing import Any

import cvxpy as cp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from libraries import Library, jax_precision, open_library

import proxopt
from proxopt import L1, ElasticNet, GroupL2, Groups, Nested, SparseGroupLasso, sparse_code
from proxopt.solvers import ConvergenceWarning, LeastSquares, fista, ista

METHODS = ["active_set", "homotopy"]


@pytest.fixture(params=["numpy", "torch", "jax"])
def xlib(request: pytest.FixtureRequest) -> Any:
    yield from open_library(request.param)


def problem(seed: int, m: int, n: int, signals: int = 4, share: float = 0.1) -> tuple[np.ndarray, np.ndarray, float]:
    rng = np.random.default_rng(seed)
    A, b = rng.normal(size=(m, n)), rng.normal(size=(signals, m))
    return A, b, share * float(np.abs(b @ A).max())


def coherent(seed: int, draws: int = 5) -> tuple[list[np.ndarray], np.ndarray]:
    """The recovery problems of ISTA-NAS: 7 rows, 14 to 35 columns drawn from [0, 1), signals of size 1e-3."""
    rng = np.random.default_rng(seed)
    return [rng.uniform(size=(7, 7 * (2 + i % 4))) for i in range(8 * draws)], 1e-3 * rng.normal(size=(8 * draws, 7))


def violation(A: np.ndarray, b: np.ndarray, strength: Any, z: np.ndarray) -> float:
    """How far the optimality condition is from true, relative to the strength."""
    c = (b - z @ A.T) @ A
    strength = np.broadcast_to(np.asarray(strength)[..., None], z.shape)
    off = np.where(z != 0, np.abs(c - strength * np.sign(z)), np.maximum(np.abs(c) - strength, 0))
    return float((off / strength).max())


@pytest.mark.parametrize("method", METHODS)
@given(
    st.integers(0, 1000), st.integers(1, 20), st.integers(1, 30), st.integers(1, 5), st.sampled_from([1e-3, 0.05, 0.3, 0.9, 1.5])
)
def test_codes_meet_the_optimality_condition(method: str, seed: int, m: int, n: int, signals: int, share: float) -> None:
    A, b, strength = problem(seed, m, n, signals, share)
    with warnings.catch_warnings():
        warnings.simplefilter("error" if method == "homotopy" else "ignore")
        found = sparse_code(A, b, strength, tol=1e-9, method=method)
    ok = found.success
    assert violation(A, b[ok], strength, found.x[ok]) < 1e-2 if ok.any() else method == "active_set"
    assert method == "active_set" or violation(A, b, strength, found.x) < 1e-8


@pytest.mark.parametrize("method", ["auto", *METHODS])
def test_codes_are_the_minimisers_that_cvxpy_finds(method: str) -> None:
    A, b, strength = problem(0, 20, 40)
    found = sparse_code(A, b, strength, method=method)
    for z, signal in zip(found.x, b):
        x = cp.Variable(40)
        cp.Problem(cp.Minimize(cp.sum_squares(A @ x - signal) / 2 + strength * cp.norm1(x))).solve(solver=cp.CLARABEL)
        np.testing.assert_allclose(z, x.value, atol=1e-5)


@pytest.mark.parametrize("method", ["auto", *METHODS])
def test_the_gap_bounds_the_error(method: str) -> None:
    A, b, strength = problem(1, 30, 60)
    best = sparse_code(A, b, strength, method="homotopy", tol=1e-12).fun
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for budget in (1, 10, 20, 40, 1000):
            found = sparse_code(A, b, strength, max_iter=budget, method=method)
            assert np.all(found.fun - best <= found.gap * found.fun + 1e-12)
            np.testing.assert_array_equal(found.success, found.gap <= 1e-6)


def test_a_budget_that_ends_first_is_warned_of_with_the_gap_achieved() -> None:
    A, b, strength = problem(1, 30, 60)
    with pytest.warns(ConvergenceWarning, match="max_iter ended 4 of 4 problems.*gap up to") as caught:
        found = sparse_code(A, b, strength, max_iter=1, method="active_set")
    assert caught[0].filename == __file__
    assert not found.success.any() and set(found.status) == {1}
    with pytest.warns(ConvergenceWarning, match="gap") as caught:
        fista(LeastSquares(A, b), L1(strength), np.zeros((4, 60)), max_iter=2)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("method", ["auto", *METHODS])
def test_libraries_agree(xlib: Library, method: str) -> None:
    A, b, strength = problem(2, 20, 30)
    expected = sparse_code(A, b, strength, method=method)
    found = sparse_code(xlib.give(A), xlib.give(b), strength, method=method)
    assert type(found.x) is type(xlib.give(b))
    np.testing.assert_allclose(xlib.take(found.x), expected.x, atol=1e-12)
    assert np.all((xlib.take(found.x) != 0) == (expected.x != 0))
    assert xlib.take(found.success).all()


def test_coherent_problems_of_many_widths_are_solved_to_rounding(xlib: Library) -> None:
    dictionaries, b = coherent(0)
    found = sparse_code(xlib.give(dictionaries), xlib.give(b), 1e-5)
    assert float(xlib.take(found.gap).max()) < 1e-10
    for A, signal, z in zip(dictionaries, b, xlib.take(found.x)):
        assert z.shape == (A.shape[1],)
        assert violation(A, signal[None], 1e-5, z[None]) < 1e-9


def test_a_batch_gives_what_its_problems_give_alone() -> None:
    rng = np.random.default_rng(3)
    A, b = rng.normal(size=(6, 20, 25)), rng.normal(size=(6, 20))
    strengths = np.linspace(0.5, 3, 6)
    for method in METHODS:
        together = sparse_code(A, b, strengths, method=method)
        for i in range(6):
            alone = sparse_code(A[i], b[i], float(strengths[i]), method=method)
            np.testing.assert_allclose(together.x[i], alone.x, atol=1e-12)
            assert together.nit[i] == alone.nit


def test_leading_axes_broadcast() -> None:
    rng = np.random.default_rng(4)
    A, b = rng.normal(size=(3, 1, 5, 8)), rng.normal(size=(4, 5))
    found = sparse_code(A, b, np.array([0.1, 0.2, 0.3])[:, None])
    assert found.x.shape == (3, 4, 8) and found.fun.shape == found.gap.shape == (3, 4)
    np.testing.assert_allclose(found.x[2, 1], sparse_code(A[2, 0], b[1], 0.3).x, atol=1e-12)
    one = sparse_code(A[0, 0], b[0], 0.1)
    assert one.x.shape == (8,) and one.fun.shape == ()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e-60, 1e-6, 1e6, 1e60])
def test_codes_scale_with_their_signals(method: str, scale: float) -> None:
    A, b, strength = problem(5, 12, 20)
    expected = sparse_code(A, b, strength, method=method).x
    np.testing.assert_allclose(sparse_code(A, b * scale, strength * scale, method=method).x, expected * scale, rtol=1e-8)
    np.testing.assert_allclose(sparse_code(A * scale, b * scale, strength * scale**2, method=method).x, expected, rtol=1e-8)


@pytest.mark.parametrize("method", ["auto", *METHODS])
def test_columns_that_repeat_or_vanish_are_no_obstacle(method: str) -> None:
    A, b, strength = problem(6, 10, 12)
    doubled = np.concatenate([A, A, -A, np.zeros((10, 3))], axis=1)
    found = sparse_code(doubled, b, strength, method=method)
    assert found.success.all()
    assert not found.x[:, 36:].any()
    np.testing.assert_allclose(found.fun, sparse_code(A, b, strength).fun, rtol=1e-6)


@pytest.mark.parametrize("values", [(-1, 0, 1), (0, 1), (1,)])
@given(st.integers(0, 10_000), st.integers(1, 11), st.integers(1, 18), st.sampled_from([1e-4, 0.1, 0.5, 0.99, 1.0]))
def test_ties_and_dependent_columns_are_no_obstacle(values: tuple, seed: int, m: int, n: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    A = rng.choice(np.asarray(values, float), size=(3, m, n))
    b = rng.integers(-2, 3, size=(3, m)).astype(float)
    top = np.abs(np.einsum("bm,bmn->bn", b, A)).max(1)
    strength = np.where(top > 0, share * top, 1.0)
    for method in ("auto", "homotopy"):
        found = sparse_code(A, b, strength, method=method)
        assert found.success.all() and np.isfinite(found.x).all()


@pytest.mark.parametrize("method", ["auto", *METHODS])
def test_edges_of_the_domain(xlib: Library, method: str) -> None:
    A, b, strength = (xlib.give(v) for v in problem(7, 6, 9))
    zero = sparse_code(A, b * 0, strength, method=method)
    assert not xlib.take(zero.x).any() and xlib.take(zero.success).all() and not xlib.take(zero.gap).any()
    assert not xlib.take(sparse_code(A, b, 100 * strength, method=method).x).any()
    assert sparse_code(A, b[:0], strength, method=method).x.shape == (0, 9)
    assert sparse_code(A[:, :0], b, strength, method=method).x.shape == (4, 0)


def test_single_precision_is_kept_and_certified(xlib: Library) -> None:
    A, b, strength = problem(8, 30, 50)
    found = sparse_code(xlib.give(A.astype(np.float32)), xlib.give(b.astype(np.float32)), strength)
    assert "float32" in str(found.x.dtype) and xlib.take(found.success).all()
    np.testing.assert_allclose(xlib.take(found.x), sparse_code(A, b, strength).x, atol=2e-3)


def test_jax_traces_it() -> None:
    jax = pytest.importorskip("jax")
    A, b, strength = problem(9, 20, 30)
    with jax_precision():
        A_, b_ = jax.numpy.asarray(A), jax.numpy.asarray(b)
        expected = sparse_code(A, b, strength).x
        found = jax.jit(lambda signals: sparse_code(A_, signals, strength))(b_)
        np.testing.assert_allclose(found.x, expected, atol=1e-10)
        assert found.success.all()
        each = jax.vmap(lambda signal, s: sparse_code(A_, signal, s, method="active_set").x, in_axes=(0, None))(b_, strength)
        np.testing.assert_allclose(each, expected, atol=1e-10)
        solved = jax.jit(lambda y: fista(LeastSquares(A_, y), L1(strength), 0 * y @ A_))(b_)
        np.testing.assert_allclose(solved.x, expected, atol=1e-2)


# -- ista and fista ---------------------------------------------------------------------------

PENALTIES = [
    (L1(0.7), lambda x: 0.7 * cp.norm1(x)),
    (ElasticNet(0.7, 0.4), lambda x: 0.28 * cp.norm1(x) + 0.21 * cp.sum_squares(x)),
    (GroupL2(0.7, Groups.labels([0, 0, 0, 1, 1, 2] * 4)), None),
    (SparseGroupLasso(0.7, 0.5, Groups.labels([0, 0, 0, 1, 1, 2] * 4)), None),
    (Nested(L1(0.3), GroupL2(0.4, Groups.labels([0, 0, 0, 1, 1, 2] * 4))), None),
]


@pytest.mark.parametrize("penalty, other", PENALTIES, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("solver", [ista, fista])
def test_solutions_are_certified_by_their_gap(xlib: Library, solver: Any, penalty: Any, other: Any) -> None:
    if xlib.name == "jax" and solver is ista and not isinstance(penalty, L1):
        pytest.skip("compiled with one penalty: the loop is that of fista")
    A, b, _ = problem(11, 30, 24, signals=1)
    f = LeastSquares(xlib.give(A), xlib.give(b[0]))
    found = solver(f, penalty, xlib.give(np.zeros(24)))
    assert bool(found.success) and float(found.gap) <= 1e-6
    if xlib.name == "jax":
        same = solver(LeastSquares(A, b[0]), penalty, np.zeros(24))
        np.testing.assert_allclose(found.x, same.x, atol=1e-10)
        assert int(found.nit) == same.nit
        return
    if other is not None:
        x = cp.Variable(24)
        best = cp.Problem(cp.Minimize(cp.sum_squares(A @ x - b[0]) / 2 + other(x))).solve(solver=cp.CLARABEL)
        assert -1e-7 <= float(found.fun) - best <= 1e-6 * best + 1e-7
    tight = solver(f, penalty, found.x, tol=1e-13)
    assert 0 <= float(found.fun - tight.fun) <= float(found.gap * found.fun) + 1e-12


def test_steps_are_those_of_the_papers() -> None:
    A, b, strength = problem(12, 20, 30, signals=1)
    f, step = LeastSquares(A, b[0]), 1 / np.linalg.norm(A, 2) ** 2
    shrink = lambda v: np.sign(v) * np.maximum(np.abs(v) - step * strength, 0)
    x = y = z = np.zeros(30)
    t = 1.0
    for _ in range(200):
        z = shrink(z - step * A.T @ (A @ z - b[0]))
        new, next_t = shrink(y - step * A.T @ (A @ y - b[0])), (1 + np.sqrt(1 + 4 * t * t)) / 2
        x, y, t = new, new + (t - 1) / next_t * (new - x), next_t
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        np.testing.assert_allclose(fista(f, L1(strength), np.zeros(30), tol=0, max_iter=200, restart=False).x, x, atol=1e-12)
        np.testing.assert_allclose(ista(f, L1(strength), np.zeros(30), tol=0, max_iter=200).x, z, atol=1e-12)


def test_problems_of_a_batch_end_when_they_are_done() -> None:
    A, b, _ = problem(13, 20, 30)
    strengths = np.array([[0.5], [2.0], [8.0], [100.0]])
    found = fista(LeastSquares(A, b), L1(strengths), np.zeros((4, 30)))
    assert found.nit[0] > found.nit[2] > found.nit[3] == 0
    for i in range(4):
        alone = fista(LeastSquares(A, b[i]), L1(float(strengths[i, 0])), np.zeros(30))
        np.testing.assert_allclose(found.x[i], alone.x, atol=1e-12)
        assert found.nit[i] == alone.nit


def test_batches_with_groups_apply_the_penalty_to_each_problem(xlib: Library) -> None:
    A, b, _ = problem(14, 12, 10)
    penalty = GroupL2(0.8, Groups.labels([0, 0, 1, 1, 1, 2, 2, 3, 3, 3]))
    found = fista(LeastSquares(xlib.give(A), xlib.give(b)), penalty, xlib.give(np.zeros((4, 10))), tol=1e-10)
    assert xlib.take(found.residual).shape == (4,)
    for i in range(4):
        alone = fista(LeastSquares(A, b[i]), penalty, np.zeros(10), tol=1e-12)
        np.testing.assert_allclose(xlib.take(found.x)[i], alone.x, atol=1e-7)


def logistic(A: Any, labels: Any) -> Any:
    def f(x: Any) -> tuple[Any, Any]:
        margin = labels * (A @ x)
        weight = 1 / (1 + np.exp(margin))
        return np.log1p(np.exp(-margin)).mean(), -A.T @ (labels * weight) / len(labels)

    return f


@pytest.mark.parametrize("solver", [ista, fista])
def test_any_smooth_function_serves_and_the_step_is_searched_for(solver: Any) -> None:
    rng = np.random.default_rng(15)
    A = rng.normal(size=(60, 10)) * 5
    labels = np.where(A[:, 0] - A[:, 1] + rng.normal(size=60) > 0, 1.0, -1.0)
    found = solver(logistic(A, labels), L1(0.02), np.zeros(10), tol=1e-8)
    x = cp.Variable(10)
    loss = cp.sum(cp.logistic(cp.multiply(-labels, A @ x))) / 60 + 0.02 * cp.norm1(x)
    best = cp.Problem(cp.Minimize(loss)).solve(solver=cp.CLARABEL)
    assert found.success and "residual" in found
    assert abs(float(found.fun) - best) < 1e-6
    fixed = solver(logistic(A, labels), L1(0.02), np.zeros(10), tol=1e-8, step=0.1)
    np.testing.assert_allclose(fixed.x, found.x, atol=1e-5)


def quadratic(curvature: Any, target: Any, offset: float = 0.0) -> Any:
    return lambda x: (offset + (curvature * (x - target) ** 2).sum() / 2, curvature * (x - target))


@pytest.mark.parametrize("solver", [ista, fista])
@pytest.mark.parametrize("curvature", [1e-14, 1e-8, 1e8])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_the_step_searched_for_grows_and_shrinks(solver: Any, curvature: float, offset: float) -> None:
    found = solver(quadratic(curvature, 1.0, offset), L1(0.01 * curvature), np.zeros(3))
    assert found.success
    np.testing.assert_allclose(found.x, 0.99, rtol=1e-5)
    start = np.full(3, 0.5)
    np.testing.assert_allclose(solver(quadratic(curvature, 1.0, offset), L1(0.0), start).x, 1.0, rtol=1e-5)


def test_a_searched_step_stays_short_enough_where_the_curvature_rises() -> None:
    curvature, target = np.logspace(-2, 2, 20), np.random.default_rng(17).normal(size=20)
    found = fista(quadratic(curvature, target), L1(1e-3), np.zeros(20), tol=1e-9)
    shrunk = np.sign(target) * np.maximum(np.abs(target) - 1e-3 / curvature, 0)
    assert found.success
    np.testing.assert_allclose(found.x, shrunk, atol=1e-5)


@pytest.mark.parametrize("solver", [ista, fista])
def test_a_trial_step_out_of_the_domain_of_f_is_shortened(solver: Any) -> None:
    with np.errstate(invalid="ignore", divide="ignore"):
        found = solver(lambda x: (x.sum() - np.log(x).sum(), 1 - 1 / x), L1(0.5), np.full(3, 0.01))
    assert found.success
    np.testing.assert_allclose(found.x, 1 / 1.5, rtol=1e-6)


def test_a_linear_function_lets_no_number_overflow() -> None:
    assert not fista(lambda x: (0.5 * x.sum(), 0.5 + 0 * x), L1(1.0), np.full(3, 2.0)).x.any()
    with warnings.catch_warnings(), np.errstate(all="raise"):
        warnings.simplefilter("ignore", ConvergenceWarning)
        assert not fista(lambda x: (2 * x.sum(), 2 + 0 * x), L1(1.0), np.zeros(3), max_iter=300).success


@pytest.mark.parametrize("budget", [1, 9, 13, 40])
def test_no_solver_takes_more_iterations_than_asked_for(budget: int) -> None:
    A, b, strength = problem(18, 20, 30)
    start, f = np.zeros((4, 30)), LeastSquares(A, b)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        assert set(fista(f, L1(strength), start, max_iter=budget, tol=0).nit) == {budget}
        assert set(ista(f.__call__, L1(strength), start, max_iter=budget, tol=0).nit) == {budget}
        for method in ("auto", *METHODS):
            assert sparse_code(A, b, strength, max_iter=budget, tol=0, method=method).nit.max() <= budget
        first = ista(f, L1(strength), start, max_iter=1, tol=0).x
    step = 1 / np.linalg.norm(A, 2) ** 2
    np.testing.assert_allclose(first, L1(strength).prox(step * b @ A, step), atol=1e-12)


@pytest.mark.parametrize("solver", [ista, fista])
def test_the_usual_tolerance_is_reached_in_single_precision(solver: Any) -> None:
    A, b, strength = problem(19, 30, 24)
    A, b, start = A.astype(np.float32), b.astype(np.float32), np.zeros((4, 24), np.float32)
    for f in (LeastSquares(A, b), LeastSquares(A, b).__call__):  # by the gap, and by the residual
        found = solver(f, L1(strength), start)
        assert found.x.dtype == np.float32 and found.success.all()
        assert solver(f, L1(strength), start, tol=1e-4).nit.max() == found.nit.max()
    half = solver(LeastSquares(A.astype(np.float16), b.astype(np.float16)), L1(strength), start.astype(np.float16))
    np.testing.assert_allclose(half.x, found.x, atol=0.05)


def test_a_start_at_the_solution_stays_there() -> None:
    A, b, strength = problem(16, 12, 10)
    solution = sparse_code(A, b, strength, tol=1e-12).x
    found = fista(LeastSquares(A, b), L1(strength), solution)
    assert not found.nit.any()
    np.testing.assert_array_equal(found.x, solution)


# -- wrong input ------------------------------------------------------------------------------

EYE = np.eye(3)
REFUSED = [
    (lambda: sparse_code(EYE, np.ones(4), 1.0), ValueError, "agree in m"),
    (lambda: sparse_code(EYE, np.ones(3), 0.0), ValueError, "strength must be finite and > 0"),
    (lambda: sparse_code(EYE, np.ones(3), -1.0), ValueError, "strength"),
    (lambda: sparse_code(EYE, np.ones((2, 3)), np.array([1.0, np.nan])), ValueError, "strength"),
    (lambda: sparse_code(EYE, np.ones((2, 3)), np.ones(5)), ValueError, "broadcast"),
    (lambda: sparse_code(EYE, np.ones(3, int), 1.0), TypeError, "b must be a floating-point array"),
    (lambda: sparse_code(EYE, np.ones(3, np.float32), 1.0), TypeError, "one dtype"),
    (lambda: sparse_code(EYE + 1j, np.ones(3) + 1j, 1.0), TypeError, "real"),
    (lambda: sparse_code(np.ones(3), np.ones(3), 1.0), ValueError, "A must have at least 2 axes"),
    (lambda: sparse_code(EYE, np.array([1.0, np.nan, 0.0]), 1.0), ValueError, "b must be finite, got nan"),
    (lambda: sparse_code(EYE + np.inf, np.ones(3), 1.0), ValueError, "A must be finite"),
    (lambda: sparse_code(EYE, np.ones(3), 1.0, method="lars"), ValueError, "method must be one of"),
    (lambda: sparse_code(EYE, np.ones(3), 1.0, tol=-1.0), ValueError, "tol"),
    (lambda: sparse_code(EYE, np.ones(3), 1.0, max_iter=0), ValueError, "max_iter"),
    (lambda: sparse_code([], np.ones(3), 1.0), ValueError, "at least one array"),
    (lambda: sparse_code([EYE, np.eye(4)], np.ones((2, 3)), 1.0), ValueError, r"A\[1\]"),
    (lambda: sparse_code([EYE, EYE], np.ones((3, 3)), 1.0), ValueError, "broadcast"),
    (lambda: fista(LeastSquares(EYE, np.ones(3)), L1(1.0), np.zeros(3, int)), TypeError, "x0"),
    (lambda: fista(LeastSquares(EYE, np.ones(3)), L1(1.0), np.zeros(3), step=0.0), ValueError, "step"),
    (lambda: fista(LeastSquares(EYE, np.ones(3)), L1(1.0), np.zeros(3), max_iter=2.5), ValueError, "max_iter"),
    (lambda: ista(lambda x: (x, x[:1]), L1(1.0), np.zeros(3)), ValueError, "gradient of its shape"),
    (lambda: LeastSquares(EYE, [1.0, 2.0, 3.0]), TypeError, "b"),
    (lambda: LeastSquares(EYE, np.array([1.0, np.nan, 0.0])), ValueError, "b must be finite, got nan"),
    (lambda: LeastSquares(EYE - np.inf, np.ones(3)), ValueError, "A must be finite, got -inf"),
    (lambda: fista(LeastSquares(EYE, np.ones(3)), L1(1.0), np.array([0, np.nan, 0])), ValueError, "x0 must be finite, got nan"),
    (
        lambda: fista(LeastSquares(EYE, np.ones(3)), L1(1.0), np.ones(4)),
        ValueError,
        r"x0 must have shape \(3,\) for A.*got \(4,\)",
    ),
    (lambda: fista(LeastSquares(EYE, np.ones((2, 3))), L1(1.0), np.ones(3)), ValueError, r"x0 must have shape \(2, 3\)"),
    (
        lambda: fista(LeastSquares(EYE, np.ones(3)), L1(1.0), [np.ones(3), np.ones(3)]),
        TypeError,
        "x0 must be one array, got a list",
    ),
    (lambda: fista(lambda x: (np.nan, x), L1(1.0), np.ones(3)), ValueError, r"f\(x0\) must be finite, got nan"),
    (lambda: fista(lambda x: (1.0, x + np.inf), L1(1.0), np.ones(3)), ValueError, "the gradient of f at x0 must be finite, got"),
]


@pytest.mark.parametrize("call, error, words", REFUSED)
def test_wrong_input_is_named(call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


def test_the_solvers_are_imported_when_asked_for() -> None:
    assert proxopt.solvers.sparse_code is sparse_code
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = proxopt.no_such_name


@pytest.mark.parametrize("solve", [fista, ista])
def test_eager_solves_in_jax_compile_once_per_shape(solve):
    jax = pytest.importorskip("jax")
    jnp = jax.numpy
    compiled = []

    def count(event, *_, **__):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(count)
    rng = np.random.default_rng(0)
    counts = []
    for strength in (0.5, 0.6, 0.7):
        before = len(compiled)
        a, b = jnp.asarray(rng.normal(size=(6, 5)), jnp.float32), jnp.asarray(rng.normal(size=6), jnp.float32)
        scale = jnp.sum(b * b)  # a number that f closes over
        smooth = lambda x, a=a, b=b, scale=scale: (jnp.sum((a @ x - b) ** 2) / 2 + scale, a.T @ (a @ x - b))
        groups = Groups.labels([0, 0, 1, 1, 1])
        for f, penalty in (
            (LeastSquares(a, b), L1(strength)),
            (smooth, SparseGroupLasso(strength, groups=groups)),
            (jax.value_and_grad(lambda x, a=a, b=b: jnp.sum(jax.nn.relu(a @ x - b) ** 2)), L1(strength)),
        ):
            found = solve(f, penalty, jnp.zeros(5), tol=1e-3)
            assert bool(found.success)
            if f is smooth:
                reference = solve(LeastSquares(np.asarray(a), np.asarray(b)), penalty, np.zeros(5, np.float32), tol=1e-5)
                np.testing.assert_allclose(found.x, reference.x, atol=5e-3)
        counts.append(len(compiled) - before)
    assert counts[0] > 0
    assert counts[1:] == [0, 0]


def test_programs_that_differ_in_a_number_only_are_not_confused(autograd_library):
    data = [autograd_library.give(np.array(x)) for x in ([3.0, 0.5], [0.0, 0.0])]
    found = []
    for scale in (1.0, 1.0000001, 2.0):
        smooth = lambda x, scale=scale: (0.5 * scale * ((x - data[0]) ** 2).sum(), scale * (x - data[0]))
        found.append(float(fista(smooth, L1(1.0), data[1], tol=1e-12, max_iter=1000).x[0]))
    np.testing.assert_allclose(found, [2.0, 3 - 1 / 1.0000001, 2.5], rtol=1e-10)


@pytest.mark.parametrize("solve", [fista, ista])
def test_a_scalar_f_and_a_tree_as_start_are_refused_in_a_sentence(autograd_library, solve):
    zero = autograd_library.give(np.zeros(2))
    for f in (lambda x: (x**2).sum(), lambda x: ((x**2).sum(),), lambda x: None):
        with pytest.raises(TypeError, match=r"f must return \(value, gradient\), got .*value_and_grad"):
            solve(f, L1(1.0), zero)
    both = lambda x: (x[0] ** 2, x)
    for start, kind in (({"w": zero, "b": zero}, "dict"), ([zero, zero], "list"), ((zero,), "tuple"), (None, "NoneType")):
        with pytest.raises(TypeError, match=f"x0 must be one array, got a {kind}.*concatenate"):
            solve(both, L1(1.0), start)
