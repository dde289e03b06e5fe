"""What a solver says of its own result: an upper bound on the error whatever it was given, and success for nothing less."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from libraries import Library, jax_precision, open_library

from proxopt import L1, ElasticNet, GroupL2, Groups, Nested, Penalty, SparseGroupLasso, sparse_code
from proxopt.solvers import ConvergenceWarning, LeastSquares, fista, ista
from proxopt.solvers.least_squares import gap

NO_INTERCEPT = np.array([0.0, 1, 1, 1, 1, 1])
SIX = Groups.labels([0, 1, 1, 2, 2, 2])
UNPENALISED = [
    L1(2 * NO_INTERCEPT),
    ElasticNet(2 * NO_INTERCEPT, 0.5),
    ElasticNet(2 * NO_INTERCEPT, 0.0),
    ElasticNet(0.0),
    L1(0.0),
    GroupL2(2.0, SIX, np.array([0.0, 1, 1])),
    SparseGroupLasso(2 * NO_INTERCEPT, 0.5, SIX, "none"),
    Nested(L1(NO_INTERCEPT), GroupL2(1.0, SIX, np.array([0.0, 1, 1]))),
]


@pytest.fixture(params=["numpy", "torch", "jax"])
def xlib(request: pytest.FixtureRequest) -> Any:
    yield from open_library(request.param)


def regression(seed: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Six columns, the first of ones, and a target far from 0."""
    rng = np.random.default_rng(seed)
    A = np.c_[np.ones(rows), rng.normal(size=(rows, 5))]
    return A, A @ np.array([10.0, 1, 1, 0, 0, 0]) + rng.normal(size=rows)


def quietly(solver: Any, *args: Any, **options: Any) -> Any:
    """A solution that may miss its tolerance, or overflow on the way."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore", ConvergenceWarning)
        return solver(*args, **options)


# -- numbers that are not finite --------------------------------------------------------------


def test_a_gap_with_a_nan_in_it_is_nan(xlib: Library) -> None:
    xp = __import__("jax.numpy").numpy if xlib.name == "jax" else __import__(xlib.name)
    one, nan = xlib.give(np.ones(2)), xlib.give(np.array([np.nan, 1.0]))
    for i in range(5):
        parts = [one, one, 0 * one, one, 0 * one]
        parts[i] = nan
        residual, *others = parts
        found = xlib.take(gap(xp, residual[:, None], *others))
        assert np.isnan(found[0]) and found[1] >= 0
    for penalty in (L1(1.0), ElasticNet(1.0), GroupL2(1.0), ElasticNet(1.0, 1.0)):
        scale, conjugate = penalty.dual(nan)
        assert np.isnan(xlib.take(scale * (1 + conjugate)))
    scale, conjugate = ElasticNet(xlib.give(np.array([0.0, 1.0]))).dual(one)
    assert xlib.take(conjugate) == np.inf and xlib.take(scale) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_data_that_are_not_finite_are_refused_by_name(xlib: Library, bad: float) -> None:
    A, b = regression(0, 8)
    for name, entry in (("A", (2, 3)), ("b", (4,))):
        data = {"A": A.copy(), "b": b.copy()}
        data[name][entry] = bad
        wrong = {key: xlib.give(value) for key, value in data.items()}
        with pytest.raises(ValueError, match=f"{name} must be finite, got {bad}"):
            sparse_code(wrong["A"], wrong["b"], 1.0)
        with pytest.raises(ValueError, match=f"{name} must be finite, got {bad}"):
            LeastSquares(wrong["A"], wrong["b"])
    with pytest.raises(ValueError, match=f"x0 must be finite, got {bad}"):
        fista(LeastSquares(xlib.give(A), xlib.give(b)), L1(1.0), xlib.give(np.full(6, bad)))
    with pytest.raises(ValueError, match="strength must be finite and > 0"):
        sparse_code(xlib.give(A), xlib.give(np.stack([b, b])), xlib.give(np.array([1.0, 0.0])))
    with pytest.raises(ValueError, match="strength must be finite and > 0, got"):
        sparse_code(xlib.give(A), xlib.give(b), xlib.give(np.array(bad)))


def test_what_jax_traces_is_no_success_where_it_is_not_finite() -> None:
    jax = pytest.importorskip("jax")
    with jax_precision():
        A, b = (jax.numpy.asarray(v) for v in regression(0, 8))
        codes = jax.jit(lambda A, b, s: sparse_code(A, b, s, tol=1e-3))
        solve = jax.jit(lambda A, b, w, x: fista(LeastSquares(A, b), ElasticNet(w), x, max_iter=33, tol=1e-3))
        weights, start = jax.numpy.ones(6), jax.numpy.zeros(6)
        good, other = codes(A, b, 1.0), solve(A, b, weights, start)
        assert good.success and good.status == 0
        assert int(other.nit) == 33 or other.success
        for bad in (np.nan, np.inf):
            for found in (
                codes(A.at[1, 2].set(bad), b, 1.0),
                codes(A, b.at[3].set(bad), 1.0),
                codes(A, b, bad),
                codes(A, b, -1.0),
                solve(A.at[1, 2].set(bad), b, weights, start),
                solve(A, b.at[3].set(bad), weights, start),
                solve(A, b, weights.at[2].set(bad), start),
                solve(A, b, weights, start + bad),
            ):
                assert not found.success and found.status != 0
        free = solve(A, b, weights.at[0].set(0), start)  # an unpenalised column is found under tracing, too
        assert free.success and free.nit < 33 and np.isfinite(free.gap)


@pytest.mark.parametrize("solver", [ista, fista])
@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_a_step_that_is_too_long_ends_without_success(solver: Any, name: str) -> None:
    (library,) = open_library(name)
    A, b = (library.give(v) for v in regression(0, 8))
    for f in (LeastSquares(A, b), LeastSquares(A, b).__call__):
        with pytest.warns(ConvergenceWarning, match="left the range of the floating-point type"), np.errstate(all="ignore"):
            found = solver(f, L1(1.0), library.give(np.ones(6)), step=10.0)
        assert not found.success and found.status == 2 and found.nit < 10_000
        assert np.isnan(float(found.get("gap", found.get("residual"))))


def test_problems_beside_one_that_diverges_are_solved() -> None:
    curvature = np.array([[1.0], [1e3], [2.0]])
    found = quietly(
        fista, lambda x: ((curvature * (x - 1) ** 2).sum(1) / 2, curvature * (x - 1)), L1(0.1), np.zeros((3, 2)), step=0.4
    )
    assert found.success.tolist() == [True, False, True] and found.status.tolist() == [0, 2, 0]
    np.testing.assert_allclose(found.x[[0, 2], 0], [0.9, 0.95], rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-200, 1e-170, 1e170, 1e200])
def test_squares_that_leave_the_range_of_the_dtype_give_no_false_success(scale: float) -> None:
    A, b = regression(1, 8)
    expected = sparse_code(A, b, 2.0)
    found = quietly(sparse_code, A, b * scale, 2.0 * scale)
    assert found.success
    np.testing.assert_allclose(found.x, expected.x * scale, rtol=1e-8)
    found = quietly(sparse_code, A * scale, b, 2.0 * scale)
    assert not found.success or np.allclose(found.x, expected.x / scale, rtol=1e-3)
    if scale < 1:
        found = quietly(fista, LeastSquares(A, b * scale), L1(2.0 * scale), np.zeros(6), max_iter=50)
        assert not found.success or np.allclose(found.x, expected.x * scale, rtol=1e-3)
    else:
        with pytest.raises(ValueError, match=r"f\(x0\) must be finite"):
            quietly(fista, LeastSquares(A, b * scale), L1(2.0 * scale), np.zeros(6))


# -- the residual -----------------------------------------------------------------------------


class Box:
    """The indicator of [-1, 1]^n, of a user's own."""

    def value(self, x: Any) -> Any:
        return 0.0 * x.sum()

    def prox(self, x: Any, step: Any) -> Any:
        return x.clip(-1, 1)


