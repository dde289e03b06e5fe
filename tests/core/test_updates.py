"""The updates against the equations as the papers print them, transcribed here in plain NumPy on their own."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxopt import L1, GroupL2, Groups, SparseGroupLasso, updates
from proxopt.updates import AdamHAPGState, HAPGState, ProxAdamState

STRENGTH, RATIO = 0.05, 0.4
PENALTY = SparseGroupLasso(STRENGTH, RATIO, Groups.along(0))
STEPS = 400


class LeastSquares:
    """f(x) = ||B x - c||^2 / 2 for a matrix x of 6 rows, strongly convex; some columns of the solution are nearly 0."""

    def __init__(self, seed: int, scales: float = 1.0) -> None:
        rng = np.random.default_rng(seed)
        self.start = rng.normal(size=(6, 4))
        b = rng.normal(size=(30, 6)) / 30**0.5 * np.exp(scales * rng.normal(size=6))
        self.hessian = b.T @ b + 0.05 * np.eye(6)
        self.pull = b.T @ rng.normal(size=(30, 4)) * [1.0, 0.02, 0.5, 0.1]

    def gradient(self, x: np.ndarray) -> np.ndarray:
        return self.hessian @ x - self.pull

    @property
    def lipschitz(self) -> float:
        return float(np.linalg.norm(self.hessian, 2))


def sgl(z, eta):
    """SparseNAS Eq. 9 and 10 for the groups along axis 0: eta a number."""
    u = np.sign(z) * np.maximum(np.abs(z) - eta * STRENGTH * RATIO, 0)
    norm = np.maximum(np.linalg.norm(u, axis=0), 1e-300)
    return np.maximum(1 - np.sqrt(len(z)) * eta * STRENGTH * (1 - RATIO) / norm, 0) * u


def sgl_median(z, eta):
    """The same behind Adam: each entry's own step in Eq. 9, the median step of the group in Eq. 10."""
    u = np.sign(z) * np.maximum(np.abs(z) - eta * STRENGTH * RATIO, 0)
    norm = np.maximum(np.linalg.norm(u, axis=0), 1e-300)
    return np.maximum(1 - np.sqrt(len(z)) * np.median(eta, axis=0) * STRENGTH * (1 - RATIO) / norm, 0) * u


def printed_u(t, rule):
    """u_t = (t - 2) / (t + 1) as in Eq. 8, floored at 0 and capped as the rule says."""
    u = (t - 2) / (t + 1)
    if rule == "as_printed":
        return u
    cap = {"nesterov": 1, "default": updates.EXTRAPOLATION}.get(rule, rule)
    return min(max(u, 0), cap)


def adam(grad, m, v, t, lr, b1, b2, eps):
    """Kingma and Ba, Algorithm 1: the moments, the corrected mean, and the step of each entry."""
    m = b1 * m + (1 - b1) * grad
    v = b2 * v + (1 - b2) * grad**2
    return m, v, m / (1 - b1**t), lr / (np.sqrt(v / (1 - b2**t)) + eps)


def printed_hapg(problem, lr, rule, steps):
    """Eq. 6-8 with the velocity v_t, as printed. Yields (A_t, prox point)."""
    a, v, u = problem.start, np.zeros_like(problem.start), 0.0
    for t in range(1, steps + 1):
        z = a - lr * problem.gradient(a)
        v = sgl(z, lr) - a + u * v
        u = printed_u(t, rule)
        a = sgl(z, lr) + u * v
        yield a, sgl(z, lr)


def printed_adam_hapg(problem, lr, rule, steps, b1=0.5, b2=0.999, eps=1e-8):
    a, v, u = problem.start, np.zeros_like(problem.start), 0.0
    m, s = np.zeros_like(a), np.zeros_like(a)
    for t in range(1, steps + 1):
        m, s, m_hat, eta = adam(problem.gradient(a), m, s, t, lr, b1, b2, eps)
        z = a - eta * m_hat
        v = sgl_median(z, eta) - a + u * v
        u = printed_u(t, rule)
        a = sgl_median(z, eta) + u * v
        yield a, sgl_median(z, eta)


RULES = ["default", "nesterov", "as_printed", 0.0]
seeds = st.integers(0, 2**32 - 1)
few = pytest.mark.parametrize("seed", [0, 1, 2])


def extrapolating(rule):
    """The keywords for a rule."""
    return {} if rule == "default" else {"extrapolation": rule}


