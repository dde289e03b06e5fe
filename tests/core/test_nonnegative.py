"""NonNegative: the exact prox of a penalty on the nonnegative orthant, its dual, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from every_penalty import Ridge, SquareRootGroup
from libraries import open_library
from own_penalty import GroupLog, Log
from plain import PROBLEMS
from scipy.optimize import nnls

from proxopt import L1, ElasticNet, GroupL2, Groups, Nested, NonNegative, Penalty, SparseGroupLasso, max_strength, penalties
from proxopt.penalties import compiled
from proxopt.penalties.declared import levels
from proxopt.solvers import LeastSquares, fista, ista
from proxopt.testing import check_prox

COLUMNS = Groups.along(0)
OWN = [Log(0.1), GroupLog(0.2, groups=COLUMNS), SquareRootGroup(0.3, groups=COLUMNS), Nested(L1(0.1), GroupLog(0.2))]


@dataclass(frozen=True, eq=False)
class Hinge(Penalty):
    """``strength sum_i max(x_i, 0)``: a penalty that depends on signs."""

    strength: Any
    elementwise = True

    def entries(self, x):
        return self.strength * x.clip(0)

    def _prox(self, xs, steps):
        return [x - (x.clip(0) - (x - s * self.strength).clip(0)) for x, s in zip(xs, steps)]


@pytest.mark.parametrize("plain", PROBLEMS, ids=lambda p: p.name)
def test_the_prox_minimises_over_the_orthant_in_any_diagonal_metric(plain):
    rng = np.random.default_rng(0)
    x = plain.arrays(rng.normal(size=plain.size))
    penalty = NonNegative(plain.penalty)
    check_prox(penalty, x, 0.7)
    if not plain.name.startswith("Nested"):  # whose two levels of groups have no exact prox in a metric
        check_prox(penalty, x, plain.arrays(np.exp(rng.normal(size=plain.size))))


@pytest.mark.parametrize("penalty", OWN, ids=repr)
def test_the_prox_of_other_penalties_minimises_over_the_orthant(penalty):
    check_prox(NonNegative(penalty), np.random.default_rng(0).normal(size=(4, 3)), 0.7)


@pytest.mark.parametrize("metric", ["exact", "median", "support"])
def test_metrics_are_those_of_the_penalty_at_the_positive_part(metric):
    rng = np.random.default_rng(0)
    x, step = rng.normal(size=(6, 5)), np.exp(rng.normal(size=(6, 5)))
    penalty = SparseGroupLasso(0.3, groups=COLUMNS)
    got = NonNegative(penalty).with_metric(metric).prox(x, step)
    np.testing.assert_array_equal(got, penalty.with_metric(metric).prox(x.clip(0), step))
    if metric != "median":
        np.testing.assert_array_equal(got == 0, NonNegative(penalty).prox(x, step) == 0)


def test_zeros_are_positive_and_nan_stays():
    p = NonNegative(L1(0.0)).prox(np.array([-0.0, -1.0, 2.0, np.nan]))
    np.testing.assert_array_equal(p, [0.0, 0.0, 2.0, np.nan])
    assert not np.signbit(p[:2]).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_dtype_of_torch(dtype):
    x = torch.tensor([[1.0, -2.0], [3.0, -0.5]], dtype=dtype).T
    p = NonNegative(SparseGroupLasso(0.5, groups=COLUMNS)).prox(x)
    assert p.dtype == dtype and p.shape == x.shape
    torch.testing.assert_close(p, SparseGroupLasso(0.5, groups=COLUMNS).prox(x.clip(0)))
    assert (NonNegative(L1(0.5)).prox(x, 0.0) == x.clip(0)).all()  # step 0 projects


def test_the_value_is_infinite_outside():
    penalty = NonNegative(GroupL2(1.0, weights="none"))
    assert penalty.value(np.array([3.0, 4.0])) == 5
    assert penalty.value(np.array([3.0, -1e-300])) == np.inf
    assert penalty.value(np.zeros((3, 0))) == 0 and penalty.prox(np.zeros((3, 0))).shape == (3, 0)


def test_large_arrays_take_the_compiled_loops(monkeypatch):
    x = np.random.default_rng(0).normal(size=(300, 300)).astype(np.float32)
    penalty = NonNegative(SparseGroupLasso(0.01, groups=COLUMNS))
    fast = penalty.prox(x)
    monkeypatch.setattr(compiled, "prox", lambda *_: None)
    np.testing.assert_allclose(fast, penalty.prox(x), rtol=1e-5, atol=1e-7)


def test_derivatives_are_those_of_the_penalty_and_0_below():
    x = torch.tensor([1.0, -2.0, 0.4, 3.0], dtype=torch.float64, requires_grad=True)
    strength = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, t: NonNegative(GroupL2(t)).prox(x, 0.7), (x, strength))
    (grad,) = torch.autograd.grad(NonNegative(L1(0.5)).prox(x, 1.0).sum(), x)
    assert grad.tolist() == [1, 0, 0, 1]


def test_only_negative_gradients_count_for_the_largest_strength():
    g = np.array([-1.0, 5.0, -3.0])
    assert max_strength(g, NonNegative(L1(1.0))) == 3
    assert max_strength(abs(g), NonNegative(L1(1.0))) == 0
    assert max_strength(g, NonNegative(GroupL2(1.0))) == pytest.approx(max_strength(g.clip(max=0), GroupL2(1.0)))


def test_strength_groups_and_plain_data_are_those_of_the_penalty():
    inner = SparseGroupLasso(0.2, 0.3)
    penalty = NonNegative(inner)
    assert penalty.strength == 0.2 and penalty.with_strength(0.7) == NonNegative(inner.with_strength(0.7))
    assert penalty.with_groups(COLUMNS).partition == COLUMNS and penalty.partition == Groups.whole()
    assert (penalty.convex, penalty.homogeneous, penalty.elementwise, penalty.absolute) == (True, True, False, False)
    assert not NonNegative(ElasticNet(1.0)).homogeneous and not NonNegative(Log(1.0)).convex
    hierarchy = Nested(L1(0.1), GroupL2(0.2))
    for p in (penalty, NonNegative(hierarchy), Nested(NonNegative(L1(0.1)), GroupL2(0.2, COLUMNS))):
        assert penalties.from_dict(json.loads(json.dumps(p.to_dict())), p.strength) == p
    assert levels(Nested(NonNegative(L1(0.1)), GroupL2(0.2)))[0] == L1(0.1)


def test_an_inner_level_may_be_restricted():
    penalty = Nested(NonNegative(L1(0.1)), GroupL2(0.2, COLUMNS))
    x = np.random.default_rng(0).normal(size=(4, 3))
    check_prox(penalty, x, 0.7)
    np.testing.assert_allclose(penalty.prox(x), NonNegative(Nested(L1(0.1), GroupL2(0.2, COLUMNS))).prox(x))


def test_signed_penalties_and_strangers_are_refused():
    class Stranger:
        def value(self, x):
            return 0.0

        def prox(self, x, step=1.0):
            return x

    class Changed(L1):
        def _prox(self, xs, steps):
            return super()._prox(xs, steps)

    for signed in (NonNegative(L1(1.0)), Hinge(1.0), Ridge(1.0), Changed(1.0)):
        with pytest.raises(TypeError, match=f"which {type(signed).__name__} does not declare: set absolute = True"):
            NonNegative(signed)
    with pytest.raises(TypeError, match="penalty must be a Penalty, got"):
        NonNegative(Stranger())
    with pytest.raises(TypeError, match="x must be real for NonNegative, got complex128"):
        NonNegative(L1(1.0)).prox(np.ones(2, complex))
    with pytest.raises(ValueError, match="strength must be finite and >= 0, got -1"):
        NonNegative(L1(1.0)).with_strength(-1.0)


def test_a_wrong_declaration_of_moduli_is_found():
    class Wrong(Hinge):
        absolute = True

    with pytest.raises(AssertionError, match="absolute"):
        check_prox(Wrong(1.0), np.array([1.0, -2.0, 0.3]), 0.5)


@pytest.mark.parametrize("name", ["numpy", "torch", pytest.param("jax", marks=pytest.mark.slow)])
def test_solvers_certify_solutions_by_a_gap(name):
    rng = np.random.default_rng(0)
    A, b = rng.normal(size=(30, 8)), rng.normal(size=30)
    for library in open_library(name):
        found = fista(LeastSquares(*library.give([A, b])), NonNegative(L1(2.0)), library.give(np.zeros(8)), tol=1e-9)
        assert bool(found.success) and "gap" in found
        x = library.take(found.x)
    # the lasso on the orthant is a nonnegative least squares problem with the linear term in one more equation
    slope = A.T @ b - 2.0
    expected, _ = nnls(np.linalg.cholesky(A.T @ A).T, np.linalg.solve(np.linalg.cholesky(A.T @ A), slope))
    np.testing.assert_allclose(x, expected, atol=1e-5)
    assert (x >= 0).all() and (x == 0).any()


@pytest.mark.parametrize("penalty", [L1(0.0), L1(np.array([1.0, 0.0, 2.0, 0.0, 0, 1, 1, 1])), ElasticNet(0.0)], ids=repr)
def test_entries_without_penalty_are_certified_by_a_residual(penalty):
    rng = np.random.default_rng(1)
    f = LeastSquares(rng.normal(size=(30, 8)), rng.normal(size=30))
    found = fista(f, NonNegative(penalty), np.zeros(8), tol=1e-8)
    assert found.success and "residual" in found and "gap" not in found
    if np.ndim(penalty.strength) == 0:
        np.testing.assert_allclose(found.x, nnls(f.A, f.b)[0], atol=1e-6)


def test_a_batch_of_problems_and_a_start_outside():
    rng = np.random.default_rng(2)
    A, b = rng.normal(size=(3, 20, 6)), rng.normal(size=(3, 20))
    penalty = NonNegative(ElasticNet(0.5, 0.5))
    found = fista(LeastSquares(A, b), penalty, -np.ones((3, 6)), tol=1e-9)
    assert found.success.all()
    for i in range(3):
        np.testing.assert_allclose(found.x[i], ista(LeastSquares(A[i], b[i]), penalty, np.zeros(6), tol=1e-9).x, atol=1e-5)