@pytest.mark.parametrize("solver", [ista, fista])
@pytest.mark.parametrize("step", [1e-20, 1e-9, 1e9, 1e20])
def test_a_residual_does_not_believe_in_the_step(solver: Any, step: float) -> None:
    f = lambda x: (((x - 3) ** 2).sum() / 2, x - 3)
    for penalty, start, best in ((L1(0.1), 5.0, 2.9), (L1(10.0), 5.0, 0.0), (Box(), 0.0, 1.0), (L1(0.0), 5.0, 3.0)):
        found = quietly(solver, f, penalty, np.full(2, start), step=step, max_iter=50)
        assert not found.success or np.allclose(found.x, best, atol=1e-4)


def test_a_residual_is_small_where_nothing_is_penalised_and_the_gradient_vanishes() -> None:
    f = lambda x: (((x - 1) ** 2).sum(), 2 * (x - 1))
    for start in (0.0, 1.0, 1 + 1e-9, 100.0):
        found = fista(f, L1(0.0), np.full(3, start))
        assert found.success
        np.testing.assert_allclose(found.x, 1.0, atol=1e-5)
    assert fista(lambda x: ((x**2).sum(), 2 * x), L1(0.0), np.ones(3)).success
    f = LeastSquares(*regression(2, 8))
    batch = fista(LeastSquares(f.A, np.stack([f.b, -f.b])), GroupL2(0.0, SIX), np.zeros((2, 6)))
    assert batch.success.all()
    np.testing.assert_allclose(batch.x[0], np.linalg.lstsq(f.A, f.b)[0], atol=1e-3)