def same_path(found, expected, atol=1e-12):
    for (x, p), (a, q) in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, a, rtol=1e-11, atol=atol)
        np.testing.assert_allclose(p, q, rtol=1e-11, atol=atol)


def walk(update, problem, steps, **options):
    """The path of an update with PENALTY. Yields (x, prox point)."""
    x, state = problem.start, None
    for _ in range(steps):
        x, state = update(x, problem.gradient(x), state, PENALTY, **options)
        yield x, getattr(state, "point", x)


# -- the printed equations --------------------------------------------------------------------


@few
@pytest.mark.parametrize("rule", RULES)
def test_hapg_is_equations_6_to_8_of_sparsenas(seed, rule):
    problem = LeastSquares(seed)
    lr = 0.9 / problem.lipschitz
    same_path(walk(updates.hapg, problem, STEPS, lr=lr, **extrapolating(rule)), printed_hapg(problem, lr, rule, STEPS))


@few
@pytest.mark.parametrize("rule", RULES)
def test_adam_hapg_is_the_same_recursion_with_adams_step_and_medians(seed, rule):
    problem = LeastSquares(seed)
    found = walk(updates.adam_hapg, problem, STEPS, lr=3e-3, **extrapolating(rule))
    same_path(found, printed_adam_hapg(problem, 3e-3, rule, STEPS), atol=1e-10)  # Adam magnifies rounding


@few
def test_adam_hapg_takes_other_betas_and_eps(seed):
    problem = LeastSquares(seed)
    found = walk(updates.adam_hapg, problem, 50, lr=3e-3, betas=(0.8, 0.9), eps=1e-3, extrapolation=0.5)
    same_path(found, printed_adam_hapg(problem, 3e-3, 0.5, 50, b1=0.8, b2=0.9, eps=1e-3), atol=1e-10)


@few
@pytest.mark.parametrize("rho", [1.0, 0.8, 0.1])
def test_prox_sgd_is_equation_1_of_gsparsity(seed, rho):
    problem, epsilon, tau = LeastSquares(seed), 0.1, 3.0
    w, v = problem.start, np.zeros_like(problem.start)
    for x, p in walk(updates.prox_sgd, problem, STEPS, lr=epsilon, rho=rho, tau=tau):
        v = (1 - rho) * v + rho * problem.gradient(w)
        w_hat = sgl(w - v / tau, 1 / tau)
        w = w + epsilon * (w_hat - w)
        np.testing.assert_allclose(p, w_hat, rtol=1e-11, atol=1e-12)
        np.testing.assert_allclose(x, w, rtol=1e-11, atol=1e-12)


@few
def test_prox_sgd_without_tau_is_the_proximal_gradient_with_momentum(seed):
    problem = LeastSquares(seed)
    lr, rho = 0.3 / problem.lipschitz, 0.8
    w, v = problem.start, np.zeros_like(problem.start)
    for x, p in walk(updates.prox_sgd, problem, STEPS, lr=lr, rho=rho):
        v = (1 - rho) * v + rho * problem.gradient(w)
        w = sgl(w - lr * v, lr)
        np.testing.assert_allclose(x, w, rtol=1e-11, atol=1e-12)
        np.testing.assert_array_equal(x, p)


@few
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_prox_adam_is_adamw_and_then_the_prox_in_its_metric(seed, decay):
    problem, lr = LeastSquares(seed), 3e-3
    x, m, v = problem.start, np.zeros_like(problem.start), np.zeros_like(problem.start)
    for t, (found, _) in enumerate(walk(updates.prox_adam, problem, STEPS, lr=lr, weight_decay=decay), 1):
        m, v, m_hat, eta = adam(problem.gradient(x), m, v, t, lr, 0.9, 0.999, 1e-8)
        x = PENALTY.prox((1 - lr * decay) * x - eta * m_hat, eta)
        np.testing.assert_allclose(found, x, rtol=1e-11, atol=1e-12)


@few
def test_without_penalty_prox_adam_is_adam_and_hapg_is_nesterovs_gradient(seed):
    problem = LeastSquares(seed)
    x, state, y = problem.start, None, problem.start
    m = v = np.zeros_like(y)
    for t in range(1, 101):
        x, state = updates.prox_adam(x, problem.gradient(x), state, None, lr=1e-2)
        m, v, m_hat, eta = adam(problem.gradient(y), m, v, t, 1e-2, 0.9, 0.999, 1e-8)
        y = y - eta * m_hat
        np.testing.assert_allclose(x, y, rtol=1e-11, atol=1e-13)
    a, state, q = problem.start, None, problem.start
    look = q
    for t in range(1, 101):
        a, state = updates.hapg(a, problem.gradient(a), state, None, lr=0.5 / problem.lipschitz, extrapolation="nesterov")
        last, q = q, look - 0.5 / problem.lipschitz * problem.gradient(look)
        look = q + max(0, (t - 2) / (t + 1)) * (q - last)
        np.testing.assert_allclose(a, look, rtol=1e-10, atol=1e-12)


# -- what the form in p promises --------------------------------------------------------------


@given(seed=seeds, rule=st.sampled_from(RULES), dtype=st.sampled_from([np.float32, np.float64]))
def test_the_search_point_is_exactly_zero_once_the_prox_point_was_zero_twice(seed, rule, dtype):
    problem = LeastSquares(seed)
    rng = np.random.default_rng(seed)
    for update, lr in ((updates.hapg, 0.5 / problem.lipschitz), (updates.adam_hapg, 3e-3)):
        x, state, last = problem.start.astype(dtype), None, problem.start
        for _ in range(60):
            noise = 0.1 * rng.normal(size=x.shape)
            x, state = update(x, (problem.gradient(x) + noise).astype(dtype), state, PENALTY, lr=lr, **extrapolating(rule))
            assert not x[(state.point == 0) & (last == 0)].any()
            last = state.point


@pytest.mark.parametrize("update", [updates.prox_sgd, updates.hapg, updates.prox_adam, updates.adam_hapg])
def test_a_list_of_arrays_is_one_joint_problem(update):
    """A matrix, cut into rows that share their column groups, walks the path of the matrix."""
    problem = LeastSquares(0)
    rows = Groups.labels([[0, 1, 2, 3]] * 6)
    apart = SparseGroupLasso(STRENGTH, RATIO, rows)
    x, state = problem.start, None
    parts, states = list(problem.start), None
    for _ in range(100):
        gradient = problem.gradient(x)
        x, state = update(x, gradient, state, PENALTY, lr=1e-2)
        parts, states = update(parts, list(gradient), states, apart, lr=1e-2)
        np.testing.assert_allclose(np.stack(parts), x, rtol=1e-10, atol=1e-13)


def test_nothing_is_changed_in_place():
    problem = LeastSquares(0)
    for update in (updates.prox_sgd, updates.hapg, updates.prox_adam, updates.adam_hapg):
        x, state = update(problem.start, problem.gradient(problem.start), None, PENALTY, lr=0.1)
        copies = [np.copy(v) for v in (x, *state)]
        update(x, problem.gradient(x), state, PENALTY, lr=0.1)
        assert all(np.array_equal(a, b) for a, b in zip(copies, (x, *state)))


def test_lr_0_changes_nothing():
    problem = LeastSquares(0)
    for update in (updates.prox_sgd, updates.hapg, updates.prox_adam, updates.adam_hapg):
        for x, p in walk(update, problem, 5, lr=0.0):
            np.testing.assert_array_equal(x, problem.start)
            np.testing.assert_array_equal(p, problem.start)


def test_states_are_single_precision_where_parameters_are_half():
    x = np.ones((6, 4), np.float16)
    for update in (updates.prox_sgd, updates.hapg, updates.prox_adam, updates.adam_hapg):
        new, state = update(x, x, None, PENALTY, lr=0.1)
        assert new.dtype == np.float16
        assert all(v.dtype == np.float32 for v in state if isinstance(v, np.ndarray))


@pytest.mark.parametrize("rule", [0.5, "as_printed", "nesterov"])
def test_momentum_is_the_same_for_a_counted_and_a_traced_step(rule):
    for t in range(1, 20):
        traced = updates.momentum(np.array([float(t)]), rule)
        assert np.isclose(updates.momentum(t, rule), traced[0])
        assert np.isclose(updates.momentum(t, rule), printed_u(t, rule))
        if not isinstance(rule, str):
            cap = np.array([rule])
            assert np.isclose(updates.momentum(t, cap), printed_u(t, rule)), "the cap may be traced too"
            assert np.isclose(updates.momentum(np.array([float(t)]), cap), printed_u(t, rule))


# -- rest points ------------------------------------------------------------------------------