def test_a_function_that_contradicts_its_gradient_is_no_success() -> None:
    for f in (lambda x: (((x - 1) ** 2).sum(), 1 - x), lambda x: (np.where((x != 2).any(), np.nan, 1.0), x)):
        found = quietly(fista, f, L1(0.1), np.full(2, 2.0), max_iter=100)
        assert not found.success and np.isfinite(found.x).all()


class Seminorm(Penalty):
    """|x_0| + |x_1|: of a user's own, no dataclass, and without a strength."""

    def _value(self, xs: list) -> Any:
        return sum(abs(x[:2]).sum() for x in xs)

    def _prox(self, xs: list, steps: list) -> list:
        return [np.r_[L1(1.0).prox(x[:2], s), x[2:]] for x, s in zip(xs, steps)]

    def _check(self, xs: Any) -> None:
        """Any vector."""


class Concave(Seminorm):
    """-||x||^2 / 10, which has no dual."""

    convex = False

    def _value(self, xs: list) -> Any:
        return -0.1 * sum((x * x).sum() for x in xs)

    def _prox(self, xs: list, steps: list) -> list:
        return [x / (1 - 0.2 * s) for x, s in zip(xs, steps)]


def test_penalties_of_a_user_are_certified_by_what_they_declare() -> None:
    A, b = regression(9, 12)
    found = fista(LeastSquares(A, b), Seminorm(), np.zeros(6))
    assert "gap" in found and found.success
    same = fista(LeastSquares(A, b), L1(np.array([1.0, 1, 0, 0, 0, 0])), np.zeros(6))
    np.testing.assert_allclose(found.x, same.x, atol=1e-10)
    found = fista(LeastSquares(2 * np.eye(2), np.ones(2)), Concave(), np.zeros(2))
    assert "residual" in found and found.success
    np.testing.assert_allclose(found.x, 2 / 3.8, rtol=1e-5)


# -- unpenalised parts ------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", UNPENALISED, ids=repr)
def test_unpenalised_parts_are_certified(penalty: Any) -> None:
    for solver, (A, b) in ((ista, regression(3, 30)), (fista, regression(3, 30)), (fista, regression(4, 4))):
        f = LeastSquares(A, b)
        found = solver(f, penalty, np.zeros(6))
        assert found.success and found.nit < 1000
        tight = quietly(fista, f, penalty, found.x, tol=1e-12)
        assert float(found.fun - tight.fun) <= 1e-6 * float(found.fun) + 1e-13 * (b @ b)


@pytest.mark.parametrize("penalty", UNPENALISED, ids=repr)
def test_the_gap_is_a_bound_at_any_point(penalty: Any) -> None:
    rng = np.random.default_rng(5)
    for rows in (4, 9):
        A, b = regression(5, rows)
        if rows == 9:
            A[:, 1] = 2 * A[:, 0]
        f = LeastSquares(A, b)
        solution = quietly(fista, f, penalty, np.zeros(6), tol=1e-12, max_iter=2000)
        for size in (0.0, 1e-4, 1e-2, 1.0, 100.0):
            x = solution.x + size * rng.normal(size=6)
            bound = f.gap(x, penalty, penalty.value(x))
            assert bound >= (f(x)[0] + penalty.value(x) - solution.fun) * (1 - 1e-9) - 1e-13 * (b @ b)
            assert np.isfinite(bound) or penalty == ElasticNet(0.0)


def test_the_gap_of_least_squares_is_exact() -> None:
    A, b = regression(6, 12)
    f, best = LeastSquares(A, b), np.linalg.lstsq(A, b)[0]
    x = best + 1e-3 * np.arange(6)
    assert np.isclose(f.gap(x, L1(0.0), np.float64(0)), f(x)[0] - f(best)[0], rtol=1e-6)


def test_each_problem_of_a_batch_has_its_own_unpenalised_columns(xlib: Library) -> None:
    A, b = regression(7, 12)
    strengths = np.array([[0.0], [1.0], [0.1]]) * np.array([[1.0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1], [1, 0, 0, 1, 1, 1]])
    signals = np.stack([b, 2 * b, -b])
    for own in (A, np.stack([A, A + 0.1, 2 * A])) if xlib.name != "jax" else (A,):
        f = LeastSquares(xlib.give(own), xlib.give(signals))
        found = fista(f, L1(xlib.give(strengths)), xlib.give(np.zeros((3, 6))), tol=1e-8)
        assert xlib.take(found.success).all()
        for i in range(3):
            alone = fista(LeastSquares(own if own.ndim == 2 else own[i], signals[i]), L1(strengths[i]), np.zeros(6), tol=1e-8)
            np.testing.assert_allclose(xlib.take(found.x)[i], alone.x, atol=1e-10)
            assert int(found.nit[i]) == alone.nit


def test_single_precision_certifies_unpenalised_parts() -> None:
    for rows in (30, 4):
        A, b = (v.astype(np.float32) for v in regression(8, rows))
        for penalty in UNPENALISED:
            assert fista(LeastSquares(A, b), penalty, np.zeros(6, np.float32)).success