@cache
def stationary_point(penalty):
    """min f + penalty by the plain proximal gradient, to the last digits."""
    problem = LeastSquares(3, scales=0.3)
    x, step = problem.start, 1 / problem.lipschitz
    for _ in range(3000):
        x = penalty.prox(x - step * problem.gradient(x), step)
    assert np.abs(x - penalty.prox(x - step * problem.gradient(x), step)).max() < 1e-15
    return x


def settled(x, gradient, count=1000):
    """Optimizer states after a long time at x, with second moments that differ inside every group."""
    square = gradient**2 + np.random.default_rng(0).uniform(0.01, 1, x.shape) ** 2
    return {
        "prox_sgd": updates.ProxSGDState(gradient, x, count),
        "hapg": HAPGState(x, count),
        "prox_adam": ProxAdamState(gradient, square, count * 100),
        "adam_hapg": AdamHAPGState(x, gradient, square, count * 100),
    }


REST = {
    "prox_sgd": (updates.prox_sgd, {"lr": 0.1}),
    "prox_sgd tau": (updates.prox_sgd, {"lr": 0.1, "tau": 5.0}),
    "hapg": (updates.hapg, {"lr": 0.1}),
    "hapg nesterov": (updates.hapg, {"lr": 0.1, "extrapolation": "nesterov"}),
    "prox_adam": (updates.prox_adam, {"lr": 0.01}),
    "adam_hapg": (updates.adam_hapg, {"lr": 0.01}),
    "adam_hapg as_printed": (updates.adam_hapg, {"lr": 0.01, "extrapolation": "as_printed"}),
}
REST_PENALTIES = [
    L1(0.05),
    GroupL2(0.05, Groups.along(0)),
    PENALTY,
    SparseGroupLasso(0.05, 0.5, Groups.labels([0, 1, 0, 2, 2, 1])),
]


@pytest.mark.parametrize("penalty", REST_PENALTIES, ids=repr)
@pytest.mark.parametrize("name", REST)
def test_every_update_rests_at_the_stationary_points_in_the_exact_metric(penalty, name):
    problem = LeastSquares(3, scales=0.3)
    best = stationary_point(penalty)
    assert 0 < np.count_nonzero(best) < best.size
    update, options = REST[name]
    x, state = best, settled(best, problem.gradient(best))[name.split()[0]]
    for _ in range(50):
        x, state = update(x, problem.gradient(x), state, penalty.with_metric("exact"), **options)
    np.testing.assert_allclose(x, best, atol=1e-12)
    np.testing.assert_array_equal(x == 0, best == 0)


@pytest.mark.parametrize("name", ["prox_adam", "adam_hapg"])
@pytest.mark.parametrize("metric", ["median", "support"])
def test_median_and_support_move_away_where_steps_differ_inside_a_group(name, metric):
    problem = LeastSquares(3, scales=0.3)
    best = stationary_point(PENALTY)
    update, options = REST[name]
    x, _ = update(
        best, problem.gradient(best), settled(best, problem.gradient(best))[name], PENALTY.with_metric(metric), **options
    )
    assert np.abs(x - best).max() > 1e-5


@pytest.mark.parametrize("name", ["prox_sgd", "prox_sgd tau", "hapg", "hapg nesterov"])
def test_the_updates_with_one_step_for_all_arrive_there(name):
    problem = LeastSquares(3, scales=0.3)
    best = stationary_point(PENALTY)
    update, options = REST[name]
    x, state = problem.start, None
    for _ in range(3000):
        x, state = update(x, problem.gradient(x), state, PENALTY, **options | {"lr": 0.3})
    np.testing.assert_allclose(x, best, atol=1e-8)
    np.testing.assert_array_equal(state.point == 0, best == 0)


def test_the_default_metric_of_adam_hapg_is_the_median_and_elsewhere_exact():
    problem = LeastSquares(3)
    for name, (update, options) in REST.items():
        default, _ = update(problem.start, problem.gradient(problem.start), None, PENALTY, **options)
        metric = "median" if name.startswith("adam_hapg") else "exact"
        explicit, _ = update(problem.start, problem.gradient(problem.start), None, PENALTY.with_metric(metric), **options)
        np.testing.assert_array_equal(default, explicit)


def test_somebody_elses_penalty_serves_too():
    class Box:
        def prox(self, x, step):
            return np.clip(x, -0.5, 0.5)

    x, _ = updates.hapg(np.array([2.0, 0.1]), np.zeros(2), None, Box(), lr=0.1)
    np.testing.assert_array_equal(x, [0.5, 0.1])
